// SPDX-License-Identifier: MIT
#pragma once

#include <moe/experts/three_way_feed_forward.hpp>
#include <moe/models/model.hpp>

namespace moe {

/// The unit of OpenMoE's experts: gate, SiLU and up in one product, see ThreeWayFeedForward.
struct ThreeWaySwiGLU {};

/// OpenMoE's experts.
template <>
struct ExpertOf<ThreeWaySwiGLU> {
  /// The type of an expert.
  template <class S, class Storage = Owned>
  using Type = ThreeWayFeedForward<S, Storage>;
  static constexpr Index kUpWidths = 3;  ///< gate is twice as wide as up

  /// Parameters of one expert.
  static constexpr Index parameters(Index d_model, Index d_ff, bool) { return 4 * d_model * d_ff; }
};

namespace detail {

// Matrices stand as [in, out].
inline constexpr LayerTensors kOpenMoETensors = {
    .prefix = "model.layers.{layer}.mlp.",
    .w_router = {"model.layers.{layer}.mlp.gate_weight"},
    .experts = {.w_gate = {"model.layers.{layer}.mlp.experts.wi_gate", TensorPart::all, true},
                .w_up = {"model.layers.{layer}.mlp.experts.wi_up", TensorPart::all, true},
                .w_down = {"model.layers.{layer}.mlp.experts.wo", TensorPart::all, true}}};

}  // namespace detail

/// OpenMoE-8B/32E (Xue et al. 2024): two of 32 experts in every sixth layer, gates are probabilities as they
/// are, then a dense feed-forward. Seats: rounded down to a number that is then made even, at least 4, as the
/// authors' PyTorch code does it. Its experts have a gate that is twice as wide; the published number of
/// parameters fits experts without.
inline constexpr Model<ThreeWaySwiGLU> openmoe_8b_32e = {
    .name = "OpenMoE-8B/32E",
    .source = "arXiv:2402.01739",
    .router = {.d_model = 2048,
               .num_experts = 32,
               .top_k = 2,
               .capacity = 2.0,
               .training_capacity = 1.25,
               .capacity_rule = {Rounding::down, 4, 2}},
    .d_ff = 8192,
    .losses = {.balance = 0.01 * 2, .z = 1e-4},
    .around = {.layers = 24,
               .moe_layers = 4,
               .vocabulary = 256384,
               .attention = attention_parameters(2048, 24, 24, 128),
               .dense_d_ff = 8192,
               .dense_matrices = 4,
               .dense_beside_experts = true},
    .published = {8.7e9, 2.1e9},
    .tensors = detail::kOpenMoETensors};

/// OpenMoE-34B/32E: the same in every fourth layer.
inline constexpr Model<ThreeWaySwiGLU> openmoe_34b_32e = {
    .name = "OpenMoE-34B/32E",
    .source = "arXiv:2402.01739",
    .router = {.d_model = 3072,
               .num_experts = 32,
               .top_k = 2,
               .capacity = 2.0,
               .training_capacity = 1.25,
               .capacity_rule = {Rounding::down, 4, 2}},
    .d_ff = 12288,
    .losses = {.balance = 0.01 * 2, .z = 1e-4},
    .around = {.layers = 32,
               .moe_layers = 8,
               .vocabulary = 256384,
               .attention = attention_parameters(3072, 24, 24, 128),
               .dense_d_ff = 12288,
               .dense_matrices = 4,
               .dense_beside_experts = true},
    .published = {34e9, 6e9},
    .tensors = detail::kOpenMoETensors};

}  // namespace moe
