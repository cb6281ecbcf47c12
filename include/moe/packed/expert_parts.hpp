// SPDX-License-Identifier: MIT
#pragma once

#include <variant>

#include <moe/core/storage.hpp>
#include <moe/core/types.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/math/activation.hpp>
#include <moe/packed/block_format.hpp>
#include <moe/packed/block_matrix.hpp>

// What packing asks of an expert: its widths, its activation, and the rows of its weights.
namespace moe {

/// How the kernels name an activation. A type that is not here has no packed form.
inline kernels::Activation kernel_activation(const ReLU&) { return {kernels::Unit::relu}; }
/// See above.
inline kernels::Activation kernel_activation(const GELU&) { return {kernels::Unit::gelu}; }
/// See above.
inline kernels::Activation kernel_activation(const GELUTanh&) { return {kernels::Unit::gelu_tanh}; }
/// See above.
inline kernels::Activation kernel_activation(const SiLU&) { return {kernels::Unit::silu}; }
/// See above.
template <class A>
kernels::Activation kernel_activation(const Glu<A>& glu) requires requires {
  kernel_activation(glu.activation);
}
{
  kernels::Activation activation = kernel_activation(glu.activation);
  activation.gated = true;
  return activation;
}
/// See above.
inline kernels::Activation kernel_activation(const ClampedSwiGLU& unit) {
  return {kernels::Unit::clamped_swiglu, true, float(unit.alpha), float(unit.limit), float(unit.offset)};
}

/// The rows [out, in] of a weight: floats without gaps.
struct FloatRows {
  using Number = float;         ///< what a row consists of
  const float* data = nullptr;  ///< of the first row
  Index stride = 0;             ///< from a row to the next

  /// Where row i begins.
  const float* row(Index i) const { return data + i * stride; }
};
/// The same in blocks.
template <InBlocks F>
struct BlockRows {
  using Format = F;                        ///< of the blocks
  using Number = typename F::Block;        ///< what a row consists of
  const BlockMatrix<F>* matrix = nullptr;  ///< whose rows they are

  /// Where row i begins.
  const Number* row(Index i) const { return matrix->row(i); }
};
/// The rows of a weight that has a packed form.
inline FloatRows rows_of(const Matrix<float>& w) { return {w.data(), w.cols()}; }
/// See above.
inline FloatRows rows_of(const MappedMatrix<float>& w) { return {w.data(), w.cols()}; }
/// See above.
template <InBlocks F>
BlockRows<F> rows_of(const BlockMatrix<F>& w) {
  return {&w};
}

/// What an expert consists of, for packing; biases are null where there are none.
template <class Rows>
struct ExpertParts {
  Index d_model, d_ff;               ///< widths
  kernels::Activation activation{};  ///< between the two products
  Rows gate{}, up{}, down{};         ///< weights; gate: where the activation is gated
  const float* b_gate = nullptr;     ///< [d_ff]
  const float* b_up = nullptr;       ///< [d_ff]
  const float* b_down = nullptr;     ///< [d_model]
};

/// The parts of an expert with this activation, which must outlive them.
template <class E>
auto expert_parts(const E& e, const kernels::Activation& activation) {
  ExpertParts<decltype(rows_of(e.w_up))> parts{
      .d_model = e.d_model(), .d_ff = e.d_ff(), .activation = activation};
  parts.up = rows_of(e.w_up);
  parts.down = rows_of(e.w_down);
  if constexpr (requires { e.w_gate; }) parts.gate = rows_of(e.w_gate);
  if (!e.has_bias()) return parts;
  parts.b_up = e.b_up.data();
  parts.b_down = e.b_down.data();
  if constexpr (requires { e.b_gate; }) parts.b_gate = e.b_gate.data();
  return parts;
}

/// The parts of an expert, which must outlive them.
template <class A, class Storage>
auto expert_parts(const FeedForward<float, A, Storage>& e) requires requires {
  kernel_activation(e.activation());
  rows_of(e.w_up);
}
{ return expert_parts(e, kernel_activation(e.activation())); }
/// See above.
template <class U, class Storage>
auto expert_parts(const GatedFeedForward<float, U, Storage>& e) requires requires {
  kernel_activation(e.glu());
  rows_of(e.w_up);
}
{ return expert_parts(e, kernel_activation(e.glu())); }

/// An expert of one kind that has parts.
template <class E>
concept HasParts = requires(const E& expert) {
  expert_parts(expert);
};

/// See above.
template <class... Kinds>
auto expert_parts(const VariantExpert<Kinds...>& e) requires(HasParts<Kinds>&&...) {
  return std::visit([](const auto& kind) { return expert_parts(kind); }, e.get());
}

/// An expert that has a packed form: FeedForward or GatedFeedForward of floats or blocks with an activation
/// of the library, or a VariantExpert of such kinds.
template <class E>
concept PackableExpert = requires(const E& expert) {
  expert_parts(expert);
};

}  // namespace moe
