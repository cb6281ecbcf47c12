// SPDX-License-Identifier: MIT
// The kernels of every instruction set, for programs that link moe::compiled.
#include <moe/kernels/select.hpp>
#include <moe/kernels/tables.hpp>

namespace moe::kernels {

const Kernels* find(InstructionSet set) { return tables::find(set); }
template <class Number>
const Product<float>* find_product(InstructionSet set) {
  return tables::find_product<Number>(set);
}
// A format of the library has its numbers or blocks here.
template const Product<float>* find_product<float>(InstructionSet set);
template const Product<float>* find_product<Bfloat16>(InstructionSet set);
template const Product<float>* find_product<Int8Block>(InstructionSet set);
template const Product<float>* find_product<Int4Block>(InstructionSet set);
template const Product<float>* find_product<Int4OffsetBlock>(InstructionSet set);
template const Product<float>* find_product<MXFP4Block>(InstructionSet set);
template const Product<float>* find_product<FP8Block>(InstructionSet set);

template <IntegerBlock B>
const Product<Int8Activations>* find_int8_product(InstructionSet set) {
  return tables::find_int8_product<B>(set);
}
template const Product<Int8Activations>* find_int8_product<Int8Block>(InstructionSet set);
template const Product<Int8Activations>* find_int8_product<Int4Block>(InstructionSet set);
template const Product<Int8Activations>* find_int8_product<Int4OffsetBlock>(InstructionSet set);
template const Product<Int8Activations>* find_int8_product<MXFP4Block>(InstructionSet set);

const DenseKernels* find_dense(InstructionSet set) { return tables::find_dense(set); }
const DenseBackwardKernels* find_dense_backward(InstructionSet set) {
  return tables::find_dense_backward(set);
}
const DotProduct* find_dot(InstructionSet set, bool rounded) { return tables::find_dot(set, rounded); }

}  // namespace moe::kernels
