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
#pragma clang attribute push(                                                                            \
    __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
    apply_to = function)
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
  // All tiles are zero after it.
  void load() const {
    __asm__ volatile("" : : "r"(this) : "memory");  // GCC 12 thinks that eight bytes are read
    _tile_loadconfig(this);
  }
};

// What is fetched while tiles are multiplied: lines from four places of a block in turn, spread evenly.
// Several at once would keep the loads of tiles waiting.
struct Fetch {
  const char* at;
  Index stride, lines, steps, due = 0, place = 0;

  void step() {
    for (due += lines; due >= steps; due -= steps) {
      __builtin_prefetch(at + place * stride, 0, 2);
      if (++place < 4) continue;
      place = 0;
      at += 64;
    }
  }
};

// c [rows <= 16, 64] (+)= x * panel, `steps` steps of `deep` <= 32. Tiles 0 and 1 sum. With all eight
// in use a product takes up to twice as long where the core is shared.
template <int kParts>
inline void multiply_tile(Index rows, Index steps, Index deep, const Parts<std::uint16_t>& x,
                          const Bfloat16* panel, float* c, bool add, Fetch& fetch) {
  TileShapes shapes;
  shapes.set(0, rows, 64);
  shapes.set(1, rows, 64);
  shapes.set(2, rows, 2 * deep);
  shapes.set(3, deep / 2, 64);
  shapes.set(4, deep / 2, 64);
  shapes.load();
  constexpr Index kStride = kColumns * Index(sizeof(float));
  for (Index j = 0; j < kColumns; j += 2 * kLanes) {
    if (add) {
      _tile_loadd(0, c + j, kStride);
      _tile_loadd(1, c + j + kLanes, kStride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    const std::uint16_t* row = x.data;
    const Bfloat16* weight = panel + 2 * j;
    for (Index s = 0; s < steps; ++s, row += kTileDepth, weight += kTileDepth * kColumns) {
      _tile_loadd(3, weight, kStride);
      _tile_loadd(4, weight + 2 * kLanes, kStride);
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part) {
        _tile_loadd(2, row + part * x.width, 2 * x.stride);
        fetch.step();
        _tile_dpbf16ps(0, 2, 3);
        fetch.step();
        _tile_dpbf16ps(1, 2, 4);
      }
    }
    _tile_stored(0, c + j, kStride);
    _tile_stored(1, c + j + kLanes, kStride);
  }
}

template <int kParts>
inline void multiply_panel(Index rows, Index depth, const Parts<std::uint16_t>& x, const Bfloat16* panel,
                           float* c, bool add, const std::byte* next) {
  const Index whole = depth / kTileDepth, rest = depth % kTileDepth;
  const Index products = (rows + kTileRows - 1) / kTileRows * (kColumns / kLanes) * kParts;
  const Index place_lines = (depth * kColumns * 2 + 255) / 256;
  Fetch fetch{reinterpret_cast<const char*>(next), place_lines * 64, place_lines * 4,
              products * (whole + (rest > 0 ? 1 : 0))};
  for (Index i = 0; i < rows; i += kTileRows) {
    const Index high = rows - i < kTileRows ? rows - i : kTileRows;
    const Parts<std::uint16_t> from{x.data + i * x.stride, x.stride, x.width};
    float* const to = c + i * kColumns;
    if (whole > 0) multiply_tile<kParts>(high, whole, kTileDepth, from, panel, to, add, fetch);
    if (rest > 0) {
      const Index begin = whole * kTileDepth;
      multiply_tile<kParts>(high, 1, rest + rest % 2,
                            Parts<std::uint16_t>{from.data + begin, x.stride, x.width},
                            panel + begin * kColumns, to, add || whole > 0, fetch);
    }
  }
}

template <int kParts>
inline void multiply(Index rows, Index depth, const Parts<std::uint16_t>& x, const std::byte* panel,
                     Index apart, Index panels, float* c, bool add, const std::byte* next) {
  __asm__ volatile("" ::: "memory");  // GCC does not know that tile loads read what was written before
  for (; panels > 0; --panels, panel += apart, c += rows * kColumns)
    multiply_panel<kParts>(rows, depth, x, reinterpret_cast<const Bfloat16*>(panel), c, add,
                           panels > 1 ? panel + apart : next);
  _tile_release();
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

inline constexpr DotProduct kExactTable = {kMaxDotRows, kDotDepth, 3, split_in_three, multiply<3>};
inline constexpr DotProduct kTable = {kMaxDotRows, kDotDepth, 1, avx512_bf16::round, multiply<1>};

}  // namespace moe::kernels::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
