// SPDX-License-Identifier: MIT
// What a layer does when it is used wrongly: it throws before anything is half done.
#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

namespace moe::moe_layer_misuse_test {
namespace {

using Layer = MoELayer<FeedForward<double>, TopKRouter<double>>;

Layer make_layer(const TopKRouter<double>::Options& options) {
  Rng rng(1);
  return {make_experts<FeedForward<double>>(3, {.d_model = 4, .d_ff = 5}, rng),
          TopKRouter<double>(options, rng),
          {make_experts<FeedForward<double>>(1, {.d_model = 4, .d_ff = 5}, rng)},
          true};
}

Matrix<double> tokens(Index rows) {
  Rng rng(2);
  Matrix<double> x(rows, 4);
  fill_normal(x, 1.0, rng);
  return x;
}

// The squared norm of all gradients: zero as long as nothing was added.
double norm(const Layer& grad) {
  double sum = 0;
  Layer::visit([&](const ParameterInfo&, const auto& g) { sum += g.squaredNorm(); }, grad);
  return sum;
}

TEST(MoELayerMisuse, ABackwardThatThrowsLeavesTheGradientAsItWas) {
  const Matrix<double> x = tokens(6);
  {
    const Layer layer =
        make_layer({.d_model = 4, .num_experts = 3, .top_k = 1, .softmax_before_selection = false});
    Layer::Cache cache;
    Layer grad = zeros_like(layer);
    const Matrix<double> y = layer.forward(x, cache);
    EXPECT_THROW(layer.backward(y, cache, grad), std::invalid_argument);
    EXPECT_EQ(norm(grad), 0.0);
  }
  const Layer layer = make_layer({.d_model = 4, .num_experts = 3});
  Layer grad = zeros_like(layer);
  const auto expect_refused = [&](Layer::Cache& cache, const std::string& what) {
    EXPECT_THROW(layer.backward(x, cache, grad), std::invalid_argument) << what;
    EXPECT_EQ(norm(grad), 0.0) << what;
  };
  Layer::Cache cache;
  layer.forward(x, cache);
  cache.routing.chosen = {};
  expect_refused(cache, "a routing without choices");
  layer.forward(x, cache);
  cache.routing = layer.route(tokens(5));
  expect_refused(cache, "a routing of another batch");
  layer.forward(x, cache);
  cache.routing.input_factor = tokens(5);
  expect_refused(cache, "jitter of another batch");
  layer.forward(x, cache);
  cache.routing.plan.choice[0] = cache.routing.plan.choice[1];
  expect_refused(cache, "an assignment that stems from another token's choice");
  layer.forward(x, cache);
  EXPECT_NO_THROW(layer.backward(x, cache, grad));
  EXPECT_GT(norm(grad), 0.0);
}

TEST(MoELayerMisuse, InPlaceIsRefused) {
  const Layer layer = make_layer({.d_model = 4, .num_experts = 3});
  Matrix<double> x = tokens(6);
  const Matrix<double> before = x;
  Layer::Workspace workspace;
  Layer::Cache cache;
  Layer grad = zeros_like(layer);
  Rng rng(1);
  EXPECT_THROW(layer.forward(x, x, workspace), std::invalid_argument);
  EXPECT_THROW(layer.forward(x, x, cache), std::invalid_argument);
  EXPECT_THROW(layer.forward(x, rng, x, cache), std::invalid_argument);
  layer.forward(before, cache);
  EXPECT_THROW(layer.backward(x, cache, grad, {}, x), std::invalid_argument);
  EXPECT_EQ(x, before);
  EXPECT_EQ(norm(grad), 0.0);
}

template <class F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

// A plan has one side that gates scale: refused where the parts meet, before any token.
TEST(MoELayerMisuse, GatedSharedExpertsBesideGatesOfInputsAreRefusedWhenTheLayerIsMade) {
  Rng rng(1);
  using E = FeedForward<float>;
  const E::Options options{.d_model = 4, .d_ff = 5};
  const TopKRouter<float> input({.d_model = 4, .num_experts = 2, .gate_side = GateSide::input}, rng);
  const HierarchicalRouter above(input, {input, input});
  const auto make = [&](const auto& router, bool gated) {
    return MoELayer(make_experts<E>(router.num_experts(), options, rng), router,
                    {make_experts<E>(3, options, rng), gated});
  };
  const std::string expected =
      ": 3 gated shared experts beside a router whose gates scale inputs, expected 0";
  EXPECT_EQ(message_of([&] { make(input, true); }), "MoELayer" + expected);
  EXPECT_EQ(message_of([&] { make(above, true); }), "MoELayer" + expected);
  EXPECT_NO_THROW(make(input, false));
  EXPECT_NO_THROW(make(above, false));
  EXPECT_NO_THROW(make(TopKRouter<float>({.d_model = 4, .num_experts = 2}, rng), true));
  // Packing, before the first expert is asked for.
  const Matrix<float> gates = Matrix<float>::Ones(3, 4);
  Index asked = 0;
  const auto expert = [&](Index) {
    ++asked;
    return E(options, rng);
  };
  EXPECT_EQ(message_of([&] {
              pack<F32>(PackedParts<TopKRouter<float>>{input, 3, gates}, expert);
            }),
            "pack" + expected);
  EXPECT_EQ(asked, 0);
  EXPECT_NO_THROW(pack<F32>(PackedParts<TopKRouter<float>>{input, 3}, expert));
  // A published model with a router of this kind, as load_layer makes its layer.
  auto model = llama4_scout.scaled_to(8, 4, 4);
  EXPECT_NO_THROW(make_empty_layer<float>(model));
  model.gated_shared_experts = true;
  EXPECT_THROW(make_empty_layer<float>(model), std::invalid_argument);
}

TEST(MoELayerMisuse, ParametersOfAnotherShapeAreRefused) {
  Layer layer = make_layer({.d_model = 4, .num_experts = 3});
  layer.b_output.setZero(5);
  EXPECT_THROW(layer.forward(tokens(2)), std::invalid_argument);
}

// A cache made by a layer whose experts keep another number of scalars a row.
TEST(MoELayerMisuse, ACacheOfExpertsOfAnotherWidthIsRefused) {
  Rng rng(1);
  const Layer layer = make_layer({.d_model = 4, .num_experts = 3});
  const Layer wider(make_experts<FeedForward<double>>(3, {.d_model = 4, .d_ff = 6}, rng), layer.router(),
                    {make_experts<FeedForward<double>>(1, {.d_model = 4, .d_ff = 6}, rng)}, true);
  Layer::Cache cache;
  const Matrix<double> x = tokens(6);
  layer.forward(x, cache);
  Layer grad = zeros_like(wider);
  EXPECT_THROW(wider.backward(x, cache, grad), std::invalid_argument);
  EXPECT_EQ(norm(grad), 0.0);
}

// Routers of users that do not do what they must.
struct ForgetfulRouter {
  using Scalar = double;
  Index d_model() const { return 4; }
  Index num_experts() const { return 3; }
  void route(const ConstMatrixRef<double>&, const BatchInfo&, Routing<double>&) const {}
};

TEST(MoELayerMisuse, ARouterThatMakesNoPlanIsRefused) {
  Rng rng(1);
  const MoELayer<FeedForward<double>, ForgetfulRouter> layer(
      make_experts<FeedForward<double>>(3, {.d_model = 4, .d_ff = 5}, rng), {});
  EXPECT_THROW(layer.forward(tokens(2)), std::invalid_argument);
}

// A router without parameters trains its experts, but can not take the gradient of a loss.
struct FirstExpertRouter {
  using Scalar = double;
  Index d_model() const { return 4; }
  Index num_experts() const { return 3; }
  void route(const ConstMatrixRef<double>& x, const BatchInfo& info, Routing<double>& routing) const {
    begin_routing(x.rows(), 3, info, routing, "FirstExpertRouter::route");
    mark_poisoned_rows(x, routing.plan);
    for (Index t = 0; t < x.rows(); ++t) {
      if (routing.is_valid(t)) {
        routing.chosen.expert.push_back(0);
        routing.chosen.gate.push_back(1.0);
      }
      routing.chosen.token_begin[t + 1] = routing.chosen.size();
    }
    dispatch_all(routing.chosen, routing.plan);
  }
};

TEST(MoELayerMisuse, ARoutingGradientForARouterWithoutBackwardIsRefused) {
  Rng rng(1);
  using Fixed = MoELayer<FeedForward<double>, FirstExpertRouter>;
  const Fixed layer(make_experts<FeedForward<double>>(3, {.d_model = 4, .d_ff = 5}, rng), {});
  Fixed::Cache cache;
  Fixed grad = zeros_like(layer);
  const Matrix<double> y = layer.forward(tokens(3), cache);
  RoutingGradient<double> gradient;
  gradient.d_gate.assign(3, 1.0);
  EXPECT_THROW(layer.backward(y, cache, grad, gradient), std::invalid_argument);
  EXPECT_NO_THROW(layer.backward(y, cache, grad));
  EXPECT_GT(grad.experts()[0].w_up.squaredNorm(), 0.0);
  EXPECT_EQ(grad.experts()[1].w_up.squaredNorm(), 0.0);
}

TEST(MoELayerMisuse, ARouterThatDoesNotLookAtXMarksPoisonedRows) {
  Rng rng(1);
  using Fixed = MoELayer<FeedForward<double>, FirstExpertRouter>;
  const Fixed layer(make_experts<FeedForward<double>>(3, {.d_model = 4, .d_ff = 5}, rng), {});
  Fixed::Cache cache;
  Fixed grad = zeros_like(layer);
  Matrix<double> x = tokens(3);
  x(1, 2) = std::numeric_limits<double>::quiet_NaN();
  const Matrix<double> y = layer.forward(x, cache);
  EXPECT_TRUE(y.row(1).array().isNaN().all());
  EXPECT_TRUE(y.row(0).allFinite() && y.row(2).allFinite());
  layer.backward(y, cache, grad);
  Fixed::visit([](const ParameterInfo&, const auto& g) { EXPECT_TRUE(g.allFinite()); }, grad);
}

TEST(MoELayerMisuse, TokensThatNobodyServesAreCounted) {
  Rng rng(1);
  const ExpertChoiceRouter<double> router({.d_model = 4, .num_experts = 3, .capacity = 0.5}, rng);
  Routing<double> routing;
  router.route(tokens(12), {}, routing);
  Index served = 0;
  for (Index t = 0; t < 12; ++t) served += !trace(routing, t).empty();
  EXPECT_EQ(unserved_tokens(routing), 12 - served);
  EXPECT_GE(unserved_tokens(routing), 12 - 3 * 2);
}

}  // namespace
}  // namespace moe::moe_layer_misuse_test
