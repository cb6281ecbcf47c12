// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

namespace detail {

inline constexpr LayerTensors kGraniteTensors = {
    .prefix = "model.layers.{layer}.block_sparse_moe.",
    .w_router = {"model.layers.{layer}.block_sparse_moe.router.layer.weight"},
    .experts = {.w_gate = {"model.layers.{layer}.block_sparse_moe.input_linear.weight",
                           TensorPart::first_half},
                .w_up = {"model.layers.{layer}.block_sparse_moe.input_linear.weight",
                         TensorPart::second_half},
                .w_down = {"model.layers.{layer}.block_sparse_moe.output_linear.weight"}},
    .gguf = "granitemoe"};

}  // namespace detail

/// Granite 3.0 1B-A400M (IBM 2024): softmax over the eight best of 32 small experts. No
/// coefficients of its losses are known here.
inline constexpr Model<SwiGLU> granite_1b_a400m = {
    .name = "Granite 3.0 1B-A400M",
    .source = "github.com/ibm-granite/granite-3.0-language-models",
    .router = {.d_model = 1024, .num_experts = 32, .top_k = 8, .renormalise = true},
    .d_ff = 512,
    .around = {.layers = 24,
               .moe_layers = 24,
               .vocabulary = 49155,
               .tied_embeddings = true,
               .attention = attention_parameters(1024, 16, 8, 64)},
    .published = {1.33e9, 0.4e9},
    .tensors = detail::kGraniteTensors};

/// Granite 3.0 3B-A800M.
inline constexpr Model<SwiGLU> granite_3b_a800m = {
    .name = "Granite 3.0 3B-A800M",
    .source = "github.com/ibm-granite/granite-3.0-language-models",
    .router = {.d_model = 1536, .num_experts = 40, .top_k = 8, .renormalise = true},
    .d_ff = 512,
    .around = {.layers = 32,
               .moe_layers = 32,
               .vocabulary = 49155,
               .tied_embeddings = true,
               .attention = attention_parameters(1536, 24, 8, 64)},
    .published = {3.3e9, 0.8e9},
    .tensors = detail::kGraniteTensors};

/// JetMoE-8B (Shen et al. 2024): an output bias after the sum over experts. Its attention is a mixture of
/// experts too, which this library does not hold: two of eight query and output projections a token.
inline constexpr Model<SwiGLU> jetmoe_8b = {
    .name = "JetMoE-8B",
    .source = "arXiv:2404.07413",
    .router = {.d_model = 2048, .num_experts = 8, .top_k = 2, .renormalise = true},
    .d_ff = 5632,
    .output_bias = true,
    .losses = {.balance = 0.01, .z = 0.001},
    .around = {.layers = 24,
               .moe_layers = 24,
               .vocabulary = 32000,
               .tied_embeddings = true,
               .attention = 2048 * (8 * 2 * 2048 + 2 * 2048 + 8) + 2048,
               .idle_attention = 2048 * 6 * 2 * 2048},
    .published = {8.5e9, 2.2e9},
    .tensors = {
        .prefix = "model.layers.{layer}.mlp.",
        .w_router = {"model.layers.{layer}.mlp.router.layer.weight"},
        .experts = {.w_gate = {"model.layers.{layer}.mlp.input_linear.weight", TensorPart::first_half},
                    .w_up = {"model.layers.{layer}.mlp.input_linear.weight", TensorPart::second_half},
                    .w_down = {"model.layers.{layer}.mlp.output_linear.weight"}},
        .b_output = {"model.layers.{layer}.mlp.bias"}}};

}  // namespace moe
