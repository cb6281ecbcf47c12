// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <moe/packed/block_format.hpp>

namespace moe {

/// Weights of 8 bits in FP8 E4M3, four bits of exponent and three of mantissa: blocks of 64 numbers along the
/// depth times a float below 2^120; 8.5 bits for a number. A block with a number that is not finite is NaN.
struct FP8 : BlockFormat<FP8, kernels::FP8Block> {
  static constexpr const char* kName = "FP8";  ///< see NamedFormat

  /// The nearest numbers, ties to even, by the scale of the least squared error of several, by which the
  /// largest magnitude is from 256 to 448, the largest number.
  static Block quantised(const float* from, Index count) {
    const float largest = std::abs(largest_of(from, count));
    Block best{};
    if (is_nan(largest)) return {largest, {}};
    if (!(largest > 0)) return best;
    float w[kBlock] = {};
    std::copy_n(from, count, w);
    double least = (std::numeric_limits<double>::max)();
    for (const float level : {448.0f, 416.0f, 384.0f, 352.0f, 320.0f, 288.0f, 256.0f}) {
      Block block{largest / level, {}};
      const double inverse = double(level) / largest;
      float difference[kBlock];
      for (int i = 0; i < kBlock; ++i) {
        const Nearest nearest = nearest_to(float(std::abs(double(w[i])) * inverse));
        block.words[i] = std::uint8_t(nearest.code | (std::bit_cast<std::uint32_t>(w[i]) >> 24 & 128));
        difference[i] = std::abs(w[i]) - float(double(nearest.value) * block.scale);
      }
      const double error = sum_of_squares<kBlock>(difference);
      if (error < least) {
        least = error;
        best = block;
      }
    }
    return best;
  }
  /// Number i of a block.
  static float number(const Block& block, Index i) { return float_of(block.words[i]) * block.scale; }

  /// What eight bits stand for, NaN apart.
  static float float_of(std::uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float magnitude =
        exponent == 0
            ? float(mantissa) * 0x1p-9f
            : std::bit_cast<float>((std::uint32_t(exponent) + 120) << 23 | std::uint32_t(mantissa) << 20);
    return bits & 128 ? -magnitude : magnitude;
  }

 private:
  struct Nearest {
    std::uint32_t code;
    float value;
  };
  // Of a number that is not negative: ties to even, the largest one for all above it.
  static Nearest nearest_to(float number) {
    const auto bits = std::bit_cast<std::uint32_t>(number);
    const std::uint32_t exponent =
        std::clamp(bits >> 23, 121u, 135u);  // of 2^-6, below which steps are equal
    // Beside a number whose last digit is that of the result, adding rounds; the sum's lower digits hold it.
    const float sum = number + std::bit_cast<float>((exponent + 20) << 23);
    const std::uint32_t digits = std::bit_cast<std::uint32_t>(sum) & 0x7FFFFF;
    const std::uint32_t code = (exponent - 121) * 8 + digits;
    if (code > 126) return {126, 448.0f};
    return {code, float(int(digits)) * std::bit_cast<float>((exponent - 3) << 23)};
  }
};
static_assert(InBlocks<FP8> && !DotFormat<FP8>);

}  // namespace moe
