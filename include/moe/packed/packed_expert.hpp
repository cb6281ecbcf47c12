// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <variant>

#include <moe/core/buffer.hpp>
#include <moe/core/types.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/math/activation.hpp>
#include <moe/packed/format.hpp>

// An expert's weights, laid out once in the order in which the kernels read them.
namespace moe {

namespace detail {

// ---- How the kernels name an activation. A type that is not here has no packed form.

inline kernels::Activation kernel_activation(const ReLU&) { return {kernels::Unit::relu}; }
inline kernels::Activation kernel_activation(const GELU&) { return {kernels::Unit::gelu}; }
inline kernels::Activation kernel_activation(const GELUTanh&) { return {kernels::Unit::gelu_tanh}; }
inline kernels::Activation kernel_activation(const SiLU&) { return {kernels::Unit::silu}; }
template <class A>
kernels::Activation kernel_activation(const Glu<A>& glu) requires requires {
  kernel_activation(glu.activation);
}
{
  kernels::Activation activation = kernel_activation(glu.activation);
  activation.gated = true;
  return activation;
}
inline kernels::Activation kernel_activation(const ClampedSwiGLU& unit) {
  return {kernels::Unit::clamped_swiglu, true, float(unit.alpha), float(unit.limit), float(unit.offset)};
}

// What an expert consists of, for packing. Weights are row-major [out, in] without gaps; gate is null
// unless the activation is gated, biases are null where there are none.
struct ExpertParts {
  Index d_model, d_ff;
  kernels::Activation activation;
  const float *gate, *up, *down;
  const float *b_gate, *b_up, *b_down;
};

template <class A, class Storage>
ExpertParts expert_parts(const FeedForward<float, A, Storage>& e) requires requires {
  kernel_activation(e.activation());
}
{
  const bool bias = e.has_bias();
  return {e.d_model(),
          e.d_ff(),
          kernel_activation(e.activation()),
          nullptr,
          e.w_up.data(),
          e.w_down.data(),
          nullptr,
          bias ? e.b_up.data() : nullptr,
          bias ? e.b_down.data() : nullptr};
}
template <class U, class Storage>
ExpertParts expert_parts(const GatedFeedForward<float, U, Storage>& e) requires requires {
  kernel_activation(e.glu());
}
{
  const bool bias = e.has_bias();
  return {e.d_model(),
          e.d_ff(),
          kernel_activation(e.glu()),
          e.w_gate.data(),
          e.w_up.data(),
          e.w_down.data(),
          bias ? e.b_gate.data() : nullptr,
          bias ? e.b_up.data() : nullptr,
          bias ? e.b_down.data() : nullptr};
}

template <class E>
concept HasParts = requires(const E& expert) {
  expert_parts(expert);
};

template <class... Kinds>
ExpertParts expert_parts(const VariantExpert<Kinds...>& e) requires(HasParts<Kinds>&&...) {
  return std::visit([](const auto& kind) { return expert_parts(kind); }, e.get());
}

}  // namespace detail

/// An expert that has a packed form: FeedForward or GatedFeedForward of floats with an activation of the
/// library, or a VariantExpert of such kinds.
template <class E>
concept PackableExpert = requires(const E& expert) {
  detail::expert_parts(expert);
};

/// A feed-forward expert laid out for a set of kernels. A copy shares the weights, which never change.
template <Format F>
class PackedExpert {
 public:
  /// Lays the expert out. O(parameters).
  template <PackableExpert E>
  PackedExpert(const E& expert, const kernels::Kernels& kernels) {
    const detail::ExpertParts parts = detail::expert_parts(expert);
    columns_ = kernels.columns;
    activation_ = parts.activation;
    d_model_ = parts.d_model;
    d_ff_ = parts.d_ff;
    hidden_ = activation_.gated ? columns_ / 2 : columns_;
    up_panels_ = (d_ff_ + hidden_ - 1) / hidden_;
    down_panels_ = (d_model_ + columns_ - 1) / columns_;
    up_bytes_ = F::bytes(d_model_) * columns_;
    down_bytes_ = F::bytes(d_ff_) * columns_;
    has_bias_ = parts.b_up != nullptr;
    allocate();
    Buffer<const float*> row;
    row.resize(columns_);
    for (Index panel = 0; panel < up_panels_; ++panel) {
      choose_up_rows(parts, panel, row);
      encode(row, d_model_, kernels.streams, blob_.get() + panel * up_bytes_);
    }
    for (Index panel = 0; panel < down_panels_; ++panel) {
      choose_down_rows(parts, panel, row);
      encode(row, d_ff_, kernels.streams, blob_.get() + up_panels_ * up_bytes_ + panel * down_bytes_);
    }
  }

  Index d_model() const { return d_model_; }
  Index d_ff() const { return d_ff_; }
  /// Its activation, as kernels name it.
  const kernels::Activation& activation() const { return activation_; }
  /// Bytes of its panels and biases.
  std::size_t memory_bytes() const { return bytes_; }

  /// Panels of the first product: gate and linear branch side by side, where gated.
  Index up_panels() const { return up_panels_; }
  /// Panel i of the first product.
  const std::byte* up_panel(Index i) const { return blob_.get() + i * up_bytes_; }
  /// Its bias, or null.
  const float* up_bias(Index i) const { return has_bias_ ? biases() + i * columns_ : nullptr; }
  /// Columns of hidden values that one of them gives.
  Index hidden_columns() const { return hidden_; }

  /// Panels of the second product.
  Index down_panels() const { return down_panels_; }
  /// Panel i of the second product.
  const std::byte* down_panel(Index i) const {
    return blob_.get() + up_panels_ * up_bytes_ + i * down_bytes_;
  }
  /// Its bias, or null.
  const float* down_bias(Index i) const {
    return has_bias_ ? biases() + (up_panels_ + i) * columns_ : nullptr;
  }

 private:
  static constexpr Index kAlign = 64;

  void allocate() {
    const Index weights = up_panels_ * up_bytes_ + down_panels_ * down_bytes_;
    bias_begin_ = (weights + kAlign - 1) / kAlign * kAlign;
    const Index biases = has_bias_ ? (up_panels_ + down_panels_) * columns_ : 0;
    bytes_ = std::size_t(bias_begin_) + std::size_t(biases) * sizeof(float);
    auto* const bytes = static_cast<std::byte*>(::operator new(bytes_, std::align_val_t(kAlign)));
    blob_ = {bytes, [](std::byte* p) { ::operator delete(p, std::align_val_t(kAlign)); }};
  }

  // row[j] = the weights of column j of a panel, or null where there are none; their biases are laid out.
  void choose_up_rows(const detail::ExpertParts& parts, Index panel, Buffer<const float*>& row) {
    float* const bias = biases() + panel * columns_;
    for (Index j = 0; j < columns_; ++j) {
      const bool is_gate = activation_.gated && j < hidden_;
      const Index out = panel * hidden_ + (j < hidden_ ? j : j - hidden_);
      const float* const w = is_gate ? parts.gate : parts.up;
      const float* const b = is_gate ? parts.b_gate : parts.b_up;
      row[j] = out < d_ff_ ? w + out * d_model_ : nullptr;
      if (has_bias_) bias[j] = out < d_ff_ ? b[out] : 0.0f;
    }
  }
  void choose_down_rows(const detail::ExpertParts& parts, Index panel, Buffer<const float*>& row) {
    float* const bias = biases() + (up_panels_ + panel) * columns_;
    for (Index j = 0; j < columns_; ++j) {
      const Index out = panel * columns_ + j;
      row[j] = out < d_model_ ? parts.down + out * d_ff_ : nullptr;
      if (has_bias_) bias[j] = out < d_model_ ? parts.b_down[out] : 0.0f;
    }
  }

  void encode(const Buffer<const float*>& row, Index depth, Index streams, std::byte* panel) const {
    const Index wide = columns_ / streams;
    for (Index j = 0; j < columns_; j += wide)
      F::encode(row.data() + j, depth, wide, panel + j * F::bytes(depth));
  }

  float* biases() const { return reinterpret_cast<float*>(blob_.get() + bias_begin_); }

  std::shared_ptr<std::byte> blob_;  // panels up, panels down, biases in the order of the panels
  std::size_t bytes_ = 0;
  Index bias_begin_ = 0;
  kernels::Activation activation_;
  Index d_model_ = 0, d_ff_ = 0, columns_ = 0, hidden_ = 0;
  Index up_panels_ = 0, down_panels_ = 0, up_bytes_ = 0, down_bytes_ = 0;
  bool has_bias_ = false;
};

}  // namespace moe
