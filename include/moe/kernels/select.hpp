// SPDX-License-Identifier: MIT
#pragma once

#include <moe/check.hpp>
#include <moe/kernels/avx2.hpp>
#include <moe/kernels/avx512.hpp>
#include <moe/kernels/avx512_bf16.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/kernels/portable.hpp>

// The choice of a set of kernels, made while the program runs.
namespace moe {

/// Sets of kernels that the library has. `portable` runs anywhere; avx512 means its parts F, BW, DQ, VL.
enum class InstructionSet { portable, avx2, avx512 };

inline const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx2: return "AVX2 and FMA";
    case InstructionSet::avx512: return "AVX-512";
    default: return "portable kernels";
  }
}

namespace kernels {

/// Whether this processor has an instruction set.
inline bool has(InstructionSet set) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (set == InstructionSet::avx2) return has_avx2;
  if (set == InstructionSet::avx512)
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return set == InstructionSet::portable;
}

/// The kernels for an instruction set; null where this processor does not have it.
inline const Kernels* find(InstructionSet set) {
  if (!has(set)) return nullptr;
#if defined(__x86_64__)
  if (set == InstructionSet::avx2) return &avx2::kTable;
  if (set == InstructionSet::avx512) return &avx512::kTable;
#endif
  return &portable::kTable;
}

/// The same for matrices as they lie.
inline const DenseKernels* find_dense(InstructionSet set) {
  if (!has(set)) return nullptr;
#if defined(__x86_64__)
  if (set == InstructionSet::avx2) return &avx2::kDenseTable;
  if (set == InstructionSet::avx512) return &avx512::kDenseTable;
#endif
  return &portable::kDenseTable;
}

/// Products of bfloat16 for the panels of an instruction set; null where there are none.
inline const DotKernels* find_dot(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512 && has(set) && __builtin_cpu_supports("avx512bf16"))
    return &avx512_bf16::kTable;
#endif
  return nullptr;
}

}  // namespace kernels

/// Whether this processor has an instruction set that the library has kernels for.
inline bool is_available(InstructionSet set) { return kernels::has(set); }

/// The best instruction set of this processor that the library has kernels for.
inline InstructionSet best_instruction_set() {
  for (const InstructionSet set : {InstructionSet::avx512, InstructionSet::avx2})
    if (is_available(set)) return set;
  return InstructionSet::portable;
}

}  // namespace moe
