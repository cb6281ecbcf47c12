// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/packed/expert_parts.hpp>
#include <moe/packed/format.hpp>
#include <moe/packed/importance.hpp>
#include <moe/packed/packed_product.hpp>

// An expert's weights, laid out once in the order in which the kernels read them.
namespace moe {

/// What says, with its product, how the bytes of a packed expert lie.
struct PackedShape {
  Index d_model = 0, d_ff = 0;       ///< widths
  kernels::Activation activation{};  ///< as kernels name it
  bool has_bias = false;             ///< of all of its matrices
};

/// A feed-forward expert laid out for a product. A copy shares the weights, which never change.
class PackedExpert {
 public:
  /// Lays the expert out in a format, for the PackedProduct of these arguments; a WeightedFormat rounds
  /// matrices of floats by their importance, where it has any. O(parameters). Throws std::invalid_argument
  /// where there is no such product.
  template <Format F, PackableExpert E>
  PackedExpert(F format, const E& expert, InstructionSet set, ActivationRounding rounding,
               const ExpertImportance& importance)
      : product_(format, set, rounding) {
    const auto parts = expert_parts(expert);
    check_importance(importance, parts.d_model, parts.d_ff);
    lay_out({parts.d_model, parts.d_ff, parts.activation, parts.b_up != nullptr});
    std::byte* const blob = allocate();
    Columns<std::remove_cvref_t<decltype(parts.up)>> columns;
    columns.row.resize(columns_);
    for (Index panel = 0; panel < up_panels_; ++panel) {
      choose_up_rows(parts, panel, columns.row, blob);
      encode<F>(columns, shape_.d_model, importance.x, blob + panel * up_bytes_);
    }
    for (Index panel = 0; panel < down_panels_; ++panel) {
      choose_down_rows(parts, panel, columns.row, blob);
      encode<F>(columns, shape_.d_ff, importance.hidden, blob + up_panels_ * up_bytes_ + panel * down_bytes_);
    }
  }
  /// An expert that was laid out before, in bytes() of another one of the same format, shape, set and
  /// rounding: `bytes` are those, and `owner` keeps them. O(1). Throws std::invalid_argument where there is
  /// no such product, unless the shape is one, and for another number or alignment of bytes.
  template <Format F>
  PackedExpert(F format, const PackedShape& shape, InstructionSet set, ActivationRounding rounding,
               std::span<const std::byte> bytes, std::shared_ptr<const void> owner)
      : product_(format, set, rounding), blob_(std::move(owner), bytes.data()) {
    constexpr Index kMost = Index(1) << 28;  // sizes stay far from the largest number
    require(shape.d_model >= 1 && shape.d_ff >= 1 && shape.d_model <= kMost && shape.d_ff <= kMost,
            "PackedExpert: d_model = ", shape.d_model, " and d_ff = ", shape.d_ff, ", expected 1 to ", kMost);
    lay_out(shape);
    require(bytes.size() == bytes_, "PackedExpert: ", bytes.size(), " bytes, expected ", bytes_);
    const auto past = reinterpret_cast<std::uintptr_t>(bytes.data()) % std::uintptr_t(kAlign);
    require(past == 0, "PackedExpert: the address is ", past, " bytes past a multiple of ", kAlign);
  }

  /// What multiplies by its panels.
  const PackedProduct& product() const { return product_; }
  Index d_model() const { return shape_.d_model; }
  Index d_ff() const { return shape_.d_ff; }
  /// Its activation, as kernels name it.
  const kernels::Activation& activation() const { return shape_.activation; }
  /// See PackedShape.
  const PackedShape& shape() const { return shape_; }
  /// Its panels and biases. They begin with a cache line.
  std::span<const std::byte> bytes() const { return {blob_.get(), bytes_}; }
  /// How many these are.
  std::size_t memory_bytes() const { return bytes_; }

  /// Panels of the first product: gate and linear branch side by side, where gated.
  Index up_panels() const { return up_panels_; }
  /// Panel i of the first product.
  const std::byte* up_panel(Index i) const { return blob_.get() + i * up_bytes_; }
  /// Its bias, or null.
  const float* up_bias(Index i) const {
    return shape_.has_bias ? biases(blob_.get()) + i * columns_ : nullptr;
  }
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
    return shape_.has_bias ? biases(blob_.get()) + (up_panels_ + i) * columns_ : nullptr;
  }

 private:
  static constexpr Index kAlign = 64;

  void lay_out(const PackedShape& shape) {
    shape_ = shape;
    columns_ = product_.kernels().columns;
    hidden_ = shape.activation.gated ? columns_ / 2 : columns_;
    up_panels_ = (shape.d_ff + hidden_ - 1) / hidden_;
    down_panels_ = (shape.d_model + columns_ - 1) / columns_;
    up_bytes_ = product_.format().bytes(shape.d_model) * columns_;
    down_bytes_ = product_.format().bytes(shape.d_ff) * columns_;
    const Index weights = up_panels_ * up_bytes_ + down_panels_ * down_bytes_;
    bias_begin_ = (weights + kAlign - 1) / kAlign * kAlign;
    const Index biases = shape.has_bias ? (up_panels_ + down_panels_) * columns_ : 0;
    bytes_ = std::size_t(bias_begin_) + std::size_t(biases) * sizeof(float);
  }

  std::byte* allocate() {
    auto* const bytes = static_cast<std::byte*>(::operator new(bytes_, std::align_val_t(kAlign)));
    blob_ = {bytes, [](std::byte* p) { ::operator delete(p, std::align_val_t(kAlign)); }};
    const Index weights = up_panels_ * up_bytes_ + down_panels_ * down_bytes_;
    std::fill(bytes + weights, bytes + bias_begin_, std::byte(0));  // between weights and biases
    return bytes;
  }

  // The weights of the columns of a panel, null where there are none; and, where they are in the blocks of
  // another format, as floats.
  template <class Rows>
  struct Columns {
    Buffer<const typename Rows::Number*> row;
    Buffer<float> number{};
    Buffer<const float*> number_row{};
  };

  // Chooses the columns of a panel; their biases are laid out.
  template <class Rows, class Row>
  void choose_up_rows(const ExpertParts<Rows>& parts, Index panel, Row& row, std::byte* blob) const {
    float* const bias = biases(blob) + panel * columns_;
    for (Index j = 0; j < columns_; ++j) {
      const bool is_gate = shape_.activation.gated && j < hidden_;
      const Index out = panel * hidden_ + (j < hidden_ ? j : j - hidden_);
      const float* const b = is_gate ? parts.b_gate : parts.b_up;
      row[j] = out < shape_.d_ff ? (is_gate ? parts.gate : parts.up).row(out) : nullptr;
      if (shape_.has_bias) bias[j] = out < shape_.d_ff ? b[out] : 0.0f;
    }
  }
  template <class Rows, class Row>
  void choose_down_rows(const ExpertParts<Rows>& parts, Index panel, Row& row, std::byte* blob) const {
    float* const bias = biases(blob) + (up_panels_ + panel) * columns_;
    for (Index j = 0; j < columns_; ++j) {
      const Index out = panel * columns_ + j;
      row[j] = out < shape_.d_model ? parts.down.row(out) : nullptr;
      if (shape_.has_bias) bias[j] = out < shape_.d_model ? parts.b_down[out] : 0.0f;
    }
  }

  template <class F, class Rows>
  void encode(Columns<Rows>& columns, Index depth, const Vector<float>& importance, std::byte* panel) const {
    if constexpr (requires { F::encode(columns.row.data(), depth, depth, depth, panel); }) {
      encode_streams<F>(columns.row, depth, importance, panel);
    } else {
      using From = typename Rows::Format;
      columns.number.resize(columns_ * depth);
      columns.number_row.resize(columns_);
      for (Index j = 0; j < columns_; ++j) {
        float* const to = columns.number.data() + j * depth;
        columns.number_row[j] = columns.row[j] ? to : nullptr;
        for (Index p = 0; columns.row[j] && p < depth; ++p)
          to[p] = From::number(columns.row[j][p / From::kBlock], p % From::kBlock);
      }
      encode_streams<F>(columns.number_row, depth, importance, panel);
    }
  }

  template <class F, class Number>
  void encode_streams(const Buffer<const Number*>& row, Index depth, const Vector<float>& importance,
                      std::byte* panel) const {
    const kernels::Kernels& kernels = product_.kernels();
    const Index wide = columns_ / kernels.streams;
    for (Index j = 0; j < columns_; j += wide) {
      std::byte* const to = panel + j * F::bytes(depth);
      if constexpr (WeightedFormat<F> && std::is_same_v<Number, float>)
        if (importance.size() > 0) {
          F::encode(row.data() + j, depth, wide, kernels.lanes, to, importance.data());
          continue;
        }
      F::encode(row.data() + j, depth, wide, kernels.lanes, to);
    }
  }

  float* biases(std::byte* blob) const { return reinterpret_cast<float*>(blob + bias_begin_); }
  const float* biases(const std::byte* blob) const {
    return reinterpret_cast<const float*>(blob + bias_begin_);
  }

  PackedProduct product_;
  std::shared_ptr<const std::byte> blob_;  // panels up, panels down, biases in the order of the panels
  std::size_t bytes_ = 0;
  Index bias_begin_ = 0;
  PackedShape shape_;
  Index columns_ = 0, hidden_ = 0;
  Index up_panels_ = 0, down_panels_ = 0, up_bytes_ = 0, down_bytes_ = 0;
};

}  // namespace moe
