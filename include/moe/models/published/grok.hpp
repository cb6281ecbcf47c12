// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// Grok-1 (xAI 2024): gates are probabilities as they are, GELU in its tanh form. Its weights were published
/// in 8 bits, in a format of JAX; tensor names are those of the port keyfan/grok-1-hf on Hugging Face, whose
/// files have yet to be made safetensors.
inline constexpr Model<GEGLUTanh> grok_1 = {
    .name = "Grok-1",
    .source = "github.com/xai-org/grok-1",
    .router = {.d_model = 6144, .num_experts = 8, .top_k = 2},
    .d_ff = 32768,
    .around = {.layers = 64,
               .moe_layers = 64,
               .vocabulary = 131072,
               .tied_embeddings = true,
               .attention = attention_parameters(6144, 48, 8, 128)},
    .published = {314e9, 0},
    .tensors = {.prefix = "transformer.decoder_layer.{layer}.moe.",
                .more_prefixes = {"transformer.decoder_layer.{layer}.router."},
                .w_router = {"transformer.decoder_layer.{layer}.router.weight"},
                .experts = {.w_gate = {"transformer.decoder_layer.{layer}.moe.{expert}.linear.weight"},
                            .w_up = {"transformer.decoder_layer.{layer}.moe.{expert}.linear_v.weight"},
                            .w_down = {"transformer.decoder_layer.{layer}.moe.{expert}.linear_1.weight"}},
                .gguf = "grok"}};

}  // namespace moe
