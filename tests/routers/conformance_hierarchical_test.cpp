// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#include <moe/moe.hpp>

#include "router_laws.hpp"

// Routers of routers have logits at their levels only: the laws about logits are below.
namespace laws {
namespace {

template <class S>
using Tree = moe::HierarchicalRouter<moe::NoisyTopKRouter<S>, moe::TopKRouter<S>>;

// Two levels over all experts of the wish. A token's top_k experts are in as many groups, or in one.
template <class S>
Tree<S> make_tree(const Wish& wish, bool many_groups, Rng& rng) {
  const bool even = wish.num_experts % 2 == 0;
  const Index groups = many_groups ? (even ? 2 : wish.num_experts) : even ? wish.num_experts / 2 : 1;
  Wish of_groups = wish, of_leaves = wish;
  of_groups.num_experts = groups;
  of_leaves.num_experts = wish.num_experts / groups;
  (many_groups ? of_leaves : of_groups).top_k = 1;
  const auto options = token_choice_options<moe::TopKOptions>;
  moe::TopKOptions child = options(of_leaves);
  child.renormalise = !many_groups;
  child.jitter = 0.1;
  std::vector<moe::TopKRouter<S>> children;
  for (Index i = 0; i < groups; ++i) children.emplace_back(child, rng);
  return {{token_choice_options<moe::NoisyTopKOptions>(of_groups), rng}, std::move(children)};
}

template <class S>
struct OneOfEachGroup {
  using Router = Tree<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false, kExpertsAreAlike = false,
                        kHasCapacity = false;
  static constexpr Index kFixedTopK = 2;
  static Router make(const Wish& wish, Rng& rng) { return make_tree<S>(wish, true, rng); }
};

template <class S>
struct AllOfOneGroup {
  using Router = Tree<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = true, kExpertsAreAlike = false,
                        kHasCapacity = false;
  static constexpr Index kFixedTopK = 2;
  static Router make(const Wish& wish, Rng& rng) { return make_tree<S>(wish, false, rng); }
};

[[maybe_unused]] const bool conformance_hierarchical_checked =
    check_routers<OneOfEachGroup<float>, OneOfEachGroup<double>,  //
                  AllOfOneGroup<float>, AllOfOneGroup<double>>("Hierarchical");

// ---- The laws about logits, and those that a tree has in its own way.

template <class S>
class HierarchicalRouterLaws : public testing::Test {};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(HierarchicalRouterLaws, Scalars);

// The routing of exactly these logits of two groups and of their two leaves each.
template <class S>
moe::Routing<S> route_logits(Index top_k, bool many_groups, const Matrix<S>& of_groups,
                             const Matrix<S>& of_leaves) {
  const S huge = sizeof(S) == 4 ? S(0x1p100) : S(0x1p600);
  Rng rng(1);
  Tree<S> router = make_tree<S>({.d_model = 6, .num_experts = 4, .top_k = top_k}, many_groups, rng);
  const Matrix<S> columns = huge * Matrix<S>::Identity(6, 6);
  router.parent().w_router = columns.topRows(2);
  router.children()[0].w_router = columns.middleRows(2, 2);
  router.children()[1].w_router = columns.bottomRows(2);
  Matrix<S> logits(of_groups.rows(), 6);
  logits << of_groups, of_leaves;
  Matrix<S> x = logits / huge;
  for (Index i = 0; i < x.size(); ++i)
    if (logits.data()[i] == -reference::kInfinity<S>) x.data()[i] = -huge;
  const moe::Routing<S> routing = RouterKind<Tree<S>>::route(router, x);
  for (Index t = 0; t < x.rows(); ++t)
    if (routing.is_valid(t)) {
      EXPECT_EQ(routing.levels[0].router_logits.row(t), of_groups.row(t));
    }
  return routing;
}

// y = sum over i, j of G_i(x) G_ij(x) E_ij(x) by loops: two groups of three, the best of each.
TYPED_TEST(HierarchicalRouterLaws, OutputsAreTheFormula) {
  using S = TypeParam;
  Rng rng(30);
  const auto kind = RouterKind<Tree<S>>::template of<OneOfEachGroup<S>>();
  const auto layer = kind.make_layer({.d_model = 6, .num_experts = 6, .top_k = 2}, rng);
  const Tree<S>& router = layer.router();
  const Matrix<S> x = normal_matrix<S>(17, 6, rng);
  const Matrix<S> z = reference::logits(x, router.parent().w_router);
  Matrix<S> y = Matrix<S>::Zero(17, 6);
  for (Index t = 0; t < 17; ++t)
    for (Index i = 0; i < 2; ++i) {
      const Matrix<S> zi = reference::logits(x, router.children()[std::size_t(i)].w_router);
      const Index j = reference::best_expert(zi, t, {});
      const S gate = reference::gate_of(z, t, i, true, {0, 1}) * reference::gate_of(zi, t, j, false, {j});
      y.row(t) +=
          gate * reference::expert_output(layer.experts()[std::size_t(i * 3 + j)], reference::row_of(x, t))
                     .transpose();
    }
  EXPECT_TRUE(equal_to_rounding(kind.forward(layer, x), y));
}

// Groups may change places, and experts within their group.
TYPED_TEST(HierarchicalRouterLaws, RelabellingExpertsWithinTheTreeChangesNothing) {
  using S = TypeParam;
  Rng rng(31);
  for (const auto& kind : {RouterKind<Tree<S>>::template of<OneOfEachGroup<S>>(),
                           RouterKind<Tree<S>>::template of<AllOfOneGroup<S>>()})
    for (int round = 0; round < 5; ++round) {
      const auto layer = kind.make_layer({.d_model = 6, .num_experts = 6, .top_k = 2}, rng);
      auto relabelled = layer;
      const Tree<S>& from = layer.router();
      Tree<S>& to = relabelled.router();
      const Index groups = from.num_children(), leaves = 6 / groups;
      const std::vector<Index> order = shuffled(groups, rng);
      to.parent().w_router = take_rows(from.parent().w_router, order);
      for (Index i = 0; i < groups; ++i) {
        const Index group = order[std::size_t(i)];
        const std::vector<Index> of_leaves = shuffled(leaves, rng);
        to.children()[std::size_t(i)].w_router =
            take_rows(from.children()[std::size_t(group)].w_router, of_leaves);
        for (Index j = 0; j < leaves; ++j)
          relabelled.experts()[std::size_t(i * leaves + j)] =
              layer.experts()[std::size_t(group * leaves + of_leaves[std::size_t(j)])];
      }
      const Matrix<S> x = normal_matrix<S>(23, 6, rng);
      EXPECT_TRUE(equal_to_rounding(kind.forward(relabelled, x), kind.forward(layer, x)));
    }
}

TYPED_TEST(HierarchicalRouterLaws, AllTokensMayWantOneExpert) {
  using S = TypeParam;
  const Matrix<S> of_groups = Matrix<S>{{0, 5}}.replicate(10, 1),
                  of_leaves = Matrix<S>{{0, 1, 5, 0}}.replicate(10, 1);
  const auto loads = [&](Index top_k, bool many_groups) {
    return moe::tokens_per_expert(route_logits(top_k, many_groups, of_groups, of_leaves));
  };
  EXPECT_EQ(loads(1, true), moe::IndexVector({{0, 0, 10, 0}}));
  EXPECT_EQ(loads(2, true), moe::IndexVector({{0, 10, 10, 0}}));
  EXPECT_EQ(loads(2, false), moe::IndexVector({{0, 0, 10, 10}}));
}

TYPED_TEST(HierarchicalRouterLaws, TiesGoToTheLowerExpertOfTheLowerGroup) {
  using S = TypeParam;
  const Matrix<S> of_groups = Matrix<S>::Zero(3, 2), of_leaves = Matrix<S>::Zero(3, 4);
  for (const bool many_groups : {true, false}) {
    const auto routing = route_logits(2, many_groups, of_groups, of_leaves);
    for (Index t = 0; t < 3; ++t)
      EXPECT_EQ(chosen_by(routing, t), (std::vector<Index>{0, many_groups ? 2 : 1}));
  }
}

TYPED_TEST(HierarchicalRouterLaws, UnavailableExpertsAreNeverUsed) {
  using S = TypeParam;
  constexpr S kNever = -reference::kInfinity<S>;
  // Token 0 may use one expert of each group, token 1 no expert of group 1 by the parent's word, and
  // token 2 none of group 0 by the child's, whose group it does not want.
  const Matrix<S> of_groups{{1, 0}, {1, kNever}, {0, 1}};
  const Matrix<S> of_leaves{{kNever, 0, 0, kNever}, {1, 2, 3, 4}, {kNever, kNever, 1, 2}};
  const auto expect = [](const auto& routing, Index t, const std::vector<Index>& experts) {
    EXPECT_EQ(routing.plan.token_state[t], TokenState::valid) << "token " << t;
    EXPECT_EQ(chosen_by(routing, t), experts) << "token " << t;
    for (const Seat& seat : seats_of(routing.plan)) EXPECT_TRUE(std::isfinite(seat.gate));
  };
  const auto many = route_logits(2, true, of_groups, of_leaves);
  expect(many, 0, {1, 2});
  expect(many, 1, {1});
  const auto one = route_logits(2, false, of_groups, of_leaves);
  expect(one, 0, {1});
  expect(one, 1, {1, 0});
  expect(one, 2, {3, 2});
  for (const auto& routing : {many, one})
    for (const auto& [t, e] : {std::pair<Index, Index>{0, 0}, {1, 2}, {1, 3}})
      EXPECT_EQ(routing.router_probs(t, e), 0) << "token " << t << ", expert " << e;
  // What a child did not see it does not exclude: its leaves share their group's probability.
  EXPECT_GT(one.router_probs(2, 0), 0);
}

// The parent does not know what its children can not do.
TYPED_TEST(HierarchicalRouterLaws, ATokenWhoseGroupHasNoAvailableExpertIsPoisoned) {
  using S = TypeParam;
  constexpr S kNever = -reference::kInfinity<S>;
  const Matrix<S> of_groups{{2, 1}, {2, 1}, {1, 2}};
  const Matrix<S> of_leaves{{kNever, kNever, 0, 1}, {0, 1, kNever, kNever}, {kNever, kNever, 0, 1}};
  for (const bool many_groups : {true, false}) {
    const auto routing = route_logits(2, many_groups, of_groups, of_leaves);
    EXPECT_EQ(routing.plan.token_state[0], TokenState::poisoned);
    for (const Index t : {1, 2})  // one group is enough where one is chosen
      EXPECT_EQ(routing.plan.token_state[t], many_groups ? TokenState::poisoned : TokenState::valid);
    EXPECT_EQ(routing.plan.num_assignments(), many_groups ? 0 : 4);
    EXPECT_EQ(routing.levels[0].plan.num_valid_tokens(), many_groups ? 0 : 2);
  }
}

}  // namespace

}  // namespace laws
