// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// V-MoE-L/16 (Riquelme et al. 2021): two experts an image patch, softmax of logits with noise of 1 /
/// num_experts, gates as they are; seats of 1.05 times an even share in training, rounded up to a multiple
/// of 4. With Priority::token_max_gate it is batch-prioritised routing. Losses are of each group of images
/// in its authors' code; here, of the batch. The weights of L/16 were not published; those of S/32 and B/16
/// were, in a format of JAX. Tensor names are those of the parameters of the authors' code (Flax), joined by
/// '/'.
inline constexpr Model<GELUTanh> vmoe_l16 = {
    .name = "V-MoE-L/16",
    .source = "arXiv:2106.05974",
    .router = {.d_model = 1024,
               .num_experts = 32,
               .top_k = 2,
               .noise_stddev = 1.0 / 32,
               .capacity = 1.05,
               .training_capacity = 1.05,
               .capacity_rule = {.multiple_of = 4}},
    .d_ff = 4096,
    .expert_bias = true,
    .losses = {.importance = 0.005,
               .importance_of = Importance::probs,
               .load = 0.005,
               .load_threshold = LoadThreshold::one},
    .tensors = {
        .prefix = "Encoder/encoderblock_{layer}/Moe/",
        .w_router = {"Encoder/encoderblock_{layer}/Moe/Router/dense/kernel", TensorPart::all, true},
        .experts = {.w_up = {"Encoder/encoderblock_{layer}/Moe/Mlp/Dense_0/kernel", TensorPart::all, true},
                    .w_down = {"Encoder/encoderblock_{layer}/Moe/Mlp/Dense_1/kernel", TensorPart::all, true},
                    .b_up = {"Encoder/encoderblock_{layer}/Moe/Mlp/Dense_0/bias"},
                    .b_down = {"Encoder/encoderblock_{layer}/Moe/Mlp/Dense_1/bias"}}}};

}  // namespace moe
