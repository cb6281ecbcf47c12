// SPDX-License-Identifier: MIT
#pragma once

// moe: Mixture-of-Experts layers on Eigen. The rooms of the library, top down; a header includes those of its
// own room and of rooms below it.
//
//   io/        checkpoint files, layers loaded from them and saved to them       (io.hpp)
//   models/    published models by name, and layers made of them
//   packed/    pack: a layer for inference, by kernels for the processor         (packed.hpp)
//   layers/    MoELayer: router + experts, forward and backward. Read moe_layer.hpp first.
//              SoftMoELayer: slots that are mixtures of all tokens
//   experts/   FeedForward, GatedFeedForward, VariantExpert, ThreeWayFeedForward, ZeroExpert, CopyExpert,
//              ConstantExpert, and the concepts of an expert
//   routers/   TopKRouter, NoisyTopKRouter, ExpertChoiceRouter, SinkhornRouter, SparseMixerRouter,
//              HashRouter, HierarchicalRouter
//   balance/   balance losses with gradients, selection biases, numbers about a routing
//   routing/   what a router decides (Routing, DispatchPlan), the concepts of a router, and the way from
//              logits to a plan: scores, selection, gates, capacity
//   math/      softmax, top-k, activations, linear layers
//   kernels/   products for each instruction set
//   core/      types, checks, threads, parameters, random numbers
//
// This header is all of it but packed.hpp and io.hpp, which needs nlohmann_json.
//
// The way of the data: x -> router.route -> Routing -> dispatch -> experts -> combine -> y.

#include <moe/balance/group_balance_loss.hpp>
#include <moe/balance/load_loss.hpp>
#include <moe/balance/loss.hpp>
#include <moe/balance/metrics.hpp>
#include <moe/balance/relu_balance_loss.hpp>
#include <moe/balance/selection_bias.hpp>
#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/random.hpp>
#include <moe/core/storage.hpp>
#include <moe/core/types.hpp>
#include <moe/experts/expert.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/experts/linear.hpp>
#include <moe/experts/three_way_feed_forward.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/experts/zero_computation_experts.hpp>
#include <moe/gradient_check.hpp>
#include <moe/layers/apply_experts.hpp>
#include <moe/layers/checked_plan.hpp>
#include <moe/layers/dispatch.hpp>
#include <moe/layers/expert_cache.hpp>
#include <moe/layers/grouped_experts.hpp>
#include <moe/layers/layer_workspace.hpp>
#include <moe/layers/moe_layer.hpp>

#include <moe/layers/shared_experts.hpp>
#include <moe/layers/soft_logits.hpp>
#include <moe/layers/soft_moe_layer.hpp>
#include <moe/layers/soft_router.hpp>
#include <moe/layers/soft_routing.hpp>
#include <moe/math/activation.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>
#include <moe/math/numbers.hpp>
#include <moe/math/sigmoid.hpp>
#include <moe/math/softmax.hpp>
#include <moe/math/top_k.hpp>
#include <moe/models/model.hpp>
#include <moe/models/published/all.hpp>
#include <moe/models/published/dbrx.hpp>
#include <moe/models/published/deepseek.hpp>
#include <moe/models/published/ernie.hpp>
#include <moe/models/published/expert_choice.hpp>
#include <moe/models/published/glm.hpp>
#include <moe/models/published/gpt4.hpp>
#include <moe/models/published/gpt_oss.hpp>
#include <moe/models/published/granite.hpp>
#include <moe/models/published/grok.hpp>
#include <moe/models/published/gshard.hpp>
#include <moe/models/published/llama4.hpp>
#include <moe/models/published/mixtral.hpp>
#include <moe/models/published/nllb.hpp>
#include <moe/models/published/olmoe.hpp>
#include <moe/models/published/openmoe.hpp>
#include <moe/models/published/phi.hpp>
#include <moe/models/published/qwen.hpp>
#include <moe/models/published/shazeer.hpp>
#include <moe/models/published/soft_moe.hpp>
#include <moe/models/published/switch_transformer.hpp>
#include <moe/models/published/vmoe.hpp>
#include <moe/models/size.hpp>
#include <moe/models/soft_model.hpp>
#include <moe/models/training_losses.hpp>
#include <moe/routers/expert_choice_router.hpp>
#include <moe/routers/hash_router.hpp>
#include <moe/routers/hierarchical_router.hpp>
#include <moe/routers/noisy_top_k_router.hpp>
#include <moe/routers/sinkhorn_router.hpp>
#include <moe/routers/sparse_mixer_router.hpp>
#include <moe/routers/top_k_options.hpp>
#include <moe/routers/top_k_router.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/check_router.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/edit_experts.hpp>
#include <moe/routing/expert_capacity.hpp>
#include <moe/routing/final_sets.hpp>
#include <moe/routing/group_limit.hpp>
#include <moe/routing/router.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_gradient.hpp>
#include <moe/routing/scores.hpp>
#include <moe/routing/seating_order.hpp>
#include <moe/routing/seating_rule.hpp>
#include <moe/routing/token_choice.hpp>
#include <moe/routing/token_choice_backward.hpp>
#include <moe/version.hpp>
