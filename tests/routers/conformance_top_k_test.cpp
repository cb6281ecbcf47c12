// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

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

// With a noise as V-MoE's.
template <class S>
struct SigmoidTopK {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.score = moe::Score::sigmoid;
    options.noise_stddev = 0.3;
    return {options, rng};
  }
  static S gate(const Matrix<S>& z, Index t, Index e, const std::vector<Index>&) {
    return reference::sigmoid(z(t, e));
  }
};

// As Llama-4: gates scale what experts get.
template <class S>
struct GatesOfInputs {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.score = moe::Score::sigmoid;
    options.gate_side = moe::GateSide::input;
    return {options, rng};
  }
  static S gate(const Matrix<S>& z, Index t, Index e, const std::vector<Index>&) {
    return reference::sigmoid(z(t, e));
  }
};

// As DeepSeek-V3: sigmoid, selection bias, groups where the number of experts allows, a scale.
template <class S>
struct BiasedTopK {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false, kExpertsAreAlike = false;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.score = moe::Score::sigmoid;
    options.renormalise = true;
    options.renormalise_epsilon = 1e-20;
    options.gate_scale = 2.5;
    options.selection_bias = true;
    if (wish.num_experts == 6 && wish.top_k <= 4 && wish.d_model == 5)
      options.group_limit = {.groups = 3, .kept = 2, .score = moe::GroupScore::top_two_sum};
    return {options, rng};
  }
  static S gate(const Matrix<S>& z, Index t, Index e, const std::vector<Index>& among) {
    S sum = 0;
    for (const Index other : among) sum += reference::sigmoid(z(t, other));
    return S(2.5) * (reference::sigmoid(z(t, e)) / sum);
  }
};

// As DeepSeek-V2 in its groups; scores as Megatron-LM has them.
template <class S>
struct GroupedTopK {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false, kExpertsAreAlike = false;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.score = moe::Score::sqrt_softplus;
    options.bias = true;
    if (wish.num_experts == 6 && wish.top_k <= 3 && wish.d_model == 5)
      options.group_limit = {.groups = 2, .kept = 1};
    return {options, rng};
  }
  static S gate(const Matrix<S>& z, Index t, Index e, const std::vector<Index>&) {
    return std::sqrt(std::log(S(1) + std::exp(z(t, e))));
  }
};

// As many experts as the mass of 0.4 needs.
template <class S>
struct TopP {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false, kIsDynamic = true;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.top_p = 0.4;
    return {options, rng};
  }
};

// As ReMoE: the experts with positive logits.
template <class S>
struct ReLUTopK {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false, kIsDynamic = true;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.score = moe::Score::relu;
    return {options, rng};
  }
  static S gate(const Matrix<S>& z, Index t, Index e, const std::vector<Index>&) {
    return z(t, e) > S(0) ? z(t, e) : S(0);
  }
};

// As ST-MoE: a second expert only with a gate above 0.2.
template <class S>
struct Thresholded {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false, kIsDynamic = true,
                        kSeatsFollowTopK = true;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.second_threshold = 0.2;
    return {options, rng};
  }
};

// As GShard: in training a second expert with a probability of twice its gate.
template <class S>
struct RandomSecond {
  using Router = moe::TopKRouter<S>;
  static constexpr bool kTokensChoose = true, kGatesSumToOne = false, kIsDynamic = true,
                        kSeatsFollowTopK = true;
  static Router make(const Wish& wish, Rng& rng) {
    auto options = token_choice_options<typename Router::Options>(wish);
    options.random_second_threshold = 0.5;
    options.jitter = 0.1;
    return {options, rng};
  }
};

[[maybe_unused]] const bool conformance_top_k_checked =
    check_routers<PlainTopK<float>, PlainTopK<double>,                //
                  RenormalisedTopK<float>, RenormalisedTopK<double>,  //
                  SigmoidTopK<float>, SigmoidTopK<double>,            //
                  GatesOfInputs<float>, GatesOfInputs<double>,        //
                  BiasedTopK<float>, BiasedTopK<double>,              //
                  GroupedTopK<float>, GroupedTopK<double>,            //
                  TopP<float>, TopP<double>,                          //
                  ReLUTopK<float>, ReLUTopK<double>,                  //
                  Thresholded<float>, Thresholded<double>,            //
                  RandomSecond<float>, RandomSecond<double>>("TopK");

}  // namespace

}  // namespace laws
