// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include <moe/core/check.hpp>
#include <moe/core/random.hpp>
#include <moe/core/types.hpp>

// Initial values of weights. Every function draws in row-major order from the Rng given to it.
namespace moe {

/// Normal with mean 0 and the given standard deviation.
template <class Derived>
void fill_normal(Eigen::DenseBase<Derived>& m, double stddev, Rng& rng) {
  for (Index i = 0; i < m.rows(); ++i)
    for (Index j = 0; j < m.cols(); ++j) m(i, j) = typename Derived::Scalar(stddev * rng.normal());
}

/// Uniform in [low, high).
template <class Derived>
void fill_uniform(Eigen::DenseBase<Derived>& m, double low, double high, Rng& rng) {
  for (Index i = 0; i < m.rows(); ++i)
    for (Index j = 0; j < m.cols(); ++j) m(i, j) = typename Derived::Scalar(rng.uniform(low, high));
}

/// A weight [out, in] with variance 1 / in (LeCun et al. 1998): outputs vary as much as inputs do.
/// Throws std::invalid_argument for a negative size.
template <class S>
Matrix<S> lecun_normal(Index out, Index in, Rng& rng) {
  require(out >= 0 && in >= 0, "lecun_normal: shape [", out, ", ", in, "], expected at least [0, 0]");
  Matrix<S> w(out, in);
  fill_normal(w, in > 0 ? 1.0 / std::sqrt(double(in)) : 0.0, rng);
  return w;
}

/// A weight [out, in] with variance 2 / in (He et al. 2015), for layers that ReLU follows. Throws
/// std::invalid_argument for a negative size.
template <class S>
Matrix<S> he_normal(Index out, Index in, Rng& rng) {
  require(out >= 0 && in >= 0, "he_normal: shape [", out, ", ", in, "], expected at least [0, 0]");
  Matrix<S> w(out, in);
  fill_normal(w, in > 0 ? std::sqrt(2.0 / double(in)) : 0.0, rng);
  return w;
}

}  // namespace moe
