// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

// How the library refuses bad input: std::invalid_argument with every number that matters.
namespace moe {

/// Throws std::invalid_argument whose message is all arguments written one after the other.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

/// Throws unless `ok`. The message is built only then.
template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]] fail(parts...);
}

/// Throws unless a matrix has the expected shape: "where: what has shape [3, 5], expected [4, 5]".
template <class M>
void require_shape(const M& m, std::ptrdiff_t rows, std::ptrdiff_t cols, std::string_view where,
                   std::string_view what) {
  require(m.rows() == rows && m.cols() == cols, where, ": ", what, " has shape [", m.rows(), ", ",
          m.cols(), "], expected [", rows, ", ", cols, "]");
}

}  // namespace moe
