// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <moe/io/quantisation.hpp>
#include <moe/io/safetensors.hpp>
#include <moe/io/shards.hpp>

// libFuzzer: whatever the bytes are, a reader throws CheckpointError or gives views that lie within
// them; and what was read can be written and read again.
namespace {

void check(bool ok) {
  if (!ok) std::abort();
}

void expect_views_within(const moe::io::Header& header, std::span<const std::byte> data) {
  std::size_t sum = 0;
  const auto expect_within = [&](std::span<const std::byte> bytes) {
    check(bytes.data() >= data.data());
    check(bytes.data() + bytes.size() <= data.data() + data.size());
    sum += bytes.size();
  };
  for (const auto& [name, tensor] : header.unread) {
    check(!header.tensors.contains(name));
    check(!moe::io::dtype_named(tensor.dtype));
    expect_within(tensor.bytes);
  }
  for (const auto& [name, tensor] : header.tensors) {
    check(name == tensor.name);
    check(tensor.bytes.size() == std::size_t(tensor.size()) * moe::size_of(tensor.dtype));
    expect_within(tensor.bytes);
    std::vector<double> numbers(std::size_t(tensor.size()));
    std::vector<std::int64_t> integers(std::size_t(tensor.size()));
    try {
      moe::read_tensor(tensor, numbers.data());
    } catch (const moe::CheckpointError&) {
      try {
        moe::read_tensor(tensor, integers.data());
      } catch (const moe::CheckpointError&) {
        check(tensor.dtype == moe::DType::U64);
      }
    }
  }
  check(sum == data.size());
}

void expect_round_trip(const moe::io::Header& header) {
  std::vector<moe::TensorToWrite> tensors;
  for (const auto& [name, tensor] : header.tensors) tensors.push_back(tensor);
  const moe::io::FileLayout layout = moe::io::layout_of(tensors, header.metadata, "written");
  std::vector<std::byte> file;
  const auto append = [&](std::span<const std::byte> part) {
    file.insert(file.end(), part.begin(), part.end());
  };
  append(std::as_bytes(std::span(layout.head)));
  for (const moe::TensorToWrite* tensor : layout.tensors) append(tensor->bytes);
  const moe::io::Header again = moe::io::parse_safetensors(file, "written");
  check(again.metadata == header.metadata);
  check(again.tensors.size() == header.tensors.size());
  for (const auto& [name, tensor] : header.tensors) {
    const moe::TensorView& other = again.tensors.at(name);
    check(other.dtype == tensor.dtype && other.shape == tensor.shape);
    check(std::ranges::equal(other.bytes, tensor.bytes));
  }
}

// The header that `read` gives, or nothing where it refuses.
template <class Read>
std::optional<moe::io::Header> header_of(const Read& read) {
  try {
    return read();
  } catch (const moe::CheckpointError&) {
    return std::nullopt;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* input, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(input, size));
  // A whole file.
  if (const auto header = header_of([&] { return moe::io::parse_safetensors(bytes, "input"); })) {
    const auto length = moe::io::load<std::uint64_t>(bytes, 0);
    expect_views_within(*header, bytes.subspan(8 + std::size_t(length)));
    expect_round_trip(*header);
  }
  // A header behind one byte, which says how many bytes of data there are: no length to guess.
  if (!bytes.empty()) {
    const auto data = std::vector<std::byte>(std::size_t(bytes[0]));
    const auto json = moe::io::text_at(bytes.subspan(1));
    if (const auto header = header_of([&] { return moe::io::parse_header(json, data, "input"); })) {
      expect_views_within(*header, data);
      expect_round_trip(*header);
    }
  }
  // What a model says of its weights.
  try {
    moe::io::parse_quantisation(bytes, "input");
  } catch (const moe::CheckpointError&) {
  }
  // An index.
  try {
    for (const auto& [name, shard] : moe::io::parse_index(bytes, "input")) {
      try {
        const auto path = moe::io::shard_path("/a/b/index.json", name, shard);
        check(path.lexically_normal().string().starts_with("/a/b/"));
      } catch (const moe::CheckpointError&) {
      }
    }
  } catch (const moe::CheckpointError&) {
  }
  return 0;
}
