// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/compiled.hpp>
#include <moe/kernels/blocks.hpp>
#include <moe/kernels/instruction_set.hpp>
#include <moe/kernels/kernels.hpp>

#ifndef MOE_COMPILED
#include <moe/kernels/tables.hpp>
#endif

// The choice of a set of kernels, made while the program runs. With MOE_COMPILED they are those of the
// library moe::compiled, and this compiles none.
namespace moe::kernels {

/// The kernels for an instruction set; null where this processor does not have it.
const Kernels* find(InstructionSet set);

/// Its product of panels of a format's numbers, float or Bfloat16, or of its blocks, with rows of floats.
template <class Number>
const Product<float>* find_product(InstructionSet set);

/// The kernels for matrices as they lie.
const DenseKernels* find_dense(InstructionSet set);
const DenseBackwardKernels* find_dense_backward(InstructionSet set);

/// Products of bfloat16 for the panels of an instruction set, with activations rounded or exact; null where
/// there are none.
const DotProduct* find_dot(InstructionSet set, bool rounded);

/// Products of blocks of integers, Int8Block, Int4Block, Int4OffsetBlock or MXFP4Block, with activations in 8
/// bits; null where there is none.
template <IntegerBlock B>
const Product<Int8Activations>* find_int8_product(InstructionSet set);

#ifdef MOE_COMPILED
extern template const Product<float>* find_product<float>(InstructionSet set);
extern template const Product<float>* find_product<Bfloat16>(InstructionSet set);
extern template const Product<float>* find_product<Int8Block>(InstructionSet set);
extern template const Product<float>* find_product<Int4Block>(InstructionSet set);
extern template const Product<float>* find_product<Int4OffsetBlock>(InstructionSet set);
extern template const Product<float>* find_product<MXFP4Block>(InstructionSet set);
extern template const Product<float>* find_product<FP8Block>(InstructionSet set);
extern template const Product<Int8Activations>* find_int8_product<Int8Block>(InstructionSet set);
extern template const Product<Int8Activations>* find_int8_product<Int4Block>(InstructionSet set);
extern template const Product<Int8Activations>* find_int8_product<Int4OffsetBlock>(InstructionSet set);
extern template const Product<Int8Activations>* find_int8_product<MXFP4Block>(InstructionSet set);
#else
inline const Kernels* find(InstructionSet set) { return tables::find(set); }
template <class Number>
const Product<float>* find_product(InstructionSet set) {
  return tables::find_product<Number>(set);
}
inline const DenseKernels* find_dense(InstructionSet set) { return tables::find_dense(set); }
inline const DenseBackwardKernels* find_dense_backward(InstructionSet set) {
  return tables::find_dense_backward(set);
}
inline const DotProduct* find_dot(InstructionSet set, bool rounded) { return tables::find_dot(set, rounded); }
template <IntegerBlock B>
const Product<Int8Activations>* find_int8_product(InstructionSet set) {
  return tables::find_int8_product<B>(set);
}
#endif

}  // namespace moe::kernels
