// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

#include <moe/core/buffer.hpp>
#include <moe/core/types.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/packed/expert_parts.hpp>
#include <moe/packed/format.hpp>
#include <moe/packed/importance.hpp>
#include <moe/packed/packed_product.hpp>

// An expert's weights, laid out once in the order in which the kernels read them.
namespace moe {

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
    columns_ = product_.kernels().columns;
    activation_ = parts.activation;
    d_model_ = parts.d_model;
    d_ff_ = parts.d_ff;
    check_importance(importance, d_model_, d_ff_);
    hidden_ = activation_.gated ? columns_ / 2 : columns_;
    up_panels_ = (d_ff_ + hidden_ - 1) / hidden_;
    down_panels_ = (d_model_ + columns_ - 1) / columns_;
    up_bytes_ = product_.format().bytes(d_model_) * columns_;
    down_bytes_ = product_.format().bytes(d_ff_) * columns_;
    has_bias_ = parts.b_up != nullptr;
    allocate();
    Columns<std::remove_cvref_t<decltype(parts.up)>> columns;
    columns.row.resize(columns_);
    for (Index panel = 0; panel < up_panels_; ++panel) {
      choose_up_rows(parts, panel, columns.row);
      encode<F>(columns, d_model_, importance.x, blob_.get() + panel * up_bytes_);
    }
    for (Index panel = 0; panel < down_panels_; ++panel) {
      choose_down_rows(parts, panel, columns.row);
      encode<F>(columns, d_ff_, importance.hidden,
                blob_.get() + up_panels_ * up_bytes_ + panel * down_bytes_);
    }
  }

  /// What multiplies by its panels.
  const PackedProduct& product() const { return product_; }
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
  void choose_up_rows(const ExpertParts<Rows>& parts, Index panel, Row& row) {
    float* const bias = biases() + panel * columns_;
    for (Index j = 0; j < columns_; ++j) {
      const bool is_gate = activation_.gated && j < hidden_;
      const Index out = panel * hidden_ + (j < hidden_ ? j : j - hidden_);
      const float* const b = is_gate ? parts.b_gate : parts.b_up;
      row[j] = out < d_ff_ ? (is_gate ? parts.gate : parts.up).row(out) : nullptr;
      if (has_bias_) bias[j] = out < d_ff_ ? b[out] : 0.0f;
    }
  }
  template <class Rows, class Row>
  void choose_down_rows(const ExpertParts<Rows>& parts, Index panel, Row& row) {
    float* const bias = biases() + (up_panels_ + panel) * columns_;
    for (Index j = 0; j < columns_; ++j) {
      const Index out = panel * columns_ + j;
      row[j] = out < d_model_ ? parts.down.row(out) : nullptr;
      if (has_bias_) bias[j] = out < d_model_ ? parts.b_down[out] : 0.0f;
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

  float* biases() const { return reinterpret_cast<float*>(blob_.get() + bias_begin_); }

  PackedProduct product_;
  std::shared_ptr<std::byte> blob_;  // panels up, panels down, biases in the order of the panels
  std::size_t bytes_ = 0;
  Index bias_begin_ = 0;
  kernels::Activation activation_;
  Index d_model_ = 0, d_ff_ = 0, columns_ = 0, hidden_ = 0;
  Index up_panels_ = 0, down_panels_ = 0, up_bytes_ = 0, down_bytes_ = 0;
  bool has_bias_ = false;
};

}  // namespace moe
