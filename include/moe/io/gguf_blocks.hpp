// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <moe/core/types.hpp>
#include <moe/io/block_types.hpp>
#include <moe/io/dtype.hpp>
#include <moe/packed/block_format.hpp>
#include <moe/packed/int4.hpp>
#include <moe/packed/int8.hpp>
#include <moe/packed/mxfp4.hpp>

// The blocks of GGUF files as those of packed formats.
namespace moe {

/// A matrix in blocks of type B as blocks of F, which stand for the same numbers.
template <InBlocks F, class B>
class GGUFBlocks {
 public:
  using Format = F;  ///< whose blocks they are

  /// Refers to values [rows, cols], which must outlive it. O(1). Throws CheckpointError where bytes do not
  /// fit; `where` begins the message.
  GGUFBlocks(const TensorView& values, const char* where) : values_(values) {
    io::check_bytes(values, where);
  }

  /// Block `nth` of a row. O(numbers of a block).
  typename F::Block block(Index row, Index nth) const {
    const Index first = row * values_.shape.back() + nth * F::kBlock, of_file = first / B::kNumbers;
    const std::byte* const stored = values_.bytes.data() + std::size_t(of_file) * B::kBytes;
    const Index begin = first - of_file * B::kNumbers;
    typename F::Block block{};
    if constexpr (requires { block.offset; }) {
      block.scale = B::scale(stored, begin / B::kShared);
      block.offset = B::offset(stored, begin / B::kShared);
    } else {
      std::memcpy(&block.scale, stored, sizeof block.scale);
    }
    for (Index i = 0; i < F::kBlock; ++i) {
      if constexpr (std::is_same_v<F, Int8>)
        block.words[i / 4] |= std::uint32_t(B::code(stored, i) + F::Block::kZeroCode) << (8 * (i % 4));
      else if constexpr (std::is_same_v<F, MXFP4>)
        block.words[nibble_word(i)] |= std::uint32_t(B::bits(stored, i)) << nibble_bit(i);
      else
        block.words[nibble_word(i)] |= std::uint32_t(B::code(stored, begin + i) + F::Block::kZeroCode)
                                       << nibble_bit(i);
    }
    return block;
  }

 private:
  static_assert(F::kBlock == B::kShared);
  const TensorView& values_;
};

namespace io {

/// Calls use(stored) with a tensor as blocks of F, if its own are such. Says whether they are.
template <InBlocks F, class Use>
bool in_gguf_blocks_of(const TensorView& values, const Use& use, const char* where) {
  [[maybe_unused]] const auto as = [&]<class B>(DType dtype, B) {
    if (values.dtype != dtype) return false;
    use(GGUFBlocks<F, B>(values, where));
    return true;
  };
  if constexpr (std::is_same_v<F, Int8>) return as(DType::Q8_0, Q8_0{});
  if constexpr (std::is_same_v<F, Int4>) return as(DType::Q4_0, Q4_0{});
  if constexpr (std::is_same_v<F, Int4Offset>) return as(DType::Q4_1, Q4_1{}) || as(DType::Q4_K, Q4_K{});
  if constexpr (std::is_same_v<F, moe::MXFP4>) return as(DType::MXFP4, StoredFP4{});
  return false;
}

}  // namespace io

}  // namespace moe
