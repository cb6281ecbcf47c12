// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <type_traits>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

// Where a function writes what it computes.
namespace moe {

template <class S>
class Output;

namespace detail {

// What a view may be made of: of the scalar, with rows whose elements lie side by side, not const.
template <class V, class S>
concept WritableView =
    !std::same_as<std::remove_cvref_t<V>, Matrix<S>> &&
    bool(std::remove_cvref_t<V>::Flags & Eigen::LvalueBit) && std::constructible_from<MatrixRef<S>, V&>;

template <class V, class S>
concept NotWritable = !WritableView<V, S> && !std::same_as<std::remove_cvref_t<V>, Output<S>>;

}  // namespace detail

/// A matrix that a function writes: a Matrix<S>, which is resized, or a view of the right shape - a Map of
/// shared memory, y.topRows(n), a block of columns -, which never allocates.
template <class S>
class Output {
 public:
  static constexpr bool IsRowMajor = true;

  /// A matrix, which is resized where it is written.
  Output(Matrix<S>& matrix) : matrix_(&matrix) {}
  /// A view, which keeps its shape.
  template <detail::WritableView<S> View>
  Output(View&& view) {
    MatrixRef<S> ref(view);
    data_ = ref.data();
    rows_ = ref.rows();
    cols_ = ref.cols();
    stride_ = ref.outerStride();
  }
  /// Of anything else: the compiler's error names its type.
  template <detail::NotWritable<S> NotAWritableRowMajorMatrixOfThisScalar>
  Output(NotAWritableRowMajorMatrixOfThisScalar&&) = delete;

  // The memory as it is before the call. A matrix that will be resized may lie anywhere then.
  const S* data() const { return matrix_ ? matrix_->data() : data_; }
  Index rows() const { return matrix_ ? matrix_->rows() : rows_; }
  Index cols() const { return matrix_ ? matrix_->cols() : cols_; }
  Index outerStride() const { return matrix_ ? matrix_->outerStride() : stride_; }

  /// Throws std::invalid_argument unless it is, or can be made, of this shape.
  void check(Index rows, Index cols, const char* where, const char* what) const {
    if (!matrix_) require_shape(*this, rows, cols, where, what);
  }
  /// The matrix [rows, cols] to write to. Throws as check.
  MatrixRef<S> of_shape(Index rows, Index cols, const char* where, const char* what) const {
    check(rows, cols, where, what);
    if (!matrix_) return Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>>(data_, rows, cols, stride_);
    matrix_->resize(rows, cols);
    return *matrix_;
  }

 private:
  Matrix<S>* matrix_ = nullptr;
  S* data_ = nullptr;
  Index rows_ = 0, cols_ = 0, stride_ = 0;
};

}  // namespace moe
