// SPDX-License-Identifier: MIT
#include "bench.hpp"

namespace moe::bench {
namespace {

void BM_Dispatch(benchmark::State& state) {
  const Index tokens = state.range(0), d_model = state.range(1);
  const Routing<float> routing = random_routing(tokens, 16, 2);
  const Matrix<float> x = normal(tokens, d_model);
  RowBuffer<float> rows;
  for (auto _ : state) {
    dispatch(x, routing.plan, rows, Sequential{});
    benchmark::DoNotOptimize(rows.data());
  }
  count_tokens(state, tokens);
}
BENCHMARK(BM_Dispatch)->ArgNames({"tokens", "d_model"})->ArgsProduct({{512, 4096}, {64, 1024}});

void BM_Combine(benchmark::State& state) {
  const Index tokens = state.range(0), d_model = state.range(1);
  const Routing<float> routing = random_routing(tokens, 16, 2);
  const Matrix<float> x = normal(tokens, d_model);
  Matrix<float> y(tokens, d_model);
  RowBuffer<float> rows;
  dispatch(x, routing.plan, rows, Sequential{});
  for (auto _ : state) {
    combine(rows, routing.plan, x, y, Sequential{});
    benchmark::DoNotOptimize(y.data());
  }
  count_tokens(state, tokens);
}
BENCHMARK(BM_Combine)->ArgNames({"tokens", "d_model"})->ArgsProduct({{512, 4096}, {64, 1024}});

}  // namespace
}  // namespace moe::bench
