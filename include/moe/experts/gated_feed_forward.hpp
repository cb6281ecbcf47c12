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

/// Gated feed-forward (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6):
/// y = glu(x w_gate^T + b_gate, x w_up^T + b_up) w_down^T + b_down, the expert of Mixtral, DeepSeek,
/// Qwen, DBRX and (with biases and ClampedSwiGLU) gpt-oss. With Mapped storage its weights are read
/// where they lie, and it is for inference.
template <class S, class Unit = SwiGLU, class Storage = Owned>
class GatedFeedForward {
 public:
  using Scalar = S;
  using Weight = typename Storage::template Weight<S>;

  struct Options {
    Index d_model = 0;
    Index d_ff = 0;
    bool bias = false;
    Unit glu{};
  };

  /// All parameters are zero, to be filled from elsewhere. Throws unless both widths are positive.
  explicit GatedFeedForward(const Options& options) requires std::same_as<Storage, Owned>
      : glu_(options.glu) {
    check_widths(options.d_model, options.d_ff, "GatedFeedForward");
    w_gate.setZero(options.d_ff, options.d_model);
    w_up.setZero(options.d_ff, options.d_model);
    w_down.setZero(options.d_model, options.d_ff);
    set_biases(options);
  }
  /// Weights are normal with variance 1 / in, biases zero.
  GatedFeedForward(const Options& options, Rng& rng) requires std::same_as<Storage, Owned>
      : GatedFeedForward(options) {
    w_gate = lecun_normal<S>(options.d_ff, options.d_model, rng);
    w_up = lecun_normal<S>(options.d_ff, options.d_model, rng);
    w_down = lecun_normal<S>(options.d_model, options.d_ff, rng);
  }
  /// Takes weights that exist: gate and up [d_ff, d_model], down [d_model, d_ff]. Biases are zero.
  /// Throws unless the shapes are those of the options.
  GatedFeedForward(const Options& options, Weight gate, Weight up, Weight down)
      : w_gate(std::move(gate)), w_up(std::move(up)), w_down(std::move(down)), glu_(options.glu) {
    check_widths(options.d_model, options.d_ff, "GatedFeedForward");
    require_shape(w_gate, options.d_ff, options.d_model, "GatedFeedForward", "w_gate");
    require_shape(w_up, options.d_ff, options.d_model, "GatedFeedForward", "w_up");
    require_shape(w_down, options.d_model, options.d_ff, "GatedFeedForward", "w_down");
    set_biases(options);
  }

  Index d_model() const { return w_up.cols(); }
  Index d_ff() const { return w_up.rows(); }
  bool has_bias() const { return b_up.size() > 0; }
  const Unit& glu() const { return glu_; }

  /// y [rows, d_model] from x [rows, d_model]. Allocates its scratch.
  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y) const {
    Matrix<S> cache(x.rows(), cache_cols());
    forward(x, y, cache);
  }

  /// Scalars a row that forward keeps: [gate | up | scratch | scratch], each d_ff wide.
  Index cache_cols() const { return 4 * d_ff(); }
  /// What a forward pass takes.
  Index multiply_adds_per_row() const { return 3 * d_model() * d_ff(); }

  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y, MatrixRef<S> cache) const {
    check_expert_forward(*this, x, y, cache, "GatedFeedForward::forward");
    if (x.rows() == 0) return;
    auto gate = cache.leftCols(d_ff());                  // [rows, d_ff]
    auto up = cache.middleCols(d_ff(), d_ff());          // [rows, d_ff]
    auto hidden = cache.middleCols(2 * d_ff(), d_ff());  // [rows, d_ff]
    Linear(w_gate, b_gate).forward(x, gate);
    Linear(w_up, b_up).forward(x, up);
    activate_rows(gate, up, hidden);
    Linear(w_down, b_down).forward(hidden, y);
  }

  /// What the second product multiplies [rows, d_ff], of the cache of a forward pass.
  ConstMatrixRef<S> hidden(const ConstMatrixRef<S>& cache) const {
    return cache.middleCols(2 * d_ff(), d_ff());
  }

  /// d_x [rows, d_model] from d_y; adds to the parameters of `grad`.
  void backward(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& d_y, MatrixRef<S> cache,
                MatrixRef<S> d_x, GatedFeedForward& grad) const requires std::same_as<Storage, Owned> {
    check_expert_backward(*this, x, d_y, cache, d_x, grad, "GatedFeedForward::backward");
    if (x.rows() == 0) return;
    const auto gate = cache.leftCols(d_ff());
    const auto up = cache.middleCols(d_ff(), d_ff());
    auto hidden = cache.middleCols(2 * d_ff(), d_ff());  // then the gradient by gate
    auto d_up = cache.rightCols(d_ff());
    activate_rows(gate, up, hidden);
    const Linear down(w_down, b_down);
    down.backward_parameters(hidden, d_y, Linear(grad.w_down, grad.b_down));
    down.backward_input(d_y, hidden);
    for (Index i = 0; i < x.rows(); ++i)
      activate_gated_backward(glu_, d_ff(), &gate.coeffRef(i, 0), &up.coeffRef(i, 0), &hidden.coeffRef(i, 0),
                              &hidden.coeffRef(i, 0), &d_up.coeffRef(i, 0));
    const auto& d_gate = hidden;
    const Linear by_gate(w_gate, b_gate), by_up(w_up, b_up);
    by_gate.backward_parameters(x, d_gate, Linear(grad.w_gate, grad.b_gate));
    by_up.backward_parameters(x, d_up, Linear(grad.w_up, grad.b_up));
    by_gate.backward_input(d_gate, d_x);
    by_up.backward_input(d_up, d_x, Write::add);
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_weight("w_gate", f, self.w_gate...);
    visit_weight("w_up", f, self.w_up...);
    visit_weight("w_down", f, self.w_down...);
    if ((self.has_bias() || ...)) {
      visit_array(f, {"b_gate"}, self.b_gate...);
      visit_array(f, {"b_up"}, self.b_up...);
      visit_array(f, {"b_down"}, self.b_down...);
    }
  }

  Weight w_gate;     ///< [d_ff, d_model]
  Weight w_up;       ///< [d_ff, d_model]
  Weight w_down;     ///< [d_model, d_ff]
  Vector<S> b_gate;  ///< [d_ff], empty without bias
  Vector<S> b_up;    ///< [d_ff], empty without bias
  Vector<S> b_down;  ///< [d_model], empty without bias

 private:
  void set_biases(const Options& options) {
    if (!options.bias) return;
    b_gate.setZero(options.d_ff);
    b_up.setZero(options.d_ff);
    b_down.setZero(options.d_model);
  }

  template <class G, class U, class To>
  void activate_rows(const G& gate, const U& up, To&& to) const {
    for (Index i = 0; i < gate.rows(); ++i)
      activate_gated(glu_, d_ff(), &gate.coeffRef(i, 0), &up.coeffRef(i, 0), &to.coeffRef(i, 0));
  }

  Unit glu_;
};

}  // namespace moe
