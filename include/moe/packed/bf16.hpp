// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include <moe/packed/format.hpp>

namespace moe {

/// Weights rounded to bfloat16, to nearest, ties to even; activations and sums are floats. Two numbers of a
/// column lie side by side. On AMX numbers below the normal ones count as zero.
struct BF16 {
  static constexpr const char* kName = "BF16";  ///< see NamedFormat
  /// Here and below: see Format.
  static constexpr Index kBlock = kernels::kBlockNumbers<kernels::Bfloat16>;

  /// Bytes of a column.
  static constexpr Index bytes(Index depth) {
    return (depth + depth % kBlock) * Index(sizeof(kernels::Bfloat16));
  }

  /// The nearest bfloat16, ties to even; a NaN stays one.
  static kernels::Bfloat16 rounded(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;  // stays one, and a quiet one
    return kernels::Bfloat16(is_nan ? (bits >> 16) | 0x40 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }

  /// Writes a stream of columns.
  static void encode(const float* const* rows, Index depth, Index columns, Index, std::byte* to) {
    auto* const numbers = reinterpret_cast<kernels::Bfloat16*>(to);
    for (Index p = 0; p < depth + depth % kBlock; ++p)
      for (Index j = 0; j < columns; ++j)
        numbers[(p / kBlock * columns + j) * kBlock + p % kBlock] =
            rounded(rows[j] && p < depth ? rows[j][p] : 0.0f);
  }

  /// Numbers that are kept.
  static void round(float* row, Index depth) {
    for (Index p = 0; p < depth; ++p) row[p] = std::bit_cast<float>(std::uint32_t(rounded(row[p])) << 16);
  }

  /// The product with rows of floats, or null.
  static const kernels::Product<float>* find_product(InstructionSet set) {
    return kernels::find_product<kernels::Bfloat16>(set);
  }
  /// The product with rows of bfloat16, or null: see DotFormat.
  static const kernels::DotProduct* find_dot(InstructionSet set, bool rounded) {
    return kernels::find_dot(set, rounded);
  }
};
static_assert(DotFormat<BF16>);

}  // namespace moe
