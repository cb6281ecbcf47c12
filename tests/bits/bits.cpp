// SPDX-License-Identifier: MIT
// Prints bits that must not depend on how this is compiled, as one number a row: `packed` on flags, `layers`
// on the form of the library. The latter where MOE_BITS_OF_LAYERS says so: it takes long to compile.
#include <bit>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/packed.hpp>
#include <moe/routing/capacity.hpp>

namespace {

using moe::Index;

using Expert =
    moe::VariantExpert<moe::GatedFeedForward<float>, moe::GatedFeedForward<float, moe::ClampedSwiGLU>,
                       moe::FeedForward<float, moe::GELU>, moe::FeedForward<float, moe::ReLU>>;

// ---- Packed layers of each kind of expert. Inputs are made of whole numbers, so that they are the same
// whatever the flags.

// Stands where a router must be: routings are made here.
struct NoRouter {
  using Scalar = float;
  Index width;
  Index d_model() const { return width; }
  Index num_experts() const { return 3; }
  void route(const moe::ConstMatrixRef<float>&, const moe::BatchInfo&, moe::Routing<float>&) const {}
};

// A value in [-1, 1) with 24 bits, exact as a float.
float draw(std::uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return float(std::int32_t(state) >> 8) / 8388608.0f;
}

std::uint64_t hash(const float* values, Index count, std::uint64_t h = 14695981039346656037u) {  // FNV-1a
  for (Index i = 0; i < count; ++i)
    for (int shift = 0; shift < 32; shift += 8)
      h = (h ^ ((std::bit_cast<std::uint32_t>(values[i]) >> shift) & 0xFF)) * 1099511628211u;
  return h;
}
std::uint64_t hash(const moe::Matrix<float>& m) { return hash(m.data(), m.size()); }

// Two experts of three a token, in turn; the third gets rows enough for several tiles.
moe::Routing<float> make_routing(Index tokens, std::uint32_t& state) {
  moe::Routing<float> routing;
  routing.chosen.token_begin.push_back(0);
  for (Index t = 0; t < tokens; ++t) {
    for (const Index e : {t % 5 == 0 ? Index(1) : Index(0), Index(2)}) {
      routing.chosen.expert.push_back(e);
      const float gate = draw(state);
      routing.chosen.gate.push_back(gate < 0 ? -gate : gate);
    }
    routing.chosen.token_begin.push_back(routing.chosen.expert.size());
  }
  routing.plan.num_tokens = tokens;
  routing.plan.token_state.assign(tokens, moe::TokenState::valid);
  routing.plan.expert_begin.assign(4, 0);
  moe::dispatch_all(routing.chosen, routing.plan);
  return routing;
}

template <class Format>
std::uint64_t hash_of_output(const std::vector<Expert>& experts, const moe::Matrix<float>& x,
                             const moe::Routing<float>& routing, moe::InstructionSet set,
                             bool int8_activations = false) {
  // 0 for AVX-512 without VNNI.
  if (int8_activations && !moe::int8_product_of<Format>(set)) return 0;
  const auto packed = moe::pack<Format>(moe::PackedParts<NoRouter>{.router = {x.cols()}},
                                        [&](Index e) { return experts[std::size_t(e)]; },
                                        {.instruction_set = set, .int8_activations = int8_activations});
  return hash(packed.forward(x, routing, moe::Sequential{}));
}

template <class E>
void print_packed(const char* name, const typename E::Options& options,
                  const std::vector<moe::InstructionSet>& sets) {
  std::uint32_t state = 7;
  std::vector<Expert> experts;
  for (int i = 0; i < 3; ++i) {
    E expert(options);
    E::visit(
        [&](const moe::ParameterInfo&, auto& p) {
          for (Index j = 0; j < p.size(); ++j) p.data()[j] = draw(state) / 4;
        },
        expert);
    experts.push_back(expert);
  }
  moe::Matrix<float> x(41, options.d_model);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = draw(state);
  const moe::Routing<float> routing = make_routing(x.rows(), state);
  for (const moe::InstructionSet set : sets)
    std::printf("%s: f32 %016" PRIx64 " bf16 %016" PRIx64 " int8 %016" PRIx64 " int4 with offset %016" PRIx64
                " mxfp4 %016" PRIx64 " fp8 %016" PRIx64 " rounded int8 %016" PRIx64
                " rounded mxfp4 %016" PRIx64 "\n",
                name, hash_of_output<moe::F32>(experts, x, routing, set),
                hash_of_output<moe::BF16>(experts, x, routing, set),
                hash_of_output<moe::Int8>(experts, x, routing, set),
                hash_of_output<moe::Int4Offset>(experts, x, routing, set),
                hash_of_output<moe::MXFP4>(experts, x, routing, set),
                hash_of_output<moe::FP8>(experts, x, routing, set),
                hash_of_output<moe::Int8>(experts, x, routing, set, true),
                hash_of_output<moe::MXFP4>(experts, x, routing, set, true));
}

// What a router makes of floats: its product runs on the kernels, what follows is done number by number.
void print_routing() {
  std::uint32_t state = 9;
  moe::TopKRouter<float> router({.d_model = 201, .num_experts = 9, .top_k = 3, .renormalise = true});
  for (Index i = 0; i < router.w_router.size(); ++i) router.w_router.data()[i] = draw(state) / 4;
  moe::Matrix<float> x(60, 201);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = draw(state);
  moe::Routing<float> routing;
  router.route(x, {}, routing, moe::Sequential{});
  const moe::Buffer<float>& gates = routing.plan.gate;
  std::printf("routing: logits %016" PRIx64 " probs %016" PRIx64 " gates %016" PRIx64 "\n",
              hash(routing.router_logits.data(), routing.router_logits.size()),
              hash(routing.router_probs.data(), routing.router_probs.size()),
              hash(gates.data(), gates.size()));
}

void print_packed() {
  print_routing();
  std::vector<moe::InstructionSet> sets;
  for (const auto set : {moe::InstructionSet::avx2, moe::InstructionSet::avx512})
    if (moe::is_available(set)) sets.push_back(set);
  using moe::FeedForward, moe::GatedFeedForward;
  print_packed<GatedFeedForward<float>>("SwiGLU", {.d_model = 601, .d_ff = 70}, sets);
  print_packed<GatedFeedForward<float, moe::ClampedSwiGLU>>("clamped SwiGLU with biases",
                                                            {.d_model = 65, .d_ff = 71, .bias = true}, sets);
  print_packed<FeedForward<float, moe::GELU>>("GELU with biases", {.d_model = 66, .d_ff = 33, .bias = true},
                                              sets);
  print_packed<FeedForward<float, moe::ReLU>>("ReLU", {.d_model = 64, .d_ff = 34}, sets);
}

#ifdef MOE_BITS_OF_LAYERS
// ---- Layers: an output, a training step, packed layers on every set of kernels.

template <class Format, class Layer>
void print_layer_packed(const char* name, const Layer& layer, const moe::Matrix<float>& x) {
  for (const auto set : {moe::InstructionSet::portable, moe::InstructionSet::avx2,
                         moe::InstructionSet::avx512, moe::InstructionSet::amx}) {
    if (!moe::is_available(set)) continue;
    const auto packed = moe::pack<Format>(layer, {.instruction_set = set});
    std::printf("%s, %s: %016" PRIx64 "\n", name, moe::name_of(set), hash(packed.forward(x)));
  }
}

template <class E>
void print_layer(const char* name) {
  using Layer = moe::MoELayer<E, moe::TopKRouter<float>>;
  moe::Rng rng(3);
  auto experts = moe::make_experts<E>(6, {.d_model = 72, .d_ff = 100}, rng);
  const Layer layer(std::move(experts), moe::TopKRouter<float>({.d_model = 72, .num_experts = 6}, rng));
  moe::Matrix<float> x(75, 72), d_y(75, 72);
  moe::fill_normal(x, 1.0, rng);
  moe::fill_normal(d_y, 1.0, rng);
  std::printf("%s, forward: %016" PRIx64 "\n", name, hash(layer.forward(x)));

  typename Layer::Cache cache;
  Layer grad = moe::zeros_like(layer);
  const moe::Matrix<float> y = layer.forward(x, rng, cache);
  const auto loss = moe::load_balancing_loss(cache.routing);
  const moe::Matrix<float> d_x = layer.backward(d_y, cache, grad, 0.01f * loss.gradient);
  std::uint64_t h = hash(y) ^ hash(d_x);
  Layer::visit([&](const moe::ParameterInfo&, const auto& g) { h = hash(g.data(), g.size(), h); }, grad);
  std::printf("%s, training step: %016" PRIx64 "\n", name, h);

  print_layer_packed<moe::F32>((std::string(name) + " packed in F32").c_str(), layer, x);
  print_layer_packed<moe::BF16>((std::string(name) + " packed in BF16").c_str(), layer, x);
}

void print_layers() {
  print_layer<moe::GatedFeedForward<float>>("SwiGLU");
  print_layer<moe::FeedForward<float>>("ReLU");
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const std::string_view what = argc == 2 ? argv[1] : "";
  if (what == "packed") {
    print_packed();
#ifdef MOE_BITS_OF_LAYERS
  } else if (what == "layers") {
    print_layers();
#endif
  } else {
    std::fprintf(stderr, "bits packed|layers\n");
    return 1;
  }
}
