// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include <moe/kernels/select.hpp>
#include <moe/kernels/tables.hpp>

#ifdef _OPENMP
#include <omp.h>
#endif

// What the processor can do at most, measured: multiply-adds a second, bytes a second. A probe takes
// some tens of milliseconds, because a shared machine is another one every few seconds.
namespace moe::bench {

namespace detail {

struct Probes {
  Index per_round;  // multiply-adds
  float (*multiply_adds)(Index rounds);
  float (*read_streams[3])(const float* from, Index count);
  float (*read_ahead[2])(const float* from, Index count, Index block);
};

// Products of bytes with a sum of four; of bytes, or of four bits only.
struct Int8Probes {
  Index per_round;
  float (*bytes)(Index rounds);
  float (*nibbles)(Index rounds);
};

namespace portable {
using namespace kernels::portable;
inline constexpr int kChains = 12;
#include "machine.inc"
}  // namespace portable

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
using namespace kernels::avx2;
inline constexpr int kChains = 12;
#include "machine.inc"
#include "machine_int8.inc"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avxvnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avxvnni,avx2,fma")
#endif
namespace avx2_vnni {
using namespace kernels::avx2_vnni;
#include "machine_int8.inc"
}  // namespace avx2_vnni
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
namespace avx512_vnni {
using namespace kernels::avx512_vnni;
#include "machine_int8.inc"
}  // namespace avx512_vnni
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
namespace avx512 {
using namespace kernels::avx512;
inline constexpr int kChains = 24;
#include "machine.inc"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// As multiply_adds, of pairs of bfloat16: two a lane.
inline constexpr Index kDotsPerRound = 24 * 32;
__attribute__((target("avx512f,avx512bf16"))) inline float multiply_pairs(Index rounds) {
  __m512 sum[24];
  const __m512i ones = _mm512_set1_epi32(0x3F803F80);
  __m512bh factor;
  __builtin_memcpy(&factor, &ones, sizeof ones);
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) sum[i] = _mm512_set1_ps(float(i));
  for (Index round = 0; round < rounds; ++round)
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], factor, factor);
#pragma GCC unroll 24
  for (int i = 1; i < 24; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  float lanes[16];
  _mm512_storeu_ps(lanes, sum[0]);
  return lanes[0];
}

// As multiply_adds, of tiles of bfloat16.
inline constexpr Index kTileMultiplyAdds = 4 * 16 * 16 * 32;
__attribute__((target("amx-tile,amx-bf16"))) inline float multiply_tiles(Index rounds) {
  kernels::amx::TileShapes shapes;
  for (int t = 0; t < 8; ++t) shapes.set(t, 16, 64);
  shapes.load();
  for (Index round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 0;
}
#endif  // __x86_64__

inline const Probes& probes(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512 || set == InstructionSet::amx) return avx512::kProbes;
  if (set == InstructionSet::avx2) return avx2::kProbes;
#endif
  return portable::kProbes;
}

// Calls f(0), ..., f(threads - 1) at the same time; returns the seconds until all have ended.
template <class F>
double seconds_on(int threads, const F& f) {
  const auto start = std::chrono::steady_clock::now();
  if (threads <= 1) {
    f(0);
  } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    f(omp_get_thread_num());
#else
    std::vector<std::jthread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([&f, t] { f(t); });
    f(0);
    others.clear();
#endif
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline volatile float sink;  // so that nothing is computed in vain

// The best of three runs of about five milliseconds.
template <class F>
double best_rate(int threads, Index per_round, const F& multiply) {
  Index rounds = 1 << 12;
  const auto run = [&] { return seconds_on(threads, [&](int) { sink = multiply(rounds); }); };
  run();  // wakes the threads
  rounds = std::max<Index>(rounds, Index(0.005 / run() * double(rounds)));
  double best = 0;
  for (int i = 0; i < 3; ++i)
    best = std::max(best, 2.0 * double(threads) * double(per_round) * double(rounds) / run());
  return best;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace detail

/// Floating-point operations a second, a multiply-add counted as two, that threads reach in registers.
inline double peak_flops(InstructionSet set, int threads) {
  const detail::Probes& probes = detail::probes(set);
  return detail::best_rate(threads, probes.per_round, probes.multiply_adds);
}

/// The same of products with weights in bfloat16, by what the kernels of a set multiply those with. A float
/// that goes in as several numbers takes as many operations.
inline double peak_bf16_flops(InstructionSet set, bool rounded, int threads) {
  [[maybe_unused]] const kernels::DotProduct* const dot = kernels::find_dot(set, rounded);
#if defined(__x86_64__)
  if (dot && set == InstructionSet::amx)
    return detail::best_rate(threads, detail::kTileMultiplyAdds, detail::multiply_tiles) / double(dot->parts);
  if (dot) return detail::best_rate(threads, detail::kDotsPerRound, detail::multiply_pairs);
#endif
  return peak_flops(set, threads);
}

/// Operations a second, a multiply-add counted as two, of products with activations in 8 bits and codes of 8
/// bits or of 4, by what the kernels of a set multiply those with.
inline double peak_int8_ops(InstructionSet set, bool nibbles, int threads) {
#if defined(__x86_64__)
  const auto measure = [&](const detail::Int8Probes& probes) {
    return detail::best_rate(threads, probes.per_round, nibbles ? probes.nibbles : probes.bytes);
  };
  if (set == InstructionSet::avx2)
    return measure(kernels::has_avx_vnni() ? detail::avx2_vnni::kInt8Probes : detail::avx2::kInt8Probes);
  if (set == InstructionSet::avx512 || set == InstructionSet::amx)
    return measure(detail::avx512_vnni::kInt8Probes);
#endif
  return peak_flops(set, threads);
}

/// Bytes a second that threads read from memory, in the way that is the best here: one stream or
/// several at once, or one stream that asks for the next block while it reads this one. The buffer stays
/// for the next time; one that fits into a cache measures the cache.
inline double bandwidth(int threads, Index megabytes = 512) {
  const Index count = megabytes << 18;  // floats
  static std::unique_ptr<float, detail::Free> buffer;
  static Index capacity = 0;
  if (count > capacity) {
    buffer.reset();
    buffer.reset(static_cast<float*>(std::aligned_alloc(1 << 21, std::size_t(count) * sizeof(float))));
    if (!buffer) throw std::bad_alloc();
    std::fill_n(buffer.get(), count, 1.0f);
    capacity = count;
  }
  static Index position = 0;               // each way reads what was read longest ago
  constexpr Index kPart = Index(1) << 24;  // floats a thread: 64 MB
  const Index part = std::max<Index>(1, std::min(kPart, count / (4 * threads)) >> 15) << 15;
  const detail::Probes& probes = detail::probes(best_instruction_set());
  double best = 0;
  const auto measure = [&](const auto& read) {
    if (position + threads * part > capacity) position = 0;
    const float* const from = buffer.get() + position;
    position += threads * part;
    const double seconds = detail::seconds_on(threads, [&](int t) { detail::sink = read(from + t * part); });
    best = std::max(best, double(threads * part) * sizeof(float) / seconds);
  };
  for (const auto& read : probes.read_streams) measure([&](const float* from) { return read(from, part); });
  for (const auto& read : probes.read_ahead)
    for (const Index kilobytes : {64, 128})
      measure([&](const float* from) { return read(from, part, kilobytes * 256); });
  return best;
}

}  // namespace moe::bench
