// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io.hpp>
#include <moe/models/published/mixtral.hpp>

// Checkpoints made by hand.
namespace io_test {

// A checkpoint in memory, written to a file when it is opened.
struct Tensors {
  struct Tensor {
    moe::DType dtype;
    std::vector<moe::Index> shape;
    std::vector<std::byte> bytes;
  };
  std::map<std::string, Tensor> tensors;

  template <class S>
  void add(const std::string& name, moe::DType dtype, std::vector<moe::Index> shape,
           const std::vector<S>& values) {
    const auto* const bytes = reinterpret_cast<const std::byte*>(values.data());
    tensors[name] = {dtype, std::move(shape), {bytes, bytes + values.size() * sizeof(S)}};
  }
  // The values begin, begin + 1, ... in halves.
  void add_count(const std::string& name, std::vector<moe::Index> shape, float begin) {
    moe::Index size = 1;
    for (const moe::Index n : shape) size *= n;
    std::vector<float> values(static_cast<std::size_t>(size));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = begin + 0.5f * float(i);
    add(name, moe::DType::F32, std::move(shape), values);
  }
  static std::string path() {
    const auto* const test = testing::UnitTest::GetInstance()->current_test_info();
    return testing::TempDir() + test->test_suite_name() + "." + test->name() + ".safetensors";
  }
  moe::Checkpoint open() const {
    std::vector<moe::TensorToWrite> list;
    for (const auto& [name, tensor] : tensors)
      list.push_back({name, tensor.dtype, tensor.shape, tensor.bytes});
    moe::write_safetensors(path(), list);
    return moe::Checkpoint::open(path());
  }
};

inline const auto kSmallMixtral = moe::mixtral_8x7b.scaled_to(4, 3, 2);
inline const std::string kMixtral = "model.layers.7.block_sparse_moe.";

inline Tensors small_mixtral() {
  Tensors t;
  t.add_count(kMixtral + "gate.weight", {2, 4}, 100);
  for (const int e : {0, 1}) {
    const std::string expert = kMixtral + "experts." + std::to_string(e) + ".";
    t.add_count(expert + "w1.weight", {3, 4}, float(1000 * (e + 1)));
    t.add_count(expert + "w2.weight", {4, 3}, float(1000 * (e + 1) + 200));
    t.add_count(expert + "w3.weight", {3, 4}, float(1000 * (e + 1) + 400));
  }
  t.add_count("model.layers.7.self_attn.q_proj.weight", {4, 4}, 0);  // of no concern
  t.add_count("model.layers.8.block_sparse_moe.gate.weight", {2, 4}, 0);
  return t;
}

}  // namespace io_test
