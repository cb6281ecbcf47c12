// SPDX-License-Identifier: MIT
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/parameters.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/routers/expert_choice_router.hpp>
#include <moe/routers/noisy_top_k_router.hpp>
#include <moe/routers/top_k_router.hpp>

namespace parameters_test {
namespace {

using moe::Index;
using moe::Kind;
using moe::Matrix;
using moe::ParameterInfo;
using Gated = moe::GatedFeedForward<double>;
using Plain = moe::FeedForward<double>;
using TopK = moe::TopKRouter<double>;
using Layer = moe::MoELayer<Gated, TopK>;

template <class Thing>
std::vector<std::string> names_of(const Thing& thing) {
  std::vector<std::string> names;
  Thing::visit([&](const ParameterInfo& info, const auto&) { names.emplace_back(info.name); }, thing);
  return names;
}

Layer make_layer(Index experts = 2, Index d_ff = 5, bool bias = true, bool gated = true,
                 bool output_bias = true, bool router_bias = true) {
  moe::Rng rng(1);
  const Gated::Options options{.d_model = 4, .d_ff = d_ff, .bias = bias};
  return Layer(moe::make_experts<Gated>(experts, options, rng),
               TopK({.d_model = 4, .num_experts = experts, .bias = router_bias}, rng),
               {.experts = moe::make_experts<Gated>(1, options, rng), .gated = gated}, output_bias);
}

// A thing with an array of every kind.
struct Kinds {
  Matrix<float> weight = Matrix<float>::Constant(2, 3, 4);
  moe::IndexVector table = moe::IndexVector::Constant(5, 7);
  Matrix<float> constant = Matrix<float>::Constant(1, 2, 8);
  int configuration = 42;
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"weight"}, self.weight...);
    moe::visit_array(f, {"table", Kind::buffer}, self.table...);
    moe::visit_array(f, {"constant", Kind::frozen}, self.constant...);
  }
};

TEST(Parameters, NamesAreDotted) {
  EXPECT_EQ(names_of(make_layer()),
            (std::vector<std::string>{"router.w_router",         "router.b_router",  //
                                      "experts.0.w_gate",        "experts.0.w_up",
                                      "experts.0.w_down",  //
                                      "experts.0.b_gate",        "experts.0.b_up",
                                      "experts.0.b_down",  //
                                      "experts.1.w_gate",        "experts.1.w_up",
                                      "experts.1.w_down",  //
                                      "experts.1.b_gate",        "experts.1.b_up",
                                      "experts.1.b_down",                                    //
                                      "shared_experts.0.w_gate", "shared_experts.0.w_up",    //
                                      "shared_experts.0.w_down", "shared_experts.0.b_gate",  //
                                      "shared_experts.0.b_up",   "shared_experts.0.b_down",  //
                                      "w_shared_gate",           "b_output"}));
}

TEST(Parameters, WhatIsNotThereIsNotVisited) {
  moe::Rng rng(1);
  EXPECT_EQ(names_of(Plain({.d_model = 2, .d_ff = 3}, rng)), (std::vector<std::string>{"w_up", "w_down"}));
  EXPECT_EQ(names_of(TopK({.d_model = 2, .num_experts = 3}, rng)), (std::vector<std::string>{"w_router"}));
  EXPECT_EQ(names_of(moe::NoisyTopKRouter<double>({.d_model = 2, .num_experts = 3}, rng)),
            (std::vector<std::string>{"w_router", "w_noise"}));
  EXPECT_EQ(names_of(moe::ExpertChoiceRouter<double>({.d_model = 2, .num_experts = 3}, rng)),
            (std::vector<std::string>{"w_router"}));
  const Layer bare(moe::make_experts<Gated>(1, {.d_model = 2, .d_ff = 3}, rng),
                   TopK({.d_model = 2, .num_experts = 1, .top_k = 1}, rng));
  EXPECT_EQ(names_of(bare), (std::vector<std::string>{"router.w_router", "experts.0.w_gate", "experts.0.w_up",
                                                      "experts.0.w_down"}));
}

TEST(Parameters, APartWithoutANameKeepsItsNames) {
  Kinds kinds;
  std::vector<std::string> names;
  const auto collect = [&](const ParameterInfo& info, auto&) { names.emplace_back(info.name); };
  moe::visit_part("", collect, kinds);
  moe::visit_part("a.b", collect, kinds);
  EXPECT_EQ(names, (std::vector<std::string>{"weight", "table", "constant", "a.b.weight", "a.b.table",
                                             "a.b.constant"}));
}

TEST(Parameters, AreTheArraysOfTheLayerItself) {
  Layer layer = make_layer();
  std::map<std::string, const double*> at;
  Layer::visit([&](const ParameterInfo& info, auto& p) { at[std::string(info.name)] = p.data(); }, layer);
  EXPECT_EQ(at.at("router.w_router"), layer.router().w_router.data());
  EXPECT_EQ(at.at("experts.1.w_down"), layer.experts()[1].w_down.data());
  EXPECT_EQ(at.at("shared_experts.0.b_up"), layer.shared_experts()[0].b_up.data());
  EXPECT_EQ(at.at("b_output"), layer.b_output.data());
}

TEST(Parameters, LayersAreVisitedInLockstep) {
  Layer layer = make_layer();
  const Layer before = layer;
  Layer grad = moe::zeros_like(layer), momentum = moe::zeros_like(layer);
  Layer::visit([](const ParameterInfo&, auto& g) { g.setConstant(2); }, grad);
  for (int step = 0; step < 2; ++step) {
    Layer::visit(
        [&](const ParameterInfo& info, auto& p, auto& g, auto& m) {
          if (info.kind == Kind::parameter) {
            m = 0.5 * m + g;
            p -= 0.125 * m;
          }
        },
        layer, grad, momentum);
  }
  // m is 2 and then 3: every parameter has gone down by 5 / 8.
  Layer::visit([](const ParameterInfo& info, const auto& p,
                  const auto& was) { EXPECT_TRUE((was - p).isApproxToConstant(0.625, 1e-12)) << info.name; },
               layer, before);
}

TEST(Parameters, LockstepRefusesThingsOfOtherShapes) {
  const auto visit = [](auto a, auto b) {
    decltype(a)::visit([](const ParameterInfo&, auto&, auto&) {}, a, b);
  };
  visit(make_layer(), make_layer());
  EXPECT_THROW(visit(make_layer(), make_layer(3)), std::invalid_argument);
  EXPECT_THROW(visit(make_layer(), make_layer(2, 6)), std::invalid_argument);
  EXPECT_THROW(visit(make_layer(), make_layer(2, 5, false)), std::invalid_argument);
  EXPECT_THROW(visit(make_layer(2, 5, false), make_layer()), std::invalid_argument);
  EXPECT_THROW(visit(make_layer(), make_layer(2, 5, true, false)), std::invalid_argument);
  EXPECT_THROW(visit(make_layer(2, 5, true, false), make_layer()), std::invalid_argument);
  EXPECT_THROW(visit(make_layer(), make_layer(2, 5, true, true, false)), std::invalid_argument);
  EXPECT_THROW(visit(make_layer(2, 5, true, true, false), make_layer()), std::invalid_argument);
  EXPECT_THROW(visit(make_layer(), make_layer(2, 5, true, true, true, false)), std::invalid_argument);
  EXPECT_THROW(visit(make_layer(2, 5, true, true, true, false), make_layer()), std::invalid_argument);
  Kinds other;
  other.constant.resize(1, 3);
  EXPECT_THROW(visit(Kinds{}, other), std::invalid_argument);
  other = {};
  other.table.resize(2);
  visit(Kinds{}, other);  // the gradient's buffers are empty
}

TEST(Parameters, ZerosLikeKeepsConfigurationZeroesParametersAndEmptiesBuffers) {
  const Kinds kinds;
  const Kinds zeros = moe::zeros_like(kinds);
  EXPECT_EQ(zeros.weight, Matrix<float>::Zero(2, 3));
  EXPECT_EQ(zeros.table.size(), 0);
  EXPECT_EQ(zeros.constant, Matrix<float>::Zero(1, 2));
  EXPECT_EQ(zeros.configuration, 42);
  EXPECT_EQ(kinds.weight(0, 0), 4);  // the original is untouched

  moe::Rng rng(2);
  const TopK router({.d_model = 3, .num_experts = 4, .top_k = 3, .jitter = 0.25}, rng);
  const TopK grad = moe::zeros_like(router);
  EXPECT_EQ(grad.options().top_k, 3);
  EXPECT_EQ(grad.options().jitter, 0.25);
  EXPECT_EQ(grad.w_router, Matrix<double>::Zero(4, 3));
  const moe::GatedFeedForward<float, moe::ClampedSwiGLU> clamped(
      {.d_model = 2, .d_ff = 2, .glu = {.limit = 3}}, rng);
  EXPECT_EQ(moe::zeros_like(clamped).glu().limit, 3);
}

TEST(Parameters, SetZeroLeavesBuffersAlone) {
  Kinds kinds;
  moe::set_zero(kinds);
  EXPECT_EQ(kinds.weight, Matrix<float>::Zero(2, 3));
  EXPECT_EQ(kinds.table, moe::IndexVector::Constant(5, 7));
  Layer layer = make_layer();
  moe::set_zero(layer);
  Layer::visit([](const ParameterInfo&, const auto& p) { EXPECT_TRUE((p.array() == 0).all()); }, layer);
}

TEST(Parameters, AreCountedByHand) {
  moe::Rng rng(3);
  EXPECT_EQ(moe::num_parameters(Kinds{}), 6);  // neither the buffer nor what is frozen
  EXPECT_EQ(moe::num_parameters(Plain({.d_model = 3, .d_ff = 7, .bias = true}, rng)), 2 * 21 + 7 + 3);
  // router 2 * 4 + 2, three experts of 3 * 20 + 5 + 5 + 4, shared gate 4, output bias 4
  EXPECT_EQ(moe::num_parameters(make_layer()), 10 + 3 * 74 + 4 + 4);
  // Mixtral 8x7B, one layer: 8 experts of 3 * 4096 * 14336 and a router of 8 * 4096, by shapes in
  // the proportion 1 : 64.
  const moe::MoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>> small_mixtral(
      moe::make_experts<moe::GatedFeedForward<float>>(8, {.d_model = 64, .d_ff = 224}, rng),
      moe::TopKRouter<float>({.d_model = 64, .num_experts = 8}, rng));
  EXPECT_EQ(moe::num_parameters(small_mixtral), 8 * 3 * 64 * 224 + 8 * 64);
}

TEST(Parameters, AVariantExpertShowsThoseOfItsKind) {
  moe::Rng rng(4);
  using Either = moe::VariantExpert<Plain, Gated>;
  const Either plain = Plain({.d_model = 2, .d_ff = 3}, rng), gated = Gated({.d_model = 2, .d_ff = 3}, rng);
  EXPECT_EQ(names_of(plain), (std::vector<std::string>{"w_up", "w_down"}));
  EXPECT_EQ(names_of(gated), (std::vector<std::string>{"w_gate", "w_up", "w_down"}));
  EXPECT_EQ(moe::num_parameters(plain), 12);
  EXPECT_EQ(moe::num_parameters(gated), 18);
}

// A model of one's own.
struct Model {
  Matrix<double> embedding = Matrix<double>::Constant(3, 4, 5);
  std::vector<Layer> layers{make_layer(), make_layer(3)};
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"embedding"}, self.embedding...);
    moe::visit_parts("layers", f, self.layers...);
  }
};

TEST(Parameters, AModelOfSeveralLayersIsOneThing) {
  const Model model;
  std::vector<std::string> names{"embedding"};
  for (const std::string layer : {"layers.0.", "layers.1."})
    for (const std::string& name : names_of(model.layers[std::size_t(layer[7] - '0')]))
      names.push_back(layer + name);
  EXPECT_EQ(names_of(model), names);
  EXPECT_EQ(names.back(), "layers.1.b_output");
  EXPECT_EQ(moe::num_parameters(model),
            12 + moe::num_parameters(model.layers[0]) + moe::num_parameters(model.layers[1]));

  const auto is_zero = [](const Model& m) {
    bool zero = true;
    Model::visit([&](auto& info, auto& p) { zero &= info.kind == Kind::buffer || p.isZero(0); }, m);
    return zero;
  };
  Model copy = model, zeros = moe::zeros_like(model);
  EXPECT_FALSE(is_zero(model));
  EXPECT_TRUE(is_zero(zeros));
  EXPECT_EQ(zeros.layers[1].num_experts(), 3);
  moe::set_zero(copy);
  EXPECT_TRUE(is_zero(copy));
  copy.layers.pop_back();
  EXPECT_THROW(Model::visit([](auto&...) {}, model, copy), std::invalid_argument);
  EXPECT_THROW(Model::visit([](auto&...) {}, copy, model), std::invalid_argument);
  copy.layers.push_back(make_layer(4));
  EXPECT_THROW(Model::visit([](auto&...) {}, model, copy), std::invalid_argument);
}

// Whatever takes a const ParameterInfo and the arrays, const where their objects are, is an f.
TEST(Parameters, AreVisitedByLambdasOfEveryForm) {
  const Model model;
  Model changed = model;
  const Index arrays = Index(names_of(model).size());
  Index count = 0;
  Model::visit(
      [&](auto& info, auto& p, auto& q) {
        static_assert(std::is_same_v<decltype(info), const ParameterInfo&>);
        static_assert(std::is_const_v<std::remove_reference_t<decltype(q)>>);
        p += 2 * q;
        ++count;
      },
      changed, model);
  Model::visit(
      [&](auto&& info, auto& p, auto& q) {
        EXPECT_EQ(q, 3 * p) << info.name;
        ++count;
      },
      model, changed);
  Model::visit([n = Index(0), &count](ParameterInfo, auto&&...) mutable { count += ++n > 0; }, changed, model,
               model);
  const auto any = [&](auto&...) { ++count; };
  Model::visit(any, model);
  Model::visit(any, changed);
  EXPECT_EQ(count, 5 * arrays);

  moe::Rng rng(5);
  using Either = moe::VariantExpert<Plain, Gated>;
  const Either expert = Plain({.d_model = 2, .d_ff = 3}, rng);
  Either twice = expert;
  Either::visit([](auto&, auto& p, auto& q) { p += q; }, twice, expert);
  EXPECT_EQ(std::get<Plain>(twice.get()).w_up, 2 * std::get<Plain>(expert.get()).w_up);
}

TEST(Name, IsWrittenOutFromItsParts) {
  const moe::Name experts("experts", 3), weight("w_up"), empty("");
  EXPECT_EQ(experts.str(), "experts.3");
  const moe::Name of_expert(experts, weight), layer("layer"), of_layer(layer, of_expert);
  EXPECT_EQ(of_expert.str(), "experts.3.w_up");
  EXPECT_EQ(of_layer.str(), "layer.experts.3.w_up");
  EXPECT_EQ(moe::Name(of_layer, weight).str(), "layer.experts.3.w_up.w_up");
  EXPECT_EQ(moe::Name(empty, weight).str(), "w_up");
  EXPECT_EQ(moe::Name(experts, empty).str(), "experts.3");
  EXPECT_EQ(std::string(of_expert), "experts.3.w_up");
  EXPECT_TRUE(of_expert == "experts.3.w_up");
  static_assert(!std::is_constructible_v<moe::Name, moe::Name, const moe::Name&>);  // would be gone
}

}  // namespace
}  // namespace parameters_test
