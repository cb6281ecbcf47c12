// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

// The largest |a - b|; infinite if anything in either is not finite, or if the shapes differ.
// Alone, maxCoeff() and std::max drop NaN.
template <class A, class B>
double largest_difference(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols() || !a.allFinite() || !b.allFinite())
    return std::numeric_limits<double>::infinity();
  if (a.size() == 0) return 0;
  return (a.template cast<double>() - b.template cast<double>()).cwiseAbs().maxCoeff();
}

// The same, relative to the largest entry of b, which counts as no less than `least`.
template <class A, class B>
double relative_error(const A& a, const B& b, double least = 1e-30) {
  const double difference = largest_difference(a, b);
  if (!std::isfinite(difference) || b.size() == 0) return difference;
  return difference / std::max(least, double(b.cwiseAbs().maxCoeff()));
}

template <class A>
bool all_zero(const A& a) {
  return (a.array() == 0).all();
}
