// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <utility>

#include <moe/core/check.hpp>
#include <moe/core/storage.hpp>
#include <moe/experts/expert.hpp>
#include <moe/experts/linear.hpp>
#include <moe/math/activation.hpp>
#include <moe/math/init.hpp>

namespace moe {

/// Feed-forward with three factors, the expert of OpenMoE (Xue et al. 2024, "OpenMoE: An Early
/// Effort on Open Mixture-of-Experts Language Models") as its authors' code computes it:
///   [a1 | a2] = x w_gate^T, the first and the last d_ff columns
///   y = (a1 * silu(a2) * (x w_up^T)) w_down^T
/// Unlike GatedFeedForward's SwiGLU, the gate is a SwiGLU of its own: w_gate is twice as tall.
/// Forward and backward are O(rows * d_model * d_ff). Both throw std::invalid_argument unless all
/// shapes fit. With Mapped storage its weights are read where they lie, and it is for inference.
template <class S, class Storage = Owned>
class ThreeWayFeedForward {
 public:
  using Scalar = S;
  using Weight = typename Storage::template Weight<S>;

  struct Options {
    Index d_model = 0;
    Index d_ff = 0;
  };

  /// All parameters are zero, to be filled from elsewhere. Throws unless both widths are positive.
  explicit ThreeWayFeedForward(const Options& options) requires std::same_as<Storage, Owned> {
    check_widths(options.d_model, options.d_ff, "ThreeWayFeedForward");
    w_gate.setZero(2 * options.d_ff, options.d_model);
    w_up.setZero(options.d_ff, options.d_model);
    w_down.setZero(options.d_model, options.d_ff);
  }
  /// Weights are normal with variance 1 / in.
  ThreeWayFeedForward(const Options& options, Rng& rng) requires std::same_as<Storage, Owned>
      : ThreeWayFeedForward(options) {
    w_gate = lecun_normal<S>(2 * options.d_ff, options.d_model, rng);
    w_up = lecun_normal<S>(options.d_ff, options.d_model, rng);
    w_down = lecun_normal<S>(options.d_model, options.d_ff, rng);
  }
  /// Takes weights that exist: gate [2 * d_ff, d_model], up [d_ff, d_model], down [d_model, d_ff].
  /// Throws unless the shapes are those of the options.
  ThreeWayFeedForward(const Options& options, Weight gate, Weight up, Weight down)
      : w_gate(std::move(gate)), w_up(std::move(up)), w_down(std::move(down)) {
    check_widths(options.d_model, options.d_ff, "ThreeWayFeedForward");
    require_shape(w_gate, 2 * options.d_ff, options.d_model, "ThreeWayFeedForward", "w_gate");
    require_shape(w_up, options.d_ff, options.d_model, "ThreeWayFeedForward", "w_up");
    require_shape(w_down, options.d_model, options.d_ff, "ThreeWayFeedForward", "w_down");
  }

  Index d_model() const { return w_up.cols(); }
  Index d_ff() const { return w_up.rows(); }

  /// y [rows, d_model] from x [rows, d_model]. Allocates its scratch.
  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y) const {
    Matrix<S> cache(x.rows(), cache_cols());
    forward(x, y, cache);
  }

  /// Scalars a row that forward keeps: [a1 | a2 | up | scratch | scratch | scratch], each d_ff
  /// wide.
  Index cache_cols() const { return 6 * d_ff(); }

  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y, MatrixRef<S> cache) const {
    check_expert_forward(*this, x, y, cache, "ThreeWayFeedForward::forward");
    if (x.rows() == 0) return;
    auto up = cache.middleCols(2 * d_ff(), d_ff());    // [rows, d_ff]
    auto unit = cache.middleCols(3 * d_ff(), d_ff());  // a1 * silu(a2) [rows, d_ff]
    auto hidden = cache.rightCols(d_ff());             // [rows, d_ff]
    linear(x, w_gate, cache.leftCols(2 * d_ff()));
    linear(x, w_up, up);
    activate_rows(cache, unit);
    hidden = unit.cwiseProduct(up);
    linear(hidden, w_down, y);
  }

  /// d_x [rows, d_model] from d_y; adds to the parameters of `grad`.
  void backward(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& d_y, MatrixRef<S> cache,
                MatrixRef<S> d_x, ThreeWayFeedForward& grad) const requires std::same_as<Storage, Owned> {
    check_expert_backward(*this, x, d_y, cache, d_x, grad, "ThreeWayFeedForward::backward");
    if (x.rows() == 0) return;
    const auto a1 = cache.leftCols(d_ff());
    const auto a2 = cache.middleCols(d_ff(), d_ff());
    const auto up = cache.middleCols(2 * d_ff(), d_ff());
    auto unit = cache.middleCols(3 * d_ff(), d_ff());    // then the gradient by a1
    auto d_unit = cache.middleCols(4 * d_ff(), d_ff());  // then the gradient by a2
    auto hidden = cache.rightCols(d_ff());               // then its gradient, then that by up
    activate_rows(cache, unit);
    hidden = unit.cwiseProduct(up);
    linear_backward_weight(d_y, hidden, grad.w_down);
    linear_backward_input(d_y, w_down, hidden);
    d_unit = hidden.cwiseProduct(up);
    hidden = hidden.cwiseProduct(unit);
    for (Index i = 0; i < x.rows(); ++i)
      activate_gated_backward(SwiGLU{}, d_ff(), &a2.coeffRef(i, 0), &a1.coeffRef(i, 0),
                              &d_unit.coeffRef(i, 0), &d_unit.coeffRef(i, 0), &unit.coeffRef(i, 0));
    const auto d_gate = cache.middleCols(3 * d_ff(), 2 * d_ff());
    const auto& d_up = hidden;
    linear_backward_weight(d_gate, x, grad.w_gate);
    linear_backward_weight(d_up, x, grad.w_up);
    linear_backward_input(d_gate, w_gate, d_x);
    linear_backward_input(d_up, w_up, d_x, Write::add);
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_weight("w_gate", f, self.w_gate...);
    visit_weight("w_up", f, self.w_up...);
    visit_weight("w_down", f, self.w_down...);
  }

  Weight w_gate;  ///< [2 * d_ff, d_model]: the rows of a1, then those of a2
  Weight w_up;    ///< [d_ff, d_model]
  Weight w_down;  ///< [d_model, d_ff]

 private:
  // unit = a1 * silu(a2), from the cache.
  template <class To>
  void activate_rows(const MatrixRef<S>& cache, To&& unit) const {
    for (Index i = 0; i < cache.rows(); ++i)
      activate_gated(SwiGLU{}, d_ff(), &cache.coeffRef(i, d_ff()), &cache.coeffRef(i, 0),
                     &unit.coeffRef(i, 0));
  }
};

}  // namespace moe
