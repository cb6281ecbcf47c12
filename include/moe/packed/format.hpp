// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>

#include <moe/core/types.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/kernels/select.hpp>

// How the weights of a packed expert are stored. A format is one header beside this one: it says how numbers
// become bytes, and which product of each instruction set multiplies by them.
namespace moe {

/// A format of packed weights. Weights lie in panels of some columns, whose streams are encoded one by one:
/// `columns` columns of `depth` numbers each, the depth in blocks of `kBlock` numbers, which may share a
/// scale.
///   F::kBlock            a divisor of 64: products cut the depth at multiples of that
///   F::bytes(depth)      bytes of a column, its last block filled up
///   F::encode(rows, depth, columns, lanes, to)
///                        writes a stream of bytes(depth) * columns bytes, in which the bytes of a block of
///                        the depth lie before those of the next; rows[j] is column j, [depth], or null for
///                        zeros; `lanes`, a divisor of columns, is how many a register of the kernels holds
///   F::round(row, depth) makes of numbers [depth] those that encode would keep
///   F::find_product(set) the product of such panels with rows of floats, by kernels::Product's rules; null
///                        where this processor does not have the set
template <class F>
concept Format = requires(const float* const* rows, Index n, float* row, std::byte* to, InstructionSet set) {
  { F::kBlock } -> std::convertible_to<Index>;
  { F::bytes(n) } -> std::same_as<Index>;
  F::encode(rows, n, n, n, to);
  F::round(row, n);
  { F::find_product(set) } -> std::same_as<const kernels::Product<float>*>;
}
&&64 % F::kBlock == 0;

/// A format that files of packed layers name:
///   F::kName                                its name there
template <class F>
concept NamedFormat = Format<F> && requires {
  { F::kName } -> std::convertible_to<const char*>;
};

/// A format that some instruction sets also multiply by bfloat16 activations:
///   F::find_dot(set, rounded)               with activations rounded to bfloat16 or exact; null for none
template <class F>
concept DotFormat = Format<F> && requires(InstructionSet set, bool rounded) {
  { F::find_dot(set, rounded) } -> std::same_as<const kernels::DotProduct*>;
};

/// A format of integers that instruction sets also multiply by activations in 8 bits:
///   F::find_int8_product(set)               by activations rounded to 8 bits; null for none
template <class F>
concept Int8Format = Format<F> && requires(InstructionSet set) {
  { F::find_int8_product(set) } -> std::same_as<const kernels::Product<kernels::Int8Activations>*>;
};

/// A format that can round by the importance of the numbers of a column:
///   F::encode(rows, depth, columns, lanes, to, importance)   importance [depth], not negative
///   F::quantised(from, count, importance)                    a block of it
template <class F>
concept WeightedFormat = Format<F> && requires(const float* from, Index count) {
  F::quantised(from, count, from);
};

}  // namespace moe
