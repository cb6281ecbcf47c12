// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include <moe/core/types.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/read_tensor.hpp>
#include <moe/io/small_floats.hpp>
#include <moe/math/numbers.hpp>
#include <moe/packed/fp8.hpp>
#include <moe/packed/int4.hpp>
#include <moe/packed/mxfp4.hpp>

// Tensors of 8 and 4 bits whose scales are tensors beside them: as floats, and as the blocks of a packed
// format.
namespace moe {

/// Weights of 8 bits: values [rows, cols] in F8_E4M3 and scales in F32, BF16 or F8_E8M0. A number is the
/// product of two floats: a value and the scale of its block. Blocks are of 128 x 128 (DeepSeek-V3), scales
/// [ceil(rows / 128), ceil(cols / 128)]; 32 of a row (MXFP8), scales [rows, cols / 32] in U8, which are the
/// bits of F8_E8M0, or F8_E8M0; rows (compressed-tensors' channels), scales [rows, 1] or [rows]; columns,
/// scales [1, cols]; or the whole matrix, scales [1], [1, 1] or [].
class BlockScaledFP8 {
 public:
  using Format = FP8;  ///< whose blocks they are

  /// Refers to the values, which must outlive it. O(scales). Throws CheckpointError where dtypes, shapes or
  /// bytes do not fit; `where` begins the message.
  BlockScaledFP8(const TensorView& values, const TensorView& scales, const char* where)
      : values_(values), where_(where) {
    io::require_little_endian();
    if (values.dtype != DType::F8_E4M3 || values.shape.size() != 2)
      io::fail_checkpoint(where, ": ", io::description_of(values), ": expected F8_E4M3 [rows, cols]");
    io::check_bytes(values, where);
    const std::vector<Index>& shape = scales.shape;
    const auto blocks = [](Index n) { return n / kSide + (n % kSide != 0); };
    const std::vector<Index> expected{blocks(rows()), blocks(cols())};
    const bool is_power = scales.dtype == DType::F8_E8M0 || scales.dtype == DType::U8;
    if (shape == expected && scales.dtype != DType::U8)
      across_ = blocks(cols());
    else if (is_power && cols() % 32 == 0 && shape == std::vector<Index>{rows(), cols() / 32})
      high_ = 1, wide_ = 32, across_ = cols() / 32;
    else if (shape == std::vector<Index>{rows(), 1} || shape == std::vector<Index>{rows()})
      high_ = 1;
    else if (shape == std::vector<Index>{1, cols()} && cols() > 1)
      high_ = (std::max)(Index(1), rows()), wide_ = 1, across_ = cols();
    else if (shape.empty() || shape == std::vector<Index>{1} || shape == std::vector<Index>{1, 1})
      high_ = (std::max)(Index(1), rows());
    else
      high_ = 0;
    const bool is_scale = scales.dtype == DType::F32 || scales.dtype == DType::BF16 ||
                          scales.dtype == DType::F8_E8M0 || wide_ == 32;
    if (!is_scale || high_ == 0)
      io::fail_checkpoint(where, ": ", io::description_of(scales), ": expected BF16, F8_E8M0 or F32 ",
                          io::text_of(expected), ", or [", rows(), ", 1], or [1], for ",
                          io::description_of(values));
    io::check_bytes(scales, where);
    scales_.resize(std::size_t(scales.size()));
    TensorView numbers = scales;
    if (is_power) numbers.dtype = DType::F8_E8M0;
    read_tensor(numbers, scales_.data());
  }

  Index rows() const { return values_.shape[0]; }
  Index cols() const { return values_.shape[1]; }

  /// The bits of a value.
  std::uint8_t bits(Index row, Index col) const {
    return io::load<std::uint8_t>(values_.bytes, row * cols() + col);
  }
  /// Its scale.
  float scale(Index row, Index col) const {
    return scales_[std::size_t(row / high_ * across_ + (across_ > 1 ? col / wide_ : 0))];
  }
  /// Whether no block of FP8 has several scales.
  bool is_in_blocks() const { return across_ == 1 || wide_ % FP8::kBlock == 0; }
  /// Block `nth` of a row.
  FP8::Block block(Index row, Index nth) const {
    static_assert(kSide % FP8::kBlock == 0);
    const float scale = this->scale(row, nth * FP8::kBlock);
    if (number_kind(scale) != NumberKind::nan && std::abs(scale) >= kMostScale)
      io::fail_checkpoint(where_, ": ", values_.name, " has a scale of ", scale, ", expected less than ",
                          kMostScale);
    bool nan = number_kind(scale) == NumberKind::nan;
    FP8::Block block{scale, {}};
    for (Index i = 0, col = nth * FP8::kBlock; i < FP8::kBlock && col < cols(); ++i, ++col) {
      const std::uint8_t code = bits(row, col);
      if ((code & 127) == 127)
        nan = true;
      else
        block.words[i] = code;
    }
    if (nan) block.scale = std::numeric_limits<float>::quiet_NaN();
    return block;
  }

 private:
  static constexpr Index kSide = 128;  // of a block
  static constexpr float kMostScale = 0x1p120f;

  const TensorView& values_;
  const char* where_;
  std::vector<float> scales_;
  Index high_ = kSide;  // rows of a block
  Index wide_ = kSide;  // columns of a block
  Index across_ = 1;    // blocks of a row
};

/// Weights in MXFP4, shaped as gpt-oss': values [..., cols / 32, 16] in U8, each byte two 4-bit numbers, the
/// low half first; scales [..., cols / 32] in U8 or F8_E8M0, the same bits: a power of two with a bias of 127
/// for each 32 numbers, 255 is NaN. Every product is exact unless it leaves the range of float.
class StoredMXFP4 {
 public:
  using Format = MXFP4;  ///< whose blocks they are

  /// Refers to both, which must outlive it. O(1). Throws CheckpointError where dtypes, shapes or bytes do not
  /// fit; `where` begins the message.
  StoredMXFP4(const TensorView& values, const TensorView& scales, const char* where)
      : values_(values), scales_(scales) {
    io::require_little_endian();
    if (values.dtype != DType::U8 || values.shape.size() < 2 || values.shape.back() != kBytes)
      io::fail_checkpoint(where, ": ", io::description_of(values), ": expected U8 [..., cols / 32, 16]");
    io::check_bytes(values, where);
    const std::vector<Index> expected(values.shape.begin(), values.shape.end() - 1);
    if ((scales.dtype != DType::U8 && scales.dtype != DType::F8_E8M0) || scales.shape != expected)
      io::fail_checkpoint(where, ": ", io::description_of(scales), ": expected F8_E8M0 or U8 ",
                          io::text_of(expected), " for ", io::description_of(values));
    io::check_bytes(scales, where);
  }

  /// Blocks of all rows.
  Index blocks() const { return scales_.size(); }
  /// Block `nth` of a row.
  MXFP4::Block block(Index row, Index nth) const { return block(row * scales_.shape.back() + nth); }
  /// Block `nth` of all.
  MXFP4::Block block(Index nth) const {
    MXFP4::Block block{io::load<std::uint8_t>(scales_.bytes, nth), {}};
    for (Index i = 0; i < kBytes; ++i) {
      const std::uint32_t pair = io::load<std::uint8_t>(values_.bytes, nth * kBytes + i);
      block.words[nibble_word(2 * i)] |= (pair & 15) << nibble_bit(2 * i);
      block.words[nibble_word(2 * i + 1)] |= (pair >> 4) << nibble_bit(2 * i + 1);
    }
    return block;
  }

 private:
  static constexpr Index kBytes = 16;  // of a block

  const TensorView& values_;
  const TensorView& scales_;
};

/// Writes the numbers of BlockScaledFP8 to out [rows, cols]. O(rows * cols). Throws CheckpointError, and
/// writes nothing, where dtypes, shapes or bytes do not fit.
inline void read_block_scaled_fp8(const TensorView& weight, const TensorView& scale_inv, float* out) {
  const BlockScaledFP8 stored(weight, scale_inv, "read_block_scaled_fp8");
  for (Index i = 0; i < stored.rows(); ++i)
    for (Index j = 0; j < stored.cols(); ++j) *out++ = io::kE4M3[stored.bits(i, j)] * stored.scale(i, j);
}

/// Writes the numbers of StoredMXFP4 to out [..., cols]. O(size of out). Throws CheckpointError, and writes
/// nothing, where dtypes, shapes or bytes do not fit.
inline void read_mxfp4(const TensorView& blocks, const TensorView& scales, float* out) {
  const StoredMXFP4 stored(blocks, scales, "read_mxfp4");
  for (Index nth = 0; nth < stored.blocks(); ++nth) {
    const MXFP4::Block block = stored.block(nth);
    for (Index i = 0; i < MXFP4::kBlock; ++i) *out++ = MXFP4::number(block, i);
  }
}

}  // namespace moe
