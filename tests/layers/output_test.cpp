// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>
#include <string>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "laws.hpp"

// Layers write the same bits into any view as into a matrix of their own, and nothing beside it.
namespace output_test {
namespace {

using laws::normal_matrix;
using laws::same_bits;
using moe::Index;
using moe::Matrix;
using moe::MatrixRef;
using moe::Rng;
using Expert = moe::GatedFeedForward<float>;

constexpr Index kTokens = 7, kModel = 20;

// write(y) is called with rows, columns and a map of larger memory.
void expect_written(const Matrix<float>& expected,
                    const std::function<void(const moe::Output<float>&)>& write) {
  Matrix<float> large = Matrix<float>::Constant(kTokens + 4, kModel + 5, 3);
  write(large.block(2, 3, kTokens, kModel));
  EXPECT_TRUE(same_bits(Matrix<float>(large.block(2, 3, kTokens, kModel)), expected));
  large.block(2, 3, kTokens, kModel).setConstant(3);
  EXPECT_EQ(large, Matrix<float>::Constant(kTokens + 4, kModel + 5, 3));
  Matrix<float> rows = Matrix<float>::Constant(kTokens + 2, kModel, 3);
  write(rows.topRows(kTokens));
  EXPECT_TRUE(same_bits(Matrix<float>(rows.topRows(kTokens)), expected));
  EXPECT_EQ(Matrix<float>(rows.bottomRows(2)), Matrix<float>::Constant(2, kModel, 3));
  Matrix<float> resized(1, 2);
  write(resized);
  EXPECT_TRUE(same_bits(resized, expected));
}

// A view of another shape is refused with both shapes, and stays as it is.
void expect_refused(const std::string& what, const std::function<void(const moe::Output<float>&)>& write) {
  Matrix<float> y = Matrix<float>::Constant(kTokens - 1, kModel, 3);
  try {
    write(y.topRows(kTokens - 1));
    ADD_FAILURE() << what << ": accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_EQ(error.what(), what + " has shape [6, 20], expected [7, 20]");
  }
  EXPECT_EQ(y, Matrix<float>::Constant(kTokens - 1, kModel, 3));
}

TEST(OutputOf, ALayerIsWrittenToAnyView) {
  Rng rng(1);
  const auto experts = moe::make_experts<Expert>(4, {.d_model = kModel, .d_ff = 9}, rng);
  const moe::TopKRouter<float> router({.d_model = kModel, .num_experts = 4, .jitter = 0.1}, rng);
  const moe::MoELayer layer(experts, router,
                            {moe::make_experts<Expert>(1, {.d_model = kModel, .d_ff = 9}, rng)}, true);
  using Layer = decltype(moe::MoELayer(experts, router));
  const Matrix<float> x = normal_matrix<float>(kTokens, kModel, rng),
                      d_y = normal_matrix<float>(kTokens, kModel, rng);
  Layer::Workspace workspace;
  Layer::Cache cache;
  const auto forward = [&](const moe::Output<float>& y) { layer.forward(x, y, workspace); };
  const auto cached = [&](const moe::Output<float>& y) { layer.forward(x, y, cache); };
  const auto training = [&](const moe::Output<float>& y) {
    Rng own(5);
    layer.forward(x, own, y, cache);
  };
  expect_written(layer.forward(x), forward);
  expect_written(layer.forward(x), cached);
  expect_refused("MoELayer::forward: y", forward);
  expect_refused("MoELayer::forward: y", cached);
  Rng own(5);
  Layer::Cache expected_cache;
  Layer grad = moe::zeros_like(layer), expected_grad = grad;
  expect_written(layer.forward(x, own, expected_cache), training);
  expect_refused("MoELayer::forward: y", training);
  Rng unused(5);  // refused before anything is drawn
  expect_refused("MoELayer::forward: y",
                 [&](const moe::Output<float>& y) { layer.forward(x, unused, y, cache); });
  EXPECT_EQ(unused, Rng(5));
  const auto backward = [&](const moe::Output<float>& d_x) { layer.backward(d_y, cache, grad, {}, d_x); };
  training(Matrix<float>(kTokens, kModel).topRows(kTokens));
  expect_written(layer.backward(d_y, expected_cache, expected_grad), backward);
  moe::set_zero(grad);
  expect_refused("MoELayer::backward: d_x", backward);
  Layer::visit(
      [](const moe::ParameterInfo& info, const auto& g) { EXPECT_TRUE((g.array() == 0).all()) << info.name; },
      grad);

  const auto packed = moe::pack<moe::F32>(layer);
  moe::PackedWorkspace packed_workspace;
  const auto forward_packed = [&](const moe::Output<float>& y) { packed.forward(x, y, packed_workspace); };
  expect_written(packed.forward(x), forward_packed);
  expect_refused("PackedMoELayer::forward: y", forward_packed);
}

TEST(OutputOf, ASoftLayerIsWrittenToAnyView) {
  Rng rng(2);
  using Layer = moe::SoftMoELayer<Expert>;
  const Layer layer(moe::make_experts<Expert>(3, {.d_model = kModel, .d_ff = 9}, rng),
                    {.d_model = kModel, .num_experts = 3, .slots_per_expert = 2}, rng);
  const Matrix<float> x = normal_matrix<float>(kTokens, kModel, rng),
                      d_y = normal_matrix<float>(kTokens, kModel, rng);
  Layer::Workspace workspace;
  Layer::Cache cache;
  Layer grad = moe::zeros_like(layer), expected_grad = grad;
  const auto forward = [&](const moe::Output<float>& y) { layer.forward(x, y, workspace); };
  const auto cached = [&](const moe::Output<float>& y) { layer.forward(x, y, cache); };
  const auto backward = [&](const moe::Output<float>& d_x) { layer.backward(d_y, cache, grad, d_x); };
  expect_written(layer.forward(x), forward);
  expect_written(layer.forward(x), cached);
  expect_refused("SoftMoELayer::forward: y", forward);
  cached(Matrix<float>(kTokens, kModel).topRows(kTokens));
  expect_written(layer.backward(d_y, cache, expected_grad), backward);
  expect_refused("SoftMoELayer::backward: d_x", backward);
}

}  // namespace
}  // namespace output_test
