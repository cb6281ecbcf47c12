// SPDX-License-Identifier: MIT
// A router without some of its experts is the router made of the rows that are left, and a layer with it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <moe/moe.hpp>

#include "laws.hpp"

namespace moe::remove_experts_test {
namespace {

using laws::same_bits;

constexpr Index kModel = 6;

// The rows of m that `left` names, by another way than the library's.
template <class M>
M rows_of(const M& m, const std::vector<Index>& left) {
  if (m.size() == 0) return m;
  return m(left, Eigen::all);
}

template <class S>
testing::AssertionResult same_routing(const Routing<S>& a, const Routing<S>& b) {
  if (!(a.plan == b.plan) || !(a.chosen == b.chosen)) return testing::AssertionFailure() << "other choices";
  const auto logits = same_bits(a.router_logits, b.router_logits);
  return logits ? same_bits(a.router_probs, b.router_probs) : logits;
}

// `router` without `gone` routes as `expected`, which has the rows that are left.
template <class Router>
void expect_pruned(Router router, const std::vector<Index>& gone, const Router& expected) {
  router.remove_experts(gone);
  EXPECT_EQ(router.num_experts(), expected.num_experts());
  EXPECT_EQ(router.options().num_experts, expected.num_experts());
  Router::visit([](const ParameterInfo& info, const auto& a, const auto& b) { EXPECT_EQ(a, b) << info.name; },
                router, expected);
  Rng draws(5);
  const Matrix<double> x = laws::normal_matrix<double>(40, kModel, draws);
  BatchInfo info;
  info.mask = Mask::Constant(40, true);
  info.mask[3] = false;
  Routing<double> a, b;
  router.route(x, info, a);
  expected.route(x, info, b);
  EXPECT_TRUE(same_routing(a, b)) << "inference";
  Rng one(6), other(6);
  RouterWorkspace<double> workspace;
  route_with(router, x, one, info, a, workspace, Sequential{});
  route_with(expected, x, other, info, b, workspace, Sequential{});
  EXPECT_TRUE(same_routing(a, b)) << "training";
  Router grad = zeros_like(router), expected_grad = zeros_like(expected);
  RoutingGradient<double> gradient;
  gradient.d_router_probs = laws::normal_matrix<double>(40, router.num_experts(), draws);
  Matrix<double> d_x = Matrix<double>::Zero(40, kModel), expected_d_x = d_x;
  router.backward(x, a, gradient, d_x, grad);
  expected.backward(x, b, gradient, expected_d_x, expected_grad);
  EXPECT_TRUE(same_bits(d_x, expected_d_x));
}

// The experts of 0 to n - 1 that are not among `gone`.
std::vector<Index> others(Index n, const std::vector<Index>& gone) {
  std::vector<Index> left;
  for (Index e = 0; e < n; ++e)
    if (std::find(gone.begin(), gone.end(), e) == gone.end()) left.push_back(e);
  return left;
}

template <class Router>
class RemoveExpertsOf : public testing::Test {};
using Routers = testing::Types<TopKRouter<double>, NoisyTopKRouter<double>, ExpertChoiceRouter<double>,
                               SinkhornRouter<double>, SparseMixerRouter<double>>;
TYPED_TEST_SUITE(RemoveExpertsOf, Routers);

template <class Router>
Router make_router(Index experts) {
  Rng rng(2);
  Router router({.d_model = kModel, .num_experts = experts}, rng);
  laws::randomise(router, rng);
  return router;
}

template <class F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TYPED_TEST(RemoveExpertsOf, ARouterLeavesTheRouterOfTheOthers) {
  for (const std::vector<Index>& gone :
       {std::vector<Index>{}, {4}, {0}, {8}, {7, 0, 3}, {0, 1, 2, 3}, {8, 7, 6, 5}, {8, 0, 2, 6, 4}}) {
    SCOPED_TRACE(testing::PrintToString(gone));
    const TypeParam router = make_router<TypeParam>(9);
    const std::vector<Index> left = others(9, gone);
    TypeParam expected({.d_model = kModel, .num_experts = Index(left.size())});
    expected.w_router = rows_of(router.w_router, left);
    if constexpr (requires { router.w_noise; }) expected.w_noise = rows_of(router.w_noise, left);
    expect_pruned(router, gone, expected);
  }
}

TYPED_TEST(RemoveExpertsOf, ARouterIsRemovalOfOneAfterTheOther) {
  TypeParam at_once = make_router<TypeParam>(9), in_turn = at_once;
  at_once.remove_experts({6, 1, 4});
  for (const Index e : {6, 4, 1}) in_turn.remove_expert(e);  // from behind: numbers stay
  TypeParam::visit(
      [](const ParameterInfo& info, const auto& a, const auto& b) { EXPECT_EQ(a, b) << info.name; }, at_once,
      in_turn);
}

TYPED_TEST(RemoveExpertsOf, ARouterThrowsAndChangesNothing) {
  TypeParam router = make_router<TypeParam>(4);
  const TypeParam before = router;
  const auto message = [&](const std::vector<Index>& gone) {
    const std::string what = message_of([&] { router.remove_experts(gone); });
    EXPECT_EQ(router.num_experts(), 4);
    EXPECT_EQ(router.options().num_experts, 4);
    TypeParam::visit([](const ParameterInfo&, const auto& a, const auto& b) { EXPECT_EQ(a, b); }, router,
                     before);
    return what;
  };
  EXPECT_THAT(message({1, 4}), testing::EndsWith("Router::remove_experts: expert 4 of 4"));
  EXPECT_THAT(message({1, -1}), testing::EndsWith("Router::remove_experts: expert -1 of 4"));
  EXPECT_THAT(message({2, 0, 2}),
              testing::EndsWith("remove_experts: expert 2 is twice among the 3 to remove"));
  EXPECT_THAT(message({0, 1, 2, 3}), testing::HasSubstr("remove_experts: 0 of 4 experts, and at least "));
}

using TopK = TopKRouter<double>;

// DeepSeek-V3's router: without one expert its 8 groups are not of one size.
TEST(RemoveExperts, OfARouterWithAGroupLimitGoAtOnce) {
  TopKOptions options{.d_model = kModel,
                      .num_experts = 256,
                      .top_k = 8,
                      .score = Score::sigmoid,
                      .renormalise = true,
                      .bias = true,
                      .selection_bias = true,
                      .group_limit = {.groups = 8, .kept = 4, .score = GroupScore::top_two_sum},
                      .noise_stddev = 0.1,
                      .jitter = 0.1,
                      .training_capacity = 1.0};
  Rng rng(1);
  TopK router(options, rng);
  laws::randomise(router, rng);
  EXPECT_EQ(message_of([&] { TopK(router).remove_expert(0); }),
            "TopKRouter::remove_experts: 8 groups do not divide num_experts = 255");
  std::vector<Index> gone;
  for (Index g = 8; g-- > 0;) gone.push_back(32 * g + (5 * g) % 32);  // another one of each group
  const std::vector<Index> left = others(256, gone);
  options.num_experts = 248;
  TopK expected(options);
  expected.w_router = rows_of(router.w_router, left);
  expected.b_router = rows_of(router.b_router, left);
  expected.selection_bias = rows_of(router.selection_bias, left);
  expect_pruned(router, gone, expected);
  // An expert that no token may choose is missed by nobody: the same choices but for their numbers.
  router.selection_bias(gone).setConstant(-1000);
  Routing<double> with, without;
  const Matrix<double> x = laws::normal_matrix<double>(50, kModel, rng);
  router.route(x, {}, with);
  router.remove_experts(gone);
  router.route(x, {}, without);
  ASSERT_EQ(with.chosen.size(), without.chosen.size());
  for (Index c = 0; c < with.chosen.size(); ++c) {
    EXPECT_EQ(with.chosen.expert[c], left[std::size_t(without.chosen.expert[c])]);
    EXPECT_EQ(with.chosen.gate[c], without.chosen.gate[c]);
  }
}

TEST(RemoveExperts, OfAParameterOfAnotherSizeIsRefused) {
  Rng rng(1);
  TopK router({.d_model = kModel, .num_experts = 4, .bias = true}, rng);
  router.b_router.setZero(3);
  EXPECT_EQ(message_of([&] { router.remove_experts({3}); }),
            "TopKRouter::remove_experts: b_router has shape [3, 1], expected [4, 1]");
  EXPECT_EQ(router.num_experts(), 4);
}

// ---- Layers.

using Layer = MoELayer<FeedForward<double>, TopK>;

Layer make_layer(Index experts) {
  Rng rng(3);
  const FeedForward<double>::Options options{.d_model = kModel, .d_ff = 5};
  Layer layer(make_experts<FeedForward<double>>(experts, options, rng), make_router<TopK>(experts),
              {make_experts<FeedForward<double>>(2, options, rng), true}, true);
  laws::randomise(layer, rng);
  return layer;
}

TEST(RemoveExperts, OfALayerLeavesTheLayerOfTheOthers) {
  const Layer whole = make_layer(7);
  Layer layer = whole;
  layer.remove_experts({5, 0, 2});
  TopK router({.d_model = kModel, .num_experts = 4});
  std::vector<FeedForward<double>> left, shared(whole.shared_experts().begin(), whole.shared_experts().end());
  for (const Index e : {1, 3, 4, 6}) {
    router.w_router.row(Index(left.size())) = whole.router().w_router.row(e);
    left.push_back(whole.experts()[std::size_t(e)]);
  }
  Layer expected(left, router, {shared, true}, true);
  expected.w_shared_gate = whole.w_shared_gate;
  expected.b_output = whole.b_output;
  EXPECT_EQ(layer.num_experts(), 4);
  EXPECT_EQ(layer.num_shared_experts(), 2);
  Layer::visit([](const ParameterInfo& info, const auto& a, const auto& b) { EXPECT_EQ(a, b) << info.name; },
               layer, expected);
  Rng rng(4);
  const Matrix<double> x = laws::normal_matrix<double>(30, kModel, rng);
  Layer::Cache cache, expected_cache;
  Layer grad = zeros_like(layer), expected_grad = zeros_like(expected);
  EXPECT_TRUE(same_bits(layer.forward(x, cache), expected.forward(x, expected_cache)));
  EXPECT_TRUE(same_bits(layer.backward(x, cache, grad), expected.backward(x, expected_cache, expected_grad)));
}

TEST(RemoveExperts, OfALayerThrowsAndChangesNothing) {
  Layer layer = make_layer(4);
  const Layer before = layer;
  for (const std::vector<Index>& gone : {std::vector<Index>{4}, {-1}, {1, 1}, {0, 1, 2}}) {
    EXPECT_THROW(layer.remove_experts(gone), std::invalid_argument);
    Layer::visit([](const ParameterInfo&, const auto& a, const auto& b) { EXPECT_EQ(a, b); }, layer, before);
  }
  layer.remove_experts({});
  EXPECT_EQ(layer.num_experts(), 4);
}

// An expert whose copies fail, now and then, and which has no other way to move.
struct Immovable {
  using Scalar = double;
  static inline int copies = 1000;  // until one fails
  double factor = 1;
  explicit Immovable(double f) : factor(f) {}
  Immovable(const Immovable& other) : factor(other.factor) {
    if (copies-- == 0) throw std::runtime_error("out of memory");
  }
  Immovable& operator=(const Immovable& other) {
    if (copies-- == 0) throw std::runtime_error("out of memory");
    factor = other.factor;
    return *this;
  }
  Index d_model() const { return kModel; }
  void forward(const ConstMatrixRef<double>& x, MatrixRef<double> y) const { y = factor * x; }
};

// A router of one's own that removes one expert at a time.
struct OneAtATime : TopK {
  using TopK::TopK;
  void remove_experts(const std::vector<Index>&) = delete;
  void remove_expert(Index expert) { TopK::remove_expert(expert); }
};

TEST(RemoveExperts, ARouterMayKnowHowToRemoveOneAlone) {
  Rng rng(9);
  using Expert = CopyExpert<double>;
  MoELayer<Expert, OneAtATime> layer(std::vector<Expert>(4, Expert({.d_model = kModel})),
                                     OneAtATime({.d_model = kModel, .num_experts = 4}, rng));
  const Matrix<double> before = layer.router().w_router;
  layer.remove_expert(1);
  EXPECT_EQ(layer.num_experts(), 3);
  EXPECT_EQ(layer.router().w_router, rows_of(before, {0, 2, 3}));
}

TEST(RemoveExperts, AnExceptionOnTheWayLeavesTheLayerAsItWas) {
  for (int fails = 0; fails < 3; ++fails) {
    Immovable::copies = 1000;
    std::vector<Immovable> experts;
    for (int e = 0; e < 5; ++e) experts.emplace_back(e);
    MoELayer<Immovable, TopK> layer(experts, make_router<TopK>(5));
    Immovable::copies = fails;
    EXPECT_THROW(layer.remove_experts({0, 3}), std::runtime_error);
    Immovable::copies = 1000;
    ASSERT_EQ(layer.num_experts(), 5);
    EXPECT_EQ(layer.router().num_experts(), 5);
    for (int e = 0; e < 5; ++e) EXPECT_EQ(layer.experts()[std::size_t(e)].factor, e);
    layer.remove_experts({0, 3});
    EXPECT_EQ(layer.experts()[2].factor, 4);
  }
}

}  // namespace
}  // namespace moe::remove_experts_test
