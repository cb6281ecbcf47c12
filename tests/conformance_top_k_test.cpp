// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "router_laws.hpp"

namespace laws {
namespace {

// Gates are the probabilities themselves.
template <class S>
struct PlainTopK {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.jitter = 0.1;
    return {options, rng};
  }
};

template <class S>
struct RenormalisedTopK {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = true;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.softmax_before_selection = false;
    options.bias = true;
    return {options, rng};
  }
};

using TopKs = testing::Types<PlainTopK<float>, PlainTopK<double>,  //
                             RenormalisedTopK<float>, RenormalisedTopK<double>>;

}  // namespace

INSTANTIATE_TYPED_TEST_SUITE_P(TopK, RouterLaws, TopKs);

}  // namespace laws
