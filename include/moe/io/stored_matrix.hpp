// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/types.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/gguf_blocks.hpp>
#include <moe/io/grouped_matrix.hpp>
#include <moe/io/read_tensor.hpp>
#include <moe/io/scaled_blocks.hpp>
#include <moe/packed/block_format.hpp>

// How a checkpoint stores a matrix: as numbers, or as small ones with scales. find_matrix asks once, by name;
// whoever reads it then asks no more.
namespace moe {

/// A tensor of a checkpoint with all that its values need. New ways of storing go here.
struct StoredMatrix {
  /// How numbers are stored.
  enum class Format {
    plain,             ///< numbers of values.dtype, also in the blocks of GGUF files
    block_scaled_fp8,  ///< 8 bits, and one scale for each 128 x 128 of them, each row, or all
    mxfp4,             ///< bytes of two 4-bit numbers, and one scale for 32 along the last dimension
    grouped,           ///< small codes whose scales, and zero points, are tensors beside them: `group`
  };

  Format format = Format::plain;                 ///< how its numbers are stored
  TensorView values{};                           ///< the numbers, as they are stored
  TensorView scales{};                           ///< of block_scaled_fp8 and mxfp4
  std::vector<Index> shape{};                    ///< of the numbers
  std::shared_ptr<const GroupedMatrix> group{};  ///< of format grouped
  std::vector<std::string> beside{};             ///< names of the other tensors that belong to it

  /// Numbers.
  Index size() const {
    const std::optional<Index> numbers = io::num_elements(shape);
    io::require_checkpoint(numbers.has_value(), values.name, ": no memory holds the shape ",
                           io::text_of(shape));
    return *numbers;
  }

  /// Slice `index` of `count` equal ones along the first dimensions, as [rows, cols]; `where` begins a
  /// message. Throws CheckpointError for several in groups, and for several scaled blocks of 8 bits whose
  /// scales do not have `count` as their first dimension.
  StoredMatrix slice(Index index, Index count, Index rows, Index cols, const char* where) const {
    StoredMatrix part = *this;
    part.shape = {rows, cols};
    if (format == Format::grouped || (count == 1 && format == Format::block_scaled_fp8)) {
      if (count != 1) fail_stacked(count, where);
      return part;
    }
    if (format == Format::block_scaled_fp8) {
      const std::vector<Index>& all = scales.shape;
      if (all.empty() || all.front() != count || all.size() == 2 || all.size() > 3)
        fail_stacked(count, where);
      cut(part.scales, index, count, {all.begin() + 1, all.end()});
    }
    const bool mxfp4 = format == Format::mxfp4;
    cut(part.values, index, count, mxfp4 ? std::vector<Index>{rows, cols / 32, 16} : part.shape);
    if (mxfp4) cut(part.scales, index, count, {rows, cols / 32});
    return part;
  }

  /// Writes all numbers to `out` [size()]. O(size()).
  template <class S>
  void read(S* out) const {
    if (format == Format::plain) return read_tensor(values, out);
    if (format == Format::grouped) {
      for (Index i = 0; i < group->rows; ++i)
        for (Index j = 0; j < group->cols(); ++j) *out++ = S(group->number(i, j));
      return;
    }
    std::vector<float> numbers(static_cast<std::size_t>(size()));
    if (format == Format::mxfp4)
      read_mxfp4(values, scales, numbers.data());
    else
      read_block_scaled_fp8(values, scales, numbers.data());
    std::copy(numbers.begin(), numbers.end(), out);
  }

  /// Calls use(stored) with the stored numbers, if they are in blocks of a packed format: BlockScaledFP8,
  /// StoredMXFP4, GroupedBlocks or GGUFBlocks. Says whether they are. Throws CheckpointError where they do
  /// not fit their scales; `where` begins its message.
  template <InBlocks F, class Use>
  bool in_blocks_of(const char* where, const Use& use) const {
    if constexpr (std::is_same_v<F, FP8>)
      if (format == Format::block_scaled_fp8) {
        const BlockScaledFP8 stored(values, scales, where);
        if (stored.is_in_blocks()) use(stored);
        return stored.is_in_blocks();
      }
    if constexpr (std::is_same_v<F, MXFP4>)
      if (format == Format::mxfp4) {
        use(StoredMXFP4(values, scales, where));
        return true;
      }
    if constexpr (OfIntegers<F>)
      if (format == Format::grouped) {
        const bool fits = group->fits<F>();
        if (fits) use(GroupedBlocks<F>(*group));
        return fits;
      }
    return format == Format::plain && io::in_gguf_blocks_of<F>(values, use, where);
  }

  /// Why the numbers cannot be read as S where they lie; empty where they can.
  template <class S>
  std::string why_not_in_place() const {
    const DType here = *io::dtype_of<S>();
    if (format != Format::plain) return "scaled in blocks" + formats();
    if (values.dtype != here)
      return std::string(name_of(values.dtype)) + ", not " + std::string(name_of(here));
    return is_readable_in_place<S>(values) ? "" : "misaligned";
  }

 private:
  // Which packed formats keep the numbers of groups.
  std::string formats() const {
    if (format != Format::grouped) return "";
    std::string names;
    const auto add = [&names](bool fits, const char* name) {
      if (fits) names += (names.empty() ? ", as in " : " and ") + std::string(name);
    };
    add(group->fits<Int4>(), "Int4");
    add(group->fits<Int4Offset>(), "Int4Offset");
    add(group->fits<Int8>(), "Int8");
    return names.empty() ? ", as in no packed format" : names;
  }

  [[noreturn]] void fail_stacked(Index count, const char* where) const {
    if (format == Format::grouped)
      throw CheckpointError(std::string(where) + ": " + values.name + " has scales of groups and holds " +
                            std::to_string(count) + " experts, expected 1");
    throw CheckpointError(std::string(where) + ": " + values.name + " holds " + std::to_string(count) +
                          " experts and " + scales.name + " has shape " + io::text_of(scales.shape) +
                          ", expected " + std::to_string(count) + " first");
  }

  static void cut(TensorView& tensor, Index index, Index count, std::vector<Index> shape) {
    const std::size_t size = tensor.bytes.size() / std::size_t(count);
    tensor.bytes = tensor.bytes.subspan(std::size_t(index) * size, size);
    tensor.shape = std::move(shape);
  }
};

}  // namespace moe
