// SPDX-License-Identifier: MIT
#pragma once

#include <benchmark/benchmark.h>

#include <chrono>

#include <moe/moe.hpp>

// What the benchmarks share: random inputs and counters.
namespace moe::bench {

inline Matrix<float> normal(Index rows, Index cols, std::uint64_t seed = 1) {
  Rng rng(seed);
  Matrix<float> m(rows, cols);
  fill_normal(m, 1.0, rng);
  return m;
}

/// Random choices of `k` different experts for each token, with a plan to fill.
inline Routing<float> random_routing(Index tokens, Index experts, Index k) {
  Rng rng(2);
  TopKRouter<float> router({.d_model = 16, .num_experts = experts, .top_k = k}, rng);
  Routing<float> routing;
  router.route(normal(tokens, 16), {}, routing, Sequential{});
  return routing;
}

/// Sets the counter tokens/s.
inline void count_tokens(benchmark::State& state, Index tokens) {
  state.counters["tokens/s"] =
      benchmark::Counter(double(tokens), benchmark::Counter::kIsIterationInvariantRate);
}

/// Sets the counter FLOP/s; a multiply-add is two.
inline void count_flops(benchmark::State& state, double flops) {
  state.counters["FLOP/s"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
}

/// Seconds that f takes at best over some runs, for the counters that compare two parts.
template <class F>
double best_seconds(const F& f) {
  double best = 1e30;
  for (int run = 0; run < 5; ++run) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace moe::bench
