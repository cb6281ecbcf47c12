// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <moe/core/types.hpp>
#include <moe/math/numbers.hpp>

// Softmax and its companions on one row of logits.
namespace moe {

/// Largest finite logit of a row; the row must have one. O(n).
template <class S>
S max_finite(Index n, const S* logits) {
  S largest = std::numeric_limits<S>::lowest();
  for (Index i = 0; i < n; ++i)
    if (number_kind(logits[i]) == NumberKind::finite) largest = (std::max)(largest, logits[i]);
  return largest;
}

/// log of the sum of exp(logits[i]), without overflow; logits of minus infinity count nothing. O(n).
/// At least one logit must be finite.
template <class S>
S log_sum_exp(Index n, const S* logits) {
  const S largest = max_finite(n, logits);
  S sum = 0;
  for (Index i = 0; i < n; ++i)
    if (!is_unavailable(logits[i])) sum += std::exp(logits[i] - largest);
  return largest + std::log(sum);
}

/// probs[i] = exp(logits[i]) / sum of exp(logits[j]); exactly 0 where the logit is minus infinity.
/// Equal logits give equal bits wherever they stand in the row. At least one logit must be finite.
/// In place is allowed. O(n).
template <class S>
void softmax(Index n, const S* logits, S* probs) {
  const S largest = max_finite(n, logits);
  S sum = 0;
  for (Index i = 0; i < n; ++i) {
    probs[i] = is_unavailable(logits[i]) ? S(0) : std::exp(logits[i] - largest);
    sum += probs[i];
  }
  for (Index i = 0; i < n; ++i) probs[i] /= sum;
}

/// Softmax of every row of a matrix [rows, n]. For example softmax(router_logits).
template <class M>
Matrix<typename M::Scalar> softmax(const Eigen::MatrixBase<M>& logits) {
  Matrix<typename M::Scalar> probs = logits;
  const Index n = probs.cols();
  for (Index i = 0; i < probs.rows(); ++i) softmax(n, probs.data() + i * n, probs.data() + i * n);
  return probs;
}

/// d_logits[i] += probs[i] * (d_probs[i] - sum of probs[j] * d_probs[j]): backward of softmax. Both terms are
/// taken from the d_probs of a probability above 1/2, if there is one: nothing cancels then, however near to
/// 1 it is. O(n).
template <class S>
void softmax_backward(Index n, const S* probs, const S* d_probs, S* d_logits) {
  if (n == 0) return;
  S origin = d_probs[0];
  for (Index i = 0; i < n; ++i) origin = probs[i] > S(0.5) ? d_probs[i] : origin;
  S mean = 0;
  for (Index i = 0; i < n; ++i) mean += probs[i] * (d_probs[i] - origin);
  for (Index i = 0; i < n; ++i) d_logits[i] += probs[i] * ((d_probs[i] - origin) - mean);
}

}  // namespace moe
