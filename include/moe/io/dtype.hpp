// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/types.hpp>
#include <moe/io/block_types.hpp>

// Tensors as checkpoint files hold them, bytes with a type and a shape; read_tensor.hpp makes numbers of
// them. Nothing here knows a file format.
namespace moe {

/// What every function of io/* throws for a file that cannot be read, written or trusted. The
/// message names the file and the tensor where there is one, and holds the numbers that matter.
class CheckpointError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The types of elements, with the names that safetensors files give them; then the types of numbers in
/// blocks, with the names that GGUF files give them, see io/block_types.hpp.
enum class DType : std::uint8_t {
  F64,
  F32,
  F16,
  BF16,     ///< the upper half of an F32
  F8_E4M3,  ///< no infinities, one NaN of each sign ("e4m3fn")
  F8_E5M2,  ///< the upper half of an F16
  F8_E8M0,  ///< a power of two without a sign, or NaN: scales
  I64,
  I32,
  I16,
  I8,
  U64,
  U32,
  U16,
  U8,
  BOOL,
  Q8_0,
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q4_K,
  Q5_K,
  Q6_K,
  IQ4_NL,
  MXFP4,
};

namespace io {

template <class... Parts>
[[noreturn]] void fail_checkpoint(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw CheckpointError(message.str());
}

template <class... Parts>
void require_checkpoint(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail_checkpoint(parts...);
}

// Text from a file, fit for a message: printable and of a length that one can read.
inline std::string printable(std::string_view text, std::size_t max_length = 200) {
  std::string result;
  for (const char c : text.substr(0, max_length)) {
    const auto byte = static_cast<unsigned char>(c);
    result += byte < 0x20 || byte > 0x7e ? '?' : c;
  }
  if (text.size() > max_length) result += "...";
  return result;
}

inline std::string in_quotes(std::string_view name) { return "'" + printable(name) + "'"; }

inline std::string text_of(std::span<const Index> shape) {
  constexpr std::size_t kMaxDimensions = 8;
  std::ostringstream text;
  text << '[';
  for (std::size_t i = 0; i < shape.size() && i < kMaxDimensions; ++i)
    text << (i > 0 ? ", " : "") << shape[i];
  text << (shape.size() > kMaxDimensions ? ", ...]" : "]");
  return text.str();
}

struct DTypeInfo {
  DType dtype;
  const char* name;
  std::size_t size;   // of a block
  Index numbers = 1;  // in a block
};

inline constexpr std::array<DTypeInfo, 26> kDTypes{{
    {DType::F64, "F64", 8},
    {DType::F32, "F32", 4},
    {DType::F16, "F16", 2},
    {DType::BF16, "BF16", 2},
    {DType::F8_E4M3, "F8_E4M3", 1},
    {DType::F8_E5M2, "F8_E5M2", 1},
    {DType::F8_E8M0, "F8_E8M0", 1},
    {DType::I64, "I64", 8},
    {DType::I32, "I32", 4},
    {DType::I16, "I16", 2},
    {DType::I8, "I8", 1},
    {DType::U64, "U64", 8},
    {DType::U32, "U32", 4},
    {DType::U16, "U16", 2},
    {DType::U8, "U8", 1},
    {DType::BOOL, "BOOL", 1},
    {DType::Q8_0, "Q8_0", Q8_0::kBytes, Q8_0::kNumbers},
    {DType::Q4_0, "Q4_0", Q4_0::kBytes, Q4_0::kNumbers},
    {DType::Q4_1, "Q4_1", Q4_1::kBytes, Q4_1::kNumbers},
    {DType::Q5_0, "Q5_0", Q5_0::kBytes, Q5_0::kNumbers},
    {DType::Q5_1, "Q5_1", Q5_1::kBytes, Q5_1::kNumbers},
    {DType::Q4_K, "Q4_K", Q4_K::kBytes, Q4_K::kNumbers},
    {DType::Q5_K, "Q5_K", Q5_K::kBytes, Q5_K::kNumbers},
    {DType::Q6_K, "Q6_K", Q6_K::kBytes, Q6_K::kNumbers},
    {DType::IQ4_NL, "IQ4_NL", IQ4_NL::kBytes, IQ4_NL::kNumbers},
    {DType::MXFP4, "MXFP4", StoredFP4::kBytes, StoredFP4::kNumbers},
}};

inline const DTypeInfo& info_of(DType dtype) {
  for (const DTypeInfo& info : kDTypes)
    if (info.dtype == dtype) return info;
  fail_checkpoint("DType ", int(dtype), " does not exist");
}

// The type of single elements that safetensors files call so.
inline std::optional<DType> dtype_named(std::string_view name) {
  for (const DTypeInfo& info : kDTypes)
    if (info.name == name && info.numbers == 1) return info.dtype;
  return std::nullopt;
}

// Elements of a shape. Nothing where a dimension is negative, or where the product of those that
// are not zero overflows: so the product of any of them can be trusted, in any order.
inline std::optional<Index> num_elements(std::span<const Index> shape) {
  Index product = 1;
  bool empty = false;
  for (const Index n : shape) {
    if (n < 0) return std::nullopt;
    if (n == 0)
      empty = true;
    else if (product > (std::numeric_limits<Index>::max)() / n)
      return std::nullopt;
    else
      product *= n;
  }
  return empty ? 0 : product;
}

}  // namespace io

/// Bytes of one element, or of one block.
inline std::size_t size_of(DType dtype) { return io::info_of(dtype).size; }

/// Numbers of one block; 1 for types of single elements. A row of a tensor is a multiple of it.
inline Index numbers_of(DType dtype) { return io::info_of(dtype).numbers; }

/// The name in files, e.g. "BF16".
inline std::string_view name_of(DType dtype) { return io::info_of(dtype).name; }

namespace io {

// Bytes of a tensor, whose rows are whole blocks, or nothing where the shape is none or they are too many to
// count.
inline std::optional<std::size_t> num_bytes(DType dtype, std::span<const Index> shape) {
  const std::optional<Index> elements = num_elements(shape);
  if (!elements) return std::nullopt;
  const std::size_t size = size_of(dtype), blocks = std::size_t(*elements / numbers_of(dtype));
  if (blocks > std::size_t((std::numeric_limits<Index>::max)()) / size) return std::nullopt;
  return blocks * size;
}

}  // namespace io

/// A tensor in memory that belongs to somebody else: row-major, little-endian, at any address.
struct TensorView {
  std::string name;                  ///< of the tensor in its file
  DType dtype = DType::F32;          ///< of its elements
  std::vector<Index> shape;          ///< [] is a scalar; a dimension may be 0
  std::span<const std::byte> bytes;  ///< of its elements, or of its blocks, row after row

  /// Number of elements. O(dimensions). Throws CheckpointError where a dimension is negative or the
  /// product overflows; a view from a Checkpoint has no such shape.
  Index size() const {
    const std::optional<Index> elements = io::num_elements(shape);
    if (!elements)
      io::fail_checkpoint("tensor ", io::in_quotes(name), ": no memory holds the shape ", io::text_of(shape));
    return *elements;
  }
};

namespace io {

inline std::string description_of(const TensorView& tensor) {
  return "tensor " + in_quotes(tensor.name) + ", " + std::string(name_of(tensor.dtype)) + " " +
         text_of(tensor.shape);
}

// Throws unless the rows of a tensor are whole blocks.
inline void check_blocks(const TensorView& tensor, std::string_view where) {
  const Index row = tensor.shape.empty() ? 1 : tensor.shape.back(), numbers = numbers_of(tensor.dtype);
  if (row % numbers != 0)
    fail_checkpoint(where, ": ", description_of(tensor), " has rows of ", row,
                    " numbers, expected a multiple of ", numbers);
}

// Throws unless the bytes of a view are as many as its shape says.
inline void check_bytes(const TensorView& tensor, std::string_view where) {
  check_blocks(tensor, where);
  const std::optional<std::size_t> expected = num_bytes(tensor.dtype, tensor.shape);
  if (!expected) fail_checkpoint(where, ": ", description_of(tensor), ": no memory holds this shape");
  if (tensor.bytes.size() != *expected)
    fail_checkpoint(where, ": ", description_of(tensor), " has ", tensor.bytes.size(), " bytes, expected ",
                    *expected);
}

// The bytes are read as they lie.
inline void require_little_endian() {
  require_checkpoint(std::endian::native == std::endian::little,
                     "checkpoints are little-endian and this machine is not: there is no code that "
                     "swaps bytes");
}

// Element i of memory at any address.
template <class T>
T load(std::span<const std::byte> bytes, Index i) {
  T value;
  std::memcpy(&value, bytes.data() + std::size_t(i) * sizeof(T), sizeof(T));
  return value;
}

// The dtype whose elements are S.
template <class S>
constexpr std::optional<DType> dtype_of() {
  if constexpr (std::same_as<S, double>)
    return DType::F64;
  else if constexpr (std::same_as<S, float>)
    return DType::F32;
  else if constexpr (std::same_as<S, std::int64_t>)
    return DType::I64;
  else if constexpr (std::same_as<S, std::int32_t>)
    return DType::I32;
  else if constexpr (std::same_as<S, std::int16_t>)
    return DType::I16;
  else if constexpr (std::same_as<S, std::int8_t>)
    return DType::I8;
  else if constexpr (std::same_as<S, std::uint64_t>)
    return DType::U64;
  else if constexpr (std::same_as<S, std::uint32_t>)
    return DType::U32;
  else if constexpr (std::same_as<S, std::uint16_t>)
    return DType::U16;
  else if constexpr (std::same_as<S, std::uint8_t>)
    return DType::U8;
  else
    return std::nullopt;
}

}  // namespace io

/// Whether tensor.bytes may be used as an array of S where they lie: the dtype is S, and the
/// address is aligned for S. O(1).
template <class S>
bool is_readable_in_place(const TensorView& tensor) {
  static_assert(io::dtype_of<S>().has_value(), "no dtype has elements of this type");
  return std::endian::native == std::endian::little && tensor.dtype == io::dtype_of<S>() &&
         reinterpret_cast<std::uintptr_t>(tensor.bytes.data()) % alignof(S) == 0;
}

}  // namespace moe
