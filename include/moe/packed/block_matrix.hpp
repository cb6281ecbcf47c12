// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <moe/core/types.hpp>
#include <moe/packed/block_format.hpp>

// Weights in a format's blocks, before they are packed: what a checkpoint holds, read as it is.
namespace moe {

/// A matrix [rows, cols] in the blocks of a format: each row in blocks of its own, the last one filled up
/// with zeros.
template <InBlocks F>
class BlockMatrix {
 public:
  using Format = F;                 ///< of its blocks
  using Block = typename F::Block;  ///< some numbers of a row

  /// Zeros. O(rows * cols), as all that goes over a matrix.
  BlockMatrix(Index rows, Index cols)
      : blocks_(std::size_t(rows * F::blocks(cols))), rows_(rows), cols_(cols) {}

  /// The nearest numbers of the format, block by block: see its quantised().
  static BlockMatrix of(const ConstMatrixRef<float>& numbers) {
    BlockMatrix matrix(numbers.rows(), numbers.cols());
    for (Index i = 0; i < matrix.rows(); ++i)
      for (Index p = 0; p < matrix.cols(); p += F::kBlock)
        matrix.row(i)[p / F::kBlock] =
            F::quantised(&numbers.coeffRef(i, p), (std::min)(F::kBlock, matrix.cols() - p));
    return matrix;
  }

  /// The floats that it stands for.
  Matrix<float> numbers() const {
    Matrix<float> numbers(rows_, cols_);
    for (Index i = 0; i < rows_; ++i)
      for (Index p = 0; p < cols_; ++p) numbers(i, p) = F::number(row(i)[p / F::kBlock], p % F::kBlock);
    return numbers;
  }

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  Index size() const { return rows_ * cols_; }
  /// The blocks of row i.
  Block* row(Index i) { return blocks_.data() + i * F::blocks(cols_); }
  /// See row.
  const Block* row(Index i) const { return blocks_.data() + i * F::blocks(cols_); }

 private:
  std::vector<Block> blocks_;
  Index rows_, cols_;
};

/// Storage of an expert whose weights are in the blocks of a format, to be packed.
template <InBlocks F>
struct Quantised {
  /// Blocks.
  template <class S>
  using Weight = BlockMatrix<F>;
};

}  // namespace moe
