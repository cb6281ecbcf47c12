// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <moe/core/types.hpp>
#include <moe/kernels/select.hpp>

// Products of scalars other than float: register tiles of Eigen's packets, compiled for the flags of the
// program.
namespace moe::kernels::packet {

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

// c [1, cols] (+)= a [1, depth] * b^T for one row and whole packets of columns, `depth` at most kDepthBlock:
// what is transposed stays in registers. Two packets in turn, so that neither sum waits for itself. Returns
// how many columns it did.
template <class S>
inline Index multiply_row(Index cols, Index depth, const S* a, const S* b, Index b_col, S* c,
                          bool accumulate) {
  namespace in = Eigen::internal;
  constexpr int kSize = kPacketSize<S>, kBlocks = 2;
  Index j = 0;
  for (; j + kBlocks * kSize <= cols; j += kBlocks * kSize) {
    Packet<S> sum[kBlocks];
    for (Packet<S>& block : sum) block = in::pset1<Packet<S>>(S(0));
    Index p = 0;
    for (; p + kSize <= depth; p += kSize)
#pragma GCC unroll 2
      for (int k = 0; k < kBlocks; ++k) {
        in::PacketBlock<Packet<S>, kSize> square;
        const S* const from = b + (j + k * kSize) * b_col + p;
#pragma GCC unroll 16
        for (int i = 0; i < kSize; ++i) square.packet[i] = in::ploadu<Packet<S>>(from + i * b_col);
        in::ptranspose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kSize; ++i)
          sum[k] = in::pmadd(in::pset1<Packet<S>>(a[p + i]), square.packet[i], sum[k]);
      }
    for (; p < depth; ++p)
      for (int k = 0; k < kBlocks; ++k)
        sum[k] = in::pmadd(in::pset1<Packet<S>>(a[p]),
                           in::pgather<S, Packet<S>>(b + (j + k * kSize) * b_col + p, b_col), sum[k]);
    for (int k = 0; k < kBlocks; ++k) {
      S* const out = c + j + k * kSize;
      in::pstoreu(out, accumulate ? in::padd(in::ploadu<Packet<S>>(out), sum[k]) : sum[k]);
    }
  }
  return j;
}
#pragma GCC diagnostic pop

// The kernels for products of floats.
inline const kernels::DenseKernels& float_kernels() {
  static const kernels::DenseKernels& table = *kernels::find_dense(best_instruction_set());
  return table;
}
inline const kernels::DenseBackwardKernels& float_backward_kernels() {
  static const kernels::DenseBackwardKernels& table = *kernels::find_dense_backward(best_instruction_set());
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
    Index j = 0;
    if constexpr (kRight == Right::transposed)
      if (rows == 1 && a_depth == 1) j = multiply_row(cols, deep, a + p, b + p, b_stride, c, add);
    for (; j < cols; j += kCols) {
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
              out[r * c_row + q] = add ? edge[r * kCols + q] + out[r * c_row + q] : edge[r * kCols + q];
        }
      }
    }
  }
}

}  // namespace moe::kernels::packet
