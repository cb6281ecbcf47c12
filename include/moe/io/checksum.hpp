// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

// A checksum that says whether bytes are those that were written. It is fast, not secret.
namespace moe::io {

/// A step of the checksum: FNV-1a's of 64 bits, then the upper bits are brought to the lower ones. For a
/// given word it is one to one, and for a given sum it is, too: one changed word always changes the checksum.
inline std::uint64_t add_to_checksum(std::uint64_t sum, std::uint64_t word) {
  sum = (sum ^ word) * 0x100000001B3u;
  return sum ^ (sum >> 32);
}

/// The checksum of bytes: words of 8 bytes, little-endian, in four chains that take turns; the last word is
/// filled up with zeros; then the four sums and the number of bytes. 16 hexadecimal digits. O(bytes).
inline std::string checksum_of(std::span<const std::byte> bytes) {
  constexpr std::uint64_t kBegin = 0xCBF29CE484222325u;
  std::array<std::uint64_t, 4> sums;
  sums.fill(kBegin);
  const std::size_t words = bytes.size() / 8;
  const auto word_at = [&](std::size_t i, std::size_t count) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + 8 * i, count);
    return word;
  };
  std::size_t i = 0;
  for (; i + 4 <= words; i += 4)
    for (std::size_t k = 0; k < 4; ++k) sums[k] = add_to_checksum(sums[k], word_at(i + k, 8));
  for (; i < words; ++i) sums[i % 4] = add_to_checksum(sums[i % 4], word_at(i, 8));
  if (bytes.size() % 8 != 0) sums[i % 4] = add_to_checksum(sums[i % 4], word_at(i, bytes.size() % 8));
  std::uint64_t sum = kBegin;
  for (const std::uint64_t chain : sums) sum = add_to_checksum(sum, chain);
  sum = add_to_checksum(sum, bytes.size());
  char digits[16];
  const auto [end, error] = std::to_chars(digits, digits + sizeof digits, sum, 16);
  const std::string text(digits, end);
  return std::string(sizeof digits - text.size(), '0') + text;
}

}  // namespace moe::io
