// SPDX-License-Identifier: MIT
#include <cmath>
#include <set>
#include <string>
#include <type_traits>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

// Every model by name: its numbers, and a small layer of it forward and backward.
namespace {

using moe::Index;
using moe::Matrix;
using moe::Rng;

// The model in a size for tests: 8 experts, groups of two.
template <class M>
M small(const M& model) {
  M m = model.scaled_to(6, 5, 8);
  if constexpr (requires { m.router.group_limit; })
    if (m.router.group_limit.applies()) {
      m.router.group_limit = {.groups = 4, .kept = 3, .score = model.router.group_limit.score};
      m.router.top_k = 4;
    }
  return m;
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

TEST(Models, CountsAreThoseOfTheLayer) {
  moe::for_each_model([](const auto& model) {
    const auto m = small(model);
    Rng rng(1);
    const auto layer = moe::make_layer<double>(m, rng);
    Index router = 0;  // some routers have more than a weight and a bias
    if constexpr (requires { layer.router().w_noise; }) router = layer.router().w_noise.size();
    EXPECT_EQ(moe::num_parameters(layer), m.layer_parameters() + router) << m.name;
    EXPECT_EQ(moe::num_parameters(moe::make_empty_layer<double>(m)), moe::num_parameters(layer));
  });
}

// Published totals within 1%, where the parts around the layers are in the aggregate; Llama 4 Scout's
// includes an image encoder, GLaM's is rounded to two digits.
TEST(Models, TotalsAreThosePublished) {
  moe::for_each_model([](const auto& model) {
    if (model.around.layers == 0 || model.source == moe::openmoe_8b_32e.source) return;
    const double difference = double(model.total_parameters()) / model.published.total - 1;
    const double limit = model.name == moe::llama4_scout.name    ? 0.012
                         : model.name == moe::glam_64b_64e.name ? 0.033
                                                                 : 0.01;
    EXPECT_LT(std::abs(difference), limit) << model.name;
  });
}

// OpenMoE's authors count a feed-forward as three matrices and embeddings once, where their code has gates of
// twice the width and an output embedding.
TEST(Models, OpenMoEHasMoreParametersThanItsAuthorsCount) {
  for (const auto& model : {moe::openmoe_8b_32e, moe::openmoe_34b_32e}) {
    const Index matrix = model.d_model() * model.d_ff, layers = model.around.layers;
    const Index experts = model.around.moe_layers * model.num_experts();
    const Index counted = model.total_parameters() - (layers + experts) * matrix -
                          model.around.vocabulary * model.d_model();
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
    EXPECT_TRUE(layer.backward(y, cache, grad).allFinite());
    Layer::visit(
        [](const moe::ParameterInfo& info, const auto& g) { EXPECT_TRUE(g.allFinite()) << info.name; },
        grad);
  });
}

// Seats of an expert in a group of 4,096 tokens, by the authors' code: GShard and GLaM 2 * 4096 / E, 0 is
// 4, up to a multiple of 4; ST-MoE and Switch 1.25 * 4096 / E in training and 2 * 4096 / E in inference.
TEST(Models, GiveExpertsTheSeatsThatTheirAuthorsGive) {
  const auto seats = [](const auto& model, bool training, Index tokens = 4096) {
    const auto& o = model.router;
    return moe::expert_capacity(tokens, o.num_experts, o.top_k,
                                training ? *o.training_capacity : *o.capacity, o.capacity_rule);
  };
  EXPECT_EQ(seats(moe::gshard_600b, true), 4);
  EXPECT_EQ(seats(moe::gshard_600b, true, 1024), 4);   // 1, up to 4
  EXPECT_EQ(seats(moe::gshard_600b, true, 5120), 8);   // 5, up to 8
  EXPECT_EQ(seats(moe::glam_64b_64e, true), 128);
  EXPECT_EQ(seats(moe::glam_64b_64e, false), 128);
  EXPECT_EQ(seats(moe::st_moe_32b, true), 80);
  EXPECT_EQ(seats(moe::st_moe_32b, false), 128);
  EXPECT_EQ(seats(moe::st_moe_32b, true, 100), 4);     // 1.95
  EXPECT_EQ(seats(moe::switch_base_8, true), 640);
  EXPECT_EQ(seats(moe::switch_base_8, true, 100), 15);
  EXPECT_EQ(seats(moe::switch_base_8, false, 100), 25);
  EXPECT_EQ(seats(moe::switch_c, true), 2);
  EXPECT_EQ(seats(moe::switch_c, false), 4);
  EXPECT_EQ(seats(moe::vmoe_l16, true), 272);          // 268.8, up to 272
  EXPECT_EQ(seats(moe::openmoe_8b_32e, true, 100), 8);    // 7.8, and even
  EXPECT_EQ(seats(moe::openmoe_8b_32e, false, 100), 12);  // 12.5
  EXPECT_EQ(seats(moe::openmoe_8b_32e, true, 10), 4);
  const auto& choice = moe::expert_choice_8b_64e.router;
  EXPECT_EQ(moe::expert_capacity(4096, 64, 1, choice.capacity, choice.capacity_rule), 128);
  EXPECT_EQ(moe::expert_capacity(48, 64, 1, choice.capacity, choice.capacity_rule), 4);
}

// Soft MoE layers have no router, and models of their own.
TEST(SoftModels, HaveTheParametersThatArePublished) {
  moe::for_each_soft_model([](const auto& model) {
    EXPECT_NEAR(double(model.total_parameters()) / model.published.total, 1, 0.003) << model.name;
    const auto m = model.scaled_to(6, 5, 8);
    Rng rng(4);
    EXPECT_EQ(moe::num_parameters(moe::make_layer<double>(m, rng)), m.layer_parameters());
    EXPECT_EQ(moe::num_parameters(moe::make_empty_layer<double>(m)), m.layer_parameters());
  });
  EXPECT_EQ(moe::soft_moe_b16.layer_parameters(),
            128 * (2 * 768 * 3072 + 3072 + 768) + 128 * 768 + 1);
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
  EXPECT_THROW(moe::make_layer<float>(moe::soft_moe_b16.scaled_to(0, 5, 8), rng),
               std::invalid_argument);
}

TEST(Models, SizesThatDoNotFitAreRefused) {
  Rng rng(3);
  EXPECT_THROW(moe::make_layer<float>(moe::gpt_4_rumoured, rng), std::invalid_argument);
  EXPECT_THROW(moe::make_layer<float>(moe::deepseek_v3.scaled_to(8, 8, 12), rng),
               std::invalid_argument);  // 8 groups of 12 experts
  EXPECT_EQ(moe::deepseek_v3.scaled_to(8, 8, 4).router.top_k, 4);
}

}  // namespace
