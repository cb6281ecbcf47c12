// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/types.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/kernels/select.hpp>
#include <moe/packed/format.hpp>

// What is left of a format once weights are packed.
namespace moe {

/// What a product needs of a format while the program runs.
struct PackedFormat {
  /// Numbers of a column that lie side by side, and the bytes of so many.
  Index block, block_bytes;
  const kernels::Product<float>* floats;  ///< multiplies by rows of floats, or null
  const kernels::DotProduct* dot;         ///< by rows of bfloat16, or null

  /// Bytes of a column of `depth` numbers.
  Index bytes(Index depth) const { return (depth + block - 1) / block * block_bytes; }

  friend bool operator==(const PackedFormat&, const PackedFormat&) = default;
};

/// The product of a format by rows of bfloat16, see DotFormat; null where there is none.
template <Format F>
const kernels::DotProduct* dot_product_of(InstructionSet set, bool rounded) {
  if constexpr (DotFormat<F>)
    return F::find_dot(set, rounded);
  else
    return nullptr;
}

/// A format by the kernels of an instruction set; `rounded`: with activations rounded to bfloat16, where they
/// are multiplied in bfloat16.
template <Format F>
PackedFormat packed_format(InstructionSet set, bool rounded) {
  return {F::kBlock, F::bytes(F::kBlock), F::find_product(set), dot_product_of<F>(set, rounded)};
}

}  // namespace moe
