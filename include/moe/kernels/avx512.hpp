// SPDX-License-Identifier: MIT
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <moe/kernels/blocks.hpp>
#include <moe/kernels/kernels.hpp>

// Kernels for x86 processors with AVX-512, whatever flags the user compiles with.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

namespace moe::kernels::avx512 {

using Vec = __m512;

inline constexpr int kLanes = 16, kVecs = 4, kStreams = 1;
inline constexpr int kNarrowRows = 6, kNarrowPairRows = 6, kHighRows = 6, kHighVecs = 4;
inline constexpr bool kDirect = true;

// Forms with a mask, all of it set: GCC 12 warns of its own headers' unmasked ones.
inline constexpr __mmask16 kAll = 0xFFFF;

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
inline Vec broadcast(float v) { return _mm512_set1_ps(v); }
inline Vec plus(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec times(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec divided(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec smaller(Vec a, Vec b) { return _mm512_maskz_min_ps(kAll, a, b); }
inline Vec larger(Vec a, Vec b) { return _mm512_maskz_max_ps(kAll, a, b); }
inline Vec or_nan(Vec a, Vec b) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32(0x7FFFFFFF));
  return _mm512_mask_mov_ps(a, _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000)), b);
}
#pragma GCC diagnostic push
// Of a mask, in what GCC has as a macro where it does not optimise.
#pragma GCC diagnostic ignored "-Wsign-conversion"
inline Vec nearest_integer(Vec v) {
  return _mm512_maskz_roundscale_ps(kAll, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#pragma GCC diagnostic pop
inline Vec power_of_two(Vec n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_maskz_cvtps_epi32(kAll, n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, exponent, 23));
}

struct Pair {
  __m512i bits;
};
inline Pair load_pair(const Bfloat16* from) {
  return {_mm512_loadu_si512(reinterpret_cast<const __m512i*>(from))};
}
inline Vec first_of(Pair pair) { return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, pair.bits, 16)); }
inline Vec second_of(Pair pair) {
  return _mm512_castsi512_ps(_mm512_and_si512(pair.bits, _mm512_set1_epi32(int(0xFFFF0000))));
}

inline Vec load_quads(const float* from, Index stride) {
  const Vec a = _mm512_castps128_ps512(_mm_loadu_ps(from));
  const Vec b = _mm512_maskz_insertf32x4(kAll, a, _mm_loadu_ps(from + 4 * stride), 1);
  const Vec c = _mm512_maskz_insertf32x4(kAll, b, _mm_loadu_ps(from + 8 * stride), 2);
  return _mm512_maskz_insertf32x4(kAll, c, _mm_loadu_ps(from + 12 * stride), 3);
}
inline Vec low_halves_mixed(Vec a, Vec b) { return _mm512_maskz_unpacklo_ps(kAll, a, b); }
inline Vec high_halves_mixed(Vec a, Vec b) { return _mm512_maskz_unpackhi_ps(kAll, a, b); }
inline Vec low_pairs(Vec a, Vec b) { return _mm512_maskz_shuffle_ps(kAll, a, b, 0x44); }
inline Vec high_pairs(Vec a, Vec b) { return _mm512_maskz_shuffle_ps(kAll, a, b, 0xEE); }

using Words = __m512i;
inline Words load_words(const std::byte* from) {
  return _mm512_loadu_si512(reinterpret_cast<const __m512i*>(from));
}
template <int n>
inline Words shifted(Words words) {
  if constexpr (n >= 0)
    return _mm512_maskz_slli_epi32(kAll, words, unsigned(n));
  else
    return _mm512_maskz_srli_epi32(kAll, words, unsigned(-n));
}
inline Vec placed(Words words, int mask, int bits) {
  constexpr int kAndOr = 0xEA;  // words & mask | bits
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(mask), _mm512_set1_epi32(bits), kAndOr));
}
inline Vec load_halves(const std::byte* from) {
  return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Vec load_powers(const std::byte* from) {
  const __m512i bytes =
      _mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  // Of 0 and 255: 2^-127, and a NaN in place of the infinity.
  const __mmask16 ends =
      _mm512_testn_epi32_mask(_mm512_add_epi32(bytes, _mm512_set1_epi32(1)), _mm512_set1_epi32(254));
  const __m512i powers = _mm512_maskz_slli_epi32(kAll, bytes, 23);
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(powers, ends, powers, _mm512_set1_epi32(0x400000)));
}
struct TwoVecs {
  Vec first, second;
};
inline TwoVecs load_e4m3(const std::byte* from) {
  const __m512i bytes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const __m512i halves = _mm512_and_si512(_mm512_slli_epi16(bytes, 7), _mm512_set1_epi16(short(0xBFFF)));
  return {_mm512_maskz_cvtph_ps(kAll, __m256i(__builtin_shufflevector(halves, halves, 0, 1, 2, 3))),
          _mm512_maskz_cvtph_ps(kAll, __m256i(__builtin_shufflevector(halves, halves, 4, 5, 6, 7)))};
}
template <int bit>
inline Vec e2m1(Words words) {
  return _mm512_maskz_permutexvar_ps(
      kAll, shifted<-bit>(words),
      _mm512_setr_ps(0.0f, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6));
}

// In this order: each builds on the one before.
#include <moe/kernels/product.inc>

#include <moe/kernels/widen.inc>

#include <moe/kernels/elementwise.inc>

#include <moe/kernels/dense.inc>

inline constexpr Kernels kTable = {kColumns, kStreams, kLanes, activate, combine};
inline constexpr DenseKernels kDenseTable = {linear};
inline constexpr DenseBackwardKernels kDenseBackwardTable = {linear_backward_input, linear_backward_weight};

}  // namespace moe::kernels::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
