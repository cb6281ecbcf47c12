// SPDX-License-Identifier: MIT
#pragma once

#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// The sets of instructions that the library has kernels for, and which of them this processor has.
namespace moe {

/// Sets of kernels that the library has. `portable` runs anywhere; avx512 means its parts F, BW, DQ, VL; amx
/// multiplies weights in bfloat16 by the tiles of AMX, and is avx512 for everything else.
enum class InstructionSet { portable, avx2, avx512, amx };

/// Its name, for messages.
inline const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx2:
      return "AVX2 and FMA";
    case InstructionSet::avx512:
      return "AVX-512";
    case InstructionSet::amx:
      return "AMX";
    default:
      return "portable kernels";
  }
}

namespace kernels {

// AMX, with the leave of the system, which is asked for once.
inline bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool may = [] {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
    return __builtin_cpu_supports("avx512bf16") &&
           ::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return may;
#else
  return false;
#endif
}

// Conversions of half precision, which all processors with AVX2 have, but some virtual machines hide.
#if defined(__x86_64__)
inline bool has_f16c() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  }();
  return has;
}
// The dot product of bytes in the encoding of AVX2.
inline bool has_avx_vnni() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
  }();
  return has;
}
#endif

/// Whether this processor has an instruction set.
inline bool has(InstructionSet set) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (set == InstructionSet::avx2) return has_avx2;
  if (set == InstructionSet::avx512)
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (set == InstructionSet::amx) return has(InstructionSet::avx512) && may_use_amx();
#endif
  return set == InstructionSet::portable;
}

}  // namespace kernels

/// Whether this processor has an instruction set that the library has kernels for. The question for AMX asks
/// Linux for leave to use it, once; from then on the process cannot install signal stacks too small for it.
inline bool is_available(InstructionSet set) { return kernels::has(set); }

/// The best instruction set of this processor for products of floats.
inline InstructionSet best_instruction_set() {
  for (const InstructionSet set : {InstructionSet::avx512, InstructionSet::avx2})
    if (is_available(set)) return set;
  return InstructionSet::portable;
}

}  // namespace moe
