// SPDX-License-Identifier: MIT
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <moe/moe.hpp>

#if __has_include(<moe/routers/hierarchical_router.hpp>)
#include <moe/routers/hierarchical_router.hpp>
#define MOE_HAS_HIERARCHICAL_ROUTER
#endif

// The layers whose files are in data/: see its README.md. This compiles with every version of the library
// that had save_layer.
namespace io_test {

template <class Router>
moe::MoELayer<moe::FeedForward<float>, Router> layer_of(Router router) {
  const moe::FeedForward<float> expert({.d_model = 2, .d_ff = 1});
  return {std::vector<moe::FeedForward<float>>(4, expert), std::move(router)};
}

// Options with other values than their defaults, as far as they do not exclude each other.
inline moe::TopKOptions saved_top_k_options() {
  moe::TopKOptions options{.d_model = 2, .num_experts = 4, .top_k = 1};
  options.score = moe::Score::sigmoid;
  options.renormalise = true;
  options.renormalise_epsilon = 1e-20;
  options.gate_scale = 2.5;
  options.gate_side = moe::GateSide::input;
  options.bias = true;
  options.selection_bias = true;
  options.group_limit = {.groups = 2, .kept = 1, .score = moe::GroupScore::top_two_sum};
  options.noise_stddev = 0.1;
  options.jitter = 0.01;
  options.capacity = 1.25;
  options.training_capacity = 1.5;
  options.overflow = moe::Overflow::pass_through;
  options.priority = moe::Priority::assignment_gate;
  options.renormalise_after_drop = true;
  options.allow_constant_gate = true;
  return options;
}

using Clamped = moe::GatedFeedForward<float, moe::ClampedSwiGLU>;

inline moe::MoELayer<Clamped, moe::TopKRouter<float>> saved_top_k_layer(
    const moe::TopKOptions& options,
    const moe::ClampedSwiGLU& unit = {.alpha = 1.5, .limit = 6.5, .offset = 0.5}) {
  const Clamped expert({.d_model = 2, .d_ff = 1, .bias = false, .glu = unit});
  return {std::vector<Clamped>(4, expert), moe::TopKRouter<float>(options), {{expert}}};
}

// f(name of the file, layer), with the values 0, 0.25, 0.5, ... in the order of visit.
template <class F>
void for_each_saved_layer(const F& f) {
  const auto save = [&](const std::string& name, auto layer) {
    int count = 0;
    decltype(layer)::visit(
        [&](const moe::ParameterInfo&, auto& array) {
          for (moe::Index i = 0; i < array.size(); ++i) array.data()[i] = 0.25f * float(count++);
        },
        layer);
    f(name + ".safetensors", layer);
  };
  using moe::TopKOptions, moe::TopKRouter;
  moe::Rng rng(1);

  save("top_k", saved_top_k_layer(saved_top_k_options()));
  TopKOptions top_p{.d_model = 2, .num_experts = 4, .top_k = 4};
  top_p.top_p = 0.4;
  save("top_p", layer_of(TopKRouter<float>(top_p, rng)));
  TopKOptions softmax_after{.d_model = 2, .num_experts = 4};
  softmax_after.softmax_before_selection = false;
  save("softmax_after", layer_of(TopKRouter<float>(softmax_after, rng)));

  save("noisy_top_k",
       layer_of(moe::NoisyTopKRouter<float>(
           {.d_model = 2, .num_experts = 4, .top_k = 3, .noise_epsilon = 0.5, .capacity = 2.0}, rng)));
  save("sinkhorn",
       layer_of(moe::SinkhornRouter<float>(
           {.d_model = 2, .num_experts = 4, .top_k = 2, .tolerance = 0.125, .max_iterations = 7})));
  save("sparse_mixer",
       layer_of(moe::SparseMixerRouter<float>({.d_model = 2, .num_experts = 4, .jitter = 0.25})));
  moe::ExpertChoiceOptions expert_choice{.d_model = 2, .num_experts = 4, .capacity = 1.5};
  expert_choice.overflow = moe::Overflow::pass_through;
  save("expert_choice", layer_of(moe::ExpertChoiceRouter<float>(expert_choice, rng)));
  moe::HashOptions hash{.d_model = 2, .num_experts = 4};
  hash.table.resize(3);
  hash.table << 3, 1, 0;
  hash.capacity = 1.25;
  save("hash", layer_of(moe::HashRouter<float>(hash)));
#ifdef MOE_HAS_HIERARCHICAL_ROUTER
  TopKOptions two{.d_model = 2, .num_experts = 2}, scaled = two;
  scaled.gate_scale = 2.5;
  const std::vector<TopKRouter<float>> children{TopKRouter<float>(two), TopKRouter<float>(scaled)};
  save("hierarchical",
       layer_of(moe::HierarchicalRouter<TopKRouter<float>>(TopKRouter<float>(two), children)));
#endif
}

}  // namespace io_test
