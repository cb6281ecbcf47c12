// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <moe/packed/block_format.hpp>
#include <moe/packed/int4.hpp>

namespace moe {

/// Weights of 4 bits by the OCP Microscaling Formats, MXFP4: blocks of 32 numbers along the depth, each 0,
/// 0.5, 1, 1.5, 2, 3, 4 or 6 with a sign, times a power of two; 4.25 bits for a number. What was stored as
/// MXFP4 once is kept exactly. A block with a number that is not finite is NaN.
struct MXFP4 : BlockFormat<MXFP4, kernels::MXFP4Block> {
  static constexpr const char* kName = "MXFP4";  ///< see NamedFormat

  /// The nearest numbers, ties to even, by the power of two of the least squared error: that of the
  /// specification, by which the largest magnitude is from 4 to below 8, the one below or the one above.
  static Block quantised(const float* from, Index count) {
    const float largest = largest_of(from, count);
    if (is_nan(largest)) return {255, {}};
    Block best{};
    float w[kBlock] = {};
    std::copy_n(from, count, w);
    double least = (std::numeric_limits<double>::max)();
    const int middle = std::abs(largest) > 0 ? std::ilogb(largest) - 2 : 0;
    for (const int power : {middle, middle + 1, middle - 1}) {
      const int exponent = std::clamp(power, -127, 127);
      const float scale = std::ldexp(1.0f, exponent), inverse = std::ldexp(1.0f, -exponent);
      std::uint32_t codes[kBlock];
      float difference[kBlock];
      for (int i = 0; i < kBlock; ++i) {
        const float v = w[i] * inverse, a = std::abs(v);
        const int halves[3] = {(a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f),
                               (a > 2.5f) + (a >= 3.5f), a > 5.0f};
        codes[i] =
            std::uint32_t(halves[0] + halves[1] + halves[2]) | (std::bit_cast<std::uint32_t>(v) >> 28 & 8);
        difference[i] = std::abs(w[i]) - 0.5f * float(halves[0] + 2 * halves[1] + 4 * halves[2]) * scale;
      }
      const double error = sum_of_squares<kBlock>(difference);
      if (!(error < least)) continue;
      least = error;
      best = {std::uint8_t(exponent + 127), {}};
      for (Index i = 0; i < kBlock; ++i) best.words[nibble_word(i)] |= codes[i] << nibble_bit(i);
    }
    return best;
  }
  /// Number i of a block.
  static float number(const Block& block, Index i) {
    constexpr float kValues[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    return kValues[block.words[nibble_word(i)] >> nibble_bit(i) & 15] * scale(block);
  }

  /// What a block's numbers are multiplied by.
  static float scale(const Block& block) {
    if (block.scale == 255) return std::numeric_limits<float>::quiet_NaN();
    return std::bit_cast<float>(block.scale == 0 ? 0x400000u : std::uint32_t(block.scale) << 23);
  }
};
static_assert(InBlocks<MXFP4> && !DotFormat<MXFP4>);

}  // namespace moe
