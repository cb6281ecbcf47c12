// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/experts/variant_expert.hpp>
#include <moe/experts/zero_computation_experts.hpp>
#include <moe/io.hpp>
#include <moe/moe.hpp>

#include "golden.hpp"

// Layers of published models against values that other people's implementations computed: see
// golden/README.md. Everything is loaded through load_layer.
namespace {

using moe::Index;
using moe::Matrix;
using moe::Model;

// The model in the size of the golden file.
template <class M>
M sized(const M& model, const Golden& golden) {
  M small = model.scaled_to(golden.number("d_model"), golden.number("d_ff"), golden.number("num_experts"));
  if constexpr (requires { small.router.top_k = Index(1); }) small.router.top_k = golden.number("top_k");
  if (small.shared_experts > 0) small.shared_d_ff = golden.number("shared_expert_d_ff");
  if constexpr (requires { small.router.group_limit; }) {
    if (small.router.group_limit.applies()) {
      small.router.group_limit.groups = golden.number("n_group");
      small.router.group_limit.kept = golden.number("topk_group");
    }
  }
  return small;
}

// What a file's implementation computes otherwise, though it means the same.
struct Differences {
  double gate_factor = 1;            // of our gates over the file's
  moe::BatchInfo info{};             // sequences, where capacity or the loss works within one
  std::optional<double> capacity{};  // in place of the model's capacity and its rule
  bool training = false;             // with the model's training capacity
  // Whose gradient the file's backward pass adds, times config's loss_in_gradient.
  std::function<moe::Loss<float>(const moe::Routing<float>&, const moe::BatchInfo&)> added_loss{};
};

// Hugging Face's loss of most models: the mean over tokens, not over choices.
constexpr auto kTimesChoices = [](const auto& layer, const auto&, const auto& routing, const auto&) {
  return double(layer.router().options().top_k) * double(moe::load_balancing_loss(routing).value);
};

// The file's gradients by every parameter, in a layer. There is none by a selection bias.
template <class Layer, class M>
Layer load_gradients(const M& model, const Golden& golden, const std::string& name) {
  M without_buffers = model;
  if constexpr (requires { without_buffers.router.selection_bias; }) {
    without_buffers.router.selection_bias = false;
    without_buffers.tensors.selection_bias = {};
  }
  return moe::load_layer<float>(
      without_buffers,
      gradients_of(golden, "golden.grad.", testing::TempDir() + name + ".gradients.safetensors"),
      golden.number("layer"));
}

// The gradients of <golden.d_y, y>, and of what `routing_gradient` belongs to, by x and by every parameter.
// Returns the largest relative error.
template <class Layer>
double expect_equal_gradients(const Golden& golden, const Layer& layer, const Layer& expected,
                              typename Layer::Cache& cache,
                              const moe::RoutingGradient<float>& routing_gradient = {}) {
  double largest = 0;
  const auto expect_close = [&](const auto& seen, const auto& from_file, std::string_view what) {
    const double error = relative_error(seen, from_file);
    EXPECT_LT(error, 1e-5) << what;
    largest = std::max(largest, error);
  };
  Layer grad = moe::zeros_like(layer);
  const Matrix<float> d_x = layer.backward(golden.matrix<float>("golden.d_y"), cache, grad, routing_gradient);
  expect_close(d_x, golden.matrix<float>("golden.d_x"), "d_x");
  if constexpr (requires { grad.router().selection_bias; }) grad.router().selection_bias.resize(0);
  Layer::visit(
      [&](const moe::ParameterInfo& info, const auto& seen, const auto& from_file) {
        if (all_zero(from_file)) {
          EXPECT_TRUE(all_zero(seen)) << info.name;
        } else {
          expect_close(seen, from_file, info.name.str());
        }
      },
      grad, expected);
  return largest;
}

// A layer with the file's weights, and one whose parameters are the file's gradients.
template <class Layer, class Loss = decltype(kTimesChoices)>
void expect_equal_layer(const Golden& golden, const std::string& name, const Layer& layer,
                        const Layer& gradients, const Differences& differences = {},
                        const Loss& loss = kTimesChoices) {
  const Matrix<float> x = golden.matrix<float>("golden.x");
  typename Layer::Cache cache;
  moe::Rng rng(1);
  const Matrix<float> y = differences.training ? layer.forward(x, rng, cache, differences.info)
                                               : layer.forward(x, cache, differences.info);
  double largest = 0;  // of all errors, relative
  const auto expect_close = [&](const auto& seen, const auto& expected, std::string_view what) {
    const double error = relative_error(seen, expected);
    EXPECT_LT(error, 1e-5) << what;
    largest = std::max(largest, error);
  };
  expect_close(y, golden.matrix<float>("golden.y"), "y");
  expect_close(cache.routing.router_logits, golden.matrix<float>("golden.router_logits"), "logits");

  // Experts and gates, as sets: implementations list them in orders of their own. All choices, then
  // those with a seat; a gate of 0 is that of a choice without.
  const auto experts = golden.matrix<std::int64_t>("golden.experts");
  const auto gates = golden.matrix<float>("golden.gates");
  for (Index t = 0; t < x.rows(); ++t) {
    const auto& chosen = cache.routing.chosen;
    std::set<Index> ours, theirs;
    for (Index c = chosen.token_begin[t]; c < chosen.token_begin[t + 1]; ++c) ours.insert(chosen.expert[c]);
    for (Index i = 0; i < experts.cols(); ++i) theirs.insert(Index(experts(t, i)));
    EXPECT_EQ(ours, theirs) << "choices of token " << t;
    std::map<Index, double> expected, seen;
    for (Index i = 0; i < experts.cols(); ++i)
      if (gates(t, i) != 0) expected[Index(experts(t, i))] = double(gates(t, i));
    for (const auto& [expert, gate] : moe::trace(cache.routing, t)) seen[expert] = double(gate);
    ASSERT_EQ(seen.size(), expected.size()) << "token " << t;
    for (const auto& [expert, gate] : expected) {
      ASSERT_TRUE(seen.count(expert)) << "token " << t << " expert " << expert;
      const double wanted = differences.gate_factor * gate;
      EXPECT_NEAR(seen[expert], wanted, 2e-6 * wanted) << "token " << t << " expert " << expert;
    }
  }
  if (golden.file.contains("golden.balance_loss")) {
    const double expected = golden.matrix<double>("golden.balance_loss")(0, 0);
    EXPECT_NEAR(loss(layer, x, cache.routing, differences.info), expected, 1e-6 * expected);
  }
  if (golden.file.contains("golden.z_loss")) {
    const double expected = golden.matrix<double>("golden.z_loss")(0, 0);
    EXPECT_NEAR(double(moe::router_z_loss(cache.routing).value), expected, 1e-6 * expected);
  }

  moe::RoutingGradient<float> added;
  if (differences.added_loss)
    added = golden.config.at("loss_in_gradient").get<float>() *
            differences.added_loss(cache.routing, differences.info).gradient;
  largest = std::max(largest, expect_equal_gradients(golden, layer, gradients, cache, added));
  std::printf("%s: largest relative error %.1e\n", name.c_str(), largest);
}

template <class M, class Loss = decltype(kTimesChoices)>
void expect_equal_to_golden(const M& published, const std::string& name, const Differences& differences = {},
                            const Loss& loss = kTimesChoices) {
  const Golden golden(name);
  M model = sized(published, golden);
  if constexpr (requires { model.router.capacity_rule; }) {
    if (differences.capacity) {
      model.router.capacity = differences.capacity;
      model.router.capacity_rule = {};
    }
  }
  const auto layer = moe::load_layer<float>(model, golden.file, golden.number("layer"));
  using Layer = std::remove_const_t<decltype(layer)>;
  expect_equal_layer(golden, name, layer, load_gradients<Layer>(model, golden, name), differences, loss);
}

TEST(Golden, Mixtral) { expect_equal_to_golden(moe::mixtral_8x7b, "mixtral"); }
TEST(Golden, Qwen2Moe) { expect_equal_to_golden(moe::qwen1_5_moe_a2_7b, "qwen2_moe"); }
TEST(Golden, Qwen3Moe) { expect_equal_to_golden(moe::qwen3_30b_a3b, "qwen3_moe"); }
TEST(Golden, Olmoe) { expect_equal_to_golden(moe::olmoe_1b_7b, "olmoe"); }
TEST(Golden, DeepSeekMoe) { expect_equal_to_golden(moe::deepseek_moe_16b, "deepseek_v2_lite"); }
TEST(Golden, DeepSeekV2) { expect_equal_to_golden(moe::deepseek_v2, "deepseek_v2"); }
TEST(Golden, DeepSeekV3) { expect_equal_to_golden(moe::deepseek_v3, "deepseek_v3"); }
TEST(Golden, Dbrx) { expect_equal_to_golden(moe::dbrx, "dbrx"); }
TEST(Golden, GptOss) { expect_equal_to_golden(moe::gpt_oss_20b, "gpt_oss"); }
TEST(Golden, Llama4) { expect_equal_to_golden(moe::llama4_scout, "llama4"); }
TEST(Golden, GraniteMoe) { expect_equal_to_golden(moe::granite_1b_a400m, "granitemoe"); }
TEST(Golden, JetMoe) { expect_equal_to_golden(moe::jetmoe_8b, "jetmoe"); }
TEST(Golden, PhiMoe) { expect_equal_to_golden(moe::phi_3_5_moe, "phimoe"); }
TEST(Golden, Glm4Moe) { expect_equal_to_golden(moe::glm_4_5, "glm4_moe"); }

// The file's down projections are square, so that only values tell them from their transposes; the shape of
// the others tells it.
TEST(Golden, GptOssUnturnedIsAnotherLayer) {
  for (const char* const file : {"gpt_oss", "authors_gpt_oss"}) {
    const Golden golden(file);
    const auto model = sized(moe::gpt_oss_20b, golden);
    const Matrix<float> x = golden.matrix<float>("golden.x"), y = golden.matrix<float>("golden.y");
    auto unturned = model;
    unturned.tensors.experts.w_down.transposed = false;
    const auto layer = moe::load_layer<float>(unturned, golden.file, golden.number("layer"));
    const double error = relative_error(layer.forward(x), y);
    EXPECT_TRUE(error > 1e-5 && std::isfinite(error)) << file << ": " << error;
    std::printf("%s with w_down unturned: relative error %.1e\n", file, error);
    unturned = model;
    unturned.tensors.experts.w_gate.transposed = unturned.tensors.experts.w_up.transposed = false;
    EXPECT_THROW(moe::load_layer<float>(unturned, golden.file, golden.number("layer")), moe::CheckpointError)
        << file;
  }
}

// The authors' estimator in training: picks that were drawn, gates of w * m, and a backward pass that does
// not see m. The file's draws are replayed.
TEST(Golden, PhiMoeInTraining) {
  const Golden golden("phimoe_train");
  const auto model = sized(moe::phi_3_5_moe, golden);
  const auto layer = moe::load_layer<float>(model, golden.file, golden.number("layer"));
  using Layer = std::remove_const_t<decltype(layer)>;
  const Matrix<float> x = golden.matrix<float>("golden.x");
  const Index tokens = x.rows(), n = layer.num_experts();
  const moe::TensorView &noise = golden.file.at("golden.noise"),  // [pick, token, expert]
      &uniform = golden.file.at("golden.uniform");                // [pick, token, 1]
  ASSERT_EQ(noise.size(), 2 * tokens * n);
  ASSERT_EQ(uniform.size(), 2 * tokens);
  Matrix<float> exponential(2 * tokens, n), factor(2 * tokens, 1);
  moe::read_tensor(noise, exponential.data());
  moe::read_tensor(uniform, factor.data());
  Matrix<float> draws(tokens, 2 * (n + 1));  // -log(u) is exponential
  for (const Index pick : {0, 1}) {
    draws.middleCols(pick * (n + 1), n) = (-exponential.middleRows(pick * tokens, tokens).array()).exp();
    draws.col(pick * (n + 1) + n) = factor.middleRows(pick * tokens, tokens);
  }
  moe::Routing<float> routing;
  layer.router().route_with_draws(x, draws, {}, routing);
  const auto experts = golden.matrix<std::int64_t>("golden.experts");
  const auto gates = golden.matrix<float>("golden.gates");
  ASSERT_EQ(routing.chosen.size(), experts.size());
  for (Index c = 0; c < experts.size(); ++c) {
    EXPECT_EQ(routing.chosen.expert[c], Index(experts.data()[c])) << "choice " << c;
    EXPECT_NEAR(routing.chosen.gate[c], gates.data()[c], 2e-6f * gates.data()[c]) << "choice " << c;
  }
  Layer::Cache cache;
  const Matrix<float> y = layer.forward(x, routing, cache);
  double largest = relative_error(y, golden.matrix<float>("golden.y"));
  EXPECT_LT(largest, 1e-5);
  largest = std::max(
      largest,
      expect_equal_gradients(golden, layer, load_gradients<Layer>(model, golden, "phimoe_train"), cache));
  std::printf("phimoe_train: largest relative error %.1e\n", largest);
}

// Hugging Face's loss counts the choices that probabilities would make without the bias.
TEST(Golden, Ernie45Moe) {
  expect_equal_to_golden(
      moe::ernie_4_5_21b_a3b, "ernie4_5_moe", {},
      [](const auto& layer, const auto& x, const auto& routing, const auto& info) {
        auto unbiased = layer.router();
        unbiased.selection_bias.setZero();
        moe::Routing<float> chosen;
        unbiased.route(x, info, chosen);
        return 4 * double(moe::load_balancing_loss(routing, moe::demand_per_expert(chosen), x.rows()).value);
      });
}

// Seats and loss are those of a sequence.
const moe::BatchInfo kTwoSequences{.group_begin = moe::IndexVector{{0, 6, 12}}};
constexpr auto kOfSequences = [](const auto&, const auto&, const auto& routing, const auto& info) {
  return double(moe::sequence_balance_loss(routing, info).value);
};

TEST(Golden, SwitchTransformers) {  // 64 seats a sequence there
  expect_equal_to_golden(moe::switch_base_8, "switch_transformers", {.info = kTwoSequences, .capacity = 8.0},
                         kOfSequences);
}
TEST(Golden, SwitchTransformersWithDrops) {  // 2 seats
  expect_equal_to_golden(moe::switch_base_8, "switch_transformers_drop",
                         {.info = kTwoSequences, .capacity = 2.5}, kOfSequences);
}

constexpr auto kOfFirstChoices = [](const auto&, const auto& x, const auto& routing, const auto&) {
  return double(moe::load_balancing_loss(routing, moe::demand_per_expert(routing, 1), x.rows()).value);
};

TEST(Golden, NllbMoe) {
  expect_equal_to_golden(moe::nllb_moe_54b, "nllb_moe", {.gate_factor = 0.8}, kOfFirstChoices);
}
TEST(Golden, NllbMoeWithDrops) {  // 3 seats
  expect_equal_to_golden(moe::nllb_moe_54b, "nllb_moe_drop", {.gate_factor = 0.8, .capacity = 1.0},
                         kOfFirstChoices);
}

// The authors' own code.

TEST(GoldenOfAuthors, Mixtral) { expect_equal_to_golden(moe::mixtral_8x7b, "authors_mixtral"); }
TEST(GoldenOfAuthors, DeepSeekV3) { expect_equal_to_golden(moe::deepseek_v3, "authors_deepseek_v3"); }
TEST(GoldenOfAuthors, GptOss) { expect_equal_to_golden(moe::gpt_oss_20b, "authors_gpt_oss"); }
TEST(GoldenOfAuthors, Dbrx) { expect_equal_to_golden(moe::dbrx, "authors_dbrx"); }

TEST(GoldenOfAuthors, Grok1) {  // under the names of the authors' parameters
  auto model = moe::grok_1;
  const moe::TensorPart all = moe::TensorPart::all;
  model.tensors = {.prefix = "transformer/decoder_layer_{layer}/",
                   .w_router = {"transformer/decoder_layer_{layer}/router/w", all, true},
                   .experts = {.w_gate = {"transformer/decoder_layer_{layer}/moe/linear/w", all, true},
                               .w_up = {"transformer/decoder_layer_{layer}/moe/linear_v/w", all, true},
                               .w_down = {"transformer/decoder_layer_{layer}/moe/linear_1/w", all, true}}};
  expect_equal_to_golden(model, "authors_grok_1");
}

// Experts with three factors. In training: both losses, and 4 seats by the model's own rule, 3.75 rounded
// down to an even number of at least 4.
TEST(GoldenOfAuthors, OpenMoe) {
  EXPECT_EQ(moe::expert_capacity(12, 8, 2, *moe::openmoe_8b_32e.router.training_capacity,
                                 moe::openmoe_8b_32e.router.capacity_rule),
            Golden("authors_openmoe").number("expert_capacity"));
  expect_equal_to_golden(moe::openmoe_8b_32e, "authors_openmoe",
                         {.training = true, .added_loss = [](const auto& routing, const auto&) {
                            auto loss = moe::router_z_loss(routing);
                            loss.gradient += 2.0f * moe::load_balancing_loss(routing).gradient;
                            return loss;
                          }});
}

// Experts without computation beside ordinary ones.
TEST(GoldenOfAuthors, MoePlusPlus) {
  using Gated = moe::GatedFeedForward<float>;
  using Constant = moe::ConstantExpert<float>;
  using Copy = moe::CopyExpert<float>;
  using Zero = moe::ZeroExpert<float>;
  using AnyKind = moe::VariantExpert<Gated, Constant, Copy, Zero>;
  const Golden golden("authors_moe_plus_plus");
  const Index d_model = golden.number("d_model"), d_ff = golden.number("d_ff");
  const auto read = [&](const std::string& prefix) {
    std::vector<AnyKind> experts;
    for (const auto& kind : golden.config.at("experts")) {
      const std::string expert = prefix + "moe.experts.experts." + std::to_string(experts.size()) + ".";
      if (kind == "feed_forward") {
        Gated gated({.d_model = d_model, .d_ff = d_ff});
        const Matrix<float> both = golden.matrix<float>(expert + "up_proj.weight");
        gated.w_gate = both.topRows(d_ff);
        gated.w_up = both.bottomRows(d_ff);
        gated.w_down = golden.matrix<float>(expert + "down_proj.weight");
        experts.emplace_back(gated);
      } else if (kind == "constant") {
        Constant constant({.d_model = d_model});
        constant.w_c = golden.matrix<float>(expert + "wg.weight");
        constant.v = golden.matrix<float>(expert + "constant").col(0);
        experts.emplace_back(constant);
      } else if (kind == "copy") {
        experts.emplace_back(Copy({.d_model = d_model}));
      } else {
        experts.emplace_back(Zero({.d_model = d_model}));
      }
    }
    moe::TopKRouter<float> router({.d_model = d_model,
                                   .num_experts = golden.number("num_experts"),
                                   .top_k = golden.number("top_k"),
                                   .renormalise = true});
    router.w_router = golden.matrix<float>(prefix + "moe.gate.wg.weight");
    return moe::MoELayer<AnyKind, moe::TopKRouter<float>>(std::move(experts), std::move(router));
  };
  const std::string prefix = golden.config.at("tensor_prefix").get<std::string>();
  expect_equal_layer(golden, "authors_moe_plus_plus", read(prefix), read("golden.grad." + prefix));
}

// In training, with their balance loss of each sequence, or of the batch.
TEST(GoldenOfAuthors, DeepSeekV2) {
  expect_equal_to_golden(
      moe::deepseek_v2, "authors_deepseek_v2",
      {.info = kTwoSequences,
       .added_loss = [](const auto& routing,
                        const auto& info) { return moe::sequence_balance_loss(routing, info); }},
      kOfSequences);
}
TEST(GoldenOfAuthors, DeepSeekMoe) {
  expect_equal_to_golden(
      moe::deepseek_moe_16b, "authors_deepseek_v2_lite",
      {.added_loss = [](const auto& routing, const auto&) { return moe::load_balancing_loss(routing); }},
      [](const auto&, const auto&, const auto& routing, const auto&) {
        return double(moe::load_balancing_loss(routing).value);
      });
}

// In training, with their balance loss, which has a tenth of the z-loss in it.
TEST(GoldenOfAuthors, JetMoe) {
  const auto both = [](const auto& routing) {
    auto loss = moe::load_balancing_loss(routing);
    const auto z = moe::router_z_loss(routing);
    loss.value += 0.1f * z.value;
    loss.gradient += 0.1f * z.gradient;
    return loss;
  };
  expect_equal_to_golden(moe::jetmoe_8b, "authors_jetmoe",
                         {.added_loss = [&](const auto& routing, const auto&) { return both(routing); }},
                         [&](const auto&, const auto&, const auto& routing, const auto&) {
                           return double(both(routing).value);
                         });
}

TEST(GoldenOfAuthors, NllbMoe) {
  expect_equal_to_golden(moe::nllb_moe_54b, "authors_nllb_moe", {.gate_factor = 0.8}, kOfFirstChoices);
}
TEST(GoldenOfAuthors, NllbMoeWithDrops) {  // 3 seats
  expect_equal_to_golden(moe::nllb_moe_54b, "authors_nllb_moe_drop", {.gate_factor = 0.8, .capacity = 1.0},
                         kOfFirstChoices);
}
TEST(GoldenOfAuthors, NllbMoeWithPriority) {  // 3 seats
  auto model = moe::nllb_moe_54b;
  model.router.priority = moe::Priority::token_max_prob;
  expect_equal_to_golden(model, "authors_nllb_moe_priority", {.gate_factor = 0.8, .capacity = 1.0},
                         kOfFirstChoices);
}

// Meta's code cuts the routed experts' inputs off from x and from the router. The gradients by
// their weights are those of the layer; the others are those of a layer whose routed experts have
// no way back to their inputs.
TEST(GoldenOfAuthors, Llama4) {
  const Golden golden("authors_llama4");
  const auto model = sized(moe::llama4_scout, golden);
  const auto layer = moe::load_layer<float>(model, golden.file, golden.number("layer"));
  using Layer = std::remove_const_t<decltype(layer)>;
  const Matrix<float> x = golden.matrix<float>("golden.x"), d_y = golden.matrix<float>("golden.d_y");
  Layer::Cache cache;
  double largest = 0;
  const auto expect_close = [&](const auto& seen, const auto& expected, std::string_view what) {
    const double error = relative_error(seen, expected);
    EXPECT_LT(error, 1e-5) << what;
    largest = std::max(largest, error);
  };
  expect_close(layer.forward(x, cache), golden.matrix<float>("golden.y"), "y");
  expect_close(cache.routing.router_logits, golden.matrix<float>("golden.router_logits"), "logits");
  const auto experts = golden.matrix<std::int64_t>("golden.experts");
  const auto gates = golden.matrix<float>("golden.gates");
  for (Index t = 0; t < x.rows(); ++t) {
    const auto seen = moe::trace(cache.routing, t);
    ASSERT_EQ(Index(seen.size()), 1);
    EXPECT_EQ(seen[0].expert, Index(experts(t, 0)));
    EXPECT_NEAR(double(seen[0].gate), double(gates(t, 0)), 2e-6 * double(gates(t, 0)));
  }

  const Layer expected = load_gradients<Layer>(model, golden, "authors_llama4");
  Layer grad = moe::zeros_like(layer), cut_grad = moe::zeros_like(layer), cut = layer;
  layer.backward(d_y, cache, grad);
  for (Index e = 0; e < layer.num_experts(); ++e) cut.experts()[std::size_t(e)].w_down.setZero();
  Layer::Cache cut_cache;
  cut.forward(x, cut_cache);
  expect_close(cut.backward(d_y, cut_cache, cut_grad), golden.matrix<float>("golden.d_x"), "d_x");
  Layer::visit(
      [&](const moe::ParameterInfo& info, const auto& full, const auto& without, const auto& from_file) {
        const bool routed = info.name.str().starts_with("experts");
        const auto& seen = routed ? full : without;
        if (all_zero(from_file))
          EXPECT_TRUE(all_zero(seen)) << info.name;
        else
          expect_close(seen, from_file, info.name.str());
      },
      grad, cut_grad, expected);
  EXPECT_TRUE(all_zero(expected.router().w_router));
  std::printf("authors_llama4: largest relative error %.1e\n", largest);
}

// A file that differs in one bit is another file: generate.py makes these, here and for authors_test.cpp.
TEST(Golden, FilesAreThoseThatWereGenerated) {
  const std::map<std::string, std::uint64_t> files = {
      {"authors_capacities", 0x63d8e7c14ab1c24du},
      {"authors_dbrx", 0x3559f2f6321c0e01u},
      {"authors_deepseek_v2", 0x1001cc5461f51f0fu},
      {"authors_deepseek_v2_lite", 0x1190fce395159433u},
      {"authors_deepseek_v3", 0xa0942d311dfb3c8au},
      {"authors_dynamic_moe", 0x8770226c6546ac2fu},
      {"authors_flaxformer_expert_choice", 0x1a6107cb8f20ccebu},
      {"authors_flaxformer_layer_experts_choose", 0xa171e285eb9cb2bau},
      {"authors_flaxformer_layer_switch_c", 0x9a1fc5c7a4f171d8u},
      {"authors_flaxformer_layer_switch_xxl", 0x6daa9cb89b36ccaau},
      {"authors_flaxformer_switch", 0xe26c08d72b19861fu},
      {"authors_flaxformer_top2", 0x1bebec0163258bf8u},
      {"authors_flaxformer_top2_prioritised", 0xddd1843109c5a878u},
      {"authors_gpt_oss", 0xe72a1830e4ec8235u},
      {"authors_grok_1", 0xfbb436b0ee88e3e3u},
      {"authors_hash_layer", 0x181f0a4b76ad35e7u},
      {"authors_jetmoe", 0xaeb368b6451afd5fu},
      {"authors_lingvo_after", 0xc264e370d57808b9u},
      {"authors_lingvo_all", 0x1cdaf3c758a0581fu},
      {"authors_lingvo_all_masked", 0x350c6b75d82bc9edu},
      {"authors_lingvo_layer", 0xffe85588dbcbf066u},
      {"authors_lingvo_random", 0xe2fba79025cdae1du},
      {"authors_llama4", 0xc8548f46a566d2e8u},
      {"authors_megatron_groups_sigmoid", 0x229012297acb741cu},
      {"authors_megatron_groups_softmax", 0xdb30cfd4a88d5ab7u},
      {"authors_megatron_pre_softmax", 0x231ae8fb8fae52c4u},
      {"authors_megatron_sinkhorn", 0x7b41be14b37d0262u},
      {"authors_megatron_sinkhorn_top2", 0x2bb5c521b9be3f62u},
      {"authors_megatron_softmax", 0x00f2e676dd744812u},
      {"authors_megatron_sqrtsoftplus", 0x777f774fea841ef6u},
      {"authors_mesh_layer_random", 0x7fc6c4c26d49572du},
      {"authors_mesh_layer_switch", 0xf43bb2b614ce6e7bu},
      {"authors_mesh_threshold", 0x3fae062ae725b844u},
      {"authors_mixtral", 0x9a36606f37790ea4u},
      {"authors_moe_plus_plus", 0x648c441d0ea23cc4u},
      {"authors_nllb_moe", 0x5c46dd152aafdd9au},
      {"authors_nllb_moe_drop", 0x195f50273ea80b03u},
      {"authors_nllb_moe_priority", 0x2fadec45b3dcefadu},
      {"authors_openmoe", 0xefb64237ad2cde17u},
      {"authors_remoe", 0x84bba010b2fa8b09u},
      {"authors_soft_moe", 0xcc1055539a753171u},
      {"authors_soft_moe_few_tokens", 0xaf72cb1d5d6e965eu},
      {"authors_tensor2tensor_eval", 0x74053559fe17f160u},
      {"authors_tensor2tensor_layer", 0xc5706a4d79cf0a9fu},
      {"authors_tensor2tensor_top2", 0x238a0112c213def7u},
      {"authors_tensor2tensor_top4", 0x5153ff33e1e005d5u},
      {"authors_tutel", 0x3638f32e748aa909u},
      {"authors_tutel_prioritised", 0xe35cf8fa41f30896u},
      {"authors_vmoe", 0x1ade33345e957660u},
      {"authors_vmoe_expert_choice", 0x57e02375245f4cd9u},
      {"authors_vmoe_prioritised", 0xb914c821194588f1u},
      {"dbrx", 0x9173f1ac8c3a3850u},
      {"deepseek_v2", 0x47a6f8ca665724aeu},
      {"deepseek_v2_lite", 0x6d5fae8e6469b725u},
      {"deepseek_v3", 0xfb74df4d6979a398u},
      {"ernie4_5_moe", 0xe53f7ab237eb8e4au},
      {"glm4_moe", 0x5595c452cad016a8u},
      {"gpt_oss", 0x3dfbd9503d336237u},
      {"granitemoe", 0x4f88203dd2d8d8c5u},
      {"gguf_layer", 0xd4c882897b709dc7u},
      {"gguf_split-00001-of-00003", 0x2d16f13a1e348c4bu},
      {"gguf_split-00002-of-00003", 0x99ec3a7e7894615cu},
      {"gguf_split-00003-of-00003", 0xf2b37c88b89d6603u},
      {"gguf_types", 0x678000096027b65eu},
      {"jetmoe", 0x4275b06862408a65u},
      {"llama4", 0x46dabe076ac1742du},
      {"mixtral", 0x70c988a5ea5b554bu},
      {"nllb_moe", 0x37147740c3aba905u},
      {"nllb_moe_drop", 0xb1cff6d62a418f84u},
      {"olmoe", 0x34ee3ea6d539f365u},
      {"phimoe", 0x82cdcd7b7329a472u},
      {"phimoe_train", 0x4aefafb4acd651eeu},
      {"quantised", 0x9920da76fbf69fbau},
      {"qwen2_moe", 0x5d00097731601799u},
      {"qwen3_moe", 0xcd5369e9fcc38614u},
      {"switch_transformers", 0xfc6b6108cf993db4u},
      {"switch_transformers_drop", 0x7649e1031f80173bu},
  };
  std::uintmax_t bytes = 0;
  std::size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(MOE_GOLDEN_DIR)) {
    const std::string name = entry.path().stem().string();
    EXPECT_EQ(entry.path().extension(), name.starts_with("gguf_") ? ".gguf" : ".safetensors") << name;
    const auto known = files.find(name);
    ++count;
    bytes += entry.file_size();
    if (known == files.end())
      ADD_FAILURE() << "no hash of " << entry.path().filename();
    else
      EXPECT_EQ(hash_of_golden(entry.path()), known->second) << name;
  }
  EXPECT_EQ(count, files.size());
  EXPECT_LE(bytes, 4'000'000u) << "all golden files together";
}

}  // namespace
