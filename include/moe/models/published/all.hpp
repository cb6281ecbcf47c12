// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/published/dbrx.hpp>
#include <moe/models/published/deepseek.hpp>
#include <moe/models/published/ernie.hpp>
#include <moe/models/published/expert_choice.hpp>
#include <moe/models/published/glm.hpp>
#include <moe/models/published/gpt4.hpp>
#include <moe/models/published/gpt_oss.hpp>
#include <moe/models/published/granite.hpp>
#include <moe/models/published/grok.hpp>
#include <moe/models/published/gshard.hpp>
#include <moe/models/published/llama4.hpp>
#include <moe/models/published/mixtral.hpp>
#include <moe/models/published/nllb.hpp>
#include <moe/models/published/olmoe.hpp>
#include <moe/models/published/openmoe.hpp>
#include <moe/models/published/phi.hpp>
#include <moe/models/published/qwen.hpp>
#include <moe/models/published/shazeer.hpp>
#include <moe/models/published/soft_moe.hpp>
#include <moe/models/published/switch_transformer.hpp>
#include <moe/models/published/vmoe.hpp>
#include <moe/models/training_losses.hpp>

namespace moe {

/// Calls f(model) for every published model of the library with a router.
template <class F>
void for_each_model(F&& f) {
  f(shazeer_2017);
  f(gshard_600b);
  f(switch_base_8);
  f(switch_base_16);
  f(switch_base_32);
  f(switch_base_64);
  f(switch_base_128);
  f(switch_base_256);
  f(switch_large_128);
  f(switch_xxl);
  f(switch_c);
  f(vmoe_l16);
  f(glam_64b_64e);
  f(st_moe_32b);
  f(expert_choice_8b_64e);
  f(nllb_moe_54b);
  f(mixtral_8x7b);
  f(mixtral_8x22b);
  f(openmoe_8b_32e);
  f(openmoe_34b_32e);
  f(grok_1);
  f(dbrx);
  f(deepseek_moe_16b);
  f(deepseek_v2);
  f(deepseek_v3);
  f(qwen1_5_moe_a2_7b);
  f(qwen2_57b_a14b);
  f(qwen3_30b_a3b);
  f(qwen3_235b_a22b);
  f(qwen3_coder_480b_a35b);
  f(olmoe_1b_7b);
  f(jetmoe_8b);
  f(phi_3_5_moe);
  f(granite_1b_a400m);
  f(granite_3b_a800m);
  f(llama4_scout);
  f(llama4_maverick);
  f(ernie_4_5_21b_a3b);
  f(glm_4_5);
  f(gpt_oss_20b);
  f(gpt_oss_120b);
  f(gpt_4_rumoured);
}

/// Calls f(model) for every published model of Soft MoE layers.
template <class F>
void for_each_soft_model(F&& f) {
  f(soft_moe_s16);
  f(soft_moe_b16);
  f(soft_moe_l16);
  f(soft_moe_h14);
}

}  // namespace moe
