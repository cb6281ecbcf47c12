// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include <moe/packed/format.hpp>

namespace moe {

/// Weights as they are.
struct F32 {
  static constexpr const char* kName = "F32";  ///< see NamedFormat
  /// Here and below: see Format.
  static constexpr Index kBlock = kernels::kBlockNumbers<float>;

  /// Bytes of a column.
  static constexpr Index bytes(Index depth) { return depth * Index(sizeof(float)); }

  /// Writes a stream of columns.
  static void encode(const float* const* rows, Index depth, Index columns, Index, std::byte* to) {
    auto* const numbers = reinterpret_cast<float*>(to);
    for (Index p = 0; p < depth; ++p)
      for (Index j = 0; j < columns; ++j) numbers[p * columns + j] = rows[j] ? rows[j][p] : 0.0f;
  }

  /// Numbers stay what they are.
  static void round(float*, Index) {}

  /// The product with rows of floats, or null.
  static const kernels::Product<float>* find_product(InstructionSet set) {
    return kernels::find_product<float>(set);
  }
};
static_assert(Format<F32> && !DotFormat<F32>);

}  // namespace moe
