// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include <moe/core/types.hpp>
#include <moe/io/block_types.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/small_floats.hpp>

// How the bytes of a tensor become numbers.
namespace moe {

namespace io {

template <class Stored, class S, class Convert>
void convert_each(const TensorView& tensor, S* out, Convert convert) {
  const Index n = tensor.size();
  for (Index i = 0; i < n; ++i) out[i] = S(convert(load<Stored>(tensor.bytes, i)));
}

// Reads a tensor of blocks. True.
template <class B, class S>
bool read_blocks(const TensorView& tensor, S* out) {
  const std::byte* const end = tensor.bytes.data() + tensor.bytes.size();
  for (const std::byte* block = tensor.bytes.data(); block != end; block += B::kBytes, out += B::kNumbers)
    read_block<B>(block, out);
  return true;
}

// Reads a floating-point tensor. False where the dtype is none.
template <std::floating_point S>
bool read_converted(const TensorView& tensor, S* out) {
  const auto as_it_is = [](auto value) { return value; };
  switch (tensor.dtype) {
    case DType::F64:
      convert_each<double>(tensor, out, as_it_is);
      return true;
    case DType::F32:
      convert_each<float>(tensor, out, as_it_is);
      return true;
    case DType::F16:
      convert_each<std::uint16_t>(tensor, out, float_of_f16);
      return true;
    case DType::BF16:
      convert_each<std::uint16_t>(tensor, out, float_of_bf16);
      return true;
    case DType::F8_E4M3:
      convert_each<std::uint8_t>(tensor, out, [](std::uint8_t bits) { return kE4M3[bits]; });
      return true;
    case DType::F8_E5M2:
      convert_each<std::uint8_t>(tensor, out, [](std::uint8_t bits) { return kE5M2[bits]; });
      return true;
    case DType::F8_E8M0:
      convert_each<std::uint8_t>(tensor, out, [](std::uint8_t bits) { return kE8M0[bits]; });
      return true;
    case DType::Q8_0:
      return read_blocks<Q8_0>(tensor, out);
    case DType::Q4_0:
      return read_blocks<Q4_0>(tensor, out);
    case DType::Q4_1:
      return read_blocks<Q4_1>(tensor, out);
    case DType::Q5_0:
      return read_blocks<Q5_0>(tensor, out);
    case DType::Q5_1:
      return read_blocks<Q5_1>(tensor, out);
    case DType::Q4_K:
      return read_blocks<Q4_K>(tensor, out);
    case DType::Q5_K:
      return read_blocks<Q5_K>(tensor, out);
    case DType::Q6_K:
      return read_blocks<Q6_K>(tensor, out);
    case DType::IQ4_NL:
      return read_blocks<IQ4_NL>(tensor, out);
    case DType::MXFP4:
      return read_blocks<StoredFP4>(tensor, out);
    default:
      return false;
  }
}

// Reads a tensor of integers. False where the dtype is none.
inline bool read_converted(const TensorView& tensor, std::int64_t* out) {
  const auto as_it_is = [](auto value) { return value; };
  switch (tensor.dtype) {
    case DType::I64:
      convert_each<std::int64_t>(tensor, out, as_it_is);
      return true;
    case DType::I32:
      convert_each<std::int32_t>(tensor, out, as_it_is);
      return true;
    case DType::I16:
      convert_each<std::int16_t>(tensor, out, as_it_is);
      return true;
    case DType::I8:
      convert_each<std::int8_t>(tensor, out, as_it_is);
      return true;
    case DType::U64:
      for (Index i = 0, n = tensor.size(); i < n; ++i) {
        const auto value = load<std::uint64_t>(tensor.bytes, i);
        if (!std::in_range<std::int64_t>(value))
          fail_checkpoint("read_tensor: ", description_of(tensor), ": element ", i, " is ", value,
                          ", more than ", (std::numeric_limits<std::int64_t>::max)());
      }
      convert_each<std::uint64_t>(tensor, out, as_it_is);
      return true;
    case DType::U32:
      convert_each<std::uint32_t>(tensor, out, as_it_is);
      return true;
    case DType::U16:
      convert_each<std::uint16_t>(tensor, out, as_it_is);
      return true;
    case DType::U8:
      convert_each<std::uint8_t>(tensor, out, as_it_is);
      return true;
    case DType::BOOL:
      convert_each<std::uint8_t>(tensor, out, [](std::uint8_t value) { return value != 0; });
      return true;
    default:
      return false;
  }
}

}  // namespace io

/// Writes the numbers of a tensor to out [tensor.size()], row-major. A float or double takes the
/// floating-point dtypes (what is narrower is exact, F64 to float rounds to nearest, ties to even) and blocks
/// (their floats, each rounded once at most), std::int64_t takes integers and BOOL (as 0 and 1). NaN stays
/// NaN, infinities and zeros keep their sign, a copy without conversion keeps every bit. O(size). Throws
/// CheckpointError, and writes nothing, for any other dtype, for bytes that do not fit the shape and for a
/// U64 that does not fit.
template <class S>
void read_tensor(const TensorView& tensor, S* out) {
  static_assert(std::same_as<S, float> || std::same_as<S, double> || std::same_as<S, std::int64_t>,
                "read_tensor reads float, double or std::int64_t");
  io::require_little_endian();
  io::check_bytes(tensor, "read_tensor");
  if (tensor.dtype == io::dtype_of<S>()) {  // no register in between that would quieten a NaN
    if (!tensor.bytes.empty()) std::memcpy(out, tensor.bytes.data(), tensor.bytes.size());
    return;
  }
  if (!io::read_converted(tensor, out))
    io::fail_checkpoint("read_tensor: ", io::description_of(tensor), " does not convert to ",
                        name_of(*io::dtype_of<S>()));
}

}  // namespace moe
