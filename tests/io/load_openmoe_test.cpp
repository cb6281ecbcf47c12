// SPDX-License-Identifier: MIT
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io/load_layer.hpp>
#include <moe/models/openmoe.hpp>

namespace {

using moe::Index;

// Experts of OpenMoE: gate [E, d_model, 2 d_ff], up [E, d_model, d_ff], down [E, d_ff, d_model].
TEST(LoadLayer, TakesOpenMoEsGatesOfTwiceTheWidth) {
  constexpr Index kModel = 4, kFf = 3, kExperts = 2, kLayer = 5;
  const std::string prefix = "model.layers.5.mlp.";
  std::vector<std::pair<std::string, std::vector<Index>>> shapes = {
      {"gate_weight", {kExperts, kModel}},
      {"experts.wi_gate", {kExperts, kModel, 2 * kFf}},
      {"experts.wi_up", {kExperts, kModel, kFf}},
      {"experts.wo", {kExperts, kFf, kModel}}};
  std::vector<std::vector<float>> values;
  for (const auto& [name, shape] : shapes) {
    Index size = 1;
    for (const Index n : shape) size *= n;
    values.emplace_back();
    for (Index i = 0; i < size; ++i) values.back().push_back(float(100 * values.size()) + float(i));
  }
  std::vector<moe::TensorToWrite> tensors;
  for (std::size_t i = 0; i < shapes.size(); ++i)
    tensors.push_back({prefix + shapes[i].first, moe::DType::F32, shapes[i].second,
                       std::as_bytes(std::span(values[i]))});
  const std::string path = testing::TempDir() + "load_openmoe_test.safetensors";
  moe::write_safetensors(path, tensors);
  const auto checkpoint = moe::Checkpoint::open(path);

  const auto model = moe::sized_as(moe::openmoe_8b_32e, checkpoint, kLayer);
  EXPECT_EQ(model.d_model(), kModel);
  EXPECT_EQ(model.num_experts(), kExperts);
  EXPECT_EQ(model.d_ff, kFf);
  const auto layer = moe::load_layer<float>(model, checkpoint, kLayer);
  EXPECT_EQ(layer.router().w_router(1, 2), 100 + 1 * kModel + 2);
  const auto& expert = layer.experts()[1];
  for (Index j = 0; j < kModel; ++j) {
    for (Index i = 0; i < 2 * kFf; ++i)
      EXPECT_EQ(expert.w_gate(i, j), float(200 + (kModel + j) * 2 * kFf + i));
    for (Index i = 0; i < kFf; ++i) {
      EXPECT_EQ(expert.w_up(i, j), float(300 + (kModel + j) * kFf + i));
      EXPECT_EQ(expert.w_down(j, i), float(400 + (kFf + i) * kModel + j));
    }
  }
}

}  // namespace
