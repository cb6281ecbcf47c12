// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/types.hpp>
#include <moe/kernels/packet_product.hpp>
#include <moe/math/numbers.hpp>

// Every matrix product of the library. Each one runs on the calling thread whatever Eigen's OpenMP
// settings are, allocates nothing, and adds in an order that the shapes alone decide: an element of
// the result is a chain of multiply-adds over the contracted dimension. In scalars other than float it is cut
// at multiples of 128, in floats at multiples of 256 but for linear_backward_input, and the parts are added
// up one after the other: so a sum of n terms in floats errs by at most about (256 + n / 256) 2^-24 of the
// sum of their magnitudes, in linear_backward_input by n 2^-24. Hence the bits of a result do not depend on
// threads, on alignment, or on the rows beside it. Products of floats run on kernels chosen while the program
// runs, whatever flags it is compiled with.
namespace moe {

namespace detail {

// A matrix whose rows are contiguous, without its type: products are compiled once a scalar.
template <class S>
struct Rows {
  static constexpr bool IsRowMajor = true;
  S* first;
  Index height, width, stride;

  S* data() const { return first; }
  Index rows() const { return height; }
  Index cols() const { return width; }
  Index outerStride() const { return stride; }
  bool empty() const { return height == 0 || width == 0; }

  Rows block(Index row, Index col, Index rows, Index cols) const {
    return {first + row * stride + col, rows, cols, stride};
  }
  void set_zero() const {
    for (Index i = 0; i < height; ++i) std::fill_n(first + i * stride, width, S(0));
  }
};

// A vector taken as a matrix of one column is column-major.
template <class M>
auto as_rows(M& m) {
  static_assert(kRowsAreContiguous<std::remove_const_t<M>>);
  using S = std::remove_pointer_t<decltype(m.data())>;
  return Rows<S>{m.data(), m.rows(), m.cols(), M::IsRowMajor ? m.outerStride() : Index(1)};
}

template <class S>
[[gnu::noinline]] void linear_rows(const Rows<const S>& x, const Rows<const S>& w, const Rows<S>& y,
                                   bool add) {
  require_shape(w, y.cols(), x.cols(), "linear", "w");
  require_shape(y, x.rows(), w.rows(), "linear", "y");
  moe::require_apart("linear", "y", y, "x", x, "w", w);
  if constexpr (kernels::packet::kHasKernels<S>) {
    if (y.empty()) return;
    if (x.width > 0)
      kernels::packet::float_kernels().linear(x.height, x.width, w.height, x.first, x.stride, w.first,
                                              w.stride, y.first, y.stride, add);
    else if (!add)
      y.set_zero();
  } else {
    kernels::packet::multiply<kernels::packet::Right::transposed>(
        x.height, w.height, x.width, x.first, x.stride, Index(1), w.first, w.stride, y.first, y.stride, add);
  }
}

template <class S>
[[gnu::noinline]] void linear_backward_input_rows(const Rows<const S>& d_y, const Rows<const S>& w,
                                                  const Rows<S>& d_x, bool add) {
  require_shape(w, d_y.cols(), d_x.cols(), "linear_backward_input", "w");
  require_shape(d_x, d_y.rows(), w.cols(), "linear_backward_input", "d_x");
  moe::require_apart("linear_backward_input", "d_x", d_x, "d_y", d_y, "w", w);
  if constexpr (kernels::packet::kHasKernels<S>) {
    if (d_x.empty()) return;
    if (d_y.width > 0)
      kernels::packet::float_backward_kernels().linear_backward_input(d_y.height, w.width, w.height,
                                                                      d_y.first, d_y.stride, w.first,
                                                                      w.stride, d_x.first, d_x.stride, add);
    else if (!add)
      d_x.set_zero();
  } else {
    kernels::packet::multiply<kernels::packet::Right::normal>(d_y.height, w.width, d_y.width, d_y.first,
                                                              d_y.stride, Index(1), w.first, w.stride,
                                                              d_x.first, d_x.stride, add);
  }
}

template <class S>
[[gnu::noinline]] void linear_backward_weight_rows(const Rows<const S>& d_y, const Rows<const S>& x,
                                                   const Rows<S>& d_w) {
  require_shape(x, d_y.rows(), d_w.cols(), "linear_backward_weight", "x");
  require_shape(d_w, d_y.cols(), x.cols(), "linear_backward_weight", "d_w");
  moe::require_apart("linear_backward_weight", "d_w", d_w, "d_y", d_y, "x", x);
  if constexpr (kernels::packet::kHasKernels<S>) {
    if (d_w.empty() || x.height == 0) return;
    kernels::packet::float_backward_kernels().linear_backward_weight(
        x.height, x.width, d_w.height, d_y.first, d_y.stride, x.first, x.stride, d_w.first, d_w.stride);
  } else {
    kernels::packet::multiply<kernels::packet::Right::normal>(d_y.width, x.width, d_y.height, d_y.first,
                                                              Index(1), d_y.stride, x.first, x.stride,
                                                              d_w.first, d_w.stride, true);
  }
}

}  // namespace detail

/// Whether a product writes its result or adds to what is there.
enum class Write { replace, add };

/// y [rows, out] = x [rows, in] * w^T, w [out, in]: a linear layer as torch.nn.Linear stores it.
/// O(rows * in * out). Like all products here it throws std::invalid_argument unless shapes fit and the
/// result lies apart from the operands.
template <class X, class W, class Y>
void linear(const X& x, const W& w, Y&& y, Write write = Write::replace) {
  detail::linear_rows(detail::as_rows(x), detail::as_rows(w), detail::as_rows(y), write == Write::add);
}

/// d_x [rows, in] = d_y [rows, out] * w, w [out, in]: the gradient of `linear` by its input.
template <class Dy, class W, class Dx>
void linear_backward_input(const Dy& d_y, const W& w, Dx&& d_x, Write write = Write::replace) {
  detail::linear_backward_input_rows(detail::as_rows(d_y), detail::as_rows(w), detail::as_rows(d_x),
                                     write == Write::add);
}

/// d_w [out, in] += d_y^T [out, rows] * x [rows, in]: the gradient of `linear` by its weight.
template <class Dy, class X, class Dw>
void linear_backward_weight(const Dy& d_y, const X& x, Dw&& d_w) {
  detail::linear_backward_weight_rows(detail::as_rows(d_y), detail::as_rows(x), detail::as_rows(d_w));
}

/// Sum of a[i] * b[i], in an order that n alone decides.
template <class S>
S dot(Index n, const S* a, const S* b) {
  namespace in = Eigen::internal;
  using P = kernels::packet::Packet<S>;
  constexpr int kSize = kernels::packet::kPacketSize<S>;
  P sum[4] = {in::pset1<P>(S(0)), in::pset1<P>(S(0)), in::pset1<P>(S(0)), in::pset1<P>(S(0))};
  Index i = 0;
  for (; i + 4 * kSize <= n; i += 4 * kSize)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sum[j] = in::pmadd(in::ploadu<P>(a + i + j * kSize), in::ploadu<P>(b + i + j * kSize), sum[j]);
  for (; i + kSize <= n; i += kSize) sum[0] = in::pmadd(in::ploadu<P>(a + i), in::ploadu<P>(b + i), sum[0]);
  S total = in::predux(in::padd(in::padd(sum[0], sum[1]), in::padd(sum[2], sum[3])));
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

/// y[i] += scale * x[i].
template <class S>
void add_scaled(Index n, S scale, const S* x, S* y) {
  namespace in = Eigen::internal;
  using P = kernels::packet::Packet<S>;
  constexpr int kSize = kernels::packet::kPacketSize<S>;
  const P factor = in::pset1<P>(scale);
  Index i = 0;
  for (; i + kSize <= n; i += kSize)
    in::pstoreu(y + i, in::pmadd(factor, in::ploadu<P>(x + i), in::ploadu<P>(y + i)));
  for (; i < n; ++i) y[i] += scale * x[i];
}

/// Adds the vector b [cols] to the rows i of y [rows, cols] for which keep(i).
template <class B, class Y, class Keep>
void add_bias(const B& b, Y&& y, const Keep& keep) {
  static_assert(kRowsAreContiguous<B> && kRowsAreContiguous<std::remove_cvref_t<Y>>);
  using S = typename std::remove_cvref_t<Y>::Scalar;
  require(b.size() == y.cols(), "add_bias: b has ", b.size(), " entries, expected ", y.cols());
  require_apart("add_bias", "y", y, "b", b);
  for (Index i = 0; i < y.rows(); ++i)
    if (keep(i)) add_scaled(y.cols(), S(1), b.data(), &y.coeffRef(i, 0));
}
/// The same for every row.
template <class B, class Y>
void add_bias(const B& b, Y&& y) {
  add_bias(b, y, [](Index) { return true; });
}

/// d_b [cols] += the sum of those rows i of d_y [rows, cols] for which `keep(i)`, summed in double from the
/// first row to the last and rounded once.
template <class Dy, class B, class Keep>
void bias_backward(const Dy& d_y, B&& d_b, const Keep& keep) {
  static_assert(kRowsAreContiguous<Dy> && kRowsAreContiguous<std::remove_cvref_t<B>>);
  using S = typename Dy::Scalar;
  require(d_b.size() == d_y.cols(), "bias_backward: d_b has ", d_b.size(), " entries, expected ", d_y.cols());
  require_apart("bias_backward", "d_b", d_b, "d_y", d_y);
  using Sum = moe::Sum<S>;
  constexpr Index kCols = 256;
  for (Index j = 0; j < d_y.cols(); j += kCols) {
    const Index wide = (std::min)(kCols, d_y.cols() - j);
    Eigen::Array<Sum, kCols, 1> sum = Eigen::Array<Sum, kCols, 1>::Zero();
    for (Index i = 0; i < d_y.rows(); ++i) {
      if (!keep(i)) continue;
      const S* const row = &d_y.coeffRef(i, j);
      if (wide == kCols)
        sum += Eigen::Map<const Eigen::Array<S, kCols, 1>>(row).template cast<Sum>();
      else
        for (Index q = 0; q < wide; ++q) sum[q] += Sum(row[q]);
    }
    for (Index q = 0; q < wide; ++q) d_b[j + q] += S(sum[q]);
  }
}

/// The same for all rows.
template <class Dy, class B>
void bias_backward(const Dy& d_y, B&& d_b) {
  bias_backward(d_y, d_b, [](Index) { return true; });
}

namespace detail {

template <class S, Executor E>
void router_linear_rows(const Rows<const S>& x, const Rows<const S>& w, const Rows<S>& logits,
                        const E& executor) {
  require_shape(w, w.rows(), x.cols(), "router_linear", "w");
  require_shape(logits, x.rows(), w.rows(), "router_linear", "logits");
  const Index tokens = x.height, experts = w.height;
  if (experts == 0) return;
  if (tokens > kTokenBlock) {
    return for_each_block(tokens, executor, [&](Index begin, Index end, Index) {
      linear_rows(x.block(begin, 0, end - begin, x.width), w, logits.block(begin, 0, end - begin, experts),
                  false);
    });
  }
  // A block for each worker, but not less than a register of experts for a few tokens, or a panel for many;
  // nor than 2^15 products.
  const Index least = tokens <= 8 ? 16 : 64;
  const Index products = std::max<Index>(1, tokens * x.width), share = least * executor.concurrency();
  const Index cols = least * (std::max)((experts + share - 1) / share, (Index(1) << 15) / (products * least));
  executor.for_each((experts + cols - 1) / cols, [&](Index block, Index) {
    const Index begin = block * cols, count = (std::min)(cols, experts - begin);
    linear_rows(x, w.block(begin, 0, count, w.width), logits.block(0, begin, tokens, count), false);
  });
}

template <class S, Executor E>
void router_linear_backward_rows(const Rows<const S>& x, const Rows<const S>& w,
                                 const Rows<const S>& d_logits, const Rows<S>& d_w, const Rows<S>& d_x,
                                 const E& executor) {
  require_shape(d_logits, x.rows(), w.rows(), "router_linear_backward", "d_logits");
  require_shape(d_w, w.rows(), x.cols(), "router_linear_backward", "d_w");
  require_shape(d_x, x.rows(), w.cols(), "router_linear_backward", "d_x");
  if (x.height == 0) return;
  constexpr Index kCols = 128;
  executor.for_each((x.width + kCols - 1) / kCols, [&](Index block, Index) {
    const Index begin = block * kCols, count = (std::min)(kCols, x.width - begin);
    linear_backward_weight_rows(d_logits, x.block(0, begin, x.height, count),
                                d_w.block(0, begin, d_w.height, count));
  });
  for_each_block(x.height, executor, [&](Index begin, Index end, Index) {
    linear_backward_input_rows(d_logits.block(begin, 0, end - begin, d_logits.width), w,
                               d_x.block(begin, 0, end - begin, d_x.width), true);
  });
}

}  // namespace detail

/// A router's linear layer: logits [tokens, experts] = x w^T, in blocks of tokens; where there is but one,
/// in blocks of experts, so that one token uses every worker. O(tokens * experts * d_model).
template <class S, class X, class Z, Executor E>
void router_linear(const X& x, const Matrix<S>& w, Z&& logits, const E& executor) {
  detail::router_linear_rows(detail::as_rows(x), detail::as_rows(w), detail::as_rows(logits), executor);
}

/// Backward of a router's linear layer logits = x w^T: d_w [experts, d_model] += d_logits^T x and
/// d_x [tokens, d_model] += d_logits w, in blocks of fixed size. O(tokens * experts * d_model).
template <class S, class X, class Dz, class Dx, Executor E>
void router_linear_backward(const X& x, const Matrix<S>& w, const Dz& d_logits, Matrix<S>& d_w, Dx&& d_x,
                            const E& executor) {
  detail::router_linear_backward_rows(detail::as_rows(x), detail::as_rows(w), detail::as_rows(d_logits),
                                      detail::as_rows(d_w), detail::as_rows(d_x), executor);
}

}  // namespace moe
