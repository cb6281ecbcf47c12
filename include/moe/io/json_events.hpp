// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include <moe/io/dtype.hpp>
#include <moe/io/file.hpp>

// JSON that is not believed: events, one by one, and what a file is that is not JSON.
namespace moe {

namespace io {

inline constexpr std::size_t kMaxHeaderBytes = 100'000'000;  // as in the reference implementation

inline std::string_view text_at(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Whether text begins so, whatever the case of its letters, after blanks and a mark of UTF-8.
inline bool begins_as(std::string_view text, std::string_view lower_case) {
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  text.remove_prefix((std::min)(text.find_first_not_of(" \t\r\n"), text.size()));
  return text.size() >= lower_case.size() &&
         std::equal(lower_case.begin(), lower_case.end(), text.begin(), [](char expected, char c) {
           return expected == (c >= 'A' && c <= 'Z' ? char(c - 'A' + 'a') : c);
         });
}

// What a file is instead of a safetensors file or an index, by its first bytes: what servers and tools leave
// where they did not bring the file, and other formats of weights. Empty where the bytes do not say. Short
// magic numbers could be the length of a header, too: this is for files that have none.
inline std::string other_format(std::span<const std::byte> bytes) {
  const std::string_view text = text_at(bytes);
  if (text.starts_with("version https://git-lfs.github.com/"))
    return "a Git LFS pointer, not the file: git lfs pull";
  if (begins_as(text, "<!doctype html") || begins_as(text, "<html")) return "an HTML page";
  if (text.starts_with("PK\x03\x04")) return "a zip archive, as PyTorch writes .bin and .pt";
  if (text.starts_with("\x1f\x8b")) return "a gzip file";
  if (text.starts_with("\x28\xb5\x2f\xfd")) return "a zstd file";
  if (text.starts_with("GGUF")) return "a GGUF file";
  if (text.starts_with("\x89HDF\r\n")) return "an HDF5 file";
  if (text.size() > 1 && text[0] == '\x80' && text[1] >= 2 && text[1] <= 5) return "a Python pickle";
  constexpr std::size_t kLengthBytes = 8, kShown = 60;
  const std::string_view begin = text.substr(0, kShown);
  const bool printable = std::all_of(begin.begin(), begin.end(), [](char c) {
    return (c >= ' ' && c <= '~') || c == '\n' || c == '\r' || c == '\t';
  });
  if (printable && begin.size() >= kLengthBytes) return "text that begins with " + in_quotes(begin);
  return "";
}

// Throws where the first bytes say what the file is.
inline void refuse_other_format(std::span<const std::byte> bytes, std::string_view where,
                                const char* expected) {
  const std::string found = other_format(bytes);
  if (!found.empty()) fail_checkpoint(where, ": the file is ", found, ", expected ", expected);
}

/// What the two JSON readers share. Events come one by one, so what nests deeply needs no stack,
/// and a key that comes twice is seen. Every problem is a CheckpointError thrown from the event.
class JsonEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return scalar("null"); }
  bool boolean(bool value) override { return scalar(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override {
    return scalar(value == 0 ? "-0" : std::to_string(value));  // only negative ones come here
  }
  bool number_unsigned(number_unsigned_t value) override { return scalar(std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return scalar(text); }
  bool string(string_t& value) override { return scalar("the string " + in_quotes(value)); }
  bool binary(binary_t&) override { return scalar("binary data"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    fail_checkpoint(where_, ": ", what_, " is not JSON in UTF-8: byte ", position, ": ",
                    printable(error.what()));
  }

 protected:
  JsonEvents(std::string_view where, const char* what) : where_(where), what_(what) {}

  // A value that is neither an object nor an array and has no meaning of its own.
  virtual bool scalar(const std::string& found) = 0;

  template <class... Parts>
  [[noreturn]] void fail_here(const Parts&... parts) const {
    fail_checkpoint(where_, ": ", parts...);
  }

 private:
  std::string where_;
  const char* what_;
};

// Sends all of `json` to `events`.
inline void parse_json(std::string_view json, JsonEvents& events, std::string_view where, const char* what) {
  // The parser would take a zero byte for the end, and skip the mark of UTF-8 at the beginning.
  const std::size_t zero = json.find('\0');
  require_checkpoint(zero == std::string_view::npos, where, ": ", what, " is not JSON in UTF-8: byte ", zero,
                     " is 0");
  if (!json.starts_with('{'))
    fail_checkpoint(where, ": ", what, " is not a JSON object: it begins with ",
                    json.empty() ? "nothing" : in_quotes(json.substr(0, 1)), ", expected '{'");
  nlohmann::json::sax_parse(json.begin(), json.end(), &events);
}

}  // namespace io

}  // namespace moe
