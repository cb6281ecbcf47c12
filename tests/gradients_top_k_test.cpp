// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "gradients.hpp"

// Layers with a TopKRouter: every kind of gates, expert, seating, shared experts and loss.
namespace {

using namespace gradients;
using Router = moe::TopKRouter<double>;

template <class Expert>
class GradientsOfTopKLayers : public testing::Test {};
TYPED_TEST_SUITE(GradientsOfTopKLayers, ExpertTypes);

}  // namespace

TYPED_TEST(GradientsOfTopKLayers, WithOneExpertAToken) {
  check_all_seatings<TypeParam>(1, [](const Seating& seating, Rng& rng) {
    return Router(seated<Router::Options>({.top_k = 1, .jitter = 0.2}, seating), rng);
  });
}

TYPED_TEST(GradientsOfTopKLayers, WithProbabilitiesAsGates) {
  check_all_seatings<TypeParam>(2, [](const Seating& seating, Rng& rng) {
    return Router(seated<Router::Options>({.top_k = 2, .bias = true}, seating), rng);
  });
}

TYPED_TEST(GradientsOfTopKLayers, WithGatesThatSumToOne) {
  check_all_seatings<TypeParam>(3, [](const Seating& seating, Rng& rng) {
    return Router(seated<Router::Options>(
                      {.top_k = 2, .softmax_before_selection = false, .jitter = 0.2}, seating),
                  rng);
  });
}

TYPED_TEST(GradientsOfTopKLayers, WithGatesThatSumToOneAfterDrops) {
  check_all_seatings<TypeParam>(4, [](const Seating& seating, Rng& rng) {
    return Router(
        seated<Router::Options>(
            {.top_k = 2, .renormalise = true, .bias = true, .renormalise_after_drop = true},
            seating),
        rng);
  });
}
