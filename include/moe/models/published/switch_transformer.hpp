// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>

#include <moe/models/model.hpp>

namespace moe {

namespace detail {

inline constexpr LayerTensors kSwitchTensors = {
    .prefix = "encoder.block.{layer}.layer.1.mlp.",
    .w_router = {"encoder.block.{layer}.layer.1.mlp.router.classifier.weight"},
    .experts = {.w_up = {"encoder.block.{layer}.layer.1.mlp.experts.expert_{expert}.wi.weight"},
                .w_down = {"encoder.block.{layer}.layer.1.mlp.experts.expert_{expert}.wo.weight"}}};

inline constexpr Model<ReLU> switch_base(std::string_view name, Index num_experts, double published) {
  return {.name = name,
          .source = "arXiv:2101.03961",
          .router = {.d_model = 768,
                     .num_experts = num_experts,
                     .top_k = 1,
                     .jitter = 0.01,
                     .capacity = 2.0,
                     .training_capacity = 1.25,
                     .capacity_rule = {Rounding::down, 4}},
          .d_ff = 3072,
          .losses = {.balance = 0.01, .balance_of = BalanceOf::sequences},
          .around = {.layers = 24,
                     .moe_layers = 12,
                     .vocabulary = 32128,
                     .tied_embeddings = true,
                     .attention = encoder_decoder_attention(attention_parameters(768, 12, 12, 64)),
                     .dense_d_ff = 3072,
                     .dense_matrices = 2},
          .published = {published, 0},
          .tensors = kSwitchTensors};
}

}  // namespace detail

/// The tensor names of the decoders of the published checkpoints, for `tensors` of a copy of the model;
/// a model's own are its encoder's.
inline constexpr LayerTensors switch_decoder_tensors = {
    .prefix = "decoder.block.{layer}.layer.2.mlp.",
    .w_router = {"decoder.block.{layer}.layer.2.mlp.router.classifier.weight"},
    .experts = {.w_up = {"decoder.block.{layer}.layer.2.mlp.experts.expert_{expert}.wi.weight"},
                .w_down = {"decoder.block.{layer}.layer.2.mlp.experts.expert_{expert}.wo.weight"}}};

/// Switch Transformer, Base (Fedus et al. 2021), in the sizes of the published checkpoints: the best expert,
/// its probability as gate, jitter of 0.01. Seats: 1.25 times an even share in training, 2 in inference,
/// within each group of BatchInfo, rounded down and at least 4 (mesh); Hugging Face gives every expert 64
/// seats a sequence instead. Names of tensors are the encoder's (the decoder's: switch_decoder_tensors),
/// where layer `layer` has experts if it is odd. The paper gives no size for 8 experts.
inline constexpr Model<ReLU> switch_base_8 = detail::switch_base("Switch-Base-8", 8, 0);
/// The same with 16 experts.
inline constexpr Model<ReLU> switch_base_16 = detail::switch_base("Switch-Base-16", 16, 1.1e9);
/// The same with 32 experts.
inline constexpr Model<ReLU> switch_base_32 = detail::switch_base("Switch-Base-32", 32, 2.0e9);
/// The same with 64 experts.
inline constexpr Model<ReLU> switch_base_64 = detail::switch_base("Switch-Base-64", 64, 3.8e9);
/// The same with 128 experts.
inline constexpr Model<ReLU> switch_base_128 = detail::switch_base("Switch-Base-128", 128, 7.4e9);
/// The same with 256 experts.
inline constexpr Model<ReLU> switch_base_256 = detail::switch_base("Switch-Base-256", 256, 14.7e9);

/// Switch-Large with 128 experts, in the size of the published checkpoint; otherwise as Base.
inline constexpr Model<ReLU> switch_large_128 = {
    .name = "Switch-Large-128",
    .source = "arXiv:2101.03961",
    .router = {.d_model = 1024,
               .num_experts = 128,
               .top_k = 1,
               .jitter = 0.01,
               .capacity = 2.0,
               .training_capacity = 1.25,
               .capacity_rule = {Rounding::down, 4}},
    .d_ff = 4096,
    .losses = {.balance = 0.01, .balance_of = BalanceOf::sequences},
    .around = {.layers = 48,
               .moe_layers = 24,
               .vocabulary = 32128,
               .tied_embeddings = true,
               .attention = encoder_decoder_attention(attention_parameters(1024, 16, 16, 64)),
               .dense_d_ff = 4096,
               .dense_matrices = 2},
    .published = {26e9, 0},
    .tensors = detail::kSwitchTensors};

/// Switch-XXL: gated experts in every second layer (table 9 of the paper; 395B parameters). Seats as
/// flaxformer's configuration of it says, those of training as Base's; no bias in the router, as in the paper
/// and mesh (flaxformer's has one).
inline constexpr Model<GEGLUTanh> switch_xxl = {
    .name = "Switch-XXL",
    .source = "arXiv:2101.03961",
    .router = {.d_model = 4096,
               .num_experts = 128,
               .top_k = 1,
               .jitter = 0.01,
               .capacity = 4.0,
               .training_capacity = 1.25,
               .capacity_rule = {Rounding::nearest_even, 2}},
    .d_ff = 10240,
    .losses = {.balance = 0.01, .balance_of = BalanceOf::sequences},
    .around = {.layers = 48,
               .moe_layers = 24,
               .vocabulary = 32128,
               .attention = encoder_decoder_attention(attention_parameters(4096, 64, 64, 64)),
               .dense_d_ff = 10240},
    .published = {395e9, 0}};

/// Switch-C, the largest: 2,048 experts in each of 15 + 15 layers (table 9). Seats as flaxformer's
/// configuration of it says; no bias in the router, as in the paper and mesh (flaxformer's has one).
inline constexpr Model<ReLU> switch_c = {
    .name = "Switch-C",
    .source = "arXiv:2101.03961",
    .router = {.d_model = 2080,
               .num_experts = 2048,
               .top_k = 1,
               .jitter = 0.01,
               .capacity = 2.0,
               .training_capacity = 1.0,
               .capacity_rule = {Rounding::nearest_even, 2}},
    .d_ff = 6144,
    .losses = {.balance = 0.01, .balance_of = BalanceOf::sequences},
    .around = {.layers = 30,
               .moe_layers = 30,
               .vocabulary = 32128,
               .attention = encoder_decoder_attention(attention_parameters(2080, 32, 32, 64))},
    .published = {1571e9, 0},
    .tensors = detail::kSwitchTensors};

}  // namespace moe
