// SPDX-License-Identifier: MIT
// What compiler flags change: the same packed layer from two libraries, one compiled for this processor, one
// with plain -O2.
#ifdef MOE_BENCH_PLAIN
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include <benchmark/benchmark.h>

#include "flags/packed_step.hpp"

namespace moe::bench {
namespace {

PackedStep load(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* const function = library ? dlsym(library, "moe_packed_step") : nullptr;
  return function ? reinterpret_cast<PackedStep (*)()>(function)() : PackedStep{};
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// plain_over_native: the time of plain -O2 over the other's, the median of pairs of runs, and the geometric
// mean over both orders of making the layers, because memory that was taken later may be slower.
void BM_Flags(benchmark::State& state) {
  const PackedStep steps[2] = {load(MOE_BENCH_NATIVE), load(MOE_BENCH_PLAIN)};
  if (!steps[0].make || !steps[1].make) return state.SkipWithError("a library is missing");
  const std::ptrdiff_t d_model = 2048, d_ff = 1024, experts = 16, top_k = 8;
  const std::ptrdiff_t tokens = state.range(0);
  const int threads = int(state.range(1));
  double ratio = 1, native = 0;
  for ([[maybe_unused]] auto _ : state) {
    for (const int first : {0, 1}) {
      void* layer[2];
      for (const int i : {first, 1 - first}) {
        layer[i] = steps[i].make(d_model, d_ff, experts);
        steps[i].set_tokens(layer[i], tokens, top_k);
        steps[i].forward(layer[i], threads);
      }
      if (std::memcmp(steps[0].output(layer[0]), steps[1].output(layer[1]),
                      std::size_t(tokens * d_model) * sizeof(float)) != 0)
        state.SkipWithError("other bits");
      std::vector<double> seconds[2], ratios;
      for (int run = 0; run < 30; ++run) {
        for (const int k : {0, 1}) {
          const int i = (run + k) % 2;
          const auto start = std::chrono::steady_clock::now();
          steps[i].forward(layer[i], threads);
          seconds[i].push_back(
              std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
        ratios.push_back(seconds[1].back() / seconds[0].back());
      }
      ratio *= std::sqrt(median(ratios));
      native += median(seconds[0]) / 2;
      for (const int i : {0, 1}) steps[i].destroy(layer[i]);
    }
    state.SetIterationTime(native);
  }
  state.counters["plain_over_native"] = ratio;
}
BENCHMARK(BM_Flags)
    ->ArgNames({"tokens", "threads"})
    ->ArgsProduct({{1, 8, 64, 512}, {1, 2}})
    ->Iterations(1)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace moe::bench
#endif
