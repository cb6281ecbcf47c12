// SPDX-License-Identifier: MIT
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <moe/kernels/avx2.hpp>
#include <moe/kernels/avx512.hpp>
#include <moe/kernels/blocks.hpp>
#include <moe/kernels/kernels.hpp>

// The dot product of bytes of AVX-512 VNNI on the panels of AVX-512.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

namespace moe::kernels::avx512_vnni {

using avx512::AheadOfGroups, avx512::broadcast, avx512::divided, avx512::fused, avx512::Group,
    avx512::group_at, avx512::kAll, avx512::kColumns, avx512::kGroupBytes, avx512::kLanes, avx512::kNextBlock,
    avx512::kStreams, avx512::kVecs, avx512::load, avx512::load_words, avx512::shifted, avx512::store,
    avx512::times, avx512::unrolled, avx512::Vec, avx512::Words;

inline constexpr int kDotRows = 4, kDotVecs = 4;

inline void store_words(std::byte* to, Words words) {
  _mm512_storeu_si512(reinterpret_cast<__m512i*>(to), words);
}
inline Words broadcast_word(std::int32_t word) { return _mm512_set1_epi32(word); }
inline Words broadcast_word(const std::int8_t* four) {
  std::int32_t word;
  __builtin_memcpy(&word, four, sizeof word);
  return _mm512_set1_epi32(word);
}
inline Vec to_floats(Words ints) { return _mm512_maskz_cvtepi32_ps(kAll, ints); }
template <int n>
inline Words half_bytes(Words words) {
  return _mm512_and_si512(shifted<-n>(words), _mm512_set1_epi8(15));
}
inline Words doubled_e2m1(Words codes) {
  const __m128i values = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  return _mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(kAll, values), codes);
}
template <int kMost>
struct Dots {
  static constexpr bool kIsSigned = false;
  using Codes = Words;
  static Codes codes(Words words) { return words; }

  Words sum;
  void begin(std::int32_t first) { sum = broadcast_word(first); }
  void add(Codes codes, Words x, int) { sum = _mm512_dpbusd_epi32(sum, codes, x); }
};
inline Words magnitude(Vec v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
}
inline Words larger_words(Words a, Words b) { return _mm512_maskz_max_epi32(kAll, a, b); }
inline Words plus_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline __m256i lower_half(Words words) { return __m256i(__builtin_shufflevector(words, words, 0, 1, 2, 3)); }
inline __m256i upper_half(Words words) { return __m256i(__builtin_shufflevector(words, words, 4, 5, 6, 7)); }
inline std::int32_t largest_of(Words words) {
  return avx2::largest_of(avx2::larger_words(lower_half(words), upper_half(words)));
}
inline std::int32_t sum_of(Words words) {
  return avx2::sum_of(avx2::plus_words(lower_half(words), upper_half(words)));
}
inline Words nearest_ints(Vec v) { return _mm512_maskz_cvtps_epi32(kAll, v); }
inline void store_bytes(std::int8_t* to, Words ints) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(kAll, ints));
}

#include <moe/kernels/integers.inc>

}  // namespace moe::kernels::avx512_vnni

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
