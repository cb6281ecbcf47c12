// SPDX-License-Identifier: MIT
#include "bench.hpp"

namespace moe::bench {
namespace {

constexpr Index kModel = 256;

template <class Router>
void run(benchmark::State& state, const Router& router) {
  const Index tokens = state.range(0);
  const Matrix<float> x = normal(tokens, kModel);
  Routing<float> routing;
  RouterWorkspace<float> workspace;
  for (auto _ : state) {
    router.route(x, {}, routing, workspace, Sequential{});
    benchmark::DoNotOptimize(routing.plan.token.data());
  }
  count_tokens(state, tokens);
}

void BM_TopKRouter(benchmark::State& state) {
  Rng rng(1);
  run(state, TopKRouter<float>({.d_model = kModel, .num_experts = state.range(1)}, rng));
}
void BM_NoisyTopKRouter(benchmark::State& state) {
  Rng rng(1);
  const NoisyTopKRouter<float> router({.d_model = kModel, .num_experts = state.range(1)}, rng);
  const Index tokens = state.range(0);
  const Matrix<float> x = normal(tokens, kModel);
  Routing<float> routing;
  RouterWorkspace<float> workspace;
  for (auto _ : state) {
    router.route(x, rng, {}, routing, workspace, Sequential{});
    benchmark::DoNotOptimize(routing.plan.token.data());
  }
  count_tokens(state, tokens);
}
void BM_ExpertChoiceRouter(benchmark::State& state) {
  Rng rng(1);
  run(state, ExpertChoiceRouter<float>({.d_model = kModel, .num_experts = state.range(1)}, rng));
}
BENCHMARK(BM_TopKRouter)->ArgNames({"tokens", "experts"})->ArgsProduct({{64, 1024}, {8, 64}});
BENCHMARK(BM_NoisyTopKRouter)->ArgNames({"tokens", "experts"})->ArgsProduct({{64, 1024}, {8, 64}});
BENCHMARK(BM_ExpertChoiceRouter)->ArgNames({"tokens", "experts"})->ArgsProduct({{64, 1024}, {8, 64}});

}  // namespace
}  // namespace moe::bench
