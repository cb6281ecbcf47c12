// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

namespace selection_bias_test {
namespace {

using moe::Index;
using moe::IndexVector;
using moe::Matrix;
using moe::Vector;
using Router = moe::TopKRouter<double>;

TEST(SelectionBias, MovesTowardsExpertsBelowTheMean) {
  Vector<double> bias{{0, 1, 2, 3}};
  moe::update_selection_bias(bias, IndexVector{{4, 5, 6, 5}}, 0.25);
  EXPECT_EQ(bias, (Vector<double>{{.25, 1, 1.75, 3}}));
  moe::update_selection_bias(bias, IndexVector{{1, 0, 0, 0}}, 0.5);  // the mean is no integer
  EXPECT_EQ(bias, (Vector<double>{{-.25, 1.5, 2.25, 3.5}}));
}

// The published trap: a bias that selects must not enter the gates. Selected experts and gates
// computed with Python in double for DeepSeek-V3's router; leaking would give 1.275 and 1.225.
TEST(SelectionBias, SelectsAndDoesNotLeakIntoGates) {
  moe::Rng rng(1);
  Router router({.d_model = 8,
                 .num_experts = 8,
                 .top_k = 2,
                 .score = moe::Score::sigmoid,
                 .renormalise = true,
                 .renormalise_epsilon = 1e-20,
                 .gate_scale = 2.5,
                 .selection_bias = true},
                rng);
  router.w_router.setIdentity();
  router.selection_bias << 0, 0, 0, -.4, 0, .3, 0, .9;
  const Matrix<double> x{{1, .5, -.25, 2, -1, .75, 0, -2}};
  moe::Routing<double> routing;
  router.route(x, {}, routing);
  ASSERT_EQ(routing.chosen.size(), 2);
  EXPECT_EQ(routing.chosen.expert[0], 7);
  EXPECT_EQ(routing.chosen.expert[1], 5);
  EXPECT_NEAR(routing.chosen.gate[0], 0.373264235, 1e-9);
  EXPECT_NEAR(routing.chosen.gate[1], 2.12673577, 1e-8);
  // What the gates would be if the bias leaked.
  const auto biased = [&](moe::Index e) { return 1 / (1 + std::exp(-x(0, e))) + router.selection_bias[e]; };
  const double leaked = 2.5 * biased(7) / (biased(7) + biased(5));
  EXPECT_NEAR(leaked, 1.2750354, 1e-7);
  EXPECT_NEAR(2.5 - leaked, 1.2249646, 1e-7);
}

// Trained on nothing but its bias, a router that sends every token to one expert spreads them.
TEST(SelectionBias, BalancesALoad) {
  moe::Rng rng(2);
  Router router({.d_model = 6,
                 .num_experts = 4,
                 .top_k = 1,
                 .score = moe::Score::sigmoid,
                 .bias = true,
                 .selection_bias = true},
                rng);
  router.b_router << 2, 0, -1, -1;
  Matrix<double> x(400, 6);
  moe::fill_normal(x, 1.0, rng);
  moe::Routing<double> routing;
  router.route(x, {}, routing);
  const double before = moe::coefficient_of_variation(moe::demand_per_expert(routing));
  for (int step = 0; step < 500; ++step) {
    router.route(x, {}, routing);
    moe::update_selection_bias(router.selection_bias, moe::demand_per_expert(routing), 3e-3);
  }
  const double after = moe::coefficient_of_variation(moe::demand_per_expert(routing));
  EXPECT_GT(before, 1);
  EXPECT_LT(after, 0.1);
}

TEST(SelectionBias, IsABufferWithoutAGradient) {
  moe::Rng rng(3);
  const Router router({.d_model = 3, .num_experts = 4, .selection_bias = true}, rng);
  const Router grad = moe::zeros_like(router);
  EXPECT_EQ(grad.selection_bias.size(), 0);
  EXPECT_EQ(moe::num_parameters(router), 12);
  bool seen = false;
  Router::visit([&](const moe::ParameterInfo& info,
                    const auto&) { seen |= info.name == "selection_bias" && info.kind == moe::Kind::buffer; },
                router);
  EXPECT_TRUE(seen);
}

// What cannot be ranked is refused before anything is routed by it; minus infinity keeps every token away.
TEST(SelectionBias, ThatIsNotANumberIsRefused) {
  Router router(
      {.d_model = 3, .num_experts = 3, .top_k = 2, .score = moe::Score::sigmoid, .selection_bias = true});
  router.w_router.setIdentity();
  const Matrix<double> x{{1, 2, 3}, {-1, 0.5, 2}};
  moe::Routing<double> routing;
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    router.selection_bias << 0, bad, 0.5;
    try {
      router.route(x, {}, routing);
      FAIL() << bad;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find("selection_bias[1] = "), std::string::npos) << error.what();
    }
  }
  router.selection_bias << 0, 0, -std::numeric_limits<double>::infinity();
  router.route(x, {}, routing);
  EXPECT_EQ(routing.chosen.expert, (moe::Buffer<Index>{1, 0, 1, 0}));
  // A token that is left without any expert is not one that nobody serves, silently.
  router.selection_bias.setConstant(-std::numeric_limits<double>::infinity());
  router.route(x, {}, routing);
  EXPECT_EQ(routing.chosen.size(), 0);
  for (const Index t : {0, 1}) EXPECT_EQ(routing.plan.token_state[t], moe::TokenState::poisoned);
  EXPECT_EQ(routing.router_probs, (Matrix<double>::Zero(2, 3)));
}

// The same of a ranking that a router of one's own gives: its token is poisoned, the others are not.
TEST(SelectionBias, ARankingThatIsNotANumberPoisonsItsToken) {
  moe::Routing<double> routing;
  moe::begin_routing(Index(3), Index(2), {}, routing, "test");
  routing.router_logits = Matrix<double>{{1, 2}, {1, 2}, {1, 2}};
  const moe::ReusedMatrix<double> ranking =
      Matrix<double>{{2, 1}, {std::numeric_limits<double>::quiet_NaN(), 1}, {1, 2}};
  moe::RouterWorkspace<double> workspace;
  moe::route_by_logits(moe::SeatingRule{}, {.ranking = &ranking}, {}, routing, workspace, moe::Sequential{});
  EXPECT_EQ(routing.plan.token_state[1], moe::TokenState::poisoned);
  EXPECT_EQ(routing.chosen.expert, (moe::Buffer<Index>{0, 1}));
}

TEST(SelectionBias, ComesAndGoesWithExperts) {
  moe::Rng rng(4);
  Router router({.d_model = 3, .num_experts = 3, .top_k = 1, .bias = true, .selection_bias = true}, rng);
  router.selection_bias << 1, 2, 3;
  router.add_expert(Vector<double>::Ones(3));
  EXPECT_EQ(router.selection_bias, (Vector<double>{{1, 2, 3, 0}}));
  router.remove_expert(1);
  EXPECT_EQ(router.selection_bias, (Vector<double>{{1, 3, 0}}));
  EXPECT_EQ(router.b_router.size(), 3);
}

}  // namespace
}  // namespace selection_bias_test
