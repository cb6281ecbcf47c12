// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>

#include <moe/core/check.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/types.hpp>
#include <moe/math/linear.hpp>

// The linear layers of which experts consist, and what can be their weight.
namespace moe {

/// A weight [out, in]: a matrix, or whatever stands for one and multiplies rows as it would.
///   w.rows(), w.cols()
///   linear(x, w, y, write)                      y [rows, out] = x [rows, in] w^T, or added to it
template <class W, class S>
concept LinearWeight = requires(const W& w, const ConstMatrixRef<S>& x, MatrixRef<S> y) {
  { w.rows() } -> std::convertible_to<Index>;
  { w.cols() } -> std::convertible_to<Index>;
  linear(x, w, y, Write::replace);
};

/// A weight that is trained; its gradient is of the same type.
///   linear_backward_input(d_y, w, d_x, write)   d_x [rows, in] = d_y [rows, out] w, or added to it
///   linear_backward_weight(d_y, x, d_w)         adds d_y^T x to the gradient d_w
template <class W, class S>
concept TrainableWeight = LinearWeight<W, S> &&
    requires(const W& w, W& d_w, const ConstMatrixRef<S>& x, MatrixRef<S> y) {
  linear_backward_input(x, w, y, Write::replace);
  linear_backward_weight(x, x, d_w);
};

/// y = x w^T + b. Refers to an expert's weight [out, in] and bias [out], which is empty where it has none.
template <class W, class B>
struct Linear {
  W& w;  ///< [out, in]
  B& b;  ///< [out], or empty

  /// Refers to both, which must outlive it.
  Linear(W& weight, B& bias) : w(weight), b(bias) {}

  /// y [rows, out] from x [rows, in]. O(rows * in * out), as all here.
  template <class X, class Y>
  void forward(const X& x, Y&& y) const {
    linear(x, w, y, Write::replace);
    if (b.size() > 0) add_bias(b, y);
  }
  /// Adds to the gradients of weight and bias, those of `grad`.
  template <class X, class Dy, class GradW, class GradB>
  void backward_parameters(const X& x, const Dy& d_y, const Linear<GradW, GradB>& grad) const {
    linear_backward_weight(d_y, x, grad.w);
    if (b.size() > 0) bias_backward(d_y, grad.b);
  }
  /// d_x [rows, in] from d_y [rows, out], or added to what is there.
  template <class Dy, class Dx>
  void backward_input(const Dy& d_y, Dx&& d_x, Write write = Write::replace) const {
    linear_backward_input(d_y, w, d_x, write);
  }
};

/// Throws std::invalid_argument unless both widths of a feed-forward expert are positive.
inline void check_widths(Index d_model, Index d_ff, const char* where) {
  require(d_model > 0, where, ": d_model = ", d_model, ", expected at least 1");
  require(d_ff > 0, where, ": d_ff = ", d_ff, ", expected at least 1");
}

/// Visits a weight: an array under its name, or what consists of several under names below it.
template <class F, class W, class... Ws>
void visit_weight(const Name& name, F&& f, W& weight, Ws&... weights) {
  if constexpr (requires { W::visit(f, weight, weights...); })
    visit_part(name, f, weight, weights...);
  else
    visit_array(f, {name}, weight, weights...);
}

}  // namespace moe
