// SPDX-License-Identifier: MIT
#include <cmath>
#include <concepts>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/balance/loss.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/routers/expert_choice_router.hpp>
#include <moe/routers/noisy_top_k_router.hpp>
#include <moe/routers/top_k_router.hpp>

namespace moe_layer_test {
namespace {

using moe::BatchInfo;
using moe::Index;
using moe::Matrix;
using moe::Rng;
using moe::Routing;
using moe::Sequential;
using moe::TokenState;
using moe::Vector;
using Gated = moe::GatedFeedForward<double>;
using TopK = moe::TopKRouter<double>;
using Noisy = moe::NoisyTopKRouter<double>;
using Layer = moe::MoELayer<Gated, TopK>;

static_assert(std::copyable<Layer> && std::copyable<Layer::Cache> && std::copyable<Layer::Workspace>);

constexpr Index kModel = 6;

Matrix<double> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  Rng rng(seed);
  Matrix<double> m(rows, cols);
  moe::fill_normal(m, 1.0, rng);
  return m;
}

struct Parts {
  Index experts = 4;
  TopK::Options router{};
  Index shared = 0;
  bool gated = false;
  bool output_bias = false;
  Index d_ff = 5;
};

Layer make_layer(Parts parts = {}) {
  Rng rng(1);
  parts.router.d_model = kModel;
  parts.router.num_experts = parts.experts;
  const Gated::Options expert{.d_model = kModel, .d_ff = parts.d_ff, .bias = true};
  Layer layer(moe::make_experts<Gated>(parts.experts, expert, rng), TopK(parts.router, rng),
              {.experts = moe::make_experts<Gated>(parts.shared, expert, rng), .gated = parts.gated},
              parts.output_bias);
  Layer::visit([&](const moe::ParameterInfo&, auto& p) { moe::fill_normal(p, 0.4, rng); }, layer);
  return layer;
}

// A layer with everything that a layer can have.
Layer full_layer() {
  return make_layer({.router = {.top_k = 2,
                                .renormalise = true,
                                .bias = true,
                                .capacity = 0.75,
                                .training_capacity = 0.75,
                                .overflow = moe::Overflow::pass_through},
                     .shared = 2,
                     .gated = true,
                     .output_bias = true});
}

Matrix<double> expert_output(const Gated& expert, const Matrix<double>& x) {
  Matrix<double> y(x.rows(), x.cols());
  expert.forward(x, y);
  return y;
}

void expect_same_parameters(const Layer& a, const Layer& b) {
  Layer::visit([](const auto& info, const auto& p, const auto& q) { EXPECT_EQ(p, q) << info.name; }, a, b);
}

BatchInfo masked(const std::vector<bool>& valid) {
  BatchInfo info;
  info.mask.resize(Index(valid.size()));
  for (std::size_t t = 0; t < valid.size(); ++t) info.mask[Index(t)] = valid[t];
  return info;
}

// ---- The formula.

TEST(MoELayer, OutputIsTheGatedSumOfExpertsPlusSharedOnesPlusBias) {
  const Layer layer = make_layer({.router = {.top_k = 2}, .shared = 2, .gated = true, .output_bias = true});
  const Matrix<double> x = random_matrix(9, kModel, 2);
  const Routing<double> routing = layer.route(x);
  const Matrix<double> y = layer.forward(x);
  for (Index t = 0; t < 9; ++t) {
    Matrix<double> expected = layer.b_output.transpose();
    for (Index c = 2 * t; c < 2 * t + 2; ++c)
      expected += routing.chosen.gate[c] *
                  expert_output(layer.experts()[std::size_t(routing.chosen.expert[c])], x.row(t));
    for (Index s = 0; s < 2; ++s) {
      const double z = layer.w_shared_gate.row(s).dot(x.row(t));
      expected += 1 / (1 + std::exp(-z)) * expert_output(layer.shared_experts()[std::size_t(s)], x.row(t));
    }
    EXPECT_TRUE(y.row(t).isApprox(expected.row(0), 1e-12)) << t;
  }
}

TEST(MoELayer, UngatedSharedExpertsAreAddedAsTheyAre) {
  const Layer with = make_layer({.shared = 1}), without = [&] {
    const auto experts = with.experts();
    return Layer({experts.begin(), experts.end()}, with.router());
  }();
  const Matrix<double> x = random_matrix(5, kModel, 3);
  const Matrix<double> expected = without.forward(x) + expert_output(with.shared_experts()[0], x);
  EXPECT_TRUE(with.forward(x).isApprox(expected, 1e-13));
}

TEST(MoELayer, ShowsItsParts) {
  Layer layer = full_layer();
  EXPECT_EQ(layer.d_model(), kModel);
  EXPECT_EQ(layer.num_experts(), 4);
  EXPECT_EQ(layer.num_shared_experts(), 2);
  EXPECT_EQ(layer.experts().size(), 4u);
  EXPECT_EQ(layer.shared_experts().size(), 2u);
  EXPECT_EQ(layer.router().num_experts(), 4);
  layer.experts()[3].w_up.setZero();
  EXPECT_EQ(std::as_const(layer).experts()[3].w_up(0, 0), 0);
  EXPECT_EQ(make_layer().b_output.size(), 0);
}

// ---- Overloads.

TEST(MoELayer, AllFormsOfForwardGiveTheSameBits) {
  const Layer layer = full_layer();
  const Matrix<double> x = random_matrix(40, kModel, 4);
  const BatchInfo info = masked(std::vector<bool>(40, true));
  const Matrix<double> y = layer.forward(x);
  ASSERT_GT(layer.route(x).plan.dropped.size(), 0);

  EXPECT_EQ(layer.forward(x, info, Sequential{}), y);
  Layer::Workspace workspace;
  Matrix<double> out;
  for (int round = 0; round < 2; ++round) {
    layer.forward(x, out, workspace);
    EXPECT_EQ(out, y);
  }
  EXPECT_EQ(workspace.routing.plan, layer.route(x).plan);

  const Routing<double> routing = layer.route(x);
  EXPECT_EQ(layer.forward(x, routing), y);
  EXPECT_EQ(layer.forward(x, routing, Sequential{}), y);

  Layer::Cache cache;
  EXPECT_EQ(layer.forward(x, cache), y);
  EXPECT_EQ(layer.forward(x, cache, info, Sequential{}), y);
  layer.forward(x, out, cache);
  EXPECT_EQ(out, y);
  EXPECT_EQ(layer.forward(x, routing, cache), y);
  EXPECT_EQ(layer.forward(x, routing, cache, Sequential{}), y);

  Rng rng(5);  // without noise, and with one capacity for both, training is inference
  EXPECT_EQ(layer.forward(x, rng, cache), y);
  layer.forward(x, rng, out, cache, info, Sequential{});
  EXPECT_EQ(out, y);
}

TEST(MoELayer, BothFormsOfBackwardGiveTheSameBits) {
  const Layer layer = full_layer();
  const Matrix<double> x = random_matrix(40, kModel, 6), d_y = random_matrix(40, kModel, 7);
  Layer::Cache cache;
  layer.forward(x, cache);
  const auto loss = moe::load_balancing_loss(cache.routing).gradient;
  Layer a = moe::zeros_like(layer), b = a, c = a;
  Matrix<double> d_x;
  const Matrix<double> expected = layer.backward(d_y, cache, a, loss);
  layer.backward(d_y, cache, b, loss, d_x);
  EXPECT_EQ(d_x, expected);
  expect_same_parameters(a, b);
  EXPECT_EQ(layer.backward(d_y, cache, c, loss, Sequential{}), expected);
  expect_same_parameters(a, c);
}

TEST(MoELayer, AReplayedRoutingHasTheGradientsOfItsOwn) {
  const Layer layer = full_layer();
  const Matrix<double> x = random_matrix(20, kModel, 8), d_y = random_matrix(20, kModel, 9);
  Layer::Cache cache, replayed;
  layer.forward(x, cache);
  layer.forward(x, layer.route(x), replayed);
  Layer a = moe::zeros_like(layer), b = a;
  EXPECT_EQ(layer.backward(d_y, cache, a), layer.backward(d_y, replayed, b));
  expect_same_parameters(a, b);
}

TEST(MoELayer, AnEditedRoutingIsFollowed) {
  const Layer layer = make_layer({.router = {.top_k = 1}});
  const Matrix<double> x = random_matrix(3, kModel, 10);
  Routing<double> routing = layer.route(x);
  for (double& gate : routing.plan.gate) gate = 1;
  routing.plan.token = {0, 1, 2};
  routing.plan.expert_begin = {0, 0, 0, 3, 3};  // all to expert 2
  EXPECT_TRUE(layer.forward(x, routing).isApprox(expert_output(layer.experts()[2], x), 1e-13));
}

TEST(MoELayer, TrainingTakesNoiseJitterAndTrainingCapacityFromItsRng) {
  Rng rng(11);
  const moe::MoELayer<Gated, Noisy> layer(
      moe::make_experts<Gated>(4, {.d_model = kModel, .d_ff = 5}, rng),
      Noisy({.d_model = kModel, .num_experts = 4, .training_capacity = 0.5}, rng));
  const Matrix<double> x = random_matrix(16, kModel, 12);
  moe::MoELayer<Gated, Noisy>::Cache cache;
  Rng a(13), b(13), c(14);
  const Matrix<double> y = layer.forward(x, a, cache);
  EXPECT_FALSE(cache.routing.noise.empty());
  for (Index e = 0; e < 4; ++e) EXPECT_LE(cache.routing.plan.rows_of(e), 4);
  Matrix<double> again;
  layer.forward(x, b, again, cache);
  EXPECT_EQ(y, again);
  EXPECT_EQ(a, b);
  EXPECT_NE(layer.forward(x, c, cache), y);
  layer.forward(x, cache);  // no Rng, no noise
  EXPECT_TRUE(cache.routing.noise.empty());
  EXPECT_EQ(cache.routing.plan.num_assignments(), 32);
}

// ---- Caches and gradients.

TEST(MoELayer, TheInputMayBeDestroyedAfterForward) {
  const Layer layer = full_layer();
  const Matrix<double> d_y = random_matrix(12, kModel, 15);
  Layer::Cache kept_cache, gone_cache;
  const Matrix<double> kept = random_matrix(12, kModel, 16);
  auto gone = std::make_unique<Matrix<double>>(kept);
  layer.forward(kept, kept_cache);
  layer.forward(*gone, gone_cache);
  gone->setConstant(std::numeric_limits<double>::quiet_NaN());
  gone.reset();
  Layer a = moe::zeros_like(layer), b = a;
  EXPECT_EQ(layer.backward(d_y, kept_cache, a), layer.backward(d_y, gone_cache, b));
  expect_same_parameters(a, b);
}

TEST(MoELayer, GradientsAccumulateAndBackwardMayBeCalledAgain) {
  const Layer layer = full_layer();
  const Matrix<double> x = random_matrix(12, kModel, 17), d_y = random_matrix(12, kModel, 18);
  Layer::Cache cache;
  layer.forward(x, cache);
  const auto loss = 0.1 * moe::router_z_loss(cache.routing).gradient;
  Layer once = moe::zeros_like(layer), twice = once;
  const Matrix<double> d_x = layer.backward(d_y, cache, once, loss);
  for (int round = 0; round < 2; ++round) EXPECT_EQ(layer.backward(d_y, cache, twice, loss), d_x);
  Layer::visit(
      [](const auto& info, const auto& one, const auto& two) {
        EXPECT_TRUE(two.isApprox(2 * one, 1e-12)) << info.name;
        EXPECT_GT(one.norm(), 0) << info.name;
      },
      once, twice);
}

TEST(MoELayer, LossesReachTheRouterWithoutAnyGradientOfTheOutput) {
  const Layer layer = make_layer();
  Layer::Cache cache;
  layer.forward(random_matrix(12, kModel, 19), cache);
  Layer grad = moe::zeros_like(layer);
  const Matrix<double> d_x = layer.backward(Matrix<double>::Zero(12, kModel), cache, grad,
                                            moe::load_balancing_loss(cache.routing).gradient);
  EXPECT_GT(grad.router().w_router.norm(), 0);
  EXPECT_EQ(grad.experts()[0].w_up.norm(), 0);
  EXPECT_GT(d_x.norm(), 0);
}

TEST(MoELayer, ACacheServesBatchesOfEverySize) {
  const Layer layer = full_layer();
  Layer::Cache reused;
  Layer::Workspace workspace;
  for (const Index tokens : {7, 30, 1, 0, 70, 7}) {
    const Matrix<double> x = random_matrix(tokens, kModel, 20), d_y = random_matrix(tokens, kModel, 21);
    Layer::Cache fresh;
    Matrix<double> y;
    EXPECT_EQ(layer.forward(x, reused), layer.forward(x, fresh));
    layer.forward(x, y, workspace);
    EXPECT_EQ(y, layer.forward(x));
    Layer a = moe::zeros_like(layer), b = a;
    EXPECT_EQ(layer.backward(d_y, reused, a), layer.backward(d_y, fresh, b));
    expect_same_parameters(a, b);
  }
}

TEST(MoELayer, RefusesACacheOfAnotherShape) {
  const Layer layer = make_layer({.shared = 1});
  const Matrix<double> x = random_matrix(8, kModel, 22);
  Layer grad = moe::zeros_like(layer);
  const auto refused = [&](const Layer& of, const Matrix<double>& d_y) {
    Layer::Cache cache;
    of.forward(x, cache);
    EXPECT_THROW(layer.backward(d_y, cache, grad), std::invalid_argument);
  };
  refused(make_layer({.experts = 3, .shared = 1}), x);
  refused(make_layer({.shared = 2}), x);
  refused(make_layer(), x);
  refused(make_layer({.shared = 1, .d_ff = 6}), x);
  refused(layer, random_matrix(7, kModel, 1));
  refused(layer, random_matrix(8, kModel + 1, 1));
  Layer::Cache unused;
  EXPECT_THROW(layer.backward(x, unused, grad), std::invalid_argument);
  Layer::Cache used;
  layer.forward(x, used);
  const Layer::Cache taken = std::move(used);
  EXPECT_THROW(layer.backward(x, used, grad), std::invalid_argument);
  Layer::visit([](const auto& info, const auto& p) { EXPECT_EQ(p.norm(), 0) << info.name; }, grad);
}

TEST(MoELayer, RefusesAGradientOfAnotherShapeAndLeavesItAlone) {
  const Layer layer = full_layer();
  Layer::Cache cache;
  const Matrix<double> x = random_matrix(8, kModel, 23);
  layer.forward(x, cache);
  Parts parts{.router = {.bias = true}, .shared = 2, .gated = true, .output_bias = true};
  const auto refused = [&](const Parts& other) {
    Layer grad = moe::zeros_like(make_layer(other));
    EXPECT_THROW(layer.backward(x, cache, grad), std::invalid_argument);
    Layer::visit([](const auto& info, const auto& p) { EXPECT_EQ(p.norm(), 0) << info.name; }, grad);
  };
  Parts other = parts;
  other.experts = 5;
  refused(other);
  other = parts;
  other.shared = 1;
  refused(other);
  other = parts;
  other.gated = false;
  refused(other);
  other = parts;
  other.output_bias = false;
  refused(other);
  other = parts;
  other.d_ff = 4;
  refused(other);
  other = parts;
  other.router.bias = false;
  refused(other);
}

TEST(MoELayer, CopiesAreIndependent) {
  Layer layer = full_layer();
  const Layer copy = layer;
  const Matrix<double> x = random_matrix(5, kModel, 24), y = layer.forward(x);
  moe::set_zero(layer);
  EXPECT_EQ(copy.forward(x), y);
  EXPECT_NE(layer.forward(x), y);
}

// ---- Constant gates.

TEST(MoELayer, ConstantGatesAreRefusedInTrainingUnlessAllowed) {
  const Matrix<double> x = random_matrix(6, kModel, 25);
  Parts parts{.router = {.top_k = 1, .renormalise = true}};
  Rng rng(26);
  {
    const Layer layer = make_layer(parts);
    Layer::Cache cache;
    EXPECT_THROW(layer.forward(x, rng, cache), std::invalid_argument);
    const Matrix<double> y = layer.forward(x);  // inference is fine
    EXPECT_EQ(layer.forward(x, cache), y);
    Layer grad = moe::zeros_like(layer);
    EXPECT_THROW(layer.backward(x, cache, grad), std::invalid_argument);
  }
  parts.router.allow_constant_gate = true;
  const Layer layer = make_layer(parts);
  Layer::Cache cache;
  layer.forward(x, rng, cache);
  Layer grad = moe::zeros_like(layer);
  layer.backward(x, cache, grad);
  EXPECT_EQ(grad.router().w_router.norm(), 0);
  EXPECT_GT(grad.experts()[std::size_t(cache.routing.chosen.expert[0])].w_up.norm(), 0);
}

// ---- Masks, poison, output bias.

TEST(MoELayer, MaskedRowsAreZeroAndPoisonedOnesNotANumber) {
  const Layer layer = full_layer();
  Matrix<double> x = random_matrix(6, kModel, 27), d_y = random_matrix(6, kModel, 28);
  x(4, 1) = std::numeric_limits<double>::quiet_NaN();
  const BatchInfo info = masked({1, 0, 1, 1, 1, 1});
  Layer::Cache cache;
  const Matrix<double> y = layer.forward(x, cache, info);
  EXPECT_TRUE((y.row(1).array() == 0).all());
  EXPECT_TRUE(y.row(4).array().isNaN().all());
  Layer grad = moe::zeros_like(layer);
  d_y.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  d_y.row(4).setConstant(std::numeric_limits<double>::quiet_NaN());
  const Matrix<double> d_x = layer.backward(d_y, cache, grad);
  EXPECT_TRUE((d_x.row(1).array() == 0).all());
  EXPECT_TRUE((d_x.row(4).array() == 0).all());
  EXPECT_TRUE(d_x.allFinite());
  Layer::visit([](const auto& name, const auto& p) { EXPECT_TRUE(p.allFinite()) << name.name; }, grad);
  const Vector<double> sum = (d_y.row(0) + d_y.row(2) + d_y.row(3) + d_y.row(5)).transpose();
  EXPECT_TRUE(grad.b_output.isApprox(sum, 1e-13));
}

TEST(MoELayer, TheOutputBiasIsAddedOnceToEveryValidToken) {
  Layer layer = make_layer({.output_bias = true});
  const Matrix<double> x = random_matrix(4, kModel, 29);
  const BatchInfo info = masked({1, 1, 0, 1});
  const Matrix<double> with = layer.forward(x, info);
  const Vector<double> bias = layer.b_output;
  layer.b_output.setZero();
  const Matrix<double> without = layer.forward(x, info);
  for (const Index t : {0, 1, 3})
    EXPECT_TRUE((with.row(t) - without.row(t)).isApprox(bias.transpose(), 1e-12));
  EXPECT_TRUE((with.row(2).array() == 0).all());
}

TEST(MoELayer, PassedThroughTokensAreTheInputPlusSharedExpertsAndBias) {
  Layer layer = make_layer({.router = {.capacity = 0.0, .overflow = moe::Overflow::pass_through},
                            .shared = 1,
                            .output_bias = true});
  const Matrix<double> x = random_matrix(4, kModel, 30), d_y = random_matrix(4, kModel, 31);
  Layer::Cache cache;
  const Matrix<double> y = layer.forward(x, cache);
  const Matrix<double> expected =
      (x + expert_output(layer.shared_experts()[0], x)).rowwise() + layer.b_output.transpose();
  EXPECT_TRUE(y.isApprox(expected, 1e-13));
  Layer grad = moe::zeros_like(layer);
  layer.shared_experts()[0].w_down.setZero();  // nothing flows through the shared expert
  layer.forward(x, cache);
  EXPECT_EQ(layer.backward(d_y, cache, grad), d_y);
  EXPECT_EQ(grad.router().w_router.norm(), 0);
}

// ---- Experts come and go.

TEST(MoELayer, AnAddedExpertStandsBehindTheRoutedOnes) {
  Layer layer = full_layer();
  const Layer before = layer;
  Rng rng(32);
  Gated expert({.d_model = kModel, .d_ff = 9}, rng);  // widths within may differ
  const Matrix<double> weight = expert.w_up;
  layer.add_expert(std::move(expert), Vector<double>::Constant(kModel, 0.5));
  EXPECT_EQ(layer.num_experts(), 5);
  EXPECT_EQ(layer.num_shared_experts(), 2);
  EXPECT_EQ(layer.experts()[4].w_up, weight);
  EXPECT_EQ(layer.shared_experts()[1].w_up, before.shared_experts()[1].w_up);
  EXPECT_EQ(layer.router().w_router(4, 2), 0.5);
  const Matrix<double> x = random_matrix(8, kModel, 33);
  Layer::Cache cache;
  layer.forward(x, cache);
  Layer grad = moe::zeros_like(layer);
  layer.backward(x, cache, grad);
  layer.remove_expert(4);
  expect_same_parameters(layer, before);
  EXPECT_EQ(layer.forward(x), before.forward(x));
}

TEST(MoELayer, RemovingAnExpertThatNobodyUsesChangesNothing) {
  Layer layer = make_layer({.experts = 5, .router = {.top_k = 2, .renormalise = true, .bias = true}});
  layer.router().b_router[1] = -1000;
  const Matrix<double> x = random_matrix(30, kModel, 34);
  const Matrix<double> y = layer.forward(x);
  layer.remove_expert(1);
  EXPECT_EQ(layer.num_experts(), 4);
  EXPECT_EQ(layer.forward(x), y);
}

TEST(MoELayer, WhatCanNotBeAddedOrRemovedLeavesTheLayerAsItWas) {
  Layer layer = full_layer();
  const Layer before = layer;
  const Matrix<double> x = random_matrix(8, kModel, 35), y = layer.forward(x);
  Rng rng(36);
  const Gated good({.d_model = kModel, .d_ff = 5, .bias = true}, rng),
      bad({.d_model = kModel + 1, .d_ff = 5, .bias = true}, rng);
  EXPECT_THROW(layer.add_expert(bad, Vector<double>::Zero(kModel)), std::invalid_argument);
  EXPECT_THROW(layer.add_expert(good, Vector<double>::Zero(kModel - 1)), std::invalid_argument);
  EXPECT_THROW(layer.remove_expert(4), std::invalid_argument);
  EXPECT_THROW(layer.remove_expert(-1), std::invalid_argument);
  expect_same_parameters(layer, before);
  EXPECT_EQ(layer.num_experts(), 4);
  EXPECT_EQ(layer.router().options().num_experts, 4);
  EXPECT_EQ(layer.forward(x), y);
  layer.remove_expert(0);
  layer.remove_expert(0);
  EXPECT_THROW(layer.remove_expert(0), std::invalid_argument);  // top_k is 2
  EXPECT_EQ(layer.num_experts(), 2);
  EXPECT_EQ(layer.router().num_experts(), 2);
}

// An expert whose copies fail, now and then.
struct Fragile {
  using Scalar = double;
  static inline bool breaks = false;
  double factor = 1;
  Fragile() = default;
  explicit Fragile(double f) : factor(f) {}
  Fragile(const Fragile& other) : factor(other.factor) {
    if (breaks) throw std::runtime_error("out of memory");
  }
  Fragile(Fragile&&) noexcept = default;
  Fragile& operator=(const Fragile&) = default;
  Fragile& operator=(Fragile&&) noexcept = default;
  Index d_model() const { return kModel; }
  void forward(const moe::ConstMatrixRef<double>& x, moe::MatrixRef<double> y) const { y = factor * x; }
};

TEST(MoELayer, AnExceptionWhileAddingLeavesTheLayerAsItWas) {
  Rng rng(37);
  moe::MoELayer<Fragile, TopK> layer({Fragile(1), Fragile(2)},
                                     TopK({.d_model = kModel, .num_experts = 2}, rng));
  const Fragile third(3);
  Fragile::breaks = true;
  EXPECT_THROW(layer.add_expert(third, Vector<double>::Zero(kModel)), std::runtime_error);
  Fragile::breaks = false;
  EXPECT_EQ(layer.num_experts(), 2);
  EXPECT_EQ(layer.router().num_experts(), 2);
  EXPECT_EQ(layer.experts()[1].factor, 2);
  layer.add_expert(third, Vector<double>::Zero(kModel));
  EXPECT_EQ(layer.experts()[2].factor, 3);
}

// ---- Ordinary inputs at the edge.

TEST(MoELayer, AnEmptyBatchIsFine) {
  const Layer layer = full_layer();
  Layer::Cache cache;
  Layer grad = moe::zeros_like(layer);
  const Matrix<double> none(0, kModel);
  EXPECT_EQ(layer.forward(none).rows(), 0);
  EXPECT_EQ(layer.forward(none, cache).rows(), 0);
  EXPECT_EQ(layer.backward(none, cache, grad).rows(), 0);
  EXPECT_EQ(layer.route(none).num_tokens(), 0);
}

TEST(MoELayer, OneExpertIsADenseLayer) {
  const Layer layer = make_layer({.experts = 1, .router = {.top_k = 1}});
  const Matrix<double> x = random_matrix(10, kModel, 38);
  EXPECT_EQ(layer.forward(x), expert_output(layer.experts()[0], x));
}

TEST(MoELayer, TakesRowBlocksOfLargerMatrices) {
  const Layer layer = full_layer();
  const Matrix<double> x = random_matrix(20, kModel, 39);
  const Matrix<double> part = x.middleRows(3, 9);
  EXPECT_EQ(layer.forward(x.middleRows(3, 9)), layer.forward(part));
  Matrix<double> wide = random_matrix(9, kModel + 3, 40);
  wide.middleCols(2, kModel) = part;
  EXPECT_EQ(layer.forward(wide.middleCols(2, kModel)), layer.forward(part));
}

// ---- The user's own parts.

// The smallest expert and the smallest router that a layer takes, for inference only.
struct Negate {
  using Scalar = float;
  Index width = 3;
  Index d_model() const { return width; }
  void forward(const moe::ConstMatrixRef<float>& x, moe::MatrixRef<float> y) const { y = -x; }
};

struct EveryOther {  // token t goes to expert t % 2
  using Scalar = float;
  Index d_model() const { return 3; }
  Index num_experts() const { return 2; }
  void route(const moe::ConstMatrixRef<float>& x, const BatchInfo& info, Routing<float>& routing) const {
    moe::begin_routing(x.rows(), num_experts(), info, routing, "EveryOther::route");
    for (Index t = 0; t < x.rows(); ++t) {
      if (routing.is_valid(t)) {
        routing.chosen.expert.push_back(t % 2);
        routing.chosen.gate.push_back(0.5f);
      }
      routing.chosen.token_begin[t + 1] = routing.chosen.size();
    }
    moe::dispatch_all(routing.chosen, routing.plan);
  }
};

using SmallLayer = moe::MoELayer<Negate, EveryOther>;
static_assert(moe::Expert<Negate> && !moe::TrainableExpert<Negate>);
static_assert(moe::Router<EveryOther> && !moe::TrainableRouter<EveryOther>);

TEST(MoELayer, TakesMinimalExpertsAndRoutersForInference) {
  const SmallLayer layer({Negate{}, Negate{}}, EveryOther{}, {.experts = {Negate{}}}, true);
  Matrix<float> x(3, 3);
  x << 1, 2, 3, 4, 5, 6, 7, 8, 9;
  EXPECT_EQ(layer.forward(x), -1.5f * x);
  EXPECT_EQ(layer.forward(x, layer.route(x)), -1.5f * x);
  const Matrix<float> some = layer.forward(x, masked({1, 0, 1}));
  EXPECT_TRUE((some.row(1).array() == 0).all());
  std::vector<std::string> names;
  SmallLayer::visit([&](const auto& info, const auto&) { names.emplace_back(info.name); }, layer);
  EXPECT_EQ(names, (std::vector<std::string>{"b_output"}));
}

// A trainable router of the minimal kind: no executor, no randomness, constant gates, either side.
struct Fixed {
  using Scalar = double;
  moe::GateSide side = moe::GateSide::output;
  Matrix<double> w = Matrix<double>::Constant(2, kModel, 0.3);
  Index d_model() const { return kModel; }
  Index num_experts() const { return 2; }
  void route(const moe::ConstMatrixRef<double>& x, const BatchInfo& info, Routing<double>& routing) const {
    moe::begin_routing(x.rows(), 2, info, routing, "Fixed::route");
    routing.plan.gate_side = side;
    for (Index t = 0; t < x.rows(); ++t) {
      for (Index e = 0; e < 2; ++e) {
        routing.chosen.expert.push_back(e);
        routing.chosen.gate.push_back(std::tanh(x.row(t).dot(w.row(e))));
      }
      routing.chosen.token_begin[t + 1] = routing.chosen.size();
    }
    moe::dispatch_all(routing.chosen, routing.plan);
  }
  void backward(const moe::ConstMatrixRef<double>& x, const Routing<double>& routing,
                const moe::RoutingGradient<double>& gradient, moe::MatrixRef<double> d_x, Fixed& grad) const {
    const auto& plan = routing.plan;
    for (Index e = 0; e < 2; ++e) {
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
        const double d = gradient.d_gate[a] * (1 - plan.gate[a] * plan.gate[a]);
        grad.w.row(e) += d * x.row(plan.token[a]);
        d_x.row(plan.token[a]) += d * w.row(e);
      }
    }
  }
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    f(moe::ParameterInfo{"w"}, self.w...);
  }
};
static_assert(moe::TrainableRouter<Fixed>);

// The gates that the output used have a gradient from the output and one from a loss on them: both count.
TEST(MoELayer, AddsTheGradientOfALossOnThePlansGatesToThatOfTheOutput) {
  Rng rng(46);
  const moe::MoELayer<Gated, moe::TopKRouter<double>> layer{
      moe::make_experts<Gated>(3, {.d_model = kModel, .d_ff = 4}, rng),
      moe::TopKRouter<double>({.d_model = kModel, .num_experts = 3, .top_k = 2}, rng)};
  const Matrix<double> x = random_matrix(5, kModel, 47), d_y = random_matrix(5, kModel, 48);
  decltype(layer)::Cache cache;
  layer.forward(x, cache);
  moe::RoutingGradient<double> by_loss;
  by_loss.d_gate.assign(cache.routing.plan.num_assignments(), 0.0);
  for (double& d : by_loss.d_gate) d = rng.uniform();
  auto both = moe::zeros_like(layer), by_output = both, by_gates = both;
  const Matrix<double> d_x = layer.backward(d_y, cache, both, by_loss);
  const Matrix<double> sum = layer.backward(d_y, cache, by_output) +
                             layer.backward(Matrix<double>::Zero(5, kModel), cache, by_gates, by_loss);
  EXPECT_GT(by_gates.router().w_router.norm(), 1e-3);
  EXPECT_TRUE(d_x.isApprox(sum, 1e-12));
  EXPECT_TRUE(
      both.router().w_router.isApprox(by_output.router().w_router + by_gates.router().w_router, 1e-12));
}

// A router of the user whose form for training takes a workspace, as the library's do.
struct TrainedInAWorkspace : Fixed {
  using Fixed::route;
  void route(const moe::ConstMatrixRef<double>& x, Rng&, const moe::BatchInfo& info, Routing<double>& routing,
             moe::RouterWorkspace<double>&) const {
    route(x, info, routing);
    for (double& gate : routing.plan.gate) gate = 2;
  }
};

TEST(MoELayer, AFormForTrainingThatTakesAWorkspaceIsCalled) {
  Rng rng(44);
  const moe::MoELayer<Gated, TrainedInAWorkspace> layer(
      moe::make_experts<Gated>(2, {.d_model = kModel, .d_ff = 4}, rng), TrainedInAWorkspace{});
  const Matrix<double> x = random_matrix(5, kModel, 45);
  decltype(layer)::Cache cache;
  layer.forward(x, cache);
  for (const double gate : cache.routing.plan.gate) EXPECT_LT(gate, 1);
  layer.forward(x, rng, cache);
  for (const double gate : cache.routing.plan.gate) EXPECT_EQ(gate, 2);
}

TEST(MoELayer, TrainsWithARouterOfTheUserAndGatesOnEitherSide) {
  using OwnLayer = moe::MoELayer<Gated, Fixed>;
  for (const auto side : {moe::GateSide::output, moe::GateSide::input}) {
    Rng rng(41);
    const OwnLayer layer(moe::make_experts<Gated>(2, {.d_model = kModel, .d_ff = 4}, rng), Fixed{side},
                         {.experts = moe::make_experts<Gated>(1, {.d_model = kModel, .d_ff = 3}, rng)});
    Matrix<double> x = random_matrix(5, kModel, 42);
    const Matrix<double> d_y = random_matrix(5, kModel, 43);
    // The formula: gate * f(x), or f(gate * x).
    const Matrix<double> y = layer.forward(x);
    for (Index t = 0; t < 5; ++t) {
      Matrix<double> expected = expert_output(layer.shared_experts()[0], x.row(t));
      for (Index e = 0; e < 2; ++e) {
        const double gate = std::tanh(x.row(t).dot(layer.router().w.row(e)));
        const Gated& expert = layer.experts()[std::size_t(e)];
        expected += side == moe::GateSide::output ? Matrix<double>(gate * expert_output(expert, x.row(t)))
                                                  : expert_output(expert, gate * x.row(t));
      }
      EXPECT_TRUE(y.row(t).isApprox(expected.row(0), 1e-12));
    }
    OwnLayer::Cache cache;
    EXPECT_EQ(layer.forward(x, rng, cache), y);  // a router without training form routes as ever
    OwnLayer grad = moe::zeros_like(layer), work = layer;
    Matrix<double> d_x = layer.backward(d_y, cache, grad);
    const double step = 1e-6;
    const auto difference = [&](double& at) {
      const double center = at;
      at = center + step;
      const double up = work.forward(x, {}, Sequential{}).cwiseProduct(d_y).sum();
      at = center - step;
      const double down = work.forward(x, {}, Sequential{}).cwiseProduct(d_y).sum();
      at = center;
      return (up - down) / (2 * step);
    };
    for (Index i = 0; i < x.size(); ++i) EXPECT_NEAR(d_x.data()[i], difference(x.data()[i]), 1e-8);
    OwnLayer::visit(
        [&](const auto& info, auto& p, const auto& g) {
          for (Index i = 0; i < p.size(); ++i)
            EXPECT_NEAR(g.data()[i], difference(p.data()[i]), 1e-8) << info.name;
        },
        work, grad);
  }
}

TEST(MoELayer, GatedSharedExpertsNeedGatesOnOutputs) {
  Rng rng(44);
  const moe::MoELayer<Gated, Fixed> layer(
      moe::make_experts<Gated>(2, {.d_model = kModel, .d_ff = 4}, rng), Fixed{moe::GateSide::input},
      {.experts = moe::make_experts<Gated>(1, {.d_model = kModel, .d_ff = 3}, rng), .gated = true});
  EXPECT_THROW(layer.forward(random_matrix(2, kModel, 45)), std::invalid_argument);
}

TEST(MoELayer, RefusesPartsThatDoNotFit) {
  Rng rng(46);
  const Gated::Options options{.d_model = kModel, .d_ff = 5};
  const auto experts = [&](Index n) { return moe::make_experts<Gated>(n, options, rng); };
  const TopK router({.d_model = kModel, .num_experts = 3}, rng);
  EXPECT_THROW(Layer({}, router), std::invalid_argument);
  EXPECT_THROW(Layer(experts(2), router), std::invalid_argument);
  EXPECT_THROW(Layer(experts(4), router), std::invalid_argument);
  EXPECT_THROW(Layer(experts(3), TopK({.d_model = 5, .num_experts = 3}, rng)), std::invalid_argument);
  EXPECT_THROW(
      Layer(experts(3), router, {.experts = moe::make_experts<Gated>(1, {.d_model = 7, .d_ff = 5}, rng)}),
      std::invalid_argument);
  EXPECT_THROW(Layer(experts(3), router, {.experts = {}, .gated = true}), std::invalid_argument);
}

}  // namespace
}  // namespace moe_layer_test
