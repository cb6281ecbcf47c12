// SPDX-License-Identifier: MIT
#include "bench.hpp"

namespace moe::bench {
namespace {

void BM_ExpertCapacity(benchmark::State& state) {
  Index tokens = 4096;
  for (auto _ : state) {
    benchmark::DoNotOptimize(tokens);
    benchmark::DoNotOptimize(expert_capacity(tokens, 64, 2, 1.25));
  }
}
BENCHMARK(BM_ExpertCapacity);

void BM_DispatchAll(benchmark::State& state) {
  const Index tokens = state.range(0), experts = state.range(1), k = state.range(2);
  Routing<float> routing = random_routing(tokens, experts, k);
  for (auto _ : state) {
    dispatch_all(routing.chosen, routing.plan);
    benchmark::DoNotOptimize(routing.plan.token.data());
  }
  count_tokens(state, tokens);
}
BENCHMARK(BM_DispatchAll)->ArgNames({"tokens", "experts", "k"})->ArgsProduct({{512, 4096}, {8, 64}, {2}});

// Capacity factor 1 on random choices: some of them overflow.
void BM_ApplyCapacity(benchmark::State& state) {
  const Index tokens = state.range(0), experts = state.range(1), k = 2;
  const auto overflow = Overflow(state.range(2));
  const auto priority = Priority(state.range(3));
  Routing<float> routing = random_routing(tokens, experts, k);
  CapacityWorkspace<float> workspace;
  const IndexVector capacity = IndexVector::Constant(1, expert_capacity(tokens, experts, k, 1.0));
  for (auto _ : state) {
    apply_capacity(routing.chosen, routing.router_logits, capacity, {overflow, priority}, {}, routing.plan,
                   workspace);
    benchmark::DoNotOptimize(routing.plan.token.data());
  }
  count_tokens(state, tokens);
  state.counters["dropped"] = dropped_fraction(routing);
}
BENCHMARK(BM_ApplyCapacity)
    ->ArgNames({"tokens", "experts", "overflow", "priority"})
    ->ArgsProduct({{512, 4096}, {8, 64}, {0, 1, 2}, {0, 1, 2}});

}  // namespace
}  // namespace moe::bench
