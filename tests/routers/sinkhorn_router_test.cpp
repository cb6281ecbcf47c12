// SPDX-License-Identifier: MIT
#include <cmath>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "gradients/layers.hpp"

namespace sinkhorn_router_test {
namespace {

using moe::Index;
using moe::Matrix;
using moe::Rng;
using Router = moe::SinkhornRouter<double>;

// Logits of four tokens for which the plan was computed with Python in double, by Megatron-LM's formula.
// The plan sends every token to an expert of its own, though three of four prefer the first.
const Matrix<double> kLogits{{2, 1, 0, -1}, {1.5, 1, .2, .1}, {1.2, .3, .9, -.5}, {-.3, .4, .2, 1.1}};

Router identity_router(Router::Options options) {
  options.d_model = options.num_experts = 4;
  Router router(options);
  router.w_router.setIdentity();
  return router;
}

TEST(SinkhornRouter, SelectsByTheBalancedPlanInTraining) {
  const Router router = identity_router({});
  Rng rng(1);
  moe::Routing<double> routing;
  router.route(kLogits, rng, {}, routing);
  for (Index t = 0; t < 4; ++t) {
    EXPECT_EQ(routing.chosen.expert[t], t);
    EXPECT_NEAR(routing.chosen.gate[t], 1 / (1 + std::exp(-kLogits(t, t))), 1e-15);
  }
  EXPECT_EQ(rng, Rng(1));
  router.route(kLogits, {}, routing);
  EXPECT_EQ(routing.chosen.expert, (moe::Buffer<Index>{0, 0, 0, 3}));
}

TEST(SinkhornRouter, ThePlanHasEvenRowsAndColumns) {
  Rng rng(2);
  Matrix<double> z(40, 5);
  moe::SinkhornWorkspace<double> workspace{.plan = Matrix<double>(40, 5)};
  moe::ReusedMatrix<double>& plan = workspace.plan;
  moe::fill_normal(z, 3.0, rng);
  moe::Buffer<moe::TokenState> state;
  state.assign(40, moe::TokenState::valid);
  state[7] = moe::TokenState::masked;
  moe::detail::balance_by_sinkhorn(z, state, Index(0), Index(40),
                                   {.tolerance = 1e-12, .max_iterations = 10000}, workspace);
  plan.row(7).setZero();
  for (Index e = 0; e < 5; ++e) EXPECT_NEAR(plan.col(e).sum(), 1.0 / 5, 1e-5);
  for (Index t = 0; t < 40; ++t) EXPECT_NEAR(plan.row(t).sum(), t == 7 ? 0 : 1.0 / 39, 1e-5);
}

// Two tokens and two experts with exp(z) = (2, 1), (1, 1), by hand. Experts' factors are 6/7 and 6/5 after
// one iteration, which changes them by 6/35 on average; 1224/1435 and 1224/1015 after two, by about 0.005.
TEST(SinkhornRouter, BalancingEndsByItsToleranceOrItsNumberOfIterations) {
  const Matrix<double> z{{std::log(2.0), 0}, {0, 0}};
  const Matrix<double> one{{2.0 / 7, 1.0 / 5}, {3.0 / 14, 3.0 / 10}},
      two{{12.0 / 41, 6.0 / 29}, {17.0 / 82, 17.0 / 58}};
  const Matrix<double> balanced{{std::sqrt(2.0) / (2 + 2 * std::sqrt(2.0)), 1 / (2 + 2 * std::sqrt(2.0))},
                                {1 / (2 + 2 * std::sqrt(2.0)), std::sqrt(2.0) / (2 + 2 * std::sqrt(2.0))}};
  moe::Buffer<moe::TokenState> state;
  state.assign(2, moe::TokenState::valid);
  const auto plan_of = [&](double tolerance, Index max_iterations) {
    moe::SinkhornWorkspace<double> workspace{.plan = Matrix<double>(2, 2)};
    moe::detail::balance_by_sinkhorn(z, state, Index(0), Index(2),
                                     {.tolerance = tolerance, .max_iterations = max_iterations}, workspace);
    return workspace.plan;
  };
  EXPECT_TRUE(plan_of(0, 1).isApprox(one, 1e-7));
  EXPECT_TRUE(plan_of(0, 2).isApprox(two, 1e-7));
  EXPECT_TRUE(plan_of(0, 200).isApprox(balanced, 1e-7));
  EXPECT_TRUE(plan_of(6.0 / 35 + 1e-6, 200).isApprox(one, 1e-7));
  EXPECT_TRUE(plan_of(6.0 / 35 - 1e-6, 200).isApprox(two, 1e-7));
  EXPECT_FALSE(plan_of(0.005, 200).isApprox(two, 1e-4));
}

TEST(SinkhornRouter, FarLogitsAreOrdinary) {
  const Router router = identity_router({.top_k = 2});
  Rng rng(3);
  Matrix<double> x = 500 * kLogits;
  moe::Routing<double> routing;
  router.route(x, rng, {}, routing);
  EXPECT_EQ(routing.plan.num_assignments(), 8);
  for (const double gate : routing.chosen.gate) EXPECT_TRUE(std::isfinite(gate));
}

TEST(SinkhornRouter, OptionsOutOfRangeAreRefused) {
  const auto make = [](Router::Options options) { return [=] { Router{options}; }; };
  const Router::Options good{.d_model = 4, .num_experts = 3};
  auto bad = good;
  bad.d_model = 0;
  EXPECT_THROW(make(bad)(), std::invalid_argument);
  bad = good;
  bad.num_experts = 0;
  EXPECT_THROW(make(bad)(), std::invalid_argument);
  bad = good;
  bad.top_k = 4;
  EXPECT_THROW(make(bad)(), std::invalid_argument);
  bad = good;
  bad.tolerance = -1;
  EXPECT_THROW(make(bad)(), std::invalid_argument);
  bad = good;
  bad.max_iterations = 0;
  EXPECT_THROW(make(bad)(), std::invalid_argument);
  EXPECT_NO_THROW(make(good)());
}

TEST(GradientsOfSinkhornLayers, AreExactForOneExpertAToken) {
  using namespace gradients;
  check_all_seatings<ReLUExpert>(21, [](const Seating& seating, Rng& rng) {
    return Router(seated<Router::Options>({.top_k = 1}, seating), rng);
  });
}

TEST(GradientsOfSinkhornLayers, AreExactForTwo) {
  using namespace gradients;
  check_all_seatings<ReLUExpert>(22, [](const Seating& seating, Rng& rng) {
    return Router(seated<Router::Options>({.top_k = 2}, seating), rng);
  });
}

// A token's distance to the others is no reason for them to crowd at an expert.
template <class S>
void expect_balance_beside_a_far_token() {
  Rng rng(5);
  Matrix<S> x(65, 4);
  moe::fill_normal(x, 1.0, rng);
  x.col(0).array() += S(1);  // most tokens prefer expert 0
  moe::SinkhornRouter<S> router({.d_model = 4, .num_experts = 4});
  router.w_router.setIdentity();
  moe::Routing<S> routing;
  moe::Buffer<Index> nearby;
  for (const double far : {20.0, 40.0, 60.0, 500.0}) {
    x.row(64).setZero();
    x(64, 1) = S(far);
    router.route(x, rng, {}, routing);
    const moe::IndexVector counts = moe::demand_per_expert(routing);
    EXPECT_GE(counts.minCoeff(), 10) << "far = " << far << ": " << counts.transpose();
    EXPECT_LE(counts.maxCoeff(), 22) << "far = " << far << ": " << counts.transpose();
    EXPECT_EQ(routing.chosen.expert[64], 1);
    if (nearby.empty()) nearby = routing.chosen.expert;
    EXPECT_EQ(routing.chosen.expert, nearby) << "far = " << far;
  }
  router.route(x, {}, routing);  // without balance they do crowd
  EXPECT_GT(moe::demand_per_expert(routing).maxCoeff(), 25);
}
TEST(SinkhornRouter, OneFarTokenLeavesTheOthersBalanced) {
  expect_balance_beside_a_far_token<double>();
  expect_balance_beside_a_far_token<float>();
}

}  // namespace
}  // namespace sinkhorn_router_test
