// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io/dtype.hpp>

// Files made by hand, and errors with what their messages must hold.
namespace io_test {

/// A directory of its own, removed at the end of the scope.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::random_device seed;
    do {
      path_ = std::filesystem::temp_directory_path() / ("moe_io_test_" + std::to_string(seed()));
    } while (!std::filesystem::create_directory(path_));
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

inline void write_text(const std::filesystem::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary) << text;
}

inline std::string text_in(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline std::vector<std::byte> bytes_of(std::string_view text) {
  std::vector<std::byte> bytes(text.size());
  if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

template <class T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}

/// The 8 bytes of a length.
inline std::string length_bytes(std::uint64_t length) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += char(length >> (8 * i) & 0xff);
  return bytes;
}

/// A safetensors file with this header, as it is, and so many bytes of data: 0, 1, 2, ...
inline std::string file_of(std::string_view header, std::size_t data_bytes) {
  std::string file = length_bytes(header.size()) + std::string(header);
  for (std::size_t i = 0; i < data_bytes; ++i) file += char(i & 0xff);
  return file;
}

/// What Python's safetensors 0.8.0 wrote for
///   {"a.weight": [[1, -2], [.5, 3]] in F32, "z": 7 in I64, "h": [1.5, -.25, 65504] in F16,
///    "bf": [3.140625] in BF16, "none": an F32 [0, 4], "q": [True, False, True]}
/// with the metadata {"format": "pt"}.
inline std::string file_by_python() {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"z":{"dtype":"I64","shape":[],"data_offsets":[0,8]},)"
      R"("a.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]},)"
      R"("none":{"dtype":"F32","shape":[0,4],"data_offsets":[24,24]},)"
      R"("bf":{"dtype":"BF16","shape":[1],"data_offsets":[24,26]},)"
      R"("h":{"dtype":"F16","shape":[3],"data_offsets":[26,32]},)"
      R"("q":{"dtype":"BOOL","shape":[3],"data_offsets":[32,35]}} )";
  const unsigned char data[] = {0x07, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x80, 0x3f,
                                0x00, 0x00, 0x00, 0xc0, 0x00, 0x00, 0x00, 0x3f, 0x00, 0x00, 0x40, 0x40,
                                0x49, 0x40, 0x00, 0x3e, 0x00, 0xb4, 0xff, 0x7b, 0x01, 0x00, 0x01};
  std::string file("\x78\x01\0\0\0\0\0\0", 8);
  file += header;
  for (const unsigned char byte : data) file += char(byte);
  return file;
}

/// Expects a CheckpointError whose message holds every part.
template <class Call>
void expect_error(const std::string& name, const Call& call, const std::vector<std::string>& parts) {
  try {
    call();
    ADD_FAILURE() << name << ": nothing was thrown";
  } catch (const moe::CheckpointError& error) {
    const std::string message = error.what();
    for (const std::string& part : parts)
      EXPECT_NE(message.find(part), std::string::npos)
          << name << ": \"" << message << "\" has no \"" << part << '"';
    EXPECT_LT(message.size(), 1000u) << name;
  } catch (const std::exception& error) {
    ADD_FAILURE() << name << ": another exception: " << error.what();
  }
}

}  // namespace io_test
