// SPDX-License-Identifier: MIT
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io.hpp>
#include <moe/moe.hpp>

// Every model by name: its numbers, and a small layer of it forward and backward.
namespace {

using moe::Index;
using moe::Matrix;
using moe::Rng;

// The model in a size for tests.
template <class M>
M small(const M& model) {
  return model.scaled_to(6, 5, 8);
}

TEST(Models, NamesAreUnique) {
  std::set<std::string> names;
  moe::for_each_model([&](const auto& model) {
    EXPECT_TRUE(names.insert(std::string(model.name)).second) << model.name;
    EXPECT_FALSE(model.source.empty()) << model.name;
  });
  EXPECT_GE(names.size(), 30u);
}

// Mixtral 8x7B by hand: 8 experts of 3 x 4096 x 14336 and a router of 8 x 4096.
TEST(Models, CountParametersAndOperations) {
  const auto& model = moe::mixtral_8x7b;
  EXPECT_EQ(model.expert_parameters(14336), 3 * 4096 * 14336);
  EXPECT_EQ(model.layer_parameters(), 8 * 3 * 4096 * 14336 + 8 * 4096);
  EXPECT_EQ(model.active_layer_parameters(), 2 * 3 * 4096 * 14336 + 8 * 4096);
  EXPECT_EQ(model.flops_per_token(), 2 * (2 * 3 * 4096 * 14336 + 8 * 4096));
  EXPECT_EQ(moe::gpt_oss_20b.expert_parameters(2880), 3 * 2880 * 2880 + 3 * 2880);
  EXPECT_EQ(moe::openmoe_8b_32e.expert_parameters(8192), 4 * 2048 * 8192);
  EXPECT_EQ(moe::openmoe_8b_32e.flops_per_token(), 2 * (2 * 4 * 2048 * 8192 + 32 * 2048));
}

// Every option of a model's layer that is not at its default, in words. Where a configuration file lies
// beside the weights, its keys stand above the line; the others are from the papers and codes that the
// model's header names.
std::string options_of(const auto& model) {
  std::ostringstream text;
  using Options = std::decay_t<decltype(model.router)>;
  const Options defaults{};
  std::vector<std::string> of_defaults;
  moe::io::visit_options(
      defaults, [&](const char*, const auto& value) { of_defaults.push_back(moe::io::option_text(value)); });
  std::size_t i = 0;
  const auto add = [&](const char* name, const std::string& value) {
    text << (text.tellp() > 0 ? " " : "") << name << (value.empty() ? "" : "=") << value;
  };
  const auto flag = [&](const char* name, bool value) {
    if (value) add(name, "");
  };
  moe::io::visit_options(model.router, [&]<class T>(const char* name, const T& value) {
    const std::string exact = moe::io::option_text(value);
    if (exact == of_defaults[i++]) return;
    std::ostringstream shortest;  // 0.8, not 0.80000000000000004
    if constexpr (std::is_same_v<T, double>)
      shortest << value;
    else if constexpr (std::is_same_v<T, std::optional<double>>)
      shortest << value.value();
    else
      shortest << exact;
    add(name, shortest.str());
  });
  if constexpr (requires { model.router.bias; }) {
    flag("router_bias", model.router.bias);
    flag("selection_bias", model.router.selection_bias);
    flag("allow_constant_gate", model.router.allow_constant_gate);
  }
  add("d_ff", std::to_string(model.d_ff));
  flag("expert_bias", model.expert_bias);
  if (model.shared_experts > 0)
    add(model.gated_shared_experts ? "gated_shared" : "shared",
        std::to_string(model.shared_experts) + "x" + std::to_string(model.shared_d_ff));
  flag("output_bias", model.output_bias);
  return text.str();
}

TEST(Models, HaveEveryOptionThatTheirSourcesSay) {
  const std::string mesh =
      "top_k=1 jitter=0.01 capacity=2 training_capacity=1.25 capacity_rounding=down capacity_minimum=4";
  const std::string lingvo =
      "renormalise=true renormalise_epsilon=1e-09 capacity=1 training_capacity=1 "
      "capacity_rounding=down capacity_minimum=4 capacity_multiple_of=4";
  const std::map<std::string, std::string> sources = {
      // Section 5.1.
      {"Shazeer 2017", "d_model=512 num_experts=256 top_k=4 d_ff=1024"},
      // Algorithm 1 draws by twice the gate; lingvo's factor of 2 is without top_k.
      {"GShard 600B", "d_model=1024 num_experts=2048 random_second_threshold=0.5 " + lingvo + " d_ff=8192"},
      // mesh: jitter 1e-2, factors of 1.25 in training and 2 in inference.
      {"Switch-Base-8", "d_model=768 num_experts=8 " + mesh + " d_ff=3072"},
      {"Switch-Base-16", "d_model=768 num_experts=16 " + mesh + " d_ff=3072"},
      {"Switch-Base-32", "d_model=768 num_experts=32 " + mesh + " d_ff=3072"},
      {"Switch-Base-64", "d_model=768 num_experts=64 " + mesh + " d_ff=3072"},
      {"Switch-Base-128", "d_model=768 num_experts=128 " + mesh + " d_ff=3072"},
      {"Switch-Base-256", "d_model=768 num_experts=256 " + mesh + " d_ff=3072"},
      {"Switch-Large-128", "d_model=1024 num_experts=128 " + mesh + " d_ff=4096"},
      // Table 9; seats by flaxformer.
      {"Switch-XXL",
       "d_model=4096 num_experts=128 top_k=1 jitter=0.01 capacity=4 training_capacity=1.25 "
       "capacity_rounding=nearest_even capacity_minimum=2 d_ff=10240"},
      {"Switch-C",
       "d_model=2080 num_experts=2048 top_k=1 jitter=0.01 capacity=2 training_capacity=1 "
       "capacity_rounding=nearest_even capacity_minimum=2 d_ff=6144"},
      // Noise of 1 / num_experts, factor of 1.05, seats in fours.
      {"V-MoE-L/16",
       "d_model=1024 num_experts=32 noise_stddev=0.03125 capacity=1.05 training_capacity=1.05 "
       "capacity_multiple_of=4 d_ff=4096 expert_bias"},
      // praxis, without a random second expert.
      {"GLaM 64B/64E", "d_model=8192 num_experts=64 " + lingvo + " d_ff=32768"},
      // Factors of 1.25 and 2 without top_k; second experts above 0.2, and drawn by gate / 0.2 in training.
      {"ST-MoE-32B",
       "d_model=5120 num_experts=64 second_threshold=0.2 random_second_threshold=0.2 renormalise=true "
       "renormalise_epsilon=1e-09 capacity=1 training_capacity=0.625 capacity_rounding=nearest_even "
       "capacity_minimum=4 d_ff=20480"},
      // Capacity factor 2, which is the default.
      {"Expert Choice 8B/64E",
       "d_model=4096 num_experts=64 capacity_rounding=nearest_even capacity_minimum=4 d_ff=16384"},
      // fairseq: 2 * tokens / experts in training; outputs dropped at a rate of 0.2 are scaled by 0.8 in
      // inference.
      {"NLLB-MoE 54B",
       "d_model=2048 num_experts=128 renormalise=true gate_scale=0.8 training_capacity=1 "
       "capacity_multiple_of=2 renormalise_after_drop=true d_ff=8192 expert_bias"},
      // params.json: moe {num_experts 8, num_experts_per_tok 2}.
      {"Mixtral 8x7B", "d_model=4096 num_experts=8 renormalise=true d_ff=14336"},
      {"Mixtral 8x22B", "d_model=6144 num_experts=8 renormalise=true d_ff=16384"},
      // Factors of 1.25 in training and 2 in inference, at least 4 seats, an even number of them.
      {"OpenMoE-8B/32E",
       "d_model=2048 num_experts=32 capacity=2 training_capacity=1.25 capacity_rounding=down "
       "capacity_minimum=4 capacity_multiple_of=2 d_ff=8192"},
      {"OpenMoE-34B/32E",
       "d_model=3072 num_experts=32 capacity=2 training_capacity=1.25 capacity_rounding=down "
       "capacity_minimum=4 capacity_multiple_of=2 d_ff=12288"},
      // run.py: num_experts 8, num_selected_experts 2, widening_factor 8.
      {"Grok-1", "d_model=6144 num_experts=8 d_ff=32768"},
      // config.json: moe_num_experts 16, moe_top_k 4, moe_normalize_expert_weights 1, ffn_hidden_size 10752.
      {"DBRX", "d_model=6144 num_experts=16 top_k=4 renormalise=true d_ff=10752"},
      // config.json: n_routed_experts 64, num_experts_per_tok 6, norm_topk_prob false, n_shared_experts 2.
      {"DeepSeekMoE 16B", "d_model=2048 num_experts=64 top_k=6 d_ff=1408 shared=1x2816"},
      // config.json: n_group 8, topk_group 3, topk_method group_limited_greedy, routed_scaling_factor 16.0,
      // norm_topk_prob false, n_shared_experts 2.
      {"DeepSeek-V2",
       "d_model=5120 num_experts=160 top_k=6 gate_scale=16 groups=8 kept_groups=3 d_ff=1536 shared=1x3072"},
      // config.json: n_group 8, topk_group 4, topk_method noaux_tc, scoring_func sigmoid, norm_topk_prob
      // true,
      // routed_scaling_factor 2.5, n_shared_experts 1.
      {"DeepSeek-V3",
       "d_model=7168 num_experts=256 top_k=8 score=sigmoid renormalise=true renormalise_epsilon=1e-20 "
       "gate_scale=2.5 groups=8 kept_groups=4 group_score=top_two_sum selection_bias d_ff=2048 "
       "shared=1x2048"},
      // config.json: norm_topk_prob false, shared_expert_intermediate_size 5632 and 20480.
      {"Qwen1.5-MoE-A2.7B", "d_model=2048 num_experts=60 top_k=4 d_ff=1408 gated_shared=1x5632"},
      {"Qwen2-57B-A14B", "d_model=3584 num_experts=64 top_k=8 d_ff=2560 gated_shared=1x20480"},
      // config.json: norm_topk_prob true, no shared expert.
      {"Qwen3-30B-A3B", "d_model=2048 num_experts=128 top_k=8 renormalise=true d_ff=768"},
      {"Qwen3-235B-A22B", "d_model=4096 num_experts=128 top_k=8 renormalise=true d_ff=1536"},
      {"Qwen3-Coder-480B-A35B", "d_model=6144 num_experts=160 top_k=8 renormalise=true d_ff=2560"},
      // config.json: num_experts_per_tok 8, norm_topk_prob false.
      {"OLMoE-1B-7B", "d_model=2048 num_experts=64 top_k=8 d_ff=1024"},
      // config.json: num_local_experts 8, num_experts_per_tok 2; a bias after the sum.
      {"JetMoE-8B", "d_model=2048 num_experts=8 renormalise=true d_ff=5632 output_bias"},
      // config.json: num_local_experts 16, router_jitter_noise 0.01, which is the default.
      {"Phi-3.5-MoE", "d_model=4096 num_experts=16 d_ff=6400"},
      // config.json: num_local_experts 32 and 40, num_experts_per_tok 8, intermediate_size 512.
      {"Granite 3.0 1B-A400M", "d_model=1024 num_experts=32 top_k=8 renormalise=true d_ff=512"},
      {"Granite 3.0 3B-A800M", "d_model=1536 num_experts=40 top_k=8 renormalise=true d_ff=512"},
      // config.json: num_local_experts 16 and 128, num_experts_per_tok 1; sigmoid of the logit on the input.
      {"Llama 4 Scout",
       "d_model=5120 num_experts=16 top_k=1 score=sigmoid gate_side=input d_ff=8192 shared=1x8192"},
      {"Llama 4 Maverick",
       "d_model=5120 num_experts=128 top_k=1 score=sigmoid gate_side=input d_ff=8192 shared=1x8192"},
      // config.json: moe_k 6, moe_num_experts 64, moe_num_shared_experts 2, moe_use_aux_free true,
      // moe_norm_min 1e-12.
      {"ERNIE-4.5-21B-A3B",
       "d_model=2560 num_experts=64 top_k=6 renormalise=true renormalise_minimum=1e-12 "
       "selection_bias d_ff=1536 shared=1x3072"},
      // config.json: n_group 1, topk_group 1, norm_topk_prob true, routed_scaling_factor 2.5,
      // n_shared_experts 1.
      {"GLM-4.5",
       "d_model=5120 num_experts=160 top_k=8 score=sigmoid renormalise=true renormalise_epsilon=1e-20 "
       "gate_scale=2.5 selection_bias d_ff=1536 shared=1x1536"},
      // config.json: num_local_experts 32 and 128, experts_per_token 4, intermediate_size 2880.
      {"gpt-oss-20b",
       "d_model=2880 num_experts=32 top_k=4 renormalise=true router_bias d_ff=2880 expert_bias"},
      {"gpt-oss-120b",
       "d_model=2880 num_experts=128 top_k=4 renormalise=true router_bias d_ff=2880 expert_bias"},
      {"GPT-4 (a rumour)", "num_experts=8 renormalise=true d_ff=0"}};
  std::size_t models = 0;
  moe::for_each_model([&](const auto& model) {
    const auto source = sources.find(std::string(model.name));
    ASSERT_NE(source, sources.end()) << model.name;
    EXPECT_EQ(options_of(model), source->second) << model.name;
    ++models;
  });
  EXPECT_EQ(models, sources.size());
  const moe::ClampedSwiGLU unit = moe::gpt_oss_20b.unit;  // swiglu_limit 7.0, alpha 1.702, up + 1
  EXPECT_EQ(unit.limit, 7.0);
  EXPECT_EQ(unit.alpha, 1.702);
  EXPECT_EQ(unit.offset, 1.0);
}

TEST(Models, CountsAreThoseOfTheLayer) {
  moe::for_each_model([](const auto& model) {
    const auto m = small(model);
    Rng rng(1);
    const auto layer = moe::make_layer<double>(m, rng);
    EXPECT_EQ(moe::num_parameters(layer), m.layer_parameters()) << m.name;
    EXPECT_EQ(moe::num_parameters(moe::make_empty_layer<double>(m)), moe::num_parameters(layer));
  });
}

// Published totals within 1%, where the parts around the layers are in the aggregate; Llama 4 Scout's
// includes an image encoder, GLaM's and some of Switch are rounded to two digits.
TEST(Models, TotalsAreThosePublished) {
  int counted = 0;
  moe::for_each_model([&](const auto& model) {
    const auto total = model.total_parameters();
    if (!total || model.published.total == 0 || model.source == moe::openmoe_8b_32e.source) return;
    ++counted;
    const double difference = double(*total) / model.published.total - 1;
    const double limit = model.name == moe::llama4_scout.name       ? 0.012
                         : model.name == moe::glam_64b_64e.name     ? 0.033
                         : model.name == moe::switch_base_16.name   ? 0.026
                         : model.name == moe::switch_base_32.name   ? 0.012
                         : model.name == moe::switch_large_128.name ? 0.013
                                                                    : 0.01;
    EXPECT_LT(std::abs(difference), limit) << model.name;
  });
  EXPECT_GE(counted, 30);
}

// What a token uses, as published: within 1%, or equal when rounded as far as the published number is, a
// whole number of billions or a tenth. Not so: OpenMoE, and four more (see docs/models.md).
TEST(Models, ActiveParametersAreThosePublished) {
  int counted = 0;
  moe::for_each_model([&](const auto& model) {
    const auto active = model.active_parameters();
    const double published = model.published.active;
    if (!active || published == 0 || model.source == moe::openmoe_8b_32e.source) return;
    if (model.name == moe::qwen3_30b_a3b.name || model.name == moe::jetmoe_8b.name ||
        model.name == moe::glm_4_5.name || model.name == moe::granite_3b_a800m.name)
      return;
    ++counted;
    const double unit = std::fmod(published, 1e9) == 0 ? 1e9 : 1e8;
    EXPECT_LE(std::abs(double(*active) - published), std::max(0.01 * published, unit / 2)) << model.name;
  });
  EXPECT_GE(counted, 17);
}

TEST(Models, ASoftModelUsesAllOfItself) {
  const auto& model = moe::soft_moe_b16;
  EXPECT_EQ(model.active_parameters(), model.total_parameters());
  // 128 slots, 196 tokens: logits, slots and outputs cost 2 * 128 * 768 each; an expert works once a slot.
  EXPECT_DOUBLE_EQ(model.flops_per_token(196), 6.0 * 128 * 768 + 2.0 * 128 * 2 * 768 * 3072 / 196.0);
  EXPECT_THROW(model.flops_per_token(0), std::invalid_argument);
}

// docs/models.md says why these have none.
TEST(Models, AllButSevenHaveTensorNames) {
  std::vector<std::string_view> without;
  moe::for_each_model([&](const auto& model) {
    EXPECT_EQ(model.tensors.prefix.empty(), model.tensors.w_router.empty()) << model.name;
    if (model.tensors.w_router.empty()) without.push_back(model.name);
  });
  moe::for_each_soft_model([](const auto& model) { EXPECT_FALSE(model.tensors.w_slots.empty()); });
  EXPECT_EQ(without,
            (std::vector<std::string_view>{"Shazeer 2017", "GShard 600B", "Switch-XXL", "GLaM 64B/64E",
                                           "ST-MoE-32B", "Expert Choice 8B/64E", "GPT-4 (a rumour)"}));
}

// Nothing stands for a number that does not follow from the sizes.
TEST(Models, TotalsThatAreNotCountedAreAbsent) {
  EXPECT_FALSE(moe::gshard_600b.total_parameters());
  EXPECT_FALSE(moe::gshard_600b.active_parameters());
  EXPECT_FALSE(moe::vmoe_l16.total_parameters());
  EXPECT_FALSE(moe::gpt_4_rumoured.total_parameters());
  EXPECT_EQ(moe::gpt_4_rumoured.published.total, 8 * 220e9);
  EXPECT_FALSE(moe::mixtral_8x7b.scaled_to(64, 128, 8).total_parameters());
  EXPECT_FALSE(moe::mixtral_8x7b.scaled_to(64, 128, 8).active_parameters());
  EXPECT_EQ(moe::mixtral_8x7b.scaled_to(64, 128, 8).published.total, 0);
  EXPECT_EQ(moe::mixtral_8x7b.scaled_to(4096, 14336, 8).total_parameters(),
            moe::mixtral_8x7b.total_parameters());
  EXPECT_FALSE(moe::soft_moe_b16.scaled_to(64, 128, 8).total_parameters());
  EXPECT_TRUE(moe::soft_moe_b16.scaled_to(768, 3072, 128).total_parameters());
}

// Two of eight query and output projections of JetMoE's attention are in use, as of its experts.
TEST(Models, IdleAttentionIsNotActive) {
  const auto& model = moe::jetmoe_8b;
  EXPECT_EQ(*model.total_parameters() - *model.active_parameters(),
            Index(24) * (6 * 3 * 2048 * 5632 + 6 * 2 * 2048 * 2048));
}

TEST(Models, NoiseWeightsAreCounted) {
  EXPECT_EQ(moe::shazeer_2017.layer_parameters(), 256 * (2 * 512 * 1024) + 2 * 256 * 512);
}

// OpenMoE's authors count a feed-forward as three matrices and embeddings once, where their code has gates of
// twice the width and an output embedding.
TEST(Models, OpenMoEHasMoreParametersThanItsAuthorsCount) {
  for (const auto& model : {moe::openmoe_8b_32e, moe::openmoe_34b_32e}) {
    const Index matrix = model.d_model() * model.d_ff, layers = model.around.layers;
    const Index experts = model.around.moe_layers * model.num_experts();
    const Index counted =
        *model.total_parameters() - (layers + experts) * matrix - model.around.vocabulary * model.d_model();
    EXPECT_NEAR(double(counted) / model.published.total, 1, 0.02) << model.name;
  }
}

TEST(Models, LayersRunForwardAndBackward) {
  moe::for_each_model([](const auto& model) {
    SCOPED_TRACE(std::string(model.name));
    Rng rng(2);
    const auto layer = moe::make_layer<double>(small(model), rng);
    using Layer = std::remove_const_t<decltype(layer)>;
    Matrix<double> x(20, 6);
    moe::fill_normal(x, 1.0, rng);
    typename Layer::Cache cache;
    const Matrix<double> y = layer.forward(x, rng, cache);
    EXPECT_TRUE(y.allFinite());
    EXPECT_GT(y.norm(), 0);
    Layer grad = moe::zeros_like(layer);
    const moe::Loss<double> loss = moe::routing_loss(model.losses, cache.routing);
    EXPECT_TRUE(std::isfinite(loss.value));
    EXPECT_TRUE(layer.backward(y, cache, grad, loss.gradient).allFinite());
    Layer::visit(
        [](const moe::ParameterInfo& info, const auto& g) { EXPECT_TRUE(g.allFinite()) << info.name; }, grad);
  });
}

// Seats of an expert in a group of 4,096 tokens, by the authors' code: GShard and GLaM 2 * 4096 / E, 0 is
// 4, up to a multiple of 4; ST-MoE and Switch 1.25 * 4096 / E in training and 2 * 4096 / E in inference.
TEST(Models, GiveExpertsTheSeatsThatTheirAuthorsGive) {
  const auto seats = [](const auto& model, bool training, Index tokens = 4096) {
    const auto& o = model.router;
    return moe::expert_capacity(tokens, o.num_experts, o.top_k, training ? *o.training_capacity : *o.capacity,
                                o.capacity_rule);
  };
  EXPECT_EQ(seats(moe::gshard_600b, true), 4);
  EXPECT_EQ(seats(moe::gshard_600b, true, 1024), 4);  // 1, up to 4
  EXPECT_EQ(seats(moe::gshard_600b, true, 5120), 8);  // 5, up to 8
  EXPECT_EQ(seats(moe::glam_64b_64e, true), 128);
  EXPECT_EQ(seats(moe::glam_64b_64e, false), 128);
  EXPECT_EQ(seats(moe::st_moe_32b, true), 80);
  EXPECT_EQ(seats(moe::st_moe_32b, false), 128);
  EXPECT_EQ(seats(moe::st_moe_32b, true, 100), 4);  // 1.95
  EXPECT_EQ(seats(moe::switch_base_8, true), 640);
  EXPECT_EQ(seats(moe::switch_base_8, true, 100), 15);
  EXPECT_EQ(seats(moe::switch_base_8, false, 100), 25);
  EXPECT_EQ(seats(moe::switch_c, true), 2);
  EXPECT_EQ(seats(moe::switch_c, false), 4);
  EXPECT_EQ(seats(moe::vmoe_l16, true), 272);             // 268.8, up to 272
  EXPECT_EQ(seats(moe::openmoe_8b_32e, true, 100), 8);    // 7.8, and even
  EXPECT_EQ(seats(moe::openmoe_8b_32e, false, 100), 12);  // 12.5
  EXPECT_EQ(seats(moe::openmoe_8b_32e, true, 10), 4);
  EXPECT_EQ(seats(moe::switch_base_256, true), 20);
  EXPECT_EQ(seats(moe::switch_xxl, false), 128);
  EXPECT_EQ(seats(moe::nllb_moe_54b, true), 64);
  EXPECT_EQ(seats(moe::nllb_moe_54b.scaled_to(4, 4, 8), true, 100), 26);  // 2 * ceil(100 / 8)
  EXPECT_EQ(seats(moe::nllb_moe_54b, true, 100), 2);
  EXPECT_FALSE(moe::nllb_moe_54b.router.capacity);
  const auto& choice = moe::expert_choice_8b_64e.router;
  EXPECT_EQ(moe::expert_capacity(4096, 64, 1, choice.capacity, choice.capacity_rule), 128);
  EXPECT_EQ(moe::expert_capacity(48, 64, 1, choice.capacity, choice.capacity_rule), 4);
}

// Soft MoE layers have no router, and models of their own.
TEST(SoftModels, HaveTheParametersThatArePublished) {
  moe::for_each_soft_model([](const auto& model) {
    EXPECT_NEAR(double(*model.total_parameters()) / model.published.total, 1, 0.003) << model.name;
    const auto m = model.scaled_to(6, 5, 8);
    Rng rng(4);
    EXPECT_EQ(moe::num_parameters(moe::make_layer<double>(m, rng)), m.layer_parameters());
    EXPECT_EQ(moe::num_parameters(moe::make_empty_layer<double>(m)), m.layer_parameters());
  });
  EXPECT_EQ(moe::soft_moe_b16.layer_parameters(), 128 * (2 * 768 * 3072 + 3072 + 768) + 128 * 768 + 1);
}

TEST(SoftModels, LayersRunForwardAndBackward) {
  moe::for_each_soft_model([](const auto& model) {
    SCOPED_TRACE(std::string(model.name));
    Rng rng(5);
    const auto layer = moe::make_layer<double>(model.scaled_to(6, 5, 8), rng);
    using Layer = std::remove_const_t<decltype(layer)>;
    EXPECT_EQ(layer.num_slots(), 8);
    Matrix<double> x(20, 6);
    moe::fill_normal(x, 1.0, rng);
    typename Layer::Cache cache;
    const Matrix<double> y = layer.forward(x, cache);
    EXPECT_TRUE(y.allFinite());
    EXPECT_GT(y.norm(), 0);
    Layer grad = moe::zeros_like(layer);
    EXPECT_TRUE(layer.backward(y, cache, grad).allFinite());
  });
  Rng rng(6);
  EXPECT_THROW(moe::make_layer<float>(moe::soft_moe_b16.scaled_to(0, 5, 8), rng), std::invalid_argument);
}

TEST(Models, SizesThatDoNotFitAreRefused) {
  Rng rng(3);
  EXPECT_THROW(moe::make_layer<float>(moe::gpt_4_rumoured, rng), std::invalid_argument);
}

TEST(Models, NoiseIsInverseToTheNumberOfExperts) {
  EXPECT_EQ(moe::vmoe_l16.router.noise_stddev, 1.0 / 32);
  EXPECT_EQ(moe::vmoe_l16.scaled_to(8, 8, 8).router.noise_stddev, 1.0 / 8);
  EXPECT_EQ(moe::vmoe_l16.scaled_to(8, 8, 64).router.noise_stddev, 1.0 / 64);
  EXPECT_EQ(moe::mixtral_8x7b.scaled_to(8, 8, 4).router.noise_stddev, 0);
}

// Whatever the number of experts, the layer can be made; where the limit fits it stays as it is.
TEST(Models, GroupLimitsFitTheNumberOfExperts) {
  const auto limit = [](const auto& model, Index experts) {
    const auto& r = model.scaled_to(8, 8, experts).router;
    return std::vector<Index>{r.group_limit.groups, r.group_limit.kept, r.top_k};
  };
  using V = std::vector<Index>;
  EXPECT_EQ(limit(moe::deepseek_v3, 64), (V{8, 4, 8}));
  EXPECT_EQ(limit(moe::deepseek_v3, 16), (V{8, 4, 8}));
  EXPECT_EQ(limit(moe::deepseek_v3, 12), (V{6, 3, 6}));
  EXPECT_EQ(limit(moe::deepseek_v3, 8), (V{4, 2, 4}));
  EXPECT_EQ(limit(moe::deepseek_v3, 7), (V{1, 1, 7}));
  EXPECT_EQ(limit(moe::deepseek_v2, 16), (V{8, 3, 6}));
  EXPECT_EQ(limit(moe::deepseek_v2, 8), (V{4, 2, 4}));
  Rng rng(7);
  for (Index experts = 1; experts <= 20; ++experts) {
    EXPECT_NO_THROW(moe::make_layer<float>(moe::deepseek_v2.scaled_to(4, 3, experts), rng));
    EXPECT_NO_THROW(moe::make_layer<float>(moe::deepseek_v3.scaled_to(4, 3, experts), rng));
  }
}

// NLLB's gates in training have a sum of 1; in inference, of 0.8.
TEST(Models, NllbTrainsWithoutTheScaleOfInference) {
  EXPECT_EQ(moe::nllb_moe_54b.router.gate_scale, 0.8);
  EXPECT_EQ(moe::nllb_moe_54b_in_training.router.gate_scale, 1);
}

// --- Losses, against sums written down from the papers -------------------------------------------

using moe::Routing;

constexpr Index kTokens = 24, kExperts = 8;

moe::BatchInfo two_sequences() {
  moe::BatchInfo info;
  info.group_begin = moe::IndexVector{{0, 10, kTokens}};
  return info;
}

// A routing of the model's router in training; a selection bias favours some experts.
template <class Unit, template <class> class R>
Routing<double> routing_of(const moe::Model<Unit, R>& model) {
  Rng rng(8);
  R<double> router(small(model).router, rng);
  moe::fill_normal(router.w_router, 0.7, rng);
  if constexpr (requires { router.selection_bias; })
    for (Index e = 0; e < router.selection_bias.size(); ++e) router.selection_bias[e] = e % 3 == 0 ? -5 : 5;
  Matrix<double> x(kTokens, 6);
  moe::fill_normal(x, 1.0, rng);
  Routing<double> routing;
  router.route(x, rng, two_sequences(), routing);
  return routing;
}

// How often each of the tokens [begin, end) chose each expert, first choices or all.
std::vector<double> counts(const Routing<double>& routing, Index begin, Index end, bool first_only) {
  std::vector<double> count(kExperts);
  const auto& chosen = routing.chosen;
  for (Index t = begin; t < end; ++t)
    for (Index c = chosen.token_begin[t]; c < chosen.token_begin[t + 1]; ++c)
      if (!first_only || c == chosen.token_begin[t]) ++count[std::size_t(chosen.expert[c])];
  return count;
}

// num_experts * sum over experts of count / all * the mean of probs over the tokens [begin, end).
double balance(const Routing<double>& routing, const std::vector<double>& count, double all, Index begin,
               Index end) {
  double sum = 0;
  for (Index e = 0; e < kExperts; ++e)
    for (Index t = begin; t < end; ++t)
      sum += count[std::size_t(e)] / all * routing.router_probs(t, e) / double(end - begin);
  return double(kExperts) * sum;
}

double squared_variation(const std::vector<double>& x) {
  double mean = 0, variance = 0;
  for (const double v : x) mean += v / double(x.size());
  for (const double v : x) variance += (v - mean) * (v - mean) / double(x.size());
  return variance / (mean * mean + 1e-10);
}

TEST(ModelLosses, GShardCountsFirstChoices) {
  const auto routing = routing_of(moe::gshard_600b);
  EXPECT_NEAR(moe::routing_loss(moe::gshard_600b.losses, routing).value,
              0.01 * balance(routing, counts(routing, 0, kTokens, true), kTokens, 0, kTokens), 1e-12);
}

// Where the batch has groups: lingvo, mesh, flaxformer.
TEST(ModelLosses, AreMeansOverGroups) {
  const auto expect_mean = [](const auto& model, bool first_only) {
    const auto routing = routing_of(model);
    const double k = first_only ? 1 : double(small(model).router.top_k);
    const double mean = (balance(routing, counts(routing, 0, 10, first_only), k * 10, 0, 10) +
                         balance(routing, counts(routing, 10, kTokens, first_only), k * 14, 10, kTokens)) /
                        2;
    moe::Losses losses = model.losses;
    losses.z = 0;
    EXPECT_NEAR(moe::routing_loss(losses, routing, two_sequences()).value, 0.01 * mean, 1e-12) << model.name;
  };
  expect_mean(moe::gshard_600b, true);
  expect_mean(moe::glam_64b_64e, true);
  expect_mean(moe::st_moe_32b, true);
  expect_mean(moe::switch_base_8, false);
  expect_mean(moe::switch_xxl, false);
  expect_mean(moe::switch_c, false);
}

TEST(ModelLosses, StMoeAddsTheZLoss) {
  const auto routing = routing_of(moe::st_moe_32b);
  double z = 0;
  for (Index t = 0; t < kTokens; ++t) {
    double sum = 0;
    for (Index e = 0; e < kExperts; ++e) sum += std::exp(routing.router_logits(t, e));
    z += std::log(sum) * std::log(sum) / double(kTokens);
  }
  const std::vector<double> first = counts(routing, 0, kTokens, true);
  const auto loss = moe::routing_loss(moe::st_moe_32b.losses, routing);
  EXPECT_NEAR(loss.value, 0.01 * balance(routing, first, kTokens, 0, kTokens) + 0.001 * z, 1e-12);
  for (Index e = 0; e < kExperts; ++e)
    EXPECT_NEAR(loss.gradient.d_router_probs(3, e),
                0.01 * double(kExperts) * first[std::size_t(e)] / double(kTokens * kTokens), 1e-12);
  EXPECT_GT(loss.gradient.d_router_logits.norm(), 0);
}

// Hugging Face: num_experts * sum over choices and experts of (tokens with that choice / tokens) * P.
TEST(ModelLosses, HuggingFaceAddsUpChoices) {
  const auto expect_hugging_face = [](const auto& model, double coefficient) {
    const auto routing = routing_of(model);
    EXPECT_NEAR(moe::routing_loss(model.losses, routing).value,
                coefficient * balance(routing, counts(routing, 0, kTokens, false), kTokens, 0, kTokens),
                1e-12)
        << model.name;
    EXPECT_EQ(model.losses.over_layers, moe::OverLayers::mean);
  };
  expect_hugging_face(moe::mixtral_8x7b, 0.001);
  expect_hugging_face(moe::qwen3_30b_a3b, 0.001);
  expect_hugging_face(moe::dbrx, 0.05);
  expect_hugging_face(moe::gpt_oss_20b, 0.001);
}

TEST(ModelLosses, ShazeerVariesImportanceAndLoad) {
  const auto routing = routing_of(moe::shazeer_2017);
  std::vector<double> importance(kExperts);
  for (Index c = 0; c < routing.chosen.size(); ++c)
    importance[std::size_t(routing.chosen.expert[c])] += routing.chosen.gate[c];
  const double load = moe::load_loss(routing, moe::LoadThreshold::two).value;
  EXPECT_NEAR(moe::routing_loss(moe::shazeer_2017.losses, routing).value,
              0.1 * squared_variation(importance) + 0.1 * load, 1e-12);
}

TEST(ModelLosses, VMoeVariesProbabilitiesWithoutNoise) {
  const auto routing = routing_of(moe::vmoe_l16);
  std::vector<double> importance(kExperts);
  for (Index t = 0; t < kTokens; ++t) {
    double sum = 0;
    for (Index e = 0; e < kExperts; ++e) sum += std::exp(routing.router_logits(t, e));
    for (Index e = 0; e < kExperts; ++e)
      importance[std::size_t(e)] += std::exp(routing.router_logits(t, e)) / sum;
  }
  const double load = moe::load_loss(routing, moe::LoadThreshold::one).value;
  EXPECT_NEAR(moe::routing_loss(moe::vmoe_l16.losses, routing).value,
              0.005 * squared_variation(importance) + 0.005 * load, 1e-12);
}

// The mean over sequences, and four devices of two experts each: the mean of f times the sum of P.
TEST(ModelLosses, DeepSeekV2BalancesSequencesAndDevices) {
  auto model = moe::deepseek_v2;
  EXPECT_EQ(model.losses.devices, 8);
  model.losses.devices = 4;
  const auto routing = routing_of(model);
  const double k = double(small(model).router.top_k);
  const double sequences = (balance(routing, counts(routing, 0, 10, false), k * 10, 0, 10) +
                            balance(routing, counts(routing, 10, kTokens, false), k * 14, 10, kTokens)) /
                           2;
  const std::vector<double> count = counts(routing, 0, kTokens, false);
  double devices = 0;
  for (Index d = 0; d < 4; ++d) {
    double f = 0, p = 0;
    for (const Index e : {2 * d, 2 * d + 1}) {
      f += double(kExperts) * count[std::size_t(e)] / (k * double(kTokens)) / 2;
      for (Index t = 0; t < kTokens; ++t) p += routing.router_probs(t, e) / double(kTokens);
    }
    devices += f * p;
  }
  EXPECT_NEAR(moe::routing_loss(model.losses, routing, two_sequences()).value,
              0.003 * sequences + 0.05 * devices, 1e-12);
}

// Counted are the experts with the largest scores, not those that the bias and the groups let through.
TEST(ModelLosses, DeepSeekV3CountsScoresWithoutBias) {
  const auto routing = routing_of(moe::deepseek_v3);
  const Index k = small(moe::deepseek_v3).router.top_k;
  double expected = 0;
  for (const auto& [begin, end] : {std::pair<Index, Index>{0, 10}, {10, kTokens}}) {
    std::vector<double> count(kExperts);
    for (Index t = begin; t < end; ++t)
      for (Index e = 0; e < kExperts; ++e) {
        Index better = 0;
        for (Index other = 0; other < kExperts; ++other)
          better += routing.router_probs(t, other) > routing.router_probs(t, e);
        count[std::size_t(e)] += better < k;
      }
    expected += balance(routing, count, double(k * (end - begin)), begin, end) / 2;
  }
  EXPECT_NEAR(moe::routing_loss(moe::deepseek_v3.losses, routing, two_sequences()).value, 1e-4 * expected,
              1e-12);
  EXPECT_GT(std::abs(moe::sequence_balance_loss(routing, two_sequences()).value - expected), 0.01);
}

TEST(ModelLosses, AModelWithoutLossesHasNone) {
  const auto loss = moe::routing_loss(moe::grok_1.losses, routing_of(moe::grok_1));
  EXPECT_EQ(loss.value, 0);
  EXPECT_TRUE(loss.gradient.empty());
}

TEST(ModelLosses, DevicesAreAtLeastOne) {
  EXPECT_THROW(moe::routing_loss({.device = 0.1, .devices = 0}, routing_of(moe::grok_1)),
               std::invalid_argument);
}

}  // namespace
