// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

namespace detail {

inline constexpr LayerTensors kLlama4Tensors = {
    .prefix = "language_model.model.layers.{layer}.feed_forward.",
    .w_router = {"language_model.model.layers.{layer}.feed_forward.router.weight"},
    .experts = {.w_gate = {"language_model.model.layers.{layer}.feed_forward.experts.gate_up_proj",
                           TensorPart::first_half, true},
                .w_up = {"language_model.model.layers.{layer}.feed_forward.experts.gate_up_proj",
                         TensorPart::second_half, true},
                .w_down = {"language_model.model.layers.{layer}.feed_forward.experts.down_proj",
                           TensorPart::all, true}},
    .shared_expert =
        {.w_gate = {"language_model.model.layers.{layer}.feed_forward.shared_expert.gate_proj.weight"},
         .w_up = {"language_model.model.layers.{layer}.feed_forward.shared_expert.up_proj.weight"},
         .w_down = {"language_model.model.layers.{layer}.feed_forward.shared_expert.down_proj.weight"}},
    .gguf = "llama4"};

}  // namespace detail

/// Llama 4 Scout (Meta 2025): one expert a token, whose input is scaled by the sigmoid of its logit, and
/// a shared expert.
inline constexpr Model<SwiGLU> llama4_scout = {
    .name = "Llama 4 Scout",
    .source = "github.com/meta-llama/llama-models",
    .router = {.d_model = 5120,
               .num_experts = 16,
               .top_k = 1,
               .score = Score::sigmoid,
               .gate_side = GateSide::input},
    .d_ff = 8192,
    .shared_experts = 1,
    .shared_d_ff = 8192,
    .around = {.layers = 48,
               .moe_layers = 48,
               .vocabulary = 202048,
               .attention = attention_parameters(5120, 40, 8, 128)},
    .published = {109e9, 17e9},
    .tensors = detail::kLlama4Tensors};

/// Llama 4 Maverick: 128 experts in every second layer.
inline constexpr Model<SwiGLU> llama4_maverick = {
    .name = "Llama 4 Maverick",
    .source = "github.com/meta-llama/llama-models",
    .router = {.d_model = 5120,
               .num_experts = 128,
               .top_k = 1,
               .score = Score::sigmoid,
               .gate_side = GateSide::input},
    .d_ff = 8192,
    .shared_experts = 1,
    .shared_d_ff = 8192,
    .around = {.layers = 48,
               .moe_layers = 24,
               .vocabulary = 202048,
               .attention = attention_parameters(5120, 40, 8, 128),
               .dense_d_ff = 16384},
    .published = {400e9, 17e9},
    .tensors = detail::kLlama4Tensors};

}  // namespace moe
