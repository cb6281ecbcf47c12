// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "router_laws.hpp"

namespace laws {
namespace {

template <class S>
struct NoisyTopK {
  using Router = moe::NoisyTopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = true;
  static Router make(const Wish& wish, Rng& rng) {
    return {token_choice_options<typename Router::Options>(wish), rng};
  }
};

[[maybe_unused]] const bool conformance_noisy_top_k_checked =
    check_routers<NoisyTopK<float>, NoisyTopK<double>>("NoisyTopK");

}  // namespace

}  // namespace laws
