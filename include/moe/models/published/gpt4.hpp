// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// A RUMOUR: GPT-4 as people have described it, eight experts of 220B parameters, two of them a token.
/// OpenAI has published nothing of it, and `published` is that rumour, too. Its sizes are unknown, so that a
/// layer can be made only of scaled_to().
inline constexpr Model<GELU> gpt_4_rumoured = {
    .name = "GPT-4 (a rumour)",
    .source = "none",
    .router = {.d_model = 0, .num_experts = 8, .top_k = 2, .renormalise = true},
    .published = {8 * 220e9, 0}};

}  // namespace moe
