// SPDX-License-Identifier: MIT
// Gates and their gradients where logits lie far apart, against long double and formulas without differences
// of numbers near 1: d_i - sum of q_j d_j is written as the sum of q_j (d_i - d_j).
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

namespace {

using moe::GateRule;
using moe::Index;
using moe::Matrix;
using moe::Score;
using moe::Vector;
using Long = long double;
using Longs = std::vector<Long>;

Long sigmoid(Long z) { return 1 / (1 + std::exp(-z)); }
Long softplus(Long z) { return z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z)); }

Long score_of(Score score, Long z) {
  switch (score) {
    case Score::sigmoid:
      return sigmoid(z);
    case Score::sqrt_softplus:
      return std::sqrt(softplus(z));
    case Score::relu:
      return std::max<Long>(z, 0);
    default:
      return std::exp(z);  // to be divided by their sum
  }
}
Long slope_of(Score score, Long z) {
  switch (score) {
    case Score::sigmoid:
      return sigmoid(z) * sigmoid(-z);
    case Score::sqrt_softplus:
      return sigmoid(z) / (2 * std::sqrt(softplus(z)));
    default:
      return z > 0 ? 1 : 0;
  }
}

// The sum of weight_j (d_i - d_j).
Long pairwise(const Longs& weight, const Longs& d, std::size_t i) {
  Long sum = 0;
  for (std::size_t j = 0; j < d.size(); ++j) sum += weight[j] * (d[i] - d[j]);
  return sum;
}

// The same with every term positive: what rounding errors are measured by, because terms may cancel by their
// own signs.
Long pairwise_size(const Longs& weight, const Longs& d, std::size_t i) {
  Long sum = 0;
  for (std::size_t j = 0; j < d.size(); ++j) sum += weight[j] * std::abs(d[i] - d[j]);
  return sum;
}

struct Reference {
  Longs gates, d_logits;
};

// Of the experts 0 to n - 1.
Reference reference(const GateRule& rule, const Longs& z, std::size_t n, const Longs& d_gates) {
  Longs score(z.size());
  Long all = 0;
  for (std::size_t e = 0; e < z.size(); ++e) all += score[e] = score_of(rule.score, z[e]);
  if (rule.score == Score::softmax)
    for (Long& s : score) s /= all;
  const Long scale = rule.scale;
  Long sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += score[i];
  sum += Long(rule.epsilon);
  const bool floored = sum < Long(rule.minimum);
  if (floored) sum = Long(rule.minimum);
  Reference result{Longs(n), Longs(z.size(), 0)};
  Longs d_score(z.size(), 0), share(n);
  for (std::size_t i = 0; i < n; ++i) {
    share[i] = rule.renormalise ? score[i] / sum : score[i];
    result.gates[i] = scale * share[i];
  }
  const Longs d(d_gates.begin(), d_gates.begin() + std::ptrdiff_t(n));
  for (std::size_t i = 0; i < n; ++i) {
    if (!rule.renormalise)
      d_score[i] = scale * d[i];
    else if (floored)
      d_score[i] = scale * d[i] / sum;
    else
      d_score[i] = scale * (pairwise(share, d, i) + Long(rule.epsilon) / sum * d[i]) / sum;
  }
  for (std::size_t e = 0; e < z.size(); ++e)
    result.d_logits[e] = rule.score == Score::softmax ? score[e] * pairwise(score, d_score, e)
                                                      : d_score[e] * slope_of(rule.score, z[e]);
  if (rule.score == Score::softmax && rule.renormalise && rule.epsilon == 0 && !floored)
    for (std::size_t e = 0; e < z.size(); ++e)  // a softmax of the chosen
      result.d_logits[e] = e < n ? scale * share[e] * pairwise(share, d, e) : 0;
  return result;
}

// |a - b| in units in the last place of `size`, or of the smallest normal number where that is larger.
template <class S>
double ulps(S a, Long b, Long size) {
  size = std::max<Long>(size, std::numeric_limits<S>::min());
  return double(std::abs(Long(a) - b) / (size * Long(std::numeric_limits<S>::epsilon())));
}
template <class S>
double ulps(S a, Long b) {
  return ulps(a, b, std::abs(b));
}

struct Case {
  std::string name;
  GateRule rule;
  bool last_is_reached;  // whether logits other than those of the chosen get a gradient
};

std::vector<Case> cases() {
  const auto of = [](Score score, bool renormalise, double epsilon = 0, double minimum = 0,
                     double scale = 1) {
    return GateRule{score, renormalise, epsilon, minimum, scale};
  };
  return {{"softmax", of(Score::softmax, false), true},
          {"softmax scaled", of(Score::softmax, false, 0, 0, 16), true},
          {"softmax of the chosen", of(Score::softmax, true, 0, 0, 2.5), false},
          {"softmax renormalised with an epsilon", of(Score::softmax, true, 1e-9), true},
          {"softmax renormalised with a large epsilon", of(Score::softmax, true, 0.125), true},
          {"softmax renormalised with a minimum", of(Score::softmax, true, 0, 1e-12), true},
          {"sigmoid", of(Score::sigmoid, false), false},
          {"sigmoid renormalised", of(Score::sigmoid, true), false},
          {"sigmoid renormalised with an epsilon", of(Score::sigmoid, true, 1e-20, 0, 2.5), false},
          {"sqrt_softplus", of(Score::sqrt_softplus, false), false},
          {"sqrt_softplus renormalised", of(Score::sqrt_softplus, true), false},
          {"relu", of(Score::relu, false), false},
          {"relu renormalised", of(Score::relu, true), false}};
}

template <class S>
class GatePrecision : public testing::Test {};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(GatePrecision, Scalars);

// The winner is `gap` above the others; d_gates are such that no two terms of a sum cancel by their own
// signs.
TYPED_TEST(GatePrecision, OfGatesAndGradientsHoldsAtEveryGap) {
  using S = TypeParam;
  constexpr Index kExperts = 6;
  constexpr double kUlps = 40;
  // Logits that are numbers of S; the first three are chosen.
  const double others[kExperts] = {0, -0.25, -0.5, -0.75, -1.5, -2};
  const Longs d_gates{0.75L, -0.5L, -1.25L};
  for (const Case& c : cases())
    for (const double base : {-150.0, -60.0, -20.0, 0.0, 3.0})
      for (int gap = 0; gap <= 100; ++gap)
        for (const Index winner : {0, 1, 5}) {
          Vector<S> z(kExperts), probs(kExperts);
          Longs long_z;
          for (Index e = 0; e < kExperts; ++e) {
            z[e] = S(base + others[e] + (e == winner ? gap : 0));
            long_z.push_back(Long(z[e]));
          }
          const Index n = 3, experts[] = {0, 1, 2};
          if (c.rule.score == Score::relu && z.minCoeff() <= S(0)) continue;
          moe::normalised_scores(c.rule.score, kExperts, z.data(), probs.data());
          // With an epsilon or a minimum the gates are quotients of what is left of scores that underflow.
          if (c.rule.epsilon > 0 || c.rule.minimum > 0) {
            if (c.rule.score == Score::softmax && probs.minCoeff() < std::numeric_limits<S>::min()) continue;
            if (c.rule.score == Score::sigmoid && base < -30) continue;
          }
          Vector<S> gates(n), d(n), d_z = Vector<S>::Zero(kExperts);
          for (Index i = 0; i < n; ++i) d[i] = S(d_gates[std::size_t(i)]);
          const moe::TokenScores<S> token{kExperts, z.data(), probs.data()};
          moe::compute_gates(c.rule, token, n, experts, gates.data());
          moe::compute_gates_backward(c.rule, token, n, experts, gates.data(), d.data(), d_z.data());
          const Reference expected = reference(c.rule, long_z, std::size_t(n), d_gates);
          const auto where = [&] {
            return c.name + ", base " + std::to_string(base) + ", gap " + std::to_string(gap) + ", winner " +
                   std::to_string(winner);
          };
          for (Index i = 0; i < n; ++i)
            ASSERT_LE(ulps(gates[i], expected.gates[std::size_t(i)]), kUlps)
                << where() << ": gate " << i << " is " << gates[i] << ", expected "
                << expected.gates[std::size_t(i)];
          Long largest = 0;
          for (const Long v : expected.d_logits) largest = std::max(largest, std::abs(v));
          for (Index e = 0; e < kExperts; ++e) {
            const Long right = expected.d_logits[std::size_t(e)];
            // An expert that is not chosen may get next to nothing as the rest of larger terms.
            const bool is_rest = c.last_is_reached && c.rule.renormalise && e >= n;
            const Long unit = is_rest ? std::max(std::abs(right), largest) : std::abs(right);
            ASSERT_LE(ulps(d_z[e], right, unit), kUlps)
                << where() << ": d_logits[" << e << "] is " << d_z[e] << ", expected " << right;
          }
        }
}

// exp(-5) beside 1: 0.9933 and 0.0067, wherever the two logits are.
TYPED_TEST(GatePrecision, OfScoresThatAllUnderflowIsThatOfTheirQuotients) {
  using S = TypeParam;
  const Index experts[] = {1, 0};
  for (const double low : {-45.0, -95.0, -150.0, -800.0}) {
    for (const Score score : {Score::sigmoid, Score::sqrt_softplus}) {
      Vector<S> z{{S(low - 5), S(low)}}, probs(2), gates(2);
      moe::normalised_scores(score, Index(2), z.data(), probs.data());
      moe::compute_gates(GateRule{.score = score, .renormalise = true}, {2, z.data(), probs.data()}, 2,
                         experts, gates.data());
      const Long quotient = std::exp(score == Score::sigmoid ? -5.0L : -2.5L);
      EXPECT_LE(ulps(gates[0], 1 / (1 + quotient)), 4) << low;
      EXPECT_LE(ulps(gates[1], quotient / (1 + quotient)), 4) << low;
    }
  }
}

// A softmax of one row whose first probability is 1 but for exp(-gap): the gradient by its logit is what
// the others give, and never zero.
TYPED_TEST(GatePrecision, OfASoftmaxBackwardHoldsAtEveryGap) {
  using S = TypeParam;
  for (int gap = 0; gap <= 100; ++gap) {
    const Vector<S> z{{S(gap), S(0), S(-0.5)}}, d{{S(0.5), S(-1), S(-0.25)}};
    Vector<S> p(3), d_z = Vector<S>::Zero(3);
    moe::softmax(Index(3), z.data(), p.data());
    moe::softmax_backward(Index(3), p.data(), d.data(), d_z.data());
    Longs long_p, long_d{0.5L, -1.0L, -0.25L};
    Long sum = 0;
    for (const Long v : {Long(gap), 0.0L, -0.5L}) sum += std::exp(v);
    for (const Long v : {Long(gap), 0.0L, -0.5L}) long_p.push_back(std::exp(v) / sum);
    for (std::size_t i = 0; i < 3; ++i)
      EXPECT_LE(ulps(d_z[Index(i)], long_p[i] * pairwise(long_p, long_d, i),
                     long_p[i] * pairwise_size(long_p, long_d, i)),
                12)
          << gap << ", " << i;
  }
}

// Normalised sigmoid scores, as the balance losses take them.
TYPED_TEST(GatePrecision, OfNormalisedScoresBackwardHoldsAtEveryGap) {
  using S = TypeParam;
  for (const Score score : {Score::sigmoid, Score::sqrt_softplus})
    for (int gap = 0; gap <= 100; ++gap) {
      const Vector<S> z{{S(2), S(2 - gap), S(1.5 - gap)}}, d{{S(0.5), S(-1), S(-0.25)}};
      Vector<S> p(3), d_z = Vector<S>::Zero(3);
      moe::normalised_scores(score, Index(3), z.data(), p.data());
      moe::normalised_scores_backward(score, Index(3), z.data(), p.data(), d.data(), d_z.data());
      const Longs long_d{0.5L, -1.0L, -0.25L};
      const Longs long_z{Long(z[0]), Long(z[1]), Long(z[2])};
      const Reference right =
          reference({.score = score, .renormalise = true, .epsilon = 1e-20}, long_z, 3, long_d);
      Long sum = 1e-20L;
      for (const Long v : long_z) sum += score_of(score, v);
      for (std::size_t i = 0; i < 3; ++i)
        EXPECT_LE(
            ulps(d_z[Index(i)], right.d_logits[i],
                 (pairwise_size(right.gates, long_d, i) + 1e-20L / sum) / sum * slope_of(score, long_z[i])),
            24)
            << gap << ", " << i;
    }
}

// A gate's weight learns as long as the gate is not exactly 1 in the reals.
TYPED_TEST(GatePrecision, OfAGateNearOneTrainsTheRouter) {
  using S = TypeParam;
  moe::TopKRouter<S> router({.d_model = 1, .num_experts = 2, .top_k = 2, .renormalise = true});
  router.w_router << S(80), S(0);
  const Matrix<S> x = Matrix<S>::Ones(1, 1);
  moe::Routing<S> routing;
  router.route(x, {}, routing, moe::Sequential{});
  moe::TopKRouter<S> grad = moe::zeros_like(router);
  Matrix<S> d_x = Matrix<S>::Zero(1, 1);
  moe::RoutingGradient<S> gradient;
  gradient.d_gate.assign(2, S(0));
  gradient.d_gate[0] = 1;
  router.backward(x, routing, gradient, d_x, grad, moe::Sequential{});
  EXPECT_LE(ulps(grad.w_router(0, 0), std::exp(-80.0L)), 8);
  EXPECT_EQ(grad.w_router(1, 0), -grad.w_router(0, 0));
}

// SparseMixer's second pick is left out of the softmax by a gap of 2 jitter |z|: with large logits the shares
// of near ties are far apart as well.
TYPED_TEST(GatePrecision, OfSparseMixersSharesHoldsFarApart) {
  using S = TypeParam;
  moe::SparseMixerRouter<S> router({.d_model = 1, .num_experts = 3, .jitter = 0.2});
  router.w_router << S(100), S(70), S(-400);
  const Matrix<S> x = Matrix<S>::Ones(1, 1);
  moe::Routing<S> routing;
  router.route(x, {}, routing, moe::Sequential{});
  moe::SparseMixerRouter<S> grad = moe::zeros_like(router);
  Matrix<S> d_x = Matrix<S>::Zero(1, 1);
  moe::RoutingGradient<S> gradient;
  gradient.d_chosen_gate.assign(2, S(0));
  gradient.d_chosen_gate[0] = 1;
  router.backward(x, routing, gradient, d_x, grad, moe::Sequential{});
  const Long small = std::exp(-30.0L), slope = small / ((1 + small) * (1 + small));
  EXPECT_LE(ulps(grad.w_router(0, 0), slope), 8);
  EXPECT_LE(ulps(grad.w_router(1, 0), -slope), 8);
}

// A shared expert behind a gate that rounds to 1.
TYPED_TEST(GatePrecision, OfASharedExpertsGateHoldsNearOne) {
  using S = TypeParam;
  moe::Rng rng(1);
  std::vector<moe::CopyExpert<S>> routed(2, moe::CopyExpert<S>({.d_model = 1}));
  std::vector<moe::CopyExpert<S>> shared(1, moe::CopyExpert<S>({.d_model = 1}));
  moe::MoELayer layer{routed, moe::TopKRouter<S>({.d_model = 1, .num_experts = 2}, rng),
                      moe::SharedExperts<moe::CopyExpert<S>>{.experts = shared, .gated = true}};
  layer.w_shared_gate(0, 0) = S(60);
  const Matrix<S> x = Matrix<S>::Ones(1, 1);
  typename decltype(layer)::Cache cache;
  layer.forward(x, cache);
  auto grad = moe::zeros_like(layer);
  layer.backward(x, cache, grad);
  EXPECT_LE(ulps(grad.w_shared_gate(0, 0), std::exp(-60.0L)), 8);
}

}  // namespace
