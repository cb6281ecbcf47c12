// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "layers.hpp"

// Layers with a NoisyTopKRouter: every kind of expert, seating, shared experts and loss.
namespace {

using namespace gradients;
using NoisyTopK = moe::NoisyTopKRouter<double>;

template <class Expert>
class GradientsOfNoisyTopKLayers : public testing::Test {};
TYPED_TEST_SUITE(GradientsOfNoisyTopKLayers, ExpertTypes);

TYPED_TEST(GradientsOfNoisyTopKLayers, AreExact) {
  check_all_seatings<TypeParam>(5, [](const Seating& seating, Rng& rng) {
    return NoisyTopK(seated<NoisyTopK::Options>({.top_k = 2}, seating), rng);
  });
}

TYPED_TEST(GradientsOfNoisyTopKLayers, AreExactWithGatesThatSumToOneAfterDrops) {
  check_all_seatings<TypeParam>(6, [](const Seating& seating, Rng& rng) {
    return NoisyTopK(seated<NoisyTopK::Options>(
                         {.top_k = 2, .noise_epsilon = 0.1, .renormalise_after_drop = true}, seating),
                     rng);
  });
}

TYPED_TEST(GradientsOfNoisyTopKLayers, AreExactWithOneExpertAToken) {
  // The gate is always 1, and only losses train the router.
  check_all_seatings<TypeParam>(7, [](const Seating& seating, Rng& rng) {
    return NoisyTopK(seated<NoisyTopK::Options>({.top_k = 1, .allow_constant_gate = true}, seating), rng);
  });
}

}  // namespace
