// SPDX-License-Identifier: MIT
// Prints what packed layers of each kind of expert give, as one number a row. Inputs are made of whole
// numbers, so that they are the same however this is compiled: then the numbers must be, too.
#include <bit>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
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

std::uint64_t hash(const moe::Matrix<float>& y) {  // FNV-1a
  std::uint64_t h = 14695981039346656037u;
  for (Index i = 0; i < y.size(); ++i)
    for (int shift = 0; shift < 32; shift += 8)
      h = (h ^ ((std::bit_cast<std::uint32_t>(y.data()[i]) >> shift) & 0xFF)) * 1099511628211u;
  return h;
}

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
                             const moe::Routing<float>& routing, moe::InstructionSet set) {
  const auto packed =
      moe::pack<Format>(moe::PackedParts<NoRouter>{.router = {x.cols()}},
                        [&](Index e) { return experts[std::size_t(e)]; }, {.instruction_set = set});
  return hash(packed.forward(x, routing, moe::Sequential{}));
}

template <class E>
void print(const char* name, const typename E::Options& options,
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
    std::printf("%s: f32 %016" PRIx64 " bf16 %016" PRIx64 "\n", name,
                hash_of_output<moe::F32>(experts, x, routing, set),
                hash_of_output<moe::BF16>(experts, x, routing, set));
}

}  // namespace

int main() {
  std::vector<moe::InstructionSet> sets;
  for (const auto set : {moe::InstructionSet::avx2, moe::InstructionSet::avx512})
    if (moe::is_available(set)) sets.push_back(set);
  using moe::FeedForward, moe::GatedFeedForward;
  print<GatedFeedForward<float>>("SwiGLU", {.d_model = 601, .d_ff = 70}, sets);
  print<GatedFeedForward<float, moe::ClampedSwiGLU>>("clamped SwiGLU with biases",
                                                     {.d_model = 65, .d_ff = 71, .bias = true}, sets);
  print<FeedForward<float, moe::GELU>>("GELU with biases", {.d_model = 66, .d_ff = 33, .bias = true}, sets);
  print<FeedForward<float, moe::ReLU>>("ReLU", {.d_model = 64, .d_ff = 34}, sets);
}
