// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include <moe/packed.hpp>

// A format that the library does not have, in one header: weights in IEEE half precision, widened to float.
namespace moe::test {

struct Fp16 {
  static constexpr Index kBlock = 1;

  static constexpr Index bytes(Index depth) { return depth * Index(sizeof(std::uint16_t)); }

  /// To nearest, ties to even; what is too large becomes infinity.
  static std::uint16_t rounded(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return std::uint16_t(sign | 0x7E00);   // NaN
    if (magnitude >= 0x47800000) return std::uint16_t(sign | 0x7C00);  // 65536 and more
    // Beside a number whose last digit is that of the result, adding rounds; the sum's lower digits hold it.
    const std::uint32_t exponent = magnitude >> 23 < 113 ? 113 : magnitude >> 23;
    const float power = std::bit_cast<float>((exponent + 13) << 23);  // 2^23 times the last digit
    const float sum = std::bit_cast<float>(magnitude) + power;
    const std::uint32_t digits = std::bit_cast<std::uint32_t>(sum) & 0x007FFFFF;
    return std::uint16_t(sign | (((exponent - 113) << 10) + digits));
  }
  static float widened(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t(half & 0x8000) << 16, magnitude = half & 0x7FFF;
    if (magnitude >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
  }

  static void encode(const float* const* rows, Index depth, Index columns, Index, std::byte* to) {
    auto* const numbers = reinterpret_cast<std::uint16_t*>(to);
    for (Index p = 0; p < depth; ++p)
      for (Index j = 0; j < columns; ++j) numbers[p * columns + j] = rounded(rows[j] ? rows[j][p] : 0.0f);
  }

  static void round(float* row, Index depth) {
    for (Index p = 0; p < depth; ++p) row[p] = widened(rounded(row[p]));
  }

  static const kernels::Product<float>* find_product(InstructionSet set) {
    if (!is_available(set)) return nullptr;
    if (set == InstructionSet::portable) return product<InstructionSet::portable>();
    return set == InstructionSet::avx2 ? product<InstructionSet::avx2>() : product<InstructionSet::avx512>();
  }

 private:
  // What multiplies floats, on panels that are widened before, one by one.
  template <InstructionSet kSet>
  static const kernels::Product<float>* product() {
    static const kernels::Product<float> product = [] {
      kernels::Product<float> of_floats = *F32::find_product(kSet);
      of_floats.multiply = multiply<kSet>;
      return of_floats;
    }();
    return &product;
  }

  template <InstructionSet kSet>
  static void multiply(Index rows, Index depth, const kernels::Parts<float>& x, const std::byte* panel,
                       Index apart, Index panels, float* c, bool add, const std::byte*) {
    constexpr Index kMostColumns = 64;
    alignas(64) float wide[kernels::kDepth * kMostColumns];
    const auto* const bytes = reinterpret_cast<const std::byte*>(wide);
    const Index columns = kernels::find(kSet)->columns, streams = kernels::find(kSet)->streams;
    const Index size = depth * columns / streams;
    for (Index i = 0; i < panels; ++i, c += rows * columns) {
      for (Index s = 0; s < streams; ++s, panel += apart)
        for (Index j = 0; j < size; ++j)
          wide[s * size + j] = widened(reinterpret_cast<const std::uint16_t*>(panel)[j]);
      F32::find_product(kSet)->multiply(rows, depth, x, bytes, size * Index(sizeof(float)), 1, c, add, bytes);
    }
  }
};
static_assert(Format<Fp16> && !DotFormat<Fp16>);

}  // namespace moe::test
