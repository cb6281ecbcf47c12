// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

// Floating-point numbers of 16 and 8 bits as floats, which hold all of them.
namespace moe::io {

// The bits of a float that equals a number of fewer bits: a sign, kExponentBits with the usual
// bias, kMantissaBits. Where the format has no infinities, only all ones are special, and NaN.
template <int kExponentBits, int kMantissaBits, bool kHasInfinity>
constexpr std::uint32_t widened(std::uint32_t bits) {
  constexpr std::uint32_t kMaxExponent = (1u << kExponentBits) - 1;
  constexpr std::uint32_t kMaxMantissa = (1u << kMantissaBits) - 1;
  constexpr std::uint32_t kBiasDifference = 127 - kMaxExponent / 2;
  const std::uint32_t sign = (bits >> (kExponentBits + kMantissaBits)) << 31;
  std::uint32_t exponent = (bits >> kMantissaBits) & kMaxExponent;
  std::uint32_t mantissa = bits & kMaxMantissa;
  if (exponent == kMaxExponent && (kHasInfinity || mantissa == kMaxMantissa))
    return sign | 0x7f800000u | mantissa << (23 - kMantissaBits);
  if (exponent == 0) {
    if (mantissa == 0) return sign;
    // A subnormal is a normal float: shift its highest bit to where the hidden one is.
    const int shift = std::countl_zero(mantissa) - (31 - kMantissaBits);
    mantissa = (mantissa << shift) & kMaxMantissa;
    exponent = 1u - std::uint32_t(shift);  // may wrap around; the bias brings it back
  }
  return sign | (exponent + kBiasDifference) << 23 | mantissa << (23 - kMantissaBits);
}

constexpr float float_of_f16(std::uint16_t bits) { return std::bit_cast<float>(widened<5, 10, true>(bits)); }
constexpr float float_of_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t(bits) << 16); }
constexpr float float_of_e4m3(std::uint8_t bits) { return std::bit_cast<float>(widened<4, 3, false>(bits)); }
constexpr float float_of_e5m2(std::uint8_t bits) { return std::bit_cast<float>(widened<5, 2, true>(bits)); }
constexpr float float_of_e8m0(std::uint8_t bits) {
  if (bits == 0xff) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(bits == 0 ? 0x00400000u : std::uint32_t(bits) << 23);  // 2^-127 first
}

// All values of an 8-bit type.
template <class Convert>
constexpr std::array<float, 256> table_of(Convert convert) {
  std::array<float, 256> table{};
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = convert(std::uint8_t(i));
  return table;
}
inline constexpr std::array<float, 256> kE4M3 = table_of(float_of_e4m3);
inline constexpr std::array<float, 256> kE5M2 = table_of(float_of_e5m2);
inline constexpr std::array<float, 256> kE8M0 = table_of(float_of_e8m0);

}  // namespace moe::io
