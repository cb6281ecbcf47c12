// SPDX-License-Identifier: MIT
#pragma once

#include <charconv>
#include <limits>
#include <locale>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>

#include <moe/core/types.hpp>
#include <moe/io/options.hpp>

// Options out of text: what option_text writes is read as the value that was written.
namespace moe::io {

inline bool read_option(const std::string& text, bool& value) {
  value = text == "true";
  return value || text == "false";
}
inline bool read_option(const std::string& text, Index& value) {
  const char* const end = text.data() + text.size();
  const auto [read, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && read == end;
}
template <class S>
requires std::is_floating_point_v<S>
bool read_option(const std::string& text, S& value) {
  if (text == "inf" || text == "-inf") {
    value = (text[0] == '-' ? -1 : 1) * std::numeric_limits<S>::infinity();
    return true;
  }
  std::istringstream stream(text);
  stream.imbue(std::locale::classic());
  return stream >> value && stream.peek() == std::istringstream::traits_type::eof();
}
inline bool read_option(const std::string& text, std::optional<double>& value) {
  value.reset();
  return text == "none" || read_option(text, value.emplace());
}
template <class E>
requires std::is_enum_v<E>
bool read_option(const std::string& text, E& value) {
  for (int i = 0; enumerator(E(i)) != nullptr; ++i)
    if (text == enumerator(E(i))) {
      value = E(i);
      return true;
    }
  return false;
}

// Options from what options_text or LeaveDefaultsOut made of them; those that the text does not name stay as
// they are, and what it names beside them is left alone. False where the text is no such list.
template <ListedOptions Options>
bool read_options(std::string_view text, Options& options) {
  const auto given = parse_options(text);
  bool all_read = given.has_value();
  visit_options(options, [&]<class T>(const char* name, T& value) {
    if constexpr (!std::is_const_v<T>) {
      if (!all_read) return;
      const auto at = given->find(name);
      if (at != given->end()) all_read = read_option(at->second, value);
    }
  });
  return all_read;
}

}  // namespace moe::io
