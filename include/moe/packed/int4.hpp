// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <moe/packed/block_format.hpp>
#include <moe/packed/fit_integers.hpp>

// Weights of 4 bits, with and without an offset.
namespace moe {

/// Where number i of a block of nibbles is: in this word, from this bit on.
constexpr Index nibble_word(Index i) { return i / 8; }
/// See nibble_word.
constexpr Index nibble_bit(Index i) { return 8 * (i % 4) + (i % 8 < 4 ? 0 : 4); }

/// Weights of 4 bits: blocks of 32 numbers along the depth, integers from -8 to 7 times a scale in half
/// precision, which may be negative; 4.5 bits for a number. A block with a number that is not finite is NaN.
struct Int4 : BlockFormat<Int4, kernels::Int4Block> {
  static constexpr const char* kName = "Int4";  ///< see NamedFormat

  /// The integers and the scale of the least squared error that fit_integers finds, by the importance of each
  /// number where that is not null.
  static Block quantised(const float* from, Index count, const float* importance = nullptr) {
    const auto fit = importance
                         ? fit_integers<-8, 7, kBlock>(from, count, importance,
                                                       {-8.5f, -8, -7.5f, 7.5f, 7, -9, -10, -11.5f, -13})
                         : fit_integers<-8, 7, kBlock>(from, count, nullptr, {-8.5f, -8, -7.5f, 7.5f, 7});
    Block block{fit.scale, {}};
    for (Index i = 0; i < kBlock; ++i)
      block.words[nibble_word(i)] |= std::uint32_t(fit.codes[i] + 8) << nibble_bit(i);
    return block;
  }
  /// Number i of a block.
  static float number(const Block& block, Index i) {
    const int code = int(block.words[nibble_word(i)] >> nibble_bit(i) & 15) - 8;
    return float(code) * float_of_half(block.scale) + 0.0f;
  }
};
static_assert(InBlocks<Int4>);

/// Weights of 4 bits with an offset: blocks of 32 numbers along the depth, integers from 0 to 15 times a
/// scale, plus an offset, both floats; 6 bits for a number. The scale of a block of your own has at most 20
/// significant bits: products of others differ from those of floats. Holds what files have with zero points
/// or minima. A block with a number that is not finite is NaN.
struct Int4Offset : BlockFormat<Int4Offset, kernels::Int4OffsetBlock> {
  static constexpr const char* kName = "Int4Offset";  ///< see NamedFormat

  /// The integers, scale and offset of the least squared error of several attempts: each begins with a range
  /// that holds all numbers, or less, rounds to nearest, takes the best scale and offset for these integers,
  /// and rounds again.
  static Block quantised(const float* from, Index count) {
    const float largest = largest_of(from, count);
    const auto [low, high] = std::minmax_element(from, from + count);
    Block best{is_nan(largest) ? largest : 0.0f, *low, {}};
    if (!(*low < *high) || is_nan(largest)) return best;
    require(double(*high) - *low <= (std::numeric_limits<float>::max)(), "weights of a block range from ",
            *low, " to ", *high, ", expected a difference of at most 3.4e38");
    float w[kBlock];
    std::copy_n(from, count, w);
    std::fill(w + count, w + kBlock, *low);  // changes no range, and costs nothing
    double least = (std::numeric_limits<double>::max)();
    for (const float levels : {15.0f, 15.5f, 16.0f, 14.5f}) {
      int codes[kBlock];
      float scale = float((double(*high) - *low) / levels);
      if (!(scale > 0)) continue;
      float offset = float((double(*low) + *high - 15.0 * scale) / 2);
      to_codes(w, scale, offset, codes);
      if (!improve(w, count, codes, scale, offset)) continue;
      to_codes(w, scale, offset, codes);
      float difference[kBlock] = {};
      for (Index i = 0; i < count; ++i) difference[i] = w[i] - (float(codes[i]) * scale + offset);
      const double error = sum_of_squares<kBlock>(difference);
      if (!(error < least)) continue;
      least = error;
      best = {scale, offset, {}};
      for (Index i = 0; i < count; ++i)
        best.words[nibble_word(i)] |= std::uint32_t(codes[i]) << nibble_bit(i);
    }
    return best;
  }
  /// Number i of a block.
  static float number(const Block& block, Index i) {
    return float(block.words[nibble_word(i)] >> nibble_bit(i) & 15) * block.scale + block.offset;
  }

 private:
  static void to_codes(const float* w, float scale, float offset, int* codes) {
    const double inverse = 1.0 / scale;
    for (Index i = 0; i < kBlock; ++i) {
      const float above = w[i] - offset;
      const double v = float(above * inverse) + 0.5, positive = v < 0 ? 0.0 : v;
      codes[i] = int(positive > 15 ? 15.0 : positive);
    }
  }

  // The scale and the offset of the least squared error for these codes; false where there is no single one.
  static bool improve(const float* w, Index count, const int* codes, float& scale, float& offset) {
    int sum = 0, squares = 0;
    for (Index i = 0; i < count; ++i) {
      sum += codes[i];
      squares += codes[i] * codes[i];
    }
    double weights = 0, weights_codes = 0;
    for (Index i = 0; i < count; ++i) {
      weights += w[i];
      weights_codes += double(int(count) * codes[i] - sum) * w[i];
    }
    const int determinant = int(count) * squares - sum * sum;
    if (determinant == 0) return false;
    // To 20 bits, so that its products with codes are exact.
    scale = std::bit_cast<float>((std::bit_cast<std::uint32_t>(float(weights_codes / determinant)) + 8) &
                                 0xFFFFFFF0);
    offset = float((weights - double(scale) * sum) / double(count));
    return scale > 0;
  }
};
static_assert(InBlocks<Int4Offset>);

}  // namespace moe
