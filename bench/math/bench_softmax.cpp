// SPDX-License-Identifier: MIT
#include "bench.hpp"

namespace moe::bench {
namespace {

void BM_Softmax(benchmark::State& state) {
  const Index tokens = state.range(0), experts = state.range(1);
  const Matrix<float> logits = normal(tokens, experts);
  Matrix<float> probs(tokens, experts);
  for (auto _ : state) {
    for (Index t = 0; t < tokens; ++t) softmax(experts, &logits(t, 0), &probs(t, 0));
    benchmark::DoNotOptimize(probs.data());
  }
  count_tokens(state, tokens);
}
BENCHMARK(BM_Softmax)->ArgNames({"tokens", "experts"})->ArgsProduct({{1024}, {8, 64, 256}});

void BM_LogSumExp(benchmark::State& state) {
  const Index tokens = state.range(0), experts = state.range(1);
  const Matrix<float> logits = normal(tokens, experts);
  for (auto _ : state)
    for (Index t = 0; t < tokens; ++t) benchmark::DoNotOptimize(log_sum_exp(experts, &logits(t, 0)));
  count_tokens(state, tokens);
}
BENCHMARK(BM_LogSumExp)->ArgNames({"tokens", "experts"})->ArgsProduct({{1024}, {8, 64, 256}});

}  // namespace
}  // namespace moe::bench
