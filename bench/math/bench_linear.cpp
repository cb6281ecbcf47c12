// SPDX-License-Identifier: MIT
#include "bench.hpp"

namespace moe::bench {
namespace {

// The three products of one linear layer of 768 x 2048, for the few rows that an expert gets.
constexpr Index kIn = 768, kOut = 2048;

void BM_Linear(benchmark::State& state) {
  const Index rows = state.range(0);
  const Matrix<float> x = normal(rows, kIn), w = normal(kOut, kIn);
  Matrix<float> y(rows, kOut);
  for (auto _ : state) {
    linear(x, w, y);
    benchmark::DoNotOptimize(y.data());
  }
  count_flops(state, 2.0 * double(rows * kIn * kOut));
}
BENCHMARK(BM_Linear)->ArgName("rows")->RangeMultiplier(4)->Range(1, 256);

void BM_LinearEigen(benchmark::State& state) {
  const Index rows = state.range(0);
  const Matrix<float> x = normal(rows, kIn), w = normal(kOut, kIn);
  Matrix<float> y(rows, kOut);
  Eigen::setNbThreads(1);
  for (auto _ : state) {
    y.noalias() = x * w.transpose();
    benchmark::DoNotOptimize(y.data());
  }
  Eigen::setNbThreads(0);
  count_flops(state, 2.0 * double(rows * kIn * kOut));
}
BENCHMARK(BM_LinearEigen)->ArgName("rows")->RangeMultiplier(4)->Range(1, 256);

void BM_LinearBackwardInput(benchmark::State& state) {
  const Index rows = state.range(0);
  const Matrix<float> d_y = normal(rows, kOut), w = normal(kOut, kIn);
  Matrix<float> d_x(rows, kIn);
  for (auto _ : state) {
    linear_backward_input(d_y, w, d_x);
    benchmark::DoNotOptimize(d_x.data());
  }
  count_flops(state, 2.0 * double(rows * kIn * kOut));
}
BENCHMARK(BM_LinearBackwardInput)->ArgName("rows")->RangeMultiplier(4)->Range(1, 256);

void BM_LinearBackwardWeight(benchmark::State& state) {
  const Index rows = state.range(0);
  const Matrix<float> d_y = normal(rows, kOut), x = normal(rows, kIn);
  Matrix<float> d_w = Matrix<float>::Zero(kOut, kIn);
  for (auto _ : state) {
    linear_backward_weight(d_y, x, d_w);
    benchmark::DoNotOptimize(d_w.data());
  }
  count_flops(state, 2.0 * double(rows * kIn * kOut));
}
BENCHMARK(BM_LinearBackwardWeight)->ArgName("rows")->RangeMultiplier(4)->Range(1, 256);

}  // namespace
}  // namespace moe::bench
