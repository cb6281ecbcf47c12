// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include <moe/core/types.hpp>
#include <moe/io/dtype.hpp>

// Integers of few bits in the words of a tensor.
namespace moe::io {

/// Which numbers of a matrix share a word, lowest bits first.
enum class Packing {
  rows,  ///< neighbours in a row
  cols,  ///< neighbours in a column
  awq,   ///< eight neighbours in a row: 0, 2, 4, 6, 1, 3, 5, 7
};

/// A matrix of integers of 4 or 8 bits in a tensor [outer, inner] of bytes or words of 32 bits, which must
/// outlive it.
class PackedIntegers {
 public:
  /// O(1).
  PackedIntegers(const TensorView& words, int bits, Packing packing)
      : bytes_(words.bytes.data()),
        bits_(bits),
        in_word_(Index(size_of(words.dtype)) * 8 / bits),
        outer_(words.shape[0]),
        inner_(words.shape[1]),
        packing_(packing) {}

  Index rows() const { return packing_ == Packing::cols ? outer_ * in_word_ : outer_; }
  Index cols() const { return packing_ == Packing::cols ? inner_ : inner_ * in_word_; }
  int bits() const { return bits_; }

  /// Without a sign. O(1).
  int operator()(Index row, Index col) const {
    const auto at = std::size_t(position(row, col));
    if (bits_ == 8) return std::to_integer<int>(bytes_[at]);
    return std::to_integer<int>(bytes_[at / 2]) >> (at % 2 * 4) & 15;
  }

 private:
  // As if all words were one string of integers: they are little-endian.
  Index position(Index row, Index col) const {
    constexpr std::array<Index, 8> kAWQ{0, 4, 1, 5, 2, 6, 3, 7};
    switch (packing_) {
      case Packing::rows:
        return row * inner_ * in_word_ + col;
      case Packing::cols:
        return (row / in_word_ * inner_ + col) * in_word_ + row % in_word_;
      case Packing::awq:
        return row * inner_ * in_word_ + col / 8 * 8 + kAWQ[std::size_t(col % 8)];
    }
    return 0;
  }

  const std::byte* bytes_;
  int bits_;
  Index in_word_, outer_, inner_;
  Packing packing_;
};

}  // namespace moe::io
