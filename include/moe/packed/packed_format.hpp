// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <cstddef>
#include <string_view>

#include <moe/core/types.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/kernels/select.hpp>
#include <moe/packed/format.hpp>

// What is left of a format once weights are packed.
namespace moe {

/// To what activations are rounded before they multiply, if at all.
struct ActivationRounding {
  bool to_bfloat16 = false;  ///< see DotFormat
  bool to_int8 = false;      ///< see Int8Format
};

/// What a product needs of a format while the program runs.
struct PackedFormat {
  std::string_view name;  ///< see NamedFormat; empty for none
  /// Numbers of a column that lie side by side, and the bytes of so many.
  Index block, block_bytes;
  const kernels::Product<float>* floats;                   ///< multiplies by rows of floats, or null
  const kernels::DotProduct* dot;                          ///< by rows of bfloat16, or null
  const kernels::Product<kernels::Int8Activations>* int8;  ///< by rows in 8 bits, or null

  /// How rows are rounded before they multiply.
  ActivationRounding rounding() const { return {dot != nullptr && dot->parts == 1, int8 != nullptr}; }

  /// Bytes of a column of `depth` numbers. Every call of a product asks: a block is a power of two.
  Index bytes(Index depth) const {
    return ((depth + block - 1) >> std::countr_zero(std::size_t(block))) * block_bytes;
  }

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

/// The same by rows in 8 bits, see Int8Format.
template <Format F>
const kernels::Product<kernels::Int8Activations>* int8_product_of(InstructionSet set) {
  if constexpr (Int8Format<F>)
    return F::find_int8_product(set);
  else
    return nullptr;
}

/// The name of a format in files; empty where it has none.
template <Format F>
constexpr std::string_view name_of_format() {
  if constexpr (NamedFormat<F>)
    return F::kName;
  else
    return {};
}

/// A format by the kernels of an instruction set. Where it has no product for a rounding, that is null.
template <Format F>
PackedFormat packed_format(InstructionSet set, ActivationRounding rounding) {
  return {name_of_format<F>(),
          F::kBlock,
          F::bytes(F::kBlock),
          F::find_product(set),
          dot_product_of<F>(set, rounding.to_bfloat16),
          rounding.to_int8 ? int8_product_of<F>(set) : nullptr};
}

}  // namespace moe
