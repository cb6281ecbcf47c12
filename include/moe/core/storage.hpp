// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

// Where an expert's weights are: in matrices of its own, or in memory that somebody else filled.
namespace moe {

/// A read-only matrix [rows, cols], row-major without gaps, in memory that it shares: part of a mapped
/// file, of a Matrix that was moved here, of anything a shared_ptr can keep. A copy shares the memory
/// too, and is O(1). Can be the weight of `linear`.
template <class S>
class MappedMatrix {
 public:
  using Scalar = S;
  static constexpr bool IsRowMajor = true;
  static constexpr int ColsAtCompileTime = Eigen::Dynamic, InnerStrideAtCompileTime = 1;

  /// `values` points to rows * cols values and keeps their owner alive: std::shared_ptr<const S>(owner,
  /// pointer) does for any owner. O(1). Throws std::invalid_argument unless the values are there and
  /// aligned for S; more alignment than that is not needed.
  MappedMatrix(std::shared_ptr<const S> values, Index rows, Index cols)
      : values_(std::move(values)), rows_(rows), cols_(cols) {
    require(rows >= 0 && cols >= 0, "MappedMatrix: shape [", rows, ", ", cols, "], expected at least 0");
    require(values_ != nullptr || size() == 0, "MappedMatrix: no values, expected ", size());
    const auto past = reinterpret_cast<std::uintptr_t>(values_.get()) % alignof(S);
    require(past == 0, "MappedMatrix: the address is ", past, " bytes past a multiple of ", alignof(S));
  }
  /// Takes the values of a matrix. O(1) where it is moved here.
  explicit MappedMatrix(Matrix<S> matrix) : rows_(matrix.rows()), cols_(matrix.cols()) {
    auto owner = std::make_shared<const Matrix<S>>(std::move(matrix));
    const S* const values = owner->data();
    values_ = {std::move(owner), values};
  }

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  Index size() const { return rows_ * cols_; }
  Index outerStride() const { return cols_; }
  const S* data() const { return values_.get(); }

  /// The same as an Eigen matrix, valid while this or a copy lives.
  Eigen::Map<const Matrix<S>> view() const { return {data(), rows_, cols_}; }

 private:
  std::shared_ptr<const S> values_;
  Index rows_, cols_;
};

/// Storage of an expert with weights of its own.
struct Owned {
  /// A matrix.
  template <class S>
  using Weight = Matrix<S>;
};

/// Storage of an expert whose weights are read where they lie. Such an expert is made of its weights,
/// and is for inference: it has no backward.
struct Mapped {
  /// A view of what somebody else filled.
  template <class S>
  using Weight = MappedMatrix<S>;
};

}  // namespace moe
