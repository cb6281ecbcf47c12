// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/layers/soft_routing.hpp>
#include <moe/math/linear.hpp>
#include <moe/math/numbers.hpp>

// The logits of a SoftRouter (Puigcerver et al. 2023), z = tokens() slots()^T [tokens, slots]. There are two
// kinds: each makes these operands, of d_model columns, from x and w_slots, and knows the way of gradients
// back. What is said of a function of the first is true of that of the second.
namespace moe {

namespace detail {

inline constexpr double kSoftMoEEpsilon = 1e-6;  // under the root, as the authors have it

// 1 / sqrt(sum of squares + epsilon). Squares that overflow are added up again as parts of the
// largest entry, so that a finite row gives a finite result.
template <class S>
S inverse_length(Index n, const S* x) {
  const S sum = dot(n, x, x);
  if (number_kind(sum) == NumberKind::finite) return S(1) / std::sqrt(sum + S(kSoftMoEEpsilon));
  S largest = 0, parts = 0;
  for (Index j = 0; j < n; ++j) largest = (std::max)(largest, std::abs(x[j]));
  for (Index j = 0; j < n; ++j) parts += (x[j] / largest) * (x[j] / largest);
  return S(1) / largest / std::sqrt(parts);
}

// to [n] = x / length of x.
template <class S>
void make_unit(Index n, const S* x, S* to) {
  const S inverse = inverse_length(n, x);
  for (Index j = 0; j < n; ++j) to[j] = inverse * x[j];
}

// d_x [n] += scale * the gradient by x of make_unit: (d_unit - unit <unit, d_unit>) / length.
template <class S>
void make_unit_backward(Index n, const S* x, const S* unit, const S* d_unit, S scale, S* d_x) {
  const S factor = scale * inverse_length(n, x), along = dot(n, unit, d_unit);
  for (Index j = 0; j < n; ++j) d_x[j] += factor * (d_unit[j] - along * unit[j]);
}

}  // namespace detail

/// Dot products of rows as they are (section 2.1).
template <class S>
struct DotLogits {
  using Routing = SoftRouting<S>;           ///< where operands are kept
  using Gradient = SoftRoutingGradient<S>;  ///< where gradients are kept

  const Matrix<S>& w_slots;  ///< [slots, d_model]

  /// The left operand [tokens, d_model].
  const ReusedMatrix<S>& tokens(const Routing& routing) const { return routing.x; }
  /// The right operand [slots, d_model].
  const Matrix<S>& slots(const Routing&) const { return w_slots; }
  /// Throws std::invalid_argument unless the routing holds operands of this kind.
  void check(const Routing&, const char*) const {}
  /// Makes slots(), and room for tokens(). O(slots * d_model).
  template <Executor Ex>
  void make_slots(Routing&, const Ex&) const {}
  /// Makes a row of tokens() from that of routing.x. O(d_model).
  void make_token(Index, Routing&) const {}

  /// Where the gradient by slots() is to be added up [slots, d_model].
  MatrixRef<S> begin_backward(Gradient&, Matrix<S>& d_w_slots) const { return d_w_slots; }
  /// Adds to d_x what comes from the logits of the tokens [begin, begin + count). O(count * slots * d_model).
  void tokens_backward(Index begin, Index count, const Routing&, Gradient& g, MatrixRef<S>& d_x) const {
    linear_backward_input(g.d_logits.middleRows(begin, count), w_slots, d_x.middleRows(begin, count),
                          Write::add);
  }
  /// The rest of the way, from the gradient by slots() to those of the parameters. O(slots * d_model).
  template <Executor Ex>
  void slots_backward(const Routing&, Gradient&, Matrix<S>&, Vector<S>&, const Ex&) const {}
};

/// Cosines times the scale: products of rows divided by their lengths (section 2.3).
template <class S>
struct CosineLogits {
  using Routing = SoftRouting<S>;           ///< where operands are kept
  using Gradient = SoftRoutingGradient<S>;  ///< where gradients are kept

  const Matrix<S>& w_slots;  ///< [slots, d_model]
  const Vector<S>& scale;    ///< [1]

  /// See DotLogits, here and below: the left operand [tokens, d_model].
  const ReusedMatrix<S>& tokens(const Routing& routing) const { return routing.x_unit; }
  /// The right operand [slots, d_model].
  const ReusedMatrix<S>& slots(const Routing& routing) const { return routing.w_scaled; }
  /// Throws std::invalid_argument unless the routing holds operands of this kind.
  void check(const Routing& routing, const char* where) const {
    require_shape(routing.x_unit, routing.num_tokens(), w_slots.cols(), where, "the cache's x_unit");
    require_shape(routing.w_unit, w_slots.rows(), w_slots.cols(), where, "the cache's w_unit");
    require_shape(routing.w_scaled, w_slots.rows(), w_slots.cols(), where, "the cache's w_scaled");
  }
  /// Makes slots(), and room for tokens().
  template <Executor Ex>
  void make_slots(Routing& routing, const Ex& executor) const {
    const Index slots = w_slots.rows(), d = w_slots.cols();
    routing.x_unit.resize(routing.num_tokens(), d);
    routing.w_unit.resize(slots, d);
    routing.w_scaled.resize(slots, d);
    for_each_block(slots, executor, [&](Index begin, Index end, Index) {
      for (Index s = begin; s < end; ++s) {
        detail::make_unit(d, &w_slots(s, 0), &routing.w_unit(s, 0));
        for (Index j = 0; j < d; ++j) routing.w_scaled(s, j) = scale[0] * routing.w_unit(s, j);
      }
    });
  }
  /// Makes a row of tokens().
  void make_token(Index t, Routing& routing) const {
    detail::make_unit(w_slots.cols(), &routing.x(t, 0), &routing.x_unit(t, 0));
  }

  /// Where the gradient by slots() is to be added up.
  MatrixRef<S> begin_backward(Gradient& g, Matrix<S>&) const {
    g.d_x_unit.resize(g.d_logits.rows(), w_slots.cols());
    return g.d_w_scaled.setZero(w_slots.rows(), w_slots.cols());
  }
  /// Adds to d_x what comes from the logits of some tokens.
  void tokens_backward(Index begin, Index count, const Routing& routing, Gradient& g,
                       MatrixRef<S>& d_x) const {
    linear_backward_input(g.d_logits.middleRows(begin, count), routing.w_scaled,
                          g.d_x_unit.middleRows(begin, count));
    for (Index t = begin; t < begin + count; ++t)
      detail::make_unit_backward(w_slots.cols(), &routing.x(t, 0), &routing.x_unit(t, 0), &g.d_x_unit(t, 0),
                                 S(1), &d_x(t, 0));
  }
  /// The rest of the way, to the gradients of the parameters.
  template <Executor Ex>
  void slots_backward(const Routing& routing, Gradient& g, Matrix<S>& d_w_slots, Vector<S>& d_scale,
                      const Ex& executor) const {
    const Index slots = w_slots.rows(), d = w_slots.cols();
    g.d_scale.resize(slots);
    for_each_block(slots, executor, [&](Index begin, Index end, Index) {
      for (Index s = begin; s < end; ++s) {
        const S *const unit = &routing.w_unit(s, 0), *const d_scaled = &g.d_w_scaled(s, 0);
        g.d_scale[s] = dot(d, unit, d_scaled);
        detail::make_unit_backward(d, &w_slots(s, 0), unit, d_scaled, scale[0], &d_w_slots(s, 0));
      }
    });
    moe::Sum<S> sum = 0;
    for (const S part : g.d_scale) sum += moe::Sum<S>(part);
    d_scale[0] += S(sum);
  }
};

}  // namespace moe
