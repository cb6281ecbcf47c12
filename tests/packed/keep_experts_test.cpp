// SPDX-License-Identifier: MIT
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "packed/packed_testing.hpp"

// A subset of experts is the whole layer with the others unavailable.
namespace moe {
namespace {

using packed_testing::message_of;
using packed_testing::same_bits;
using Gated = GatedFeedForward<float>;
using Layer = MoELayer<Gated, TopKRouter<float>>;

Layer layer_with(TopKOptions options) {
  options.d_model = 20;
  options.num_experts = 8;
  Rng rng(1);
  auto experts = make_experts<Gated>(8, {.d_model = 20, .d_ff = 24}, rng);
  return {std::move(experts),
          TopKRouter<float>(options, rng),
          {make_experts<Gated>(1, {.d_model = 20, .d_ff = 24}, rng)}};
}

Matrix<float> tokens() {
  Rng rng(2);
  Matrix<float> x(40, 20);
  fill_normal(x, 1.0, rng);
  return x;
}

const std::vector<Index> kKept{6, 1, 3};

std::vector<Gated> experts_of(std::span<const Gated> experts) { return {experts.begin(), experts.end()}; }

// The layer with minus infinity for the experts that are not kept: as bias of the logits, or for selection.
Layer without_others(Layer layer, bool renormalise) {
  TopKOptions options = layer.router().options();
  (renormalise ? options.bias : options.selection_bias) = true;
  TopKRouter<float> router(options);
  router.w_router = layer.router().w_router;
  if (layer.router().selection_bias.size() > 0) router.selection_bias = layer.router().selection_bias;
  Vector<float>& bias = renormalise ? router.b_router : router.selection_bias;
  for (const Index e : {0, 2, 4, 5, 7}) bias[e] = -std::numeric_limits<float>::infinity();
  return {experts_of(layer.experts()), std::move(router), {experts_of(layer.shared_experts())}};
}

TEST(KeepExperts, IsTheWholeLayerWithTheOthersUnavailable) {
  TopKOptions sigmoid{.top_k = 2, .score = Score::sigmoid, .renormalise = true, .selection_bias = true};
  sigmoid.group_limit = {.groups = 4, .kept = 2, .score = GroupScore::top_two_sum};
  const TopKOptions kinds[] = {
      {.top_k = 2},
      {.top_k = 4},  // more than there are
      {.top_k = 2, .softmax_before_selection = false},
      {.top_k = 2, .renormalise = true, .capacity = 1.0, .overflow = Overflow::next_best},
      sigmoid};
  const Matrix<float> x = tokens();
  for (const TopKOptions& options : kinds)
    for (const bool renormalise : {true, false}) {
      const Layer layer = layer_with(options);
      const auto subset = pack<F32>(layer, {.keep_experts = kKept, .renormalise_over_kept = renormalise});
      const auto whole = pack<F32>(without_others(layer, renormalise));
      EXPECT_TRUE(same_bits(subset.forward(x), whole.forward(x)));
      EXPECT_FALSE(subset.forward(x).hasNaN());
      EXPECT_EQ(subset.memory_bytes() * 9, whole.memory_bytes() * 4);
      EXPECT_EQ(subset.num_experts(), 8);
      const Routing<float> routing = subset.route(x);
      for (const Index e : {0, 2, 4, 5, 7}) EXPECT_EQ(routing.plan.rows_of(e), 0);
    }
}

TEST(KeepExperts, GatesAreOfTheKeptExpertsOrOfAll) {
  const Layer layer = layer_with({.top_k = 2});
  const Matrix<float> x = tokens();
  const Routing<float> all = layer.route(x);
  for (const bool renormalise : {true, false}) {
    const auto subset = pack<F32>(layer, {.keep_experts = kKept, .renormalise_over_kept = renormalise});
    const Routing<float> routing = subset.route(x);
    for (Index t = 0; t < x.rows(); ++t) {
      float kept = 0;
      for (const Index e : kKept) kept += all.router_probs(t, e);
      for (const UsedExpert<float>& used : trace(routing, t))
        EXPECT_NEAR(used.gate, all.router_probs(t, used.expert) / (renormalise ? kept : 1.0f), 1e-6);
    }
  }
}

TEST(KeepExperts, ExpertsAreNotMade) {
  const Layer layer = layer_with({.top_k = 2});
  std::vector<Index> made;
  const auto subset = pack<F32>(PackedParts<TopKRouter<float>>{layer.router()},
                                [&](Index e) {
                                  made.push_back(e);
                                  return layer.experts()[std::size_t(e)];
                                },
                                {.keep_experts = kKept});
  EXPECT_EQ(made, (std::vector<Index>{1, 3, 6}));
}

TEST(KeepExperts, RefusesWhatItCannotDo) {
  const Layer layer = layer_with({.top_k = 2});
  const auto with = [](const auto& packed_layer, std::vector<Index> kept) {
    return message_of([&] { pack<F32>(packed_layer, {.keep_experts = kept}); });
  };
  EXPECT_EQ(with(layer, {1, 8}), "pack: keep_experts has expert 8 of 8");
  EXPECT_EQ(with(layer, {1, 3, 1}), "pack: keep_experts has expert 1 twice among 3");
  EXPECT_EQ(with(layer, {-1}), "pack: keep_experts has expert -1 of 8");
  const MoELayer<Gated, HashRouter<float>> hash(
      experts_of(layer.experts()),
      HashRouter<float>({.d_model = 20, .num_experts = 8, .table = IndexVector::Zero(3)}));
  EXPECT_EQ(
      with(hash, {1}),
      "pack: keep_experts leaves out 7 of 8 experts, but the router has no make_unavailable, expected 0");
  // A routing made elsewhere that sends tokens to an expert that is not there: before anything is written.
  const auto subset = pack<F32>(layer, {.keep_experts = kKept});
  const Matrix<float> x = tokens();
  Matrix<float> y = Matrix<float>::Constant(40, 20, 3.0f);
  PackedWorkspace workspace;
  const Routing<float> routing = layer.route(x);
  EXPECT_NE(
      message_of([&] { subset.forward(x, routing, y, workspace); }).find("which was left out, expected 0"),
      std::string::npos);
  EXPECT_EQ(y, (Matrix<float>::Constant(40, 20, 3.0f)));
}

}  // namespace
}  // namespace moe
