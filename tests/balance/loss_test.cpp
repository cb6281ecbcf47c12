// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/balance/group_balance_loss.hpp>
#include <moe/balance/load_loss.hpp>
#include <moe/balance/loss.hpp>
#include <moe/balance/relu_balance_loss.hpp>
#include <moe/math/init.hpp>
#include <moe/routers/top_k_router.hpp>
#include <moe/routing/token_choice.hpp>

#include "compare.hpp"

namespace loss_test {
namespace {

using moe::BatchInfo;
using moe::Importance;
using moe::Index;
using moe::IndexVector;
using moe::LoadThreshold;
using moe::Loss;
using moe::Matrix;
using moe::Routing;
using moe::RoutingGradient;
using moe::Vector;

// What a token-choice router makes of given logits, gates summing to 1.
template <class S>
Routing<S> route_logits(const Matrix<S>& logits, Index k, const BatchInfo& info = {}) {
  Routing<S> routing;
  moe::begin_routing(logits.rows(), logits.cols(), info, routing, "test");
  routing.router_logits = logits;
  moe::RouterWorkspace<S> workspace;
  moe::route_by_logits({.gate = {.renormalise = true}, .top_k = k}, {}, info, routing, workspace,
                       moe::Sequential{});
  return routing;
}

// The same with noise, made by hand.
Routing<double> route_noisy(const Matrix<double>& logits, const Matrix<double>& draws,
                            const Matrix<double>& stddev, Index k, const BatchInfo& info = {}) {
  const Matrix<double> noisy = logits + draws.cwiseProduct(stddev);
  Routing<double> routing = route_logits(noisy, k, info);
  routing.router_logits = logits;
  routing.noise = {draws, stddev, noisy, k};
  return routing;
}

// Four tokens, four experts.
Matrix<double> known_logits() {
  Matrix<double> z(4, 4);
  z << 2, 1, 0, -1, 1.5, 1, .2, .1, 1.2, .3, .9, -.5, -.3, .4, .2, 1.1;
  return z;
}
Matrix<double> known_draws() {
  Matrix<double> draws(4, 4);
  draws << .1, -.2, .3, 0, -.5, .4, .1, .2, .3, .3, -.6, .1, 0, -.1, .2, -.3;
  return draws;
}
Routing<double> known_noisy() {
  return route_noisy(known_logits(), known_draws(), Matrix<double>::Constant(4, 4, .8), 2);
}

Matrix<double> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  moe::Rng rng(seed);
  Matrix<double> m(rows, cols);
  moe::fill_normal(m, 1.0, rng);
  return m;
}

BatchInfo masked(std::vector<bool> valid) {
  BatchInfo info;
  info.mask.resize(Index(valid.size()));
  for (std::size_t t = 0; t < valid.size(); ++t) info.mask[Index(t)] = valid[t];
  return info;
}

using LossFunction = std::function<Loss<double>(const Routing<double>&)>;

// d compared with the difference quotient of `value` when any finite entry of `at` moves.
void expect_gradient(const Matrix<double>& d, moe::MatrixRef<double> at, const std::function<double()>& value,
                     double tolerance = 1e-8) {
  ASSERT_EQ(d.rows(), at.rows());
  ASSERT_EQ(d.cols(), at.cols());
  const double step = 1e-6;
  for (Index i = 0; i < at.rows(); ++i) {
    for (Index j = 0; j < at.cols(); ++j) {
      const double center = at(i, j);
      if (!std::isfinite(center)) {
        EXPECT_EQ(d(i, j), 0);
        continue;
      }
      at(i, j) = center + step;
      const double up = value();
      at(i, j) = center - step;
      const double down = value();
      at(i, j) = center;
      EXPECT_NEAR(d(i, j), (up - down) / (2 * step), tolerance) << i << ' ' << j;
    }
  }
}

// ---- Values from other implementations' formulas, computed with Python in double.

TEST(LoadBalancing, OfAKnownBatch) {
  // Top-1: Switch Transformer, mesh_tensorflow, Tutel. Top-2: Megatron-LM, and half of Hugging
  // Face.
  EXPECT_NEAR(moe::load_balancing_loss(route_logits(known_logits(), 1)).value, 1.416588236225243, 1e-14);
  EXPECT_NEAR(moe::load_balancing_loss(route_logits(known_logits(), 2)).value, 1.146485625668751, 1e-14);
  EXPECT_NEAR(2 * moe::load_balancing_loss(route_logits(known_logits(), 2)).value, 2.292971251, 1e-9);
}

TEST(ZLoss, OfAKnownBatch) {
  EXPECT_NEAR(moe::router_z_loss(route_logits(known_logits(), 2)).value, 4.675163467283242, 1e-14);
}

TEST(ImportanceLoss, OfAKnownBatch) {
  // Of probabilities (V-MoE), and of gates (Shazeer et al., without noise and with it).
  EXPECT_NEAR(moe::importance_loss(route_logits(known_logits(), 2), Importance::probs).value,
              0.15266023131134557, 1e-14);
  EXPECT_NEAR(moe::importance_loss(route_logits(known_logits(), 2)).value, 0.32541631239424457, 1e-14);
  EXPECT_NEAR(moe::importance_loss(known_noisy()).value, 0.3506953888991423, 1e-14);
  // Noise does not enter V-MoE's importance.
  EXPECT_NEAR(moe::importance_loss(known_noisy(), Importance::probs).value, 0.15266023131134557, 1e-14);
}

TEST(LoadLoss, OfAKnownBatch) {
  // tensor2tensor, expert_utils.py, _prob_in_top_k: two thresholds. V-MoE: one.
  EXPECT_NEAR(moe::load_loss(known_noisy()).value, 0.16025305988807703, 1e-14);
  EXPECT_NEAR(moe::load_loss(known_noisy(), LoadThreshold::one).value, 0.11895809386810192, 1e-14);
  const auto expect_loads = [](LoadThreshold threshold, std::vector<double> loads) {
    const Routing<double> routing = known_noisy();
    const Vector<double> values = moe::detail::EstimatedLoad<double>(routing, threshold, "test").values;
    for (Index e = 0; e < 4; ++e) EXPECT_NEAR(values[e], loads[std::size_t(e)], 5e-9) << e;
  };
  expect_loads(LoadThreshold::two, {2.96237267, 2.60520486, 1.39118066, 1.04839424});
  expect_loads(LoadThreshold::one, {2.6179332, 1.93154887, 1.37153864, 1.03569141});
}

// The loads themselves: of a batch repeated n times they are n times as large, and CV^2 is the
// same; so each load shows when its expert is all that differs. Here: one token at a time.
TEST(LoadLoss, OfOneTokenIsTheVariationOfItsProbabilities) {
  const Matrix<double> z = known_logits(), draws = known_draws();
  const double sigma = .8;
  const auto phi = [](double u) { return 0.5 * std::erfc(-u / std::sqrt(2.0)); };
  for (Index t = 0; t < 4; ++t) {
    const Routing<double> routing =
        route_noisy(z.row(t), draws.row(t), Matrix<double>::Constant(1, 4, sigma), 2);
    Vector<double> noisy = (z.row(t) + sigma * draws.row(t)).transpose(), sorted = noisy;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    Vector<double> two(4), one(4);
    for (Index e = 0; e < 4; ++e) {
      const double threshold = noisy[e] > sorted[2] ? sorted[2] : sorted[1];
      two[e] = phi((z(t, e) - threshold) / sigma);
      one[e] = phi((z(t, e) - sorted[1]) / sigma);
    }
    const auto squared_variation = [](const Vector<double>& x) {
      return (x.array() - x.mean()).square().mean() / (x.mean() * x.mean() + 1e-10);
    };
    EXPECT_NEAR(moe::load_loss(routing).value, squared_variation(two), 1e-13);
    EXPECT_NEAR(moe::load_loss(routing, LoadThreshold::one).value, squared_variation(one), 1e-13);
  }
}

// ---- Laws of the load-balancing loss.

TEST(LoadBalancing, IsOneAtPerfectBalanceForEveryK) {
  for (const Index experts : {1, 2, 5, 8}) {
    const Matrix<double> row = random_matrix(1, experts, 7);
    Matrix<double> z(experts, experts);  // every rotation of one row
    for (Index t = 0; t < experts; ++t)
      for (Index e = 0; e < experts; ++e) z(t, (e + t) % experts) = row(0, e);
    for (Index k = 1; k <= experts; ++k)
      EXPECT_NEAR(moe::load_balancing_loss(route_logits(z, k)).value, 1, 1e-14) << experts << ' ' << k;
  }
}

TEST(LoadBalancing, IsTheNumberOfExpertsWhenOneTakesAll) {
  Matrix<double> z = Matrix<double>::Zero(6, 4);
  z.col(2).setConstant(1000);
  EXPECT_NEAR(moe::load_balancing_loss(route_logits(z, 1)).value, 4, 1e-14);
}

TEST(LoadBalancing, LooksAtDemandBeforeCapacity) {
  moe::Rng rng(1);
  const auto options = moe::TopKRouter<double>::Options{.d_model = 4, .num_experts = 4, .top_k = 2};
  auto tight = options;
  tight.capacity = 0.25;
  for (const auto overflow : {moe::Overflow::drop, moe::Overflow::next_best, moe::Overflow::pass_through}) {
    tight.overflow = overflow;
    moe::TopKRouter<double> router(tight, rng);
    router.w_router.setIdentity();
    Routing<double> routing;
    router.route(known_logits(), {}, routing);
    ASSERT_GT(routing.plan.dropped.size(), 0);
    EXPECT_NEAR(moe::load_balancing_loss(routing).value, 1.146485625668751, 1e-14);
  }
}

TEST(LoadBalancing, OfPartsUnderTheDemandOfTheWholeAddsUpToTheWhole) {
  const Matrix<double> z = random_matrix(30, 5, 8);
  const Routing<double> whole = route_logits(z, 2);
  const Loss<double> expected = moe::load_balancing_loss(whole);
  const IndexVector demand = moe::demand_per_expert(whole);
  double sum = 0;
  for (const auto& [begin, count] : {std::pair<Index, Index>{0, 7}, {7, 20}, {27, 3}}) {
    const Routing<double> part = route_logits(Matrix<double>(z.middleRows(begin, count)), 2);
    const Loss<double> loss = moe::load_balancing_loss(part, demand, 30);
    sum += loss.value;
    EXPECT_TRUE(loss.gradient.d_router_probs.isApprox(
        expected.gradient.d_router_probs.middleRows(begin, count), 1e-14));
  }
  EXPECT_NEAR(sum, expected.value, 1e-14);
}

TEST(LoadBalancing, NothingToBalanceIsZero) {
  const Routing<double> routing = route_logits(known_logits(), 2);
  EXPECT_EQ(moe::load_balancing_loss(routing, IndexVector(IndexVector::Zero(4)), 4).value, 0);
  EXPECT_EQ(moe::load_balancing_loss(routing, moe::demand_per_expert(routing), 0).value, 0);
}

// ---- Laws of all losses.

struct NamedLoss {
  const char* name;
  LossFunction loss;
};
const std::vector<NamedLoss>& losses() {
  static const std::vector<NamedLoss> all = {
      {"load balancing", [](const auto& r) { return moe::load_balancing_loss(r); }},
      {"importance of gates", [](const auto& r) { return moe::importance_loss(r); }},
      {"importance of probs", [](const auto& r) { return moe::importance_loss(r, Importance::probs); }},
      {"load, two thresholds", [](const auto& r) { return moe::load_loss(r); }},
      {"load, one threshold", [](const auto& r) { return moe::load_loss(r, LoadThreshold::one); }},
      {"z", [](const auto& r) { return moe::router_z_loss(r); }},
      {"sequence balance", [](const auto& r) { return moe::sequence_balance_loss(r, {}); }},
      {"device balance",
       [](const auto& r) {
         return moe::device_balance_loss(r, IndexVector{{0, 1, 0, 2}});
       }},
      {"ReLU balance", [](const auto& r) { return moe::relu_balance_loss(r, 2); }},
  };
  return all;
}

TEST(Losses, OfAnEmptyOrFullyMaskedBatchAreZero) {
  for (const auto& [name, loss] : losses()) {
    SCOPED_TRACE(name);
    EXPECT_EQ(loss(route_logits(Matrix<double>(0, 4), 2)).value, 0);
    const Loss<double> none = loss(route_logits(known_logits(), 2, masked({0, 0, 0, 0})));
    EXPECT_EQ(none.value, 0);
    for (const auto* d : {&none.gradient.d_router_logits, &none.gradient.d_router_probs})
      EXPECT_TRUE((d->array() == 0).all());
  }
}

TEST(Losses, MaskedTokensNeverCount) {
  const std::vector<bool> valid = {1, 0, 1, 1, 0, 0, 1};
  Matrix<double> z = random_matrix(7, 4, 9), draws = random_matrix(7, 4, 10);
  Matrix<double> sigma = random_matrix(7, 4, 11).cwiseAbs().array() + 0.3;
  Matrix<double> kept_z(4, 4), kept_draws(4, 4), kept_sigma(4, 4);
  Index n = 0;
  for (Index t = 0; t < 7; ++t) {
    if (!valid[std::size_t(t)]) continue;
    kept_z.row(n) = z.row(t);
    kept_draws.row(n) = draws.row(t);
    kept_sigma.row(n++) = sigma.row(t);
  }
  z.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  const Routing<double> with = route_noisy(z, draws, sigma, 2, masked(valid));
  const Routing<double> without = route_noisy(kept_z, kept_draws, kept_sigma, 2);
  // Poisoned ones do not count either.
  for (Index t = 0; t < 7; ++t)
    if (!valid[std::size_t(t)]) z.row(t).setConstant(std::numeric_limits<double>::quiet_NaN());
  const Routing<double> poisoned = route_noisy(z, draws, sigma, 2);
  ASSERT_EQ(poisoned.plan.token_state[1], moe::TokenState::poisoned);
  const auto expect_as_without = [&](const Routing<double>& routing, const LossFunction& loss) {
    const Loss<double> a = loss(routing), b = loss(without);
    EXPECT_EQ(a.value, b.value);
    EXPECT_EQ(a.gradient.d_chosen_gate, b.gradient.d_chosen_gate);
    const auto same_rows = [&](const Matrix<double>& of_a, const Matrix<double>& of_b) {
      ASSERT_EQ(of_a.cols(), of_b.cols());
      Index row = 0;
      for (Index t = 0; t < of_a.rows(); ++t) {
        if (valid[std::size_t(t)]) {
          EXPECT_TRUE((of_a.row(t).array() == of_b.row(row++).array()).all());
        } else {
          EXPECT_TRUE((of_a.row(t).array() == 0).all());
        }
      }
    };
    same_rows(a.gradient.d_router_logits, b.gradient.d_router_logits);
    same_rows(a.gradient.d_router_probs, b.gradient.d_router_probs);
    same_rows(a.gradient.d_noise_stddev, b.gradient.d_noise_stddev);
  };
  for (const auto& [name, loss] : losses()) {
    SCOPED_TRACE(name);
    expect_as_without(with, loss);
    expect_as_without(poisoned, loss);
  }
}

TEST(Losses, HoldOnlyWhatTheyReach) {
  const Routing<double> routing = known_noisy();
  const RoutingGradient<double> balance = moe::load_balancing_loss(routing).gradient,
                                gates = moe::importance_loss(routing).gradient,
                                load = moe::load_loss(routing).gradient,
                                z = moe::router_z_loss(routing).gradient;
  EXPECT_EQ(balance.d_router_probs.rows(), 4);
  EXPECT_EQ(balance.d_router_logits.size() + balance.d_noise_stddev.size(), 0);
  EXPECT_TRUE(balance.d_chosen_gate.empty() && balance.d_gate.empty());
  EXPECT_EQ(gates.d_chosen_gate.size(), 8);
  EXPECT_EQ(gates.d_router_logits.size() + gates.d_router_probs.size(), 0);
  EXPECT_EQ(load.d_router_logits.size(), 16);
  EXPECT_EQ(load.d_noise_stddev.size(), 16);
  EXPECT_EQ(z.d_router_logits.size(), 16);
  EXPECT_EQ(z.d_router_probs.size(), 0);
}

TEST(Losses, AreTheSameInFloat) {
  const Routing<float> routing = route_logits(Matrix<float>(known_logits().cast<float>()), 2);
  EXPECT_NEAR(moe::load_balancing_loss(routing).value, 1.146485625668751, 1e-6);
  EXPECT_NEAR(moe::importance_loss(routing).value, 0.32541631239424457, 1e-6);
  EXPECT_NEAR(moe::importance_loss(routing, Importance::probs).value, 0.15266023131134557, 1e-6);
  EXPECT_NEAR(moe::router_z_loss(routing).value, 4.675163467283242, 1e-5);
}

// ---- Gradients by what the routing shows.

TEST(LoadBalancing, GradientByTheProbabilities) {
  Routing<double> routing = route_logits(random_matrix(6, 5, 12), 2, masked({1, 1, 0, 1, 1, 1}));
  const Loss<double> loss = moe::load_balancing_loss(routing);
  expect_gradient(loss.gradient.d_router_probs, routing.router_probs,
                  [&] { return moe::load_balancing_loss(routing).value; });
}

TEST(ImportanceLoss, GradientByTheChosenGates) {
  Routing<double> routing = route_logits(random_matrix(6, 5, 13), 3);
  const Loss<double> loss = moe::importance_loss(routing);
  const double step = 1e-6;
  for (Index c = 0; c < routing.chosen.size(); ++c) {
    double& gate = routing.chosen.gate[c];
    const double center = gate;
    gate = center + step;
    const double up = moe::importance_loss(routing).value;
    gate = center - step;
    const double down = moe::importance_loss(routing).value;
    gate = center;
    EXPECT_NEAR(loss.gradient.d_chosen_gate[c], (up - down) / (2 * step), 1e-8);
  }
}

TEST(ImportanceLoss, GradientByTheLogits) {
  Matrix<double> z = random_matrix(6, 5, 14);
  z(2, 3) = -std::numeric_limits<double>::infinity();  // an unavailable expert
  Routing<double> routing = route_logits(z, 3);
  const Loss<double> loss = moe::importance_loss(routing, Importance::probs);
  expect_gradient(loss.gradient.d_router_logits, routing.router_logits,
                  [&] { return moe::importance_loss(routing, Importance::probs).value; });
}

TEST(ZLoss, GradientByTheLogits) {
  Routing<double> routing = route_logits(random_matrix(6, 5, 15), 3, masked({1, 0, 1, 1, 1, 1}));
  const Loss<double> loss = moe::router_z_loss(routing);
  expect_gradient(loss.gradient.d_router_logits, routing.router_logits,
                  [&] { return moe::router_z_loss(routing).value; });
}

TEST(ZLoss, UnavailableExpertsCountNothing) {
  Matrix<double> z(1, 3);
  z << 1, -std::numeric_limits<double>::infinity(), 2;
  const Loss<double> loss = moe::router_z_loss(route_logits(z, 2));
  const double lse = std::log(std::exp(1) + std::exp(2));
  EXPECT_NEAR(loss.value, lse * lse, 1e-14);
  EXPECT_EQ(loss.gradient.d_router_logits(0, 1), 0);
}

// Thresholds move with the logits and the noise that set them.
TEST(LoadLoss, GradientByTheLogitsAndByTheNoise) {
  for (const auto threshold : {LoadThreshold::two, LoadThreshold::one}) {
    for (Index k = 1; k <= 4; ++k) {
      SCOPED_TRACE(k);
      Routing<double> routing = route_noisy(random_matrix(6, 5, 16), random_matrix(6, 5, 17),
                                            (random_matrix(6, 5, 18).cwiseAbs().array() + 0.4).matrix(), k);
      const auto value = [&] {
        auto& [draws, stddev, noisy, top_k] = routing.noise;
        noisy = routing.router_logits + draws.cwiseProduct(stddev);
        return moe::load_loss(routing, threshold).value;
      };
      const Loss<double> loss = moe::load_loss(routing, threshold);
      expect_gradient(loss.gradient.d_router_logits, routing.router_logits, value);
      expect_gradient(loss.gradient.d_noise_stddev, routing.noise.stddev, value);
    }
  }
}

// ---- Load without noise.

double variation_of_demand(const Routing<double>& routing) {
  const Vector<double> x = moe::demand_per_expert(routing).cast<double>();
  return (x.array() - x.mean()).square().mean() / (x.mean() * x.mean() + 1e-10);
}

TEST(LoadLoss, WithoutNoiseIsTheVariationOfTheCountsWithoutGradient) {
  for (const auto threshold : {LoadThreshold::two, LoadThreshold::one}) {
    const Routing<double> routing = route_logits(known_logits(), 2);
    const Loss<double> loss = moe::load_loss(routing, threshold);
    EXPECT_NEAR(loss.value, 0.25, 1e-9);  // counts 3, 3, 1, 1
    EXPECT_TRUE((loss.gradient.d_router_logits.array() == 0).all());
    EXPECT_EQ(loss.gradient.d_noise_stddev.size(), 0);
  }
}

TEST(LoadLoss, WithAllExpertsChosenIsTheCount) {
  for (const auto threshold : {LoadThreshold::two, LoadThreshold::one}) {
    const Routing<double> routing =
        route_noisy(known_logits(), known_draws(), Matrix<double>::Constant(4, 4, .8), 4);
    const Loss<double> loss = moe::load_loss(routing, threshold);
    EXPECT_EQ(loss.value, 0);
    EXPECT_TRUE((loss.gradient.d_router_logits.array() == 0).all());
    EXPECT_TRUE((loss.gradient.d_noise_stddev.array() == 0).all());
  }
}

TEST(LoadLoss, WithNoiseOfZeroIsTheCount) {
  const Routing<double> routing = route_noisy(known_logits(), known_draws(), Matrix<double>::Zero(4, 4), 2);
  const Loss<double> loss = moe::load_loss(routing);
  EXPECT_NEAR(loss.value, variation_of_demand(routing), 1e-14);
  EXPECT_TRUE((loss.gradient.d_router_logits.array() == 0).all());
  EXPECT_TRUE((loss.gradient.d_noise_stddev.array() == 0).all());
}

TEST(LoadLoss, ATokenWithoutAThresholdCountsItsChoices) {
  Matrix<double> z = known_logits();
  const double inf = std::numeric_limits<double>::infinity();
  for (Index t = 0; t < 4; ++t) z(t, t) = z(t, (t + 1) % 4) = -inf;  // two available, two chosen
  const Routing<double> routing = route_noisy(z, known_draws(), Matrix<double>::Constant(4, 4, .8), 2);
  const Loss<double> loss = moe::load_loss(routing);
  EXPECT_NEAR(loss.value, variation_of_demand(routing), 1e-14);
  EXPECT_TRUE(loss.gradient.d_router_logits.allFinite());
  EXPECT_TRUE((loss.gradient.d_router_logits.array() == 0).all());
}

TEST(LoadLoss, UnavailableExpertsHaveNoLoad) {
  Matrix<double> z = known_logits();
  z.col(3).setConstant(-std::numeric_limits<double>::infinity());
  Routing<double> routing = route_noisy(z, known_draws(), Matrix<double>::Constant(4, 4, .8), 1);
  const Loss<double> loss = moe::load_loss(routing);
  EXPECT_TRUE(std::isfinite(loss.value));
  expect_gradient(loss.gradient.d_router_logits, routing.router_logits, [&] {
    routing.noise.noisy_logits =
        routing.router_logits + routing.noise.draws.cwiseProduct(routing.noise.stddev);
    return moe::load_loss(routing).value;
  });
  EXPECT_TRUE(loss.gradient.d_router_logits.allFinite());
  EXPECT_TRUE(loss.gradient.d_noise_stddev.allFinite());
  EXPECT_TRUE((loss.gradient.d_router_logits.col(3).array() == 0).all());
  EXPECT_FALSE((loss.gradient.d_router_logits.leftCols(3).array() == 0).all());
}

TEST(ImportanceLoss, OfEqualImportanceIsZeroAndFlat) {
  Matrix<double> z(3, 3);
  z << 1, 0, -1, -1, 1, 0, 0, -1, 1;
  for (const auto recipe : {Importance::gates, Importance::probs}) {
    const Loss<double> loss = moe::importance_loss(route_logits(z, 3), recipe);
    EXPECT_NEAR(loss.value, 0, 1e-15);
    for (const double d : loss.gradient.d_chosen_gate) EXPECT_NEAR(d, 0, 1e-15);
  }
}

// ---- RoutingGradient.

TEST(RoutingGradient, AddsAndScalesWhatIsThere) {
  const Routing<double> routing = known_noisy();
  const RoutingGradient<double> a = moe::load_balancing_loss(routing).gradient,
                                b = moe::router_z_loss(routing).gradient,
                                c = moe::load_loss(routing).gradient,
                                d = moe::importance_loss(routing).gradient;
  const RoutingGradient<double> sum = 0.5 * a + b * 2.0 + c + (d + d);
  EXPECT_TRUE(sum.d_router_probs.isApprox(0.5 * a.d_router_probs, 1e-15));
  EXPECT_TRUE(sum.d_router_logits.isApprox(2 * b.d_router_logits + c.d_router_logits, 1e-15));
  EXPECT_EQ(sum.d_noise_stddev, c.d_noise_stddev);
  ASSERT_EQ(sum.d_chosen_gate.size(), 8);
  for (Index i = 0; i < 8; ++i) EXPECT_EQ(sum.d_chosen_gate[i], 2 * d.d_chosen_gate[i]);
  EXPECT_TRUE(sum.d_gate.empty());
  RoutingGradient<double> total;
  total += a;
  total *= 3;
  EXPECT_TRUE(total.d_router_probs.isApprox(3 * a.d_router_probs, 1e-15));
}

TEST(RoutingGradient, OfBatchesThatDifferDoNotAdd) {
  const auto gradient_of = [](Index tokens, const auto& loss) {
    return loss(route_logits(random_matrix(tokens, 4, 19), 2)).gradient;
  };
  for (const auto& [name, loss] : losses()) {
    SCOPED_TRACE(name);
    EXPECT_THROW(gradient_of(3, loss) + gradient_of(4, loss), std::invalid_argument);
  }
  RoutingGradient<double> a, b;
  a.d_gate = {1, 2};
  b.d_gate = {1};
  EXPECT_THROW(a += b, std::invalid_argument);
}

// ---- Losses within sequences, over devices, and of ReLU routing.

TEST(SequenceBalanceLoss, OfOneGroupIsThePlainLoss) {
  const Routing<double> routing = route_logits(known_logits(), 2);
  const Loss<double> one = moe::sequence_balance_loss(routing, {});
  EXPECT_NEAR(one.value, moe::load_balancing_loss(routing).value, 1e-15);
  EXPECT_LT(largest_difference(one.gradient.d_router_probs,
                               moe::load_balancing_loss(routing).gradient.d_router_probs),
            1e-15);
}

TEST(SequenceBalanceLoss, IsTheMeanOverSequencesWithTokens) {
  moe::Rng rng(31);
  Matrix<double> z(9, 4);
  moe::fill_normal(z, 1.0, rng);
  BatchInfo info{.mask = moe::Mask::Constant(9, true), .group_begin = IndexVector{{0, 4, 4, 7, 9}}};
  info.mask[5] = info.mask[7] = info.mask[8] = false;  // the last sequence is padding
  const Routing<double> routing = route_logits(z, 2, info);
  double expected = 0;
  for (const auto& [begin, end] : {std::pair<Index, Index>{0, 4}, {4, 7}}) {
    Matrix<double> part(0, 4);
    for (Index t = begin; t < end; ++t)
      if (info.mask[t]) {
        part.conservativeResize(part.rows() + 1, 4);
        part.row(part.rows() - 1) = z.row(t);
      }
    expected += moe::load_balancing_loss(route_logits(part, 2)).value / 2;
  }
  const Loss<double> loss = moe::sequence_balance_loss(routing, info);
  EXPECT_NEAR(loss.value, expected, 1e-14);
  Routing<double> moved = routing;
  expect_gradient(loss.gradient.d_router_probs, moved.router_probs,
                  [&] { return moe::sequence_balance_loss(moved, info).value; });
}

// Masked and poisoned tokens, and sequences of such tokens only.
TEST(SequenceBalanceLoss, TokensThatDoNotCountChangeNoBit) {
  Matrix<double> z = random_matrix(12, 4, 34);
  const std::vector<bool> valid = {1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1};
  BatchInfo with = masked(valid), without{.group_begin = IndexVector{{0, 3, 5, 7}}};
  with.group_begin = IndexVector{{0, 4, 7, 7, 9, 12}};  // the second has no valid token
  Matrix<double> kept(7, 4);
  Index n = 0;
  for (Index t = 0; t < 12; ++t)
    if (valid[std::size_t(t)]) kept.row(n++) = z.row(t);
  ASSERT_EQ(n, 7);
  for (Index t = 0; t < 12; ++t)
    if (!valid[std::size_t(t)]) z(t, t % 4) = std::numeric_limits<double>::quiet_NaN();
  const Loss<double> expected = moe::sequence_balance_loss(route_logits(kept, 2, without), without);
  const Routing<double> routing = route_logits(z, 2, with);
  with.mask.resize(0);
  const Routing<double> poisoned = route_logits(z, 2, with);
  for (const Routing<double>* r : {&routing, &poisoned}) {
    const Loss<double> loss = moe::sequence_balance_loss(*r, with);
    EXPECT_EQ(loss.value, expected.value);
    n = 0;
    for (Index t = 0; t < 12; ++t) {
      const Matrix<double> row = loss.gradient.d_router_probs.row(t);
      if (valid[std::size_t(t)])
        EXPECT_EQ(row, expected.gradient.d_router_probs.row(n++));
      else
        EXPECT_EQ(row.norm(), 0);
    }
  }
}

TEST(DeviceBalanceLoss, GradientByTheProbabilitiesWithPadding) {
  Routing<double> routing = route_logits(random_matrix(7, 4, 35), 2, masked({1, 1, 0, 1, 0, 1, 1}));
  const IndexVector device{{1, 0, 1, 1}};
  const Loss<double> loss = moe::device_balance_loss(routing, device);
  expect_gradient(loss.gradient.d_router_probs, routing.router_probs,
                  [&] { return moe::device_balance_loss(routing, device).value; });
}

TEST(ReluBalanceLoss, GradientByTheChosenGatesWithPadding) {
  Routing<double> routing = route_logits(random_matrix(7, 4, 36), 3, masked({1, 1, 0, 1, 0, 1, 1}));
  const Loss<double> loss = moe::relu_balance_loss(routing, 2);
  ASSERT_EQ(loss.gradient.d_chosen_gate.size(), 5 * 3);
  const double step = 1e-4;
  for (Index c = 0; c < routing.chosen.size(); ++c) {
    double& gate = routing.chosen.gate[c];
    const double center = gate;
    gate = center + step;
    const double up = moe::relu_balance_loss(routing, 2).value;
    gate = center - step;
    const double down = moe::relu_balance_loss(routing, 2).value;
    gate = center;
    EXPECT_NEAR(loss.gradient.d_chosen_gate[c], (up - down) / (2 * step), 1e-10) << c;
  }
}

TEST(DeviceBalanceLoss, EqualsItsFormula) {
  moe::Rng rng(32);
  Matrix<double> z(11, 6);
  moe::fill_normal(z, 1.0, rng);
  const Routing<double> routing = route_logits(z, 2);
  const IndexVector device{{0, 1, 0, 2, 2, 2}};
  const IndexVector demand = moe::demand_per_expert(routing);
  double expected = 0;
  for (const Index d : {0, 1, 2}) {
    double f = 0, p = 0, size = 0;
    for (Index e = 0; e < 6; ++e) {
      if (device[e] != d) continue;
      f += 6.0 / (2 * 11) * double(demand[e]);
      p += routing.router_probs.col(e).sum() / 11;
      ++size;
    }
    expected += f / size * p;
  }
  const Loss<double> loss = moe::device_balance_loss(routing, device);
  EXPECT_NEAR(loss.value, expected, 1e-14);
  Routing<double> moved = routing;
  expect_gradient(loss.gradient.d_router_probs, moved.router_probs,
                  [&] { return moe::device_balance_loss(moved, device).value; });
  // One device for every expert is the plain loss; one for all is 1.
  EXPECT_NEAR(moe::device_balance_loss(routing, IndexVector{{0, 1, 2, 3, 4, 5}}).value,
              moe::load_balancing_loss(routing).value, 1e-14);
  EXPECT_NEAR(moe::device_balance_loss(routing, IndexVector(IndexVector::Zero(6))).value, 1, 1e-14);
}

TEST(ReluBalanceLoss, EqualsItsFormula) {
  moe::Rng rng(33);
  moe::TopKRouter<double> router({.d_model = 3, .num_experts = 5, .top_k = 5, .score = moe::Score::relu},
                                 rng);
  Matrix<double> x(20, 3);
  moe::fill_normal(x, 1.0, rng);
  Routing<double> routing;
  router.route(x, {}, routing);
  double expected = 0;
  for (Index e = 0; e < 5; ++e) {
    double count = 0, sum = 0;
    for (Index t = 0; t < 20; ++t) {
      const double r = std::max(routing.router_logits(t, e), 0.0);
      count += r > 0;
      sum += r;
    }
    expected += count * sum * 5 / (2 * 20 * 20);
  }
  const Loss<double> loss = moe::relu_balance_loss(routing, 2);
  EXPECT_NEAR(loss.value, expected, 1e-13);
  for (Index c = 0; c < routing.chosen.size(); c += 7) {
    Routing<double> up = routing;
    up.chosen.gate[c] += 1;
    EXPECT_NEAR(moe::relu_balance_loss(up, 2).value - loss.value, loss.gradient.d_chosen_gate[c], 1e-12);
  }
  EXPECT_DOUBLE_EQ(moe::update_relu_coefficient(1e-8, 2.5, 2), 1.2e-8);
  EXPECT_DOUBLE_EQ(moe::update_relu_coefficient(1.2e-8, 1.5, 2), 1e-8);
  EXPECT_DOUBLE_EQ(moe::update_relu_coefficient(1.2e-8, 2.0, 2), 1e-8);  // not more than top_k
}

// The normalisations of other libraries, on a batch whose values they gave.
TEST(BalanceFactor, ConvertsOtherLibrariesLosses) {
  using moe::BalanceConvention;
  const Routing<double> two = route_logits(known_logits(), 2);
  const double ours = moe::load_balancing_loss(two).value;
  EXPECT_NEAR(ours, 1.146485626, 1e-9);  // Megatron-LM
  EXPECT_NEAR(ours * moe::balance_factor(BalanceConvention::tokens, 4, 2), 2.292971251, 1e-9);
  const double first = moe::load_balancing_loss(two, moe::demand_per_expert(two, 1), Index(4)).value;
  EXPECT_NEAR(first, 1.416588236, 1e-9);  // GShard, Switch
  EXPECT_NEAR(first * moe::balance_factor(BalanceConvention::mean_product, 4, 1), 0.088536765, 1e-9);
  EXPECT_EQ(moe::balance_factor(BalanceConvention::choices, 8, 2), 1);
}

TEST(BalanceLosses, BadArgumentsAreRefused) {
  const Routing<double> routing = route_logits(known_logits(), 2);
  EXPECT_THROW(moe::sequence_balance_loss(routing, {.group_begin = IndexVector{{0, 5}}}),
               std::invalid_argument);
  EXPECT_THROW(moe::device_balance_loss(routing, IndexVector{{0, 1, 2}}), std::invalid_argument);
  EXPECT_THROW(moe::device_balance_loss(routing, IndexVector{{0, 1, 2, -1}}), std::invalid_argument);
  EXPECT_THROW(moe::relu_balance_loss(routing, 0), std::invalid_argument);
  EXPECT_THROW(moe::relu_balance_loss(routing, 5), std::invalid_argument);
  EXPECT_THROW(moe::update_relu_coefficient(0, 1, 1), std::invalid_argument);
  EXPECT_THROW(moe::update_relu_coefficient(1, -1, 1), std::invalid_argument);
  EXPECT_THROW(moe::balance_factor(moe::BalanceConvention::tokens, 0, 1), std::invalid_argument);
  EXPECT_THROW(moe::balance_factor(moe::BalanceConvention::tokens, 4, 5), std::invalid_argument);
  EXPECT_THROW(moe::demand_per_expert(routing, -1), std::invalid_argument);
}

// DeepSeek-V3, eq. 17 to 20: f counts the top k of the scores, without the bias that selects. Values computed
// with Python in double.
TEST(SequenceBalanceLoss, OfDeepSeekV3CountsTheScoresWithoutTheBias) {
  const Matrix<double> z = known_logits();
  Routing<double> routing;
  moe::begin_routing(4, 4, {}, routing, "test");
  routing.router_logits = z;
  const Vector<double> bias{{-5, 0, 0, 5}};
  moe::RouterWorkspace<double> workspace;
  moe::route_by_logits({.gate = {.score = moe::Score::sigmoid}}, {.bias = &bias}, {}, routing, workspace,
                       moe::Sequential{});
  const auto demand = moe::most_probable_choices(routing, 1);
  EXPECT_EQ(demand.expert, (moe::Buffer<Index>{0, 0, 0, 3}));
  const Loss<double> loss = moe::sequence_balance_loss(routing, {}, demand);
  EXPECT_NEAR(loss.value, 1.083355424, 1e-9);
  EXPECT_NEAR(moe::sequence_balance_loss(routing, {}).value, 0.791130936, 1e-9);
  Routing<double> moved = routing;
  expect_gradient(loss.gradient.d_router_probs, moved.router_probs,
                  [&] { return moe::sequence_balance_loss(moved, {}, demand).value; });
}

TEST(MostProbableChoices, AreThoseOfARouterThatSelectsByProbability) {
  BatchInfo info = masked({true, true, false, true});
  const Routing<double> routing = route_logits(known_logits(), 2, info);
  const auto choices = moe::most_probable_choices(routing, 2);
  EXPECT_EQ(choices.expert, routing.chosen.expert);
  EXPECT_EQ(choices.token_begin, routing.chosen.token_begin);
  for (Index c = 0; c < 2; ++c) EXPECT_EQ(choices.gate[c], routing.router_probs(0, choices.expert[c]));
  EXPECT_EQ(moe::most_probable_choices(route_logits(Matrix<double>(0, 4), 2), 2).size(), 0);
  EXPECT_THROW(moe::most_probable_choices(routing, 0), std::invalid_argument);
  EXPECT_THROW(moe::most_probable_choices(routing, 5), std::invalid_argument);
  EXPECT_THROW(moe::sequence_balance_loss(routing, info, moe::Choices<double>{}), std::invalid_argument);
}

// Of one token: the square of the log of the sum of exponentials.
TEST(ZLoss, OfAKnownToken) {
  const Matrix<double> z{{1, .5, -.25, 2, -1, .75, 0, -2}};
  EXPECT_NEAR(moe::router_z_loss(route_logits(z, 2)).value, 7.740827280503665, 1e-14);
}

}  // namespace
}  // namespace loss_test
