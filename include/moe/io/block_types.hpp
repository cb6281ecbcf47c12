// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include <moe/core/types.hpp>
#include <moe/io/small_floats.hpp>

// The blocks of GGUF files: kBytes bytes for kNumbers numbers of a row. A number is an integer, its code,
// times a scale that kShared of them have in common, plus an offset where the type has one. Products are
// exact, as a code and its scale have at most 24 significant bits together. So a number is rounded once,
// where an offset is added, or not at all.
namespace moe::io {

/// Byte i of a block.
inline std::uint32_t byte_at(const std::byte* block, Index i) {
  return std::to_integer<std::uint32_t>(block[i]);
}
/// The half that begins at byte i.
inline float half_at(const std::byte* block, Index i) {
  return float_of_f16(std::uint16_t(byte_at(block, i) | byte_at(block, i + 1) << 8));
}
/// Four bits of 32: the low halves of 16 bytes, then the high ones.
inline int nibble_at(const std::byte* bytes, Index i) {
  return int(i < 16 ? byte_at(bytes, i) & 15 : byte_at(bytes, i - 16) >> 4);
}
/// One bit.
inline int bit_at(const std::byte* bytes, Index i) { return int(byte_at(bytes, i / 8) >> (i % 8) & 1); }

/// 32 numbers that share a scale in half precision, the first two bytes.
template <std::size_t kSize>
struct HalfScaled {
  static constexpr Index kNumbers = 32, kShared = 32;
  static constexpr std::size_t kBytes = kSize;
  static float scale(const std::byte* block, Index) { return half_at(block, 0); }
};

/// Eight bits.
struct Q8_0 : HalfScaled<34> {
  static int code(const std::byte* block, Index i) { return std::int8_t(byte_at(block, 2 + i)); }
};

/// Four bits.
struct Q4_0 : HalfScaled<18> {
  static int code(const std::byte* block, Index i) { return nibble_at(block + 2, i) - 8; }
};

/// Four bits with an offset in half precision.
struct Q4_1 : HalfScaled<20> {
  static int code(const std::byte* block, Index i) { return nibble_at(block + 4, i); }
  static float offset(const std::byte* block, Index) { return half_at(block, 2); }
};

/// Five bits, the fifth ones in four bytes of their own.
struct Q5_0 : HalfScaled<22> {
  static int code(const std::byte* block, Index i) {
    return (nibble_at(block + 6, i) | bit_at(block + 2, i) << 4) - 16;
  }
};

/// Five bits with an offset in half precision.
struct Q5_1 : HalfScaled<24> {
  static int code(const std::byte* block, Index i) {
    return nibble_at(block + 8, i) | bit_at(block + 4, i) << 4;
  }
  static float offset(const std::byte* block, Index) { return half_at(block, 2); }
};

/// Four bits that stand for integers which are not evenly spaced.
struct IQ4_NL : HalfScaled<18> {
  static int code(const std::byte* block, Index i) {
    constexpr std::int8_t kCodes[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                        1,    13,   25,  38,  53,  69,  89,  113};
    return kCodes[nibble_at(block + 2, i)];
  }
};

/// MXFP4, DType's of that name: one byte of scale, a power of two, 255 is NaN; 4-bit floats as integers by
/// doubling them and halving the scale. Its zero has no sign.
struct StoredFP4 {
  static constexpr Index kNumbers = 32, kShared = 32;
  static constexpr std::size_t kBytes = 17;
  static int bits(const std::byte* block, Index i) { return nibble_at(block + 1, i); }
  static int code(const std::byte* block, Index i) {
    constexpr std::int8_t kCodes[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    return kCodes[bits(block, i)];
  }
  static float scale(const std::byte* block, Index) {
    const std::uint32_t exponent = byte_at(block, 0);
    if (exponent == 255) return std::numeric_limits<float>::quiet_NaN();
    return std::bit_cast<float>(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
  }
};

/// 256 numbers in groups of 32 that share a scale and an offset, each 6 bits times a half of the whole block:
/// two halves, then 8 scales and 8 offsets in 12 bytes.
template <std::size_t kSize>
struct Grouped {
  static constexpr Index kNumbers = 256, kShared = 32;
  static constexpr std::size_t kBytes = kSize;
  static float scale(const std::byte* block, Index group) {
    return half_at(block, 0) * six_bits(block + 4, group, 0);
  }
  static float offset(const std::byte* block, Index group) {
    return -(half_at(block, 2) * six_bits(block + 4, group, 1));
  }
  /// Four bits: a group's are the low or the high halves of 32 bytes.
  static int nibble(const std::byte* bytes, Index i) {
    return int(byte_at(bytes, i / 64 * 32 + i % 32) >> (i / 32 % 2 * 4) & 15);
  }

 private:
  // Of groups 0 to 3 in bytes 0 to 3 and, offsets, 4 to 7; of the others the lower four bits in the halves of
  // bytes 8 to 11, the upper two above those of group - 4.
  static float six_bits(const std::byte* bytes, Index group, Index which) {
    const std::byte* const own = bytes + 4 * which;
    if (group < 4) return float(byte_at(own, group) & 63);
    return float((byte_at(bytes, 4 + group) >> (4 * which) & 15) | byte_at(own, group - 4) >> 6 << 4);
  }
};

/// Four bits.
struct Q4_K : Grouped<144> {
  static int code(const std::byte* block, Index i) { return nibble(block + 16, i); }
};

/// Five bits: a bit of 32 bytes for every group.
struct Q5_K : Grouped<176> {
  static int code(const std::byte* block, Index i) {
    return nibble(block + 48, i) | int(byte_at(block + 16, i % 32) >> (i / 32) & 1) << 4;
  }
};

/// Six bits, 256 numbers in groups of 16 that share a scale of 8 bits times a half: 128 bytes of the lower
/// four bits, 64 of the upper two, the scales, the half.
struct Q6_K {
  static constexpr Index kNumbers = 256, kShared = 16;
  static constexpr std::size_t kBytes = 210;
  static int code(const std::byte* block, Index i) {
    const Index half = i / 128, row = i / 32 % 4, col = i % 32;
    const std::uint32_t low = byte_at(block, 64 * half + row % 2 * 32 + col) >> (row / 2 * 4) & 15;
    const std::uint32_t high = byte_at(block + 128, 32 * half + col) >> (2 * row) & 3;
    return int(low | high << 4) - 32;
  }
  static float scale(const std::byte* block, Index group) {
    return half_at(block, 208) * float(std::int8_t(byte_at(block, 192 + group)));
  }
};

/// Writes the numbers of a block to out [B::kNumbers]. O(B::kNumbers).
template <class B, std::floating_point S>
void read_block(const std::byte* block, S* out) {
  constexpr bool kHasOffset = requires { B::offset(block, 0); };
  for (Index begin = 0; begin < B::kNumbers; begin += B::kShared) {
    const Index group = begin / B::kShared;
    const float scale = B::scale(block, group);
    float offset = 0;
    if constexpr (kHasOffset) offset = B::offset(block, group);
    for (Index i = begin; i < begin + B::kShared; ++i) {
      const float product = float(B::code(block, i)) * scale;
      out[i] = S(kHasOffset ? product + offset : product);  // the sum would take the sign of -0
    }
  }
}

}  // namespace moe::io
