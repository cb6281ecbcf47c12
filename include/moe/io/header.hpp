// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include <moe/io/dtype.hpp>

// What is known of a file of tensors after its header was read, whichever format it has.
namespace moe::io {

/// A tensor of a type that DType does not have. How many bytes its shape has is not known.
struct UnreadTensor {
  std::string dtype{};
  std::span<const std::byte> bytes{};
};

/// What a file of tensors says about itself.
struct Header {
  std::map<std::string, TensorView, std::less<>> tensors{};
  std::map<std::string, UnreadTensor, std::less<>> unread{};

  std::map<std::string, std::string> metadata{};
  bool is_gguf = false;

  bool contains(std::string_view name) const { return tensors.contains(name) || unread.contains(name); }
};

}  // namespace moe::io
