// SPDX-License-Identifier: MIT
#include "bench.hpp"

namespace moe::bench {
namespace {

void BM_TopK(benchmark::State& state) {
  const Index tokens = state.range(0), experts = state.range(1), k = state.range(2);
  const Matrix<float> logits = normal(tokens, experts);
  IndexVector chosen(k);
  for (auto _ : state)
    for (Index t = 0; t < tokens; ++t) {
      top_k(experts, &logits(t, 0), k, chosen.data());
      benchmark::DoNotOptimize(chosen.data());
    }
  count_tokens(state, tokens);
}
BENCHMARK(BM_TopK)->ArgNames({"tokens", "experts", "k"})->ArgsProduct({{4096}, {8, 64, 256}, {1, 2, 8}});

}  // namespace
}  // namespace moe::bench
