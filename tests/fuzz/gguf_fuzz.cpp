// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <moe/io/gguf.hpp>
#include <moe/io/gguf_blocks.hpp>

// libFuzzer: whatever the bytes are, a reader throws CheckpointError or gives views that lie within them,
// each byte in one of them, whose numbers can be read.
namespace {

void check(bool ok) {
  if (!ok) std::abort();
}

void read_blocks(const moe::TensorView& tensor) {
  const auto read_all = [&](const auto& stored) {
    const moe::Index cols = tensor.shape.back(), rows = cols == 0 ? 0 : tensor.size() / cols;
    for (moe::Index i = 0; i < rows; ++i)
      for (moe::Index nth = 0; nth < cols / 32; ++nth) stored.block(i, nth);
  };
  const bool is_kept = moe::io::in_gguf_blocks_of<moe::Int8>(tensor, read_all, "fuzz") ||
                       moe::io::in_gguf_blocks_of<moe::Int4>(tensor, read_all, "fuzz") ||
                       moe::io::in_gguf_blocks_of<moe::Int4Offset>(tensor, read_all, "fuzz") ||
                       moe::io::in_gguf_blocks_of<moe::MXFP4>(tensor, read_all, "fuzz");
  check(!is_kept || moe::numbers_of(tensor.dtype) > 1);
}

void expect_views_within(const moe::io::Header& header, std::span<const std::byte> file) {
  std::size_t sum = 0;
  const auto expect_within = [&](std::span<const std::byte> bytes) {
    check(bytes.data() >= file.data());
    check(bytes.data() + bytes.size() <= file.data() + file.size());
    sum += bytes.size();
  };
  for (const auto& [name, tensor] : header.unread) {
    check(!header.tensors.contains(name));
    expect_within(tensor.bytes);
  }
  for (const auto& [name, tensor] : header.tensors) {
    check(name == tensor.name && tensor.shape.size() <= 4);
    check(tensor.bytes.size() ==
          std::size_t(tensor.size() / moe::numbers_of(tensor.dtype)) * moe::size_of(tensor.dtype));
    expect_within(tensor.bytes);
    std::vector<double> numbers(std::size_t(tensor.size()));
    std::vector<std::int64_t> integers(std::size_t(tensor.size()));
    try {
      moe::read_tensor(tensor, numbers.data());
    } catch (const moe::CheckpointError&) {
      moe::read_tensor(tensor, integers.data());
    }
    read_blocks(tensor);
  }
  check(sum < file.size());
}

// What the reader does with these bytes.
void read(std::span<const std::byte> file) {
  try {
    const moe::io::Header header = moe::io::parse_gguf(file, "input");
    expect_views_within(header, file);
    std::set<std::string> seen;
    moe::io::check_split(header, 1, seen, "input");
  } catch (const moe::CheckpointError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* input, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(input, size));
  read(bytes);
  // The same behind a magic number and a version that are right.
  std::vector<std::byte> file{std::byte('G'), std::byte('G'), std::byte('U'), std::byte('F'),
                              std::byte(3),   std::byte(0),   std::byte(0),   std::byte(0)};
  file.insert(file.end(), bytes.begin(), bytes.end());
  read(file);
  return 0;
}
