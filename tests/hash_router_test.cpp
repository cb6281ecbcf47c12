// SPDX-License-Identifier: MIT
#include <limits>
#include <string>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

namespace {

using moe::BatchInfo;
using moe::Index;
using moe::IndexVector;
using moe::Matrix;
using moe::Overflow;
using moe::Rng;
using Router = moe::HashRouter<double>;
using Expert = moe::GatedFeedForward<double>;
using Layer = moe::MoELayer<Expert, Router>;

static_assert(moe::Router<Router> && !moe::TrainableRouter<Router>);

Matrix<double> tokens(Index n) {
  Rng rng(1);
  Matrix<double> x(n, 3);
  moe::fill_normal(x, 1.0, rng);
  return x;
}

Layer make_layer(const Router::Options& options) {
  Rng rng(2);
  return {moe::make_experts<Expert>(options.num_experts, {.d_model = 3, .d_ff = 4}, rng),
          Router(options)};
}

TEST(HashRouter, SendsATokenWhereTheTableSays) {
  const Layer layer = make_layer({.d_model = 3, .num_experts = 3, .table = IndexVector{{2, 0, 2, 1}}});
  const Matrix<double> x = tokens(5);
  const BatchInfo info{.token_ids = IndexVector{{3, 0, 1, 2, 3}}};
  const auto routing = layer.route(x, info);
  for (Index t = 0; t < 5; ++t) {
    const Index expert = layer.router().options().table[info.token_ids[t]];
    ASSERT_EQ(moe::trace(routing, t).size(), 1u);
    EXPECT_EQ(moe::trace(routing, t)[0].expert, expert);
    EXPECT_EQ(routing.chosen.gate[t], 1);
    Matrix<double> y(1, 3);
    layer.experts()[std::size_t(expert)].forward(x.row(t), y);
    EXPECT_LT((layer.forward(x, info).row(t) - y).cwiseAbs().maxCoeff(), 1e-15);
  }
  EXPECT_NEAR(moe::load_balancing_loss(routing).value, 3 * (2 * 2 + 1 + 2 * 2) / 25.0, 1e-15);
}

TEST(HashRouter, CapacityAndOverflowAreAsForOtherRouters) {
  const IndexVector all_to_first = IndexVector::Zero(4);
  const Matrix<double> x = tokens(4);
  const BatchInfo info{.token_ids = IndexVector{{0, 1, 2, 3}}};
  for (const Overflow overflow : {Overflow::drop, Overflow::pass_through}) {
    const Layer layer = make_layer(
        {.d_model = 3, .num_experts = 2, .table = all_to_first, .capacity = 1.0, .overflow = overflow});
    const auto routing = layer.route(x, info);
    EXPECT_EQ(routing.plan.rows_of(0), 2);
    EXPECT_EQ(routing.plan.dropped.size(), 2);
    const Matrix<double> y = layer.forward(x, info);
    for (const Index t : {2, 3})
      EXPECT_EQ((y.row(t) - (overflow == Overflow::drop ? 0 : 1) * x.row(t)).norm(), 0);
  }
}

TEST(HashRouter, MaskedIdsMayBeAnythingAndPoisonedRowsGoNowhere) {
  const Layer layer = make_layer({.d_model = 3, .num_experts = 2, .table = IndexVector{{0, 1}}});
  Matrix<double> x = tokens(3);
  x(2, 1) = std::numeric_limits<double>::infinity();
  BatchInfo info{.mask = moe::Mask::Constant(3, true), .token_ids = IndexVector{{-1, 1, 0}}};
  info.mask[0] = false;
  const Matrix<double> y = layer.forward(x, info);
  EXPECT_EQ(y.row(0).norm(), 0);
  EXPECT_TRUE(y.row(1).allFinite());
  EXPECT_TRUE(y.row(2).array().isNaN().all());
}

TEST(HashRouter, ItsExpertsAreTrained) {
  const Layer layer = make_layer({.d_model = 3, .num_experts = 2, .table = IndexVector{{0, 1}}});
  const BatchInfo info{.token_ids = IndexVector{{0, 1, 1}}};
  moe::GradientCheckOptions options;
  options.info = info;
  const auto report = moe::check_gradients(layer, tokens(3), options);
  EXPECT_LT(report.worst, 1e-6) << report.where;
  EXPECT_EQ(report.crossed, 0);
}

TEST(HashRouter, BadArgumentsAreRefused) {
  EXPECT_THROW(Router({.d_model = 0, .num_experts = 2}), std::invalid_argument);
  EXPECT_THROW(Router({.d_model = 2, .num_experts = 0}), std::invalid_argument);
  EXPECT_THROW(Router({.d_model = 2, .num_experts = 2, .table = IndexVector{{0, 2}}}),
               std::invalid_argument);
  EXPECT_THROW(Router({.d_model = 2, .num_experts = 2, .overflow = Overflow::next_best}),
               std::invalid_argument);
  EXPECT_THROW(Router({.d_model = 2, .num_experts = 2, .capacity = -1}), std::invalid_argument);
  const Layer layer = make_layer({.d_model = 3, .num_experts = 2, .table = IndexVector{{0, 1}}});
  EXPECT_THROW(layer.forward(tokens(2)), std::invalid_argument);  // no ids
  for (const Index id : {-1, 2}) {
    try {
      layer.forward(tokens(2), {.token_ids = IndexVector{{0, id}}});
      ADD_FAILURE() << id;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find("token 1 has id " + std::to_string(id)),
                std::string::npos)
          << error.what();
    }
  }
}

TEST(HashTables, RandomOnesUseAllExpertsAndTheSeed) {
  Rng rng(3), same(3);
  const IndexVector table = moe::random_hash_table(1000, 8, rng);
  EXPECT_EQ(table, moe::random_hash_table(1000, 8, same));
  IndexVector load = IndexVector::Zero(8);
  for (const Index e : table) ++load[e];
  EXPECT_GT(load.minCoeff(), 80);
  EXPECT_LT(load.maxCoeff(), 180);
  EXPECT_THROW(moe::random_hash_table(-1, 8, rng), std::invalid_argument);
  EXPECT_THROW(moe::random_hash_table(5, 0, rng), std::invalid_argument);
}

TEST(HashTables, BalancedOnesSpreadOccurrences) {
  EXPECT_EQ(moe::balanced_hash_table(IndexVector{{1, 5, 3, 3, 1}}, 2), (IndexVector{{0, 0, 1, 1, 0}}));
  IndexVector counts(2000);  // Zipf's law
  for (Index i = 0; i < counts.size(); ++i) counts[i] = 100000 / (i + 1);
  const IndexVector table = moe::balanced_hash_table(counts, 8);
  IndexVector load = IndexVector::Zero(8);
  for (Index i = 0; i < counts.size(); ++i) load[table[i]] += counts[i];
  EXPECT_LT(moe::max_over_mean(load), 1.001);
  EXPECT_THROW(moe::balanced_hash_table(IndexVector{{-1}}, 2), std::invalid_argument);
  EXPECT_THROW(moe::balanced_hash_table(IndexVector{{1}}, 0), std::invalid_argument);
}

}  // namespace
