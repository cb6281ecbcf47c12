// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <moe/moe.hpp>

#include "laws.hpp"
#include "reference_moe.hpp"

// The laws that every router obeys. A new router needs a struct as below, and a line:
//   const bool checked = check_routers<MyTraits<float>, MyTraits<double>>("Mine");
//
//   template <class S>
//   struct MyTraits {
//     using Router = ...;
//     static constexpr bool kTokensChoose = ...;   // or do experts choose tokens?
//     static constexpr bool kGatesSumToOne = ...;  // gates of what a token chose
//     static Router make(const laws::Wish& wish, moe::Rng& rng);
//     // Only where gates are neither probabilities nor have a sum of 1: the gate of expert e when
//     the
//     // experts `among` are in use.
//     static S gate(const Matrix<S>& z, Index t, Index e, const std::vector<Index>& among);
//     // Only where experts are not all alike: their numbers mean something.
//     static constexpr bool kExpertsAreAlike = false;
//     // Only where a token may choose fewer than top_k experts; and where seats do not follow from
//     // the choices that were made.
//     static constexpr bool kIsDynamic = true, kSeatsFollowTopK = true;
//     // Only where, in training, a token's choices depend on other tokens though tokens choose.
//     static constexpr bool kTrainingCouplesTokens = true;
//     // Only where there is no choice of top_k, or no capacity.
//     static constexpr Index kFixedTopK = 2;
//     static constexpr bool kHasCapacity = false;
//   };
//
// A router without a w_router, which is one of routers, is spared the laws about logits.
namespace laws {

using moe::BatchInfo;
using moe::Overflow;
using moe::Priority;
using moe::Sequential;
using moe::TokenState;

// What a law asks of a router. Experts have ceil(capacity * top_k * tokens / num_experts) seats.
struct Wish {
  Index d_model = 5, num_experts = 4, top_k = 2;
  std::optional<double> capacity{};  // none: dropless
  Overflow overflow = Overflow::drop;
  Priority priority = Priority::token_order;
};

// The options of a router in which tokens choose.
template <class Options>
Options token_choice_options(const Wish& wish) {
  Options options;
  options.d_model = wish.d_model;
  options.num_experts = wish.num_experts;
  options.top_k = wish.top_k;
  options.capacity = options.training_capacity = wish.capacity;
  options.overflow = wish.overflow;
  options.priority = wish.priority;
  if constexpr (requires { options.allow_constant_gate; }) options.allow_constant_gate = true;
  return options;
}

// The rows of m in the order of `rows`.
template <class S>
Matrix<S> take_rows(const Matrix<S>& m, const std::vector<Index>& rows) {
  Matrix<S> taken(Index(rows.size()), m.cols());
  for (Index i = 0; i < taken.rows(); ++i) taken.row(i) = m.row(rows[std::size_t(i)]);
  return taken;
}

inline std::vector<Index> shuffled(Index n, Rng& rng) {
  std::vector<Index> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), Index(0));
  for (Index i = n - 1; i > 0; --i) std::swap(order[std::size_t(i)], order[std::size_t(rng.index(i + 1))]);
  return order;
}

inline moe::Mask draw_mask(Index tokens, Rng& rng) {
  moe::Mask mask(tokens);
  for (Index t = 0; t < tokens; ++t) mask[t] = rng.uniform() < 0.7;
  return mask;
}

// An assignment, by value: plans that number their choices otherwise can be compared.
struct Seat {
  Index expert, token;
  double gate;
  friend bool operator==(const Seat&, const Seat&) = default;
};

template <class S>
std::vector<Seat> seats_of(const moe::DispatchPlan<S>& plan) {
  std::vector<Seat> seats;
  for (Index e = 0; e < plan.num_experts(); ++e)
    for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a)
      seats.push_back({e, plan.token[a], double(plan.gate[a])});
  return seats;
}

inline std::vector<Index> experts_of(const std::vector<Seat>& seats, Index token) {
  std::vector<Index> experts;
  for (const Seat& seat : seats)
    if (seat.token == token) experts.push_back(seat.expert);
  return experts;
}

template <class S>
std::vector<Index> chosen_by(const moe::Routing<S>& routing, Index token) {
  const auto& chosen = routing.chosen;
  return {chosen.expert.begin() + chosen.token_begin[token],
          chosen.expert.begin() + chosen.token_begin[token + 1]};
}

// A kind of router, at run time: the laws are compiled once for a router's type, whatever its
// options.
template <class R>
struct RouterKind {
  using Scalar = typename R::Scalar;
  using ExpertType = moe::FeedForward<Scalar, moe::GELU>;
  using LayerType = moe::MoELayer<ExpertType, R>;

  std::function<R(const Wish&, Rng&)> make;
  bool tokens_choose, gates_sum_to_one;
  std::function<Scalar(const Matrix<Scalar>&, Index, Index, const std::vector<Index>&)> gate{};
  bool experts_are_alike = true, is_dynamic = false, seats_follow_top_k = false,
       training_couples_tokens = false, has_capacity = true;
  std::optional<Index> fixed_top_k{};
  // A router of routers has logits at its levels only.
  static constexpr bool kHasLogits = requires(R router) { router.w_router; };

  template <class Traits>
  static RouterKind of() {
    RouterKind kind{&Traits::make, Traits::kTokensChoose, Traits::kGatesSumToOne};
    if constexpr (requires { &Traits::gate; }) kind.gate = &Traits::gate;
    if constexpr (requires { Traits::kExpertsAreAlike; }) kind.experts_are_alike = Traits::kExpertsAreAlike;
    if constexpr (requires { Traits::kIsDynamic; }) kind.is_dynamic = Traits::kIsDynamic;
    if constexpr (requires { Traits::kSeatsFollowTopK; }) kind.seats_follow_top_k = Traits::kSeatsFollowTopK;
    if constexpr (requires { Traits::kTrainingCouplesTokens; })
      kind.training_couples_tokens = Traits::kTrainingCouplesTokens;
    if constexpr (requires { Traits::kHasCapacity; }) kind.has_capacity = Traits::kHasCapacity;
    if constexpr (requires { Traits::kFixedTopK; }) kind.fixed_top_k = Traits::kFixedTopK;
    return kind;
  }

  // The wish as far as such a router can have it.
  Wish possible(Wish wish) const {
    if (fixed_top_k) wish.top_k = std::min(*fixed_top_k, wish.num_experts);
    if (!has_capacity) wish.capacity.reset();
    return wish;
  }

  // Whether the gates of a token are shares of one.
  bool gates_are_shares() const { return !gate; }
  // The gate of expert e of token t with logits z when the experts `among` are in use.
  Scalar gate_of(const Matrix<Scalar>& z, Index t, Index e, const std::vector<Index>& among) const {
    return gate ? gate(z, t, e, among) : reference::gate_of(z, t, e, gates_sum_to_one, among);
  }

  static_assert(moe::TrainableRouter<R>);
  static_assert(std::copyable<R>);
  static_assert(std::copyable<LayerType>);
  static_assert(std::copyable<moe::Routing<Scalar>>);

  R make_router(const Wish& wish, Rng& rng) const {
    R router = make(wish, rng);
    randomise(router, rng);
    return router;
  }
  LayerType make_layer(const Wish& wish, Rng& rng) const {
    R router = make_router(wish, rng);
    LayerType layer(moe::make_experts<ExpertType>(wish.num_experts,
                                                  {.d_model = wish.d_model, .d_ff = 7, .bias = true}, rng),
                    std::move(router));
    return layer;
  }
  // A router whose gates scale inputs has no gated shared experts beside it.
  static bool scales_inputs(const R& router) { return moe::gate_side_of(router) == moe::GateSide::input; }
  // A layer with shared experts and an output bias.
  LayerType make_full_layer(const Wish& wish, Rng& rng) const {
    const typename ExpertType::Options options{.d_model = wish.d_model, .d_ff = 7, .bias = true};
    const R router = make_router(wish, rng);
    auto experts = moe::make_experts<ExpertType>(wish.num_experts, options, rng);
    LayerType layer(std::move(experts), router,
                    {moe::make_experts<ExpertType>(2, options, rng), !scales_inputs(router)}, true);
    randomise(layer, rng);
    return layer;
  }

  static moe::Routing<Scalar> route(const R& router, const Matrix<Scalar>& x, const BatchInfo& info = {}) {
    moe::Routing<Scalar> routing;
    router.route(x, info, routing, Sequential{});
    return routing;
  }
  static moe::Routing<Scalar> route_in_training(const R& router, const Matrix<Scalar>& x, Rng rng,
                                                const BatchInfo& info = {}) {
    moe::Routing<Scalar> routing;
    if constexpr (requires { router.route(x, rng, info, routing, Sequential{}); })
      router.route(x, rng, info, routing, Sequential{});
    else
      router.route(x, info, routing, Sequential{});
    return routing;
  }
  static Matrix<Scalar> forward(const LayerType& layer, const Matrix<Scalar>& x, const BatchInfo& info = {}) {
    return layer.forward(x, info, Sequential{});
  }

  static void expect_same_parameters(const LayerType& a, const LayerType& b) {
    LayerType::visit(
        [](const moe::ParameterInfo& info, const auto& of_a, const auto& of_b) {
          EXPECT_TRUE(same_bits(of_a.data(), of_b.data(), of_a.size())) << info.name;
        },
        a, b);
  }

  // The routing of exactly these logits [tokens, experts]; minus infinity included.
  moe::Routing<Scalar> route_logits(Wish wish, const Matrix<Scalar>& logits) const requires kHasLogits {
    const Scalar huge = sizeof(Scalar) == 4 ? Scalar(0x1p100) : Scalar(0x1p600);
    Rng rng(1);
    wish.d_model = wish.num_experts = logits.cols();
    wish = possible(wish);
    R router = make(wish, rng);
    randomise(router, rng);
    router.w_router = huge * Matrix<Scalar>::Identity(logits.cols(), logits.cols());
    if constexpr (requires { router.b_router; }) router.b_router.setZero();
    if constexpr (requires { router.selection_bias; }) router.selection_bias.setZero();
    Matrix<Scalar> x = logits / huge;
    for (Index i = 0; i < x.size(); ++i)
      if (logits.data()[i] == -reference::kInfinity<Scalar>) x.data()[i] = -huge;
    const moe::Routing<Scalar> routing = route(router, x);
    EXPECT_EQ(values_of(routing.router_logits), values_of(logits));
    return routing;
  }

  // Every overflow policy and priority that means something, with and without capacity.
  std::vector<Wish> all_wishes(Wish wish = {}) const {
    std::vector<Wish> wishes{wish = possible(wish)};
    if (!has_capacity) return wishes;
    for (const double capacity : {0.4, 0.75, 1.0, 2.0}) {
      for (const Overflow overflow : {Overflow::drop, Overflow::next_best, Overflow::pass_through})
        for (const Priority priority : {Priority::token_order, Priority::token_max_gate,
                                        Priority::assignment_gate, Priority::token_max_prob}) {
          if (!tokens_choose && (overflow == Overflow::next_best || priority != Priority::token_order))
            continue;
          wish.capacity = capacity;
          wish.overflow = overflow;
          wish.priority = priority;
          wishes.push_back(wish);
        }
    }
    return wishes;
  }

  // Calls f(routing, wish, info) for routings of every kind: k, capacity, masks and groups; in
  // inference and in training.
  void for_each_routing(
      const std::function<void(const moe::Routing<Scalar>&, const Wish&, const BatchInfo&)>& f) const {
    Rng rng(7);
    for (const Index experts : {1, 3, 6}) {
      for (Index k = 1; k <= experts; ++k) {  // where k is fixed, as many rounds of that
        for (const Wish& wish : all_wishes({.num_experts = experts, .top_k = k})) {
          const R router = make_router(wish, rng);
          const Index tokens = 1 + rng.index(30);
          const Matrix<Scalar> x = normal_matrix<Scalar>(tokens, wish.d_model, rng);
          BatchInfo info;
          if (rng.uniform() < 0.5) info.mask = draw_mask(tokens, rng);
          if (rng.uniform() < 0.5) {
            const Index cut = rng.index(tokens + 1);
            info.group_begin = moe::IndexVector{{0, cut, cut, tokens}};
          }
          f(route(router, x, info), wish, info);
          f(route_in_training(router, x, rng, info), wish, info);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
};

// ---- Laws of a routing.

template <class R>
void ATokenSitsAtMostOnceAtAnExpert(const RouterKind<R>& kind) {
  kind.for_each_routing([&](const auto& routing, const Wish& wish, const BatchInfo&) {
    const auto& plan = routing.plan;
    ASSERT_EQ(plan.num_experts(), wish.num_experts);
    ASSERT_EQ(plan.expert_begin[0], 0);
    ASSERT_EQ(plan.expert_begin[wish.num_experts], plan.num_assignments());
    ASSERT_EQ(plan.gate.size(), plan.num_assignments());
    for (Index e = 0; e < wish.num_experts; ++e)
      for (Index a = plan.expert_begin[e] + 1; a < plan.expert_begin[e + 1]; ++a)
        ASSERT_LT(plan.token[a - 1], plan.token[a]) << "expert " << e;
    for (Index t = 0; t < routing.num_tokens(); ++t) {
      const std::vector<Index> chosen = chosen_by(routing, t);
      ASSERT_EQ(std::set<Index>(chosen.begin(), chosen.end()).size(), chosen.size());
      if (kind.tokens_choose && routing.is_valid(t)) {
        ASSERT_LE(Index(chosen.size()), wish.top_k);
        if (!kind.is_dynamic) {
          ASSERT_EQ(Index(chosen.size()), wish.top_k);
        }
      }
    }
  });
}

template <class R>
void AnExpertNeverHasMoreTokensOfAGroupThanItsCapacity(const RouterKind<R>& kind) {
  Index full = 0;
  kind.for_each_routing([&](const auto& routing, const Wish& wish, const BatchInfo& info) {
    if (!wish.capacity) {
      EXPECT_EQ(routing.plan.dropped.size(), 0);
      return;
    }
    for (const auto group : reference::groups_of(info, routing.num_tokens())) {
      Index valid = 0;
      for (Index t = group.begin; t < group.end; ++t) valid += routing.is_valid(t);
      double demand = *wish.capacity * double(wish.top_k) * double(valid);
      if (kind.is_dynamic && !kind.seats_follow_top_k)
        demand = *wish.capacity *
                 double(routing.chosen.token_begin[group.end] - routing.chosen.token_begin[group.begin]);
      const Index seats = std::min(valid, Index(std::ceil(demand / double(wish.num_experts))));
      for (Index e = 0; e < wish.num_experts; ++e) {
        Index taken = 0;
        for (const Seat& seat : seats_of(routing.plan))
          taken += seat.expert == e && seat.token >= group.begin && seat.token < group.end;
        ASSERT_LE(taken, seats) << "expert " << e;
        if (!kind.tokens_choose) {
          ASSERT_EQ(taken, seats) << "expert " << e;
        }
        full += taken == seats && seats > 0;
      }
    }
  });
  if (kind.has_capacity) {
    EXPECT_GT(full, 100);
  }
}

template <class R>
void EveryChoiceIsSeatedOrNamedAsDropped(const RouterKind<R>& kind) {
  Index dropped = 0, moved = 0, passed = 0;
  kind.for_each_routing([&](const auto& routing, const Wish& wish, const BatchInfo&) {
    const auto& plan = routing.plan;
    const auto& chosen = routing.chosen;
    ASSERT_EQ(plan.num_assignments() + plan.dropped.size(), chosen.size());
    std::vector<int> fates(std::size_t(chosen.size()), 0);
    for (Index a = 0; a < plan.num_assignments(); ++a) ++fates[std::size_t(plan.choice[a])];
    for (const moe::Dropped& d : plan.dropped) {
      const Index c = chosen.token_begin[d.token] + d.choice;
      ASSERT_LT(c, chosen.token_begin[d.token + 1]);
      ASSERT_EQ(chosen.expert[c], d.expert);
      ++fates[std::size_t(c)];
    }
    ASSERT_EQ(std::count(fates.begin(), fates.end(), 1), std::ptrdiff_t(fates.size()));
    for (Index e = 0; e < plan.num_experts(); ++e)
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
        const Index c = plan.choice[a];
        ASSERT_GE(c, chosen.token_begin[plan.token[a]]);
        ASSERT_LT(c, chosen.token_begin[plan.token[a] + 1]);
        moved += chosen.expert[c] != e;
        if (wish.overflow != Overflow::next_best) {
          ASSERT_EQ(chosen.expert[c], e);
        }
      }
    // Tokens that pass through are the valid ones without a seat.
    const std::vector<Seat> seats = seats_of(plan);
    for (Index t = 0; t < routing.num_tokens(); ++t) {
      const auto& list = plan.passed_through;
      const bool passes = std::count(list.begin(), list.end(), t) > 0;
      const bool wants_nobody = kind.is_dynamic && chosen_by(routing, t).empty();
      const bool expected = wish.overflow == Overflow::pass_through && routing.is_valid(t) && !wants_nobody &&
                            experts_of(seats, t).empty();
      ASSERT_EQ(passes, expected) << "token " << t;
      passed += passes;
    }
    dropped += plan.dropped.size();
  });
  if (!kind.has_capacity) {
    EXPECT_EQ(dropped, 0);
    return;
  }
  EXPECT_GT(passed, 20);
  if (kind.tokens_choose) {
    EXPECT_GT(dropped, 500);
    EXPECT_GT(moved, 100);
  }
}

template <class R>
void GatesAreFiniteAndAtMostOne(const RouterKind<R>& kind) {
  kind.for_each_routing([&](const auto& routing, const Wish&, const BatchInfo&) {
    for (const auto* gates : {&routing.plan.gate, &routing.chosen.gate})
      for (const auto gate : *gates) {
        ASSERT_TRUE(std::isfinite(gate));
        ASSERT_GE(gate, 0);
        if (kind.gates_are_shares()) {
          ASSERT_LE(double(gate), 1 + 1e-6);
        }
      }
  });
}

template <class R>
void GatesOfATokenSumToOneOrLess(const RouterKind<R>& kind) {
  kind.for_each_routing([&](const auto& routing, const Wish& wish, const BatchInfo&) {
    const auto& chosen = routing.chosen;
    const std::vector<Seat> seats = seats_of(routing.plan);
    for (Index t = 0; t < routing.num_tokens(); ++t) {
      if (!routing.is_valid(t)) {
        ASSERT_TRUE(chosen_by(routing, t).empty());
        ASSERT_TRUE(experts_of(seats, t).empty());
        continue;
      }
      double sum = 0, seated = 0, probs = 0;
      for (Index c = chosen.token_begin[t]; c < chosen.token_begin[t + 1]; ++c) sum += double(chosen.gate[c]);
      for (const Seat& seat : seats) seated += seat.token == t ? seat.gate : 0;
      for (Index e = 0; e < wish.num_experts; ++e) probs += double(routing.router_probs(t, e));
      if (!kind.is_dynamic || !chosen_by(routing, t).empty()) {
        ASSERT_NEAR(probs, 1, 1e-6);
      }
      if (!kind.gates_are_shares()) continue;
      ASSERT_LE(sum, 1 + 1e-6);
      ASSERT_LE(seated, 1 + 1e-6);
      if (kind.gates_sum_to_one) {
        ASSERT_NEAR(sum, 1, 1e-6);
        if (wish.overflow == Overflow::next_best && seated > 0) {
          ASSERT_NEAR(seated, 1, 1e-6);
        }
      }
    }
  });
}

template <class R>
void CopiesOfARoutingHoldTheSame(const RouterKind<R>& kind) {
  kind.for_each_routing([&](const auto& routing, const Wish&, const BatchInfo&) {
    const auto copy = routing;
    ASSERT_EQ(copy.plan, routing.plan);
    ASSERT_EQ(copy.chosen, routing.chosen);
    ASSERT_EQ(values_of(copy.router_probs), values_of(routing.router_probs));
  });
}

// ---- Symmetries.

template <class R>
void PermutingTokensPermutesOutputs(const RouterKind<R>& kind) {
  Rng rng(11);
  for (int round = 0; round < 10; ++round) {
    // Expert choice does not mind the order of tokens at any capacity.
    Wish wish{.d_model = 6, .num_experts = 5, .top_k = 2};
    if (!kind.tokens_choose) wish.capacity = 0.75;
    const auto layer = kind.make_layer(wish, rng);
    using S = typename R::Scalar;
    const Matrix<S> x = normal_matrix<S>(23, wish.d_model, rng);
    const std::vector<Index> order = shuffled(x.rows(), rng);
    const Matrix<S> y = kind.forward(layer, x);
    EXPECT_TRUE(equal_to_rounding(kind.forward(layer, take_rows(x, order)), take_rows(y, order)));
  }
}

template <class R>
void RelabellingExpertsChangesNothing(const RouterKind<R>& kind) {
  if (!kind.experts_are_alike) return;
  Rng rng(12);
  using S = typename R::Scalar;
  for (int round = 0; round < 10; ++round) {
    Wish wish{.d_model = 6, .num_experts = 5, .top_k = 2};
    if (!kind.tokens_choose) wish.capacity = 0.75;
    const auto layer = kind.make_layer(wish, rng);
    auto relabelled = layer;
    const std::vector<Index> order = shuffled(wish.num_experts, rng);
    R::visit(
        [&](const moe::ParameterInfo& info, const auto& from, auto& to) {
          ASSERT_EQ(from.rows(), wish.num_experts) << info.name;
          for (Index e = 0; e < to.rows(); ++e) to.row(e) = from.row(order[std::size_t(e)]);
        },
        layer.router(), relabelled.router());
    for (std::size_t e = 0; e < order.size(); ++e)
      relabelled.experts()[e] = layer.experts()[std::size_t(order[e])];
    const Matrix<S> x = normal_matrix<S>(23, wish.d_model, rng);
    EXPECT_TRUE(equal_to_rounding(kind.forward(relabelled, x), kind.forward(layer, x)));
  }
}

template <class R>
void WithAllExpertsOutputsAreTheDenseMixture(const RouterKind<R>& kind) {
  if (kind.is_dynamic) return;
  Rng rng(13);
  using S = typename R::Scalar;
  for (const Index experts : {1, 2, 5}) {
    const Wish wish{.d_model = 6, .num_experts = experts, .top_k = experts};
    if (kind.possible(wish).top_k < experts) continue;
    const auto layer = kind.make_layer(wish, rng);
    const Matrix<S> x = normal_matrix<S>(19, wish.d_model, rng);
    const Matrix<S> z = kind.route(layer.router(), x).router_logits;
    const bool scales_inputs = kind.scales_inputs(layer.router());
    Matrix<S> dense = Matrix<S>::Zero(x.rows(), x.cols());
    for (Index t = 0; t < x.rows(); ++t) {
      for (Index e = 0; e < experts; ++e) {
        const S p = kind.gate_of(z, t, e, reference::numbers(0, experts));
        Vector<S> in = reference::row_of(x, t);
        if (scales_inputs)
          for (S& value : in) value *= p;
        const Vector<S> out = reference::expert_output(layer.experts()[std::size_t(e)], in);
        for (Index j = 0; j < x.cols(); ++j) dense(t, j) += scales_inputs ? out[j] : p * out[j];
      }
    }
    EXPECT_TRUE(equal_to_rounding(kind.forward(layer, x), dense));
  }
}

// ---- Masks, groups, replay.

template <class R>
void PaddingChangesNoBitOfTheOtherRows(const RouterKind<R>& kind) {
  Rng rng(14);
  using S = typename R::Scalar;
  for (const Wish& wish : kind.all_wishes()) {
    const auto layer = kind.make_full_layer(wish, rng);
    const Index tokens = 17;
    const Matrix<S> x = normal_matrix<S>(tokens, wish.d_model, rng);
    // Tokens stand at the places where the mask is true, and anything at all elsewhere.
    BatchInfo info;
    info.mask = draw_mask(3 * tokens, rng);
    std::vector<Index> place;
    for (Index t = 0; t < info.mask.size(); ++t) {
      info.mask[t] = info.mask[t] && Index(place.size()) < tokens;
      if (info.mask[t]) place.push_back(t);
    }
    ASSERT_EQ(Index(place.size()), tokens);
    Matrix<S> padded = 100 * normal_matrix<S>(info.mask.size(), wish.d_model, rng);
    padded(padded.rows() - 1, 0) = std::numeric_limits<S>::quiet_NaN();
    for (Index t = 0; t < tokens; ++t) padded.row(place[std::size_t(t)]) = x.row(t);

    const auto alone = kind.route(layer.router(), x);
    const auto among = kind.route(layer.router(), padded, info);
    std::vector<Seat> moved = seats_of(alone.plan);
    for (Seat& seat : moved) seat.token = place[std::size_t(seat.token)];
    EXPECT_EQ(seats_of(among.plan), moved);
    EXPECT_EQ(among.plan.dropped.size(), alone.plan.dropped.size());
    EXPECT_EQ(moe::load_balancing_loss(among).value, moe::load_balancing_loss(alone).value);
    EXPECT_EQ(moe::importance_loss(among).value, moe::importance_loss(alone).value);
    if (kind.kHasLogits) {
      EXPECT_EQ(moe::router_z_loss(among).value, moe::router_z_loss(alone).value);
    }
    EXPECT_EQ(moe::load_loss(among).value, moe::load_loss(alone).value);

    const Matrix<S> y = kind.forward(layer, padded, info);
    EXPECT_TRUE(same_bits(take_rows(y, place), kind.forward(layer, x)));
    for (Index t = 0; t < y.rows(); ++t)
      if (!info.mask[t]) {
        EXPECT_TRUE(all_zero(y.row(t))) << "row " << t;
      }
  }
}

template <class R>
void PaddingGetsNoGradientAndGivesNone(const RouterKind<R>& kind) {
  Rng rng(15);
  using S = typename R::Scalar;
  using Layer = typename RouterKind<R>::LayerType;
  for (const Wish& wish : kind.all_wishes()) {
    const auto layer = kind.make_full_layer(wish, rng);
    Matrix<S> x = normal_matrix<S>(12, wish.d_model, rng);
    Matrix<S> d_y = normal_matrix<S>(12, wish.d_model, rng);
    BatchInfo info;
    info.mask = draw_mask(12, rng);
    const auto backward = [&](Layer& grad) {
      typename Layer::Cache cache;
      layer.forward(x, cache, info, Sequential{});
      auto losses =
          moe::load_balancing_loss(cache.routing).gradient + moe::importance_loss(cache.routing).gradient;
      if (kind.kHasLogits) losses += moe::router_z_loss(cache.routing).gradient;
      return layer.backward(d_y, cache, grad, losses, Sequential{});
    };
    Layer grad = moe::zeros_like(layer), other_grad = grad;
    const Matrix<S> d_x = backward(grad);
    for (Index t = 0; t < 12; ++t) {
      if (info.mask[t]) continue;
      EXPECT_TRUE(all_zero(d_x.row(t))) << "row " << t;
      x.row(t).setConstant(std::numeric_limits<S>::infinity());
      d_y.row(t).setConstant(5);
    }
    EXPECT_TRUE(same_bits(backward(other_grad), d_x));
    kind.expect_same_parameters(grad, other_grad);
  }
}

template <class R>
void APoisonedTokenCountsAsPadding(const RouterKind<R>& kind) {
  Rng rng(16);
  using S = typename R::Scalar;
  for (const Wish& wish : kind.all_wishes()) {
    const auto layer = kind.make_full_layer(wish, rng);
    Matrix<S> x = normal_matrix<S>(12, wish.d_model, rng);
    x(5, 1) = std::numeric_limits<S>::quiet_NaN();
    BatchInfo info;
    info.mask = moe::Mask::Constant(12, true);
    info.mask[5] = false;
    Matrix<S> expected = kind.forward(layer, x, info);
    Matrix<S> actual = kind.forward(layer, x);
    EXPECT_TRUE(std::isnan(actual(5, 0)));
    expected.row(5) = actual.row(5) = Vector<S>::Zero(wish.d_model);
    EXPECT_TRUE(same_bits(actual, expected));
  }
}

template <class R>
void MaskingATokenInTrainingLeavesTheNoiseOfOthersAlone(const RouterKind<R>& kind) {
  Rng rng(17);
  using S = typename R::Scalar;
  const Wish wish{.num_experts = 5};
  if (!kind.tokens_choose) return;  // there, a seat that is free goes to someone else
  if (kind.training_couples_tokens) return;
  const auto router = kind.make_router(wish, rng);
  const Matrix<S> x = normal_matrix<S>(15, wish.d_model, rng);
  BatchInfo info;
  info.mask = draw_mask(15, rng);
  const auto all = kind.route_in_training(router, x, rng);
  const auto masked = kind.route_in_training(router, x, rng, info);
  std::vector<Seat> seats = seats_of(all.plan);
  std::erase_if(seats, [&](const Seat& seat) { return !info.mask[seat.token]; });
  EXPECT_EQ(seats_of(masked.plan), seats);
}

template <class R>
void GroupsAreRoutedAsIfAlone(const RouterKind<R>& kind) {
  Rng rng(18);
  using S = typename R::Scalar;
  for (const Wish& wish : kind.all_wishes()) {
    const auto layer = kind.make_full_layer(wish, rng);
    const Matrix<S> x = normal_matrix<S>(21, wish.d_model, rng);
    BatchInfo info;
    info.mask = draw_mask(21, rng);
    info.group_begin = moe::IndexVector{{0, 8, 8, 9, 21}};
    const Matrix<S> y = kind.forward(layer, x, info);
    const auto routing = kind.route(layer.router(), x, info);
    std::vector<Seat> seats;
    for (Index g = 0; g < info.num_groups(); ++g) {
      const Index begin = info.group_begin[g], count = info.group_begin[g + 1] - begin;
      BatchInfo part;
      part.mask = info.mask.segment(begin, count);
      const Matrix<S> x_part = x.middleRows(begin, count);
      for (Seat seat : seats_of(kind.route(layer.router(), x_part, part).plan)) {
        seat.token += begin;
        seats.push_back(seat);
      }
      EXPECT_TRUE(same_bits(Matrix<S>(y.middleRows(begin, count)), kind.forward(layer, x_part, part)))
          << "group " << g;
    }
    std::sort(seats.begin(), seats.end(), [](const Seat& a, const Seat& b) {
      return std::pair(a.expert, a.token) < std::pair(b.expert, b.token);
    });
    EXPECT_EQ(seats_of(routing.plan), seats);
  }
}

template <class R>
void ARoutingCanBeReplayed(const RouterKind<R>& kind) {
  Rng rng(19);
  using S = typename R::Scalar;
  using Layer = typename RouterKind<R>::LayerType;
  for (const Wish& wish : kind.all_wishes()) {
    const auto layer = kind.make_full_layer(wish, rng);
    const Matrix<S> x = normal_matrix<S>(16, wish.d_model, rng);
    const Matrix<S> d_y = normal_matrix<S>(16, wish.d_model, rng);
    BatchInfo info;
    info.mask = draw_mask(16, rng);
    info.group_begin = moe::IndexVector{{0, 7, 16}};
    const auto routing = layer.route(x, info, Sequential{});
    const Matrix<S> y = kind.forward(layer, x, info);
    EXPECT_TRUE(same_bits(layer.forward(x, routing, Sequential{}), y));

    // The differentiable forms have the same values, and a replayed one the same gradients.
    typename Layer::Cache cache, replayed;
    EXPECT_TRUE(same_bits(layer.forward(x, cache, info, Sequential{}), y));
    EXPECT_TRUE(same_bits(layer.forward(x, routing, replayed, Sequential{}), y));
    Layer grad = moe::zeros_like(layer), other_grad = grad;
    EXPECT_TRUE(same_bits(layer.backward(d_y, cache, grad, {}, Sequential{}),
                          layer.backward(d_y, replayed, other_grad, {}, Sequential{})));
    kind.expect_same_parameters(grad, other_grad);
  }
}

template <class R>
void AWorkspaceAndACacheCanBeReused(const RouterKind<R>& kind) {
  Rng rng(20);
  using S = typename R::Scalar;
  using Layer = typename RouterKind<R>::LayerType;
  typename Layer::Workspace workspace;
  typename Layer::Cache cache;
  Matrix<S> y, d_x;
  for (const Wish& wish : kind.all_wishes({.num_experts = 3})) {
    const auto layer = kind.make_full_layer(wish, rng);
    for (const Index tokens : {9, 0, 14}) {
      const Matrix<S> x = normal_matrix<S>(tokens, wish.d_model, rng);
      layer.forward(x, y, workspace, {}, Sequential{});
      EXPECT_TRUE(same_bits(y, kind.forward(layer, x)));
      layer.forward(x, y, cache, {}, Sequential{});
      EXPECT_TRUE(same_bits(y, kind.forward(layer, x)));
      typename Layer::Cache fresh;
      layer.forward(x, fresh, {}, Sequential{});
      Layer grad = moe::zeros_like(layer);
      layer.backward(y, cache, grad, {}, d_x, Sequential{});
      EXPECT_TRUE(same_bits(layer.backward(y, fresh, grad, {}, Sequential{}), d_x));
    }
  }
}

template <class R>
void OutputsAddUpInAscendingExpertsSharedOnesLast(const RouterKind<R>& kind) {
  Rng rng(27);
  using S = typename R::Scalar;
  const Wish wish = kind.possible({.num_experts = 5, .top_k = 4});
  const auto router = kind.make_router(wish, rng);
  const typename RouterKind<R>::ExpertType::Options options{wish.d_model, 7, true, {}};
  using Expert = typename RouterKind<R>::ExpertType;
  const typename RouterKind<R>::LayerType layer(moe::make_experts<Expert>(5, options, rng), router,
                                                {moe::make_experts<Expert>(2, options, rng)});
  const Matrix<S> x = normal_matrix<S>(20, wish.d_model, rng);
  auto routing = kind.route(router, x);
  for (S& gate : routing.plan.gate) gate = 1;  // sums of products would depend on fused rounding
  Matrix<S> expected = Matrix<S>::Zero(20, wish.d_model);
  const auto add = [&](const Expert& expert, Index t) {
    Matrix<S> y(1, wish.d_model);
    expert.forward(x.row(t), y);
    expected.row(t) += y;
  };
  for (const Seat& seat : seats_of(routing.plan)) add(layer.experts()[std::size_t(seat.expert)], seat.token);
  for (const Expert& expert : layer.shared_experts())
    for (Index t = 0; t < 20; ++t) add(expert, t);
  EXPECT_TRUE(same_bits(layer.forward(x, routing, Sequential{}), expected));
}

// ---- Ordinary inputs that are easily forgotten.

template <class R>
void AnEmptyBatchIsOrdinary(const RouterKind<R>& kind) {
  Rng rng(21);
  using S = typename R::Scalar;
  using Layer = typename RouterKind<R>::LayerType;
  for (const Wish& wish : kind.all_wishes()) {
    const auto layer = kind.make_full_layer(wish, rng);
    const Matrix<S> x(0, wish.d_model);
    const Matrix<S> y = kind.forward(layer, x);
    EXPECT_EQ(y.rows(), 0);
    EXPECT_EQ(y.cols(), wish.d_model);
    typename Layer::Cache cache;
    layer.forward(x, rng, cache, {}, Sequential{});
    const auto& routing = cache.routing;
    std::vector<moe::Loss<S>> losses{moe::load_balancing_loss(routing), moe::importance_loss(routing)};
    if (kind.kHasLogits)
      losses.insert(losses.end(), {moe::importance_loss(routing, moe::Importance::probs),
                                   moe::load_loss(routing), moe::router_z_loss(routing)});
    Layer grad = moe::zeros_like(layer);
    for (const auto& loss : losses) {
      EXPECT_EQ(loss.value, 0);
      EXPECT_EQ(layer.backward(x, cache, grad, loss.gradient, Sequential{}).rows(), 0);
    }
    Layer::visit([](const moe::ParameterInfo& info,
                    const auto& g) { EXPECT_TRUE((g.array() == 0).all()) << info.name; },
                 grad);
  }
}

template <class R>
void ABatchOfPaddingIsOrdinary(const RouterKind<R>& kind) {
  Rng rng(22);
  using S = typename R::Scalar;
  for (const Wish& wish : kind.all_wishes()) {
    const auto layer = kind.make_full_layer(wish, rng);
    BatchInfo info;
    info.mask = moe::Mask::Constant(6, false);
    const Matrix<S> x = normal_matrix<S>(6, wish.d_model, rng);
    EXPECT_TRUE(all_zero(kind.forward(layer, x, info)));
    EXPECT_EQ(moe::load_balancing_loss(layer.route(x, info, Sequential{})).value, 0);
  }
}

template <class R>
void OneExpertAloneIsThatExpert(const RouterKind<R>& kind) {
  if (!kind.gates_are_shares()) return;
  Rng rng(23);
  using S = typename R::Scalar;
  const Wish wish{.num_experts = 1, .top_k = 1};
  const auto layer = kind.make_layer(wish, rng);
  const Matrix<S> x = normal_matrix<S>(9, wish.d_model, rng);
  Matrix<S> expected(9, wish.d_model);
  layer.experts()[0].forward(x, expected);
  EXPECT_TRUE(same_bits(kind.forward(layer, x), expected));
  typename RouterKind<R>::LayerType::Cache cache;
  EXPECT_TRUE(equal_to_rounding(layer.forward(x, rng, cache, {}, Sequential{}), expected));
}

template <class R>
void AllTokensMayWantOneExpert(const RouterKind<R>& kind) {
  using S = typename R::Scalar;
  Matrix<S> logits = Matrix<S>::Zero(10, 4);
  logits.col(2).setConstant(5);
  if (kind.tokens_choose) {
    const auto dropless = kind.route_logits({.top_k = 1}, logits);
    if (kind.fixed_top_k) {
      ASSERT_EQ(kind.fixed_top_k, 2);
      EXPECT_EQ(moe::tokens_per_expert(dropless), moe::IndexVector({{10, 0, 10, 0}}));
    } else {
      EXPECT_EQ(moe::tokens_per_expert(dropless), moe::IndexVector({{0, 0, 10, 0}}));
    }
    if (!kind.has_capacity) return;
    const auto seated = kind.route_logits({.top_k = 1, .capacity = 1.0}, logits);
    EXPECT_EQ(moe::tokens_per_expert(seated), moe::IndexVector({{0, 0, 3, 0}}));
    EXPECT_EQ(seated.plan.dropped.size(), 7);
  } else {
    const auto seated = kind.route_logits({.top_k = 1, .capacity = 1.0}, logits);
    EXPECT_EQ(moe::tokens_per_expert(seated), moe::IndexVector({{3, 3, 3, 3}}));
  }
}

template <class R>
void ExpertsWithoutTokensGetNoGradientFromTheOutput(const RouterKind<R>& kind) {
  Rng rng(24);
  using S = typename R::Scalar;
  using Layer = typename RouterKind<R>::LayerType;
  Wish wish = kind.possible({.d_model = 4, .num_experts = 6, .top_k = 1});
  if (!kind.tokens_choose) wish.capacity = 0;  // only a lack of seats leaves experts empty
  const auto layer = kind.make_layer(wish, rng);
  const Matrix<S> x = normal_matrix<S>(3 / wish.top_k, 4, rng);  // at most three experts
  typename Layer::Cache cache;
  layer.forward(x, cache, {}, Sequential{});
  Layer grad = moe::zeros_like(layer);
  layer.backward(x, cache, grad, {}, Sequential{});
  Index empty = 0;
  for (Index e = 0; e < 6; ++e) {
    using Expert = typename RouterKind<R>::ExpertType;
    const bool used = cache.routing.plan.rows_of(e) > 0;
    empty += !used;
    Expert::visit([&](const moe::ParameterInfo& info,
                      const auto& g) { EXPECT_EQ((g.array() == 0).all(), !used) << e << " " << info.name; },
                  grad.experts()[std::size_t(e)]);
  }
  EXPECT_GE(empty, 3);
}

template <class R>
void TiesGoToTheLowerExpertAndToTheLowerToken(const RouterKind<R>& kind) {
  if (kind.is_dynamic && !kind.gates_are_shares()) return;  // level logits of 0 choose nobody
  using S = typename R::Scalar;
  const Matrix<S> level = Matrix<S>::Zero(6, 4);
  for (const Wish& wish : kind.all_wishes({.top_k = 2})) {
    if (wish.overflow == Overflow::next_best) continue;
    const auto routing = kind.route_logits(wish, level);
    Index seats = 6;  // of an expert
    if (wish.capacity) seats = std::min<Index>(6, Index(std::ceil(*wish.capacity * 2 * 6 / 4)));
    std::vector<Seat> expected;
    for (Index e = 0; e < (kind.tokens_choose ? 2 : 4); ++e)
      for (Index t = 0; t < seats; ++t) expected.push_back({e, t, double(kind.gate_of(level, t, e, {0, 1}))});
    EXPECT_EQ(seats_of(routing.plan), expected);
  }
  // Some tied, some not.
  const Matrix<S> some{{0, 3, 1, 3}, {2, 1, 2, 2}, {-1, -1, -1, 0}};
  if (kind.tokens_choose) {
    const auto routing = kind.route_logits({.top_k = 2}, some);
    if (kind.is_dynamic) return;
    EXPECT_EQ(chosen_by(routing, 0), (std::vector<Index>{1, 3}));
    EXPECT_EQ(chosen_by(routing, 1), (std::vector<Index>{0, 2}));
    EXPECT_EQ(chosen_by(routing, 2), (std::vector<Index>{3, 0}));
  }
}

template <class R>
void UnavailableExpertsAreNeverUsed(const RouterKind<R>& kind) {
  using S = typename R::Scalar;
  constexpr S kNever = -reference::kInfinity<S>;
  // Token 0 may use one expert only, token 1 two of them, token 2 all, and token 3 none.
  const Matrix<S> logits{
      {kNever, 1, kNever, kNever}, {3, kNever, 0, kNever}, {1, 2, 3, 4}, {kNever, kNever, kNever, kNever}};
  for (Wish wish : kind.all_wishes({.top_k = 3})) {
    const auto routing = kind.route_logits(wish, logits);
    EXPECT_EQ(routing.plan.token_state[3], TokenState::poisoned);
    Index seated = 0;
    for (const Seat& seat : seats_of(routing.plan)) {
      EXPECT_NE(logits(seat.token, seat.expert), kNever);
      EXPECT_TRUE(std::isfinite(seat.gate));
      ++seated;
    }
    if (kind.is_dynamic) continue;
    for (Index t = 0; t < 3; ++t)
      for (Index e = 0; e < 4; ++e) EXPECT_EQ(routing.router_probs(t, e) == 0, logits(t, e) == kNever);
    if (!wish.capacity) {
      EXPECT_EQ(seated, 1 + 2 + (kind.tokens_choose ? wish.top_k : 4));
    }
    if (!kind.tokens_choose) continue;
    EXPECT_EQ(chosen_by(routing, 0), (std::vector<Index>{1}));
    EXPECT_EQ(chosen_by(routing, 1), (std::vector<Index>{0, 2}));
    std::vector<Index> best{3, 2, 1};
    best.resize(std::size_t(wish.top_k));
    EXPECT_EQ(chosen_by(routing, 2), best);
    if (kind.gates_are_shares()) {
      EXPECT_EQ(routing.chosen.gate[0], 1);  // the softmax of one expert
    }
  }
}

// ---- Parameters of routers and layers.

template <class R>
void ParametersHaveNamesAndTheirGradientsTheSameShapes(const RouterKind<R>& kind) {
  Rng rng(25);
  using Layer = typename RouterKind<R>::LayerType;
  const Layer layer = kind.make_full_layer({}, rng);
  const Layer grad = moe::zeros_like(layer);
  std::set<std::string> names;
  Index count = 0;
  Layer::visit(
      [&](const moe::ParameterInfo& info, const auto& p, const auto& g, const auto& again) {
        EXPECT_TRUE(names.insert(std::string(info.name)).second) << info.name;
        EXPECT_EQ(p.rows(), info.kind == moe::Kind::buffer ? p.size() : g.rows()) << info.name;
        EXPECT_EQ(p.cols(), g.cols()) << info.name;
        EXPECT_TRUE((p.array() != 0).all()) << info.name;
        EXPECT_TRUE((g.array() == 0).all()) << info.name;
        EXPECT_EQ(&p, &again) << info.name;
        if (info.kind == moe::Kind::parameter) count += p.size();
      },
      layer, grad, layer);
  EXPECT_EQ(moe::num_parameters(layer), count);
  for (const char* name : {kind.kHasLogits ? "router.w_router" : "router.parent.w_router", "experts.0.w_up",
                           "experts.3.b_down", "shared_experts.1.w_down", "b_output"})
    EXPECT_TRUE(names.count(name)) << name;
  EXPECT_EQ(names.count("w_shared_gate"), !kind.scales_inputs(layer.router()));

  Layer copy = layer;  // a value: changing the copy leaves the layer alone
  moe::set_zero(copy);
  R::visit(
      [](const moe::ParameterInfo& info, const auto& p, const auto& of_copy) {
        EXPECT_NE(p(0, 0), 0) << info.name;
        EXPECT_EQ(of_copy(0, 0), info.kind == moe::Kind::buffer ? p(0, 0) : 0) << info.name;
      },
      layer.router(), copy.router());
  EXPECT_NE(layer.experts()[0].w_up(0, 0), 0);
}

template <class R>
void BackwardAddsToTheGradientAndCanBeRepeated(const RouterKind<R>& kind) {
  Rng rng(26);
  using S = typename R::Scalar;
  using Layer = typename RouterKind<R>::LayerType;
  for (const Wish& wish : kind.all_wishes()) {
    const Layer layer = kind.make_full_layer(wish, rng);
    const Matrix<S> x = normal_matrix<S>(11, wish.d_model, rng);
    const Matrix<S> d_y = normal_matrix<S>(11, wish.d_model, rng);
    typename Layer::Cache cache;
    layer.forward(x, rng, cache, {}, Sequential{});
    const auto loss = moe::load_balancing_loss(cache.routing).gradient;
    Layer once = moe::zeros_like(layer), again = once, twice = once;
    const Matrix<S> d_x = layer.backward(d_y, cache, once, loss, Sequential{});
    EXPECT_TRUE(same_bits(layer.backward(d_y, cache, again, loss, Sequential{}), d_x));
    layer.backward(d_y, cache, twice, loss, Sequential{});
    EXPECT_TRUE(same_bits(layer.backward(d_y, cache, twice, loss, Sequential{}), d_x));
    kind.expect_same_parameters(once, again);
    Layer::visit(
        [](const moe::ParameterInfo& info, const auto& a, const auto& doubled) {
          EXPECT_TRUE(equal_to_rounding(Matrix<S>(doubled), Matrix<S>(2 * a))) << info.name;
        },
        once, twice);
  }
}

// Makes every law a test of every kind. They are functions, not GoogleTest's typed tests, of which
// each costs the compiler a class.
template <class... Traits>
bool check_routers(const std::string& name) {
  Index number = 0;
  const auto add_tests = [&](const auto& kind) {
    using R = std::decay_t<decltype(kind.make({}, std::declval<Rng&>()))>;
    std::vector<std::pair<const char*, void (*)(const RouterKind<R>&)>> laws{
        {"ATokenSitsAtMostOnceAtAnExpert", &ATokenSitsAtMostOnceAtAnExpert<R>},
        {"AnExpertNeverHasMoreTokensOfAGroupThanItsCapacity",
         &AnExpertNeverHasMoreTokensOfAGroupThanItsCapacity<R>},
        {"EveryChoiceIsSeatedOrNamedAsDropped", &EveryChoiceIsSeatedOrNamedAsDropped<R>},
        {"GatesAreFiniteAndAtMostOne", &GatesAreFiniteAndAtMostOne<R>},
        {"GatesOfATokenSumToOneOrLess", &GatesOfATokenSumToOneOrLess<R>},
        {"CopiesOfARoutingHoldTheSame", &CopiesOfARoutingHoldTheSame<R>},
        {"PermutingTokensPermutesOutputs", &PermutingTokensPermutesOutputs<R>},
        {"RelabellingExpertsChangesNothing", &RelabellingExpertsChangesNothing<R>},
        {"PaddingChangesNoBitOfTheOtherRows", &PaddingChangesNoBitOfTheOtherRows<R>},
        {"PaddingGetsNoGradientAndGivesNone", &PaddingGetsNoGradientAndGivesNone<R>},
        {"APoisonedTokenCountsAsPadding", &APoisonedTokenCountsAsPadding<R>},
        {"MaskingATokenInTrainingLeavesTheNoiseOfOthersAlone",
         &MaskingATokenInTrainingLeavesTheNoiseOfOthersAlone<R>},
        {"GroupsAreRoutedAsIfAlone", &GroupsAreRoutedAsIfAlone<R>},
        {"ARoutingCanBeReplayed", &ARoutingCanBeReplayed<R>},
        {"AWorkspaceAndACacheCanBeReused", &AWorkspaceAndACacheCanBeReused<R>},
        {"OutputsAddUpInAscendingExpertsSharedOnesLast", &OutputsAddUpInAscendingExpertsSharedOnesLast<R>},
        {"AnEmptyBatchIsOrdinary", &AnEmptyBatchIsOrdinary<R>},
        {"ABatchOfPaddingIsOrdinary", &ABatchOfPaddingIsOrdinary<R>},
        {"OneExpertAloneIsThatExpert", &OneExpertAloneIsThatExpert<R>},
        {"ExpertsWithoutTokensGetNoGradientFromTheOutput",
         &ExpertsWithoutTokensGetNoGradientFromTheOutput<R>},
        {"ParametersHaveNamesAndTheirGradientsTheSameShapes",
         &ParametersHaveNamesAndTheirGradientsTheSameShapes<R>},
        {"BackwardAddsToTheGradientAndCanBeRepeated", &BackwardAddsToTheGradientAndCanBeRepeated<R>},
    };
    if constexpr (RouterKind<R>::kHasLogits)
      laws.insert(laws.end(),
                  {{"WithAllExpertsOutputsAreTheDenseMixture", &WithAllExpertsOutputsAreTheDenseMixture<R>},
                   {"AllTokensMayWantOneExpert", &AllTokensMayWantOneExpert<R>},
                   {"TiesGoToTheLowerExpertAndToTheLowerToken", &TiesGoToTheLowerExpertAndToTheLowerToken<R>},
                   {"UnavailableExpertsAreNeverUsed", &UnavailableExpertsAreNeverUsed<R>}});
    const std::string suite = name + "/RouterLaws/" + std::to_string(number++);
    for (const auto& [law, check] : laws) add_test(suite, law, [=, check = check] { check(kind); });
  };
  (add_tests(RouterKind<typename Traits::Router>::template of<Traits>()), ...);
  return true;
}

}  // namespace laws
