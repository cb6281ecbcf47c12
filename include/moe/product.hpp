// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <moe/check.hpp>
#include <moe/kernels/select.hpp>
#include <moe/numbers.hpp>
#include <moe/types.hpp>

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

template <class S>
using Packet = typename Eigen::internal::packet_traits<S>::type;

template <class S>
inline constexpr int kPacketSize = Eigen::internal::unpacket_traits<Packet<S>>::size;

// The register tile: kTileRows x (kTilePackets packets). 24 accumulators where there are 32 vector
// registers, 12 where there are 16.
inline constexpr bool kManyRegisters = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32;
inline constexpr int kTileRows = kManyRegisters ? 8 : 6;
inline constexpr int kTilePackets = kManyRegisters ? 3 : 2;
inline constexpr Index kDepthBlock = 128;

template <class S>
inline constexpr int kTileCols = kTilePackets* kPacketSize<S>;

// c [Rows, tile] (+)= a [Rows, depth] * b [depth, tile]. a(i, p) = a[i * a_row + p * a_depth];
// b(p, j) = b[p * b_depth + j].
template <int Rows, class S>
inline void multiply_tile(Index depth, const S* a, Index a_row, Index a_depth, const S* b, Index b_depth,
                          S* c, Index c_row, bool accumulate) {
  namespace in = Eigen::internal;
  constexpr int kSize = kPacketSize<S>;
  Packet<S> sum[std::size_t(Rows)][kTilePackets];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kTilePackets; ++j) sum[i][j] = in::pset1<Packet<S>>(S(0));
  for (Index p = 0; p < depth; ++p) {
    Packet<S> right[kTilePackets];
#pragma GCC unroll 3
    for (int j = 0; j < kTilePackets; ++j) right[j] = in::ploadu<Packet<S>>(b + p * b_depth + j * kSize);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Packet<S> left = in::pset1<Packet<S>>(a[i * a_row + p * a_depth]);
#pragma GCC unroll 3
      for (int j = 0; j < kTilePackets; ++j) sum[i][j] = in::pmadd(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kTilePackets; ++j) {
      S* out = c + i * c_row + j * kSize;
      in::pstoreu(out, accumulate ? in::padd(in::ploadu<Packet<S>>(out), sum[i][j]) : sum[i][j]);
    }
}

// The same for 1 <= rows <= Rows, each count by a tile of its own height.
template <int Rows, class S>
inline void multiply_rows(Index rows, Index depth, const S* a, Index a_row, Index a_depth, const S* b,
                          Index b_depth, S* c, Index c_row, bool accumulate) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return multiply_rows<Rows - 1>(rows, depth, a, a_row, a_depth, b, b_depth, c, c_row, accumulate);
    }
  }
  multiply_tile<Rows>(depth, a, a_row, a_depth, b, b_depth, c, c_row, accumulate);
}

// panel [depth, tile] = b [depth, cols] with zeros right of cols.
template <class S>
inline void pack_panel(Index depth, Index cols, const S* b, Index b_depth, S* panel) {
  for (Index p = 0; p < depth; ++p, panel += kTileCols<S>) {
    std::copy_n(b + p * b_depth, cols, panel);
    std::fill(panel + cols, panel + kTileCols<S>, S(0));
  }
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // of a packet as a template argument
// panel [depth, tile] = transpose of b [cols, depth], with zeros right of cols.
template <class S>
inline void pack_panel_transposed(Index depth, Index cols, const S* b, Index b_col, S* panel) {
  namespace in = Eigen::internal;
  constexpr int kSize = kPacketSize<S>;
  Index j = 0;
  for (; j + kSize <= cols; j += kSize) {
    Index p = 0;
    for (; p + kSize <= depth; p += kSize) {
      in::PacketBlock<Packet<S>, kSize> square;
#pragma GCC unroll 16
      for (int i = 0; i < kSize; ++i) square.packet[i] = in::ploadu<Packet<S>>(b + (j + i) * b_col + p);
      in::ptranspose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kSize; ++i) in::pstoreu(panel + (p + i) * kTileCols<S> + j, square.packet[i]);
    }
    for (; p < depth; ++p)
      for (int i = 0; i < kSize; ++i) panel[p * kTileCols<S> + j + i] = b[(j + i) * b_col + p];
  }
  for (Index p = 0; p < depth; ++p) {
    S* row = panel + p * kTileCols<S>;
    for (Index i = j; i < cols; ++i) row[i] = b[i * b_col + p];
    std::fill(row + (std::max)(j, cols), row + kTileCols<S>, S(0));
  }
}
#pragma GCC diagnostic pop

// The kernels for products of floats.
inline const kernels::DenseKernels& float_kernels() {
  static const kernels::DenseKernels& table = *kernels::find_dense(best_instruction_set());
  return table;
}

template <class S>
inline constexpr bool kHasKernels = std::is_same_v<S, float>;

enum class Right { normal, transposed };

// c [rows, cols] (+)= a [rows, depth] * b, b being [depth, cols] or, transposed, [cols, depth].
template <Right kRight, class S>
void multiply(Index rows, Index cols, Index depth, const S* a, Index a_row, Index a_depth, const S* b,
              Index b_stride, S* c, Index c_row, bool accumulate) {
  constexpr Index kCols = kTileCols<S>;
  if (depth == 0 && !accumulate) {
    for (Index i = 0; i < rows; ++i) std::fill_n(c + i * c_row, cols, S(0));
  }
  alignas(64) S panel[std::size_t(kDepthBlock * kCols)];
  alignas(64) S edge[std::size_t(kTileRows * kCols)];
  for (Index p = 0; p < depth; p += kDepthBlock) {
    const Index deep = (std::min)(kDepthBlock, depth - p);
    const bool add = accumulate || p > 0;
    for (Index j = 0; j < cols; j += kCols) {
      const Index wide = (std::min)(kCols, cols - j);
      const S* right = panel;
      Index right_stride = kCols;
      if constexpr (kRight == Right::transposed) {
        pack_panel_transposed(deep, wide, b + j * b_stride + p, b_stride, panel);
      } else if (wide == kCols && rows <= 2 * kTileRows) {  // too few rows to repay a copy
        right = b + p * b_stride + j;
        right_stride = b_stride;
      } else {
        pack_panel(deep, wide, b + p * b_stride + j, b_stride, panel);
      }
      for (Index i = 0; i < rows; i += kTileRows) {
        const Index high = std::min<Index>(kTileRows, rows - i);
        const S* left = a + i * a_row + p * a_depth;
        S* out = c + i * c_row + j;
        if (wide == kCols) {
          multiply_rows<kTileRows>(high, deep, left, a_row, a_depth, right, right_stride, out, c_row, add);
        } else {  // the last columns go through a whole tile of their own
          multiply_rows<kTileRows>(high, deep, left, a_row, a_depth, right, right_stride, edge, kCols, false);
          for (Index r = 0; r < high; ++r)
            for (Index q = 0; q < wide; ++q)
              out[r * c_row + q] = edge[r * kCols + q] + (add ? out[r * c_row + q] : S(0));
        }
      }
    }
  }
}

template <class M>
inline constexpr bool kRowsAreContiguous =
    (M::IsRowMajor || M::ColsAtCompileTime == 1) && M::InnerStrideAtCompileTime == 1;

// From the begin of a row to the next. A vector taken as a matrix of one column is column-major.
template <class M>
Index row_stride(const M& m) {
  return M::IsRowMajor ? m.outerStride() : Index(1);
}

// What a product is where the contracted dimension is 0.
template <class M>
void contract_nothing(M&& m, bool add) {
  if (!add) m.setZero();
}

}  // namespace detail

/// Whether a product writes its result or adds to what is there.
enum class Write { replace, add };

/// y [rows, out] = x [rows, in] * w^T, w [out, in]: a linear layer as torch.nn.Linear stores it.
/// O(rows * in * out). Like all products here it throws std::invalid_argument unless shapes fit and the
/// result lies apart from the operands.
template <class X, class W, class Y>
void linear(const X& x, const W& w, Y&& y, Write write = Write::replace) {
  using Out = std::remove_cvref_t<Y>;
  static_assert(detail::kRowsAreContiguous<X> && detail::kRowsAreContiguous<W> &&
                detail::kRowsAreContiguous<Out>);
  require_shape(w, y.cols(), x.cols(), "linear", "w");
  require_shape(y, x.rows(), w.rows(), "linear", "y");
  require_apart("linear", "y", y, "x", x, "w", w);
  const bool add = write == Write::add;
  if constexpr (detail::kHasKernels<typename X::Scalar>) {
    if (y.size() == 0) return;
    if (x.cols() == 0) return detail::contract_nothing(y, add);
    detail::float_kernels().linear(x.rows(), x.cols(), w.rows(), x.data(), detail::row_stride(x), w.data(),
                                   detail::row_stride(w), y.data(), detail::row_stride(y), add);
  } else {
    detail::multiply<detail::Right::transposed>(x.rows(), w.rows(), x.cols(), x.data(), detail::row_stride(x),
                                                Index(1), w.data(), detail::row_stride(w), y.data(),
                                                detail::row_stride(y), add);
  }
}

/// d_x [rows, in] = d_y [rows, out] * w, w [out, in]: the gradient of `linear` by its input.
template <class Dy, class W, class Dx>
void linear_backward_input(const Dy& d_y, const W& w, Dx&& d_x, Write write = Write::replace) {
  using Out = std::remove_cvref_t<Dx>;
  static_assert(detail::kRowsAreContiguous<Dy> && detail::kRowsAreContiguous<W> &&
                detail::kRowsAreContiguous<Out>);
  require_shape(w, d_y.cols(), d_x.cols(), "linear_backward_input", "w");
  require_shape(d_x, d_y.rows(), w.cols(), "linear_backward_input", "d_x");
  require_apart("linear_backward_input", "d_x", d_x, "d_y", d_y, "w", w);
  const bool add = write == Write::add;
  if constexpr (detail::kHasKernels<typename Dy::Scalar>) {
    if (d_x.size() == 0) return;
    if (d_y.cols() == 0) return detail::contract_nothing(d_x, add);
    detail::float_kernels().linear_backward_input(d_y.rows(), w.cols(), w.rows(), d_y.data(),
                                                  detail::row_stride(d_y), w.data(), detail::row_stride(w),
                                                  d_x.data(), detail::row_stride(d_x), add);
  } else {
    detail::multiply<detail::Right::normal>(d_y.rows(), w.cols(), d_y.cols(), d_y.data(),
                                            detail::row_stride(d_y), Index(1), w.data(),
                                            detail::row_stride(w), d_x.data(), detail::row_stride(d_x), add);
  }
}

/// d_w [out, in] += d_y^T [out, rows] * x [rows, in]: the gradient of `linear` by its weight.
template <class Dy, class X, class Dw>
void linear_backward_weight(const Dy& d_y, const X& x, Dw&& d_w) {
  using Out = std::remove_cvref_t<Dw>;
  static_assert(detail::kRowsAreContiguous<Dy> && detail::kRowsAreContiguous<X> &&
                detail::kRowsAreContiguous<Out>);
  require_shape(x, d_y.rows(), d_w.cols(), "linear_backward_weight", "x");
  require_shape(d_w, d_y.cols(), x.cols(), "linear_backward_weight", "d_w");
  require_apart("linear_backward_weight", "d_w", d_w, "d_y", d_y, "x", x);
  if constexpr (detail::kHasKernels<typename Dy::Scalar>) {
    if (d_w.size() == 0 || x.rows() == 0) return;
    detail::float_kernels().linear_backward_weight(x.rows(), x.cols(), d_w.rows(), d_y.data(),
                                                   detail::row_stride(d_y), x.data(), detail::row_stride(x),
                                                   d_w.data(), detail::row_stride(d_w));
  } else {
    detail::multiply<detail::Right::normal>(d_y.cols(), x.cols(), d_y.rows(), d_y.data(), Index(1),
                                            detail::row_stride(d_y), x.data(), detail::row_stride(x),
                                            d_w.data(), detail::row_stride(d_w), true);
  }
}

/// Sum of a[i] * b[i], in an order that n alone decides.
template <class S>
S dot(Index n, const S* a, const S* b) {
  namespace in = Eigen::internal;
  using P = detail::Packet<S>;
  constexpr int kSize = detail::kPacketSize<S>;
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
  using P = detail::Packet<S>;
  constexpr int kSize = detail::kPacketSize<S>;
  const P factor = in::pset1<P>(scale);
  Index i = 0;
  for (; i + kSize <= n; i += kSize)
    in::pstoreu(y + i, in::pmadd(factor, in::ploadu<P>(x + i), in::ploadu<P>(y + i)));
  for (; i < n; ++i) y[i] += scale * x[i];
}

/// Adds the vector b [cols] to every row of y [rows, cols].
template <class B, class Y>
void add_bias(const B& b, Y&& y) {
  static_assert(detail::kRowsAreContiguous<B> && detail::kRowsAreContiguous<std::remove_cvref_t<Y>>);
  using S = typename std::remove_cvref_t<Y>::Scalar;
  require(b.size() == y.cols(), "add_bias: b has ", b.size(), " entries, expected ", y.cols());
  require_apart("add_bias", "y", y, "b", b);
  for (Index i = 0; i < y.rows(); ++i) add_scaled(y.cols(), S(1), b.data(), &y.coeffRef(i, 0));
}

/// d_b [cols] += the sum of those rows i of d_y [rows, cols] for which `keep(i)`, summed in double from the
/// first row to the last and rounded once.
template <class Dy, class B, class Keep>
void bias_backward(const Dy& d_y, B&& d_b, const Keep& keep) {
  static_assert(detail::kRowsAreContiguous<Dy> && detail::kRowsAreContiguous<std::remove_cvref_t<B>>);
  using S = typename Dy::Scalar;
  require(d_b.size() == d_y.cols(), "bias_backward: d_b has ", d_b.size(), " entries, expected ", d_y.cols());
  require_apart("bias_backward", "d_b", d_b, "d_y", d_y);
  using Sum = detail::Sum<S>;
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

}  // namespace moe
