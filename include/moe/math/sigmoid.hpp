// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

// The logistic function of one number, its derivative and its integral; none overflows or cancels.
namespace moe {

/// log(1 + exp(z)).
template <class S>
S softplus(S z) {
  return (std::max)(z, S(0)) + std::log1p(std::exp(-std::abs(z)));
}

/// 1 / (1 + exp(-z)).
template <class S>
S sigmoid(S z) {
  const S e = std::exp(-std::abs(z));
  return (z < S(0) ? e : S(1)) / (S(1) + e);
}

/// The derivative of sigmoid: s (1 - s) without the difference, which is 0 where s rounds to 1.
template <class S>
S sigmoid_slope(S z) {
  const S e = std::exp(-std::abs(z));
  return e / ((S(1) + e) * (S(1) + e));
}

}  // namespace moe
