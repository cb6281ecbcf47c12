// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io/checkpoint.hpp>

#include "io/files.hpp"

// GGUF files made by hand, right and wrong ones.
namespace io_test {

/// The bytes of a value.
template <class T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}
/// A string as GGUF files have it.
inline std::string raw_text(std::string_view text) {
  return raw(std::uint64_t(text.size())) + std::string(text);
}

/// A GGUF file.
struct GGUFFile {
  std::uint32_t version = 3;
  std::size_t alignment = 32;
  std::uint64_t num_pairs = 0, num_tensors = 0;
  std::string pairs{}, infos{}, data{};

  /// A key with a value of this type, which is these bytes.
  void pair(std::string_view key, std::uint32_t type, const std::string& value) {
    pairs += raw_text(key) + raw(type) + value;
    ++num_pairs;
  }
  void architecture(std::string_view name) { pair("general.architecture", 8, raw_text(name)); }
  /// What is said of a tensor; the innermost dimension first.
  void info(std::string_view name, const std::vector<std::uint64_t>& dimensions, std::uint32_t type,
            std::uint64_t offset) {
    infos += raw_text(name) + raw(std::uint32_t(dimensions.size()));
    for (const std::uint64_t n : dimensions) infos += raw(n);
    infos += raw(type) + raw(offset);
    ++num_tensors;
  }
  /// A tensor behind the others; the innermost dimension last.
  template <class T>
  void tensor(std::string_view name, const std::vector<moe::Index>& shape, std::uint32_t type,
              const std::vector<T>& values) {
    info(name, {shape.rbegin(), shape.rend()}, type, data.size());
    data.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
    align(data);
  }

  void align(std::string& bytes) const {
    bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
  }
  std::string header() const {
    return "GGUF" + raw(version) + raw(num_tensors) + raw(num_pairs) + pairs + infos;
  }
  std::string bytes() const {
    std::string file = header();
    align(file);
    return file + data;
  }
  /// Written to a file of the test's name and opened.
  moe::Checkpoint open() const {
    const auto* const test = testing::UnitTest::GetInstance()->current_test_info();
    const std::string path = testing::TempDir() + test->test_suite_name() + "." + test->name() + ".gguf";
    write_text(path, bytes());
    return moe::Checkpoint::open(path);
  }
};

}  // namespace io_test
