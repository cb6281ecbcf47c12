// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <string>

#include <moe/moe.hpp>

#include "layers.hpp"

// Layers with an ExpertChoiceRouter: every kind of expert, capacity, shared experts and loss.
namespace {

using namespace gradients;
using ExpertChoice = moe::ExpertChoiceRouter<double>;

template <class Expert>
class GradientsOfExpertChoiceLayers : public testing::Test {};
TYPED_TEST_SUITE(GradientsOfExpertChoiceLayers, ExpertTypes);

TYPED_TEST(GradientsOfExpertChoiceLayers, AreExact) {
  Tally tally;
  Rng rng(8);
  for (const double capacity : {0.5, 2.0, 4.0}) {  // of 4: every expert takes every token
    for (const Overflow overflow : {Overflow::drop, Overflow::pass_through}) {
      SCOPED_TRACE("capacity " + std::to_string(capacity));
      ExpertChoice router(
          {.d_model = kDModel, .num_experts = kNumExperts, .capacity = capacity, .overflow = overflow}, rng);
      randomise(router, rng);
      check_all_layers<TypeParam>(router, rng, tally);
    }
  }
  EXPECT_GE(tally.checks, 3 * 2 * kLossesOfARouter * 2 / kEvery);
  EXPECT_LE(tally.redraws, tally.checks / 2);
  if (!kSanitized) {  // a part may lack what is rare
    EXPECT_GT(tally.passed_through, 0);
  }
}

}  // namespace
