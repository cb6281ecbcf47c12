// SPDX-License-Identifier: MIT
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <moe/kernels/blocks.hpp>
#include <moe/kernels/kernels.hpp>

// Kernels for x86 processors with AVX2 and FMA, whatever flags the user compiles with.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace moe::kernels::avx2 {

using Vec = __m256;

inline constexpr int kLanes = 8, kVecs = 4, kStreams = 4;
inline constexpr int kNarrowRows = 3, kNarrowPairRows = 2, kHighRows = 6, kHighVecs = 2;
inline constexpr bool kDirect = true;

inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
inline Vec broadcast(float v) { return _mm256_set1_ps(v); }
inline Vec plus(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec times(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec divided(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fused(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec or_nan(Vec a, Vec b) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(b), _mm256_set1_epi32(0x7FFFFFFF));
  return _mm256_blendv_ps(a, b,
                          _mm256_castsi256_ps(_mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000))));
}
inline Vec nearest_integer(Vec v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec power_of_two(Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

struct Pair {
  __m256i bits;
};
inline Pair load_pair(const Bfloat16* from) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
}
inline Vec first_of(Pair pair) { return _mm256_castsi256_ps(_mm256_slli_epi32(pair.bits, 16)); }
inline Vec second_of(Pair pair) {
  return _mm256_castsi256_ps(_mm256_and_si256(pair.bits, _mm256_set1_epi32(int(0xFFFF0000))));
}

inline Vec load_quads(const float* from, Index stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + 4 * stride), 1);
}
inline Vec low_halves_mixed(Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); }
inline Vec high_halves_mixed(Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); }
inline Vec low_pairs(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0x44); }
inline Vec high_pairs(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0xEE); }

using Words = __m256i;
inline Words load_words(const std::byte* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
template <int n>
inline Words shifted(Words words) {
  if constexpr (n >= 0)
    return _mm256_slli_epi32(words, n);
  else
    return _mm256_srli_epi32(words, -n);
}
inline Vec placed(Words words, int mask, int bits) {
  return _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_and_si256(words, _mm256_set1_epi32(mask)), _mm256_set1_epi32(bits)));
}
inline Vec load_halves(const std::byte* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Vec load_powers(const std::byte* from) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  // Of 0 and 255: 2^-127, and a NaN in place of the infinity.
  const __m256i ends =
      _mm256_and_si256(_mm256_add_epi32(bytes, _mm256_set1_epi32(1)), _mm256_set1_epi32(254));
  const __m256i half =
      _mm256_and_si256(_mm256_cmpeq_epi32(ends, _mm256_setzero_si256()), _mm256_set1_epi32(0x400000));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(bytes, 23), half));
}
struct TwoVecs {
  Vec first, second;
};
inline TwoVecs load_e4m3(const std::byte* from) {
  const __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(bytes, 7), _mm256_set1_epi16(short(0xBFFF)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
template <int bit>
inline Vec e2m1(Words words) {
  const Vec magnitude =
      _mm256_permutevar8x32_ps(_mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6), shifted<-bit>(words));
  const Vec sign = _mm256_and_ps(_mm256_castsi256_ps(shifted<28 - bit>(words)), _mm256_set1_ps(-0.0f));
  return _mm256_or_ps(magnitude, sign);
}

// In this order: each builds on the one before.
#include <moe/kernels/product.inc>

#include <moe/kernels/widen.inc>

#include <moe/kernels/elementwise.inc>

#include <moe/kernels/dense.inc>

inline constexpr Kernels kTable = {kColumns, kStreams, kLanes, activate, combine};
inline constexpr DenseKernels kDenseTable = {linear};
inline constexpr DenseBackwardKernels kDenseBackwardTable = {linear_backward_input, linear_backward_weight};

}  // namespace moe::kernels::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
