// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/packed/block_format.hpp>
#include <moe/packed/fit_integers.hpp>

namespace moe {

/// Weights of 8 bits: blocks of 32 numbers along the depth, integers from -127 to 127 times a scale in half
/// precision; 8.5 bits for a number. A block with a number that is not finite is NaN.
struct Int8 : BlockFormat<Int8, kernels::Int8Block> {
  static constexpr const char* kName = "Int8";  ///< see NamedFormat

  /// The integers and the scale of the least squared error that fit_integers finds, by the importance of each
  /// number where that is not null.
  static Block quantised(const float* from, Index count, const float* importance = nullptr) {
    const auto fit =
        importance ? fit_integers<-127, 127, kBlock>(from, count, importance, {127, 126, 125, 124, 140, 160})
                   : fit_integers<-127, 127, kBlock>(from, count, nullptr, {127, 126, 125, 124});
    Block block{fit.scale, {}};
    for (Index i = 0; i < kBlock; ++i)
      block.words[i / 4] |= std::uint32_t(fit.codes[i] + 128) << (8 * (i % 4));
    return block;
  }
  /// Number i of a block.
  static float number(const Block& block, Index i) {
    return float(int(block.words[i / 4] >> (8 * (i % 4)) & 255) - 128) * float_of_half(block.scale) + 0.0f;
  }
};
static_assert(InBlocks<Int8> && !DotFormat<Int8>);

}  // namespace moe
