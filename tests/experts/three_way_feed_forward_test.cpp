// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>

#include <moe/experts/three_way_feed_forward.hpp>
#include <moe/moe.hpp>

#include "expert_laws.hpp"

namespace laws {
namespace {

template <class S>
struct ThreeWayOf {
  using Expert = moe::ThreeWayFeedForward<S>;
  static Expert make(Index d_model, Index d_ff, Rng& rng) {
    return {{.d_model = d_model, .d_ff = d_ff}, rng};
  }
};

[[maybe_unused]] const bool three_way_checked =
    check_experts<ThreeWayOf<float>, ThreeWayOf<double>>("ThreeWay");

}  // namespace

}  // namespace laws

namespace three_way_feed_forward_test {
namespace {

using moe::Index;
using moe::Matrix;
using moe::Rng;
using Expert = moe::ThreeWayFeedForward<double>;

Matrix<double> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  Rng rng(seed);
  Matrix<double> m(rows, cols);
  moe::fill_normal(m, 1.0, rng);
  return m;
}

}  // namespace

TEST(ThreeWayFeedForward, GivesValuesKnownByHand) {
  // x = (3, log 3): a1 = (3, 6), up = (3, -3) and a2 = (log 3, log 9), of sigmoids 3/4 and 9/10.
  Expert expert({.d_model = 2, .d_ff = 2});
  expert.w_gate << 1, 0, 2, 0, 0, 1, 0, 2;
  expert.w_up << 1, 0, -1, 0;
  expert.w_down << 1, 0, 1, 2;
  const double log3 = std::log(3.0);
  const Matrix<double> x{{3, log3}};
  Matrix<double> y(1, 2);
  expert.forward(x, y);
  const double h0 = 3 * (0.75 * log3) * 3, h1 = 6 * (0.9 * 2 * log3) * -3;
  EXPECT_NEAR(y(0, 0), h0, 1e-13);
  EXPECT_NEAR(y(0, 1), h0 + 2 * h1, 1e-13);
}

TEST(ThreeWayFeedForward, GatesWithTheLastHalfOnly) {
  // sigmoid(800) is 1 and sigmoid(-800) is 0: the sign of the last half decides, that of the first
  // half does not.
  Expert expert({.d_model = 1, .d_ff = 1});
  Matrix<double> y(1, 1);
  const auto output = [&](double a1, double a2) {
    expert.w_gate << a1, a2;
    expert.w_up << 5;
    expert.w_down << 1;
    expert.forward(Matrix<double>{{1}}, y);
    return y(0, 0);
  };
  EXPECT_EQ(output(2, 800), 2 * 800 * 5);
  EXPECT_EQ(output(-2, 800), -2 * 800 * 5);
  EXPECT_EQ(output(800, -800), 0);
}

TEST(ThreeWayFeedForward, HasExactGradients) {
  Rng rng(3);
  for (const Index d_model : {1, 3, 20}) {
    for (const Index d_ff : {1, 5, 19}) {
      SCOPED_TRACE(testing::Message() << "d_model " << d_model << ", d_ff " << d_ff);
      const Expert expert({.d_model = d_model, .d_ff = d_ff}, rng);
      const auto report = moe::check_gradients(expert, random_matrix(4, d_model, 4));
      EXPECT_LE(report.worst, 1e-6) << report.where << ": " << report.analytic << ", by differences "
                                    << report.numeric;
      EXPECT_EQ(report.crossed, 0);
      EXPECT_EQ(report.checked, 4 * d_model + 4 * d_model * d_ff);
    }
  }
}

TEST(ThreeWayFeedForward, HasExactGradientsInALayer) {
  Rng rng(5);
  const moe::MoELayer layer(moe::make_experts<Expert>(3, {.d_model = 4, .d_ff = 3}, rng),
                            moe::TopKRouter<double>({.d_model = 4, .num_experts = 3}, rng),
                            {moe::make_experts<Expert>(1, {.d_model = 4, .d_ff = 5}, rng)});
  moe::GradientReport report;
  for (std::uint64_t seed = 1; seed < 50; ++seed) {  // until no choice is near another
    report = moe::check_gradients(layer, random_matrix(6, 4, seed));
    if (report.crossed == 0) break;
  }
  EXPECT_EQ(report.crossed, 0);
  EXPECT_LE(report.worst, 1e-6) << report.where;
}

TEST(ThreeWayFeedForward, StartsFromZerosOrFromNormalWeights) {
  const moe::ThreeWayFeedForward<float>::Options options{.d_model = 50, .d_ff = 80};
  const moe::ThreeWayFeedForward<float> empty(options);
  EXPECT_EQ(empty.d_model(), 50);
  EXPECT_EQ(empty.d_ff(), 80);
  EXPECT_EQ(empty.w_gate.rows(), 160);
  EXPECT_EQ(empty.w_gate.norm() + empty.w_up.norm() + empty.w_down.norm(), 0);
  EXPECT_EQ(moe::num_parameters(empty), 4 * 50 * 80);
  Rng rng(6);
  const moe::ThreeWayFeedForward<float> drawn(options, rng);
  EXPECT_NEAR(drawn.w_gate.squaredNorm() / 160, 1, 0.1);
  EXPECT_NEAR(drawn.w_up.squaredNorm() / 80, 1, 0.1);
  EXPECT_NEAR(drawn.w_down.squaredNorm() / 50, 1, 0.1);
  const auto zeros = moe::zeros_like(drawn);
  EXPECT_EQ(zeros.cache_cols(), drawn.cache_cols());
  EXPECT_EQ(zeros.w_gate.norm() + zeros.w_up.norm() + zeros.w_down.norm(), 0);
}

TEST(ThreeWayFeedForward, RefusesWhatDoesNotFit) {
  EXPECT_THROW(Expert({.d_model = 0, .d_ff = 2}), std::invalid_argument);
  EXPECT_THROW(Expert({.d_model = 2, .d_ff = 0}), std::invalid_argument);
  EXPECT_THROW(Expert({.d_model = -1, .d_ff = 2}), std::invalid_argument);
  try {
    Expert({.d_model = 2, .d_ff = -1});
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "ThreeWayFeedForward: d_ff = -1, expected at least 1");
  }
  Rng rng(7);
  const Expert expert({.d_model = 3, .d_ff = 2}, rng);
  Expert grad = moe::zeros_like(expert), taller({.d_model = 3, .d_ff = 4});
  const Matrix<double> x = random_matrix(4, 3, 8), narrow = random_matrix(4, 2, 8),
                       shorter = random_matrix(3, 3, 8);
  Matrix<double> y(4, 3), y_short(3, 3), y_narrow(4, 2), cache(4, 12), cache_narrow(4, 11),
      cache_short(3, 12);
  EXPECT_THROW(expert.forward(narrow, y, cache), std::invalid_argument);
  EXPECT_THROW(expert.forward(x, y_short, cache), std::invalid_argument);
  EXPECT_THROW(expert.forward(x, y_narrow, cache), std::invalid_argument);
  EXPECT_THROW(expert.forward(x, y, cache_narrow), std::invalid_argument);
  EXPECT_THROW(expert.forward(x, y, cache_short), std::invalid_argument);
  EXPECT_THROW(expert.forward(narrow, y), std::invalid_argument);
  EXPECT_THROW(expert.forward(x, y_short), std::invalid_argument);
  expert.forward(x, y, cache);
  EXPECT_THROW(expert.backward(narrow, x, cache, y, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, shorter, cache, y, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, narrow, cache, y, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, x, cache_narrow, y, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, x, cache, y_short, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, x, cache, y, taller), std::invalid_argument);
  EXPECT_EQ(grad.w_gate.norm() + grad.w_up.norm() + grad.w_down.norm(), 0);
}

}  // namespace three_way_feed_forward_test
