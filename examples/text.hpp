// SPDX-License-Identifier: MIT
#pragma once

// The text that the examples train on: bytes of several kinds, split by contiguous chunks.

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <moe/moe.hpp>

namespace examples {

using Byte = std::uint8_t;
using moe::Index;

inline constexpr Index kContext = 16;  // bytes that a prediction looks at
inline constexpr Index kBytes = 256;

// What the last byte of a context is.
inline constexpr std::array<const char*, 8> kByteClasses = {
    "lower case", "upper case", "digit", "space", "newline", "bracket", "punctuation", "other"};

inline std::size_t class_of(Byte byte) {
  const char c = char(byte);
  if (c >= 'a' && c <= 'z') return 0;
  if (c >= 'A' && c <= 'Z') return 1;
  if (c >= '0' && c <= '9') return 2;
  if (c == ' ') return 3;
  if (c == '\n') return 4;
  if (std::string("()[]{}<>").find(c) != std::string::npos) return 5;
  if (c > ' ' && c <= '~') return 6;
  return 7;
}

enum class Split { train, validation, test };

struct Text {
  std::vector<std::string> kinds;           // names
  std::vector<Byte> bytes;                  // of all kinds, one kind after the other
  std::vector<Byte> kind_of;                // [bytes]
  std::vector<Index> kind_begin = {0};      // first byte of every kind, then the number of bytes
  std::array<std::vector<Index>, 3> split;  // bytes to be predicted, ascending

  Index num_kinds() const { return Index(kinds.size()); }
  const std::vector<Index>& positions(Split which) const { return split[std::size_t(which)]; }

  // The entries of positions(which) that are of one kind: [first, last).
  std::array<Index, 2> range_of(Split which, Index kind) const {
    const std::vector<Index>& all = positions(which);
    const auto find = [&](Index byte) {
      return Index(std::lower_bound(all.begin(), all.end(), byte) - all.begin());
    };
    return {find(kind_begin[std::size_t(kind)]), find(kind_begin[std::size_t(kind) + 1])};
  }

  // Cuts a new kind into 50 chunks. Of every ten the ninth is for validation and the tenth for
  // test. The context of a byte lies in its own chunk: no split sees a byte of another.
  void add_kind(const std::string& name, const std::string& content) {
    constexpr Index kChunks = 50;
    const Index size = Index(content.size()), begin = Index(bytes.size());
    if (size < kChunks * 4 * kContext)
      throw std::runtime_error(name + " has " + std::to_string(size) + " bytes, expected at least " +
                               std::to_string(kChunks * 4 * kContext));
    if (kinds.size() == 255) throw std::runtime_error(name + " is one kind too many: at most 255");
    for (Index chunk = 0; chunk < kChunks; ++chunk) {
      const std::size_t which = chunk % 10 == 8 ? 1 : chunk % 10 == 9 ? 2 : 0;
      const Index end = begin + size * (chunk + 1) / kChunks;
      for (Index i = begin + size * chunk / kChunks + kContext; i < end; ++i) split[which].push_back(i);
    }
    kind_of.insert(kind_of.end(), content.size(), Byte(kinds.size()));
    bytes.insert(bytes.end(), content.begin(), content.end());
    kind_begin.push_back(Index(bytes.size()));
    kinds.push_back(name);
  }
};

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) throw std::runtime_error("cannot read " + path.string());
  std::string content{std::istreambuf_iterator<char>(file), {}};
  if (file.bad()) throw std::runtime_error("cannot read " + path.string());
  return content;
}

// Headers below `directory` in the order of their paths, until there are `limit` bytes.
inline std::string read_headers(const std::filesystem::path& directory, std::size_t limit) {
  std::error_code error;
  std::vector<std::string> paths;
  for (std::filesystem::recursive_directory_iterator it(directory, error), end; !error && it != end;
       it.increment(error))
    if (it->path().extension() == ".h") paths.push_back(it->path().generic_string());
  if (error) throw std::runtime_error("cannot read " + directory.string() + ": " + error.message());
  std::sort(paths.begin(), paths.end());
  std::string content;
  for (const std::string& path : paths) {
    if (content.size() >= limit) break;
    content += read_file(path);
  }
  content.resize(std::min(content.size(), limit));
  return content;
}

// The Bible, the Unicode character table, and Eigen's headers as C++; or the given files, each a
// kind.
inline Text load_text(const std::vector<std::string>& files = {}) {
  Text text;
  for (const std::string& file : files)
    text.add_kind(std::filesystem::path(file).filename().string(), read_file(file));
  if (!files.empty()) return text;
  const std::filesystem::path data = EXAMPLES_DATA_DIR;
  text.add_kind("Bible", read_file(data / "bible.txt"));
  text.add_kind("Unicode table", read_file(data / "unicode.txt"));
  const std::filesystem::path eigen = EIGEN_INCLUDE_DIR;
  text.add_kind("C++", read_headers(eigen / "Eigen" / "src", 450000));
  return text;
}

}  // namespace examples
