// SPDX-License-Identifier: MIT
// A poisoned token changes nothing but its own output row. Built twice: once more with -ffast-math,
// where comparisons with NaN may not be trusted; hence everything here is compared as bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/moe.hpp>

#include "mixed_experts.hpp"

namespace moe::poison_test {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Index kVocabulary = 40;
const std::vector<Index> kPoisoned{0, 3, 64, 99};

template <class M>
bool same_bytes(const M& a, const M& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(*a.data())) == 0;
}

bool is_poisoned(Index t) { return std::find(kPoisoned.begin(), kPoisoned.end(), t) != kPoisoned.end(); }

struct Step {
  Matrix<float> inference, y, d_x;
  std::vector<float> losses;
  std::vector<Matrix<float>> gradients;
};

template <class Layer>
Step run(const Layer& layer, const Matrix<float>& x, const BatchInfo& info) {
  Step step;
  typename Layer::Cache cache;
  Layer grad = zeros_like(layer);
  Rng rng(4);
  step.inference = layer.forward(x, info);
  step.y = layer.forward(x, rng, cache, info);
  const Routing<float>& r = cache.routing;
  BatchInfo sequences;  // the first of one token, which is a poisoned one
  sequences.group_begin = IndexVector{{0, 1, std::min<Index>(40, x.rows()), x.rows()}};
  IndexVector device(layer.num_experts());
  for (Index e = 0; e < device.size(); ++e) device[e] = e % 2;
  std::vector<Loss<float>> losses{load_balancing_loss(r), importance_loss(r),
                                  sequence_balance_loss(r, sequences), device_balance_loss(r, device),
                                  relu_balance_loss(r, 1)};
  std::vector<LevelsLoss<float>> load_of_levels;
  for (const LoadThreshold threshold : {LoadThreshold::two, LoadThreshold::one}) {
    if (r.levels.empty()) {
      losses.push_back(load_loss(r, threshold));
      continue;
    }
    load_of_levels.push_back(hierarchical_load_loss(r, threshold));
    step.losses.push_back(load_of_levels.back().value);
  }
  if (r.router_logits.size() > 0) {
    losses.push_back(importance_loss(r, Importance::probs));
    losses.push_back(router_z_loss(r));
  }
  RoutingGradient<float> of_losses;
  for (const Loss<float>& loss : losses) {
    step.losses.push_back(loss.value);
    if constexpr (TrainableRouter<std::decay_t<decltype(layer.router())>>) of_losses += loss.gradient;
  }
  // The output's gradient is what a loss would make of the output: NaN where that is NaN.
  const Matrix<float> d_y = step.y;
  step.d_x = layer.backward(d_y, cache, grad, of_losses);
  if constexpr (requires { grad.router().parent(); })
    for (const LevelsLoss<float>& load : load_of_levels)
      layer.router().backward_levels(cache.x, r, load.gradients, step.d_x, grad.router());
  Layer::visit([&](const ParameterInfo&, const auto& g) { step.gradients.push_back(Matrix<float>(g)); },
               grad);
  return step;
}

template <class Expert>
Step run(const SoftMoELayer<Expert>& layer, const Matrix<float>& x, const BatchInfo& info) {
  using Layer = SoftMoELayer<Expert>;
  Step step;
  typename Layer::Cache cache;
  Layer grad = zeros_like(layer);
  step.inference = layer.forward(x, info);
  step.y = layer.forward(x, cache, info);
  const Matrix<float> d_y = step.y;
  step.d_x = layer.backward(d_y, cache, grad);
  Layer::visit([&](const ParameterInfo&, const auto& g) { step.gradients.push_back(Matrix<float>(g)); },
               grad);
  return step;
}

template <class Layer>
void expect_contained(Layer layer, const std::string& what) {
  Rng rng(6);
  Layer::visit([&](const ParameterInfo&, auto& p) { fill_normal(p, 0.3, rng); }, layer);
  const Index tokens = 100, d_model = layer.d_model();
  Matrix<float> clean(tokens, d_model);
  fill_normal(clean, 1.0, rng);
  BatchInfo info;
  info.token_ids.resize(tokens);  // for routers that look at them
  for (Index& id : info.token_ids) id = rng.index(kVocabulary);
  BatchInfo masked = info;
  masked.mask = Mask::Constant(tokens, true);
  for (const Index t : kPoisoned) masked.mask[t] = false;
  const Step expected = run(layer, clean, masked);
  for (const Index t : kPoisoned) {
    EXPECT_TRUE((expected.y.row(t).array() == 0).all());
    EXPECT_TRUE((expected.d_x.row(t).array() == 0).all());
  }
  for (const float poison : {kNaN, -kNaN, kInfinity, -kInfinity}) {
    Matrix<float> x = clean;
    for (const Index t : kPoisoned) x(t, t % d_model) = poison;
    for (const bool mask_too : {false, true}) {
      const Step got = run(layer, x, mask_too ? masked : info);
      for (const Matrix<float>* y : {&got.inference, &got.y}) {
        const Matrix<float>& wanted = y == &got.y ? expected.y : expected.inference;
        for (Index t = 0; t < tokens; ++t) {
          if (is_poisoned(t) && !mask_too) {
            for (Index j = 0; j < d_model; ++j)
              EXPECT_EQ(number_kind((*y)(t, j)), NumberKind::nan) << what << ", token " << t;
          } else {
            EXPECT_TRUE(same_bytes(Vector<float>(y->row(t)), Vector<float>(wanted.row(t))))
                << what << ", token " << t;
          }
        }
      }
      EXPECT_TRUE(same_bytes(got.d_x, expected.d_x)) << what << ", d_x";
      ASSERT_EQ(got.losses.size(), expected.losses.size());
      if (!got.losses.empty()) {
        EXPECT_EQ(std::memcmp(got.losses.data(), expected.losses.data(), got.losses.size() * sizeof(float)),
                  0)
            << what << ", losses";
      }
      ASSERT_EQ(got.gradients.size(), expected.gradients.size());
      for (std::size_t i = 0; i < got.gradients.size(); ++i)
        EXPECT_TRUE(same_bytes(got.gradients[i], expected.gradients[i])) << what << ", parameter " << i;
    }
  }
}

// A router whose gates scale inputs has no gated shared experts beside it.
template <class Router>
void expect_contained_with(const Router& router, const std::string& what, bool gated_shared = true) {
  Rng rng(1);
  const Index d = router.d_model(), experts = router.num_experts();
  const typename GatedFeedForward<float>::Options gated{.d_model = d, .d_ff = 20, .bias = true};
  using Layer = MoELayer<GatedFeedForward<float>, Router>;
  expect_contained(Layer(make_experts<GatedFeedForward<float>>(experts, gated, rng), router), what);
  expect_contained(Layer(make_experts<GatedFeedForward<float>>(experts, gated, rng), router,
                         {make_experts<GatedFeedForward<float>>(1, gated, rng), gated_shared}, true),
                   what + " with a shared expert");
}

TEST(Poison, StaysInItsTokenWithTopK) {
  Rng rng(1);
  int i = 0;
  for (const Overflow overflow : {Overflow::drop, Overflow::next_best, Overflow::pass_through})
    for (const Priority priority : {Priority::token_order, Priority::token_max_gate,
                                    Priority::assignment_gate, Priority::token_max_prob})
      expect_contained_with(
          TopKRouter<float>({.d_model = 12,
                             .num_experts = 5,
                             .top_k = 2,
                             .softmax_before_selection = ++i % 2 == 0,
                             .jitter = 0.1,
                             .capacity = 1.0,
                             .training_capacity = 0.7,
                             .overflow = overflow,
                             .priority = priority},
                            rng),
          "overflow " + std::to_string(int(overflow)) + ", priority " + std::to_string(int(priority)));
}

TEST(Poison, StaysInItsTokenWithNoisyTopK) {
  Rng rng(1);
  expect_contained_with(NoisyTopKRouter<float>({.d_model = 12, .num_experts = 5, .top_k = 2}, rng),
                        "noisy top-k");
}

TEST(Poison, StaysInItsTokenWithExpertChoice) {
  Rng rng(1);
  expect_contained_with(
      ExpertChoiceRouter<float>({.d_model = 12, .num_experts = 5, .overflow = Overflow::pass_through}, rng),
      "expert choice");
}

TEST(Poison, StaysInItsTokenWithReLURouting) {
  Rng rng(1);
  expect_contained_with(
      TopKRouter<float>({.d_model = 12, .num_experts = 5, .top_k = 5, .score = Score::relu}, rng), "ReLU");
}

TEST(Poison, StaysInItsTokenWithOtherOptionsOfTopK) {
  const auto of_inputs = [](Score score) {
    return TopKOptions{.d_model = 12,
                       .num_experts = 6,
                       .score = score,
                       .gate_side = GateSide::input,
                       .training_capacity = 0.8,
                       .overflow = Overflow::next_best};
  };
  const std::pair<const char*, TopKOptions> rows[] = {
      {"sigmoid, bias, groups",
       {.d_model = 12,
        .num_experts = 6,
        .score = Score::sigmoid,
        .renormalise = true,
        .selection_bias = true,
        .group_limit = {.groups = 3, .kept = 2, .score = GroupScore::top_two_sum}}},
      {"sqrt-softplus",
       {.d_model = 12,
        .num_experts = 6,
        .score = Score::sqrt_softplus,
        .bias = true,
        .training_capacity = 0.8}},
      {"top-p", {.d_model = 12, .num_experts = 6, .top_k = 6, .top_p = 0.4, .training_capacity = 0.5}},
      {"second threshold", {.d_model = 12, .num_experts = 6, .second_threshold = 0.2, .capacity = 1.0}},
      {"random second experts",
       {.d_model = 12, .num_experts = 6, .random_second_threshold = 0.5, .renormalise = true}},
      {"noise", {.d_model = 12, .num_experts = 6, .noise_stddev = 0.5}},
      {"softmax gates of inputs", of_inputs(Score::softmax)},
      {"sigmoid gates of inputs", of_inputs(Score::sigmoid)},
      {"sqrt-softplus gates of inputs", of_inputs(Score::sqrt_softplus)},
  };
  for (const auto& [what, options] : rows) {
    Rng rng(1);
    expect_contained_with(TopKRouter<float>(options, rng), what, options.gate_side != GateSide::input);
  }
}

TEST(Poison, StaysInItsTokenWithThreeWayExperts) {
  Rng rng(1);
  expect_contained(MoELayer(make_experts<ThreeWayFeedForward<float>>(5, {.d_model = 12, .d_ff = 20}, rng),
                            TopKRouter<float>({.d_model = 12, .num_experts = 5}, rng)),
                   "three-way experts");
}

TEST(Poison, StaysInItsTokenWithNullExperts) {
  Rng rng(1);
  const std::vector<MixedExpert> experts = make_mixed_experts(12, 20, rng);
  for (const GateSide side : {GateSide::output, GateSide::input})
    expect_contained(
        MoELayer(experts, TopKRouter<float>({.d_model = 12, .num_experts = 8, .gate_side = side}, rng)),
        side == GateSide::input ? "null experts, gates of inputs" : "null experts");
}

TEST(Poison, StaysInItsTokenWithSinkhorn) {
  Rng rng(1);
  expect_contained_with(SinkhornRouter<float>({.d_model = 12, .num_experts = 5, .top_k = 2}, rng),
                        "Sinkhorn");
}

TEST(Poison, StaysInItsTokenWithSparseMixer) {
  Rng rng(1);
  expect_contained_with(SparseMixerRouter<float>({.d_model = 12, .num_experts = 5, .jitter = 0.3}, rng),
                        "SparseMixer");
}

TEST(Poison, StaysInItsTokenWithRoutersOfRouters) {
  Rng rng(1);
  using Level = NoisyTopKRouter<float>;
  const Level parent({.d_model = 12, .num_experts = 3, .top_k = 2}, rng);
  std::vector<Level> children;
  for (int i = 0; i < 3; ++i)
    children.emplace_back(Level::Options{.d_model = 12, .num_experts = 3, .top_k = 2}, rng);
  expect_contained_with(HierarchicalRouter(parent, children), "a router of routers");
}

TEST(Poison, StaysInItsTokenWithHashes) {
  Rng rng(1);
  for (const Overflow overflow : {Overflow::drop, Overflow::pass_through})
    expect_contained_with(HashRouter<float>({.d_model = 12,
                                             .num_experts = 5,
                                             .table = random_hash_table(kVocabulary, 5, rng),
                                             .capacity = 0.8,
                                             .overflow = overflow}),
                          "hashes");
}

TEST(Poison, StaysInItsTokenInSoftMoE) {
  Rng rng(1);
  for (const bool normalise : {true, false})
    expect_contained(
        SoftMoELayer(make_experts<GatedFeedForward<float>>(5, {.d_model = 12, .d_ff = 20, .bias = true}, rng),
                     {.d_model = 12, .num_experts = 5, .slots_per_expert = 2, .normalise = normalise}, rng),
        normalise ? "Soft MoE" : "Soft MoE of plain dot products");
}

TEST(Poison, ABatchOfPoisonedTokensOnlyIsNaNAndHasNoLoss) {
  Rng rng(1);
  const MoELayer layer(make_experts<FeedForward<float>>(3, {.d_model = 4, .d_ff = 5}, rng),
                       TopKRouter<float>({.d_model = 4, .num_experts = 3}, rng));
  const Step step = run(layer, Matrix<float>::Constant(7, 4, kNaN), {});
  for (Index i = 0; i < step.y.size(); ++i) EXPECT_EQ(number_kind(step.y.data()[i]), NumberKind::nan);
  for (const float loss : step.losses) EXPECT_EQ(loss, 0.0f);
  EXPECT_TRUE((step.d_x.array() == 0).all());
  for (const Matrix<float>& g : step.gradients) EXPECT_TRUE((g.array() == 0).all());
}

// Minus infinity for some experts is ordinary, for all of them it is poison.
TEST(Poison, MinusInfinityForAllExpertsIsPoisonButForSomeIsNot) {
  Rng rng(1);
  TopKRouter<float> router({.d_model = 4, .num_experts = 3, .top_k = 3, .bias = true}, rng);
  router.b_router[1] = -kInfinity;
  Matrix<float> x(2, 4);
  fill_normal(x, 1.0, rng);
  Routing<float> routing;
  router.route(x, {}, routing);
  EXPECT_EQ(routing.plan.num_valid_tokens(), 2);
  EXPECT_EQ(routing.plan.rows_of(1), 0);
  EXPECT_EQ(routing.plan.num_assignments(), 4);
  EXPECT_EQ(routing.router_probs(0, 1), 0.0f);
  router.b_router.setConstant(-kInfinity);
  router.route(x, {}, routing);
  EXPECT_EQ(routing.plan.token_state[0], TokenState::poisoned);
  EXPECT_EQ(routing.plan.num_assignments(), 0);
}

}  // namespace
}  // namespace moe::poison_test
