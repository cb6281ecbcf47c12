// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

namespace detail {

// Gate and up projection alternate, and matrices stand as [in, out].
inline constexpr LayerTensors kGptOssTensors = {
    .prefix = "model.layers.{layer}.mlp.",
    .w_router = {"model.layers.{layer}.mlp.router.weight"},
    .b_router = {"model.layers.{layer}.mlp.router.bias"},
    .experts = {.w_gate = {"model.layers.{layer}.mlp.experts.gate_up_proj", TensorPart::even_rows, true},
                .w_up = {"model.layers.{layer}.mlp.experts.gate_up_proj", TensorPart::odd_rows, true},
                .w_down = {"model.layers.{layer}.mlp.experts.down_proj", TensorPart::all, true},
                .b_gate = {"model.layers.{layer}.mlp.experts.gate_up_proj_bias", TensorPart::even_rows},
                .b_up = {"model.layers.{layer}.mlp.experts.gate_up_proj_bias", TensorPart::odd_rows},
                .b_down = {"model.layers.{layer}.mlp.experts.down_proj_bias"}},
    .gguf = "gpt-oss"};

}  // namespace detail

/// gpt-oss-120b (OpenAI 2025): biases everywhere, softmax over the four best of 128 experts, a clamped
/// gated unit. Its authors do not count the input embedding as active. They do not say with which
/// losses they trained: 0.001 is the default of Hugging Face's code at one commit, whose loss is 4 times ours
/// (top_k); configurations beside the weights say 0.9.
inline constexpr Model<ClampedSwiGLU> gpt_oss_120b = {
    .name = "gpt-oss-120b",
    .source = "arXiv:2508.10925",
    .router = {.d_model = 2880, .num_experts = 128, .top_k = 4, .renormalise = true, .bias = true},
    .d_ff = 2880,
    .expert_bias = true,
    .losses = {.balance = 0.001 * 4, .over_layers = OverLayers::mean},
    .around = {.layers = 36,
               .moe_layers = 36,
               .vocabulary = 201088,
               .embedding_is_active = false,
               .attention = attention_parameters(2880, 64, 8, 64) + 64 * (64 + 2 * 8) + 2880 + 64},
    .published = {116.8e9, 5.1e9},
    .tensors = detail::kGptOssTensors};

/// gpt-oss-20b.
inline constexpr Model<ClampedSwiGLU> gpt_oss_20b = {
    .name = "gpt-oss-20b",
    .source = "arXiv:2508.10925",
    .router = {.d_model = 2880, .num_experts = 32, .top_k = 4, .renormalise = true, .bias = true},
    .d_ff = 2880,
    .expert_bias = true,
    .losses = {.balance = 0.001 * 4, .over_layers = OverLayers::mean},
    .around = {.layers = 24,
               .moe_layers = 24,
               .vocabulary = 201088,
               .embedding_is_active = false,
               .attention = attention_parameters(2880, 64, 8, 64) + 64 * (64 + 2 * 8) + 2880 + 64},
    .published = {20.9e9, 3.6e9},
    .tensors = detail::kGptOssTensors};

}  // namespace moe
