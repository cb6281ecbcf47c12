// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "gradients/layers.hpp"
#include "laws.hpp"

namespace sparse_mixer_router_test {
namespace {

using moe::Index;
using moe::Matrix;
using moe::Rng;
using Router = moe::SparseMixerRouter<double>;
using Expert = moe::FeedForward<double, moe::GELU>;
using Layer = moe::MoELayer<Expert, Router>;

Router identity_router(Index n, double jitter = 0.01) {
  Router router({.d_model = n, .num_experts = n, .jitter = jitter});
  router.w_router.setIdentity();
  return router;
}

moe::Routing<double> route(const Router& router, const Matrix<double>& x) {
  moe::Routing<double> routing;
  router.route(x, {}, routing);
  return routing;
}

Layer make_layer(Rng& rng, double jitter) {
  return {moe::make_experts<Expert>(5, {.d_model = 4, .d_ff = 6, .bias = true}, rng),
          Router({.d_model = 4, .num_experts = 5, .jitter = jitter}, rng)};
}

Matrix<double> normal(Index rows, Index cols, Rng& rng) {
  Matrix<double> x(rows, cols);
  moe::fill_normal(x, 1.0, rng);
  return x;
}

// Values of the published code (modeling_phimoe.py, sparsemixer) in inference.
TEST(SparseMixerRouter, EqualsThePublishedCode) {
  auto routing = route(identity_router(4), Matrix<double>{{1, .99, .5, -1}});
  EXPECT_EQ(routing.chosen.expert, (moe::Buffer<Index>{0, 1}));
  EXPECT_NEAR(routing.chosen.gate[0], 0.502499979166875, 1e-12);
  EXPECT_EQ(routing.chosen.gate[1], 1);
  routing = route(identity_router(8), Matrix<double>{{1, .5, -.25, 2, -1, .75, 0, -2}});
  EXPECT_EQ(routing.chosen.expert, (moe::Buffer<Index>{3, 0}));
  EXPECT_EQ(routing.chosen.gate, (moe::Buffer<double>{1, 1}));
}

TEST(SparseMixerRouter, TiesGoToTheLowerExpert) {
  const auto routing = route(identity_router(3), Matrix<double>{{2, 2, 2}, {0, 0, 0}});
  EXPECT_EQ(routing.chosen.expert, (moe::Buffer<Index>{0, 1, 0, 1}));
  for (Index t = 0; t < 2; ++t) {
    EXPECT_NEAR(routing.chosen.gate[2 * t], 1.0 / 3, 1e-15);
    EXPECT_NEAR(routing.chosen.gate[2 * t + 1], 1.0 / 2, 1e-15);
  }
}

TEST(SparseMixerRouter, ATokenWithOneAvailableExpertTakesThat) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  Router router = identity_router(2);
  router.w_router << 1, 0, 0, 1e300;
  const auto routing = route(router, Matrix<double>{{1, -1e300}, {1, kInf}});
  EXPECT_EQ(routing.chosen.expert, (moe::Buffer<Index>{0}));
  EXPECT_EQ(routing.plan.token_state[1], moe::TokenState::poisoned);
}

// A wide margin, so that gates are softmaxes over several experts.
TEST(SparseMixerRouter, BackwardIsExactInInference) {
  Rng rng(1);
  Index fit = 0;
  for (int round = 0; round < 30; ++round) {
    const Layer layer = make_layer(rng, 0.4);
    const auto report = moe::check_gradients(layer, normal(5, 4, rng), {}, [](const moe::Routing<double>& r) {
      moe::Loss<double> loss = moe::load_balancing_loss(r);
      loss.gradient += moe::router_z_loss(r).gradient;
      loss.value += moe::router_z_loss(r).value;
      return loss;
    });
    if (report.crossed > 0 || report.worst > 1) continue;  // an expert joined or left a softmax
    EXPECT_LT(report.worst, 1e-6) << report.where;
    ++fit;
  }
  EXPECT_GT(fit, 10);
}

// The estimator of the authors: forward scales the gate by 1 or 0.3333, backward does not see it.
TEST(SparseMixerRouter, TheEstimatorIgnoresTheFactor) {
  Rng rng(2);
  const Router router({.d_model = 4, .num_experts = 6, .jitter = 0.5}, rng);
  const Matrix<double> x = normal(200, 4, rng);
  moe::Routing<double> routing;
  router.route(x, rng, {}, routing);
  Index third = 0, other = 0;
  for (Index t = 0; t < 200; ++t) {
    const double* const z = &routing.router_logits(t, 0);
    for (Index c = 2 * t; c < 2 * t + 2; ++c) {
      const Index without = c == 2 * t ? -1 : routing.chosen.expert[2 * t];
      const Index picked = routing.chosen.expert[c];
      ASSERT_NE(picked, without);
      double best = -1e300, sum = 0;
      for (Index e = 0; e < 6; ++e)
        if (e != without) best = std::max(best, z[e]);
      const auto near = [&](Index e) {
        return e != without && (best - z[e]) / std::max(std::abs(z[e]), best) <= 1;
      };
      for (Index e = 0; e < 6; ++e) sum += near(e) ? std::exp(z[e] - best) : 0;
      ASSERT_TRUE(near(picked));
      const double share = std::exp(z[picked] - best) / sum;
      const double factor = routing.chosen.gate[c] / share;
      if (factor < 0.5) {
        EXPECT_NEAR(factor, 0.3333, 1e-12);
        EXPECT_NE(z[picked], best);
        ++third;
      } else {
        EXPECT_NEAR(factor, 1, 1e-12);
        other += z[picked] != best;
      }
    }
  }
  EXPECT_GT(third, 40);
  EXPECT_GT(other, 10);  // a quarter of the picks that are not the best
  EXPECT_LT(other, third);

  // d_logits of a gate: share * (one of the picked - shares), whatever the factor.
  moe::RoutingGradient<double> gradient;
  gradient.d_chosen_gate.assign(routing.chosen.size(), 1.0);
  Router with = moe::zeros_like(router), without = with;
  Matrix<double> d_x = Matrix<double>::Zero(200, 4), d_x2 = d_x;
  router.backward(x, routing, gradient, d_x, with);
  moe::Routing<double> plain = routing;
  plain.chosen.gate.assign(plain.chosen.size(), 1.0);
  router.backward(x, plain, gradient, d_x2, without);
  EXPECT_EQ(with.w_router, without.w_router);
  EXPECT_GT(with.w_router.norm(), 0);
}

// Backward of the picks that training drew is the derivative of their shares, by differences.
TEST(SparseMixerRouter, TheEstimatorIsTheDerivativeOfTheShares) {
  Rng rng(5);
  constexpr double kJitter = 0.5, kStep = 1e-6;
  Index fit = 0, second = 0;
  for (int round = 0; round < 60; ++round) {
    Router router({.d_model = 3, .num_experts = 5, .jitter = kJitter}, rng);
    Matrix<double> x = normal(4, 3, rng);
    moe::Routing<double> routing;
    router.route(x, rng, {}, routing);
    gradients::Kinks kinks;
    gradients::find_router_kinks(router, x, routing, kStep, kinks);
    if (kinks.nearest <= 100) continue;
    ++fit;
    std::vector<double> weights;
    moe::RoutingGradient<double> gradient;
    for (Index c = 0; c < routing.chosen.size(); ++c) {
      gradient.d_chosen_gate.push_back(rng.uniform(-1, 1));
      second += c % 2 == 0 && routing.router_logits(c / 2, routing.chosen.expert[c]) !=
                                  routing.router_logits.row(c / 2).maxCoeff();
    }
    // And the gates of assignments, which the plan has in another order than the choices.
    for (Index a = 0; a < routing.plan.num_assignments(); ++a) gradient.d_gate.push_back(rng.uniform(-1, 1));
    weights.assign(gradient.d_chosen_gate.begin(), gradient.d_chosen_gate.end());
    for (Index a = 0; a < routing.plan.num_assignments(); ++a)
      weights[std::size_t(routing.plan.choice[a])] += gradient.d_gate[a];
    const auto value = [&] {
      double sum_of_shares = 0;
      const Matrix<double> z = x * router.w_router.transpose();
      for (Index c = 0; c < routing.chosen.size(); ++c) {
        const Index t = c / 2, without = c % 2 == 0 ? -1 : routing.chosen.expert[c - 1];
        double best = -1e300, sum = 0;
        for (Index e = 0; e < 5; ++e)
          if (e != without) best = std::max(best, z(t, e));
        for (Index e = 0; e < 5; ++e)
          if (e != without && (best - z(t, e)) / std::max(std::abs(z(t, e)), best) <= 2 * kJitter)
            sum += std::exp(z(t, e));
        sum_of_shares += weights[std::size_t(c)] * std::exp(z(t, routing.chosen.expert[c])) / sum;
      }
      return sum_of_shares;
    };
    Router grad = moe::zeros_like(router);
    Matrix<double> d_x = Matrix<double>::Zero(4, 3);
    router.backward(x, routing, gradient, d_x, grad);
    for (const auto& [at, d] : {std::pair(&x, &d_x), std::pair(&router.w_router, &grad.w_router)})
      for (Index i = 0; i < at->size(); ++i) {
        double& entry = at->data()[i];
        const double center = entry;
        entry = center + kStep;
        const double up = value();
        entry = center - kStep;
        const double down = value();
        entry = center;
        EXPECT_NEAR(d->data()[i], (up - down) / (2 * kStep), 1e-7) << round << " " << i;
      }
  }
  EXPECT_GT(fit, 30);
  EXPECT_GT(second, 20);  // first picks that are not the best
}

// Beside every kind of shared experts and every loss. In training gates are not what backward
// differentiates, see above.
TEST(GradientsOfSparseMixerLayers, AreExactInInference) {
  using namespace gradients;
  Tally tally;
  Rng random(23);
  for (const double jitter : {0.01, 0.4}) {
    SCOPED_TRACE(jitter);
    Router router({.d_model = kDModel, .num_experts = kNumExperts, .jitter = jitter});
    randomise(router, random);
    check_all_layers<ReLUExpert>(router, random, tally, false);
  }
  EXPECT_GE(tally.checks, 2 * kLossesOfARouter / kEvery);
  EXPECT_EQ(tally.dropped, 0);
  EXPECT_GT(tally.beyond_kinks, tally.checks);
}

TEST(SparseMixerRouter, ThreadsChangeNoBit) {
  Rng rng(3);
  const Layer layer = make_layer(rng, 0.3);
  const Matrix<double> x = normal(300, 4, rng);
  Layer::Cache cache;
  const Matrix<double> y = layer.forward(x, cache, {}, moe::Sequential{});
  Layer grad = moe::zeros_like(layer);
  const Matrix<double> d_x = layer.backward(x, cache, grad, {}, moe::Sequential{});
#ifdef _OPENMP
  for (const int threads : {2, 3, 8}) {
    Layer::Cache other;
    Layer other_grad = moe::zeros_like(layer);
    EXPECT_TRUE(laws::same_bits(layer.forward(x, other, {}, moe::OpenMP{threads}), y));
    EXPECT_TRUE(laws::same_bits(layer.backward(x, other, other_grad, {}, moe::OpenMP{threads}), d_x));
    EXPECT_TRUE(laws::same_bits(other_grad.router().w_router, grad.router().w_router));
  }
#endif
}

TEST(SparseMixerRouter, APoisonedTokenChangesNoOtherRow) {
  Rng rng(4);
  const Layer layer = make_layer(rng, 0.3);
  Matrix<double> x = normal(6, 4, rng);
  moe::BatchInfo info{.mask = moe::Mask::Constant(6, true)};
  info.mask[2] = false;
  const Matrix<double> masked = layer.forward(x, info);
  x(2, 0) = std::numeric_limits<double>::quiet_NaN();
  const Matrix<double> poisoned = layer.forward(x);
  for (Index t = 0; t < 6; ++t) {
    if (t == 2)
      EXPECT_TRUE(poisoned.row(t).array().isNaN().all());
    else
      EXPECT_EQ(poisoned.row(t), masked.row(t));
  }
}

TEST(SparseMixerRouter, BadOptionsAreRefused) {
  EXPECT_THROW(Router({.d_model = 0, .num_experts = 2}), std::invalid_argument);
  EXPECT_THROW(Router({.d_model = 2, .num_experts = 2, .jitter = -1}), std::invalid_argument);
  Router router({.d_model = 2, .num_experts = 1});
  EXPECT_THROW(router.remove_expert(0), std::invalid_argument);
  EXPECT_EQ(route(router, Matrix<double>{{1, 2}}).chosen.size(), 1);
  router.add_expert(moe::Vector<double>::Ones(2));
  EXPECT_EQ(route(router, Matrix<double>{{1, 2}}).chosen.size(), 2);
  EXPECT_NO_THROW(router.remove_expert(0));
}

}  // namespace
}  // namespace sparse_mixer_router_test
