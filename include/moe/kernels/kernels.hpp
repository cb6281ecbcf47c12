// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include <moe/core/types.hpp>

// What a set of kernels offers. Each instruction set fills one Kernels with the functions of its own
// namespace; all of them are made from one text: product.inc, elementwise.inc and dense.inc.
//
// Packed weights lie in micro-panels of `columns` columns, each contiguous: [streams, depth, columns /
// streams]. A product reads the streams of a panel side by side: some processors fetch several faster than
// one. How the numbers of a stream lie is up to their format: blocks of numbers of a column along the depth,
// [streams, depth / block, columns / streams, block], the last one filled up with zeros.
namespace moe::kernels {

/// Numbers of weights other than float, by their bits. A format has a type of its own: by it a product
/// chooses how a register of weights is loaded.
enum class Bfloat16 : std::uint16_t {};  ///< the upper half of a float

/// Numbers of a column that lie side by side in a panel.
template <class Number>
inline constexpr Index kBlockNumbers = 1;
template <>
inline constexpr Index kBlockNumbers<Bfloat16> = 2;

/// The built-in activations as the kernels know them.
enum class Unit : std::uint8_t { relu, gelu, gelu_tanh, silu, clamped_swiglu };

/// What stands between an expert's two products. Gated: the first half of a panel is the gate, the
/// second the linear branch.
struct Activation {
  Unit unit = Unit::relu;
  bool gated = false;
  float alpha = 1, limit = 0, offset = 0;  ///< of clamped_swiglu

  friend bool operator==(const Activation&, const Activation&) = default;
};

/// Rows of activations as a product reads them: row i begins at data + i * stride, its parts are `width`
/// apart.
template <class X>
struct Parts {
  const X* data;
  Index stride, width;
};

/// How a tile's sums begin and end: from zero, in place of what stands in c; from what stands in c, with
/// which they are one chain; or from zero, and then added to what stands in c.
enum class Sums : std::uint8_t { begin, go_on, add };

/// Products of rows and panels of one format. Every element is one chain of fused multiply-adds along the
/// depth, whatever the rows beside it; hence the same bits for any batch.
template <class X>
struct Product {
  Index rows, depth;  ///< that it takes at most: what it reads of them then stays in the second cache
  Index parts;        ///< numbers that stand for a float of an activation
  /// to [parts, width] = the parts of from [count] and, where there are several or they are not floats, zeros
  /// behind them; width is a multiple of 32.
  void (*split)(Index count, const float* from, X* to, Index width);
  /// c [panels, rows, columns] = x * panels or, where `add`, added to c. Each stream begins `apart` bytes
  /// after the one before it, also from one panel to the next. `next` is what will be read of a panel after
  /// this: it is fetched into the caches meanwhile, or any pointer at all; for floats null, where the panels
  /// are in the caches and nothing is to be fetched.
  void (*multiply)(Index rows, Index depth, const Parts<X>& x, const std::byte* panel, Index apart,
                   Index panels, float* c, bool add, const std::byte* next);
};

/// Products of weights in bfloat16 by an instruction that multiplies pairs of bfloat16 and adds both products
/// to a float. It takes numbers below the normal ones as zero. Of the parts one is rounded, three are exact.
using DotProduct = Product<std::uint16_t>;

inline constexpr Index kMaxRows = 96, kDepth = 512;         // of products of floats
inline constexpr Index kMaxDotRows = 96, kDotDepth = 2048;  // of dot products

// From one row of x to the next in products with one part: a constant, which makes addresses short, and an
// odd number of cache lines, which spreads rows over the first cache.
template <class X>
inline constexpr Index kRowStride = sizeof(X) == sizeof(float) ? kDepth + 16 : kDotDepth + 32;

/// The functions of one instruction set beside its products, of which each format has one: find_product.
struct Kernels {
  Index columns, streams;  ///< of a panel
  Index lanes;             ///< columns of a register
  /// out [rows, columns or, gated, columns / 2] = the activation of c + bias; bias may be null.
  void (*activate)(const Activation& activation, Index rows, const float* c, const float* bias, float* out,
                   Index out_stride);
  /// y's row token[i], `count` columns of it, += gate[i] * (c's row i + bias). bias and gate may be
  /// null: no bias, gates of 1.
  void (*combine)(Index rows, Index count, const float* c, const float* bias, const Index* token,
                  const float* gate, float* y, Index y_stride);
};

/// Products of matrices as they lie, rows `..._stride` apart, for layers that are not packed: weights are
/// packed on the way. `in` is contracted by linear, `out` by linear_backward_input, `rows` by
/// linear_backward_weight; none is 0. In tables of their own, forward and backward, so that a program
/// compiles what it calls.
struct DenseKernels {
  /// y [rows, out] = x [rows, in] * w^T, w [out, in]; or, where `add`, added to y.
  void (*linear)(Index rows, Index in, Index out, const float* x, Index x_stride, const float* w,
                 Index w_stride, float* y, Index y_stride, bool add);
};
struct DenseBackwardKernels {
  /// d_x [rows, in] = d_y [rows, out] * w; or, where `add`, added to d_x.
  void (*linear_backward_input)(Index rows, Index in, Index out, const float* d_y, Index d_y_stride,
                                const float* w, Index w_stride, float* d_x, Index d_x_stride, bool add);
  /// d_w [out, in] += d_y^T * x.
  void (*linear_backward_weight)(Index rows, Index in, Index out, const float* d_y, Index d_y_stride,
                                 const float* x, Index x_stride, float* d_w, Index d_w_stride);
};

/// The depth of the blocks that a product of so much depth is cut into: even, in whole panels.
inline Index block_depth(Index depth, Index most) {
  const Index blocks = (depth + most - 1) / most;
  return ((depth + blocks - 1) / blocks + 63) / 64 * 64;
}

/// Rows of activations in blocks of their columns, [blocks, rows, stride], each of them what a product reads
/// at a time.
struct RowBlocks {
  Index columns, depth;  ///< of a row, of a block
  Index stride;          ///< from a row of a block to the next

  Index size() const { return ((columns - 1) / depth + 1) * stride; }  ///< of a row
  Index at(Index rows, Index row, Index column) const {
    return (column / depth * rows + row) * stride + column % depth;
  }
};

}  // namespace moe::kernels
