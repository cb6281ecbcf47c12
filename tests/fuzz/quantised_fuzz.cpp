// SPDX-License-Identifier: MIT
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moe/io/find_matrix.hpp>
#include <moe/io/safetensors.hpp>

// libFuzzer: whatever the types, shapes and values of the tensors of a quantised matrix are, find_matrix
// throws CheckpointError or gives a matrix whose numbers and blocks can be read.
namespace {

void check(bool ok) {
  if (!ok) std::abort();
}

// Bytes of the input one after the other, zeros behind them.
struct Input {
  std::span<const std::uint8_t> bytes;

  std::size_t below(std::size_t n) {
    const std::uint8_t byte = bytes.empty() ? std::uint8_t(0) : bytes.front();
    if (!bytes.empty()) bytes = bytes.subspan(1);
    return byte % n;
  }
};

// The tensors of a matrix "a.weight" in a file.
std::vector<std::byte> file_of(Input& input) {
  constexpr std::array<const char*, 16> kNames{"a.weight",
                                               "a.weight_scale",
                                               "a.weight_scale_inv",
                                               "a.scale",
                                               "a.weight_scale_2",
                                               "a.weight_zero_point",
                                               "a.weight_global_scale",
                                               "a.weight_packed",
                                               "a.weight_shape",
                                               "a.weight_g_idx",
                                               "a.qweight",
                                               "a.qzeros",
                                               "a.scales",
                                               "a.g_idx",
                                               "a.weight_blocks",
                                               "a.weight_scales"};
  constexpr std::array<moe::DType, 10> kTypes{
      moe::DType::I32,     moe::DType::U8,      moe::DType::I8,  moe::DType::F16,     moe::DType::BF16,
      moe::DType::F8_E4M3, moe::DType::F8_E8M0, moe::DType::F32, moe::DType::F8_E5M2, moe::DType::I64};
  constexpr std::array<moe::Index, 12> kSizes{0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 5, 33};
  std::vector<std::vector<std::byte>> data;
  std::vector<moe::TensorToWrite> tensors;
  data.reserve(kNames.size());
  for (const char* const name : kNames) {
    if (input.below(2) == 0) continue;
    const moe::DType dtype = kTypes[input.below(kTypes.size())];
    std::vector<moe::Index> shape(input.below(4));
    std::size_t size = moe::size_of(dtype);
    for (moe::Index& n : shape) {
      n = kSizes[input.below(kSizes.size())];
      size *= std::size_t(n);
    }
    std::vector<std::byte>& bytes = data.emplace_back(size);
    const std::size_t step = size_of(dtype), kind = input.below(3);
    for (std::size_t i = 0; i < size; ++i)
      if (kind == 1 || (kind == 2 && i % step == 0)) bytes[i] = std::byte(input.below(256));
    tensors.push_back({name, dtype, shape, bytes});
  }
  const moe::io::FileLayout layout = moe::io::layout_of(tensors, {}, "written");
  std::vector<std::byte> file;
  const auto append = [&](std::span<const std::byte> part) {
    file.insert(file.end(), part.begin(), part.end());
  };
  append(std::as_bytes(std::span(layout.head)));
  for (const moe::TensorToWrite* tensor : layout.tensors) append(tensor->bytes);
  return file;
}

template <moe::InBlocks F>
void read_blocks(const moe::StoredMatrix& matrix) {
  if (matrix.shape.size() != 2) return;
  matrix.in_blocks_of<F>("fuzz", [&](const auto& stored) {
    for (moe::Index i = 0; i < matrix.shape[0]; ++i)
      for (moe::Index nth = 0; nth < F::blocks(matrix.shape[1]); ++nth) stored.block(i, nth);
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* input, std::size_t size) {
  static const std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("moe_fuzz_" + std::to_string(getpid()) + ".safetensors");
  Input rest{{input, size}};
  const std::vector<std::byte> file = file_of(rest);
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(file.data()), std::streamsize(file.size()));
  try {
    const auto checkpoint = moe::Checkpoint::open(path);
    const moe::StoredMatrix matrix = moe::find_matrix(checkpoint, "a.weight", "fuzz");
    std::vector<float> numbers(std::size_t(matrix.size()));
    check(matrix.beside.size() <= 5);
    matrix.why_not_in_place<float>();
    read_blocks<moe::Int4>(matrix);
    read_blocks<moe::Int4Offset>(matrix);
    read_blocks<moe::Int8>(matrix);
    read_blocks<moe::FP8>(matrix);
    read_blocks<moe::MXFP4>(matrix);
    matrix.read(numbers.data());
  } catch (const moe::CheckpointError&) {
  }
  std::filesystem::remove(path);
  return 0;
}
