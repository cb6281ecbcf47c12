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

/// Linear, activation, linear: y = act(x w_up^T + b_up) w_down^T + b_down, the expert of Shazeer et
/// al. 2017, GShard, Switch and V-MoE. With Mapped storage its weights are read where they lie, and it
/// is for inference.
template <class S, class Activation = ReLU, class Storage = Owned>
class FeedForward {
 public:
  using Scalar = S;
  using Weight = typename Storage::template Weight<S>;

  struct Options {
    Index d_model = 0;
    Index d_ff = 0;
    bool bias = false;
    Activation activation{};
  };

  /// All parameters are zero, to be filled from elsewhere. Throws unless both widths are positive.
  explicit FeedForward(const Options& options) requires std::same_as<Storage, Owned>
      : activation_(options.activation) {
    check_widths(options.d_model, options.d_ff, "FeedForward");
    w_up.setZero(options.d_ff, options.d_model);
    w_down.setZero(options.d_model, options.d_ff);
    set_biases(options);
  }
  /// Weights are normal with variance 1 / in, biases zero.
  FeedForward(const Options& options, Rng& rng) requires std::same_as<Storage, Owned> : FeedForward(options) {
    w_up = lecun_normal<S>(options.d_ff, options.d_model, rng);
    w_down = lecun_normal<S>(options.d_model, options.d_ff, rng);
  }
  /// Takes weights that exist: up [d_ff, d_model], down [d_model, d_ff]. Biases are zero. Throws unless
  /// the shapes are those of the options.
  FeedForward(const Options& options, Weight up, Weight down)
      : w_up(std::move(up)), w_down(std::move(down)), activation_(options.activation) {
    check_widths(options.d_model, options.d_ff, "FeedForward");
    require_shape(w_up, options.d_ff, options.d_model, "FeedForward", "w_up");
    require_shape(w_down, options.d_model, options.d_ff, "FeedForward", "w_down");
    set_biases(options);
  }

  Index d_model() const { return w_up.cols(); }
  Index d_ff() const { return w_up.rows(); }
  bool has_bias() const { return b_up.size() > 0; }
  const Activation& activation() const { return activation_; }

  /// y [rows, d_model] from x [rows, d_model]. Allocates its scratch.
  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y) const {
    Matrix<S> cache(x.rows(), cache_cols());
    forward(x, y, cache);
  }

  /// Scalars a row that forward keeps: [before the activation | after it].
  Index cache_cols() const { return 2 * d_ff(); }
  /// What a forward pass takes.
  Index multiply_adds_per_row() const { return 2 * d_model() * d_ff(); }

  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y, MatrixRef<S> cache) const {
    check_expert_forward(*this, x, y, cache, "FeedForward::forward");
    if (x.rows() == 0) return;
    auto before = cache.leftCols(d_ff());   // [rows, d_ff]
    auto hidden = cache.rightCols(d_ff());  // [rows, d_ff]
    Linear(w_up, b_up).forward(x, before);
    activate_rows(before, hidden);
    Linear(w_down, b_down).forward(hidden, y);
  }

  /// What the second product multiplies [rows, d_ff], of the cache of a forward pass.
  ConstMatrixRef<S> hidden(const ConstMatrixRef<S>& cache) const { return cache.rightCols(d_ff()); }

  /// d_x [rows, d_model] from d_y; adds to the parameters of `grad`.
  void backward(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& d_y, MatrixRef<S> cache,
                MatrixRef<S> d_x, FeedForward& grad) const requires std::same_as<Storage, Owned> {
    check_expert_backward(*this, x, d_y, cache, d_x, grad, "FeedForward::backward");
    if (x.rows() == 0) return;
    const auto before = cache.leftCols(d_ff());
    auto hidden = cache.rightCols(d_ff());  // overwritten by its own gradient, recomputed first
    activate_rows(before, hidden);
    const Linear up(w_up, b_up), down(w_down, b_down);
    down.backward_parameters(hidden, d_y, Linear(grad.w_down, grad.b_down));
    down.backward_input(d_y, hidden);
    for (Index i = 0; i < x.rows(); ++i)
      activate_backward(activation_, d_ff(), &before.coeffRef(i, 0), &hidden.coeffRef(i, 0));
    up.backward_parameters(x, hidden, Linear(grad.w_up, grad.b_up));
    up.backward_input(hidden, d_x);
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_weight("w_up", f, self.w_up...);
    visit_weight("w_down", f, self.w_down...);
    if ((self.has_bias() || ...)) {
      visit_array(f, {"b_up"}, self.b_up...);
      visit_array(f, {"b_down"}, self.b_down...);
    }
  }

  Weight w_up;       ///< [d_ff, d_model]
  Weight w_down;     ///< [d_model, d_ff]
  Vector<S> b_up;    ///< [d_ff], empty without bias
  Vector<S> b_down;  ///< [d_model], empty without bias

 private:
  void set_biases(const Options& options) {
    if (!options.bias) return;
    b_up.setZero(options.d_ff);
    b_down.setZero(options.d_model);
  }

  template <class From, class To>
  void activate_rows(const From& from, To&& to) const {
    for (Index i = 0; i < from.rows(); ++i)
      activate(activation_, d_ff(), &from.coeffRef(i, 0), &to.coeffRef(i, 0));
  }

  Activation activation_;
};

}  // namespace moe
