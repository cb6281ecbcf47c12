// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/check.hpp>
#include <moe/experts/expert.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>
#include <moe/math/softmax.hpp>

// The zero-computation experts of MoE++ (Jin et al. 2024, "MoE++: Accelerating Mixture-of-Experts
// Methods with Zero-Computation Experts"). They stand beside ordinary experts in one layer, by
// VariantExpert, so that easy tokens cost little. None of them keeps anything for backward.
namespace moe {

/// y = 0: discards its input, so that the gate which it gets counts for nothing. No parameters.
/// Forward and backward are O(rows * d_model). Both throw std::invalid_argument unless shapes fit.
template <class S>
class ZeroExpert {
 public:
  using Scalar = S;

  struct Options {
    Index d_model = 0;
  };

  /// Throws std::invalid_argument unless d_model is positive.
  explicit ZeroExpert(const Options& options) : d_model_(options.d_model) {
    require(options.d_model > 0, "ZeroExpert: d_model = ", options.d_model, ", expected at least 1");
  }
  /// The same: there is nothing to draw.
  ZeroExpert(const Options& options, Rng&) : ZeroExpert(options) {}

  Index d_model() const { return d_model_; }

  /// y [rows, d_model] from x [rows, d_model]. Zero also where x is NaN. Allocates nothing.
  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y) const {
    check_expert_forward(*this, x, y, "ZeroExpert::forward");
    y.setZero();
  }

  /// Scalars a row that forward keeps: none.
  Index cache_cols() const { return 0; }

  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y, MatrixRef<S> cache) const {
    check_expert_forward(*this, x, y, cache, "ZeroExpert::forward");
    forward(x, y);
  }

  /// d_x [rows, d_model] = 0.
  void backward(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& d_y, MatrixRef<S> cache,
                MatrixRef<S> d_x, ZeroExpert& grad) const {
    check_expert_backward(*this, x, d_y, cache, d_x, grad, "ZeroExpert::backward");
    d_x.setZero();
  }

  template <class F, class... Self>
  static void visit(F&&, Self&...) {}

 private:
  Index d_model_;
};

/// y = x: skips the layer. No parameters. Forward and backward are O(rows * d_model). Both throw
/// std::invalid_argument unless shapes fit.
template <class S>
class CopyExpert {
 public:
  using Scalar = S;

  struct Options {
    Index d_model = 0;
  };

  /// Throws std::invalid_argument unless d_model is positive.
  explicit CopyExpert(const Options& options) : d_model_(options.d_model) {
    require(options.d_model > 0, "CopyExpert: d_model = ", options.d_model, ", expected at least 1");
  }
  /// The same: there is nothing to draw.
  CopyExpert(const Options& options, Rng&) : CopyExpert(options) {}

  Index d_model() const { return d_model_; }

  /// y [rows, d_model] from x [rows, d_model]. Allocates nothing.
  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y) const {
    check_expert_forward(*this, x, y, "CopyExpert::forward");
    y = x;
  }

  /// Scalars a row that forward keeps: none.
  Index cache_cols() const { return 0; }

  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y, MatrixRef<S> cache) const {
    check_expert_forward(*this, x, y, cache, "CopyExpert::forward");
    forward(x, y);
  }

  /// d_x [rows, d_model] = d_y.
  void backward(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& d_y, MatrixRef<S> cache,
                MatrixRef<S> d_x, CopyExpert& grad) const {
    check_expert_backward(*this, x, d_y, cache, d_x, grad, "CopyExpert::backward");
    d_x = d_y;
  }

  template <class F, class... Self>
  static void visit(F&&, Self&...) {}

 private:
  Index d_model_;
};

/// y = a_1 x + a_2 v, (a_1, a_2) = softmax(w_c x): mixes its input with a trained vector v. Forward
/// and backward are O(rows * d_model): backward computes a again, by two dot products a row, rather
/// than have it kept. Both throw std::invalid_argument unless shapes fit.
template <class S>
class ConstantExpert {
 public:
  using Scalar = S;

  struct Options {
    Index d_model = 0;
  };

  /// All parameters are zero, to be filled from elsewhere. Throws unless d_model is positive.
  explicit ConstantExpert(const Options& options) {
    require(options.d_model > 0, "ConstantExpert: d_model = ", options.d_model, ", expected at least 1");
    w_c.setZero(2, options.d_model);
    v.setZero(options.d_model);
  }
  /// w_c is normal with variance 1 / d_model; v is normal with variance 1, as its authors draw it.
  ConstantExpert(const Options& options, Rng& rng) : ConstantExpert(options) {
    w_c = lecun_normal<S>(2, options.d_model, rng);
    fill_normal(v, 1.0, rng);
  }

  Index d_model() const { return w_c.cols(); }

  /// y [rows, d_model] from x [rows, d_model]. Allocates nothing.
  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y) const {
    check_expert_forward(*this, x, y, "ConstantExpert::forward");
    for (Index i = 0; i < x.rows(); ++i) {
      S a[2];
      shares(&x.coeffRef(i, 0), a);
      y.row(i) = a[1] * v.transpose();
      add_scaled(d_model(), a[0], &x.coeffRef(i, 0), &y.coeffRef(i, 0));
    }
  }

  /// Scalars a row that forward keeps: none.
  Index cache_cols() const { return 0; }

  void forward(const ConstMatrixRef<S>& x, MatrixRef<S> y, MatrixRef<S> cache) const {
    check_expert_forward(*this, x, y, cache, "ConstantExpert::forward");
    forward(x, y);
  }

  /// d_x [rows, d_model] from d_y; adds to the parameters of `grad`. With d_z the gradient by the
  /// logits, from d_a = (<d_y, x>, <d_y, v>): d_x = a_1 d_y + w_c^T d_z, d_w_c = d_z x^T and
  /// d_v = a_2 d_y.
  void backward(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& d_y, MatrixRef<S> cache,
                MatrixRef<S> d_x, ConstantExpert& grad) const {
    check_expert_backward(*this, x, d_y, cache, d_x, grad, "ConstantExpert::backward");
    const Index n = d_model();
    constexpr Index kRows = 256;  // that are summed up at a time
    Eigen::Matrix<S, kRows, 2, Eigen::RowMajor> d_z;
    Eigen::Matrix<S, kRows, 1> share_of_v;
    for (Index begin = 0; begin < x.rows(); begin += kRows) {
      const Index count = (std::min)(kRows, x.rows() - begin);
      d_z.setZero();
      for (Index i = 0; i < count; ++i) {
        const S* const in = &x.coeffRef(begin + i, 0);
        const S* const d_out = &d_y.coeffRef(begin + i, 0);
        S* const d_in = &d_x.coeffRef(begin + i, 0);
        S a[2];
        shares(in, a);
        const S d_a[2] = {dot(n, d_out, in), dot(n, d_out, v.data())};
        softmax_backward(Index(2), a, d_a, &d_z(i, 0));
        d_x.row(begin + i) = a[0] * d_y.row(begin + i);
        for (const Index k : {0, 1}) add_scaled(n, d_z(i, k), &w_c(k, 0), d_in);
        share_of_v[i] = a[1];
      }
      linear_backward_weight(d_z.topRows(count), x.middleRows(begin, count), grad.w_c);
      linear_backward_weight(share_of_v.head(count), d_y.middleRows(begin, count),
                             Eigen::Map<Matrix<S>>(grad.v.data(), 1, n));
    }
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_array(f, {"w_c"}, self.w_c...);
    visit_array(f, {"v"}, self.v...);
  }

  Matrix<S> w_c;  ///< [2, d_model]
  Vector<S> v;    ///< [d_model]

 private:
  // a = softmax(w_c x): the shares of x and of v in the output.
  void shares(const S* x, S* a) const {
    const S z[2] = {dot(d_model(), &w_c(0, 0), x), dot(d_model(), &w_c(1, 0), x)};
    softmax(Index(2), z, a);
  }
};

}  // namespace moe
