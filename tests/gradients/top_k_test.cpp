// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "layers.hpp"

// Layers with a TopKRouter: every kind of gates, expert, seating, shared experts and loss.
namespace {

using namespace gradients;
using TopK = moe::TopKRouter<double>;

template <class Expert>
class GradientsOfTopKLayers : public testing::Test {};
TYPED_TEST_SUITE(GradientsOfTopKLayers, ExpertTypes);

TYPED_TEST(GradientsOfTopKLayers, WithOneExpertAToken) {
  check_all_seatings<TypeParam>(1, [](const Seating& seating, Rng& rng) {
    return TopK(seated<TopK::Options>({.top_k = 1, .jitter = 0.2}, seating), rng);
  });
}

TYPED_TEST(GradientsOfTopKLayers, WithProbabilitiesAsGates) {
  check_all_seatings<TypeParam>(2, [](const Seating& seating, Rng& rng) {
    return TopK(seated<TopK::Options>({.top_k = 2, .bias = true}, seating), rng);
  });
}

TYPED_TEST(GradientsOfTopKLayers, WithGatesThatSumToOne) {
  check_all_seatings<TypeParam>(3, [](const Seating& seating, Rng& rng) {
    return TopK(
        seated<TopK::Options>({.top_k = 2, .softmax_before_selection = false, .jitter = 0.2}, seating), rng);
  });
}

TYPED_TEST(GradientsOfTopKLayers, WithGatesThatSumToOneAfterDrops) {
  check_all_seatings<TypeParam>(4, [](const Seating& seating, Rng& rng) {
    return TopK(seated<TopK::Options>(
                    {.top_k = 2, .renormalise = true, .bias = true, .renormalise_after_drop = true}, seating),
                rng);
  });
}

// Other scores than the softmax, and what selection may look at beside the logits.

TEST(GradientsOfScores, OfASigmoidWithNoise) {
  check_all_seatings<ReLUExpert>(5, [](const Seating& seating, Rng& rng) {
    return TopK(seated<TopK::Options>(
                    {.top_k = 2, .score = moe::Score::sigmoid, .bias = true, .noise_stddev = 0.4}, seating),
                rng);
  });
}

TEST(GradientsOfScores, OfASigmoidWithSelectionBiasAndGroupsAndSum) {
  check_all_seatings<ReLUExpert>(6, [](const Seating& seating, Rng& rng) {
    return TopK(
        seated<TopK::Options>({.top_k = 1,  // of a group of two
                               .score = moe::Score::sigmoid,
                               .renormalise = true,
                               .renormalise_epsilon = 0.1,
                               .gate_scale = 2.5,
                               .selection_bias = true,
                               .group_limit = {.groups = 2, .kept = 1, .score = moe::GroupScore::top_two_sum},
                               .renormalise_after_drop = true,
                               .allow_constant_gate = true},
                              seating),
        rng);
  });
}

TEST(GradientsOfScores, OfASqrtSoftplusWithJitter) {
  check_all_seatings<ReLUExpert>(7, [](const Seating& seating, Rng& rng) {
    return TopK(
        seated<TopK::Options>(
            {.top_k = 2, .score = moe::Score::sqrt_softplus, .renormalise = true, .jitter = 0.2}, seating),
        rng);
  });
}

TEST(GradientsOfScores, OfASoftmaxWithEpsilonScaleAndGroups) {
  check_all_seatings<ReLUExpert>(8, [](const Seating& seating, Rng& rng) {
    return TopK(seated<TopK::Options>({.top_k = 2,
                                       .renormalise = true,
                                       .renormalise_epsilon = 0.2,
                                       .gate_scale = 1.7,
                                       .group_limit = {.groups = 4, .kept = 3}},
                                      seating),
                rng);
  });
}

// Some tokens' sums are below the minimum, others' above.
TEST(GradientsOfScores, OfASoftmaxWithAMinimumOfTheSum) {
  check_all_seatings<ReLUExpert>(18, [](const Seating& seating, Rng& rng) {
    return TopK(
        seated<TopK::Options>(
            {.top_k = 2, .renormalise = true, .renormalise_minimum = 0.6, .gate_scale = 1.3}, seating),
        rng);
  });
}

TEST(GradientsOfScores, OfASoftmaxOfTheChosenWithScaleAndSelectionBias) {
  check_all_seatings<ReLUExpert>(9, [](const Seating& seating, Rng& rng) {
    return TopK(
        seated<TopK::Options>(
            {.top_k = 2, .softmax_before_selection = false, .gate_scale = 0.5, .selection_bias = true},
            seating),
        rng);
  });
}

TEST(GradientsOfScores, OfASigmoidOnInputs) {
  check_all_seatings<ClampedExpert>(10, [](const Seating& seating, Rng& rng) {
    return TopK(seated<TopK::Options>(
                    {.top_k = 2, .score = moe::Score::sigmoid, .gate_side = moe::GateSide::input}, seating),
                rng);
  });
}

TEST(GradientsOfScores, OfTopP) {
  check_all_seatings<ReLUExpert>(11, [](const Seating& seating, Rng& rng) {
    return TopK(seated<TopK::Options>({.top_k = 3, .top_p = 0.6, .bias = true, .jitter = 0.1}, seating), rng);
  });
}

TEST(GradientsOfScores, OfReLU) {
  check_all_seatings<ReLUExpert>(12, [](const Seating& seating, Rng& rng) {
    return TopK(seated<TopK::Options>({.top_k = 3, .score = moe::Score::relu, .bias = true}, seating), rng);
  });
}

TEST(GradientsOfScores, OfAThresholdedSecondExpert) {
  check_all_seatings<ReLUExpert>(13, [](const Seating& seating, Rng& rng) {
    return TopK(seated<TopK::Options>({.top_k = 3, .second_threshold = 0.1, .renormalise = true}, seating),
                rng);
  });
}

TEST(GradientsOfScores, OfARandomSecondExpert) {
  check_all_seatings<ReLUExpert>(14, [](const Seating& seating, Rng& rng) {
    return TopK(
        seated<TopK::Options>(
            {.top_k = 3, .random_second_threshold = 0.5, .renormalise = true, .jitter = 0.1}, seating),
        rng);
  });
}

}  // namespace
