// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/types.hpp>
#include <moe/io/packed_integers.hpp>
#include <moe/math/numbers.hpp>
#include <moe/packed/fit_integers.hpp>
#include <moe/packed/int4.hpp>
#include <moe/packed/int8.hpp>

// Matrices of small codes whose scales and zero points are tensors beside them: as floats, and as the blocks
// of a packed format.
namespace moe {

/// A packed format of integers.
template <class F>
concept OfIntegers = std::is_same_v<F, Int8> || std::is_same_v<F, Int4> || std::is_same_v<F, Int4Offset>;

/// A matrix [rows, cols] of codes of 4 or 8 bits. Numbers of a row that are in one group share a scale and a
/// zero point: a number is (code - zero) * scale. The difference is exact, and the product is unless code and
/// scale have more than 24 significant bits together.
struct GroupedMatrix {
  /// What the bits of a code mean.
  enum class Code {
    plain,      ///< an integer from 0
    with_sign,  ///< an integer in two's complement
    e2m1,       ///< a float of 4 bits
  };

  io::PackedIntegers codes;       ///< of the matrix, or of its transpose
  Code code = Code::plain;        ///< of all
  bool transposed = false;        ///< whether codes are [cols, rows]
  std::vector<float> scales{};    ///< [rows, groups]
  std::vector<int> zeros{};       ///< the same, or one for all
  std::vector<Index> group_of{};  ///< [cols], below groups
  Index rows = 0, groups = 0;     ///< groups of a row

  Index cols() const { return Index(group_of.size()); }

  /// A number. O(1).
  float number(Index row, Index col) const {
    const float scale = scales[at(row, col)];
    if (code != Code::e2m1) return float(integer(row, col)) * scale;
    constexpr float kValues[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    const int bits = stored(row, col);
    return (bits & 8 ? -kValues[bits & 7] : kValues[bits]) * scale;
  }

  /// Whether blocks of F stand for the same numbers: each within a group, of integers in range, times a scale
  /// that F can hold. Those of Int8 and Int4 are halves, that of Int4Offset has 20 significant bits and is
  /// below 2^120. O(scales).
  template <OfIntegers F>
  bool fits() const {
    if (code == Code::e2m1 || (codes.bits() == 8 && !std::is_same_v<F, Int8>)) return false;
    // Of four bits every difference is an Int8; otherwise zeros must be where the format has its own.
    const int zero = code == Code::with_sign ? 0 : codes.bits() == 8 ? 128 : 8;
    if (std::is_same_v<F, Int4> || codes.bits() == 8)
      if (std::any_of(zeros.begin(), zeros.end(), [zero](int z) { return z != zero; })) return false;
    for (Index col = 0; col < cols(); ++col)
      if (group_of[std::size_t(col)] != group_of[std::size_t(col - col % F::kBlock)]) return false;
    return std::all_of(scales.begin(), scales.end(), [](float scale) {
      if (number_kind(scale) != NumberKind::finite) return false;
      if constexpr (std::is_same_v<F, Int4Offset>)
        return (bits_of(scale) & 15) == 0 && std::abs(scale) < 0x1p120f;
      else
        return bits_of(float_of_half(half_of(scale))) == bits_of(scale);
    });
  }

  /// Block `nth` of a row, of a format that fits. O(numbers of a block).
  template <OfIntegers F>
  typename F::Block block(Index row, Index nth) const {
    typename F::Block block{};
    const Index begin = nth * F::kBlock;
    const float scale = scales[at(row, begin)];
    if constexpr (requires { block.offset; }) {
      block.scale = scale;
      block.offset = -float(zero(row, begin)) * scale;
    } else {
      block.scale = half_of(scale);
    }
    for (Index i = 0; i < F::kBlock; ++i) {
      const bool is_there = begin + i < cols();
      if constexpr (std::is_same_v<F, Int8>)
        block.words[i / 4] |= std::uint32_t(is_there ? integer(row, begin + i) + 128 : 128) << (8 * (i % 4));
      else
        block.words[nibble_word(i)] |= std::uint32_t(is_there ? stored(row, begin + i) : 8) << nibble_bit(i);
    }
    return block;
  }

 private:
  std::size_t at(Index row, Index col) const {
    return std::size_t(row * groups + group_of[std::size_t(col)]);
  }
  int stored(Index row, Index col) const { return transposed ? codes(col, row) : codes(row, col); }
  int zero(Index row, Index col) const { return zeros.size() == 1 ? zeros.front() : zeros[at(row, col)]; }
  int integer(Index row, Index col) const {
    const int bits = stored(row, col);
    return (code == Code::with_sign ? int(std::int8_t(bits)) : bits) - zero(row, col);
  }
};

/// Its blocks in a format that fits.
template <OfIntegers F>
class GroupedBlocks {
 public:
  using Format = F;  ///< whose blocks they are

  /// Refers to the matrix, which must outlive it.
  explicit GroupedBlocks(const GroupedMatrix& matrix) : matrix_(matrix) {}

  /// Block `nth` of a row. O(numbers of a block).
  typename F::Block block(Index row, Index nth) const { return matrix_.template block<F>(row, nth); }

 private:
  const GroupedMatrix& matrix_;
};

}  // namespace moe
