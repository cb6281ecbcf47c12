// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/packed/block_format.hpp>

// The scale of a block of integers.
namespace moe {

/// Half precision as bits.
inline std::uint16_t half_of(float value) {
  return Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(value));
}
/// The number that such bits stand for.
inline float float_of_half(std::uint16_t bits) {
  return Eigen::half_impl::half_to_float(Eigen::half_impl::raw_uint16_to_half(bits));
}

/// Integers times a scale in half precision.
template <int kCount>
struct ScaledIntegers {
  std::uint16_t scale = 0;              ///< of NaN, where a number was no finite one
  int codes[std::size_t(kCount)] = {};  ///< integers
};

/// Integers from kLowest to kHighest for `count` <= kCount numbers: those of the least squared error,
/// weighted by their importance where that is not null, of several attempts. An attempt begins with the scale
/// by which the number of the largest magnitude is one of `levels`, rounds to nearest, takes the best scale
/// for these integers, and rounds again. O(kCount) for each level. Throws std::invalid_argument where every
/// scale leaves the range of half precision.
template <int kLowest, int kHighest, int kCount>
ScaledIntegers<kCount> fit_integers(const float* from, Index count, const float* importance,
                                    std::initializer_list<float> levels) {
  const float largest = largest_of(from, count);
  ScaledIntegers<kCount> best;
  if (is_nan(largest)) {
    best.scale = half_of(largest);
    return best;
  }
  if (!(std::abs(largest) > 0)) return best;
  float w[std::size_t(kCount)] = {}, share[std::size_t(kCount)];  // of the most important number's importance
  std::copy_n(from, count, w);
  const float most = importance ? *std::max_element(importance, importance + count) : 0.0f;
  for (Index i = 0; i < kCount; ++i) share[i] = most > 0 && i < count ? importance[i] / most : 1.0f;
  const auto round = [&w](double inverse, int* codes) {
    for (int i = 0; i < kCount; ++i) {
      const double v = float(w[i] * inverse), away = v + (v < 0 ? -0.5 : 0.5);
      const double above = away < kLowest ? kLowest : away;
      codes[i] = int(above > kHighest ? kHighest : above);
    }
  };
  double least = (std::numeric_limits<double>::max)();
  bool fits = false;
  for (const float level : levels) {
    ScaledIntegers<kCount> fit;
    round(double(level) / largest, fit.codes);
    const double weights_codes =
        sum_of<kCount>([&](int i) { return double(float(share[i] * w[i])) * fit.codes[i]; });
    const double codes_codes =
        sum_of<kCount>([&](int i) { return double(share[i]) * (fit.codes[i] * fit.codes[i]); });
    if (!(codes_codes > 0)) continue;  // all that matters would be zero
    constexpr int kExponent = 0x7C00;  // of a half
    const std::uint16_t nearest = half_of(float(weights_codes / codes_codes));
    if ((nearest & kExponent) == kExponent) continue;  // too large
    fits = true;
    // Below the normal halves the nearest one may be so small that it cuts numbers off: also the next one.
    for (int more = 0; more < ((nearest & kExponent) == 0 ? 2 : 1); ++more) {
      fit.scale = std::uint16_t(nearest + more);
      const float scale = float_of_half(fit.scale);
      if (!(std::abs(scale) > 0)) continue;
      round(1.0 / scale, fit.codes);
      float difference[std::size_t(kCount)];
      for (int i = 0; i < kCount; ++i) difference[i] = float(w[i] - double(scale) * fit.codes[i]);
      const double error =
          sum_of<kCount>([&](int i) { return double(float(share[i] * difference[i])) * difference[i]; });
      if (!(error < least)) continue;
      least = error;
      best = fit;
    }
  }
  if (!fits && importance) return fit_integers<kLowest, kHighest, kCount>(from, count, nullptr, levels);
  require(fits, "a weight of ", largest, " is too large for a scale in half precision, expected at most ",
          65504.0f * float(kHighest));
  return best;
}

}  // namespace moe
