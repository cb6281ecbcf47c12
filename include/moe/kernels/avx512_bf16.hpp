// SPDX-License-Identifier: MIT
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <moe/kernels/avx512.hpp>
#include <moe/kernels/kernels.hpp>

// The dot product of AVX-512 BF16 on the panels of AVX-512.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

namespace moe::kernels::avx512_bf16 {

using avx512::broadcast, avx512::first_of, avx512::fused, avx512::kHighRows, avx512::kHighVecs,
    avx512::kLanes, avx512::kNarrowPairRows, avx512::kNarrowRows, avx512::kStreams, avx512::kVecs,
    avx512::load, avx512::load_pair, avx512::second_of, avx512::store, avx512::Vec;

// Some steps of a tile: sum [R, V] += pairs of x's columns * pairs of the panel's rows.
template <Index kStride, std::size_t kR, std::size_t kV, class Layout>
inline __attribute__((always_inline)) void steps(Index count, const std::uint16_t* x, const Bfloat16* panel,
                                                 Layout layout, Vec (&sum)[kR][kV]) {
  constexpr int R = int(kR), V = int(kV);
  for (; count > 0; count -= 2, x += 2, panel += 2 * layout.wide) {
    __m512i right[kV];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) right[j] = load_pair(panel + layout.template at<Bfloat16>(j)).bits;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      std::int32_t pair;
      __builtin_memcpy(&pair, x + i * kStride, sizeof pair);
      __m512i left = _mm512_set1_epi32(pair);
#if defined(__clang__)
      asm("" : "+v"(left));  // Clang 16 crashes where it sees through this
#endif
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j)
        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], reinterpret_cast<__m512bh>(left),
                                     reinterpret_cast<__m512bh>(right[j]));
    }
  }
}

#include <moe/kernels/product.inc>

// To nearest, ties to even.
inline void round(Index count, const float* from, std::uint16_t* to, Index width) {
  for (Index i = 0; i < width; i += kLanes) {
    const Index left = count - i;
    const __mmask16 there = left >= kLanes ? avx512::kAll
                            : left > 0     ? __mmask16((1u << left) - 1)
                                           : __mmask16(0);
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), reinterpret_cast<__m256i>(rounded));
  }
}

inline constexpr DotProduct kTable = {kMaxDotRows, kDotDepth, 1, round,
                                      multiply_panels<std::uint16_t, Bfloat16>};

}  // namespace moe::kernels::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
