// SPDX-License-Identifier: MIT
#include "bench.hpp"

namespace moe::bench {
namespace {

// A training routing of a noisy router: all losses have something to do.
Routing<float> noisy_routing(Index tokens, Index experts) {
  Rng rng(3);
  NoisyTopKRouter<float> router({.d_model = 16, .num_experts = experts, .top_k = 2}, rng);
  fill_normal(router.w_router, 0.5, rng);
  Routing<float> routing;
  router.route(normal(tokens, 16), rng, {}, routing, Sequential{});
  return routing;
}

template <class F>
void run(benchmark::State& state, const F& loss) {
  const Index tokens = state.range(0), experts = state.range(1);
  const Routing<float> routing = noisy_routing(tokens, experts);
  for (auto _ : state) benchmark::DoNotOptimize(loss(routing).value);
  count_tokens(state, tokens);
}

void BM_LoadBalancingLoss(benchmark::State& state) {
  run(state, [](const auto& r) { return load_balancing_loss(r); });
}
void BM_ImportanceLoss(benchmark::State& state) {
  run(state, [](const auto& r) { return importance_loss(r); });
}
void BM_LoadLoss(benchmark::State& state) {
  run(state, [](const auto& r) { return load_loss(r); });
}
void BM_RouterZLoss(benchmark::State& state) {
  run(state, [](const auto& r) { return router_z_loss(r); });
}
BENCHMARK(BM_LoadBalancingLoss)->ArgNames({"tokens", "experts"})->ArgsProduct({{4096}, {8, 64}});
BENCHMARK(BM_ImportanceLoss)->ArgNames({"tokens", "experts"})->ArgsProduct({{4096}, {8, 64}});
BENCHMARK(BM_LoadLoss)->ArgNames({"tokens", "experts"})->ArgsProduct({{4096}, {8, 64}});
BENCHMARK(BM_RouterZLoss)->ArgNames({"tokens", "experts"})->ArgsProduct({{4096}, {8, 64}});

}  // namespace
}  // namespace moe::bench
