// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "packed/packed_testing.hpp"

namespace moe::importance_test {
namespace {

using packed_testing::message_of;

using Gated = GatedFeedForward<float>;
using Plain = FeedForward<float, GELU>;

template <class F>
class Importance : public testing::Test {};
using Formats = testing::Types<Int8, Int4>;
TYPED_TEST_SUITE(Importance, Formats);

double weighted_error(const float* w, const typename Int8::Block& block, const float* a) {
  double error = 0;
  for (Index i = 0; i < 32; ++i)
    error += double(a[i]) * std::pow(double(w[i]) - double(Int8::number(block, i)), 2);
  return error;
}
double weighted_error(const float* w, const typename Int4::Block& block, const float* a) {
  double error = 0;
  for (Index i = 0; i < 32; ++i)
    error += double(a[i]) * std::pow(double(w[i]) - double(Int4::number(block, i)), 2);
  return error;
}

TYPED_TEST(Importance, TheWeightedErrorIsLess) {
  Rng rng(1);
  double with = 0, without = 0;
  for (int trial = 0; trial < 500; ++trial) {
    float w[32], a[32];
    for (Index i = 0; i < 32; ++i) {
      w[i] = float(rng.normal());
      a[i] = float(std::exp(3 * rng.normal()));
    }
    with += weighted_error(w, TypeParam::quantised(w, 32, a), a);
    without += weighted_error(w, TypeParam::quantised(w, 32), a);
  }
  EXPECT_LT(with, 0.95 * without);
}

TYPED_TEST(Importance, OfEqualImportanceIsNoWorseThanNone) {
  Rng rng(2);
  for (int trial = 0; trial < 200; ++trial) {
    float w[32] = {};
    const Index count = 1 + rng.index(32);
    for (Index i = 0; i < count; ++i) w[i] = float(rng.normal());
    const std::vector<float> ones(32, 1.0f);
    const double plain = weighted_error(w, TypeParam::quantised(w, count), ones.data());
    for (const float all : {1.0f, 0.0f, 3e-30f, 2e30f}) {
      const std::vector<float> a(std::size_t(count), all);
      const auto block = TypeParam::quantised(w, count, a.data());
      ASSERT_LE(weighted_error(w, block, ones.data()), plain * (1 + 1e-6)) << all;
    }
  }
}

// Of numbers of which one matters: it is kept to half a step of the largest scale, and most often far better.
TYPED_TEST(Importance, ASingleNumberThatMattersIsKept) {
  Rng rng(3);
  const float steps = std::is_same_v<TypeParam, Int8> ? 124 : 7;
  double with = 0, without = 0;
  for (int trial = 0; trial < 200; ++trial) {
    float w[32], a[32] = {}, largest = 0;
    for (float& x : w) largest = std::max(largest, std::abs(x = float(rng.normal())));
    const Index at = rng.index(32);
    a[at] = 5;
    const double error =
        std::abs(double(TypeParam::number(TypeParam::quantised(w, 32, a), at)) - double(w[at]));
    ASSERT_LE(error, 0.51 * double(largest / steps)) << trial;
    with += error;
    without += std::abs(double(TypeParam::number(TypeParam::quantised(w, 32), at)) - double(w[at]));
  }
  EXPECT_LT(with, 0.3 * without);
}

template <class E>
MoELayer<E, TopKRouter<float>> draw_layer(Rng& rng) {
  return {make_experts<E>(4, {.d_model = 96, .d_ff = 70, .bias = true}, rng),
          TopKRouter<float>({.d_model = 96, .num_experts = 4, .top_k = 2}, rng),
          SharedExperts<E>{make_experts<E>(1, {.d_model = 96, .d_ff = 40}, rng)}};
}
// Tokens some of whose numbers are far larger than others.
Matrix<float> draw_tokens(Index count, Rng& rng) {
  Matrix<float> x(count, 96);
  fill_normal(x, 1.0, rng);
  for (Index j = 0; j < 96; ++j) x.col(j) *= j % 16 == 3 ? 10.0f : 0.3f;
  return x;
}

TYPED_TEST(Importance, ALayerIsNearerToItsFloats) {
  Rng rng(4);
  const auto layer = draw_layer<Gated>(rng);
  const auto importance = importance_of(layer, draw_tokens(400, rng));
  const Matrix<float> x = draw_tokens(200, rng), y = layer.forward(x);
  const auto error = [&](const PackOptions& options) {
    return (pack<TypeParam>(layer, options).forward(x) - y).norm();
  };
  EXPECT_LT(error({.importance = importance}), 0.9f * error({}));
}

// Mean squares, written out; of an expert of another kind, too.
template <class E>
void expect_mean_squares(const MoELayer<E, TopKRouter<float>>& layer, const Matrix<float>& x) {
  const auto all = importance_of(layer, x);
  ASSERT_EQ(all.size(), 5u);
  const Routing<float> routing = layer.route(x);
  for (Index e = 0; e < 5; ++e) {
    std::vector<Index> tokens;
    if (e < 4)
      tokens.assign(routing.plan.token.begin() + routing.plan.expert_begin[e],
                    routing.plan.token.begin() + routing.plan.expert_begin[e + 1]);
    else
      for (Index t = 0; t < x.rows(); ++t) tokens.push_back(t);
    if (tokens.empty()) {
      EXPECT_EQ(all[std::size_t(e)].x.size(), 0);
      continue;
    }
    Vector<double> sums = Vector<double>::Zero(96);
    for (const Index t : tokens)
      for (Index j = 0; j < 96; ++j) sums[j] += double(x(t, j)) * double(x(t, j));
    for (Index j = 0; j < 96; ++j)
      ASSERT_EQ(all[std::size_t(e)].x[j], float(sums[j] / double(tokens.size()))) << e << ' ' << j;
    EXPECT_EQ(all[std::size_t(e)].hidden.size(), e < 4 ? 70 : 40);
    EXPECT_TRUE((all[std::size_t(e)].hidden.array() >= 0).all());
  }
}

TEST(ImportanceOf, IsTheMeanOfSquares) {
  Rng rng(5);
  const Matrix<float> x = draw_tokens(700, rng);
  expect_mean_squares(draw_layer<Gated>(rng), x);
  expect_mean_squares(draw_layer<Plain>(rng), x);
}

TEST(ImportanceOf, HiddenValuesAreThoseOfTheExpert) {
  Rng rng(6);
  const MoELayer<FeedForward<float>, TopKRouter<float>> layer(
      make_experts<FeedForward<float>>(1, {.d_model = 8, .d_ff = 5, .bias = true}, rng),
      TopKRouter<float>({.d_model = 8, .num_experts = 1, .top_k = 1}, rng));
  Matrix<float> x(6, 8);
  fill_normal(x, 1.0, rng);
  const auto importance = importance_of(layer, x);
  const Matrix<float> up = x * layer.experts()[0].w_up.transpose();
  for (Index j = 0; j < 5; ++j) {
    double sum = 0;
    for (Index t = 0; t < 6; ++t)
      sum += std::pow(std::max(0.0, double(up(t, j)) + double(layer.experts()[0].b_up[j])), 2);
    EXPECT_NEAR(importance[0].hidden[j], sum / 6, 1e-5 * (1 + sum));
  }
}

TEST(ImportanceOf, HiddenValuesOfAGatedExpertAreThoseThatTheSecondProductTakes) {
  Rng rng(9);
  const MoELayer<Gated, TopKRouter<float>> layer(
      make_experts<Gated>(1, {.d_model = 8, .d_ff = 5}, rng),
      TopKRouter<float>({.d_model = 8, .num_experts = 1, .top_k = 1}, rng));
  Matrix<float> x(6, 8);
  fill_normal(x, 1.0, rng);
  const auto importance = importance_of(layer, x);
  const Gated& expert = layer.experts()[0];
  const Matrix<double> gate = (x * expert.w_gate.transpose()).cast<double>();
  const Matrix<double> up = (x * expert.w_up.transpose()).cast<double>();
  const Matrix<double> hidden = (gate.array() / (1 + (-gate.array()).exp()) * up.array()).matrix();
  for (Index j = 0; j < 5; ++j) {
    const double mean = hidden.col(j).squaredNorm() / 6;
    EXPECT_NEAR(importance[0].hidden[j], mean, 1e-5 * (1e-3 + mean));
  }
}

TEST(ImportanceOf, TakesExpertsOfSeveralKindsAndLeavesOutTheUnused) {
  Rng rng(7);
  using E = VariantExpert<FeedForward<float>, Gated>;
  std::vector<E> experts;
  experts.emplace_back(FeedForward<float>({.d_model = 8, .d_ff = 5}, rng));
  experts.emplace_back(Gated({.d_model = 8, .d_ff = 7}, rng));
  experts.emplace_back(Gated({.d_model = 8, .d_ff = 7}, rng));
  TopKRouter<float> router({.d_model = 8, .num_experts = 3, .top_k = 2}, rng);
  router.w_router.row(0).setZero();
  router.w_router(1, 0) = router.w_router(2, 0) = 1;
  const MoELayer<E, TopKRouter<float>> layer(experts, router);
  const Matrix<float> x = Matrix<float>::Ones(4, 8) * 100;
  const auto importance = importance_of(layer, x);
  Index unused = 0;
  for (const auto& one : importance) unused += one.x.size() == 0 && one.hidden.size() == 0;
  EXPECT_EQ(unused, 1);
  const auto packed = pack<Int4>(layer, {.importance = importance});
  EXPECT_TRUE(packed.forward(x).allFinite());
}

TEST(ImportanceOf, WhatDoesNotFitIsRefused) {
  Rng rng(8);
  const auto layer = draw_layer<Gated>(rng);
  auto importance = importance_of(layer, draw_tokens(50, rng));
  const auto message = [&] { return message_of([&] { pack<Int4>(layer, {.importance = importance}); }); };
  EXPECT_EQ(message(), "nothing was thrown");
  EXPECT_EQ(message_of([&] { pack<MXFP4>(layer, {.importance = importance}); }),
            "pack: importance is given, but the weights are not packed as Int8 or Int4, expected none");
  importance[4].hidden.resize(7);
  importance[4].hidden.setOnes();
  EXPECT_EQ(message(), "pack: importance.hidden has 7 values, expected 40");
  importance[4] = {};
  importance[1].x[5] = -1;
  EXPECT_EQ(message(), "pack: importance.x[5] = -1, expected a finite number of at least 0");
  importance[1].x[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(message(), testing::HasSubstr("importance.x[5] = "));
  importance.pop_back();
  EXPECT_EQ(message(), "pack: importance of 4 experts, expected 5");
  EXPECT_EQ(message_of([&] { importance_of(layer, Matrix<float>::Zero(2, 7)); }),
            "importance_of: x has 7 columns, expected d_model = 96; tokens are rows");
}

}  // namespace
}  // namespace moe::importance_test
