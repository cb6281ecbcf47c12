// SPDX-License-Identifier: MIT
#include "bench.hpp"

namespace moe::bench {
namespace {

template <class Activation>
void BM_Activate(benchmark::State& state) {
  const Index n = state.range(0);
  const Matrix<float> x = normal(1, n);
  Matrix<float> out(1, n);
  for (auto _ : state) {
    activate(Activation{}, n, x.data(), out.data());
    benchmark::DoNotOptimize(out.data());
  }
  state.counters["values/s"] = benchmark::Counter(double(n), benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(BM_Activate<ReLU>)->ArgName("n")->Arg(4096);
BENCHMARK(BM_Activate<SiLU>)->ArgName("n")->Arg(4096);
BENCHMARK(BM_Activate<GELU>)->ArgName("n")->Arg(4096);
BENCHMARK(BM_Activate<GELUTanh>)->ArgName("n")->Arg(4096);

}  // namespace
}  // namespace moe::bench
