// SPDX-License-Identifier: MIT
#pragma once

#include <moe/kernels/amx.hpp>
#include <moe/kernels/avx2.hpp>
#include <moe/kernels/avx2_vnni.hpp>
#include <moe/kernels/avx512.hpp>
#include <moe/kernels/avx512_bf16.hpp>
#include <moe/kernels/avx512_vnni.hpp>
#include <moe/kernels/instruction_set.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/kernels/portable.hpp>

// The tables of all instruction sets: who includes this compiles the kernels. What they are for stands in
// select.hpp, which does so for header-only programs; others find them in moe::compiled.
namespace moe::kernels::tables {

inline const Kernels* find(InstructionSet set) {
  if (!has(set)) return nullptr;
#if defined(__x86_64__)
  if (set == InstructionSet::avx2) return &avx2::kTable;
  if (set == InstructionSet::avx512 || set == InstructionSet::amx) return &avx512::kTable;
#endif
  return &portable::kTable;
}

template <class Number>
const Product<float>* find_product(InstructionSet set) {
  if (!has(set)) return nullptr;
#if defined(__x86_64__)
  if (set == InstructionSet::avx2) return &avx2::kProduct<Number>;
  if (set == InstructionSet::avx512 || set == InstructionSet::amx) return &avx512::kProduct<Number>;
#endif
  return &portable::kProduct<Number>;
}

template <IntegerBlock B>
const Product<Int8Activations>* find_int8_product(InstructionSet set) {
  if (!has(set)) return nullptr;
#if defined(__x86_64__)
  if (set == InstructionSet::avx2)
    return has_avx_vnni() ? &avx2_vnni::kInt8Product<B> : &avx2::kInt8Product<B>;
  if (set == InstructionSet::avx512 || set == InstructionSet::amx)
    return __builtin_cpu_supports("avx512vnni") ? &avx512_vnni::kInt8Product<B> : nullptr;
#endif
  return &portable::kInt8Product<B>;
}

inline const DenseKernels* find_dense(InstructionSet set) {
  if (!has(set)) return nullptr;
#if defined(__x86_64__)
  if (set == InstructionSet::avx2) return &avx2::kDenseTable;
  if (set == InstructionSet::avx512 || set == InstructionSet::amx) return &avx512::kDenseTable;
#endif
  return &portable::kDenseTable;
}

inline const DenseBackwardKernels* find_dense_backward(InstructionSet set) {
  if (!has(set)) return nullptr;
#if defined(__x86_64__)
  if (set == InstructionSet::avx2) return &avx2::kDenseBackwardTable;
  if (set == InstructionSet::avx512 || set == InstructionSet::amx) return &avx512::kDenseBackwardTable;
#endif
  return &portable::kDenseBackwardTable;
}

inline const DotProduct* find_dot([[maybe_unused]] InstructionSet set, [[maybe_unused]] bool rounded) {
#if defined(__x86_64__)
  if (!has(set)) return nullptr;
  if (set == InstructionSet::amx) return rounded ? &amx::kTable : &amx::kExactTable;
  if (set == InstructionSet::avx512 && rounded && __builtin_cpu_supports("avx512bf16"))
    return &avx512_bf16::kTable;
#endif
  return nullptr;
}

}  // namespace moe::kernels::tables
