// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <moe/core/types.hpp>
#include <moe/io.hpp>

#include "compare.hpp"

// A golden file, and how values are compared with it.

struct Golden {
  moe::Checkpoint file;
  nlohmann::json config;

  explicit Golden(const std::string& name)
      : file(moe::Checkpoint::open(std::string(MOE_GOLDEN_DIR) + "/" + name + ".safetensors")),
        config(nlohmann::json::parse(file.metadata().at("config"))) {}

  template <class S>
  moe::Matrix<S> matrix(const std::string& name) const {
    const moe::TensorView& tensor = file.at(name);
    moe::Matrix<S> m(tensor.shape.at(0), tensor.shape.size() > 1 ? tensor.shape[1] : 1);
    EXPECT_EQ(m.size(), tensor.size()) << name;
    moe::read_tensor(tensor, m.data());
    return m;
  }
  moe::Index number(const char* key) const { return config.at(key).get<moe::Index>(); }
};

// The tensors whose names begin with `prefix`, without it. Where it stands before a checkpoint's names, they
// are a checkpoint of gradients, loaded as the layer is.
inline moe::Checkpoint gradients_of(const Golden& golden, const std::string& prefix,
                                    const std::string& path) {
  std::vector<moe::TensorToWrite> tensors;
  for (const std::string& name : golden.file.names()) {
    if (!name.starts_with(prefix)) continue;
    const moe::TensorView& tensor = golden.file.at(name);
    tensors.push_back({name.substr(prefix.size()), tensor.dtype, tensor.shape, tensor.bytes});
  }
  moe::write_safetensors(path, tensors);
  return moe::Checkpoint::open(path);
}

// FNV-1a of the bytes of a golden file.
inline std::uint64_t hash_of_golden(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (std::istreambuf_iterator<char> c(file), end; c != end; ++c)
    hash = (hash ^ static_cast<unsigned char>(*c)) * 0x100000001b3u;
  return hash;
}
