// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include <moe/moe.hpp>

#include "router_laws.hpp"

namespace laws {
namespace {

// A margin so wide that most gates are shares of several experts.
constexpr double kJitter = 0.4;

template <class S>
struct SparseMixer {
  using Router = moe::SparseMixerRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false, kHasCapacity = false;
  static constexpr Index kFixedTopK = 2;
  static Router make(const Wish& wish, Rng& rng) {
    return {{.d_model = wish.d_model, .num_experts = wish.num_experts, .jitter = kJitter}, rng};
  }
  // In inference: the best expert's share of all experts near it, another's of those but the best.
  static S gate(const Matrix<S>& z, Index t, Index e, const std::vector<Index>&) {
    const S* const row = &z(t, 0);
    const Index first = std::max_element(row, row + z.cols()) - row;
    S best = -reference::kInfinity<S>, sum = 0;
    const auto is_left = [&](Index other) { return e == first || other != first; };
    for (Index other = 0; other < z.cols(); ++other)
      if (is_left(other)) best = std::max(best, row[other]);
    for (Index other = 0; other < z.cols(); ++other) {
      const S gap = best - row[other], size = std::max(std::abs(row[other]), best);
      if (is_left(other) && (gap == 0 || gap / size <= S(2 * kJitter))) sum += std::exp(-gap);
    }
    return std::exp(row[e] - best) / sum;
  }
};

[[maybe_unused]] const bool conformance_sparse_mixer_checked =
    check_routers<SparseMixer<float>, SparseMixer<double>>("SparseMixer");

// That the laws see shares, and not ones only.
TEST(SparseMixerLaws, GatesAreAsTheTraitSaysAndOftenShares) {
  const auto kind = RouterKind<SparseMixer<double>::Router>::of<SparseMixer<double>>();
  Rng rng(1);
  Index shares = 0;
  for (int round = 0; round < 50; ++round) {
    const Wish wish = kind.possible({.num_experts = 6});
    const auto router = kind.make_router(wish, rng);
    const auto routing = kind.route(router, normal_matrix<double>(20, wish.d_model, rng));
    for (Index t = 0; t < 20; ++t)
      for (const Seat& seat : seats_of(routing.plan)) {
        if (seat.token != t) continue;
        EXPECT_NEAR(seat.gate, kind.gate_of(routing.router_logits, t, seat.expert, {}), 1e-14);
        shares += seat.gate < 0.999;
      }
  }
  EXPECT_GT(shares, 500);
}

}  // namespace

}  // namespace laws
