// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>
#include <moe/routers/noisy_top_k_router.hpp>

namespace moe {

/// The language models of Shazeer et al. 2017 (section 5.1): four of 256 flat experts of ReLU, noisy
/// top-k gating. The layer stands between two layers of LSTM, which are counted as attention; embeddings are
/// not counted, as in the paper (table 7).
inline constexpr Model<ReLU, NoisyTopKRouter> shazeer_2017 = {
    .name = "Shazeer 2017",
    .source = "arXiv:1701.06538",
    .router = {.d_model = 512, .num_experts = 256, .top_k = 4},
    .d_ff = 1024,
    .losses = {.importance = 0.1, .load = 0.1},
    .around = {.layers = 2, .moe_layers = 1, .attention = 4 * 512 * (512 + 512)},
    .published = {272.9e6, 0}};

}  // namespace moe
