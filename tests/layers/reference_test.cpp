// SPDX-License-Identifier: MIT
#include "reference_moe.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <moe/moe.hpp>

#include "sanitized.hpp"

// Layers and routings of random configurations against tests/reference_moe.hpp.
namespace reference_test {
namespace {

using moe::Index;
using moe::Matrix;
using moe::Overflow;
using moe::Priority;
using moe::Rng;
using moe::TokenState;

// Outputs may differ by this, relative to the largest entry of the output; gates and probabilities
// by this.
template <class S>
constexpr double kTolerance = sizeof(S) == 4 ? 1e-5 : 1e-12;

// A margin between two logits or two gates is clear when rounding can not have crossed it.
template <class S>
constexpr double kClear = sizeof(S) == 4 ? 8e-6 : 1e-11;

// Experts of one layer that differ in kind, width and biases.
template <class S>
using AnyExpert =
    moe::VariantExpert<moe::FeedForward<S, moe::ReLU>, moe::FeedForward<S, moe::GELU>,
                       moe::FeedForward<S, moe::GELUTanh>, moe::GatedFeedForward<S, moe::SwiGLU>,
                       moe::GatedFeedForward<S, moe::ClampedSwiGLU>>;

template <class S>
AnyExpert<S> draw_expert(Index d_model, Rng& rng) {
  const Index kind = rng.index(5), d_ff = 1 + rng.index(40);
  const bool bias = rng.uniform() < 0.5;
  if (kind == 0) return moe::FeedForward<S, moe::ReLU>({d_model, d_ff, bias, {}}, rng);
  if (kind == 1) return moe::FeedForward<S, moe::GELU>({d_model, d_ff, bias, {}}, rng);
  if (kind == 2) return moe::FeedForward<S, moe::GELUTanh>({d_model, d_ff, bias, {}}, rng);
  if (kind == 3) return moe::GatedFeedForward<S, moe::SwiGLU>({d_model, d_ff, bias, {}}, rng);
  return moe::GatedFeedForward<S, moe::ClampedSwiGLU>({d_model, d_ff, bias, {1.702, 0.8, 1.0}}, rng);
}

template <class S>
std::vector<AnyExpert<S>> draw_experts(Index count, Index d_model, Rng& rng) {
  std::vector<AnyExpert<S>> experts;
  for (Index e = 0; e < count; ++e) experts.push_back(draw_expert<S>(d_model, rng));
  return experts;
}

// Everything of a configuration but the router's own options.
struct Setup {
  Index tokens, d_model, experts, top_k, shared;
  bool training, gated, output_bias, gates_scale_inputs;
  std::optional<double> capacity;
  Overflow overflow;
  Priority priority;
  moe::BatchInfo info;
};

Setup draw_setup(Rng& rng) {
  Setup s;
  s.tokens = rng.index(41);
  s.d_model = 1 + rng.index(40);
  s.experts = 1 + rng.index(12);
  s.top_k = 1 + rng.index(s.experts);
  s.shared = std::max<Index>(rng.index(5) - 2, 0);
  s.training = rng.uniform() < 0.5;
  s.gated = s.shared > 0 && rng.uniform() < 0.5;
  s.output_bias = rng.uniform() < 0.3;
  s.gates_scale_inputs = !s.gated && rng.uniform() < 0.1;
  if (rng.uniform() < 0.7) s.capacity = rng.uniform(0, 1.5);
  s.overflow = Overflow(rng.index(3));
  s.priority = Priority(rng.index(4));
  if (rng.uniform() < 0.4) {
    s.info.mask.resize(s.tokens);
    for (Index t = 0; t < s.tokens; ++t) s.info.mask[t] = rng.uniform() < 0.7;
  }
  if (rng.uniform() < 0.4) {
    s.info.group_begin.resize(2 + rng.index(4));
    for (Index& begin : s.info.group_begin) begin = rng.index(s.tokens + 1);
    s.info.group_begin[0] = 0;
    s.info.group_begin[s.info.group_begin.size() - 1] = s.tokens;
    std::sort(s.info.group_begin.begin(), s.info.group_begin.end());
  }
  return s;
}

template <class S>
Matrix<S> draw_input(const Setup& setup, Rng& rng) {
  Matrix<S> x(setup.tokens, setup.d_model);
  moe::fill_normal(x, 1.0, rng);
  if (setup.tokens > 0 && rng.uniform() < 0.15) {
    S& entry = x(rng.index(setup.tokens), rng.index(setup.d_model));
    entry = rng.uniform() < 0.5 ? std::numeric_limits<S>::quiet_NaN() : std::numeric_limits<S>::infinity();
  }
  return x;
}

// ---- The routers: how to draw one, and what the reference decides in its place.

template <class S>
moe::TopKRouter<S> draw_router(const Setup& s, moe::TopKRouter<S>*, Rng& rng) {
  const bool before = rng.uniform() < 0.6, renormalise = rng.uniform() < 0.4;
  const bool bias = rng.uniform() < 0.5, after_drop = rng.uniform() < 0.4;
  const double jitter = rng.uniform() < 0.5 ? 0.3 : 0.0;
  moe::TopKRouter<S> router({.d_model = s.d_model,
                             .num_experts = s.experts,
                             .top_k = s.top_k,
                             .softmax_before_selection = before,
                             .renormalise = renormalise,
                             .bias = bias,
                             .jitter = jitter,
                             .capacity = s.training ? std::nullopt : s.capacity,
                             .training_capacity = s.training ? s.capacity : std::nullopt,
                             .overflow = s.overflow,
                             .priority = s.priority,
                             .renormalise_after_drop = after_drop,
                             .allow_constant_gate = true},
                            rng);
  if (bias) moe::fill_normal(router.b_router, 1.0, rng);
  if (bias && rng.uniform() < 0.3)  // unavailable experts
    for (Index e = 1; e < s.experts; e += 2) router.b_router[e] = -reference::kInfinity<S>;
  return router;
}

template <class S>
moe::NoisyTopKRouter<S> draw_router(const Setup& s, moe::NoisyTopKRouter<S>*, Rng& rng) {
  moe::NoisyTopKRouter<S> router({.d_model = s.d_model,
                                  .num_experts = s.experts,
                                  .top_k = s.top_k,
                                  .noise_epsilon = rng.uniform(0, 0.1),
                                  .capacity = s.training ? std::nullopt : s.capacity,
                                  .training_capacity = s.training ? s.capacity : std::nullopt,
                                  .overflow = s.overflow,
                                  .priority = s.priority,
                                  .renormalise_after_drop = rng.uniform() < 0.4,
                                  .allow_constant_gate = true},
                                 rng);
  moe::fill_normal(router.w_router, 0.5, rng);
  moe::fill_normal(router.w_noise, 0.3, rng);
  return router;
}

template <class S>
moe::ExpertChoiceRouter<S> draw_router(const Setup& s, moe::ExpertChoiceRouter<S>*, Rng& rng) {
  return {{.d_model = s.d_model,
           .num_experts = s.experts,
           .capacity = rng.uniform(0, 1.2 * double(s.experts)),
           .overflow = s.overflow == Overflow::drop ? Overflow::drop : Overflow::pass_through},
          rng};
}

template <class S>
reference::Rule rule_of(const moe::TopKRouter<S>& router, const Setup& setup) {
  const auto& o = router.options();
  return {o.top_k,        !o.softmax_before_selection || o.renormalise,
          setup.capacity, o.overflow,
          o.priority,     o.renormalise_after_drop};
}

template <class S>
reference::Rule rule_of(const moe::NoisyTopKRouter<S>& router, const Setup& setup) {
  const auto& o = router.options();
  return {o.top_k, true, setup.capacity, o.overflow, o.priority, o.renormalise_after_drop};
}

// The logits without and with noise. Of the routing only what was drawn at random is used.
template <class S>
struct Logits {
  Matrix<S> clean, selection;
};

template <class S>
Logits<S> logits_of(const moe::TopKRouter<S>& router, Matrix<S> x, const moe::Routing<S>& routing) {
  for (Index i = 0; i < routing.input_factor.size(); ++i) x.data()[i] *= routing.input_factor.data()[i];
  const Matrix<S> z = reference::logits(x, router.w_router, router.b_router);
  return {z, z};
}

template <class S>
Logits<S> logits_of(const moe::NoisyTopKRouter<S>& router, const Matrix<S>& x,
                    const moe::Routing<S>& routing) {
  const Matrix<S> z = reference::logits(x, router.w_router);
  if (routing.noise.empty()) return {z, z};
  return {z, reference::noisy_logits<S>(x, router.w_router, router.w_noise, router.options().noise_epsilon,
                                        routing.noise.draws)};
}

template <class S>
Logits<S> logits_of(const moe::ExpertChoiceRouter<S>& router, const Matrix<S>& x, const moe::Routing<S>&) {
  const Matrix<S> z = reference::logits(x, router.w_router);
  return {z, z};
}

template <class Router, class S>
reference::Decision<S> decide(const Router& router, const Setup& setup, const Logits<S>& z) {
  return reference::token_choice(z.clean, z.selection, rule_of(router, setup), setup.info);
}

template <class S>
reference::Decision<S> decide(const moe::ExpertChoiceRouter<S>& router, const Setup& setup,
                              const Logits<S>& z) {
  return reference::expert_choice(z.selection, router.options().capacity, router.options().overflow,
                                  setup.info);
}

// ---- Margins.

// Whether token t's `count` best logits, and the one after them, are clearly apart.
template <class S>
bool choices_are_clear(const Matrix<S>& z, Index t, Index count) {
  std::vector<double> row;
  for (Index e = 0; e < z.cols(); ++e)
    if (z(t, e) != -reference::kInfinity<S>) row.push_back(double(z(t, e)));
  std::sort(row.begin(), row.end(), std::greater<>());
  for (std::size_t i = 1; i < row.size() && i <= std::size_t(count); ++i)
    if (row[i - 1] - row[i] < kClear<S>) return false;
  return true;
}

// Whether the gates by which tokens compete are clearly apart. Gates that are 1 by construction tie
// exactly, in the library as in the reference.
template <class S>
bool priorities_are_clear(const reference::Decision<S>& decision, const reference::Rule& rule, Index experts,
                          const moe::BatchInfo& info) {
  if (rule.priority == Priority::token_order) return true;
  const auto& choices = decision.choices;
  const auto is_one = [&](const reference::Choice<S>& c) {
    if (experts == 1) return true;
    const auto same_token = [&](const reference::Choice<S>& d) { return d.token == c.token; };
    return rule.gates_sum_to_one && std::count_if(choices.begin(), choices.end(), same_token) == 1;
  };
  for (const auto group : reference::groups_of(info, Index(decision.state.size()))) {
    for (const auto& a : choices) {
      for (const auto& b : choices) {
        const bool compared = rule.priority != Priority::assignment_gate
                                  ? a.rank == 0 && b.rank == 0 && a.token < b.token
                                  : &a < &b && (rule.overflow == Overflow::next_best || a.expert == b.expert);
        if (!compared || a.token < group.begin || b.token >= group.end) continue;
        if (rule.priority == Priority::token_max_prob) {
          const double distance =
              double(decision.probs(a.token, a.expert)) - double(decision.probs(b.token, b.expert));
          if (std::abs(distance) < kClear<S> && experts > 1) return false;
          continue;
        }
        if (std::abs(double(a.gate - b.gate)) < kClear<S> && !(is_one(a) && is_one(b))) return false;
      }
    }
  }
  return true;
}

// Whether the tokens' routings are clear: each for itself, or, where they compete, all or none.
template <class Router, class S>
std::vector<bool> clear_tokens(const Router& router, const Setup& setup, const Matrix<S>& z,
                               const reference::Decision<S>& decision) {
  const reference::Rule rule = rule_of(router, setup);
  const bool all_compete = rule.capacity_factor.has_value();
  const Index count = all_compete && rule.overflow == Overflow::next_best ? z.cols() : rule.top_k;
  std::vector<bool> clear;
  for (Index t = 0; t < z.rows(); ++t)
    clear.push_back(reference::at(decision.state, t) != TokenState::valid || choices_are_clear(z, t, count));
  if (!all_compete) return clear;
  const bool all = std::count(clear.begin(), clear.end(), false) == 0 &&
                   priorities_are_clear(decision, rule, z.cols(), setup.info);
  return std::vector<bool>(clear.size(), all);
}

template <class S>
std::vector<bool> clear_tokens(const moe::ExpertChoiceRouter<S>&, const Setup& setup, const Matrix<S>& z,
                               const reference::Decision<S>& decision) {
  const auto is_taken = [&](Index t, Index e) {
    return std::any_of(decision.choices.begin(), decision.choices.end(),
                       [&](const auto& c) { return c.token == t && c.expert == e; });
  };
  bool clear = true;
  for (const auto group : reference::groups_of(setup.info, z.rows()))
    for (Index e = 0; z.cols() > 1 && e < z.cols(); ++e)
      for (Index taken = group.begin; taken < group.end; ++taken)
        for (Index left = group.begin; left < group.end; ++left)
          if (reference::at(decision.state, left) == TokenState::valid && is_taken(taken, e) &&
              !is_taken(left, e))
            clear = clear && decision.probs(taken, e) - decision.probs(left, e) > kClear<S>;
  return std::vector<bool>(std::size_t(z.rows()), clear);
}

// ---- Comparisons.

// The choices that a routing made, as the reference lists them.
template <class S>
std::vector<reference::Choice<S>> choices_of(const moe::Routing<S>& routing) {
  std::vector<reference::Choice<S>> list;
  const moe::DispatchPlan<S>& plan = routing.plan;
  for (Index t = 0; t < routing.num_tokens(); ++t) {
    for (Index c = routing.chosen.token_begin[t]; c < routing.chosen.token_begin[t + 1]; ++c) {
      Index seat = -1;
      S gate = 0;
      for (Index e = 0; e < plan.num_experts(); ++e) {
        for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
          if (plan.choice[a] != c) continue;
          EXPECT_EQ(plan.token[a], t);
          EXPECT_EQ(seat, -1) << "choice " << c << " sits twice";
          seat = e;
          gate = plan.gate[a];
        }
      }
      list.push_back({t, c - routing.chosen.token_begin[t], routing.chosen.expert[c], routing.chosen.gate[c],
                      seat, gate});
    }
  }
  return list;
}

template <class T, class Keep>
std::vector<T> filtered(const std::vector<T>& list, const Keep& keep) {
  std::vector<T> kept;
  std::copy_if(list.begin(), list.end(), std::back_inserter(kept), keep);
  return kept;
}

template <class S>
void expect_same_routing(const moe::Routing<S>& routing, const Logits<S>& z,
                         const reference::Decision<S>& decision, const std::vector<bool>& clear) {
  const auto keep = [&](const auto& c) { return bool(clear[std::size_t(c.token)]); };
  const auto actual = filtered(choices_of(routing), keep);
  const auto expected = filtered(decision.choices, keep);
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const auto &a = actual[i], &b = expected[i];
    ASSERT_EQ(a.token, b.token);
    ASSERT_EQ(a.rank, b.rank) << "token " << a.token;
    ASSERT_EQ(a.expert, b.expert) << "token " << a.token << " rank " << a.rank;
    ASSERT_EQ(a.seat, b.seat) << "token " << a.token << " rank " << a.rank;
    ASSERT_NEAR(double(a.gate), double(b.gate), kTolerance<S>);
    if (a.seat >= 0) {
      ASSERT_NEAR(double(a.seat_gate), double(b.seat_gate), kTolerance<S>);
    }
  }
  ASSERT_EQ(routing.num_tokens(), Index(decision.state.size()));
  for (Index t = 0; t < routing.num_tokens(); ++t) {
    ASSERT_EQ(routing.plan.token_state[t], reference::at(decision.state, t)) << "token " << t;
    for (Index e = 0; e < routing.num_experts(); ++e) {
      ASSERT_NEAR(double(routing.router_probs(t, e)), double(decision.probs(t, e)), kTolerance<S>);
      const double largest = std::max(1.0, std::abs(double(z.clean(t, e))));
      if (std::isfinite(z.clean(t, e)) && routing.is_valid(t)) {
        ASSERT_NEAR(double(routing.router_logits(t, e)), double(z.clean(t, e)), kTolerance<S> * largest);
      }
    }
  }
  const std::vector<moe::Dropped> dropped(routing.plan.dropped.begin(), routing.plan.dropped.end());
  EXPECT_EQ(filtered(dropped, keep), filtered(decision.dropped, keep));
  const std::vector<Index> passed(routing.plan.passed_through.begin(), routing.plan.passed_through.end());
  const auto keep_token = [&](Index t) { return bool(clear[std::size_t(t)]); };
  EXPECT_EQ(filtered(passed, keep_token), filtered(decision.passed_through, keep_token));
}

template <class S>
void expect_same_output(const Matrix<S>& actual, const Matrix<S>& expected) {
  ASSERT_EQ(actual.rows(), expected.rows());
  ASSERT_EQ(actual.cols(), expected.cols());
  double largest = 0;
  for (Index i = 0; i < expected.size(); ++i)
    if (!std::isnan(expected.data()[i])) largest = std::max(largest, std::abs(double(expected.data()[i])));
  for (Index t = 0; t < expected.rows(); ++t) {
    for (Index j = 0; j < expected.cols(); ++j) {
      if (std::isnan(expected(t, j))) {
        ASSERT_TRUE(std::isnan(actual(t, j))) << "row " << t;
      } else {
        ASSERT_NEAR(double(actual(t, j)), double(expected(t, j)), kTolerance<S> * largest)
            << "row " << t << " column " << j;
      }
    }
  }
}

// ---- The test.

// What the configurations contained, so that nobody is fooled by an empty test.
struct Count {
  Index configurations = 0, tokens = 0, unclear = 0, batches = 0, unclear_batches = 0;
  Index dropped = 0, passed_through = 0, moved = 0, masked = 0, poisoned = 0, empty = 0;
  Index fewer_than_k = 0;

  template <class S>
  void add(const reference::Decision<S>& decision, const std::vector<bool>& clear, Index top_k) {
    ++configurations;
    tokens += Index(clear.size());
    unclear += Index(std::count(clear.begin(), clear.end(), false));
    empty += clear.empty();
    dropped += Index(decision.dropped.size());
    passed_through += Index(decision.passed_through.size());
    for (const auto& c : decision.choices) moved += c.seat >= 0 && c.seat != c.expert;
    Index valid = 0;
    for (const TokenState state : decision.state) {
      masked += state == TokenState::masked;
      poisoned += state == TokenState::poisoned;
      valid += state == TokenState::valid;
    }
    fewer_than_k += Index(decision.choices.size()) < valid * top_k;
  }
};

template <class S, class Router>
void check_configuration(std::uint64_t seed, Count& count) {
  Rng rng(seed);
  const Setup setup = draw_setup(rng);
  const Router router = draw_router(setup, static_cast<Router*>(nullptr), rng);
  const std::vector<AnyExpert<S>> experts = draw_experts<S>(setup.experts, setup.d_model, rng);
  const std::vector<AnyExpert<S>> shared = draw_experts<S>(setup.shared, setup.d_model, rng);
  moe::MoELayer<AnyExpert<S>, Router> layer(experts, router, {shared, setup.gated}, setup.output_bias);
  if (setup.gated) moe::fill_normal(layer.w_shared_gate, 0.5, rng);
  if (setup.output_bias) moe::fill_normal(layer.b_output, 1.0, rng);
  const Matrix<S> x = draw_input<S>(setup, rng);

  moe::Routing<S> routing;
  Matrix<S> y;
  if (setup.training) {
    moe::LayerCache<S> cache;
    y = layer.forward(x, rng, cache, setup.info, moe::Sequential{});
    routing = cache.routing;
  } else {
    routing = layer.route(x, setup.info, moe::Sequential{});
    y = layer.forward(x, setup.info, moe::Sequential{});
  }
  if (setup.gates_scale_inputs) {
    routing.plan.gate_side = moe::GateSide::input;
    y = layer.forward(x, routing, moe::Sequential{});
  }
  expect_same_output(
      y, reference::layer_output(x, experts, shared, layer.w_shared_gate, layer.b_output, routing.plan));

  const Logits<S> z = logits_of(router, x, routing);
  const reference::Decision<S> decision = decide(router, setup, z);
  const std::vector<bool> clear = clear_tokens(router, setup, z.selection, decision);
  expect_same_routing(routing, z, decision, clear);
  count.add(decision, clear, setup.top_k);
}

// 400 for each router and scalar: 2,400 in all.
template <class S, class Router>
Count check_configurations(std::uint64_t first_seed) {
  constexpr Index kConfigurations = kSanitized ? 40 : 400;
  Count count;
  for (std::uint64_t seed = first_seed; count.configurations < kConfigurations; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    check_configuration<S, Router>(seed, count);
    if (testing::Test::HasFatalFailure()) break;
  }
  EXPECT_EQ(count.configurations, kConfigurations);
  EXPECT_GT(count.masked, 0);
  EXPECT_GT(count.poisoned, 0);
  EXPECT_GT(count.passed_through, 0);
  if (kSanitized) return count;
  EXPECT_GT(count.tokens, 6000);
  EXPECT_GT(count.masked, 600);
  EXPECT_GT(count.poisoned, 20);
  EXPECT_GT(count.passed_through, 50);
  EXPECT_GE(count.empty, 1);
  // Few tokens may be so near to a tie that they are not compared, and none in double.
  EXPECT_LE(count.unclear, sizeof(S) == 4 ? count.tokens / 20 : 0);
  return count;
}

template <class S>
class RandomLayers : public testing::Test {};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(RandomLayers, Scalars);

TYPED_TEST(RandomLayers, OfATopKRouterEqualTheReference) {
  const Count count = check_configurations<TypeParam, moe::TopKRouter<TypeParam>>(1000);
  EXPECT_GT(count.moved, 0);
  if (kSanitized) return;
  EXPECT_GT(count.dropped, 1000);
  EXPECT_GT(count.moved, 50);
  EXPECT_GT(count.fewer_than_k, 10);
}

TYPED_TEST(RandomLayers, OfANoisyTopKRouterEqualTheReference) {
  const Count count = check_configurations<TypeParam, moe::NoisyTopKRouter<TypeParam>>(2000);
  EXPECT_GT(count.moved, 0);
  if (kSanitized) return;
  EXPECT_GT(count.dropped, 1000);
  EXPECT_GT(count.moved, 50);
}

TYPED_TEST(RandomLayers, OfAnExpertChoiceRouterEqualTheReference) {
  check_configurations<TypeParam, moe::ExpertChoiceRouter<TypeParam>>(3000);
}

// ---- Cases by hand, for the reference and for the library.

using moe::Dropped;

// One seat at each of three experts for three tokens, and all want expert 0.
struct OneSeatEach : testing::Test {
  Matrix<double> z{{2, 1, 0}, {2, 0, 1}, {3, 2, 0}};

  void expect(Overflow overflow, Priority priority, const std::vector<Index>& seats,
              const std::vector<Dropped>& dropped, const std::vector<Index>& passed) {
    reference::Rule rule{.top_k = 1, .capacity_factor = 1.0};
    rule.overflow = overflow;
    rule.priority = priority;
    const auto decision = reference::token_choice(z, z, rule, {});
    ASSERT_EQ(decision.choices.size(), 3u);
    for (std::size_t t = 0; t < 3; ++t) {
      EXPECT_EQ(decision.choices[t].expert, 0);
      EXPECT_EQ(decision.choices[t].seat, seats[t]);
    }
    EXPECT_EQ(decision.dropped, dropped);
    EXPECT_EQ(decision.passed_through, passed);

    Rng rng(1);
    moe::TopKRouter<double> router({.d_model = 3,
                                    .num_experts = 3,
                                    .top_k = 1,
                                    .capacity = 1.0,
                                    .overflow = overflow,
                                    .priority = priority},
                                   rng);
    router.w_router.setIdentity();
    moe::Routing<double> routing;
    router.route(z, {}, routing, moe::Sequential{});
    const auto choices = choices_of(routing);
    ASSERT_EQ(choices.size(), 3u);
    for (std::size_t t = 0; t < 3; ++t) EXPECT_EQ(choices[t].seat, seats[t]);
    EXPECT_EQ(routing.plan.dropped, copy(dropped));
    EXPECT_EQ(routing.plan.passed_through, copy(passed));
  }

  template <class T>
  static moe::Buffer<T> copy(const std::vector<T>& list) {
    moe::Buffer<T> buffer;
    for (const T& value : list) buffer.push_back(value);
    return buffer;
  }
};

TEST_F(OneSeatEach, GoesToTheFirstTokenInTokenOrder) {
  expect(Overflow::drop, Priority::token_order, {0, -1, -1}, {{1, 0, 0}, {2, 0, 0}}, {});
  expect(Overflow::pass_through, Priority::token_order, {0, -1, -1}, {{1, 0, 0}, {2, 0, 0}}, {1, 2});
}

TEST_F(OneSeatEach, GoesToTheSurestTokenByGate) {
  // Gates 0.665, 0.665 and 0.705.
  for (const Priority priority : {Priority::token_max_gate, Priority::assignment_gate}) {
    expect(Overflow::drop, priority, {-1, -1, 0}, {{0, 0, 0}, {1, 0, 0}}, {});
    expect(Overflow::pass_through, priority, {-1, -1, 0}, {{0, 0, 0}, {1, 0, 0}}, {0, 1});
  }
}

TEST_F(OneSeatEach, IsFoundElsewhereByTheOthers) {
  expect(Overflow::next_best, Priority::token_order, {0, 2, 1}, {}, {});
  expect(Overflow::next_best, Priority::token_max_gate, {1, 2, 0}, {}, {});
  z = Matrix<double>{{2, 1, 0}, {2, 1, 0}, {3, 2, 0}};  // who is asked first takes expert 1
  expect(Overflow::next_best, Priority::token_order, {0, 1, 2}, {}, {});
}

TEST(ReferenceMoE, AddsUpALayerByHand) {
  Rng rng(1);
  using Expert = moe::FeedForward<double, moe::ReLU>;
  std::vector<Expert> experts = moe::make_experts<Expert>(3, {.d_model = 1, .d_ff = 2}, rng);
  for (int e = 0; e < 3; ++e) {  // expert e: (e + 1) * max(x, 0) - max(-x, 0)
    experts[std::size_t(e)].w_up << 1, -1;
    experts[std::size_t(e)].w_down << e + 1, -1;
  }
  const Expert shared = experts[2];
  experts.pop_back();
  moe::DispatchPlan<double> plan;
  plan.num_tokens = 5;
  plan.token_state = {TokenState::valid, TokenState::valid, TokenState::masked, TokenState::poisoned,
                      TokenState::valid};
  plan.expert_begin = {0, 2, 3};
  plan.token = {0, 1, 1};
  plan.gate = {0.5, 0.25, 0.75};
  plan.choice = {0, 1, 2};
  plan.passed_through = {4};
  const Matrix<double> x{{2}, {4}, {1}, {1}, {-3}};
  const moe::Vector<double> b_output = moe::Vector<double>::Constant(1, 10);

  // Routed sums 0.5 * 2, 0.25 * 4 + 0.75 * 8, and x itself; shared 6, 12 and -3.
  const Matrix<double> by_hand{{1 + 6 + 10}, {7 + 12 + 10}, {0}, {std::nan("")}, {-3 - 3 + 10}};
  expect_same_output(reference::layer_output(x, experts, {shared}, {}, b_output, plan), by_hand);

  // Half of the shared expert, by a sigmoid of 0.
  const Matrix<double> gated{{1 + 3 + 10}, {7 + 6 + 10}, {0}, {std::nan("")}, {-3 - 1.5 + 10}};
  expect_same_output(reference::layer_output(x, experts, {shared}, Matrix<double>{{0}}, b_output, plan),
                     gated);

  // Gates scale inputs: 1 * (0.5 * 2), 1 * (0.25 * 4) + 2 * (0.75 * 4): the same, as ReLU is linear
  // along a ray.
  plan.gate_side = moe::GateSide::input;
  expect_same_output(reference::layer_output(x, experts, {shared}, {}, b_output, plan), by_hand);

  moe::TopKRouter<double> router({.d_model = 1, .num_experts = 2}, rng);
  moe::MoELayer<Expert, moe::TopKRouter<double>> layer(experts, router, {{shared}}, true);
  layer.b_output = b_output;
  moe::Routing<double> routing;
  routing.plan = plan;
  expect_same_output(layer.forward(x, routing, moe::Sequential{}), by_hand);
  routing.plan.gate_side = moe::GateSide::output;
  expect_same_output(layer.forward(x, routing, moe::Sequential{}), by_hand);
}

}  // namespace
}  // namespace reference_test
