// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "router_laws.hpp"

namespace laws {
namespace {

template <class S>
struct ExpertChoice {
  using Router = moe::ExpertChoiceRouter<S>;
  static constexpr bool kTokensChoose = false, kGatesSumToOne = false;
  static Router make(const Wish& wish, Rng& rng) {
    const double dropless = double(wish.num_experts);
    return {{.d_model = wish.d_model,
             .num_experts = wish.num_experts,
             .capacity = wish.capacity ? *wish.capacity * double(wish.top_k) : dropless,
             .overflow = wish.overflow},
            rng};
  }
};

[[maybe_unused]] const bool conformance_expert_choice_checked =
    check_routers<ExpertChoice<float>, ExpertChoice<double>>("ExpertChoice");

}  // namespace

}  // namespace laws
