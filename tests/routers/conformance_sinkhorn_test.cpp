// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "router_laws.hpp"

namespace laws {
namespace {

template <class S>
struct Sinkhorn {
  using Router = moe::SinkhornRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false, kTrainingCouplesTokens = true;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.tolerance = 1e-3;
    return {options, rng};
  }
  // A sigmoid for one expert a token, else probabilities; k is the number of `among`.
  static S gate(const Matrix<S>& z, Index t, Index e, const std::vector<Index>& among) {
    return among.size() == 1 ? reference::sigmoid(z(t, e))
                             : reference::softmax(z, t, e, reference::numbers(0, z.cols()));
  }
};

[[maybe_unused]] const bool conformance_sinkhorn_checked =
    check_routers<Sinkhorn<float>, Sinkhorn<double>>("Sinkhorn");

}  // namespace

}  // namespace laws
