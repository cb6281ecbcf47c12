// SPDX-License-Identifier: MIT
// The portable kernels give a row the same bits whatever rows are beside it, also where the compiler may fuse
// multiplications with additions. Prints what differs.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <moe/kernels/select.hpp>
#include <moe/packed/bf16.hpp>
#include <moe/packed/float32.hpp>

namespace {

using moe::Index;

std::vector<float> random(Index count, std::uint32_t seed) {
  std::vector<float> values;
  for (Index i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values.push_back(float(std::int32_t(seed) >> 8) / 8388608.0f);
  }
  return values;
}

// How many numbers of rows there are for which multiply(rows, to) does not give the first rows of a batch
// of 33.
template <class F>
int differences(const char* name, Index columns, const F& multiply) {
  constexpr Index kBatch = 33;
  std::vector<float> all(std::size_t(kBatch * columns)), some(all.size());
  multiply(kBatch, all.data());
  int count = 0;
  for (Index rows = 1; rows < kBatch; ++rows) {
    multiply(rows, some.data());
    if (std::memcmp(all.data(), some.data(), std::size_t(rows * columns) * sizeof(float)) == 0) continue;
    std::printf("%s: %d rows are not those of a batch\n", name, int(rows));
    ++count;
  }
  return count;
}

}  // namespace

int main() {
  constexpr auto kSet = moe::InstructionSet::portable;
  const moe::kernels::DenseKernels& dense = *moe::kernels::find_dense(kSet);
  const moe::kernels::DenseBackwardKernels& backward = *moe::kernels::find_dense_backward(kSet);
  const Index columns = moe::kernels::find(kSet)->columns;
  constexpr Index kIn = 77, kOut = 53, kBatch = 33, kStride = moe::kernels::kRowStride<float>;
  const std::vector<float> x = random(kBatch * kStride, 1), w = random(kIn * kOut, 2);
  const std::vector<float> panel = random(kIn * columns, 3);
  const std::vector<std::uint16_t> half(std::size_t((kIn + 1) * columns), 0x3E45);
  int count = differences("linear", kOut, [&](Index rows, float* to) {
    dense.linear(rows, kIn, kOut, x.data(), kStride, w.data(), kIn, to, kOut, false);
  });
  count += differences("linear_backward_input", kIn, [&](Index rows, float* to) {
    backward.linear_backward_input(rows, kIn, kOut, x.data(), kStride, w.data(), kIn, to, kIn, false);
  });
  const moe::kernels::Parts<float> from{x.data(), kStride, kIn};
  const auto multiply = [&]<moe::Format F>(F, const auto& weights) {
    const auto* const bytes = reinterpret_cast<const std::byte*>(weights.data());
    return [&from, columns, bytes](Index rows, float* to) {
      F::find_product(kSet)->multiply(rows, kIn, from, bytes, F::bytes(kIn) * columns, 1, to, false, bytes);
    };
  };
  count += differences("panels of floats", columns, multiply(moe::F32{}, panel));
  count += differences("panels of bfloat16", columns, multiply(moe::BF16{}, half));
  return count;
}
