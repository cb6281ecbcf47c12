// SPDX-License-Identifier: MIT
#include <cmath>
#include <stdexcept>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

// Where published implementations of the same layer differ: what this library computes, and that
// the other value would be another one. The rows are in docs/models.md. Values are worked out by
// hand or in a line of arithmetic. Most routers have the identity as weights: tokens are logits.
namespace {

using moe::BatchInfo;
using moe::Index;
using moe::IndexVector;
using moe::Matrix;
using moe::Routing;
using moe::Vector;
using TopK = moe::TopKRouter<double>;
using Copy = moe::CopyExpert<double>;
using Chosen = moe::Buffer<Index>;

TopK identity_router(TopK::Options options, Index experts) {
  options.d_model = options.num_experts = experts;
  TopK router(options);
  router.w_router.setIdentity();
  return router;
}

Routing<double> route(const TopK& router, const Matrix<double>& x, const BatchInfo& info = {}) {
  Routing<double> routing;
  router.route(x, info, routing);
  return routing;
}

// A layer of experts that return what they get.
moe::MoELayer<Copy, TopK> copy_layer(const TopK& router) {
  return {std::vector<Copy>(std::size_t(router.num_experts()), Copy({.d_model = router.d_model()})), router};
}

double silu(double v) { return v / (1 + std::exp(-v)); }

// DeepSeek-V2's first code either normalises or scales, Hugging Face's only scales. V3's does both.
TEST(Divergences, GatesAreNormalisedAndScaled) {
  const Matrix<double> x{{std::log(5.0), std::log(3.0), std::log(2.0)}};  // p = .5, .3, .2
  TopK::Options options{.top_k = 2, .renormalise = true, .gate_scale = 16};
  const auto both = route(identity_router(options, 3), x);
  EXPECT_NEAR(both.plan.gate[0], 16 * .5 / .8, 1e-13);  // to normalise alone gives .625
  EXPECT_NEAR(both.plan.gate[1], 16 * .3 / .8, 1e-13);
  options.renormalise = false;
  const auto scaled = route(identity_router(options, 3), x);
  EXPECT_NEAR(scaled.plan.gate[0], 8, 1e-13);
  EXPECT_NEAR(scaled.plan.gate[1], 4.8, 1e-13);
  EXPECT_FALSE(moe::deepseek_v2.router.renormalise);
  EXPECT_TRUE(moe::deepseek_v3.router.renormalise);
}

// Hugging Face gives the groups left out a score of 0, which wins over negative ones. Scores are .5
// everywhere, biased ones -.1, -.3, -.2, -.25 in the first group and -.5 in the second: 0 would
// choose experts 4 and 5.
TEST(Divergences, GroupsLeftOutNeverWinOverNegativeScores) {
  TopK router = identity_router({.top_k = 2,
                                 .score = moe::Score::sigmoid,
                                 .renormalise = true,
                                 .selection_bias = true,
                                 .group_limit = {2, 1, moe::GroupScore::top_two_sum}},
                                8);
  router.selection_bias << -.6, -.8, -.7, -.75, -1, -1, -1, -1;
  const auto routing = route(router, Matrix<double>::Zero(1, 8));
  ASSERT_EQ(routing.chosen.expert, (Chosen{0, 2}));
  EXPECT_NEAR(routing.chosen.gate[0], .5, 1e-15);
}

// Scores of minus infinity for all others would be NaN where the kept groups have fewer experts
// than a token takes.
TEST(Divergences, GroupsWithTooFewExpertsAreRefused) {
  try {
    identity_router({.top_k = 3, .group_limit = {4, 1, moe::GroupScore::max}}, 8);
    FAIL() << "3 experts of a group of 2";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("kept groups have 2 experts"), std::string::npos)
        << error.what();
  }
}

// The scale is of routed experts; shared ones are added as they are.
TEST(Divergences, TheScaleOfGatesLeavesSharedExpertsAlone) {
  const TopK router = identity_router({.top_k = 2, .renormalise = true, .gate_scale = 2.5}, 2);
  const moe::MoELayer<Copy, TopK> layer{std::vector<Copy>(2, Copy({.d_model = 2})), router,
                                        moe::SharedExperts<Copy>{{Copy({.d_model = 2})}}};
  const Matrix<double> x{{1, -2}};
  EXPECT_TRUE(layer.forward(x).isApprox((2.5 + 1) * x, 1e-14));
}

// sigmoid(-60) is 8.76e-27: beside it 1e-20 is much.
TEST(Divergences, AnEpsilonMattersWhereAllScoresAreTiny) {
  const Matrix<double> x{{-60, -60}};
  TopK::Options options{.top_k = 2, .score = moe::Score::sigmoid, .renormalise = true};
  EXPECT_NEAR(route(identity_router(options, 2), x).chosen.gate[0], .5, 1e-15);
  options.renormalise_epsilon = 1e-20;
  const double s = std::exp(-60);
  EXPECT_NEAR(route(identity_router(options, 2), x).chosen.gate[0], s / (2 * s + 1e-20), 1e-19);
}

// ERNIE divides by at least 1e-12: here the bias chooses an expert of probability exp(-40), 4.2e-18.
TEST(Divergences, AMinimumOfTheSumMattersWhereTheBiasChoosesSmallProbabilities) {
  TopK::Options options{.top_k = 1, .renormalise = true, .selection_bias = true, .allow_constant_gate = true};
  TopK router = identity_router(options, 2);
  router.selection_bias << 0, 2;
  const Matrix<double> x{{0, -40}};
  EXPECT_EQ(route(router, x).chosen.gate[0], 1);
  options.renormalise_minimum = moe::ernie_4_5_21b_a3b.router.renormalise_minimum;
  EXPECT_EQ(options.renormalise_minimum, 1e-12);
  router = identity_router(options, 2);
  router.selection_bias << 0, 2;
  const double p = std::exp(-40.0) / (1 + std::exp(-40.0));
  const Routing<double> routing = route(router, x);
  EXPECT_NEAR(routing.chosen.gate[0], p / 1e-12, 1e-20);
  // The minimum is a constant: the gate's derivative is that of the probability.
  moe::RoutingGradient<double> gradient;
  gradient.d_chosen_gate.assign(1, 1.0);
  TopK grad = moe::zeros_like(router);
  Matrix<double> d_x = Matrix<double>::Zero(1, 2);
  router.backward(x, routing, gradient, d_x, grad);
  EXPECT_NEAR(d_x(0, 1), p * (1 - p) / 1e-12, 1e-20);
  EXPECT_NEAR(d_x(0, 0), -p * (1 - p) / 1e-12, 1e-20);
  // Where the sum is larger it is what gates are divided by.
  EXPECT_EQ(route(router, Matrix<double>{{0, -20}}).chosen.gate[0], 1);
}

// In bfloat16 both logits are 1, and the tie goes to some expert.
TEST(Divergences, LogitsThatBfloat16MakesEqualAreNot) {
  moe::TopKRouter<float> router({.d_model = 2, .num_experts = 2, .top_k = 1});
  router.w_router.setIdentity();
  Routing<float> routing;
  router.route(Matrix<float>{{1, 1.001f}}, {}, routing);
  EXPECT_EQ(routing.chosen.expert, (Chosen{1}));
}

// In float the sigmoids of both are 1. A selection by sigmoids sees a tie, one by logits does not.
TEST(Divergences, SigmoidsThatRoundToOneAreRankedByLogits) {
  ASSERT_EQ(1 / (1 + std::exp(-20.f)), 1 / (1 + std::exp(-30.f)));
  moe::TopKRouter<float> router({.d_model = 2, .num_experts = 2, .top_k = 1, .score = moe::Score::sigmoid});
  router.w_router.setIdentity();
  Routing<float> routing;
  router.route(Matrix<float>{{20, 30}}, {}, routing);
  EXPECT_EQ(routing.chosen.expert, (Chosen{1}));
}

// Llama 4: f(s x), which is not s f(x) for a gated unit. f(x) = silu(x) x, s = sigmoid(2).
TEST(Divergences, GatesOfInputsAreNotGatesOfOutputs) {
  TopK router({.d_model = 1,
               .num_experts = 1,
               .top_k = 1,
               .score = moe::Score::sigmoid,
               .gate_side = moe::GateSide::input});
  router.w_router << 1;
  moe::GatedFeedForward<double> expert({.d_model = 1, .d_ff = 1});
  expert.w_gate << 1;
  expert.w_up << 1;
  expert.w_down << 1;
  const moe::MoELayer<moe::GatedFeedForward<double>, TopK> layer{{expert}, router};
  const double s = 1 / (1 + std::exp(-2.0)), y = layer.forward(Matrix<double>{{2.}})(0, 0);
  EXPECT_NEAR(y, silu(2 * s) * 2 * s, 1e-14);
  EXPECT_GT(std::abs(y - s * silu(2) * 2), 0.1);
}

// The gate multiplies all of an expert's output, its last bias too.
TEST(Divergences, GatesScaleTheBiasOfAnExpert) {
  using Expert = moe::FeedForward<double>;
  Expert expert({.d_model = 2, .d_ff = 1, .bias = true});
  expert.b_down << 3, -1;
  const moe::MoELayer<Expert, TopK> layer{{expert, expert}, identity_router({.top_k = 1}, 2)};
  const Matrix<double> y = layer.forward(Matrix<double>{{std::log(3.0), 0}});  // a gate of 3/4
  EXPECT_NEAR(y(0, 0), 2.25, 1e-14);
  EXPECT_NEAR(y(0, 1), -.75, 1e-14);
}

// Hugging Face's Mixtral and PhiMoE jitter what experts get, too. Gates have a sum of 1 and experts
// return x: so must the layer, whatever the jitter of the router.
TEST(Divergences, JitterDoesNotReachExperts) {
  const auto layer = copy_layer(identity_router({.top_k = 2, .renormalise = true, .jitter = .5}, 2));
  const Matrix<double> x{{1, 2}, {-3, .5}};
  moe::Rng rng(1);
  moe::MoELayer<Copy, TopK>::Cache cache;
  EXPECT_TRUE(layer.forward(x, rng, cache).isApprox(x, 1e-14));
  EXPECT_GT((cache.routing.router_logits - x).cwiseAbs().maxCoeff(), .01);
}

// PhiMoE's option of that name is here the margin of its near ties alone.
TEST(Divergences, JitterOfSparseMixerLeavesItsInputAlone) {
  moe::SparseMixerRouter<double> router({.d_model = 3, .num_experts = 3, .jitter = .4});
  router.w_router.setIdentity();
  const Matrix<double> x{{1, 2, 3}, {-1, .5, 0}};
  moe::Rng rng(1);
  Routing<double> routing;
  router.route(x, rng, {}, routing);
  EXPECT_EQ(routing.router_logits, x);
  EXPECT_EQ(routing.input_factor.size(), 0);
}

// Hugging Face's Switch once returned p x for a dropped token, and reports it as one of expert 0.
// Three tokens want expert 1 of 2 with p = 3/4, and one of them has a seat.
TEST(Divergences, ADroppedTokenIsZeroAndCountsForTheExpertThatItWanted) {
  const auto layer = copy_layer(identity_router({.top_k = 1, .capacity = 2.0 / 3}, 2));
  Matrix<double> x(3, 2);
  x.rowwise() = Matrix<double>{{0, std::log(3.0)}}.row(0);
  moe::MoELayer<Copy, TopK>::Cache cache;
  const Matrix<double> y = layer.forward(x, cache);
  EXPECT_TRUE(y.row(0).isApprox(.75 * x.row(0), 1e-14));
  EXPECT_EQ(y.bottomRows(2).norm(), 0);
  EXPECT_EQ(moe::demand_per_expert(cache.routing), (IndexVector{{0, 3}}));
  // 2 * (f . P) with f = (0, 1); f = (2/3, 1/3) would make it 2 * (2/3 / 4 + 1/3 * 3/4) = 5/6.
  EXPECT_NEAR(moe::load_balancing_loss(cache.routing).value, 1.5, 1e-14);
}

// Hugging Face's NLLB keeps the capacity of its first batch.
TEST(Divergences, CapacityIsThatOfEachBatch) {
  const TopK router = identity_router({.top_k = 1, .capacity = 1.0}, 2);
  Matrix<double> x = Matrix<double>::Zero(8, 2);
  x.col(0).setOnes();
  Routing<double> routing;
  for (const Index tokens : {2, 8, 4}) {
    router.route(x.topRows(tokens), {}, routing);
    EXPECT_EQ(routing.plan.rows_of(0), tokens / 2);
  }
}

// Hugging Face's NLLB, told to normalise before drops, still draws by p and takes p as the gate in
// its branch "random". Normalised gates are 4/7 and 3/7: under a threshold of 1/2 and a draw of .7
// the second is taken, as 6/7 > .7; 2 p = .6 is not.
TEST(Divergences, ARandomSecondExpertIsDrawnByItsNormalisedGate) {
  const Matrix<double> z{{std::log(4.0), std::log(3.0), std::log(2.0), 0}};  // p = .4, .3, .2, .1
  const double draw = .7;
  Routing<double> routing;
  moe::begin_routing(1, 4, {}, routing, "test");
  routing.router_logits = z;
  moe::RouterWorkspace<double> workspace;
  moe::route_by_logits({.gate = {.renormalise = true}, .top_k = 2, .second_threshold = .5},
                       {.second_draws = {&draw, 1}}, {}, routing, workspace, moe::Sequential{});
  ASSERT_EQ(routing.chosen.expert, (Chosen{0, 1}));
  EXPECT_NEAR(routing.chosen.gate[0], 4.0 / 7, 1e-15);
  EXPECT_NEAR(routing.chosen.gate[1], 3.0 / 7, 1e-15);
}

// mesh draws second experts in inference, too; here it takes an Rng to draw.
TEST(Divergences, InferenceTakesEverySecondExpert) {
  const TopK router = identity_router({.top_k = 2, .random_second_threshold = .5, .renormalise = true}, 2);
  const auto routing = route(router, Matrix<double>{{5, 0}});  // a gate of .0067
  EXPECT_EQ(routing.chosen.expert, (Chosen{0, 1}));
}

// Hugging Face's loss is of the tokens of all layers together. One layer sends all to expert 0, the
// other to expert 1: each has the largest loss there is, 2, and together they seem balanced.
TEST(Divergences, TheLossOfLayersTogetherIsNotTheMeanOfTheirs) {
  const TopK router = identity_router({.top_k = 1}, 2);
  const Matrix<double> first{{800, 0}, {800, 0}}, second{{0, 800}, {0, 800}};
  Matrix<double> both(4, 2);
  both << first, second;
  EXPECT_NEAR(moe::load_balancing_loss(route(router, first)).value, 2, 1e-14);
  EXPECT_NEAR(moe::load_balancing_loss(route(router, second)).value, 2, 1e-14);
  EXPECT_NEAR(moe::load_balancing_loss(route(router, both)).value, 1, 1e-14);
  EXPECT_EQ(moe::mixtral_8x7b.losses.over_layers, moe::OverLayers::mean);
}

// lingvo, mesh, flaxformer and V-MoE take the mean of the losses of groups. The plain loss is of
// the batch, whatever its groups; that of each group, of all choices or of the first, is asked for.
TEST(Divergences, TheLossOfABatchIsNotTheMeanOfItsGroups) {
  const Matrix<double> x{{800, 0}, {800, 0}, {0, 800}, {0, 800}};  // a group each for expert 0 and 1
  const BatchInfo info{.group_begin = IndexVector{{0, 2, 4}}};
  const auto one = route(identity_router({.top_k = 1}, 2), x, info);
  EXPECT_NEAR(moe::load_balancing_loss(one).value, 1, 1e-14);
  EXPECT_NEAR(moe::sequence_balance_loss(one, info).value, 2, 1e-14);
  const auto two = route(identity_router({.top_k = 2}, 2), x, info);
  const auto first = moe::demand_per_expert(two, 1);
  EXPECT_NEAR(moe::load_balancing_loss(two, first, 4).value, 1, 1e-14);
  EXPECT_NEAR(moe::sequence_balance_loss(two, info, moe::most_probable_choices(two, 1)).value, 2, 1e-14);
}

// The plain loss counts the experts that ran; what scores alone would choose is counted where it is
// asked for (DeepSeek-V3; Megatron-LM; Hugging Face's ERNIE). p = (.6, .4), the bias chooses
// expert 1.
TEST(Divergences, ABalanceLossCountsTheExpertsThatRanUnlessTold) {
  TopK router = identity_router({.top_k = 1, .selection_bias = true}, 2);
  router.selection_bias << 0, 1;
  const auto routing = route(router, Matrix<double>{{std::log(1.5), 0}});
  EXPECT_NEAR(moe::load_balancing_loss(routing).value, 2 * .4, 1e-15);
  EXPECT_NEAR(moe::sequence_balance_loss(routing, {}, moe::most_probable_choices(routing, 1)).value, 2 * .6,
              1e-15);
}

// p = (3/4, 1/4). A second softmax would make it (.622, .378), and the z-loss ln(e^.75 + e^.25)^2.
TEST(Divergences, LossesSeeOneSoftmax) {
  const auto routing = route(identity_router({.top_k = 1}, 2), Matrix<double>{{std::log(3.0), 0}});
  EXPECT_NEAR(moe::load_balancing_loss(routing).value, 2 * .75, 1e-15);
  EXPECT_NEAR(moe::router_z_loss(routing).value, std::log(4.0) * std::log(4.0), 1e-14);
}

// P is the mean over all experts: (.5, .3, .2) for one token that takes the first. Over the chosen
// expert alone it would be 1, and the loss 3.
TEST(Divergences, ProbabilitiesOfTheLossAreOverAllExperts) {
  const auto routing =
      route(identity_router({.top_k = 1, .renormalise = true, .allow_constant_gate = true}, 3),
            Matrix<double>{{std::log(5.0), std::log(3.0), std::log(2.0)}});
  EXPECT_NEAR(moe::load_balancing_loss(routing).value, 3 * .5, 1e-14);
}

// Tokens 0 and 1 are padding and want expert 0, tokens 2 and 3 want expert 1, each with p = 3/4.
// Hugging Face's blocks route padding: it takes seats, and counts.
TEST(Divergences, PaddingCountsOnlyWithoutAMask) {
  const double z = std::log(3.0);
  const Matrix<double> x{{z, 0}, {z, 0}, {0, z}, {0, z}};
  const TopK router = identity_router({.top_k = 1, .capacity = 1.0}, 2);
  BatchInfo info;
  info.mask = moe::Mask::Constant(4, true);
  info.mask[0] = info.mask[1] = false;
  const auto masked = route(router, x, info), counted = route(router, x);
  EXPECT_EQ(masked.plan.rows_of(0), 0);
  EXPECT_EQ(masked.plan.rows_of(1), 1);  // of 2 tokens: 1 seat
  EXPECT_NEAR(moe::load_balancing_loss(masked).value, 2 * .75, 1e-14);
  EXPECT_EQ(counted.plan.rows_of(0), 2);
  EXPECT_EQ(counted.plan.rows_of(1), 2);
  EXPECT_NEAR(moe::load_balancing_loss(counted).value, 1, 1e-14);
}

// DeepSpeed, FairScale and lingvo route by combine.bool(): a gate that underflows to 0 takes its
// token away.
TEST(Divergences, AGateThatUnderflowsKeepsItsSeat) {
  const auto routing = route(identity_router({.top_k = 2}, 2), Matrix<double>{{0, -2000}});
  ASSERT_EQ(routing.plan.rows_of(1), 1);
  EXPECT_EQ(routing.plan.gate[1], 0);
}

// Variance of a population: importance 3 and 1 has 1 / 2^2. Over n - 1 (Tutel, FastMoE) it is twice
// that.
TEST(Divergences, VariationIsThatOfAPopulation) {
  const auto routing =
      route(identity_router({.top_k = 1, .renormalise = true, .allow_constant_gate = true}, 2),
            Matrix<double>{{1, 0}, {1, 0}, {1, 0}, {0, 1}});
  EXPECT_NEAR(moe::importance_loss(routing).value, .25, 1e-10);
}

// Of bfloat16 the number after 1 is 1.0078: a step of 0.001 would be lost.
TEST(Divergences, ASmallStepOfASelectionBiasIsNotLost) {
  Vector<float> bias{{1, 1}};
  moe::update_selection_bias(bias, IndexVector{{3, 1}}, 1e-3);
  EXPECT_FLOAT_EQ(bias[0], .999f);
  EXPECT_FLOAT_EQ(bias[1], 1.001f);
}

// ERNIE adds the bias to probabilities (.5, .3, .2): .2 + .4 is the largest. Added to logits it
// would leave experts 0 and 1 in front; Megatron-LM leaves it out beside a softmax.
TEST(Divergences, ASelectionBiasIsAddedToProbabilities) {
  TopK router = identity_router({.top_k = 2, .renormalise = true, .selection_bias = true}, 3);
  router.selection_bias << 0, 0, .4;
  const auto routing = route(router, Matrix<double>{{std::log(5.0), std::log(3.0), std::log(2.0)}});
  ASSERT_EQ(routing.chosen.expert, (Chosen{2, 0}));
  EXPECT_NEAR(routing.chosen.gate[0], .2 / .7, 1e-15);
  EXPECT_NEAR(routing.chosen.gate[1], .5 / .7, 1e-15);
}

// MoE++ as released sets the zero expert's gate to 0 before it normalises, and doubles inputs: f(2
// x) with a gate of 1. Here, as with moe_use_mixtral_gating, the zero expert keeps its share of
// 3/4.
TEST(Divergences, AZeroExpertKeepsItsShare) {
  using Zero = moe::ZeroExpert<double>;
  using Any = moe::VariantExpert<Copy, Zero>;
  const moe::MoELayer<Any, TopK> layer{{Any(Copy({.d_model = 2})), Any(Zero({.d_model = 2}))},
                                       identity_router({.top_k = 2, .renormalise = true}, 2)};
  const Matrix<double> x{{0, std::log(3.0)}};
  EXPECT_TRUE(layer.forward(x).isApprox(.25 * x, 1e-14));
}

}  // namespace
