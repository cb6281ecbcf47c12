// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>

#include <moe/core/types.hpp>
#include <moe/kernels/kernels.hpp>

// Weights of 8 and 4 bits: numbers of a column that share a scale. In a panel the columns of one register are
// a group: [lanes] scales, for some blocks [lanes] offsets, then [words, lanes] words. widen.inc makes floats
// of them.
namespace moe::kernels {

/// Eight bits: (byte - 128) * scale. Word w holds the numbers 4 w, ..., 4 w + 3, the first one lowest.
struct Int8Block {
  static constexpr Index kNumbers = 32;
  static constexpr int kZeroCode = 128, kMostCode = 255;
  std::uint16_t scale;  ///< IEEE half precision
  std::uint32_t words[8];
};

/// Four bits: (nibble - 8) * scale. Byte b of word w holds the numbers 8 w + b and, in its upper half,
/// 8 w + 4 + b.
struct Int4Block {
  static constexpr Index kNumbers = 32;
  static constexpr int kZeroCode = 8, kMostCode = 15;
  std::uint16_t scale;  ///< IEEE half precision
  std::uint32_t words[4];
};

/// Four bits: nibble * scale + offset, rounded once. Words as in Int4Block.
struct Int4OffsetBlock {
  static constexpr Index kNumbers = 32;
  static constexpr int kZeroCode = 0, kMostCode = 15;
  float scale;  ///< of at most 20 significant bits, so that products with 4 bits are exact
  float offset;
  std::uint32_t words[4];
};

/// Four bits of OCP MXFP4: sign, two bits of exponent, one of mantissa; times 2^(scale - 127), where scale
/// 255 is NaN. Words as in Int4Block.
struct MXFP4Block {
  static constexpr Index kNumbers = 32;
  static constexpr int kZeroCode = 12, kMostCode = 24;
  std::uint8_t scale;
  std::uint32_t words[4];
};

/// Eight bits of FP8 E4M3: sign, four bits of exponent, three of mantissa; times a scale, rounded once. No
/// number is a NaN: a block that has one has a NaN for its scale.
struct FP8Block {
  static constexpr Index kNumbers = 64;
  float scale;  ///< of a magnitude below 2^120
  std::uint8_t words[64];
};

/// Activations rounded to 8 bits: numbers of a row that share a scale, code * scale.
struct Int8Activations {
  static constexpr Index kNumbers = 32;
  float scale;       ///< of NaN, where a number was no finite one
  std::int32_t sum;  ///< of the codes
  std::int8_t codes[32];
};
template <>
inline constexpr Index kRowStride<Int8Activations> = kDotDepth / Int8Activations::kNumbers + 8;

/// Blocks of weights as above.
template <class T>
concept Block = requires(const T& block) {
  { T::kNumbers } -> std::convertible_to<Index>;
  block.scale;
  block.words[0];
};

/// Blocks of integers, which as bytes, their codes, are from 0 to kMostCode: a number is (code - kZeroCode) *
/// scale, of MXFP4 half of that.
template <class T>
concept IntegerBlock = Block<T> && T::kNumbers == Int8Activations::kNumbers&& requires {
  T::kZeroCode;
  T::kMostCode;
};

/// Bytes that a block takes in a panel.
template <Block B>
inline constexpr Index kBlockBytes = [] {
  const Index bytes = Index(sizeof(B::scale) + sizeof(B::words));
  if constexpr (requires(B block) { block.offset; }) return bytes + Index(sizeof(B::offset));
  return bytes;
}();

}  // namespace moe::kernels
