// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/balance/loss.hpp>
#include <moe/routers/expert_choice_router.hpp>
#include <moe/routers/hash_router.hpp>
#include <moe/routers/noisy_top_k_router.hpp>
#include <moe/routers/sinkhorn_router.hpp>
#include <moe/routers/top_k_router.hpp>

namespace routers_test {
namespace {

using moe::BatchInfo;
using moe::Index;
using moe::IndexVector;
using moe::Matrix;
using moe::Overflow;
using moe::Rng;
using moe::Routing;
using moe::TokenState;
using moe::Vector;
using TopK = moe::TopKRouter<double>;
using Noisy = moe::NoisyTopKRouter<double>;
using ExpertChoice = moe::ExpertChoiceRouter<double>;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

static_assert(moe::TrainableRouter<TopK> && moe::TrainableRouter<moe::TopKRouter<float>>);
static_assert(moe::TrainableRouter<Noisy> && moe::TrainableRouter<ExpertChoice>);
static_assert(std::copyable<TopK> && std::copyable<Noisy> && std::copyable<ExpertChoice>);
static_assert(std::copyable<Routing<float>>);

// A router whose logits are x itself.
template <class R>
R identity_router(typename R::Options options, Index experts = 4) {
  Rng rng(1);
  options.d_model = options.num_experts = experts;
  R router(options, rng);
  router.w_router.setIdentity();
  return router;
}

template <class R>
Routing<double> route(const R& router, const Matrix<double>& x, const BatchInfo& info = {}) {
  Routing<double> routing;
  router.route(x, info, routing);
  return routing;
}

Matrix<double> known_logits() {
  Matrix<double> z(4, 4);
  z << 2, 1, 0, -1, 1.5, 1, .2, .1, 1.2, .3, .9, -.5, -.3, .4, .2, 1.1;
  return z;
}

BatchInfo masked(const std::vector<bool>& valid) {
  BatchInfo info;
  info.mask.resize(Index(valid.size()));
  for (std::size_t t = 0; t < valid.size(); ++t) info.mask[Index(t)] = valid[t];
  return info;
}

std::vector<Index> chosen_by(const Routing<double>& routing, Index t) {
  const auto& c = routing.chosen;
  return {c.expert.begin() + c.token_begin[t], c.expert.begin() + c.token_begin[t + 1]};
}
std::vector<double> gates_of(const Routing<double>& routing, Index t) {
  const auto& c = routing.chosen;
  return {c.gate.begin() + c.token_begin[t], c.gate.begin() + c.token_begin[t + 1]};
}
std::vector<std::vector<Index>> tokens_of_experts(const Routing<double>& routing) {
  const auto& plan = routing.plan;
  std::vector<std::vector<Index>> lists;
  for (Index e = 0; e < plan.num_experts(); ++e)
    lists.emplace_back(plan.token.begin() + plan.expert_begin[e],
                       plan.token.begin() + plan.expert_begin[e + 1]);
  return lists;
}
using Lists = std::vector<std::vector<Index>>;

// ---- TopKRouter.

TEST(TopKRouter, LogitsAreALinearLayerWithBias) {
  Rng rng(2);
  TopK router({.d_model = 2, .num_experts = 3, .top_k = 1, .bias = true}, rng);
  router.w_router << 1, 2, 3, 4, 5, 6;
  router.b_router << .5, -1, 0;
  const Routing<double> routing = route(router, Matrix<double>{{1, 10}, {-1, 1}});
  EXPECT_EQ(routing.router_logits, (Matrix<double>{{21.5, 42, 65}, {1.5, 0, 1}}));
  EXPECT_EQ(tokens_of_experts(routing), (Lists{{1}, {}, {0}}));
}

TEST(TopKRouter, ChoosesTheBestWithTheGatesOfItsRecipe) {
  const Matrix<double> x = known_logits();
  const double e1 = std::exp(1), e2 = std::exp(2), sum = e2 + e1 + 1 + 1 / e1;
  const auto before = route(identity_router<TopK>({.top_k = 2}), x);
  EXPECT_EQ(tokens_of_experts(before), (Lists{{0, 1, 2}, {0, 1, 3}, {2}, {3}}));
  EXPECT_EQ(chosen_by(before, 0), (std::vector<Index>{0, 1}));
  EXPECT_EQ(chosen_by(before, 3), (std::vector<Index>{3, 1}));  // best first
  EXPECT_NEAR(gates_of(before, 0)[0], e2 / sum, 1e-15);
  EXPECT_NEAR(gates_of(before, 0)[1], e1 / sum, 1e-15);
  EXPECT_EQ(gates_of(before, 0)[0], before.router_probs(0, 0));
  for (const auto& options :
       {TopK::Options{.top_k = 2, .renormalise = true},
        TopK::Options{.top_k = 2, .softmax_before_selection = false},
        TopK::Options{.top_k = 2, .softmax_before_selection = false, .renormalise = true}}) {
    const auto after = route(identity_router<TopK>(options), x);
    EXPECT_NEAR(gates_of(after, 0)[0], e2 / (e2 + e1), 1e-15);
    EXPECT_NEAR(gates_of(after, 0)[1], e1 / (e2 + e1), 1e-15);
    EXPECT_TRUE(after.router_probs.isApprox(before.router_probs, 1e-15));
  }
}

TEST(TopKRouter, ThePlanIsTheChoicesGroupedByExpert) {
  const auto routing = route(identity_router<TopK>({.top_k = 2}), known_logits());
  const auto& plan = routing.plan;
  EXPECT_EQ(plan.num_tokens, 4);
  EXPECT_EQ(plan.num_assignments(), 8);
  for (Index e = 0; e < 4; ++e) {
    for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
      const Index c = plan.choice[a];
      EXPECT_EQ(routing.chosen.expert[c], e);
      EXPECT_EQ(routing.chosen.gate[c], plan.gate[a]);
      EXPECT_EQ(c / 2, plan.token[a]);
    }
  }
  EXPECT_TRUE(plan.dropped.empty() && plan.passed_through.empty());
  EXPECT_TRUE(plan.gate_side == moe::GateSide::output);
}

TEST(TopKRouter, GivesTiesToTheLowerExpert) {
  const auto routing = route(identity_router<TopK>({.top_k = 2}), Matrix<double>::Zero(3, 4));
  for (Index t = 0; t < 3; ++t) EXPECT_EQ(chosen_by(routing, t), (std::vector<Index>{0, 1}));
  EXPECT_EQ(routing.plan.gate[0], 0.25);
}

TEST(TopKRouter, AllExpertsMayBeChosen) {
  const auto routing = route(identity_router<TopK>({.top_k = 4, .renormalise = true}), known_logits());
  EXPECT_EQ(tokens_of_experts(routing), Lists(4, {0, 1, 2, 3}));
  const auto one = route(identity_router<TopK>({.top_k = 1}, 1), Matrix<double>{{-7.}});
  EXPECT_EQ(one.plan.gate[0], 1);
}

TEST(TopKRouter, CapacityOfInferenceIsNotThatOfTraining) {
  const auto router = identity_router<TopK>({.top_k = 2, .capacity = 1.0, .training_capacity = 0.5});
  const auto inference = route(router, known_logits());
  EXPECT_EQ(tokens_of_experts(inference), (Lists{{0, 1}, {0, 1}, {2}, {3}}));
  ASSERT_EQ(inference.plan.dropped.size(), 2);
  EXPECT_EQ(inference.plan.dropped[0], (moe::Dropped{2, 0, 0}));
  EXPECT_EQ(inference.plan.dropped[1], (moe::Dropped{3, 1, 1}));
  Routing<double> training;
  Rng rng(1);
  router.route(known_logits(), rng, {}, training);
  EXPECT_EQ(tokens_of_experts(training), (Lists{{0}, {0}, {2}, {3}}));
  EXPECT_EQ(training.chosen, inference.chosen);  // demand is before capacity
}

TEST(TopKRouter, CapacityCountsValidTokensOfEachGroup) {
  BatchInfo info = masked({1, 0, 1, 1, 0, 0});
  info.group_begin = IndexVector{{0, 2, 6}};
  Matrix<double> x = Matrix<double>::Zero(6, 2);
  x.col(0).setOnes();  // everybody wants expert 0
  // ceil(2 * 1 * 1 / 2) = 1 seat in the first group, ceil(2 * 1 * 2 / 2) = 2 in the second.
  const auto routing = route(identity_router<TopK>({.top_k = 1, .capacity = 2.0}, 2), x, info);
  EXPECT_EQ(tokens_of_experts(routing), (Lists{{0, 2, 3}, {}}));
  const auto tight = route(identity_router<TopK>({.top_k = 1, .capacity = 1.0}, 2), x, info);
  EXPECT_EQ(tokens_of_experts(tight), (Lists{{0, 2}, {}}));
  ASSERT_EQ(tight.plan.dropped.size(), 1);
  EXPECT_EQ(tight.plan.dropped[0], (moe::Dropped{3, 0, 0}));
}

TEST(TopKRouter, GatesStayThoseOfDemandUnlessRenormalisedAfterDrop) {
  TopK::Options options{.top_k = 2, .renormalise = true, .capacity = 1.0};
  const auto kept = route(identity_router<TopK>(options), known_logits());
  options.renormalise_after_drop = true;
  const auto again = route(identity_router<TopK>(options), known_logits());
  // Token 2 lost expert 0 and has expert 2 alone: assignment 4.
  ASSERT_EQ(kept.plan.token[4], 2);
  EXPECT_NEAR(kept.plan.gate[4], 1 / (1 + std::exp(0.3)), 1e-15);
  EXPECT_EQ(again.plan.gate[4], 1);
  EXPECT_EQ(again.chosen, kept.chosen);
  EXPECT_EQ(again.plan.gate[0], kept.plan.gate[0]);  // token 0 kept both
}

TEST(TopKRouter, NextBestMakesGatesOverTheFinalSet) {
  for (const bool renormalise : {false, true}) {
    const auto routing =
        route(identity_router<TopK>(
                  {.top_k = 2, .renormalise = renormalise, .capacity = 1.0, .overflow = Overflow::next_best}),
              known_logits());
    // Token 2 loses expert 0 and token 3 expert 1. With experts 0 and 1 full, token 2 takes expert
    // 3 beside its expert 2, and token 3 expert 2 beside its expert 3.
    EXPECT_EQ(tokens_of_experts(routing), (Lists{{0, 1}, {0, 1}, {2, 3}, {2, 3}}));
    EXPECT_TRUE(routing.plan.dropped.empty());
    const auto& p = routing.router_probs;
    for (const Index t : {2, 3}) {
      const double sum = renormalise ? p(t, 2) + p(t, 3) : 1;
      EXPECT_NEAR(routing.plan.gate[t == 2 ? 4 : 5], p(t, 2) / sum, 1e-15);
      EXPECT_NEAR(routing.plan.gate[t == 2 ? 6 : 7], p(t, 3) / sum, 1e-15);
    }
    EXPECT_EQ(routing.plan.gate[1], gates_of(routing, 1)[0]);
    EXPECT_EQ(chosen_by(routing, 2), (std::vector<Index>{0, 2}));  // demand as it was
  }
}

TEST(TopKRouter, UnavailableExpertsAreNeverChosenAndNeverNextBest) {
  auto router =
      identity_router<TopK>({.top_k = 3, .bias = true, .capacity = 1.0, .overflow = Overflow::next_best});
  router.b_router << 0, -kInf, 0, -kInf;
  const auto routing = route(router, known_logits());
  for (Index t = 0; t < 4; ++t) {
    EXPECT_EQ(chosen_by(routing, t).size(), 2u);
    EXPECT_EQ(routing.router_probs(t, 1), 0);
    EXPECT_NEAR(routing.router_probs(t, 0) + routing.router_probs(t, 2), 1, 1e-15);
  }
  EXPECT_EQ(routing.plan.rows_of(1) + routing.plan.rows_of(3), 0);
}

TEST(TopKRouter, MaskedAndPoisonedTokensGoNowhere) {
  auto router = identity_router<TopK>({.top_k = 2, .bias = true});
  Matrix<double> x = known_logits().replicate(2, 1);
  x(1, 2) = kNan;
  x(2, 0) = kInf;  // infinity times zero is NaN in the other logits
  x(4, 3) = kNan;
  const auto routing = route(router, x, masked({1, 1, 1, 1, 0, 1, 0, 1}));
  const std::vector<TokenState> expected = {TokenState::valid,  TokenState::poisoned, TokenState::poisoned,
                                            TokenState::valid,  TokenState::masked,   TokenState::valid,
                                            TokenState::masked, TokenState::valid};
  for (Index t = 0; t < 8; ++t) {
    EXPECT_TRUE(routing.plan.token_state[t] == expected[std::size_t(t)]) << t;
    const bool valid = expected[std::size_t(t)] == TokenState::valid;
    EXPECT_EQ(chosen_by(routing, t).size(), valid ? 2u : 0u);
    EXPECT_EQ((routing.router_probs.row(t).array() == 0).all(), !valid);
  }
  EXPECT_EQ(routing.plan.num_valid_tokens(), 4);
  router.b_router.setConstant(-kInf);  // nobody is available to anybody
  const auto none = route(router, known_logits());
  EXPECT_EQ(none.plan.num_valid_tokens(), 0);
  router.b_router << 0, 0, kInf, 0;
  EXPECT_EQ(route(router, known_logits()).plan.num_valid_tokens(), 0);
}

TEST(TopKRouter, JitterMultipliesTheInputInTrainingOnly) {
  const double jitter = 0.25;
  const auto router = identity_router<TopK>({.top_k = 2, .jitter = jitter});
  const Matrix<double> x = known_logits();
  Rng rng(5), expected(5);
  Routing<double> routing;
  router.route(x, rng, masked({1, 0, 1, 1}), routing);
  ASSERT_EQ(routing.input_factor.size(), x.size());
  double least = 2, most = 0;
  for (Index t = 0; t < 4; ++t) {
    for (Index j = 0; j < 4; ++j) {  // row-major, masked tokens included
      const double factor = expected.uniform(1 - jitter, 1 + jitter);
      EXPECT_EQ(routing.input_factor(t, j), factor);
      EXPECT_EQ(routing.router_logits(t, j), x(t, j) * factor);
    }
  }
  EXPECT_EQ(rng, expected);
  for (int i = 0; i < 200; ++i) {
    router.route(x, rng, {}, routing);
    least = std::min(least, routing.input_factor.minCoeff());
    most = std::max(most, routing.input_factor.maxCoeff());
    EXPECT_TRUE(routing.input_factor.allFinite());
  }
  EXPECT_GE(least, 1 - jitter);
  EXPECT_LT(most, 1 + jitter);
  EXPECT_LT(least, 1 - 0.95 * jitter);
  EXPECT_GT(most, 1 + 0.95 * jitter);
  router.route(x, {}, routing);
  EXPECT_EQ(routing.input_factor.size(), 0);
  EXPECT_EQ(routing.router_logits, x);
}

TEST(TopKRouter, WithoutJitterTrainingDrawsNothing) {
  const auto router = identity_router<TopK>({.top_k = 2});
  Rng rng(6);
  Routing<double> routing;
  router.route(known_logits(), rng, {}, routing);
  EXPECT_EQ(rng, Rng(6));
  EXPECT_EQ(routing.router_logits, known_logits());
}

TEST(TopKRouter, AReusedRoutingIsLikeANewOne) {
  const auto wide = identity_router<TopK>({.top_k = 3, .jitter = 0.1, .training_capacity = 0.5});
  const auto narrow = identity_router<TopK>({.top_k = 1}, 2);
  Routing<double> reused;
  Rng rng(7);
  wide.route(known_logits(), rng, masked({1, 1, 0, 1}), reused);
  const Matrix<double> x{{1, 2}, {4, 3}};
  narrow.route(x, {}, reused);
  const Routing<double> fresh = route(narrow, x);
  EXPECT_EQ(reused.plan, fresh.plan);
  EXPECT_EQ(reused.chosen, fresh.chosen);
  EXPECT_EQ(reused.router_probs, fresh.router_probs);
  EXPECT_EQ(reused.input_factor.size(), 0);
}

// A router of one's own that says nothing of what it fills beside its choices.
struct FirstExpert {
  using Scalar = double;
  Index d_model() const { return 4; }
  Index num_experts() const { return 4; }
  void route(const moe::ConstMatrixRef<double>& x, const BatchInfo& info, Routing<double>& routing) const {
    moe::begin_routing(x.rows(), num_experts(), info, routing, "FirstExpert::route");
    for (Index t = 0; t < x.rows(); ++t) {
      routing.chosen.expert.push_back(0);
      routing.chosen.gate.push_back(1);
      routing.chosen.token_begin[t + 1] = t + 1;
    }
    moe::dispatch_all(routing.chosen, routing.plan);
  }
};

// What a router does not fill is empty, whoever filled the routing before.
TEST(AReusedRouting, HoldsNothingOfAnotherRouter) {
  const auto everything = identity_router<TopK>({.top_k = 2, .noise_stddev = 0.5, .jitter = 0.25});
  Routing<double> routing;
  Rng rng(7);
  const auto fill = [&] {
    everything.route(known_logits(), rng, {}, routing);
    routing.levels.resize(2);
    EXPECT_EQ(routing.router_logits.size(), 16);
    EXPECT_EQ(routing.router_probs.size(), 16);
    EXPECT_EQ(routing.input_factor.size(), 16);
    EXPECT_FALSE(routing.noise.empty());
  };
  const auto expect_no_noise = [&] {
    EXPECT_TRUE(routing.noise.empty());
    EXPECT_EQ(routing.noise.top_k, 0);
    EXPECT_EQ(routing.input_factor.size(), 0);
    EXPECT_TRUE(routing.levels.empty());
  };
  fill();
  everything.route(known_logits(), {}, routing);
  expect_no_noise();
  EXPECT_EQ(routing.router_logits, known_logits());

  fill();
  const moe::HashRouter<double> hash({.d_model = 4, .num_experts = 4, .table = IndexVector::Zero(1)});
  BatchInfo info;
  info.token_ids = IndexVector::Zero(4);
  hash.route(known_logits(), info, routing);
  expect_no_noise();
  EXPECT_EQ(routing.router_logits.size(), 0);
  EXPECT_EQ(routing.router_probs.size(), 16);
  EXPECT_THROW(moe::router_z_loss(routing), std::invalid_argument);
  EXPECT_THROW(moe::importance_loss(routing, moe::Importance::probs), std::invalid_argument);
  EXPECT_NEAR(moe::load_balancing_loss(routing).value, 4, 1e-15);

  fill();
  FirstExpert().route(known_logits(), {}, routing);
  expect_no_noise();
  EXPECT_EQ(routing.router_logits.size(), 0);
  EXPECT_EQ(routing.router_probs.size(), 0);
  EXPECT_THROW(moe::load_balancing_loss(routing), std::invalid_argument);
}

// What the parts that a router says it fills hold is its own business until then.
TEST(AReusedRouting, KeepsTheMemoryOfWhatIsToBeFilled) {
  const auto router = identity_router<TopK>({.top_k = 2, .noise_stddev = 0.5, .jitter = 0.25});
  Routing<double> routing;
  moe::RouterWorkspace<double> workspace;
  Rng rng(7);
  router.route(known_logits(), rng, {}, routing, workspace);
  const std::vector<const double*> before{routing.router_logits.data(), routing.router_probs.data(),
                                          routing.input_factor.data(), routing.noise.draws.data()};
  router.route(known_logits(), rng, {}, routing, workspace);
  const std::vector<const double*> after{routing.router_logits.data(), routing.router_probs.data(),
                                         routing.input_factor.data(), routing.noise.draws.data()};
  EXPECT_EQ(before, after);
}

TEST(TopKRouter, WeightsHaveVarianceOneOverTheWidth) {
  Rng rng(8);
  const TopK router({.d_model = 100, .num_experts = 64, .bias = true}, rng);
  EXPECT_NEAR(router.w_router.squaredNorm() / 64, 1, 5 * std::sqrt(2.0 / 6400));
  EXPECT_EQ(router.b_router, Vector<double>::Zero(64));
}

TEST(TopKRouter, BackwardByHand) {
  // One token x = 2, experts' weights 0 and ln 3: p = (1/10, 9/10) as 9 = 3^2. Gate of expert 1.
  Rng rng(9);
  TopK router({.d_model = 1, .num_experts = 2, .top_k = 1, .bias = true}, rng);
  router.w_router << 0, std::log(3.0);
  const Matrix<double> x{{2.}};
  const Routing<double> routing = route(router, x);
  EXPECT_NEAR(routing.plan.gate[0], 0.9, 1e-15);
  moe::RoutingGradient<double> gradient;
  gradient.d_gate = {1};
  Matrix<double> d_x = Matrix<double>::Constant(1, 1, 5);
  TopK grad = moe::zeros_like(router);
  router.backward(x, routing, gradient, d_x, grad);
  // dp_1 / dz = (-0.09, 0.09)
  EXPECT_NEAR(grad.b_router[0], -0.09, 1e-15);
  EXPECT_NEAR(grad.b_router[1], 0.09, 1e-15);
  EXPECT_NEAR(grad.w_router(0, 0), -0.18, 1e-15);
  EXPECT_NEAR(grad.w_router(1, 0), 0.18, 1e-15);
  EXPECT_NEAR(d_x(0, 0), 5 + 0.09 * std::log(3.0), 1e-15);
}

TEST(RoutingGradient, ASumThatThrowsChangesNothing) {
  const moe::RoutingGradient<double> one{.d_router_logits = Matrix<double>::Ones(2, 3), .d_gate = {1, 2}};
  moe::RoutingGradient<double> sum = one;
  EXPECT_THROW(
      sum += (moe::RoutingGradient<double>{.d_router_logits = one.d_router_logits, .d_gate = {1, 2, 3}}),
      std::invalid_argument);
  EXPECT_EQ(sum.d_router_logits, one.d_router_logits);
  EXPECT_EQ(sum.d_gate, one.d_gate);
  sum += one;
  EXPECT_EQ(sum.d_router_logits, 2 * one.d_router_logits);
  EXPECT_EQ(sum.d_gate, (moe::Buffer<double>{2, 4}));
}

TEST(TopKRouter, ASecondExpertBelowTheThresholdIsLeftOut) {
  // Gates of the two best are 0.731 and 0.269 (computed with Python), of the others nothing.
  const Matrix<double> x{{1, .5, -.25, 2}};
  for (const double threshold : {0.2, 0.3}) {
    const auto router =
        identity_router<TopK>({.top_k = 2, .second_threshold = threshold, .renormalise = true});
    const Routing<double> routing = route(router, x);
    ASSERT_EQ(routing.chosen.size(), threshold < 0.25 ? 2 : 1);
    EXPECT_EQ(routing.chosen.expert[0], 3);
    EXPECT_NEAR(routing.chosen.gate[0], 0.731058579, 1e-9);
    // The gradient of the first gate reaches the logit that was left out.
    moe::RoutingGradient<double> gradient;
    gradient.d_chosen_gate.assign(routing.chosen.size(), 0.0);
    gradient.d_chosen_gate[0] = 1;
    TopK grad = moe::zeros_like(router);
    Matrix<double> d_x = Matrix<double>::Zero(1, 4);
    router.backward(x, routing, gradient, d_x, grad);
    EXPECT_NEAR(d_x(0, 3), 0.731058579 * 0.268941421, 1e-9);
    EXPECT_NEAR(d_x(0, 0), -0.731058579 * 0.268941421, 1e-9);
  }
}

// mesh takes the second expert where its gate is greater than the threshold.
TEST(TopKRouter, ASecondGateOfExactlyTheThresholdIsLeftOut) {
  const Matrix<double> x = Matrix<double>::Zero(1, 2);  // gates of exactly one half
  for (const bool above : {false, true}) {
    const double threshold = above ? std::nextafter(.5, 0.0) : .5;
    const auto router =
        identity_router<TopK>({.top_k = 2, .second_threshold = threshold, .renormalise = true}, 2);
    EXPECT_EQ(chosen_by(route(router, x), 0), above ? (std::vector<Index>{0, 1}) : (std::vector<Index>{0}));
  }
}

// Lepikhin et al. 2021, algorithm 1, and mesh's policy "random": after the gates are normalised, the second
// expert is taken where a uniform draw is below gate / threshold.
TEST(TopKRouter, ARandomSecondExpertIsTakenWhereItsDrawIsBelowItsShareOfTheThreshold) {
  Matrix<double> x(40, 4);
  Rng values(20);
  moe::fill_normal(x, 1.0, values);
  BatchInfo info;
  info.mask = moe::Mask::Constant(40, true);
  for (Index t = 0; t < 40; t += 7) info.mask[t] = false;
  for (const double threshold : {0.2, 0.5, 1e-9}) {
    const auto router = identity_router<TopK>({.top_k = 3,
                                               .second_threshold = 0.3,
                                               .random_second_threshold = threshold,
                                               .renormalise = true,
                                               .noise_stddev = 0.1,
                                               .jitter = 0.1});
    Rng rng(21), expected(21);
    Routing<double> routing;
    router.route(x, rng, info, routing);
    for (int i = 0; i < 40 * 4; ++i) expected.uniform();  // jitter
    for (int i = 0; i < 40 * 4; ++i) expected.normal();   // noise
    Index taken = 0;
    for (Index t = 0; t < 40; ++t) {
      const IndexVector best = moe::top_k(Vector<double>(routing.noise.noisy_logits.row(t).transpose()), 3);
      double sum = 0;
      for (const Index e : best) sum += routing.router_probs(t, e);
      std::vector<Index> experts{best[0]};
      for (Index i = 1; i < 3; ++i)  // drawn for masked tokens, too
        if (expected.uniform() < routing.router_probs(t, best[i]) / sum / threshold)
          experts.push_back(best[i]);
      if (!info.mask[t]) experts.clear();
      EXPECT_EQ(chosen_by(routing, t), experts) << "token " << t;
      for (std::size_t i = 0; i < experts.size(); ++i)  // gates stay what they are among all three
        EXPECT_NEAR(routing.chosen.gate[routing.chosen.token_begin[t] + Index(i)],
                    routing.router_probs(t, experts[i]) / sum, 1e-14);
      taken += Index(experts.size());
    }
    EXPECT_EQ(rng, expected);
    const Index valid = routing.plan.num_valid_tokens();
    if (threshold == 1e-9)
      EXPECT_EQ(taken, 3 * valid);
    else
      EXPECT_TRUE(valid < taken && taken < 3 * valid) << taken;
    // Inference draws nothing: a gate above 0.3, as second_threshold says.
    const Routing<double> inference = route(router, x, info);
    for (Index t = 0; t < 40; ++t)
      for (Index c = inference.chosen.token_begin[t] + 1; c < inference.chosen.token_begin[t + 1]; ++c)
        EXPECT_GT(inference.chosen.gate[c], 0.3);
  }
  const auto all = identity_router<TopK>({.top_k = 3, .random_second_threshold = 0.5});
  EXPECT_EQ(route(all, x).chosen.size(), 3 * 40);
}

// Gates of the two best are 0.731 and 0.269. Of 20,000 draws the share of taken ones deviates by 0.0035.
TEST(TopKRouter, ARandomSecondExpertIsTakenAsOftenAsItsGateSays) {
  Matrix<double> x(20000, 4);
  x.rowwise() = Matrix<double>{{1, .5, -.25, 2}}.row(0);
  for (const double threshold : {0.2, 0.5, 1.0}) {
    const auto router =
        identity_router<TopK>({.top_k = 2, .random_second_threshold = threshold, .renormalise = true});
    Rng rng(22);
    Routing<double> routing;
    router.route(x, rng, {}, routing);
    const double share = double(routing.chosen.size()) / 20000 - 1;
    EXPECT_NEAR(share, std::min(1.0, 0.268941421 / threshold), 4 * 0.0035);
  }
}

// Who is left out takes no seat: positions count the second choices that were taken.
TEST(TopKRouter, ARandomSecondExpertThatIsLeftOutTakesNoSeat) {
  Matrix<double> x(400, 4);
  x.rowwise() = Matrix<double>{{1, .5, -.25, 2}}.row(0);
  const auto router = identity_router<TopK>(
      {.top_k = 2, .random_second_threshold = 1, .renormalise = true, .training_capacity = 0.1});  // 20 seats
  Rng rng(23);
  Routing<double> routing;
  router.route(x, rng, {}, routing);
  std::vector<Index> second;
  for (Index t = 0; t < 400; ++t)
    if (chosen_by(routing, t).size() == 2) second.push_back(t);
  ASSERT_GT(second.size(), 60u);
  second.resize(20);
  EXPECT_EQ(tokens_of_experts(routing)[0], second);
  EXPECT_GT(second.back(), 30);
}

// 17 tokens want expert 0 of 4, one expert each, at a factor of 1: 4.25 seats, made whole by a rule.
template <class R>
Index seats_of_one(moe::CapacityRule rule, typename R::Options options, bool training = false) {
  options.d_model = options.num_experts = 4;
  options.capacity = 1.0;
  if constexpr (requires { options.training_capacity; }) options.training_capacity = 1.0;
  options.capacity_rule = rule;
  R router(options);
  if constexpr (requires { router.w_router; }) router.w_router.setIdentity();
  Matrix<double> x = Matrix<double>::Zero(17, 4);
  x.col(0).setOnes();
  const BatchInfo info{.token_ids = IndexVector::Zero(17)};
  Routing<double> routing;
  Rng rng(1);
  if constexpr (requires { router.route(x, rng, info, routing); }) {
    if (training) {
      router.route(x, rng, info, routing);
      return routing.plan.rows_of(0);
    }
  }
  router.route(x, info, routing);
  return routing.plan.rows_of(0);
}

TEST(CapacityRules, AreThoseOfEveryRouterWithACapacity) {
  const std::pair<moe::CapacityRule, Index> rules[] = {{{}, 5},
                                                       {{moe::Rounding::down}, 4},
                                                       {{moe::Rounding::nearest_even}, 4},
                                                       {{moe::Rounding::down, 6}, 6},
                                                       {{moe::Rounding::up, 0, 4}, 8}};
  for (const auto& [rule, seats] : rules) {
    EXPECT_EQ(seats_of_one<TopK>(rule, {.top_k = 1}), seats);
    EXPECT_EQ(seats_of_one<TopK>(rule, {.top_k = 1}, true), seats);
    EXPECT_EQ(seats_of_one<Noisy>(rule, {.top_k = 1}), seats);
    EXPECT_EQ(seats_of_one<moe::SinkhornRouter<double>>(rule, {}), seats);
    EXPECT_EQ(seats_of_one<ExpertChoice>(rule, {}), seats);
    EXPECT_EQ(seats_of_one<moe::HashRouter<double>>(rule, {.table = IndexVector::Zero(1)}), seats);
  }
  // Of four experts by ReLU each token takes one: seats follow from the 17 choices.
  EXPECT_EQ(seats_of_one<TopK>({moe::Rounding::up, 6, 4}, {.top_k = 4, .score = moe::Score::relu}), 8);
}

// ---- Routers that choose as many experts as they need.

// An expert whose logit is not positive has a gate of zero and is never used: not for its selection bias, nor
// as the next best.
TEST(ReLURouting, UsesExpertsWithPositiveLogitsOnly) {
  auto biased = identity_router<TopK>({.top_k = 4, .score = moe::Score::relu, .selection_bias = true});
  biased.selection_bias << 0, 5, 0, 0;
  Routing<double> routing;
  biased.route(Matrix<double>{{1, -2, -1, .5}}, {}, routing);
  EXPECT_EQ(chosen_by(routing, 0), (std::vector<Index>{0, 3}));

  const auto full = identity_router<TopK>(
      {.top_k = 4, .score = moe::Score::relu, .capacity = 1.0, .overflow = Overflow::next_best});
  // 4 choices of 4 experts: one seat each. The first token has expert 0, the second wants it and has
  // no other positive logit; the third goes on to expert 2.
  full.route(Matrix<double>{{3, -1, -1, -1}, {2, -1, -2, 0}, {1, -1, .5, -1}}, {}, routing);
  EXPECT_EQ(tokens_of_experts(routing), (std::vector<std::vector<Index>>{{0}, {}, {2}, {}}));
}

TEST(ReLURouting, AndTopPRoutingHaveTheirOptions) {
  const moe::TopKOptions relu = moe::relu_options(3, 5), top_p = moe::top_p_options(3, 5);
  EXPECT_EQ(relu.score, moe::Score::relu);
  EXPECT_EQ(top_p.top_p, 0.4);
  for (const auto& options : {relu, top_p}) {
    EXPECT_EQ(options.d_model, 3);
    EXPECT_EQ(options.num_experts, 5);
    EXPECT_EQ(options.top_k, 5);
  }
}

TEST(ReLURouting, ARouterOfItsOptionsUsesLogitsAsGates) {
  TopK router(moe::relu_options(3, 3));
  router.w_router.setIdentity();
  const auto routing = route(router, Matrix<double>{{.5, -1, 2}, {-1, -2, 0}});
  EXPECT_EQ(chosen_by(routing, 0), (std::vector<Index>{2, 0}));
  EXPECT_EQ(routing.chosen.gate, (moe::Buffer<double>{2, .5}));
  EXPECT_TRUE(chosen_by(routing, 1).empty());
}

// Probabilities of exactly 0.5, 0.25 and 0.25: a mass of 0.5 does not exceed 0.5.
TEST(TopPRouting, AMassOfExactlyTopPIsNotEnough) {
  TopK router(moe::top_p_options(3, 3, .5));
  router.w_router.setIdentity();
  const Matrix<double> x{{std::log(2.0), 0, 0}};
  const auto routing = route(router, x);
  ASSERT_EQ(routing.router_probs(0, 0), 0.5);
  EXPECT_EQ(chosen_by(routing, 0), (std::vector<Index>{0, 1}));
  TopK less(moe::top_p_options(3, 3, std::nextafter(.5, 0.0)));
  less.w_router.setIdentity();
  EXPECT_EQ(chosen_by(route(less, x), 0), (std::vector<Index>{0}));
}

// Probabilities of 0.5, 0.3 and 0.2: the first is enough for the usual 0.4, two are for 0.6.
TEST(TopPRouting, ARouterOfItsOptionsStopsWhereTheSumIsEnough) {
  const Matrix<double> x{{std::log(.2), std::log(.5), std::log(.3)}};
  const auto routed = [&](const moe::TopKOptions& options) {
    TopK router(options);
    router.w_router.setIdentity();
    return route(router, x);
  };
  EXPECT_EQ(chosen_by(routed(moe::top_p_options(3, 3)), 0), (std::vector<Index>{1}));
  const auto routing = routed(moe::top_p_options(3, 3, .6));
  EXPECT_EQ(chosen_by(routing, 0), (std::vector<Index>{1, 2}));
  EXPECT_NEAR(routing.chosen.gate[0], .5, 1e-15);
  EXPECT_NEAR(routing.chosen.gate[1], .3, 1e-15);
}

// ---- NoisyTopKRouter.

double softplus(double a) { return std::log1p(std::exp(a)); }

TEST(NoisyTopKRouter, StartsWithWeightsOfZeroAndDrawsNothingForThem) {
  Rng rng(10);
  const Noisy router({.d_model = 3, .num_experts = 4}, rng);
  EXPECT_EQ(rng, Rng(10));
  EXPECT_EQ(router.w_router, Matrix<double>::Zero(4, 3));
  EXPECT_EQ(router.w_noise, Matrix<double>::Zero(4, 3));
}

TEST(NoisyTopKRouter, InferenceHasNoNoise) {
  const auto router = identity_router<Noisy>({.top_k = 2});
  const auto routing = route(router, known_logits());
  EXPECT_TRUE(routing.noise.empty());
  EXPECT_EQ(routing.router_logits, known_logits());
  EXPECT_EQ(&routing.selection_logits(), &routing.router_logits);
  const auto mixtral = route(identity_router<TopK>({.top_k = 2, .renormalise = true}), known_logits());
  EXPECT_EQ(routing.plan, mixtral.plan);  // the gates are the softmax of the chosen
}

TEST(NoisyTopKRouter, NoiseIsDrawnInRowMajorOrderForAllTokensMaskedOnesIncluded) {
  auto router = identity_router<Noisy>({.top_k = 2, .noise_epsilon = 0.125});
  Rng weights(11);
  moe::fill_normal(router.w_noise, 1.0, weights);
  const Matrix<double> x = known_logits();
  Rng rng(12), expected(12);
  Routing<double> routing;
  router.route(x, rng, masked({1, 0, 1, 0}), routing);
  EXPECT_EQ(routing.noise.top_k, 2);
  for (Index t = 0; t < 4; ++t) {
    for (Index e = 0; e < 4; ++e) {
      const double draw = expected.normal();
      const double stddev = softplus(x.row(t).dot(router.w_noise.row(e))) + 0.125;
      EXPECT_EQ(routing.noise.draws(t, e), draw);
      EXPECT_NEAR(routing.noise.stddev(t, e), stddev, 1e-14);
      EXPECT_NEAR(routing.noise.noisy_logits(t, e), x(t, e) + draw * stddev, 1e-13);
      EXPECT_EQ(routing.router_logits(t, e), x(t, e));
    }
  }
  EXPECT_EQ(rng, expected);
}

TEST(NoisyTopKRouter, ChoosesByTheNoisyLogitsWithTheirSoftmaxAsGates) {
  const auto router = identity_router<Noisy>({.top_k = 2});
  Rng rng(13);
  int changed = 0;
  for (int round = 0; round < 20; ++round) {
    Routing<double> routing;
    router.route(known_logits(), rng, {}, routing);
    EXPECT_EQ(&routing.selection_logits(), &routing.noise.noisy_logits);
    EXPECT_TRUE(routing.router_probs.isApprox(moe::softmax(routing.noise.noisy_logits), 1e-14));
    for (Index t = 0; t < 4; ++t) {
      const auto best = chosen_by(routing, t);
      const auto gates = gates_of(routing, t);
      const auto noisy = routing.noise.noisy_logits.row(t);
      changed += best[0] != chosen_by(route(router, known_logits()), t)[0];
      for (Index e = 0; e < 4; ++e) EXPECT_TRUE(e == best[0] || e == best[1] || noisy[e] < noisy[best[1]]);
      EXPECT_NEAR(gates[0], 1 / (1 + std::exp(noisy[best[1]] - noisy[best[0]])), 1e-14);
      EXPECT_NEAR(gates[0] + gates[1], 1, 1e-15);
    }
  }
  EXPECT_GT(changed, 0);  // stddev is ln 2 + 0.01, enough to change a choice now and then
}

TEST(NoisyTopKRouter, SoftplusDoesNotOverflow) {
  auto router = identity_router<Noisy>({.top_k = 1, .noise_epsilon = 0, .allow_constant_gate = true});
  router.w_noise.setIdentity();
  Rng rng(14);
  Routing<double> routing;
  router.route(Matrix<double>{{1000, -1000, 0, 1}}, rng, {}, routing);
  EXPECT_EQ(routing.noise.stddev(0, 0), 1000);
  EXPECT_EQ(routing.noise.stddev(0, 1), 0);
  EXPECT_EQ(routing.noise.stddev(0, 2), std::log(2.0));
}

TEST(NoisyTopKRouter, NotANumberInTheNoiseWeightsPoisonsInTrainingOnly) {
  auto router = identity_router<Noisy>({.top_k = 2});
  router.w_noise(3, 0) = kNan;
  EXPECT_EQ(route(router, known_logits()).plan.num_valid_tokens(), 4);
  Rng rng(15);
  Routing<double> routing;
  router.route(known_logits(), rng, {}, routing);
  EXPECT_EQ(routing.plan.num_valid_tokens(), 0);
}

// ---- ExpertChoiceRouter.

// The same batch under a capacity of two tokens an expert; computed with Python in double. Each
// expert's tokens are {0,1}, {1,0}, {2,3}, {3,1}, best first.
TEST(ExpertChoiceRouter, OfAKnownBatch) {
  const auto routing = route(identity_router<ExpertChoice>({.capacity = 2.0}), known_logits());
  EXPECT_EQ(tokens_of_experts(routing), (Lists{{0, 1}, {0, 1}, {2, 3}, {1, 3}}));
  const auto& plan = routing.plan;
  for (Index e = 0; e < 4; ++e)
    for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a)
      EXPECT_EQ(plan.gate[a], routing.router_probs(plan.token[a], e));
  EXPECT_TRUE(plan.dropped.empty());
  EXPECT_EQ(chosen_by(routing, 1), (std::vector<Index>{0, 1, 3}));
  for (Index a = 0; a < plan.num_assignments(); ++a)
    EXPECT_EQ(routing.chosen.gate[plan.choice[a]], plan.gate[a]);
}

TEST(ExpertChoiceRouter, ExpertsAreAlwaysFull) {
  Rng rng(16);
  for (const double capacity : {0.0, 0.3, 1.0, 2.5, 100.0}) {
    const ExpertChoice router({.d_model = 3, .num_experts = 5, .capacity = capacity}, rng);
    Matrix<double> x(17, 3);
    moe::fill_normal(x, 1.0, rng);
    const auto routing = route(router, x);
    for (Index e = 0; e < 5; ++e)
      EXPECT_EQ(routing.plan.rows_of(e), moe::expert_capacity(17, 5, 1, capacity));
  }
}

TEST(ExpertChoiceRouter, GivesTiesToTheLowerToken) {
  const auto routing = route(identity_router<ExpertChoice>({.capacity = 1.0}, 2), Matrix<double>::Ones(6, 2));
  EXPECT_EQ(tokens_of_experts(routing), (Lists{{0, 1, 2}, {0, 1, 2}}));
}

TEST(ExpertChoiceRouter, WorksWithinGroupsAndSkipsWhatIsNotValid) {
  Matrix<double> x(6, 2);
  x << 1, 0, 9, 0, 2, 0, 3, 0, 8, 0, 7, 0;  // wanted by expert 0 the more, the larger
  BatchInfo info = masked({1, 0, 1, 1, 1, 1});
  info.group_begin = IndexVector{{0, 3, 3, 6}};
  x(4, 0) = kNan;
  // Valid: 0 and 2 in the first group, 3 and 5 in the last; one seat an expert in each.
  const auto routing = route(identity_router<ExpertChoice>({.capacity = 1.0}, 2), x, info);
  EXPECT_EQ(tokens_of_experts(routing), (Lists{{2, 5}, {0, 3}}));
  EXPECT_TRUE(routing.plan.token_state[4] == TokenState::poisoned);
}

TEST(ExpertChoiceRouter, TokensThatNobodyTakesMayPassThrough) {
  Matrix<double> x(4, 2);
  x << 5, 0, 0, 0, 0, 5, 0, 0;
  BatchInfo info = masked({1, 1, 1, 0});
  for (const auto overflow : {Overflow::drop, Overflow::pass_through}) {
    const auto routing =
        route(identity_router<ExpertChoice>({.capacity = 0.5, .overflow = overflow}, 2), x, info);
    EXPECT_EQ(tokens_of_experts(routing), (Lists{{0}, {2}}));
    EXPECT_EQ(routing.plan.passed_through.size(), overflow == Overflow::drop ? 0 : 1);
    if (overflow == Overflow::pass_through) {
      EXPECT_EQ(routing.plan.passed_through[0], 1);
    }
  }
}

TEST(ExpertChoiceRouter, AnExpertTakesOnlyValidTokensThatItIsAvailableTo) {
  ExpertChoice router = identity_router<ExpertChoice>({.capacity = 2.0}, 2);
  router.w_router << 1, 0, -kInf, 0;  // the logit of expert 1 is minus infinity where x is positive
  const Matrix<double> x{{1, 0}, {-3, 0}, {4, 0}};
  const auto all = route(router, x.cwiseAbs());
  EXPECT_EQ(all.plan.rows_of(0), 3);
  EXPECT_EQ(all.plan.rows_of(1), 0);
  EXPECT_EQ(all.plan.gate[0], 1);
  // Seats stay empty rather than to be given to a masked or a poisoned token (+infinity).
  const auto some = route(router, x, masked({1, 1, 0}));
  EXPECT_EQ(tokens_of_experts(some), (Lists{{0}, {}}));
  EXPECT_TRUE(some.plan.token_state[1] == TokenState::poisoned);
  Matrix<double> finite = x;
  finite(1, 0) = 0;  // 0 times infinity is NaN: poisoned as well
  EXPECT_EQ(tokens_of_experts(route(router, finite, masked({1, 1, 0}))), (Lists{{0}, {}}));
}

// ---- What all have in common.

template <class R>
class AnyRouter : public testing::Test {};
using Routers = testing::Types<TopK, Noisy, ExpertChoice>;
TYPED_TEST_SUITE(AnyRouter, Routers);

TYPED_TEST(AnyRouter, AnEmptyBatchIsFine) {
  const auto router = identity_router<TypeParam>({});
  const auto routing = route(router, Matrix<double>(0, 4));
  EXPECT_EQ(routing.num_tokens(), 0);
  EXPECT_EQ(routing.num_experts(), 4);
  EXPECT_EQ(routing.plan.num_assignments(), 0);
  Matrix<double> d_x(0, 4);
  TypeParam grad = moe::zeros_like(router);
  router.backward(Matrix<double>(0, 4), routing, {}, d_x, grad);
  EXPECT_EQ(grad.w_router, Matrix<double>::Zero(4, 4));
}

TYPED_TEST(AnyRouter, ABatchOfMaskedTokensGoesNowhere) {
  const auto routing = route(identity_router<TypeParam>({}), known_logits(), masked({0, 0, 0, 0}));
  EXPECT_EQ(routing.plan.num_assignments(), 0);
  EXPECT_EQ(routing.chosen.size(), 0);
  EXPECT_TRUE((routing.router_probs.array() == 0).all());
}

TYPED_TEST(AnyRouter, ExpertsComeAndGo) {
  auto router = identity_router<TypeParam>({});
  router.w_router(2, 0) = 0.5;
  router.add_expert(Vector<double>{{9, 8, 7, 6}});
  EXPECT_EQ(router.num_experts(), 5);
  EXPECT_EQ(router.options().num_experts, 5);
  EXPECT_EQ(router.w_router.row(4), (Matrix<double>{{9, 8, 7, 6}}).row(0));
  EXPECT_EQ(route(router, known_logits()).num_experts(), 5);
  router.remove_expert(1);
  EXPECT_EQ(router.num_experts(), 4);
  EXPECT_EQ(router.w_router, (Matrix<double>{{1, 0, 0, 0}, {.5, 0, 1, 0}, {0, 0, 0, 1}, {9, 8, 7, 6}}));
  EXPECT_THROW(router.remove_expert(4), std::invalid_argument);
  EXPECT_THROW(router.remove_expert(-1), std::invalid_argument);
  EXPECT_THROW(router.add_expert(Vector<double>::Zero(3)), std::invalid_argument);
  EXPECT_EQ(router.num_experts(), 4);
}

TYPED_TEST(AnyRouter, RefusesWidthsThatAreNotPositive) {
  Rng rng(17);
  for (const Index bad : {0, -1, -8}) {
    EXPECT_THROW(TypeParam({.d_model = bad, .num_experts = 4}, rng), std::invalid_argument);
    EXPECT_THROW(TypeParam({.d_model = 4, .num_experts = bad}, rng), std::invalid_argument);
  }
}

TEST(TokenChoiceRouters, KeepEnoughExpertsForTopK) {
  auto router = identity_router<TopK>({.top_k = 3, .bias = true});
  router.b_router << 1, 2, 3, 4;
  router.add_expert(Vector<double>::Zero(4));
  EXPECT_EQ(router.b_router, (Vector<double>{{1, 2, 3, 4, 0}}));
  router.remove_expert(0);
  EXPECT_EQ(router.b_router, (Vector<double>{{2, 3, 4, 0}}));
  router.remove_expert(0);
  EXPECT_THROW(router.remove_expert(0), std::invalid_argument);
  auto noisy = identity_router<Noisy>({.top_k = 4});
  EXPECT_THROW(noisy.remove_expert(0), std::invalid_argument);
  EXPECT_EQ(noisy.w_noise.rows(), 4);
  noisy.add_expert(Vector<double>::Ones(4));
  EXPECT_EQ(noisy.w_noise.row(4), (Matrix<double>::Zero(1, 4)));
  noisy.remove_expert(4);
  EXPECT_EQ(noisy.w_noise.rows(), 4);
  auto choice = identity_router<ExpertChoice>({}, 1);
  EXPECT_THROW(choice.remove_expert(0), std::invalid_argument);
}

TEST(TokenChoiceRouters, RefuseOptionsOutOfRange) {
  Rng rng(18);
  const auto refused = [&](auto options) {
    options.d_model = 4;
    options.num_experts = 4;
    if constexpr (requires { options.softmax_before_selection; })
      EXPECT_THROW(TopK(options, rng), std::invalid_argument);
    else if constexpr (requires { options.noise_epsilon; })
      EXPECT_THROW(Noisy(options, rng), std::invalid_argument);
    else
      EXPECT_THROW(ExpertChoice(options, rng), std::invalid_argument);
  };
  for (const Index k : {-1, 0, 5}) {
    refused(TopK::Options{.top_k = k});
    refused(Noisy::Options{.top_k = k});
  }
  for (const double factor : {-0.1, kInf, kNan}) {
    refused(TopK::Options{.capacity = factor});
    refused(TopK::Options{.training_capacity = factor});
    refused(Noisy::Options{.capacity = factor});
    refused(Noisy::Options{.training_capacity = factor});
    refused(Noisy::Options{.noise_epsilon = factor});
    refused(ExpertChoice::Options{.capacity = factor});
    refused(TopK::Options{.jitter = factor});
  }
  refused(TopK::Options{.jitter = 1});
  refused(ExpertChoice::Options{.overflow = Overflow::next_best});
}

TEST(TokenChoiceRouters, ConstantGatesAreRefusedInTrainingOnly) {
  Rng rng(19);
  Routing<double> routing;
  const auto trains = [&](const auto& router) {
    try {
      router.route(known_logits(), rng, {}, routing);
    } catch (const std::invalid_argument&) {
      return false;
    }
    return true;
  };
  EXPECT_FALSE(trains(identity_router<TopK>({.top_k = 1, .renormalise = true})));
  EXPECT_FALSE(trains(identity_router<TopK>({.top_k = 1, .softmax_before_selection = false})));
  EXPECT_FALSE(trains(identity_router<Noisy>({.top_k = 1})));
  route(identity_router<Noisy>({.top_k = 1}), known_logits());  // inference is fine
  EXPECT_TRUE(trains(identity_router<TopK>({.top_k = 1, .renormalise = true, .allow_constant_gate = true})));
  EXPECT_TRUE(trains(identity_router<Noisy>({.top_k = 1, .allow_constant_gate = true})));
  EXPECT_TRUE(trains(identity_router<TopK>({.top_k = 1})));
  EXPECT_TRUE(trains(identity_router<TopK>({.top_k = 2, .renormalise = true})));
  const auto one = identity_router<TopK>({.top_k = 1, .renormalise = true}, 1);
  one.route(Matrix<double>{{1.}}, rng, {}, routing);  // one expert is one expert
}

// Probabilities .457 and .168 are the first whose sum exceeds 0.6; gates are those probabilities.
TEST(TopKRouter, TopPTakesTheFewestExpertsOfThatMass) {
  const auto routing = route(identity_router<TopK>({.top_k = 8, .top_p = 0.6}, 8),
                             Matrix<double>{{1, .5, -.25, 2, -1, .75, 0, -2}});
  ASSERT_EQ(chosen_by(routing, 0), (std::vector<Index>{3, 0}));
  EXPECT_NEAR(routing.chosen.gate[0], 0.457382973, 1e-9);
  EXPECT_NEAR(routing.chosen.gate[1], 0.168261792, 1e-9);
}

}  // namespace
}  // namespace routers_test
