// SPDX-License-Identifier: MIT
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <moe/kernels/avx2.hpp>
#include <moe/kernels/blocks.hpp>
#include <moe/kernels/kernels.hpp>

// The dot product of bytes of AVX-VNNI on the panels of AVX2.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avxvnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avxvnni,avx2,fma,f16c")
#endif

namespace moe::kernels::avx2_vnni {

using avx2::AheadOfGroups, avx2::broadcast, avx2::broadcast_word, avx2::divided, avx2::doubled_e2m1,
    avx2::fused, avx2::Group, avx2::group_at, avx2::half_bytes, avx2::kColumns, avx2::kDotRows,
    avx2::kDotVecs, avx2::kGroupBytes, avx2::kLanes, avx2::kNextBlock, avx2::kStreams, avx2::kVecs,
    avx2::larger_words, avx2::largest_of, avx2::load, avx2::load_words, avx2::magnitude, avx2::nearest_ints,
    avx2::plus_words, avx2::shifted, avx2::store, avx2::store_bytes, avx2::store_words, avx2::sum_of,
    avx2::times, avx2::to_floats, avx2::unrolled, avx2::Vec, avx2::Words;

template <int kMost>
struct Dots {
  static constexpr bool kIsSigned = false;
  using Codes = Words;
  static Codes codes(Words words) { return words; }

  Words sum;
  void begin(std::int32_t first) { sum = broadcast_word(first); }
  void add(Codes codes, Words x, int) { sum = _mm256_dpbusd_avx_epi32(sum, codes, x); }
};

#include <moe/kernels/integers.inc>

}  // namespace moe::kernels::avx2_vnni

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
