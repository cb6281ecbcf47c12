// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include <moe/core/types.hpp>
#include <moe/kernels/blocks.hpp>
#include <moe/math/numbers.hpp>
#include <moe/packed/format.hpp>

// What formats of 8 and 4 bits have in common: weights in blocks that share a scale.
namespace moe {

/// A format whose columns are blocks of some numbers that share a scale; F derives from it and says how
/// floats become a block and what a block stands for:
///   F::quantised(from, count)   the block of some numbers, followed by zeros where they do not fill it; of a
///                               WeightedFormat with one more argument, their importance or null
///   F::number(block, i)         number i of a block, the float by which kernels multiply
template <class F, kernels::Block B>
struct BlockFormat {
  using Block = B;  ///< as blocks lie in a panel, see kernels
  /// Here and below: see Format.
  static constexpr Index kBlock = B::kNumbers;

  /// Blocks of a column.
  static constexpr Index blocks(Index depth) { return (depth + kBlock - 1) / kBlock; }
  /// Bytes of a column.
  static constexpr Index bytes(Index depth) { return blocks(depth) * kernels::kBlockBytes<B>; }

  /// Writes a stream of columns, from floats.
  static void encode(const float* const* rows, Index depth, Index columns, Index lanes, std::byte* to) {
    encode_by(rows, depth, columns, lanes, to,
              [](const float* from, Index, Index count) { return F::quantised(from, count); });
  }
  /// The same by the importance of the numbers of a column [depth].
  static void encode(const float* const* rows, Index depth, Index columns, Index lanes, std::byte* to,
                     const float* importance) {
    encode_by(rows, depth, columns, lanes, to, [importance](const float* from, Index begin, Index count) {
      return F::quantised(from, count, importance + begin);
    });
  }
  /// The same from blocks: rows[j] has blocks(depth) of them, or is null for zeros.
  static void encode(const B* const* rows, Index depth, Index columns, Index lanes, std::byte* to) {
    lay_out(depth, columns, lanes, to,
            [&](Index column, Index nth) { return rows[column] ? rows[column][nth] : B{}; });
  }

  /// Numbers that are kept.
  static void round(float* row, Index depth) {
    for (Index p = 0; p < depth; p += kBlock) {
      const Index count = depth - p < kBlock ? depth - p : kBlock;
      const B block = F::quantised(row + p, count);
      for (Index i = 0; i < count; ++i) row[p + i] = F::number(block, i);
    }
  }

  /// The product with rows of floats, or null.
  static const kernels::Product<float>* find_product(InstructionSet set) {
    return kernels::find_product<B>(set);
  }
  /// The product with rows in 8 bits, or null: see Int8Format.
  static const kernels::Product<kernels::Int8Activations>* find_int8_product(
      InstructionSet set) requires kernels::IntegerBlock<B> {
    return kernels::find_int8_product<B>(set);
  }

 private:
  template <class Quantise>
  static void encode_by(const float* const* rows, Index depth, Index columns, Index lanes, std::byte* to,
                        const Quantise& quantised) {
    lay_out(depth, columns, lanes, to, [&](Index column, Index nth) {
      const Index begin = nth * kBlock, left = depth - begin;
      return rows[column] ? quantised(rows[column] + begin, begin, left < kBlock ? left : kBlock) : B{};
    });
  }
  // Blocks one after the other; of each, groups of `lanes` columns: their scales, offsets and words.
  template <class BlockOf>
  static void lay_out(Index depth, Index columns, Index lanes, std::byte* to, const BlockOf& block_of) {
    for (Index nth = 0; nth < blocks(depth); ++nth)
      for (Index group = 0; group < columns; group += lanes, to += lanes * kernels::kBlockBytes<B>)
        for (Index lane = 0; lane < lanes; ++lane) {
          const B block = block_of(group + lane, nth);
          std::byte* part = to;
          const auto put = [&](const auto& value) {
            std::memcpy(part + lane * Index(sizeof value), &value, sizeof value);
            part += lanes * Index(sizeof value);
          };
          put(block.scale);
          if constexpr (requires { block.offset; }) put(block.offset);
          for (const auto& word : block.words) put(word);
        }
  }
};

/// A format in blocks.
template <class F>
concept InBlocks = Format<F> && std::derived_from<F, BlockFormat<F, typename F::Block>>;

/// The sum of term(i) for i < kCount, a multiple of four, in a fixed order: four chains. Terms that are
/// products of two floats are exact, so that a compiler that fuses them with the additions changes nothing:
/// all that chooses blocks is written so, and they do not depend on flags.
template <int kCount, class Term>
double sum_of(const Term& term) {
  double sum[4] = {};
  for (int i = 0; i < kCount; i += 4)
    for (int k = 0; k < 4; ++k) sum[k] += term(i + k);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
/// The sum of squares of numbers [kCount].
template <int kCount>
double sum_of_squares(const float* numbers) {
  return sum_of<kCount>([numbers](int i) { return double(numbers[i]) * numbers[i]; });
}

/// The number of the largest magnitude of some, with its sign; NaN where one of them is no finite number.
inline float largest_of(const float* from, Index count) {
  Index at = 0;  // by its bits, which order magnitudes as numbers
  const auto magnitude = [&](Index i) { return bits_of(from[i]) & 0x7FFFFFFF; };
  for (Index i = 1; i < count; ++i) at = magnitude(i) > magnitude(at) ? i : at;
  return number_kind(from[at]) == NumberKind::finite ? from[at] : std::numeric_limits<float>::quiet_NaN();
}
/// Whether largest_of found a number that is not finite.
inline bool is_nan(float largest) { return number_kind(largest) != NumberKind::finite; }

}  // namespace moe
