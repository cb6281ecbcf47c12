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

inline constexpr int kDotRows = 4, kDotVecs = 2;
inline void store_words(std::byte* to, Words words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
}
inline Words broadcast_word(std::int32_t word) { return _mm256_set1_epi32(word); }
inline Words broadcast_word(const std::int8_t* four) {
  std::int32_t word;
  __builtin_memcpy(&word, four, sizeof word);
  return _mm256_set1_epi32(word);
}
inline Vec to_floats(Words ints) { return _mm256_cvtepi32_ps(ints); }
template <int n>
inline Words half_bytes(Words words) {
  return _mm256_and_si256(shifted<-n>(words), _mm256_set1_epi8(15));
}
inline Words doubled_e2m1(Words codes) {
  const __m128i values = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes);
}
// Products of two neighbours are summed in 16 bits, where they fit: those of one word, if the codes are
// signed (of the factors one takes the other's sign: what the instruction multiplies is at most 128 * 127
// twice), those of as many words as may be, if the codes are small.
template <int kMost>
struct Dots {
  static constexpr bool kIsSigned = kMost * 2 * 127 > 32767;
  static constexpr int kWords = kMost * 16 * 127 <= 32767 ? 8 : kMost * 8 * 127 <= 32767 ? 4 : 1;
  struct Codes {
    Words magnitude, number;
  };
  static Codes codes(Words words) {
    if constexpr (!kIsSigned) return {words, words};
    const Words number = _mm256_xor_si256(words, _mm256_set1_epi8(-128));
    return {_mm256_abs_epi8(number), number};
  }

  Words sum, narrow;
  void begin(std::int32_t first) {
    sum = broadcast_word(first);
    narrow = _mm256_setzero_si256();
  }
  void add(const Codes& codes, Words x, int w) {
    if constexpr (kIsSigned) x = _mm256_sign_epi8(x, codes.number);
    const Words products = _mm256_maddubs_epi16(codes.magnitude, x);
    narrow = w % kWords == 0 ? products : _mm256_add_epi16(narrow, products);
    if ((w + 1) % kWords == 0) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
  }
};
inline Words magnitude(Vec v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF));
}
inline Words larger_words(Words a, Words b) { return _mm256_max_epi32(a, b); }
inline Words plus_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline std::int32_t largest_of(Words words) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}
inline std::int32_t sum_of(Words words) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}
inline Words nearest_ints(Vec v) { return _mm256_cvtps_epi32(v); }
inline void store_bytes(std::int8_t* to, Words ints) {
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(halves, halves));
}

// In this order: each builds on the one before.
#include <moe/kernels/product.inc>

#include <moe/kernels/widen.inc>

#include <moe/kernels/integers.inc>

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
