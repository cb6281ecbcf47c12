// SPDX-License-Identifier: MIT
// Prints the bits of what layers compute: an output, a training step, packed layers on every set of kernels.
// Compiled in both forms of the library, which must print the same.
#include <bit>
#include <cinttypes>
#include <cstdint>
#include <cstdio>

#include <moe/packed.hpp>

namespace {

using moe::Index;

std::uint64_t hash(const float* values, Index count, std::uint64_t h = 14695981039346656037u) {  // FNV-1a
  for (Index i = 0; i < count; ++i)
    for (int shift = 0; shift < 32; shift += 8)
      h = (h ^ ((std::bit_cast<std::uint32_t>(values[i]) >> shift) & 0xFF)) * 1099511628211u;
  return h;
}
std::uint64_t hash(const moe::Matrix<float>& m) { return hash(m.data(), m.size()); }

template <class Format, class Layer>
void print_packed(const char* name, const Layer& layer, const moe::Matrix<float>& x) {
  for (const auto set : {moe::InstructionSet::portable, moe::InstructionSet::avx2,
                         moe::InstructionSet::avx512, moe::InstructionSet::amx}) {
    if (!moe::is_available(set)) continue;
    const auto packed = moe::pack<Format>(layer, {.instruction_set = set});
    std::printf("%s, %s: %016" PRIx64 "\n", name, moe::name_of(set), hash(packed.forward(x)));
  }
}

template <class Expert>
void print(const char* name) {
  using Layer = moe::MoELayer<Expert, moe::TopKRouter<float>>;
  moe::Rng rng(3);
  auto experts = moe::make_experts<Expert>(6, {.d_model = 72, .d_ff = 100}, rng);
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

  print_packed<moe::F32>((std::string(name) + " packed in F32").c_str(), layer, x);
  print_packed<moe::BF16>((std::string(name) + " packed in BF16").c_str(), layer, x);
}

}  // namespace

int main() {
  print<moe::GatedFeedForward<float>>("SwiGLU");
  print<moe::FeedForward<float>>("ReLU");
}
