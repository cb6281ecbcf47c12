// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <moe/moe.hpp>

#include "expert_laws.hpp"

// The routers have files of their own, routers/conformance_*_test.cpp.
namespace laws {
namespace {

template <class S, class Activation, bool kBias>
struct FeedForwardOf {
  using Expert = moe::FeedForward<S, Activation>;
  static Expert make(Index d_model, Index d_ff, Rng& rng) {
    return {{.d_model = d_model, .d_ff = d_ff, .bias = kBias}, rng};
  }
};

template <class S, class Unit, bool kBias>
struct GatedOf {
  using Expert = moe::GatedFeedForward<S, Unit>;
  static Expert make(Index d_model, Index d_ff, Rng& rng) {
    return {{.d_model = d_model, .d_ff = d_ff, .bias = kBias}, rng};
  }
};

// One of two kinds, by width.
template <class S>
struct VariantOf {
  using Expert = moe::VariantExpert<moe::FeedForward<S, moe::ReLU>, moe::GatedFeedForward<S>>;
  static Expert make(Index d_model, Index d_ff, Rng& rng) {
    if (d_ff % 2 == 0) return moe::FeedForward<S, moe::ReLU>({d_model, d_ff, true, {}}, rng);
    return moe::GatedFeedForward<S>({d_model, d_ff, false, {}}, rng);
  }
};

[[maybe_unused]] const bool all_checked =
    check_experts<FeedForwardOf<float, moe::ReLU, false>, FeedForwardOf<double, moe::ReLU, false>,
                  FeedForwardOf<float, moe::GELU, true>, FeedForwardOf<double, moe::GELU, true>,
                  GatedOf<float, moe::SwiGLU, false>, GatedOf<double, moe::SwiGLU, false>,
                  GatedOf<float, moe::ClampedSwiGLU, true>, GatedOf<double, moe::ClampedSwiGLU, true>,
                  VariantOf<float>, VariantOf<double>>("All");

}  // namespace

}  // namespace laws
