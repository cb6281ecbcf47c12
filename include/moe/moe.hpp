// SPDX-License-Identifier: MIT
#pragma once

// moe: Mixture-of-Experts layers on Eigen. The map of the library, top down:
//
//   models/*.hpp                      published models by name, and layers made of them
//   moe_layer.hpp                     MoELayer: router + experts, forward and backward. Read it first.
//   soft_moe_layer.hpp                SoftMoELayer: slots that are mixtures of all tokens
//   routers/*.hpp                     TopKRouter, NoisyTopKRouter, ExpertChoiceRouter, SinkhornRouter,
//                                     SparseMixerRouter, HashRouter, HierarchicalRouter
//   experts/*.hpp                     FeedForward, GatedFeedForward, VariantExpert, ThreeWayFeedForward,
//                                     ZeroExpert, CopyExpert, ConstantExpert
//   shared_experts.hpp                experts that every token uses, as experts of the plan
//   router.hpp expert.hpp             the concepts, and what passes between the parts
//   token_choice.hpp                  what routers in which tokens choose have in common
//   capacity.hpp                      expert_capacity, apply_capacity: seats and overflow
//   dispatch.hpp                      dispatch, run_experts, combine, and their backward
//   loss.hpp load_loss.hpp            balance losses with gradients
//   metrics.hpp                       numbers about a routing
//   gradient_check.hpp                check_gradients: backward against central differences
//   scores.hpp group_limit.hpp selection_bias.hpp                  logits, scores, selection, gates
//   numbers.hpp softmax.hpp top_k.hpp activation.hpp product.hpp   the mathematics
//   parameters.hpp random.hpp init.hpp executor.hpp                parameters, numbers, threads
//   storage.hpp                       Owned and Mapped: where weights are
//   types.hpp buffer.hpp check.hpp version.hpp                     the ground
//
// Not included here: packed_moe_layer.hpp (pack: a layer for inference, by kernels for the processor) and
// io/*.hpp (checkpoint files).
//
// The way of the data: x -> router.route -> Routing -> dispatch -> run_experts -> combine -> y.

#include <moe/activation.hpp>
#include <moe/buffer.hpp>
#include <moe/capacity.hpp>
#include <moe/check.hpp>
#include <moe/dispatch.hpp>
#include <moe/executor.hpp>
#include <moe/expert.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/experts/null_experts.hpp>
#include <moe/experts/three_way_feed_forward.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/gradient_check.hpp>
#include <moe/group_limit.hpp>
#include <moe/init.hpp>
#include <moe/load_loss.hpp>
#include <moe/loss.hpp>
#include <moe/metrics.hpp>
#include <moe/models/all.hpp>
#include <moe/moe_layer.hpp>
#include <moe/numbers.hpp>
#include <moe/parameters.hpp>
#include <moe/product.hpp>
#include <moe/random.hpp>
#include <moe/router.hpp>
#include <moe/routers/expert_choice_router.hpp>
#include <moe/routers/hash_router.hpp>
#include <moe/routers/hierarchical_router.hpp>
#include <moe/routers/noisy_top_k_router.hpp>
#include <moe/routers/sinkhorn_router.hpp>
#include <moe/routers/sparse_mixer_router.hpp>
#include <moe/routers/top_k_router.hpp>
#include <moe/scores.hpp>
#include <moe/selection_bias.hpp>
#include <moe/shared_experts.hpp>
#include <moe/soft_moe_layer.hpp>
#include <moe/softmax.hpp>
#include <moe/storage.hpp>
#include <moe/token_choice.hpp>
#include <moe/top_k.hpp>
#include <moe/types.hpp>
#include <moe/version.hpp>
