// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// Switch Transformer, Base with 8 experts (Fedus et al. 2021): the best expert, its probability as gate,
/// jitter of 0.01. Seats: 1.25 times an even share in training, 2 in inference, within each group of
/// BatchInfo, rounded down and at least 4 (mesh); Hugging Face gives every expert 64 seats a sequence
/// instead. Names of tensors are the encoder's, where layer `layer` has experts if it is odd; the decoder's begin with
/// decoder.block.{layer}.layer.2.mlp.
inline constexpr Model<ReLU> switch_base_8 = {
    .name = "Switch-Base-8",
    .source = "arXiv:2101.03961",
    .router = {.d_model = 768,
               .num_experts = 8,
               .top_k = 1,
               .jitter = 0.01,
               .capacity = 2.0,
               .training_capacity = 1.25,
               .capacity_rule = {Rounding::down, 4}},
    .d_ff = 3072,
    .losses = {.balance = 0.01},
    .tensors = {.prefix = "encoder.block.{layer}.layer.1.mlp.",
                .w_router = {"encoder.block.{layer}.layer.1.mlp.router.classifier.weight"},
                .experts = {
                    .w_up = {"encoder.block.{layer}.layer.1.mlp.experts.expert_{expert}.wi.weight"},
                    .w_down = {
                        "encoder.block.{layer}.layer.1.mlp.experts.expert_{expert}.wo.weight"}}}};

/// Switch-C, the largest: 2,048 experts (table 9 of the paper; 1.6T parameters). Seats as flaxformer's
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
    .losses = {.balance = 0.01}};

}  // namespace moe
