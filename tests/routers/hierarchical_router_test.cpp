// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <moe/moe.hpp>
#include <moe/routers/hierarchical_router.hpp>

#include "laws.hpp"
#include "reference_moe.hpp"

namespace hierarchical_router_test {
namespace {

using laws::normal_matrix;
using laws::randomise;
using laws::same_bits;
using moe::BatchInfo;
using moe::Index;
using moe::Matrix;
using moe::Rng;
using moe::Sequential;
using moe::TokenState;
using TopK = moe::TopKRouter<double>;
using Noisy = moe::NoisyTopKRouter<double>;
template <class Parent, class Child = Parent>
using Hierarchy = moe::HierarchicalRouter<Parent, Child>;
using Nested = Hierarchy<TopK, Hierarchy<TopK>>;
using Expert = moe::FeedForward<double, moe::GELU>;
template <class Router>
using LayerOf = moe::MoELayer<Expert, Router>;
using testing::HasSubstr;
using testing::ThrowsMessage;

static_assert(moe::TrainableRouter<Hierarchy<TopK>>);
static_assert(moe::TrainableRouter<Hierarchy<TopK, Noisy>>);
static_assert(moe::TrainableRouter<Nested>);

constexpr Index kDModel = 4;

struct Shape {
  Index groups = 3, experts = 4;    // a and b
  Index parent_k = 2, child_k = 2;  // choices of a token at each level
  bool renormalise = true;
};

template <class Router>
Router make_level(Index experts, Index k, bool renormalise, Rng& rng) {
  typename Router::Options options;
  options.d_model = kDModel;
  options.num_experts = experts;
  options.top_k = k;
  options.allow_constant_gate = true;
  if constexpr (requires { options.renormalise; }) options.renormalise = renormalise;
  Router router(options, rng);
  randomise(router, rng);
  return router;
}

template <class Router>
struct Make;
template <class Parent, class Child>
struct Make<Hierarchy<Parent, Child>> {
  static Hierarchy<Parent, Child> router(const Shape& shape, Rng& rng) {
    std::vector<Child> children;
    for (Index i = 0; i < shape.groups; ++i)
      children.push_back(make_level<Child>(shape.experts, shape.child_k, shape.renormalise, rng));
    return {make_level<Parent>(shape.groups, shape.parent_k, shape.renormalise, rng), std::move(children)};
  }
};
template <>
struct Make<Nested> {
  static Nested router(const Shape& shape, Rng& rng) {
    std::vector<Hierarchy<TopK>> children;
    for (Index i = 0; i < shape.groups; ++i)
      children.push_back(Make<Hierarchy<TopK>>::router({2, shape.experts / 2, 2, 1, false}, rng));
    return {make_level<TopK>(shape.groups, shape.parent_k, shape.renormalise, rng), std::move(children)};
  }
};

template <class Router>
LayerOf<Router> make_layer(const Shape& shape, Rng& rng) {
  Router router = Make<Router>::router(shape, rng);
  const Index leaves = router.num_experts();
  LayerOf<Router> layer(moe::make_experts<Expert>(leaves, {.d_model = kDModel, .d_ff = 3, .bias = true}, rng),
                        std::move(router));
  randomise(layer, rng);
  return layer;
}

template <class Router>
moe::Routing<double> route(const Router& router, const Matrix<double>& x, const BatchInfo& info = {}) {
  moe::Routing<double> routing;
  router.route(x, info, routing, Sequential{});
  return routing;
}

template <class Thing>
void expect_same_parameters(const Thing& a, const Thing& b) {
  Thing::visit(
      [](const moe::ParameterInfo& info, const auto& of_a, const auto& of_b) {
        EXPECT_TRUE(same_bits(of_a.data(), of_b.data(), of_a.size())) << info.name;
      },
      a, b);
}

// Equal in everything that a routing shows, levels included.
void expect_same_routing(const moe::Routing<double>& a, const moe::Routing<double>& b) {
  EXPECT_EQ(a.plan, b.plan);
  EXPECT_EQ(a.chosen, b.chosen);
  EXPECT_TRUE(same_bits(a.router_probs, b.router_probs));
  ASSERT_EQ(a.levels.size(), b.levels.size());
  for (std::size_t i = 0; i < a.levels.size(); ++i) expect_same_routing(a.levels[i], b.levels[i]);
}

template <class Router>
class HierarchicalRouter : public testing::Test {};
using Kinds = testing::Types<Hierarchy<TopK, Noisy>, Hierarchy<Noisy, TopK>, Nested>;
TYPED_TEST_SUITE(HierarchicalRouter, Kinds);

// ---- What it is.

// Two groups of two; logits are those of log(p), so that probabilities are whole tenths.
TEST(HierarchicalRouterByHand, GatesMultiply) {
  const auto logs = [](std::vector<double> p) {
    Matrix<double> w(Index(p.size()), 1);
    for (std::size_t e = 0; e < p.size(); ++e) w(Index(e), 0) = std::log(p[e]);
    return w;
  };
  TopK parent({.d_model = 1, .num_experts = 2, .top_k = 2});
  TopK child({.d_model = 1, .num_experts = 2, .top_k = 1});
  parent.w_router = logs({0.3, 0.7});
  std::vector<TopK> children{child, child};
  children[0].w_router = logs({0.9, 0.1});
  children[1].w_router = logs({0.4, 0.6});
  const moe::HierarchicalRouter router(parent, children);
  EXPECT_EQ(router.num_experts(), 4);
  EXPECT_EQ(router.d_model(), 1);
  const auto routing = route(router, Matrix<double>{{1}});
  // The best leaf first: 0.7 * 0.6 of group 1, then 0.3 * 0.9 of group 0.
  EXPECT_EQ(routing.chosen.expert, (moe::Buffer<Index>{3, 0}));
  EXPECT_NEAR(routing.chosen.gate[0], 0.42, 1e-15);
  EXPECT_NEAR(routing.chosen.gate[1], 0.27, 1e-15);
  const Matrix<double> probs{{0.27, 0.03, 0.28, 0.42}};
  EXPECT_TRUE(laws::equal_to_rounding(routing.router_probs, probs));
  EXPECT_EQ(routing.plan.expert_begin, (moe::Buffer<Index>{0, 1, 1, 1, 2}));
  EXPECT_EQ(routing.router_logits.size(), 0);
  ASSERT_EQ(routing.levels.size(), 3u);
  EXPECT_EQ(routing.levels[0].num_experts(), 2);
  EXPECT_EQ(routing.levels[2].chosen.expert, (moe::Buffer<Index>{1}));
}

// A child that did not see the token: its leaves share its group's probability.
TEST(HierarchicalRouterByHand, LeavesOfAGroupThatWasNotChosenShareItsProbability) {
  TopK parent({.d_model = 1, .num_experts = 2, .top_k = 1});
  TopK child({.d_model = 1, .num_experts = 2, .top_k = 1});
  parent.w_router << std::log(0.8), std::log(0.2);
  child.w_router << std::log(0.75), std::log(0.25);
  const auto routing = route(Hierarchy<TopK>(parent, {child, child}), Matrix<double>{{1}});
  const Matrix<double> probs{{0.6, 0.2, 0.1, 0.1}};
  EXPECT_TRUE(laws::equal_to_rounding(routing.router_probs, probs));
  EXPECT_EQ(routing.levels[1].plan.token_state[0], TokenState::valid);
  EXPECT_EQ(routing.levels[2].plan.token_state[0], TokenState::masked);
}

TEST(HierarchicalRouterByHand, TiesGoToTheLowerLeaf) {
  Rng rng(1);
  auto router = Make<Hierarchy<TopK>>::router({.groups = 3, .experts = 3}, rng);
  moe::set_zero(router);
  const auto routing = route(router, Matrix<double>::Ones(2, kDModel));
  EXPECT_EQ(routing.chosen.expert, (moe::Buffer<Index>{0, 1, 3, 4, 0, 1, 3, 4}));
}

// y = sum over i, j of G_i(x) G_ij(x) E_ij(x) by three loops.
TEST(HierarchicalRouterByHand, EqualsTheFormulaInThreeLoops) {
  Rng rng(2);
  for (const bool renormalise : {true, false})
    for (const auto& [parent_k, child_k] :
         std::vector<std::pair<Index, Index>>{{1, 1}, {2, 2}, {1, 3}, {3, 1}, {3, 4}}) {
      const Shape shape{.parent_k = parent_k, .child_k = child_k, .renormalise = renormalise};
      const auto layer = make_layer<Hierarchy<TopK>>(shape, rng);
      const auto& router = layer.router();
      const Matrix<double> x = normal_matrix<double>(13, kDModel, rng);
      const auto best = [](const Matrix<double>& z, Index t, Index k) {
        std::vector<Index> chosen;
        while (Index(chosen.size()) < k) chosen.push_back(reference::best_expert(z, t, chosen));
        return chosen;
      };
      const Matrix<double> z = reference::logits(x, router.parent().w_router);
      Matrix<double> y = Matrix<double>::Zero(x.rows(), kDModel);
      for (Index t = 0; t < x.rows(); ++t) {
        const std::vector<Index> groups = best(z, t, parent_k);
        for (const Index i : groups) {
          const Matrix<double> zi = reference::logits(x, router.children()[std::size_t(i)].w_router);
          const std::vector<Index> experts = best(zi, t, child_k);
          for (const Index j : experts) {
            const double gate = reference::gate_of(z, t, i, renormalise, groups) *
                                reference::gate_of(zi, t, j, renormalise, experts);
            const auto& expert = layer.experts()[std::size_t(i * shape.experts + j)];
            y.row(t) += gate * reference::expert_output(expert, reference::row_of(x, t)).transpose();
          }
        }
      }
      EXPECT_TRUE(laws::equal_to_rounding(layer.forward(x, {}, Sequential{}), y));
    }
}

// With all experts at both levels the layer is the dense mixture of mixtures, and gates are
// router_probs.
TEST(HierarchicalRouterByHand, WithAllExpertsOutputsAreTheDenseMixture) {
  Rng rng(3);
  const Shape shape{.parent_k = 3, .child_k = 4, .renormalise = false};
  const auto layer = make_layer<Hierarchy<TopK>>(shape, rng);
  const Matrix<double> x = normal_matrix<double>(11, kDModel, rng);
  const auto routing = route(layer.router(), x);
  EXPECT_EQ(routing.plan.num_assignments(), 11 * 12);
  for (Index c = 0; c < routing.chosen.size(); ++c)
    EXPECT_EQ(routing.chosen.gate[c], routing.router_probs(c / 12, routing.chosen.expert[c]));
  const auto share = [&](const TopK& level, Index t, Index e) {
    return reference::softmax(reference::logits(x, level.w_router), t, e,
                              reference::numbers(0, level.num_experts()));
  };
  Matrix<double> dense = Matrix<double>::Zero(11, kDModel);
  for (Index t = 0; t < 11; ++t)
    for (Index e = 0; e < 12; ++e)
      dense.row(t) +=
          share(layer.router().parent(), t, e / 4) *
          share(layer.router().children()[std::size_t(e / 4)], t, e % 4) *
          reference::expert_output(layer.experts()[std::size_t(e)], reference::row_of(x, t)).transpose();
  EXPECT_TRUE(laws::equal_to_rounding(layer.forward(x, {}, Sequential{}), dense));
}

TYPED_TEST(HierarchicalRouter, ChosenAreAllPairsTheBestFirstAndProbabilitiesSumToOne) {
  Rng rng(4);
  const auto router = Make<TypeParam>::router({}, rng);
  const Matrix<double> x = normal_matrix<double>(60, kDModel, rng);
  for (const bool training : {false, true}) {
    moe::Routing<double> routing;
    if (training)
      router.route(x, rng, {}, routing, Sequential{});
    else
      router.route(x, {}, routing, Sequential{});
    ASSERT_EQ(routing.levels.size(), 4u);
    moe::check_plan(routing.plan, 60, 12, "test");
    EXPECT_EQ(routing.plan.num_assignments(), 60 * 4);
    const auto& groups = routing.levels[0];
    for (Index t = 0; t < 60; ++t) {
      EXPECT_NEAR(routing.router_probs.row(t).sum(), 1, 1e-14);
      std::set<Index> expected;
      for (Index p = 2 * t; p < 2 * t + 2; ++p) {
        const auto& child = routing.levels[std::size_t(groups.chosen.expert[p]) + 1];
        const auto& own = child.chosen;
        ASSERT_EQ(own.token_begin[t + 1] - own.token_begin[t], 2);
        for (Index c = own.token_begin[t]; c < own.token_begin[t + 1]; ++c) {
          const Index leaf = groups.chosen.expert[p] * 4 + own.expert[c];
          expected.insert(leaf);
          const auto* const found = std::find(routing.chosen.expert.begin() + 4 * t,
                                              routing.chosen.expert.begin() + 4 * t + 4, leaf);
          const Index place = found - routing.chosen.expert.begin();
          ASSERT_LT(place, 4 * t + 4);
          EXPECT_EQ(routing.chosen.gate[place], groups.chosen.gate[p] * own.gate[c]);
          EXPECT_EQ(routing.router_probs(t, leaf),
                    groups.router_probs(t, leaf / 4) * child.router_probs(t, leaf % 4));
        }
      }
      EXPECT_EQ(expected.size(), 4u);
      for (Index c = 4 * t + 1; c < 4 * t + 4; ++c)
        EXPECT_GE(routing.chosen.gate[c - 1], routing.chosen.gate[c]);
    }
    Index sent = 0;
    for (std::size_t i = 1; i < 4; ++i) sent += routing.levels[i].plan.num_valid_tokens();
    EXPECT_EQ(sent, 60 * 2);  // a child sees those that chose its group
  }
}

// ---- Losses.

// importance_loss of the leaves is CV^2 of eq. 13.
TYPED_TEST(HierarchicalRouter, ImportanceOfLeavesIsThatOfTheProducts) {
  Rng rng(5);
  const auto router = Make<TypeParam>::router({}, rng);
  const auto routing = route(router, normal_matrix<double>(40, kDModel, rng));
  std::vector<double> importance(12, 0.0);
  const auto& groups = routing.levels[0].chosen;
  for (Index t = 0; t < 40; ++t)
    for (Index p = groups.token_begin[t]; p < groups.token_begin[t + 1]; ++p) {
      const auto& own = routing.levels[std::size_t(groups.expert[p]) + 1].chosen;
      for (Index c = own.token_begin[t]; c < own.token_begin[t + 1]; ++c)
        importance[std::size_t(groups.expert[p] * 4 + own.expert[c])] += groups.gate[p] * own.gate[c];
    }
  double mean = 0, variance = 0;
  for (const double value : importance) mean += value / 12;
  for (const double value : importance) variance += (value - mean) * (value - mean) / 12;
  EXPECT_NEAR(moe::importance_loss(routing).value, variance / (mean * mean), 1e-9);
}

// The parent's gradient by the leaves' balance loss is that of its own, where all leaves of a group
// are wanted alike: the groups that were not chosen are reached.
TEST(HierarchicalRouterLosses, BalanceOfLeavesReachesGroupsThatWereNotChosen) {
  Rng rng(6);
  const auto router = Make<Hierarchy<TopK>>::router({.parent_k = 1, .child_k = 4}, rng);
  const Matrix<double> x = normal_matrix<double>(20, kDModel, rng);
  const auto routing = route(router, x);
  EXPECT_NEAR(moe::load_balancing_loss(routing).value, moe::load_balancing_loss(routing.levels[0]).value,
              1e-12);
  auto by_leaves = moe::zeros_like(router), by_groups = by_leaves;
  Matrix<double> d_x = Matrix<double>::Zero(20, kDModel), d_x2 = d_x;
  router.backward(x, routing, moe::load_balancing_loss(routing).gradient, d_x, by_leaves);
  std::vector<moe::RoutingGradient<double>> on_levels(4);
  on_levels[0] = moe::load_balancing_loss(routing.levels[0]).gradient;
  router.backward_levels(x, routing, on_levels, d_x2, by_groups);
  EXPECT_TRUE(laws::equal_to_rounding(by_leaves.parent().w_router, by_groups.parent().w_router));
  EXPECT_GT(by_groups.parent().w_router.norm(), 1e-3);
}

TEST(HierarchicalRouterLosses, ThoseThatNeedLogitsRefuse) {
  Rng rng(7);
  const auto router = Make<Hierarchy<Noisy>>::router({}, rng);
  const Matrix<double> x = normal_matrix<double>(6, kDModel, rng);
  moe::Routing<double> routing;
  router.route(x, rng, {}, routing);
  EXPECT_THAT([&] { moe::router_z_loss(routing); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("router_logits")));
  EXPECT_THAT(
      [&] { moe::importance_loss(routing, moe::Importance::probs); },
      ThrowsMessage<std::invalid_argument>(HasSubstr("router_logits has shape [0, 0], expected [6, 12]")));
  EXPECT_THAT(
      [&] { moe::load_loss(routing); },
      ThrowsMessage<std::invalid_argument>(HasSubstr("level 0 of 4 has noise: use hierarchical_load_loss")));
  // A gradient of zeros by logits is accepted; one that is not zero is refused.
  moe::RoutingGradient<double> gradient;
  gradient.d_router_logits.setZero(6, 12);
  auto grad = moe::zeros_like(router);
  Matrix<double> d_x = Matrix<double>::Zero(6, kDModel);
  router.backward(x, routing, gradient, d_x, grad);
  EXPECT_EQ(d_x.norm(), 0);
  gradient.d_router_logits(2, 3) = 1;
  EXPECT_THAT([&] { router.backward(x, routing, gradient, d_x, grad); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("[6, 12]")));
  for (const auto& level : routing.levels) {
    EXPECT_GT(moe::load_loss(level).value, 0);
    EXPECT_GT(moe::router_z_loss(level).value, 0);
  }
}

// ---- Gradients.

// Draws inputs until no selection is near; then the gradients must agree.
void expect_gradients(Rng& rng, const std::function<moe::GradientReport(Matrix<double>)>& check) {
  for (int redraw = 0; redraw < 50; ++redraw) {
    const moe::GradientReport report = check(normal_matrix<double>(6, kDModel, rng));
    if (report.crossed > 0) continue;
    EXPECT_LE(report.worst, 1e-6) << report.where << ": " << report.analytic << ", by differences "
                                  << report.numeric;
    EXPECT_GT(report.checked, 6 * kDModel);
    return;
  }
  ADD_FAILURE() << "no fit input";
}

std::vector<moe::GradientCheckOptions> all_options(Rng& rng) {
  std::vector<moe::GradientCheckOptions> all(4);
  all[1].rng = Rng(rng());
  all[2].info.mask = moe::Mask::Constant(6, true);
  all[2].info.mask[2] = false;
  all[3].rng = Rng(rng());
  all[3].info = all[2].info;
  all[3].info.group_begin = moe::IndexVector{{0, 3, 6}};
  return all;
}

TYPED_TEST(HierarchicalRouter, GradientsOfTheRouterAreExact) {
  Rng rng(8);
  for (const Shape& shape :
       {Shape{}, Shape{.parent_k = 1, .child_k = 2, .renormalise = false},
        Shape{.groups = 2, .parent_k = 2, .child_k = 4}, Shape{.groups = 1, .parent_k = 1}})
    for (const auto& options : all_options(rng)) {
      const TypeParam router = Make<TypeParam>::router(shape, rng);
      expect_gradients(rng,
                       [&](const Matrix<double>& x) { return moe::check_gradients(router, x, options); });
    }
}

TYPED_TEST(HierarchicalRouter, GradientsOfALayerWithLossesAreExact) {
  Rng rng(9);
  for (const auto& options : all_options(rng)) {
    const auto layer = make_layer<TypeParam>({}, rng);
    expect_gradients(rng, [&](const Matrix<double>& x) {
      return moe::check_gradients(layer, x, options, [](const moe::Routing<double>& routing) {
        auto loss = moe::load_balancing_loss(routing);
        const auto importance = moe::importance_loss(routing);
        loss.value += importance.value;
        loss.gradient += importance.gradient;
        return loss;
      });
    });
  }
}

// Without noise load is counted: load_i * load_ij / tokens of group i, which with one expert a level is the
// number of tokens of a leaf.
TEST(HierarchicalRouterLosses, LoadWithoutNoiseIsCounted) {
  Rng rng(31);
  const auto router = Make<Hierarchy<TopK>>::router({.parent_k = 1, .child_k = 1}, rng);
  const auto routing = route(router, normal_matrix<double>(40, kDModel, rng));
  const moe::IndexVector load = moe::tokens_per_expert(routing);
  const double of_leaves = moe::coefficient_of_variation(load);
  EXPECT_NEAR(moe::hierarchical_load_loss(routing).value, of_leaves * of_leaves, 1e-9);
  EXPECT_NEAR(moe::load_loss(routing).value, of_leaves * of_leaves, 1e-9);
}

// Eq. 14 written out, of two groups of two leaves, whose loads follow from the noisy logits by hand:
// two tokens of the first group and one of the second.
TEST(HierarchicalRouterLosses, LoadIsThatOfTheFormula) {
  const auto phi = [](double u) { return 0.5 * (1 + std::erf(u / std::sqrt(2.0))); };
  moe::Routing<double> routing;
  routing.levels.resize(3);
  const auto fill = [](moe::Routing<double>& level, const std::vector<bool>& seen,
                       const Matrix<double>& logits) {
    moe::BatchInfo info{.mask = moe::Mask(3)};
    for (Index t = 0; t < 3; ++t) info.mask[t] = seen[std::size_t(t)];
    moe::begin_routing(3, 2, info, level, "test");
    level.router_logits = level.noise.noisy_logits = logits;
    level.noise.top_k = 1;
    level.noise.draws = Matrix<double>::Zero(3, 2);
    level.noise.stddev = Matrix<double>::Constant(3, 2, 0.5);
    level.router_probs = Matrix<double>::Constant(3, 2, 0.5);
  };
  fill(routing.levels[0], {true, true, true}, Matrix<double>{{0.7, 0.2}, {0.3, 0.9}, {0.6, 0.5}});
  fill(routing.levels[1], {true, false, true}, Matrix<double>{{0.1, 0.4}, {9, 9}, {0.8, 0.2}});
  fill(routing.levels[2], {false, true, false}, Matrix<double>{{9, 9}, {0.3, 0.0}, {9, 9}});
  // A token is measured against the other expert's logit, at both levels: by differences over 0.5.
  const double first = phi(1.0) + phi(-1.2) + phi(0.2), second = phi(-1.0) + phi(1.2) + phi(-0.2);
  const double load[] = {first * (phi(-0.6) + phi(1.2)) / 2, first * (phi(0.6) + phi(-1.2)) / 2,
                         second * phi(0.6), second * phi(-0.6)};
  double mean = 0, variance = 0;
  for (const double l : load) mean += l / 4;
  for (const double l : load) variance += (l - mean) * (l - mean) / 4;
  EXPECT_NEAR(moe::hierarchical_load_loss(routing).value, variance / (mean * mean + 1e-10), 1e-12);

  moe::Routing<double> nested = routing, uneven = routing;
  nested.levels[1].levels = {routing.levels[2]};
  EXPECT_THAT([&] { moe::hierarchical_load_loss(nested); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("level 1 has 1 levels itself")));
  EXPECT_THAT([&] { moe::load_loss(nested.levels[1]); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("level 0 of 1 has noise")));
  nested.levels[0].noise = nested.levels[1].noise = nested.levels[2].noise = {};
  EXPECT_THAT([&] { moe::load_loss(nested); },  // a level of a level
              ThrowsMessage<std::invalid_argument>(HasSubstr("level 0 of 1 has noise")));
  moe::begin_routing(3, 3, {}, uneven.levels[2], "test");
  EXPECT_THAT([&] { moe::hierarchical_load_loss(uneven); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("level 2 has")));
  routing.levels.resize(2);
  EXPECT_THAT([&] { moe::hierarchical_load_loss(routing); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("2 experts, expected 1 children")));
  routing.levels.resize(1);
  EXPECT_THAT([&] { moe::hierarchical_load_loss(routing); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("has 1 levels")));
}

// A sum of losses on all levels, with its gradients.
double level_losses(const moe::Routing<double>& routing,
                    std::vector<moe::RoutingGradient<double>>* gradients = nullptr) {
  double sum = 0;
  for (const auto& level : routing.levels) {
    const double weight = double(level.num_experts());
    moe::RoutingGradient<double> gradient;
    for (const auto& loss : {moe::load_balancing_loss(level), moe::importance_loss(level),
                             moe::router_z_loss(level), moe::load_loss(level, moe::LoadThreshold::one)}) {
      sum += weight * loss.value;
      gradient += weight * loss.gradient;
    }
    if (gradients != nullptr) gradients->push_back(gradient);
  }
  for (const auto threshold : {moe::LoadThreshold::two, moe::LoadThreshold::one}) {
    const auto load = moe::hierarchical_load_loss(routing, threshold);
    sum += 3 * load.value;
    for (std::size_t i = 0; gradients != nullptr && i < gradients->size(); ++i)
      (*gradients)[i] += 3.0 * load.gradients[i];
  }
  return sum;
}

struct RouterAtX {
  Hierarchy<Noisy> router;
  Matrix<double> x;
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"x"}, self.x...);
    moe::visit_part("", f, self.router...);
  }
};

TEST(HierarchicalRouterLosses, GradientsOfLossesOnLevelsAreExact) {
  Rng rng(10);
  using Router = Hierarchy<Noisy>;
  for (const auto& options : all_options(rng)) {
    const Router router = Make<Router>::router({.parent_k = 2, .child_k = 2}, rng);
    const auto objective = [&](const RouterAtX& at, RouterAtX* grad, moe::RoutingSignature& signature) {
      moe::Routing<double> routing;
      if (options.rng) {
        Rng copy = *options.rng;
        at.router.route(at.x, copy, options.info, routing, Sequential{});
      } else {
        at.router.route(at.x, options.info, routing, Sequential{});
      }
      signature.add(routing);
      if (grad == nullptr) return level_losses(routing);
      Matrix<double> valid_x = at.x;
      for (Index t = 0; t < 6; ++t)
        if (!routing.is_valid(t)) valid_x.row(t).setZero();
      std::vector<moe::RoutingGradient<double>> gradients;
      const double sum = level_losses(routing, &gradients);
      at.router.backward_levels(valid_x, routing, gradients, grad->x, grad->router, Sequential{});
      return sum;
    };
    expect_gradients(rng, [&](const Matrix<double>& x) {
      return moe::check_gradients(RouterAtX{router, x}, objective, options);
    });
  }
}

// A child that insists on what routers are promised: zeros in the rows of tokens not valid.
struct Strict : TopK {
  using TopK::TopK;
  template <class E = moe::DefaultExecutor>
  void backward(const moe::ConstMatrixRef<double>& x, const moe::Routing<double>& routing,
                const moe::RoutingGradient<double>& gradient, moe::MatrixRef<double> d_x, Strict& grad,
                const E& executor = {}) const {
    for (Index t = 0; t < x.rows(); ++t) EXPECT_EQ(x.row(t).norm() > 0, routing.is_valid(t)) << "row " << t;
    TopK::backward(x, routing, gradient, d_x, grad, executor);
  }
};

TEST(HierarchicalRouterLosses, AChildSeesZerosForTokensOfOtherGroups) {
  Rng rng(22);
  const auto router = Make<Hierarchy<TopK, Strict>>::router({.parent_k = 1}, rng);
  const Matrix<double> x = normal_matrix<double>(20, kDModel, rng);
  const auto routing = route(router, x);
  auto grad = moe::zeros_like(router);
  Matrix<double> d_x = Matrix<double>::Zero(20, kDModel);
  router.backward(x, routing, moe::load_balancing_loss(routing).gradient, d_x, grad);
  EXPECT_GT(d_x.norm(), 0);
}

// ---- Symmetries, masks, poison, replay, reuse, threads.

TYPED_TEST(HierarchicalRouter, PermutingTokensPermutesOutputs) {
  Rng rng(11);
  const auto layer = make_layer<TypeParam>({}, rng);
  const Matrix<double> x = normal_matrix<double>(23, kDModel, rng);
  const Matrix<double> y = layer.forward(x, {}, Sequential{});
  Matrix<double> moved(23, kDModel), expected(23, kDModel);
  for (Index t = 0; t < 23; ++t) {
    moved.row(t) = x.row((t * 7 + 3) % 23);
    expected.row(t) = y.row((t * 7 + 3) % 23);
  }
  EXPECT_TRUE(laws::equal_to_rounding(layer.forward(moved, {}, Sequential{}), expected));
}

// Forward and backward of a layer in training, with losses on leaves and on levels.
template <class Layer>
struct Step {
  Matrix<double> y, d_x;
  double loss = 0;
  Layer grad;
  typename Layer::Cache cache;

  template <class E>
  Step(const Layer& layer, const Matrix<double>& x, const Matrix<double>& d_y, Rng rng, const BatchInfo& info,
       const E& executor)
      : grad(moe::zeros_like(layer)) {
    layer.forward(x, rng, y, cache, info, executor);
    const auto balance = moe::load_balancing_loss(cache.routing);
    const auto importance = moe::importance_loss(cache.routing);
    loss = balance.value + importance.value;
    layer.backward(d_y, cache, grad, balance.gradient + importance.gradient, d_x, executor);
    std::vector<moe::RoutingGradient<double>> on_levels;
    for (const auto& level : cache.routing.levels) {
      const auto level_loss = moe::load_balancing_loss(level);
      loss += level_loss.value;
      on_levels.push_back(level_loss.gradient);
    }
    layer.router().backward_levels(cache.x, cache.routing, on_levels, d_x, grad.router(), executor);
  }
};

TYPED_TEST(HierarchicalRouter, PaddingChangesNothingAndItsNoiseIsItsOwn) {
  Rng rng(12);
  const auto layer = make_layer<TypeParam>({}, rng);
  Matrix<double> x = normal_matrix<double>(15, kDModel, rng);
  Matrix<double> d_y = normal_matrix<double>(15, kDModel, rng);
  BatchInfo info{.mask = moe::Mask::Constant(15, true)};
  for (const Index t : {1, 6, 7, 14}) info.mask[t] = false;
  const Step all(layer, x, d_y, rng, {}, Sequential{});
  const Step masked(layer, x, d_y, rng, info, Sequential{});
  for (Index t = 0; t < 15; ++t) {
    if (info.mask[t]) {
      EXPECT_EQ(masked.y.row(t), all.y.row(t)) << "row " << t;
      continue;
    }
    EXPECT_EQ(masked.y.row(t).norm(), 0);
    EXPECT_EQ(masked.d_x.row(t).norm(), 0);
    x.row(t).setConstant(std::numeric_limits<double>::quiet_NaN());
    d_y.row(t).setConstant(9);
  }
  const Step other(layer, x, d_y, rng, info, Sequential{});
  EXPECT_TRUE(same_bits(other.y, masked.y));
  EXPECT_TRUE(same_bits(other.d_x, masked.d_x));
  EXPECT_EQ(other.loss, masked.loss);
  expect_same_parameters(other.grad, masked.grad);

  info.mask.setConstant(false);
  const Step nobody(layer, x, d_y, rng, info, Sequential{});
  EXPECT_EQ(nobody.y.norm() + nobody.d_x.norm() + nobody.loss, 0);
}

// A token is poisoned by any level, and then everything is as if it were masked: also the levels
// that had found it fit, and their losses.
TYPED_TEST(HierarchicalRouter, APoisonedTokenCountsAsPadding) {
  Rng rng(13);
  auto layer = make_layer<TypeParam>({.groups = 3, .parent_k = 2}, rng);
  const Matrix<double> d_y = normal_matrix<double>(12, kDModel, rng);
  BatchInfo info{.mask = moe::Mask::Constant(12, true)};
  info.mask[5] = false;
  // The parent does not look at the last column, so that only children find the infinity.
  std::decay_t<decltype(layer.router().parent())>::visit(
      [](const moe::ParameterInfo&, auto& w) { w.col(kDModel - 1).setZero(); }, layer.router().parent());
  for (const bool by_child : {false, true}) {
    Matrix<double> x = normal_matrix<double>(12, kDModel, rng);
    const Step masked(layer, x, d_y, rng, info, Sequential{});
    if (by_child) {
      x(5, 3) = 1e308;
      for (auto& child : layer.router().children())
        std::decay_t<decltype(child)>::visit(
            [](const moe::ParameterInfo&, auto& w) { w.col(kDModel - 1) *= 1e3; }, child);
    } else {
      x(5, 1) = std::numeric_limits<double>::quiet_NaN();
    }
    const Step expected(layer, x, d_y, rng, info, Sequential{});
    Rng drawn = rng;
    Step poisoned(layer, x, d_y, rng, {}, Sequential{});
    if (!by_child) {
      EXPECT_TRUE(same_bits(expected.y, masked.y));
    }
    EXPECT_EQ(poisoned.cache.routing.plan.token_state[5], TokenState::poisoned);
    EXPECT_EQ(poisoned.cache.routing.levels[0].plan.token_state[5], TokenState::poisoned);
    EXPECT_TRUE(poisoned.y.row(5).array().isNaN().all());
    poisoned.y.row(5).setZero();
    EXPECT_TRUE(same_bits(poisoned.y, expected.y));
    EXPECT_TRUE(same_bits(poisoned.d_x, expected.d_x));
    EXPECT_EQ(poisoned.loss, expected.loss);
    EXPECT_TRUE(std::isfinite(poisoned.loss));
    expect_same_parameters(poisoned.grad, expected.grad);
    // The Rng moves on as it does without a poisoned token.
    moe::Routing<double> routing;
    layer.router().route(x, drawn, {}, routing, Sequential{});
    Rng clean = rng;
    layer.router().route(Matrix<double>::Zero(12, kDModel), clean, {}, routing, Sequential{});
    EXPECT_EQ(drawn, clean);
  }
}

TYPED_TEST(HierarchicalRouter, ARoutingCanBeReplayed) {
  Rng rng(14);
  const auto layer = make_layer<TypeParam>({}, rng);
  const Matrix<double> x = normal_matrix<double>(16, kDModel, rng);
  const Matrix<double> d_y = normal_matrix<double>(16, kDModel, rng);
  BatchInfo info{.mask = moe::Mask::Constant(16, true)};
  info.mask[3] = false;
  info.group_begin = moe::IndexVector{{0, 7, 16}};
  Step made(layer, x, d_y, rng, info, Sequential{});
  const moe::Routing<double> copy = made.cache.routing;
  expect_same_routing(copy, made.cache.routing);
  EXPECT_TRUE(same_bits(layer.forward(x, copy, Sequential{}), made.y));
  typename LayerOf<TypeParam>::Cache replayed;
  EXPECT_TRUE(same_bits(layer.forward(x, copy, replayed, Sequential{}), made.y));
  auto grad = moe::zeros_like(layer), other = grad;
  EXPECT_TRUE(same_bits(layer.backward(d_y, replayed, grad, {}, Sequential{}),
                        layer.backward(d_y, made.cache, other, {}, Sequential{})));
  expect_same_parameters(grad, other);
}

// A rule that couples tokens couples those of a group, below the parent too: a group is routed as if alone.
TEST(HierarchicalRouterGroups, AreRoutedAsIfAlone) {
  using Sinkhorn = moe::SinkhornRouter<double>;
  Rng rng(31);
  const auto level = [&](Index experts) {
    return Sinkhorn({.d_model = kDModel, .num_experts = experts, .top_k = 1}, rng);
  };
  const TopK plain({.d_model = kDModel, .num_experts = 2, .top_k = 2}, rng);
  const std::vector<Sinkhorn> children{level(3), level(3)};
  const Matrix<double> x = normal_matrix<double>(24, kDModel, rng);
  const BatchInfo info{.group_begin = moe::IndexVector{{0, 5, 24}}};
  const auto check = [&](const auto& router) {
    moe::Routing<double> whole, alone, one_group;
    Rng draws(1);
    router.route(x, draws, info, whole, Sequential{});
    router.route(x, draws, {}, one_group, Sequential{});
    for (Index g = 0; g < 2; ++g) {
      const Index begin = info.group_begin[g], count = info.group_begin[g + 1] - begin;
      router.route(x.middleRows(begin, count), draws, {}, alone, Sequential{});
      for (Index t = 0; t < count; ++t) {
        const Index from = whole.chosen.token_begin[begin + t], to = whole.chosen.token_begin[begin + t + 1];
        const Index first = alone.chosen.token_begin[t];
        ASSERT_EQ(to - from, alone.chosen.token_begin[t + 1] - first);
        for (Index c = from; c < to; ++c) {
          EXPECT_EQ(whole.chosen.expert[c], alone.chosen.expert[first + c - from])
              << "group " << g << ", token " << t;
          EXPECT_EQ(whole.chosen.gate[c], alone.chosen.gate[first + c - from])
              << "group " << g << ", token " << t;
        }
      }
    }
    EXPECT_NE(whole.chosen.expert, one_group.chosen.expert);  // or the test shows nothing
  };
  check(Hierarchy<TopK, Sinkhorn>(plain, children));
  check(Hierarchy<Sinkhorn>(level(2), children));
}

TYPED_TEST(HierarchicalRouter, ARoutingAndACacheCanBeReused) {
  Rng rng(15);
  typename LayerOf<TypeParam>::Workspace workspace;
  typename LayerOf<TypeParam>::Cache cache;
  moe::Routing<double> routing;
  Matrix<double> y, d_x;
  for (const Shape& shape : {Shape{}, Shape{.groups = 2, .experts = 2, .parent_k = 1, .child_k = 1}, Shape{}})
    for (const Index tokens : {9, 0, 14}) {
      const auto layer = make_layer<TypeParam>(shape, rng);
      const Matrix<double> x = normal_matrix<double>(tokens, kDModel, rng);
      const Matrix<double> fresh_y = layer.forward(x, {}, Sequential{});
      layer.forward(x, y, workspace, {}, Sequential{});
      EXPECT_TRUE(same_bits(y, fresh_y));
      layer.forward(x, y, cache, {}, Sequential{});
      EXPECT_TRUE(same_bits(y, fresh_y));
      layer.router().route(x, {}, routing, Sequential{});
      expect_same_routing(routing, route(layer.router(), x));
      typename LayerOf<TypeParam>::Cache fresh;
      layer.forward(x, fresh, {}, Sequential{});
      auto grad = moe::zeros_like(layer), other = grad;
      const auto losses = moe::load_balancing_loss(cache.routing).gradient;
      layer.backward(y, cache, grad, losses, d_x, Sequential{});
      EXPECT_TRUE(same_bits(layer.backward(y, fresh, other, losses, Sequential{}), d_x));
      expect_same_parameters(grad, other);
    }
  // A flat router leaves nothing of the levels behind.
  make_level<TopK>(3, 2, true, rng).route(normal_matrix<double>(4, kDModel, rng), {}, routing);
  EXPECT_TRUE(routing.levels.empty());
}

TYPED_TEST(HierarchicalRouter, BackwardAddsAndCanBeRepeated) {
  Rng rng(16);
  const auto layer = make_layer<TypeParam>({}, rng);
  const Matrix<double> x = normal_matrix<double>(11, kDModel, rng);
  Step step(layer, x, x, rng, {}, Sequential{});
  auto once = moe::zeros_like(layer), twice = once;
  const Matrix<double> d_x = layer.backward(x, step.cache, once, {}, Sequential{});
  for (int i = 0; i < 2; ++i)
    EXPECT_TRUE(same_bits(layer.backward(x, step.cache, twice, {}, Sequential{}), d_x));
  LayerOf<TypeParam>::visit(
      [](const moe::ParameterInfo& info, const auto& a, const auto& b) {
        EXPECT_TRUE(laws::equal_to_rounding(Matrix<double>(b), Matrix<double>(2 * a))) << info.name;
      },
      once, twice);
}

TYPED_TEST(HierarchicalRouter, ThreadsChangeNoBit) {
  Rng rng(17);
  const auto layer = make_layer<TypeParam>({}, rng);
  const Matrix<double> x = normal_matrix<double>(300, kDModel, rng);
  const Matrix<double> d_y = normal_matrix<double>(300, kDModel, rng);
  const Step one(layer, x, d_y, rng, {}, Sequential{});
#ifdef _OPENMP
  for (const int threads : {1, 2, 3, 8}) {
    const Step other(layer, x, d_y, rng, {}, moe::OpenMP{threads});
    EXPECT_TRUE(same_bits(other.y, one.y));
    EXPECT_TRUE(same_bits(other.d_x, one.d_x));
    EXPECT_EQ(other.loss, one.loss);
    expect_same_parameters(other.grad, one.grad);
    expect_same_routing(other.cache.routing, one.cache.routing);
  }
#endif
}

// ---- Parameters and errors.

TEST(HierarchicalRouterParameters, HaveNames) {
  Rng rng(18);
  const auto names = [](const auto& router) {
    std::vector<std::string> all;
    std::decay_t<decltype(router)>::visit(
        [&](const moe::ParameterInfo& info, const auto&) { all.emplace_back(info.name); }, router);
    return all;
  };
  EXPECT_THAT(names(Make<Hierarchy<TopK, Noisy>>::router({.groups = 2, .parent_k = 1}, rng)),
              testing::ElementsAre("parent.w_router", "children.0.w_router", "children.0.w_noise",
                                   "children.1.w_router", "children.1.w_noise"));
  EXPECT_THAT(names(Make<Nested>::router({.groups = 1, .parent_k = 1}, rng)),
              testing::ElementsAre("parent.w_router", "children.0.parent.w_router",
                                   "children.0.children.0.w_router", "children.0.children.1.w_router"));
  // Deeper than what fits on the stack.
  using Deep =
      Hierarchy<TopK, Hierarchy<TopK, Hierarchy<TopK, Hierarchy<TopK, Hierarchy<TopK, Hierarchy<TopK>>>>>>;
  const TopK one({.d_model = 1, .num_experts = 1, .top_k = 1});
  const Deep deep(one, {{one, {{one, {{one, {{one, {{one, {one}}}}}}}}}}});
  EXPECT_EQ(names(deep).back(), "children.0.children.0.children.0.children.0.children.0.children.0.w_router");
}

TEST(HierarchicalRouterErrors, PartsThatDoNotFit) {
  const auto level = [](Index d_model, Index experts) {
    return TopK({.d_model = d_model, .num_experts = experts, .top_k = 1});
  };
  const auto expect = [](const auto& make, const char* message) {
    EXPECT_THAT(make, ThrowsMessage<std::invalid_argument>(HasSubstr(message)));
  };
  using Router = Hierarchy<TopK>;
  expect(
      [&] {
        Router(level(4, 3), {level(4, 2), level(4, 2)});
      },
      "2 children, but the parent has num_experts = 3");
  expect([&] { Router(level(4, 1), {}); }, "0 children, but the parent has num_experts = 1");
  expect(
      [&] {
        Router(level(4, 2), {level(4, 2), level(5, 2)});
      },
      "child 1 has d_model = 5, but the parent has 4");
  expect(
      [&] {
        Router(level(4, 2), {level(4, 2), level(4, 3)});
      },
      "child 1 has num_experts = 3, but child 0 has 2");
  const TopK seated({.d_model = 4, .num_experts = 2, .top_k = 1, .capacity = 1.5});
  const TopK in_training({.d_model = 4, .num_experts = 2, .top_k = 1, .training_capacity = 2.5});
  expect([&] { Router(seated, {level(4, 2), level(4, 2)}); }, "the parent has capacity = 1.5");
  expect([&] { Router(level(4, 2), {level(4, 2), in_training}); }, "child 1 has training_capacity = 2.5");
  Rng rng(19);
  using Choice = moe::ExpertChoiceRouter<double>;
  const Choice choice({.d_model = 4, .num_experts = 2}, rng);
  expect([&] { Hierarchy<Choice, TopK>(choice, {level(4, 2), level(4, 2)}); }, "the parent has capacity = 2");
}

TEST(HierarchicalRouterErrors, CallsThatDoNotFit) {
  Rng rng(20);
  auto router = Make<Hierarchy<TopK>>::router({}, rng);
  const Matrix<double> x = normal_matrix<double>(5, kDModel, rng);
  moe::Routing<double> routing = route(router, x);
  Matrix<double> d_x = Matrix<double>::Zero(5, kDModel);
  auto grad = moe::zeros_like(router);
  const auto expect = [](const auto& call, const char* message) {
    EXPECT_THAT(call, ThrowsMessage<std::invalid_argument>(HasSubstr(message)));
  };
  expect([&] { route(router, Matrix<double>::Zero(5, 3)); }, "x has shape [5, 3], expected [5, 4]");
  const auto backward = [&] { router.backward(x, routing, {}, d_x, grad); };
  routing.levels.pop_back();
  expect(backward, "the routing has 3 levels, expected 1 + 3 children");
  routing = route(router, x);
  std::swap(routing.levels[1], routing.levels[2]);
  expect(backward, "token");
  routing = route(router, x);
  routing.chosen.expert[0] = (routing.chosen.expert[0] + 1) % 12;
  expect(backward, "token 0");
  routing = route(router, x);
  expect([&] { router.backward_levels(x, routing, {}, d_x, grad); }, "0 gradients, expected 1 + 3 children");
  moe::RoutingGradient<double> wrong;
  wrong.d_router_probs.setZero(5, 11);
  expect([&] { router.backward(x, routing, wrong, d_x, grad); }, "d_router_probs has shape [5, 11]");
  auto smaller = Make<Hierarchy<TopK>>::router({.groups = 2}, rng);
  expect([&] { router.backward(x, routing, {}, d_x, smaller); }, "2 children beside 3");
  router.children()[1].add_expert(moe::Vector<double>::Zero(kDModel));
  expect([&] { route(router, x); }, "child 1 has num_experts = 5, but child 0 has 4");
  EXPECT_NO_THROW(route(Make<Nested>::router({}, rng), x));

  // Where gates would be constant, a level refuses to train.
  const TopK constant({.d_model = 4, .num_experts = 2, .top_k = 1, .renormalise = true});
  const Hierarchy<TopK> untrainable(constant, {constant, constant});
  EXPECT_NO_THROW(route(untrainable, x));
  expect([&] { untrainable.route(x, rng, {}, routing); }, "top_k = 1 of num_experts = 2");
}

// A router that drops although its options do not say so.
struct Dropping : TopK {
  using TopK::TopK;
  int options() const { return 0; }
};

TEST(HierarchicalRouterErrors, ALevelThatDrops) {
  const TopK parent({.d_model = 1, .num_experts = 1, .top_k = 1});
  const Dropping child({.d_model = 1, .num_experts = 2, .top_k = 1, .capacity = 1.0});
  const Hierarchy<TopK, Dropping> router(parent, {child});
  EXPECT_THAT([&] { route(router, Matrix<double>::Ones(4, 1)); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("child 0 seated 2 of 4 choices")));
}

// What scales inputs and says so in its plan alone.
struct Silent : TopK {
  using TopK::TopK;
  void options() const = delete;
};

// Levels whose gates scale different sides are refused when they meet; those that all scale inputs are not.
TEST(HierarchicalRouterErrors, GateSides) {
  Rng rng(21);
  const auto level = [&](moe::GateSide side) {
    return TopK({.d_model = 4, .num_experts = 2, .top_k = 2, .gate_side = side}, rng);
  };
  const TopK input = level(moe::GateSide::input), output = level(moe::GateSide::output);
  const Matrix<double> x = normal_matrix<double>(5, 4, rng);
  EXPECT_EQ(route(Hierarchy<TopK>(input, {input, input}), x).plan.gate_side, moe::GateSide::input);
  EXPECT_THAT(
      [&] {
        Hierarchy<TopK>(input, {input, output});
      },
      ThrowsMessage<std::invalid_argument>(HasSubstr("gates of child 1 and of the parent")));
  EXPECT_THROW(Hierarchy<TopK>(output, {input, input}), std::invalid_argument);
  const Silent silent({.d_model = 4, .num_experts = 2, .top_k = 2, .gate_side = moe::GateSide::input}, rng);
  EXPECT_EQ(route(Hierarchy<TopK, Silent>(input, {silent, silent}), x).plan.gate_side, moe::GateSide::input);
  EXPECT_THROW(route(Hierarchy<TopK, Silent>(output, {silent, silent}), x), std::invalid_argument);
}

}  // namespace
}  // namespace hierarchical_router_test
