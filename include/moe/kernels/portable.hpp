// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <cstring>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <moe/kernels/blocks.hpp>
#include <moe/kernels/kernels.hpp>

// Kernels for any processor: vectors of four floats that GCC and Clang turn into what it has. They run in a
// fixed order; multiply-adds are fused where the code is compiled for a processor that has an instruction for
// it.
namespace moe::kernels::portable {

using Vec = float __attribute__((vector_size(16)));
using Whole = std::int32_t __attribute__((vector_size(16)));

inline constexpr int kLanes = 4, kVecs = 4, kStreams = 1;
inline constexpr int kNarrowRows = 2, kNarrowPairRows = 2, kHighRows = 4, kHighVecs = 2;
#if defined(__x86_64__)
inline constexpr bool kDirect = false;  // of processors without AVX2: half of what there is to compile
#else
inline constexpr bool kDirect = true;
#endif

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
inline Vec broadcast(float v) { return Vec{v, v, v, v}; }
inline Vec plus(Vec a, Vec b) { return a + b; }
inline Vec times(Vec a, Vec b) { return a * b; }
inline Vec divided(Vec a, Vec b) { return a / b; }
// By name where there is an instruction: left to themselves, compilers fuse some and others not.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__FMA__)
  return _mm_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec or_nan(Vec a, Vec b) { return (Whole(b) & 0x7FFFFFFF) > 0x7F800000 ? b : a; }
// The nearest integer of each number below 2^22. Added to a number, 1.5 * 2^23 leaves it in the lower
// bits. Unlike a conversion, this may be done to a NaN, and -ffast-math does not see through it.
inline Whole nearest_whole(Vec v) {
  const Vec shift = broadcast(12582912.0f);
  return Whole(v + shift) - Whole(shift);
}
inline Vec nearest_integer(Vec v) { return __builtin_convertvector(nearest_whole(v), Vec); }
inline Vec power_of_two(Vec n) { return Vec((nearest_whole(n) + 127) << 23); }

struct Pair {
  Whole bits;
};
inline Pair load_pair(const Bfloat16* from) {
  Pair pair;
  std::memcpy(&pair.bits, from, sizeof pair.bits);
  return pair;
}
// Pairs lie in the order of the processor's bytes: the first is the lower half of 32 bits.
inline Vec first_of(Pair pair) { return Vec(pair.bits << 16); }
inline Vec second_of(Pair pair) { return Vec(pair.bits & std::int32_t(0xFFFF0000)); }

inline Vec load_quads(const float* from, Index) { return load(from); }
inline Vec low_halves_mixed(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
inline Vec high_halves_mixed(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
inline Vec low_pairs(Vec a, Vec b) { return Vec{a[0], a[1], b[0], b[1]}; }
inline Vec high_pairs(Vec a, Vec b) { return Vec{a[2], a[3], b[2], b[3]}; }

using Words = std::uint32_t __attribute__((vector_size(16)));
inline Words load_words(const std::byte* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}
template <int n>
inline Words shifted(Words words) {
  return n >= 0 ? words << (n >= 0 ? n : 0) : words >> (n >= 0 ? 0 : -n);
}
inline Vec placed(Words words, std::uint32_t mask, std::uint32_t bits) { return Vec((words & mask) | bits); }
// A number of IEEE half precision.
inline float widened_half(std::uint32_t half) {
  const std::uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) return (half >> 15 ? -0x1p-24f : 0x1p-24f) * float(mantissa);
  const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>((half >> 15 << 31) | (wide << 23) | (mantissa << 13));
}
inline Vec load_halves(const std::byte* from) {
  std::uint16_t half[kLanes];
  std::memcpy(half, from, sizeof half);
  return Vec{widened_half(half[0]), widened_half(half[1]), widened_half(half[2]), widened_half(half[3])};
}
inline Words load_bytes(const std::byte* from) {
  return Words{std::uint32_t(from[0]), std::uint32_t(from[1]), std::uint32_t(from[2]),
               std::uint32_t(from[3])};
}
inline Vec load_powers(const std::byte* from) {
  const Words bytes = load_bytes(from);
  // Of 0 and 255: 2^-127, and a NaN in place of the infinity.
  return Vec(bytes << 23 | (Words(((bytes + 1) & 254) == 0) & 0x400000));
}
struct TwoVecs {
  Vec first, second;
};
inline TwoVecs load_e4m3(const std::byte* from) {
  const auto widened = [&](int i) {
    const auto byte = std::uint32_t(from[i]);
    return widened_half((byte & 128) << 8 | (byte & 127) << 7);
  };
  return {Vec{widened(0), widened(1), widened(2), widened(3)},
          Vec{widened(4), widened(5), widened(6), widened(7)}};
}
template <int bit>
inline Vec e2m1(Words words) {
  constexpr float kValues[16] = {0.0f, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  const Words code = shifted<-bit>(words) & 15;
  return Vec{kValues[code[0]], kValues[code[1]], kValues[code[2]], kValues[code[3]]};
}

using Ints = Whole;
inline constexpr int kDotRows = 1, kDotVecs = 4;
inline void store_words(std::byte* to, Words words) { std::memcpy(to, &words, sizeof words); }
inline Words broadcast_word(std::int32_t word) {
  const auto bits = std::uint32_t(word);
  return Words{bits, bits, bits, bits};
}
inline Words broadcast_word(const std::int8_t* four) {
  std::int32_t word;
  std::memcpy(&word, four, sizeof word);
  return broadcast_word(word);
}
inline Vec to_floats(Words ints) { return __builtin_convertvector(Ints(ints), Vec); }
template <int n>
inline Words half_bytes(Words words) {
  return words >> n & 0x0F0F0F0F;
}
inline Words doubled_e2m1(Words codes) {
  constexpr std::uint8_t kValues[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  std::uint8_t bytes[sizeof codes];
  std::memcpy(bytes, &codes, sizeof codes);
  for (auto& byte : bytes) byte = kValues[byte];
  std::memcpy(&codes, bytes, sizeof codes);
  return codes;
}
template <int kMost>
struct Dots {
  static constexpr bool kIsSigned = false;
  using Codes = Words;
  static Codes codes(Words words) { return words; }

  Words sum;
  void begin(std::int32_t first) { sum = broadcast_word(first); }
  void add(Codes codes, Words x, int) {
    Ints part = Ints(sum);
    for (int shift = 0; shift < 32; shift += 8)
      part += Ints(codes >> shift & 255) * (Ints(x << (24 - shift)) >> 24);
    sum = Words(part);
  }
};
inline Words magnitude(Vec v) { return Words(v) & 0x7FFFFFFF; }
inline Words larger_words(Words a, Words b) { return Ints(a) > Ints(b) ? a : b; }
inline Words plus_words(Words a, Words b) { return a + b; }
inline std::int32_t largest_of(Words words) {
  std::int32_t largest = 0;
  for (int i = 0; i < kLanes; ++i)
    if (std::int32_t(words[i]) > largest) largest = std::int32_t(words[i]);
  return largest;
}
inline std::int32_t sum_of(Words words) { return std::int32_t(words[0] + words[1] + words[2] + words[3]); }
inline Words nearest_ints(Vec v) { return Words(nearest_whole(v)); }
inline void store_bytes(std::int8_t* to, Words ints) {
  for (int i = 0; i < kLanes; ++i) to[i] = std::int8_t(ints[i]);
}

// In this order: each builds on the one before.
#include <moe/kernels/product.inc>

#include <moe/kernels/widen.inc>

#include <moe/kernels/integers.inc>

#include <moe/kernels/elementwise.inc>

#include <moe/kernels/dense.inc>

inline constexpr Kernels kTable = {kColumns, kStreams, kLanes, activate, combine};
inline constexpr DenseKernels kDenseTable = {linear};
inline constexpr DenseBackwardKernels kDenseBackwardTable = {linear_backward_input, linear_backward_weight};

}  // namespace moe::kernels::portable
