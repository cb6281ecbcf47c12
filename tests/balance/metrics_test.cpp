// SPDX-License-Identifier: MIT
#include <cmath>
#include <stdexcept>
#include <vector>

#include <gtest/gtest.h>

#include <moe/balance/metrics.hpp>
#include <moe/routers/expert_choice_router.hpp>
#include <moe/routers/top_k_router.hpp>

namespace metrics_test {
namespace {

using moe::Index;
using moe::IndexVector;
using moe::Matrix;
using moe::Routing;

Routing<double> route(const Matrix<double>& logits, moe::TopKRouter<double>::Options options,
                      const moe::BatchInfo& info = {}) {
  moe::Rng rng(1);
  options.d_model = options.num_experts = logits.cols();
  moe::TopKRouter<double> router(options, rng);
  router.w_router.setIdentity();
  Routing<double> routing;
  router.route(logits, info, routing, moe::Sequential{});
  return routing;
}

Matrix<double> known_logits() {
  Matrix<double> z(4, 4);
  z << 2, 1, 0, -1, 1.5, 1, .2, .1, 1.2, .3, .9, -.5, -.3, .4, .2, 1.1;
  return z;
}

TEST(Metrics, DemandIsBeforeCapacityAndLoadAfterIt) {
  // Choices: 0 1, 0 1, 0 2, 3 1. Two seats each.
  const Routing<double> routing = route(known_logits(), {.top_k = 2, .capacity = 1.0});
  EXPECT_EQ(moe::demand_per_expert(routing), (IndexVector{{3, 3, 1, 1}}));
  EXPECT_EQ(moe::tokens_per_expert(routing), (IndexVector{{2, 2, 1, 1}}));
  EXPECT_EQ(moe::dropped_fraction(routing), 0.25);
}

TEST(Metrics, WithoutCapacityLoadIsDemand) {
  const Routing<double> routing = route(known_logits(), {.top_k = 2});
  EXPECT_EQ(moe::tokens_per_expert(routing), (IndexVector{{3, 3, 1, 1}}));
  EXPECT_EQ(moe::dropped_fraction(routing), 0);
}

TEST(Metrics, MaskedTokensAreNobodysLoad) {
  moe::BatchInfo info;
  info.mask = moe::Mask::Constant(4, true);
  info.mask[1] = false;
  const Routing<double> routing = route(known_logits(), {.top_k = 2}, info);
  EXPECT_EQ(moe::demand_per_expert(routing), (IndexVector{{2, 2, 1, 1}}));
}

TEST(Metrics, CoefficientOfVariationAndMaxOverMeanByHand) {
  const IndexVector load{{3, 3, 1, 1}};  // mean 2, standard deviation 1
  EXPECT_DOUBLE_EQ(moe::coefficient_of_variation(load), 0.5);
  EXPECT_DOUBLE_EQ(moe::max_over_mean(load), 1.5);
  const IndexVector balanced{{7, 7, 7}};
  EXPECT_EQ(moe::coefficient_of_variation(balanced), 0);
  EXPECT_EQ(moe::max_over_mean(balanced), 1);
  const IndexVector one{{0, 0, 9, 0}};
  EXPECT_DOUBLE_EQ(moe::coefficient_of_variation(one), std::sqrt(3.0));
  EXPECT_EQ(moe::max_over_mean(one), 4);
}

TEST(Metrics, OfNoLoadAreZero) {
  for (const IndexVector& none : {IndexVector(), IndexVector(IndexVector::Zero(4))}) {
    EXPECT_EQ(moe::coefficient_of_variation(none), 0);
    EXPECT_EQ(moe::max_over_mean(none), 0);
  }
  const Routing<double> empty = route(Matrix<double>(0, 4), {.top_k = 2});
  EXPECT_EQ(moe::demand_per_expert(empty), IndexVector::Zero(4));
  EXPECT_EQ(moe::tokens_per_expert(empty), IndexVector::Zero(4));
  EXPECT_EQ(moe::routing_entropy(empty), 0);
  EXPECT_EQ(moe::dropped_fraction(empty), 0);
}

TEST(Metrics, EntropyOfKnownRows) {
  EXPECT_NEAR(moe::routing_entropy(route(known_logits(), {.top_k = 2})), 1.1657084447344936, 1e-14);
  EXPECT_NEAR(moe::routing_entropy(route(Matrix<double>::Zero(3, 8), {})), std::log(8.0), 1e-14);
  Matrix<double> sure = Matrix<double>::Zero(3, 8);
  sure.col(5).setConstant(2000);
  EXPECT_EQ(moe::routing_entropy(route(sure, {})), 0);
}

TEST(Metrics, EntropyIsTheMeanOverValidTokens) {
  moe::BatchInfo info;
  info.mask = moe::Mask::Constant(3, true);
  info.mask[2] = false;
  Matrix<double> z = Matrix<double>::Zero(3, 8);
  z(0, 1) = 2000;  // entropy 0, log 8, masked
  EXPECT_NEAR(moe::routing_entropy(route(z, {}, info)), std::log(8.0) / 2, 1e-14);
}

TEST(Trace, NamesTheExpertsOfATokenAscendingWithTheirGates) {
  const Routing<double> routing = route(known_logits(), {.top_k = 2, .capacity = 1.0});
  const auto of_token_0 = moe::trace(routing, 0);
  ASSERT_EQ(of_token_0.size(), 2u);
  EXPECT_EQ(of_token_0[0].expert, 0);
  EXPECT_EQ(of_token_0[1].expert, 1);
  EXPECT_EQ(of_token_0[0].gate, routing.router_probs(0, 0));
  EXPECT_EQ(of_token_0[1].gate, routing.router_probs(0, 1));
  const auto of_token_2 = moe::trace(routing, 2);  // lost expert 0
  ASSERT_EQ(of_token_2.size(), 1u);
  EXPECT_EQ(of_token_2[0].expert, 2);
  const auto of_token_3 = moe::trace(routing, 3);  // lost its second choice, expert 1
  ASSERT_EQ(of_token_3.size(), 1u);
  EXPECT_EQ(of_token_3[0].expert, 3);
}

TEST(Trace, OfATokenThatGoesNowhereIsEmpty) {
  moe::BatchInfo info;
  info.mask = moe::Mask::Constant(4, true);
  info.mask[3] = false;
  EXPECT_TRUE(moe::trace(route(known_logits(), {.top_k = 2}, info), 3).empty());
  EXPECT_TRUE(moe::trace(route(known_logits(), {.top_k = 2, .capacity = 0.0}), 0).empty());
}

TEST(Trace, HoldsAllAssignmentsOfAnExpertChoiceRouting) {
  moe::Rng rng(1);
  moe::ExpertChoiceRouter<double> router({.d_model = 4, .num_experts = 4, .capacity = 2.0}, rng);
  router.w_router.setIdentity();
  Routing<double> routing;
  router.route(known_logits(), {}, routing);
  std::vector<Index> experts_of_token;
  for (Index t = 0; t < 4; ++t) experts_of_token.push_back(Index(moe::trace(routing, t).size()));
  // Experts take {0,1}, {0,1}, {2,3}, {1,3}.
  EXPECT_EQ(experts_of_token, (std::vector<Index>{2, 3, 1, 2}));
}

TEST(Trace, RefusesATokenThatIsNotThere) {
  const Routing<double> routing = route(known_logits(), {});
  EXPECT_THROW(moe::trace(routing, 4), std::invalid_argument);
  EXPECT_THROW(moe::trace(routing, -1), std::invalid_argument);
}

}  // namespace
}  // namespace metrics_test
