// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/types.hpp>

// What a set of kernels offers. Each instruction set fills one Kernels with the functions of its own
// namespace; all of them are made from one text, product.inc and elementwise.inc.
//
// Weights lie in panels of `columns` columns: panel [depth, columns], contiguous, in the order in which
// a product reads it. Weights of bfloat16 lie in pairs along the depth: [depth / 2, columns, 2], an odd
// depth ends with a pair whose second half is zero.
namespace moe::kernels {

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

/// Rows of activations: row i begins at data + stride * (index ? index[i] : i).
template <class T>
struct Rows {
  const T* data;
  Index stride;
  const Index* index;

  const T* row(Index i) const { return data + stride * (index ? index[i] : i); }
  /// The rows from row i on.
  Rows from(Index i) const {
    return index ? Rows{data, stride, index + i} : Rows{data + i * stride, stride, nullptr};
  }
};

/// Depth that a product takes at a time: what it reads of a panel then stays in the second cache.
inline constexpr Index kDepth = 512;

/// Rows that a caller may hand to a product at once.
inline constexpr Index kMaxRows = 192;

/// The functions of one instruction set. Every element of a product is one chain of fused
/// multiply-adds along the depth, whatever the rows beside it; hence the same bits for any batch.
struct Kernels {
  Index columns;  ///< of a panel

  /// c [rows, columns] = x * panel, rows <= kMaxRows. `next` is the panel that will be read after this
  /// one: it is fetched into the caches meanwhile, or any pointer at all.
  void (*multiply)(Index rows, Index depth, const Rows<float>& x, const float* panel, float* c,
                   const float* next);
  /// The same with weights in bfloat16, which are widened: products are those of floats.
  void (*multiply_bf16)(Index rows, Index depth, const Rows<float>& x, const std::uint16_t* panel,
                        float* c, const std::uint16_t* next);
  /// out [rows, columns or, gated, columns / 2] = the activation of c + bias; bias may be null.
  void (*activate)(const Activation& activation, Index rows, const float* c, const float* bias,
                   float* out, Index out_stride);
  /// y's row token[i], `count` columns of it, += gate[i] * (c's row i + bias). bias and gate may be
  /// null: no bias, gates of 1.
  void (*combine)(Index rows, Index count, const float* c, const float* bias, const Index* token,
                  const float* gate, float* y, Index y_stride);
};

/// Products of matrices as they lie, rows `..._stride` apart, for layers that are not packed: weights are packed
/// on the way. `in` is contracted by linear, `out` by linear_backward_input, `rows` by linear_backward_weight;
/// none is 0. In a table of their own, so that who packs no layer compiles nothing else.
struct DenseKernels {
  /// y [rows, out] = x [rows, in] * w^T, w [out, in]; or, where `add`, added to y.
  void (*linear)(Index rows, Index in, Index out, const float* x, Index x_stride, const float* w,
                 Index w_stride, float* y, Index y_stride, bool add);
  /// d_x [rows, in] = d_y [rows, out] * w; or, where `add`, added to d_x.
  void (*linear_backward_input)(Index rows, Index in, Index out, const float* d_y, Index d_y_stride,
                                const float* w, Index w_stride, float* d_x, Index d_x_stride, bool add);
  /// d_w [out, in] += d_y^T * x.
  void (*linear_backward_weight)(Index rows, Index in, Index out, const float* d_y, Index d_y_stride,
                                 const float* x, Index x_stride, float* d_w, Index d_w_stride);
};

/// Rows of activations in bfloat16: row i begins at data + i * stride, its parts are `width` apart.
struct Parts {
  const std::uint16_t* data;
  Index stride, width;
};

/// Rows and depth that such a product takes at a time: what it reads of them then stays in the second cache.
inline constexpr Index kMaxDotRows = 96, kDotDepth = 2048;

/// Products of weights in bfloat16 by an instruction that multiplies pairs of bfloat16 and adds both products
/// to a float. It takes numbers below the normal ones as zero.
struct DotKernels {
  Index parts;  ///< bfloat16 numbers whose sum stands for a float: one is rounded, three are exact
  /// to [parts, width] = the parts of from [count] and zeros behind them; width is a multiple of 32.
  void (*split)(Index count, const float* from, std::uint16_t* to, Index width);
  /// c [rows, columns] = x * panel or, where `add`, added to c; `next` as in Kernels::multiply.
  void (*multiply)(Index rows, Index depth, const Parts& x, const std::uint16_t* panel, float* c,
                   bool add, const std::uint16_t* next);
};

}  // namespace moe::kernels
