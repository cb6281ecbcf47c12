// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "compare.hpp"
#include "laws.hpp"

namespace hash_router_test {
namespace {

using moe::BatchInfo;
using moe::Index;
using moe::IndexVector;
using moe::Matrix;
using moe::Overflow;
using moe::Rng;
using moe::Sequential;
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
  return {moe::make_experts<Expert>(options.num_experts, {.d_model = 3, .d_ff = 4}, rng), Router(options)};
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
    EXPECT_LT(largest_difference(layer.forward(x, info).row(t), y), 1e-15);
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
  EXPECT_THROW(Router({.d_model = 2, .num_experts = 2, .table = IndexVector{{0, 2}}}), std::invalid_argument);
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
      EXPECT_NE(std::string(error.what()).find("token 1 has id " + std::to_string(id)), std::string::npos)
          << error.what();
    }
  }
}

// ---- The laws of routers, as far as they mean something here: in every law for all layers of
// for_each_layer, which have shared experts and an output bias.

constexpr Index kVocabulary = 13, kDModel = 5, kNumExperts = 4;
constexpr Index kForeignId = -7;  // what padding may have

template <class S>
using FullLayer = moe::MoELayer<moe::GatedFeedForward<S>, moe::HashRouter<S>>;

template <class S>
void for_each_layer(const std::function<void(const FullLayer<S>&, Rng&)>& f) {
  using E = moe::GatedFeedForward<S>;
  Rng rng(5);
  using Capacity = std::optional<double>;
  for (const Capacity& capacity : {Capacity(), Capacity(0.5), Capacity(1.0)})
    for (const Overflow overflow : {Overflow::drop, Overflow::pass_through}) {
      SCOPED_TRACE("capacity " + std::to_string(capacity.value_or(-1)) + ", overflow " +
                   std::to_string(int(overflow)));
      const typename E::Options options{.d_model = kDModel, .d_ff = 6, .bias = true};
      FullLayer<S> layer(moe::make_experts<E>(kNumExperts, options, rng),
                         moe::HashRouter<S>({.d_model = kDModel,
                                             .num_experts = kNumExperts,
                                             .table = moe::random_hash_table(kVocabulary, kNumExperts, rng),
                                             .capacity = capacity,
                                             .overflow = overflow}),
                         {moe::make_experts<E>(2, options, rng), true}, true);
      laws::randomise(layer, rng);
      f(layer, rng);
    }
}

BatchInfo random_batch(Index n, Rng& rng) {
  BatchInfo info{.mask = moe::Mask(n), .token_ids = IndexVector(n)};
  for (Index t = 0; t < n; ++t) {
    info.mask[t] = rng.uniform() < 0.7;
    info.token_ids[t] = info.mask[t] ? rng.index(kVocabulary) : kForeignId;
  }
  return info;
}

// Tokens [begin, begin + count) of a batch.
BatchInfo part_of(const BatchInfo& info, Index begin, Index count) {
  return {.mask = info.mask.segment(begin, count), .token_ids = info.token_ids.segment(begin, count)};
}

template <class S>
struct Step {
  using L = FullLayer<S>;
  typename L::Cache cache;
  Matrix<S> y, d_x;
  L grad;
  Step(const L& layer, const Matrix<S>& x, const Matrix<S>& d_y, const BatchInfo& info)
      : y(layer.forward(x, cache, info, Sequential{})), grad(moe::zeros_like(layer)) {
    d_x = layer.backward(d_y, cache, grad, {}, Sequential{});
    EXPECT_TRUE(laws::same_bits(layer.forward(x, info, Sequential{}), y));
    Rng rng(1);  // training is the same
    typename L::Cache in_training;
    EXPECT_TRUE(laws::same_bits(layer.forward(x, rng, in_training, info, Sequential{}), y));
    EXPECT_EQ(rng, Rng(1));
  }
};

template <class L>
void expect_same_parameters(const L& a, const L& b) {
  L::visit(
      [](const moe::ParameterInfo& info, const auto& of_a, const auto& of_b) {
        EXPECT_TRUE(laws::same_bits(of_a.data(), of_b.data(), of_a.size())) << info.name;
      },
      a, b);
}

// Every seat by value: expert, token, gate.
template <class S>
std::vector<std::tuple<Index, Index, S>> seats_of(const moe::DispatchPlan<S>& plan) {
  std::vector<std::tuple<Index, Index, S>> seats;
  for (Index e = 0; e < plan.num_experts(); ++e)
    for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a)
      seats.emplace_back(e, plan.token[a], plan.gate[a]);
  return seats;
}

template <class S>
class HashRouterLaws : public testing::Test {};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(HashRouterLaws, Scalars);

TYPED_TEST(HashRouterLaws, EveryChoiceIsSeatedWithinCapacityOrNamedAsDropped) {
  Index dropped = 0, passed = 0;
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    const Index tokens = 40;
    BatchInfo info = random_batch(tokens, rng);
    info.group_begin = IndexVector{{0, 15, 15, tokens}};
    const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(tokens, kDModel, rng);
    const auto routing = layer.route(x, info, Sequential{});
    const auto& plan = routing.plan;
    const auto& options = layer.router().options();
    EXPECT_EQ(routing.chosen.size(), info.mask.count());
    EXPECT_EQ(plan.num_assignments() + plan.dropped.size(), routing.chosen.size());
    for (const auto& [e, t, gate] : seats_of(plan)) {
      EXPECT_EQ(e, options.table[info.token_ids[t]]);
      EXPECT_EQ(gate, TypeParam(1));
    }
    Index seats = 0;
    for (Index g = 0; g < info.num_groups(); ++g) {
      const Index begin = info.group_begin[g], end = info.group_begin[g + 1];
      IndexVector wanted = IndexVector::Zero(kNumExperts);
      for (Index t = begin; t < end; ++t)
        if (info.mask[t]) ++wanted[options.table[info.token_ids[t]]];
      const Index capacity = options.capacity
                                 ? Index(std::ceil(*options.capacity * double(wanted.sum()) / kNumExperts))
                                 : tokens;
      for (Index e = 0; e < kNumExperts; ++e) seats += std::min(wanted[e], capacity);
    }
    EXPECT_EQ(plan.num_assignments(), seats);
    EXPECT_EQ(plan.passed_through.size(),
              options.overflow == Overflow::pass_through ? plan.dropped.size() : 0);
    dropped += plan.dropped.size();
    passed += plan.passed_through.size();
  });
  EXPECT_GT(dropped, 20);
  EXPECT_GT(passed, 10);
}

TYPED_TEST(HashRouterLaws, PermutingTokensWithTheirIdsPermutesOutputs) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    if (layer.router().options().capacity) return;  // the first come get the seats
    const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(23, kDModel, rng);
    const BatchInfo info = random_batch(23, rng);
    Matrix<TypeParam> permuted(23, kDModel), expected(23, kDModel);
    BatchInfo permuted_info = info;
    const Matrix<TypeParam> y = layer.forward(x, info, Sequential{});
    for (Index t = 0; t < 23; ++t) {
      const Index from = (7 * t + 3) % 23;
      permuted.row(t) = x.row(from);
      expected.row(t) = y.row(from);
      permuted_info.mask[t] = info.mask[from];
      permuted_info.token_ids[t] = info.token_ids[from];
    }
    EXPECT_TRUE(laws::equal_to_rounding(layer.forward(permuted, permuted_info, Sequential{}), expected));
  });
}

// The table's numbers go with the experts.
TYPED_TEST(HashRouterLaws, RelabellingExpertsChangesNothing) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    auto options = layer.router().options();
    const auto shared = layer.shared_experts();
    std::vector<moe::GatedFeedForward<TypeParam>> experts(layer.experts().begin(), layer.experts().end());
    const Index order[kNumExperts] = {2, 0, 3, 1};
    for (Index& expert : options.table) expert = order[expert];
    for (Index e = 0; e < kNumExperts; ++e) experts[std::size_t(order[e])] = layer.experts()[std::size_t(e)];
    FullLayer<TypeParam> relabelled(experts, moe::HashRouter<TypeParam>(options),
                                    {{shared.begin(), shared.end()}, true}, true);
    relabelled.w_shared_gate = layer.w_shared_gate;
    relabelled.b_output = layer.b_output;
    const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(23, kDModel, rng);
    const BatchInfo info = random_batch(23, rng);
    EXPECT_TRUE(laws::equal_to_rounding(relabelled.forward(x, info, Sequential{}),
                                        layer.forward(x, info, Sequential{})));
  });
}

TYPED_TEST(HashRouterLaws, OneExpertAloneIsThatExpert) {
  using E = moe::GatedFeedForward<TypeParam>;
  Rng rng(6);
  const FullLayer<TypeParam> layer(
      moe::make_experts<E>(1, {.d_model = kDModel, .d_ff = 6, .bias = true}, rng),
      moe::HashRouter<TypeParam>(
          {.d_model = kDModel, .num_experts = 1, .table = IndexVector::Zero(kVocabulary)}));
  const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(9, kDModel, rng);
  BatchInfo info = random_batch(9, rng);
  info.mask.setConstant(true);
  info.token_ids = info.token_ids.cwiseMax(0);
  Matrix<TypeParam> expected(9, kDModel);
  layer.experts()[0].forward(x, expected);
  EXPECT_TRUE(laws::same_bits(layer.forward(x, info, Sequential{}), expected));
}

TYPED_TEST(HashRouterLaws, AllTokensMayWantOneExpert) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    const auto& options = layer.router().options();
    const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(10, kDModel, rng);
    const auto routing = layer.route(x, BatchInfo{.token_ids = IndexVector::Constant(10, 3)}, Sequential{});
    // ceil(0.5 * 10 / 4) or ceil(1.0 * 10 / 4) seats.
    const Index seats = !options.capacity ? 10 : *options.capacity < 1 ? 2 : 3;
    IndexVector expected = IndexVector::Zero(kNumExperts);
    expected[options.table[3]] = seats;
    EXPECT_EQ(moe::tokens_per_expert(routing), expected);
    EXPECT_EQ(routing.plan.dropped.size(), 10 - seats);
  });
}

TYPED_TEST(HashRouterLaws, PaddingChangesNoBitOfTheOtherRowsNorOfALoss) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    const BatchInfo info = random_batch(40, rng);
    Matrix<TypeParam> padded = laws::normal_matrix<TypeParam>(40, kDModel, rng);
    std::vector<Index> place;
    for (Index t = 0; t < 40; ++t) {
      if (info.mask[t])
        place.push_back(t);
      else
        padded(t, 0) = std::numeric_limits<TypeParam>::quiet_NaN();
    }
    const Index tokens = Index(place.size());
    ASSERT_LT(tokens, 40);
    Matrix<TypeParam> x(tokens, kDModel);
    BatchInfo alone{.token_ids = IndexVector(tokens)};
    for (Index t = 0; t < tokens; ++t) {
      x.row(t) = padded.row(place[std::size_t(t)]);
      alone.token_ids[t] = info.token_ids[place[std::size_t(t)]];
    }
    auto moved = seats_of(layer.route(x, alone, Sequential{}).plan);
    for (auto& [e, t, gate] : moved) t = place[std::size_t(t)];
    const auto routing = layer.route(padded, info, Sequential{});
    EXPECT_EQ(seats_of(routing.plan), moved);
    EXPECT_EQ(moe::load_balancing_loss(routing).value,
              moe::load_balancing_loss(layer.route(x, alone, Sequential{})).value);
    EXPECT_EQ(moe::importance_loss(routing).value,
              moe::importance_loss(layer.route(x, alone, Sequential{})).value);
    const Matrix<TypeParam> y = layer.forward(padded, info, Sequential{}),
                            wanted = layer.forward(x, alone, Sequential{});
    Matrix<TypeParam> expected = Matrix<TypeParam>::Zero(40, kDModel);
    for (Index t = 0; t < tokens; ++t) expected.row(place[std::size_t(t)]) = wanted.row(t);
    EXPECT_TRUE(laws::same_bits(y, expected));
  });
}

TYPED_TEST(HashRouterLaws, PaddingGetsNoGradientAndGivesNone) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(20, kDModel, rng),
                      d_y = laws::normal_matrix<TypeParam>(20, kDModel, rng);
    BatchInfo info = random_batch(20, rng);
    const Step<TypeParam> before(layer, x, d_y, info);
    for (Index t = 0; t < 20; ++t) {
      if (info.mask[t]) continue;
      EXPECT_TRUE(all_zero(before.d_x.row(t))) << "row " << t;
      x.row(t).setConstant(std::numeric_limits<TypeParam>::infinity());
      d_y.row(t).setConstant(5);
      info.token_ids[t] = 2;
    }
    const Step<TypeParam> after(layer, x, d_y, info);
    EXPECT_TRUE(laws::same_bits(after.y, before.y));
    EXPECT_TRUE(laws::same_bits(after.d_x, before.d_x));
    expect_same_parameters(after.grad, before.grad);
  });
}

TYPED_TEST(HashRouterLaws, APoisonedTokenCountsAsPadding) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    BatchInfo info = random_batch(20, rng), masked;
    info.mask[5] = true;
    info.token_ids[5] = 3;
    masked = info;
    masked.mask[5] = false;
    Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(20, kDModel, rng);
    const Matrix<TypeParam> d_y = laws::normal_matrix<TypeParam>(20, kDModel, rng);
    const Step<TypeParam> expected(layer, x, d_y, masked);
    for (const TypeParam poison :
         {std::numeric_limits<TypeParam>::quiet_NaN(), -std::numeric_limits<TypeParam>::infinity()}) {
      x(5, 1) = poison;
      typename FullLayer<TypeParam>::Cache cache;
      Matrix<TypeParam> y = layer.forward(x, cache, info, Sequential{});
      EXPECT_EQ(cache.routing.plan.token_state[5], moe::TokenState::poisoned);
      EXPECT_TRUE(y.row(5).array().isNaN().all());
      y.row(5).setZero();
      EXPECT_TRUE(laws::same_bits(y, expected.y));
      auto grad = moe::zeros_like(layer);
      EXPECT_TRUE(laws::same_bits(layer.backward(d_y, cache, grad, {}, Sequential{}), expected.d_x));
      expect_same_parameters(grad, expected.grad);
    }
  });
}

TYPED_TEST(HashRouterLaws, GroupsAreRoutedAsIfAlone) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(41, kDModel, rng);
    BatchInfo info = random_batch(41, rng);
    info.group_begin = IndexVector{{0, 18, 18, 19, 41}};
    const Matrix<TypeParam> y = layer.forward(x, info, Sequential{});
    for (Index g = 0; g < info.num_groups(); ++g) {
      const Index begin = info.group_begin[g], count = info.group_begin[g + 1] - begin;
      EXPECT_TRUE(laws::same_bits(
          Matrix<TypeParam>(y.middleRows(begin, count)),
          layer.forward(x.middleRows(begin, count), part_of(info, begin, count), Sequential{})))
          << "group " << g;
    }
  });
}

TYPED_TEST(HashRouterLaws, ARoutingCanBeReplayed) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(20, kDModel, rng),
                            d_y = laws::normal_matrix<TypeParam>(20, kDModel, rng);
    BatchInfo info = random_batch(20, rng);
    info.group_begin = IndexVector{{0, 7, 20}};
    const Step<TypeParam> step(layer, x, d_y, info);
    const auto routing = layer.route(x, info, Sequential{});
    EXPECT_TRUE(laws::same_bits(layer.forward(x, routing, Sequential{}), step.y));
    typename FullLayer<TypeParam>::Cache cache;
    EXPECT_TRUE(laws::same_bits(layer.forward(x, routing, cache, Sequential{}), step.y));
    auto grad = moe::zeros_like(layer);
    EXPECT_TRUE(laws::same_bits(layer.backward(d_y, cache, grad, {}, Sequential{}), step.d_x));
    expect_same_parameters(grad, step.grad);
  });
}

TYPED_TEST(HashRouterLaws, AWorkspaceAndACacheCanBeReused) {
  typename FullLayer<TypeParam>::Workspace workspace;
  typename FullLayer<TypeParam>::Cache cache;
  Matrix<TypeParam> y, d_x;
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    for (const Index tokens : {9, 0, 14, 14}) {
      const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(tokens, kDModel, rng),
                              d_y = laws::normal_matrix<TypeParam>(tokens, kDModel, rng);
      const BatchInfo info = random_batch(tokens, rng);
      const Step<TypeParam> fresh(layer, x, d_y, info);
      layer.forward(x, y, workspace, info, Sequential{});
      EXPECT_TRUE(laws::same_bits(y, fresh.y));
      layer.forward(x, y, cache, info, Sequential{});
      EXPECT_TRUE(laws::same_bits(y, fresh.y));
      for (const auto* routing : {&workspace.routing, &cache.routing}) {
        EXPECT_EQ(routing->plan, fresh.cache.routing.plan);
        EXPECT_EQ(routing->chosen, fresh.cache.routing.chosen);
        EXPECT_TRUE(laws::same_bits(routing->router_probs, fresh.cache.routing.router_probs));
        EXPECT_EQ(routing->router_logits.size(), 0);
      }
      auto grad = moe::zeros_like(layer);
      layer.backward(d_y, cache, grad, {}, d_x, Sequential{});
      EXPECT_TRUE(laws::same_bits(d_x, fresh.d_x));
      expect_same_parameters(grad, fresh.grad);
    }
  });
}

TYPED_TEST(HashRouterLaws, EmptyAndFullyMaskedBatchesAreOrdinary) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    for (const Index tokens : {0, 6}) {
      const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(tokens, kDModel, rng);
      const BatchInfo info{.mask = moe::Mask::Constant(tokens, false),
                           .token_ids = IndexVector::Constant(tokens, kForeignId)};
      const Step<TypeParam> step(layer, x, x, info);
      for (const Matrix<TypeParam>* m : {&step.y, &step.d_x}) {
        EXPECT_EQ(m->rows(), tokens);
        EXPECT_EQ(m->cols(), kDModel);
        EXPECT_TRUE((m->array() == 0).all());
      }
      FullLayer<TypeParam>::visit([](const moe::ParameterInfo& name,
                                     const auto& g) { EXPECT_TRUE((g.array() == 0).all()) << name.name; },
                                  step.grad);
      EXPECT_EQ(moe::load_balancing_loss(step.cache.routing).value, 0);
      EXPECT_EQ(moe::importance_loss(step.cache.routing).value, 0);
    }
  });
}

TYPED_TEST(HashRouterLaws, BackwardAddsToTheGradientAndCanBeRepeated) {
  for_each_layer<TypeParam>([&](const auto& layer, Rng& rng) {
    const Matrix<TypeParam> x = laws::normal_matrix<TypeParam>(20, kDModel, rng),
                            d_y = laws::normal_matrix<TypeParam>(20, kDModel, rng);
    Step<TypeParam> step(layer, x, d_y, random_batch(20, rng));
    auto twice = step.grad;
    EXPECT_TRUE(laws::same_bits(layer.backward(d_y, step.cache, twice, {}, Sequential{}), step.d_x));
    FullLayer<TypeParam>::visit(
        [](const moe::ParameterInfo& info, const auto& once, const auto& doubled) {
          EXPECT_TRUE(laws::equal_to_rounding(Matrix<TypeParam>(doubled), Matrix<TypeParam>(2 * once)))
              << info.name;
        },
        step.grad, twice);
  });
}

TEST(GradientsOfHashLayers, AreExactWithSharedExperts) {
  Index passed = 0, dropped = 0;
  for_each_layer<double>([&](const auto& layer, Rng& rng) {
    for (const bool training : {false, true}) {
      moe::GradientCheckOptions options;
      options.info = random_batch(10, rng);
      options.info.group_begin = IndexVector{{0, 4, 10}};
      if (training) options.rng = Rng(3);
      const Matrix<double> x = laws::normal_matrix<double>(10, kDModel, rng);
      const auto report = moe::check_gradients(layer, x, options);
      EXPECT_LT(report.worst, 1e-6) << report.where;
      EXPECT_EQ(report.crossed, 0);
      EXPECT_EQ(report.checked, 10 * kDModel + moe::num_parameters(layer));
      const auto routing = layer.route(x, options.info);
      dropped += routing.plan.dropped.size();
      passed += routing.plan.passed_through.size();
    }
  });
  EXPECT_GT(dropped, 5);
  EXPECT_GT(passed, 2);
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
  EXPECT_EQ(moe::balanced_hash_table(IndexVector{{2, 2, 3, 2}}, 4), (IndexVector{{1, 2, 0, 3}}));  // ties
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
}  // namespace hash_router_test
