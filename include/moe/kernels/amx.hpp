// SPDX-License-Identifier: MIT
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <moe/kernels/avx512.hpp>
#include <moe/kernels/avx512_bf16.hpp>
#include <moe/kernels/kernels.hpp>

// The tiles of AMX on the panels of AVX-512. A tile holds 16 rows of 64 bytes; one instruction multiplies 16
// rows of 32 values by 32 rows of 16 columns. A float goes in as one rounded bfloat16 or as three: its bits,
// eight at a time, so that nothing of it is lost.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

namespace moe::kernels::amx {

using avx512::kAll, avx512::kColumns, avx512::kLanes;

inline constexpr Index kTileRows = 16, kTileDepth = 32;

// What the processor is told about its eight tiles.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, Index count, Index bytes) {
    rows[tile] = std::uint8_t(count);
    row_bytes[tile] = std::uint16_t(bytes);
  }
};

// What is fetched meanwhile, so much a step.
struct Fetch {
  avx512::Ahead ahead;
  Index fetches, steps, due = 0;

  void step() {
    for (due += fetches; due >= steps; due -= steps) avx512::fetch(ahead);
  }
};

// c [rows <= 16, 64] += x * panel, `steps` steps of `deep` <= 32. Tiles 0 to 3 sum, 4 to 6 are parts of x.
template <int kParts>
inline void low_tile(Index rows, Index steps, Index deep, const Parts& x, const std::uint16_t* panel,
                     float* c, bool add, Fetch& fetch) {
  TileShapes shapes;
  for (int t = 0; t < 4; ++t) shapes.set(t, rows, 64);
  for (int t = 4; t < 7; ++t) shapes.set(t, rows, 2 * deep);
  shapes.set(7, deep / 2, 64);
  _tile_loadconfig(&shapes);  // makes all tiles zero
  constexpr Index kStride = kColumns * Index(sizeof(float));
  const Index stride = x.stride * 2;
  if (add) {
    _tile_loadd(0, c, kStride);
    _tile_loadd(1, c + 16, kStride);
    _tile_loadd(2, c + 32, kStride);
    _tile_loadd(3, c + 48, kStride);
  }
  const std::uint16_t* row = x.data;
  for (Index s = 0; s < steps; ++s, row += kTileDepth, panel += kTileDepth * kColumns) {
    fetch.step();
    _tile_loadd(4, row, stride);
    if constexpr (kParts == 3) {
      _tile_loadd(5, row + x.width, stride);
      _tile_loadd(6, row + 2 * x.width, stride);
    }
    _tile_loadd(7, panel, kStride);
    _tile_dpbf16ps(0, 4, 7);
    if constexpr (kParts == 3) {
      _tile_dpbf16ps(0, 5, 7);
      _tile_dpbf16ps(0, 6, 7);
    }
    _tile_loadd(7, panel + 32, kStride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kParts == 3) {
      _tile_dpbf16ps(1, 5, 7);
      _tile_dpbf16ps(1, 6, 7);
    }
    _tile_loadd(7, panel + 64, kStride);
    _tile_dpbf16ps(2, 4, 7);
    if constexpr (kParts == 3) {
      _tile_dpbf16ps(2, 5, 7);
      _tile_dpbf16ps(2, 6, 7);
    }
    _tile_loadd(7, panel + 96, kStride);
    _tile_dpbf16ps(3, 4, 7);
    if constexpr (kParts == 3) {
      _tile_dpbf16ps(3, 5, 7);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, c, kStride);
  _tile_stored(1, c + 16, kStride);
  _tile_stored(2, c + 32, kStride);
  _tile_stored(3, c + 48, kStride);
}

// The same for 17 to 32 rows. Tiles 0 to 3 sum, 4 and 5 are parts of rows of x, 6 and 7 are of the panel.
template <int kParts>
inline void high_tile(Index rows, Index steps, Index deep, const Parts& x, const std::uint16_t* panel,
                      float* c, bool add, Fetch& fetch) {
  TileShapes shapes;
  shapes.set(0, kTileRows, 64);
  shapes.set(1, kTileRows, 64);
  shapes.set(2, rows - kTileRows, 64);
  shapes.set(3, rows - kTileRows, 64);
  shapes.set(4, kTileRows, 2 * deep);
  shapes.set(5, rows - kTileRows, 2 * deep);
  shapes.set(6, deep / 2, 64);
  shapes.set(7, deep / 2, 64);
  _tile_loadconfig(&shapes);
  constexpr Index kStride = kColumns * Index(sizeof(float));
  const Index stride = x.stride * 2;
  for (Index j = 0; j < kColumns; j += 32) {
    float *const top = c + j, *const bottom = top + kTileRows * kColumns;
    if (add) {
      _tile_loadd(0, top, kStride);
      _tile_loadd(1, top + 16, kStride);
      _tile_loadd(2, bottom, kStride);
      _tile_loadd(3, bottom + 16, kStride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const std::uint16_t* row = x.data;
    const std::uint16_t* weight = panel + 2 * j;
    for (Index s = 0; s < steps; ++s, row += kTileDepth, weight += kTileDepth * kColumns) {
      fetch.step();
      _tile_loadd(6, weight, kStride);
      _tile_loadd(7, weight + 32, kStride);
      for (int part = 0; part < kParts; ++part) {
        _tile_loadd(4, row + part * x.width, stride);
        _tile_loadd(5, row + part * x.width + kTileRows * x.stride, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, top, kStride);
    _tile_stored(1, top + 16, kStride);
    _tile_stored(2, bottom, kStride);
    _tile_stored(3, bottom + 16, kStride);
  }
}

template <int kParts>
inline void multiply(Index rows, Index depth, const Parts& x, const std::uint16_t* panel, float* c,
                     bool add, const std::uint16_t* next) {
  __asm__ volatile("" ::: "memory");  // GCC does not know that tile loads read what was written before
  constexpr Index kHigh = 2 * kTileRows;
  const Index whole = depth / kTileDepth, rest = depth % kTileDepth;
  const Index fetches = (depth * kColumns * 2 + 511) / 512;
  const Index low = rows % kHigh > 0 && rows % kHigh <= kTileRows ? 1 : 0;
  const Index passes = 2 * (rows / kHigh + (rows % kHigh > kTileRows ? 1 : 0)) + low;
  Fetch fetch{avx512::fetch_ahead(next, fetches * 512, 1), fetches, passes * (whole + (rest > 0 ? 1 : 0))};
  const auto take = [&](Index begin, Index steps, Index deep, bool onto) {
    for (Index i = 0; i < rows; i += kHigh) {
      const Index high = rows - i < kHigh ? rows - i : kHigh;
      const Parts from{x.data + i * x.stride + begin, x.stride, x.width};
      const auto tile = high > kTileRows ? high_tile<kParts> : low_tile<kParts>;
      tile(high, steps, deep, from, panel + begin * kColumns, c + i * kColumns, onto, fetch);
    }
  };
  if (whole > 0) take(0, whole, kTileDepth, add);
  if (rest > 0) take(whole * kTileDepth, 1, rest + rest % 2, add || whole > 0);
  _tile_release();
  __asm__ volatile("" ::: "memory");
}

// Bits 1 to 8, 9 to 16 and 17 to 24 of each number. What is not finite goes into the first part alone.
inline void split_in_three(Index count, const float* from, std::uint16_t* to, Index width) {
  const __m512i high = _mm512_set1_epi32(int(0xFFFF0000)), exponent = _mm512_set1_epi32(0x7F800000);
  const auto store = [](std::uint16_t* at, __m512i bits) {
    const __m512i upper = _mm512_maskz_srli_epi32(kAll, bits, 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_maskz_cvtepi32_epi16(kAll, upper));
  };
  for (Index i = 0; i < width; i += kLanes) {
    const Index left = count - i;
    const __mmask16 there = left >= kLanes ? kAll : left > 0 ? __mmask16((1u << left) - 1) : __mmask16(0);
    const __m512 value = _mm512_maskz_loadu_ps(there, from + i);
    const __m512i bits = _mm512_castps_si512(value);
    const __mmask16 finite = _mm512_cmpneq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i first = _mm512_and_si512(bits, high);
    const __m512 after_first = _mm512_maskz_sub_ps(finite, value, _mm512_castsi512_ps(first));
    const __m512i second = _mm512_and_si512(_mm512_castps_si512(after_first), high);
    const __m512 third = _mm512_sub_ps(after_first, _mm512_castsi512_ps(second));
    store(to + i, _mm512_mask_or_epi32(first, nan, first, _mm512_set1_epi32(0x00400000)));
    store(to + i + width, second);
    store(to + i + 2 * width, _mm512_castps_si512(third));
  }
}

inline constexpr DotKernels kExactTable = {3, split_in_three, multiply<3>};
inline constexpr DotKernels kTable = {1, avx512_bf16::round, multiply<1>};

}  // namespace moe::kernels::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
