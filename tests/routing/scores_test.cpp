// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/random.hpp>
#include <moe/math/init.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/scores.hpp>

namespace {

using moe::GateRule;
using moe::Index;
using moe::IndexVector;
using moe::Matrix;
using moe::Score;
using moe::Vector;

constexpr GateRule kOfAll{}, kOfChosen{.renormalise = true};

struct Row {
  Vector<double> logits, probs;
  explicit Row(const Vector<double>& z) : logits(z), probs(z.size()) {
    moe::softmax(z.size(), z.data(), probs.data());
  }
  moe::TokenScores<double> token() const { return {logits.size(), logits.data(), probs.data()}; }
  Vector<double> gates(const GateRule& recipe, const IndexVector& experts) const {
    Vector<double> gates(experts.size());
    moe::compute_gates(recipe, token(), experts.size(), experts.data(), gates.data());
    return gates;
  }
  // The gradient by the logits of <d_gates, gates>.
  Vector<double> backward(const GateRule& recipe, const IndexVector& experts,
                          const Vector<double>& d_gates) const {
    const Vector<double> g = gates(recipe, experts);
    Vector<double> d = Vector<double>::Zero(logits.size());
    moe::compute_gates_backward(recipe, token(), experts.size(), experts.data(), g.data(), d_gates.data(),
                                d.data());
    return d;
  }
};

Vector<double> random_vector(Index n, moe::Rng& rng) {
  Vector<double> v(n);
  moe::fill_normal(v, 1.0, rng);
  return v;
}

// Computed with Python in double: softmax before selection as Switch, OLMoE and Qwen2-MoE take it,
// after selection as Mixtral and gpt-oss do.
TEST(Gates, OfAKnownRow) {
  const Row row(Vector<double>{{1, .5, -.25, 2, -1, .75, 0, -2}});
  const IndexVector best = moe::top_k(row.logits, 2);
  EXPECT_EQ(best, (IndexVector{{3, 0}}));
  const Vector<double> before = row.gates(kOfAll, best);
  EXPECT_NEAR(before[0], 0.457382973, 1e-9);
  EXPECT_NEAR(before[1], 0.168261792, 1e-9);
  const Vector<double> after = row.gates(kOfChosen, best);
  EXPECT_NEAR(after[0], 0.731058579, 1e-9);
  EXPECT_NEAR(after[1], 0.268941421, 1e-9);
}

TEST(Gates, RenormalisedProbabilitiesAreTheSoftmaxOfTheChosenInValueAndGradient) {
  moe::Rng rng(1);
  for (int round = 0; round < 200; ++round) {
    const Index experts = 1 + rng.index(10), k = 1 + rng.index(experts);
    const Row row(random_vector(experts, rng) * 2);
    const IndexVector best = moe::top_k(row.logits, k);
    const Vector<double> gates = row.gates(kOfChosen, best);
    const Vector<double> p = row.gates(kOfAll, best);
    const double sum = p.sum();
    for (Index i = 0; i < k; ++i) EXPECT_NEAR(gates[i], p[i] / sum, 1e-14);
    EXPECT_NEAR(gates.sum(), 1, 1e-14);

    // w = p / s:  dp_e = (dw_e - sum of w dw) / s for the chosen, then through the softmax.
    const Vector<double> d_gates = random_vector(k, rng);
    const double mean = gates.dot(d_gates);
    Vector<double> d_p = Vector<double>::Zero(experts), expected = Vector<double>::Zero(experts);
    for (Index i = 0; i < k; ++i) d_p[best[i]] = (d_gates[i] - mean) / sum;
    moe::softmax_backward(experts, row.probs.data(), d_p.data(), expected.data());
    const Vector<double> d = row.backward(kOfChosen, best, d_gates);
    for (Index e = 0; e < experts; ++e) EXPECT_NEAR(d[e], expected[e], 1e-13);
  }
}

TEST(Gates, GradientsAreDifferenceQuotients) {
  moe::Rng rng(2);
  const double step = 1e-6;
  for (const auto recipe : {kOfAll, kOfChosen}) {
    for (Index k = 1; k <= 6; ++k) {
      const Vector<double> z = random_vector(6, rng);
      const IndexVector best = moe::top_k(z, k);  // held fixed: selection is not differentiated
      const Vector<double> d_gates = random_vector(k, rng);
      const Vector<double> d = Row(z).backward(recipe, best, d_gates);
      for (Index e = 0; e < 6; ++e) {
        Vector<double> up = z, down = z;
        up[e] += step;
        down[e] -= step;
        const double numeric =
            (d_gates.dot(Row(up).gates(recipe, best)) - d_gates.dot(Row(down).gates(recipe, best))) /
            (2 * step);
        EXPECT_NEAR(d[e], numeric, 1e-9) << "k " << k << ", expert " << e;
      }
    }
  }
}

// More experts than the backward pass takes at a time, those that are chosen anywhere among them.
TEST(Gates, OfManyExpertsHaveTheGradientsOfTheirFormula) {
  moe::Rng rng(6);
  for (const Index experts : {63, 64, 65, 128, 150, 300}) {
    const Row row(random_vector(experts, rng));
    const IndexVector chosen{{experts - 1, 0, experts / 2 + 1, 31, 61}};
    const Vector<double> d = random_vector(5, rng);
    for (const double epsilon : {0.0, 0.25}) {
      const GateRule rule{.renormalise = epsilon > 0, .epsilon = epsilon, .scale = 1.5};
      double sum = 0, along = 0;  // of the chosen probabilities, of these times d
      for (Index i = 0; i < 5; ++i) {
        sum += row.probs[chosen[i]];
        along += d[i] * row.probs[chosen[i]];
      }
      const double divisor = rule.renormalise ? sum + epsilon : 1;
      Vector<double> d_probs = Vector<double>::Zero(experts);
      for (Index i = 0; i < 5; ++i)
        d_probs[chosen[i]] += 1.5 * (d[i] / divisor - (rule.renormalise ? along / (divisor * divisor) : 0));
      const double mean = d_probs.dot(row.probs);
      const Vector<double> expected = row.probs.array() * (d_probs.array() - mean);
      const Vector<double> d_logits = row.backward(rule, chosen, d);
      EXPECT_LE((d_logits - expected).cwiseAbs().maxCoeff(), 1e-15) << experts << ", " << epsilon;
    }
  }
}

TEST(Gates, UnselectedLogitsGetGradientOnlyFromTheSoftmaxOverAll) {
  const Row row(Vector<double>{{1, .5, -.25, 2}});
  const IndexVector best{{3, 0}};
  const Vector<double> d_gates{{1, -2}};
  const Vector<double> of_chosen = row.backward(kOfChosen, best, d_gates);
  EXPECT_EQ(of_chosen[1], 0);
  EXPECT_EQ(of_chosen[2], 0);
  EXPECT_NE(of_chosen[0], 0);
  const Vector<double> of_all = row.backward(kOfAll, best, d_gates);
  EXPECT_NE(of_all[1], 0);
  EXPECT_NE(of_all[2], 0);
}

TEST(Gates, OneRenormalisedGateIsExactlyOneAndTeachesNothing) {
  const Row row(Vector<double>{{.1, 2.7, -.25, .3}});
  const IndexVector best{{1}};
  EXPECT_EQ(row.gates(kOfChosen, best)[0], 1.0);
  const Vector<double> d = row.backward(kOfChosen, best, Vector<double>{{3.14}});
  EXPECT_TRUE((d.array() == 0).all());
}

TEST(Gates, OfTheChosenSurviveProbabilitiesThatUnderflow) {
  const Row row(Vector<double>{{5000, 1, 0}});
  EXPECT_EQ(row.probs[1], 0);
  const Vector<double> gates = row.gates(kOfChosen, IndexVector{{1, 2}});
  EXPECT_NEAR(gates[0], 1 / (1 + std::exp(-1)), 1e-15);
}

TEST(Gates, UnavailableExpertsGetNoGradient) {
  const double inf = std::numeric_limits<double>::infinity();
  const Row row(Vector<double>{{1, -inf, .5, 0}});
  for (const auto recipe : {kOfAll, kOfChosen}) {
    const Vector<double> d = row.backward(recipe, IndexVector{{0, 2}}, Vector<double>{{1, -1}});
    EXPECT_EQ(d[1], 0);
    EXPECT_TRUE(d.allFinite());
  }
}

TEST(Gates, OfNobodyAreNothing) {
  const Row row(Vector<double>{{1, 2, 3}});
  for (const auto recipe : {kOfAll, kOfChosen}) {
    EXPECT_EQ(row.gates(recipe, IndexVector()).size(), 0);
    EXPECT_EQ(row.backward(recipe, IndexVector(), Vector<double>()), Vector<double>::Zero(3));
  }
}

TEST(Gates, BackwardAddsToWhatIsThere) {
  const Row row(Vector<double>{{1, 2, 3}});
  const IndexVector best{{2}};
  const Vector<double> gates = row.gates(kOfAll, best), d_gates{{2}};
  const Vector<double> alone = row.backward(kOfAll, best, d_gates);
  Vector<double> d = Vector<double>::Constant(3, 10);
  moe::compute_gates_backward(kOfAll, row.token(), Index(1), best.data(), gates.data(), d_gates.data(),
                              d.data());
  for (Index e = 0; e < 3; ++e) EXPECT_NEAR(d[e], 10 + alone[e], 1e-14);
}

// ---- Scores that are no softmax.

// Values computed with Python in double from the formulas of DeepSeek-V3's and Megatron-LM's routers.
TEST(Scores, OfAKnownRow) {
  const Row row(Vector<double>{{1, .5, -.25, 2, -1, .75, 0, -2}});
  const IndexVector best{{3, 0}};
  const GateRule v3{.score = Score::sigmoid, .renormalise = true, .epsilon = 1e-20, .scale = 2.5};
  const Vector<double> sigmoid = row.gates(v3, best);
  EXPECT_NEAR(sigmoid[0], 1.36612276, 5e-9);
  EXPECT_NEAR(sigmoid[1], 1.13387724, 5e-9);
  const Vector<double> softplus = row.gates({.score = Score::sqrt_softplus, .renormalise = true}, best);
  EXPECT_NEAR(softplus[0], 0.559980374, 1e-9);
  EXPECT_NEAR(softplus[1], 0.440019626, 1e-9);
  EXPECT_NEAR(row.gates({.score = Score::sigmoid}, IndexVector{{3}})[0], 0.880797078, 1e-9);
}

TEST(Scores, FarLogitsAreOrdinary) {
  const Vector<double> far{{-800, -900, 800, 0}};
  for (const Score score : {Score::sigmoid, Score::sqrt_softplus}) {
    Row row(far);
    moe::normalised_scores(score, Index(4), far.data(), row.probs.data());
    EXPECT_TRUE(row.probs.allFinite());
    EXPECT_NEAR(row.probs.sum(), 1, 1e-14);
    for (const bool renormalise : {false, true}) {
      const GateRule rule{.score = score, .renormalise = renormalise};
      for (const IndexVector& experts : {IndexVector{{0, 1}}, IndexVector{{0, 2}}}) {
        EXPECT_TRUE(row.gates(rule, experts).allFinite());
        EXPECT_TRUE(row.backward(rule, experts, Vector<double>{{1, -1}}).allFinite());
      }
    }
    // Small scores beside 1e-20: exp(-800) underflows, its root does not.
    moe::normalised_scores(score, Index(2), far.data(), row.probs.data());
    EXPECT_DOUBLE_EQ(row.probs[0], score == Score::sigmoid ? 0 : std::exp(-400.0) / 1e-20);
  }
}

TEST(Scores, NormalisedOnesEqualFiniteDifferences) {
  moe::Rng rng(7);
  constexpr double h = 1e-6;
  for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
    Vector<double> z = random_vector(5, rng), p(5), d = Vector<double>::Zero(5);
    const Vector<double> d_p = random_vector(5, rng);
    moe::normalised_scores(score, Index(5), z.data(), p.data());
    EXPECT_NEAR(p.sum(), 1, 1e-14);
    moe::normalised_scores_backward(score, Index(5), z.data(), p.data(), d_p.data(), d.data());
    for (Index e = 0; e < 5; ++e) {
      const double center = z[e];
      Vector<double> up(5), down(5);
      z[e] = center + h;
      moe::normalised_scores(score, Index(5), z.data(), up.data());
      z[e] = center - h;
      moe::normalised_scores(score, Index(5), z.data(), down.data());
      z[e] = center;
      EXPECT_NEAR(d[e], d_p.dot(up - down) / (2 * h), 1e-8);
    }
  }
}

TEST(Scores, UnavailableExpertsScoreNothing) {
  const double never = -std::numeric_limits<double>::infinity();
  const Vector<double> z{{0, never, 2}};
  for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
    Vector<double> p(3), d = Vector<double>::Zero(3);
    moe::normalised_scores(score, Index(3), z.data(), p.data());
    EXPECT_EQ(p[1], 0);
    EXPECT_NEAR(p.sum(), 1, 1e-15);
    moe::normalised_scores_backward(score, Index(3), z.data(), p.data(), p.data(), d.data());
    EXPECT_EQ(d[1], 0);
  }
}

// ---- The linear layer of a router.

TEST(RouterLinear, EqualsTripleLoopsInEveryBlock) {
  moe::Rng rng(3);
  const Index tokens = 150, experts = 5, d_model = 270;  // more than two blocks of each
  Matrix<double> x(tokens, d_model), w(experts, d_model), d_z(tokens, experts);
  for (auto* m : {&x, &w, &d_z}) moe::fill_normal(*m, 1.0, rng);
  Matrix<double> z = Matrix<double>::Constant(tokens, experts, 99);
  moe::router_linear(x, w, z, moe::Sequential{});
  Matrix<double> d_w = Matrix<double>::Ones(experts, d_model);
  Matrix<double> d_x = Matrix<double>::Constant(tokens, d_model, 2);
  moe::router_linear_backward(x, w, d_z, d_w, d_x, moe::Sequential{});
  for (Index t = 0; t < tokens; ++t) {
    for (Index e = 0; e < experts; ++e) {
      double sum = 0;
      for (Index i = 0; i < d_model; ++i) sum += x(t, i) * w(e, i);
      EXPECT_NEAR(z(t, e), sum, 1e-11);
    }
    for (Index i = 0; i < d_model; ++i) {
      double sum = 2;
      for (Index e = 0; e < experts; ++e) sum += d_z(t, e) * w(e, i);
      EXPECT_NEAR(d_x(t, i), sum, 1e-12);
    }
  }
  for (Index e = 0; e < experts; ++e) {
    for (Index i = 0; i < d_model; ++i) {
      double sum = 1;
      for (Index t = 0; t < tokens; ++t) sum += d_z(t, e) * x(t, i);
      EXPECT_NEAR(d_w(e, i), sum, 1e-11);
    }
  }
}

// Counts tasks.
struct Counting {
  Index workers = 1;
  mutable Index tasks = 0;
  Index concurrency() const { return workers; }
  template <class F>
  void for_each(Index n, F&& f) const {
    tasks += n;
    moe::Sequential{}.for_each(n, f);
  }
};

TEST(RouterLinear, FewTokensAreSplitByExpertsAndGiveTheBitsOfMany) {
  moe::Rng rng(4);
  const Index experts = 70, d_model = 2048;
  Matrix<float> x(130, d_model), w(experts, d_model), many(130, experts);
  for (auto* m : {&x, &w}) moe::fill_normal(*m, 1.0, rng);
  const Counting blocks_of_tokens;
  moe::router_linear(x, w, many, blocks_of_tokens);
  EXPECT_EQ(blocks_of_tokens.tasks, 3);
  for (const Index workers : {1, 2, 3, 5, 64})
    for (const Index tokens : {1, 3, 8, 9, 64}) {
      Matrix<float> few(tokens, experts);
      const Counting blocks_of_experts{workers};
      moe::router_linear(x.topRows(tokens), w, few, blocks_of_experts);
      // Experts go in registers of 16 or, for more than 8 tokens, in panels of 64.
      const Index blocks = tokens <= 8 ? (workers < 3    ? workers
                                          : workers == 3 ? 3
                                                         : 5)
                                       : std::min<Index>(workers, 2);
      EXPECT_EQ(blocks_of_experts.tasks, blocks) << workers << " workers, " << tokens << " tokens";
      EXPECT_TRUE((few.array() == many.topRows(tokens).array()).all()) << tokens;
    }
  Matrix<float> none(0, experts);
  moe::router_linear(x.topRows(0), w, none, Counting{});
  Matrix<float> no_experts(130, 0);
  moe::router_linear(x, Matrix<float>(0, d_model), no_experts, Counting{});
}

}  // namespace
