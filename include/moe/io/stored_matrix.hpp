// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/types.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/gguf_blocks.hpp>
#include <moe/io/read_tensor.hpp>
#include <moe/io/scaled_blocks.hpp>
#include <moe/packed/block_format.hpp>

// How a checkpoint stores a matrix: as numbers, or as small ones with scales. Asked once, by name; whoever
// reads it then asks no more.
namespace moe {

/// A tensor of a checkpoint with all that its values need. New ways of storing go here.
struct StoredMatrix {
  /// How numbers are stored.
  enum class Format {
    plain,             ///< numbers of values.dtype, also in the blocks of GGUF files
    block_scaled_fp8,  ///< 8 bits, and one scale for each 128 x 128 of them, each row, or all
    mxfp4,  ///< gpt-oss': bytes of two 4-bit numbers, and one scale for 32 along the last dimension
  };

  Format format = Format::plain;  ///< how its numbers are stored
  TensorView values{};            ///< the numbers, as they are stored
  TensorView scales{};            ///< of format plain: nothing
  std::vector<Index> shape{};     ///< of the numbers

  Index size() const { return values.size() * (format == Format::mxfp4 ? 2 : 1); }

  /// Slice `index` of `count` equal ones along the first dimensions, as [rows, cols]; `where` begins a
  /// message. Throws CheckpointError
  /// for scaled blocks of 8 bits, whose scales do not say where a slice of several begins.
  StoredMatrix slice(Index index, Index count, Index rows, Index cols, const char* where) const {
    if (count != 1 && format == Format::block_scaled_fp8)
      throw CheckpointError(std::string(where) + ": " + values.name + " has block scales and holds " +
                            std::to_string(count) + " experts, expected 1");
    StoredMatrix part{format, values, scales, {rows, cols}};
    if (format == Format::block_scaled_fp8) return part;
    const bool mxfp4 = format == Format::mxfp4;
    cut(part.values, index, count, mxfp4 ? std::vector<Index>{rows, cols / 32, 16} : part.shape);
    if (mxfp4) cut(part.scales, index, count, {rows, cols / 32});
    return part;
  }

  /// Writes all numbers to `out` [size()]. O(size()).
  template <class S>
  void read(S* out) const {
    if (format == Format::plain) return read_tensor(values, out);
    std::vector<float> numbers(static_cast<std::size_t>(size()));
    if (format == Format::mxfp4)
      read_mxfp4(values, scales, numbers.data());
    else
      read_block_scaled_fp8(values, scales, numbers.data());
    std::copy(numbers.begin(), numbers.end(), out);
  }

  /// Calls use(stored) with the stored numbers, if they are in blocks of a packed format: BlockScaledFP8,
  /// StoredMXFP4 or GGUFBlocks. Says whether they are. Throws CheckpointError where they do not fit their
  /// scales; `where` begins its message.
  template <InBlocks F, class Use>
  bool in_blocks_of(const char* where, const Use& use) const {
    if constexpr (std::is_same_v<F, FP8>)
      if (format == Format::block_scaled_fp8) {
        use(BlockScaledFP8(values, scales, where));
        return true;
      }
    if constexpr (std::is_same_v<F, MXFP4>)
      if (format == Format::mxfp4) {
        use(StoredMXFP4(values, scales, where));
        return true;
      }
    return format == Format::plain && io::in_gguf_blocks_of<F>(values, use, where);
  }

  /// Why the numbers cannot be read as S where they lie; empty where they can.
  template <class S>
  std::string why_not_in_place() const {
    const DType here = *io::dtype_of<S>();
    if (format != Format::plain) return "scaled in blocks";
    if (values.dtype != here)
      return std::string(name_of(values.dtype)) + ", not " + std::string(name_of(here));
    return is_readable_in_place<S>(values) ? "" : "misaligned";
  }

 private:
  static void cut(TensorView& tensor, Index index, Index count, std::vector<Index> shape) {
    const std::size_t size = tensor.bytes.size() / std::size_t(count);
    tensor.bytes = tensor.bytes.subspan(std::size_t(index) * size, size);
    tensor.shape = std::move(shape);
  }
};

/// The matrix of this name, in whichever format the checkpoint has it. Throws CheckpointError where it is
/// missing, of a type that means something together with scales only but without them, or where its scales do
/// not fit; `where` begins the message. O(log(tensors)).
inline StoredMatrix find_matrix(const Checkpoint& checkpoint, const std::string& name, const char* where) {
  using Format = StoredMatrix::Format;
  StoredMatrix found;
  if (!checkpoint.contains(name) && checkpoint.contains(name + "_blocks")) {
    found = {Format::mxfp4, checkpoint.at(name + "_blocks"), checkpoint.at(name + "_scales"), {}};
    found.shape = found.values.shape;
    if (found.shape.size() >= 2) {  // [..., blocks, 16] bytes of two values
      found.shape.pop_back();
      found.shape.back() *= 32;
    }
    const auto& blocks = found.values.shape;
    if (blocks.empty() || std::vector<Index>(blocks.begin(), blocks.end() - 1) != found.scales.shape)
      throw CheckpointError(std::string(where) + ": " + found.scales.name + " has shape " +
                            io::text_of(found.scales.shape) + ", expected " + io::text_of(blocks) +
                            " without the last");
    return found;
  }
  found.values = checkpoint.at(name);
  found.shape = found.values.shape;
  const std::string scale = name + "_scale_inv", other = name + "_scale";
  const DType dtype = found.values.dtype;
  if (checkpoint.contains(scale) || checkpoint.contains(other)) {
    found.format = Format::block_scaled_fp8;
    found.scales = checkpoint.at(checkpoint.contains(scale) ? scale : other);
  } else if (dtype == DType::F8_E4M3 || dtype == DType::F8_E5M2 || dtype == DType::F8_E8M0) {
    // Read as they are they would be wrong by orders of magnitude and still look like weights.
    throw CheckpointError(std::string(where) + ": " + name + " is " + std::string(name_of(dtype)) +
                          ", which is not read without its scale " + io::in_quotes(scale) + " or " +
                          io::in_quotes(other) + io::hint(scale, checkpoint.names()));
  }
  return found;
}

}  // namespace moe
