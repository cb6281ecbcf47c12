// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io.hpp>
#include <moe/models/published/all.hpp>
#include <moe/moe.hpp>
#include <moe/routers/expert_choice_router.hpp>
#include <moe/routers/hash_router.hpp>
#include <moe/routers/noisy_top_k_router.hpp>
#include <moe/routers/sinkhorn_router.hpp>

#include "golden.hpp"

// Routers, losses and layers against values that their authors' own code computed: see
// golden/README.md and authors_routers.py.
namespace {

using moe::BatchInfo;
using moe::Index;
using moe::Matrix;
using moe::Priority;
using moe::Routing;
using moe::Score;

constexpr Index kDModel = 16, kNumExperts = 8;

// Values beside those of one file. Prints the largest relative error in the end.
struct Comparison {
  std::string name;
  Golden golden;
  moe::RoutingGradient<float> gradient{};
  double largest = 0;

  explicit Comparison(const std::string& file) : name("authors_" + file), golden(name) {}
  Comparison(const Comparison&) = delete;
  Comparison& operator=(const Comparison&) = delete;
  ~Comparison() { std::printf("%s: largest relative error %.1e\n", name.c_str(), largest); }

  Matrix<float> matrix(const std::string& tensor) const { return golden.matrix<float>(tensor); }

  template <class A, class B>
  void expect_close(const A& seen, const B& expected, const std::string& what) {
    if (all_zero(expected)) {
      EXPECT_TRUE(all_zero(seen)) << name << " " << what;
      return;
    }
    const double error = relative_error(seen, expected);
    EXPECT_LT(error, 1e-5) << name << " " << what;
    largest = std::max(largest, error);
  }

  // Which token goes to which expert, and each gate to 1e-5 of itself. Puts the gradient by the
  // gates.
  void expect_equal_plan(const Routing<float>& routing) {
    const auto dispatch = golden.matrix<std::int64_t>("dispatch");
    const Matrix<float> gates = matrix("gates");
    Matrix<float> d_gates = Matrix<float>::Zero(gates.rows(), gates.cols());
    if (golden.file.contains("d_gates")) d_gates = matrix("d_gates");
    const auto& plan = routing.plan;
    ASSERT_EQ(plan.num_tokens, gates.rows());
    ASSERT_EQ(plan.num_experts(), gates.cols());
    ASSERT_EQ(plan.num_assignments(), Index(dispatch.sum()));
    gradient.d_gate.resize(plan.num_assignments());
    for (Index e = 0; e < plan.num_experts(); ++e) {
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
        const Index t = plan.token[a];
        EXPECT_EQ(dispatch(t, e), 1) << name << " token " << t << " expert " << e;
        EXPECT_NEAR(plan.gate[a], gates(t, e), 1e-5f * gates(t, e)) << name << " token " << t;
        largest = std::max(largest, std::abs(double(plan.gate[a]) / double(gates(t, e)) - 1));
        gradient.d_gate[a] = d_gates(t, e);
      }
    }
    if (!golden.file.contains("experts")) return;
    const auto experts = golden.matrix<std::int64_t>("experts");
    for (Index t = 0; t < experts.rows(); ++t) {
      if (!routing.is_valid(t)) continue;
      const Index first = routing.chosen.token_begin[t];
      ASSERT_EQ(routing.chosen.token_begin[t + 1] - first, experts.cols()) << name;
      for (Index i = 0; i < experts.cols(); ++i)
        EXPECT_EQ(routing.chosen.expert[first + i], experts(t, i)) << name << " token " << t;
    }
  }

  // The authors' loss is `factor` times ours. Adds its gradient.
  void expect_equal_loss(const char* tensor, const moe::Loss<float>& loss, double factor = 1) {
    const double expected = double(matrix(tensor)(0, 0));
    EXPECT_NEAR(factor * double(loss.value), expected, 1e-6 * expected) << name << " " << tensor;
    gradient += float(factor) * loss.gradient;
  }

  // Gradients by x and by the router's parameters.
  template <class R>
  void expect_equal_gradients(const R& router, const Routing<float>& routing) {
    const Matrix<float> x = matrix("x");
    Matrix<float> d_x = Matrix<float>::Zero(x.rows(), x.cols());
    R grad = moe::zeros_like(router);
    router.backward(x, routing, gradient, d_x, grad);
    expect_close(d_x, matrix("d_x"), "d_x");
    expect_equal_parameters(grad);
  }

  template <class Part>
  void expect_equal_parameters(const Part& grad) {
    Part::visit(
        [&](const moe::ParameterInfo& info, const auto& d) {
          if (info.kind == moe::Kind::parameter)
            expect_close(d, matrix("d_" + std::string(info.name)), std::string(info.name));
        },
        grad);
  }

  // Gradients by all parameters of a layer of the model. They stand under a checkpoint's names after "d_".
  template <class M, class Layer>
  void expect_equal_layer_gradients(const M& model, const Layer& grad) {
    const Layer expected = moe::load_layer<float>(
        model, gradients_of(golden, "d_", testing::TempDir() + name + ".gradients.safetensors"),
        golden.number("layer"));
    Layer::visit([&](const moe::ParameterInfo& info, const auto& d,
                     const auto& from_file) { expect_close(d, from_file, std::string(info.name)); },
                 grad, expected);
  }

  // The expert's parameters, or with the prefix "d_" their gradients: rows of tensors of all
  // experts.
  template <class E>
  void read_expert(const std::string& prefix, Index expert, E& to) const {
    E::visit(
        [&](const moe::ParameterInfo& info, auto& array) {
          const Matrix<float> all = matrix(prefix + std::string(info.name));
          if constexpr (std::decay_t<decltype(array)>::ColsAtCompileTime == 1)
            array = all.row(expert).transpose();
          else
            array = all.middleRows(expert * array.rows(), array.rows());
        },
        to);
  }

  template <class E>
  std::vector<E> experts(Index count, const typename E::Options& options) const {
    std::vector<E> made{std::size_t(count), E(options)};
    for (Index e = 0; e < count; ++e) read_expert("", e, made[std::size_t(e)]);
    return made;
  }

  template <class Experts>
  void expect_equal_expert_gradients(const Experts& grad) {
    for (std::size_t e = 0; e < grad.size(); ++e) {
      auto expected = grad[e];
      read_expert("d_", Index(e), expected);
      std::decay_t<decltype(expected)>::visit(
          [&](const moe::ParameterInfo& info, const auto& d, const auto& from_file) {
            expect_close(d, from_file, "expert " + std::to_string(e) + " " + std::string(info.name));
          },
          grad[e], expected);
    }
  }
};

// A router of the file's size with the file's weights.
template <class R>
R make_router(const Comparison& file, typename R::Options options) {
  options.d_model = kDModel;
  options.num_experts = file.golden.file.at("w_router").shape.at(0);
  R router(options);
  R::visit([&](const moe::ParameterInfo& info, auto& array) { array = file.matrix(std::string(info.name)); },
           router);
  return router;
}

// A model's options with the seats that the authors' functions were given in a file, where they take a
// number of seats in place of a rule: `capacity` is the factor that gives it, rounded up.
template <class Options>
Options with_seats(Options options, double capacity) {
  options.capacity = capacity;
  options.capacity_rule = {};
  return options;
}

BatchInfo groups_of(Index groups, Index tokens) {
  BatchInfo info;
  info.group_begin.resize(groups + 1);
  for (Index g = 0; g <= groups; ++g) info.group_begin[g] = g * (tokens / groups);
  return info;
}

moe::Loss<float> loss_of_first_choices(const Routing<float>& routing) {
  return moe::load_balancing_loss(routing, moe::demand_per_expert(routing, 1),
                                  routing.plan.num_valid_tokens());
}

// Training under the file's noise in place of the router's own draws.
template <class R>
Routing<float> route_under_noise(const R& router, const moe::SeatingRule& rule, const Comparison& file) {
  moe::Rng rng(1);
  Routing<float> routing;
  router.route(file.matrix("x"), rng, {}, routing);
  auto& noise = routing.noise;
  noise.draws = file.matrix("noise");
  noise.noisy_logits = routing.router_logits + noise.draws.cwiseProduct(noise.stddev);
  moe::RouterWorkspace<float> workspace;
  moe::route_by_logits(rule, {}, {}, routing, workspace, moe::DefaultExecutor{});
  return routing;
}

// Training under the file's uniform numbers, which leave out some second choices.
Routing<float> route_under_draws(const moe::TopKRouter<float>& router, const Comparison& file) {
  const moe::TopKOptions& options = router.options();
  const Matrix<float> x = file.matrix("x"), uniform = file.matrix("uniform");
  const std::vector<double> draws(uniform.data(), uniform.data() + uniform.size());
  moe::RouterWorkspace<float> workspace;
  Routing<float> routing;
  router.route(x, {}, routing);  // for the logits
  moe::begin_routing(x.rows(), kNumExperts, {}, routing, "test", {.router_logits = true});
  moe::route_by_logits({.gate = {.renormalise = options.renormalise, .epsilon = options.renormalise_epsilon},
                        .top_k = options.top_k,
                        .second_threshold = options.random_second_threshold,
                        .capacity_factor = options.training_capacity,
                        .capacity_rule = options.capacity_rule},
                       {.second_draws = draws}, {}, routing, workspace, moe::DefaultExecutor{});
  Index left_out = 0;
  for (Index t = 0; t < x.rows(); ++t)
    left_out += options.top_k - (routing.chosen.token_begin[t + 1] - routing.chosen.token_begin[t]);
  EXPECT_GE(left_out, 4);
  return routing;
}

// A layer of the model, of the file's size and with the file's weights.
template <class M>
auto make_layer_of(const M& model, const Comparison& file) {
  const Index experts = file.golden.file.at("w_router").shape.at(0);
  auto layer = moe::make_empty_layer<float>(model.scaled_to(kDModel, file.golden.number("d_ff"), experts));
  using R = std::decay_t<decltype(layer.router())>;
  R::visit([&](const moe::ParameterInfo& info, auto& array) { array = file.matrix(std::string(info.name)); },
           layer.router());
  for (Index e = 0; e < experts; ++e) file.read_expert("", e, layer.experts()[std::size_t(e)]);
  return layer;
}

// The model as it trains, but for the jitter, which the authors' code was called without.
template <class M>
M without_jitter(M model) {
  model.router.jitter = 0;
  return model;
}

// Outputs and gradients; the losses compared before are in these.
template <class Layer>
void expect_equal_layer(Comparison& file, const Layer& layer, const Routing<float>& routing) {
  typename Layer::Cache cache;
  file.expect_close(layer.forward(file.matrix("x"), routing, cache), file.matrix("y"), "y");
  Layer grad = moe::zeros_like(layer);
  file.expect_close(layer.backward(file.matrix("d_y"), cache, grad, file.gradient), file.matrix("d_x"),
                    "d_x");
  file.expect_equal_parameters(grad.router());
  file.expect_equal_expert_gradients(grad.experts());
}

// ---- flaxformer

void expect_equal_to_flaxformer(const std::string& name, const moe::TopKOptions& options) {
  Comparison file(name);
  const auto router = make_router<moe::TopKRouter<float>>(file, options);
  const Matrix<float> x = file.matrix("x");
  const BatchInfo info = groups_of(2, x.rows());
  Routing<float> routing;
  router.route(x, info, routing);
  file.expect_equal_plan(routing);
  file.expect_equal_loss("balance_loss", moe::sequence_balance_loss(routing, info),
                         moe::balance_factor(moe::BalanceConvention::tokens, kNumExperts, options.top_k));
  file.expect_equal_loss("z_loss", moe::router_z_loss(routing));
  file.expect_equal_gradients(router, routing);
}

// 2 seats, which are those of Switch-C in training, by its rule. Their file has a router bias.
TEST(Authors, FlaxformerSwitch) {
  moe::TopKOptions options = moe::switch_c.router;
  options.capacity = options.training_capacity;
  options.bias = true;
  expect_equal_to_flaxformer("flaxformer_switch", options);
}
TEST(Authors, FlaxformerTop2) {  // 3 seats; gates as they are, unlike in the models here
  expect_equal_to_flaxformer("flaxformer_top2", {.top_k = 2, .bias = true, .capacity = 1.0});
}
TEST(Authors, FlaxformerTop2Prioritised) {
  expect_equal_to_flaxformer(
      "flaxformer_top2_prioritised",
      {.top_k = 2, .bias = true, .capacity = 1.0, .priority = Priority::token_max_gate});
}

TEST(Authors, FlaxformerExpertChoice) {  // 3 seats by the model's rule, but for its minimum
  Comparison file("flaxformer_expert_choice");
  moe::ExpertChoiceOptions options = moe::expert_choice_8b_64e.router;
  options.capacity_rule.minimum = 0;
  const auto router = make_router<moe::ExpertChoiceRouter<float>>(file, options);
  Routing<float> routing;
  router.route(file.matrix("x"), groups_of(2, 24), routing);
  file.expect_equal_plan(routing);
  file.expect_equal_loss("z_loss", moe::router_z_loss(routing));
  file.expect_equal_gradients(router, routing);
}

// Layers in training, with the models' own rules of seats: for 11 tokens 3, and 6 in Expert Choice.
template <class Unit>
void expect_equal_to_flaxformer_layer(const std::string& name, const moe::Model<Unit>& model) {
  Comparison file(name);
  const auto layer = make_layer_of(without_jitter(model), file);
  const Matrix<float> x = file.matrix("x");
  const BatchInfo info = groups_of(file.golden.number("groups"), x.rows());
  moe::Rng rng(1);
  Routing<float> routing;
  layer.router().route(x, rng, info, routing);
  file.expect_equal_plan(routing);
  file.gradient = {};
  file.expect_equal_loss("balance_loss", moe::sequence_balance_loss(routing, info));
  file.expect_equal_loss("z_loss", moe::router_z_loss(routing));
  expect_equal_layer(file, layer, routing);
}

TEST(Authors, FlaxformerSwitchCLayer) {
  expect_equal_to_flaxformer_layer("flaxformer_layer_switch_c", moe::switch_c);
}
TEST(Authors, FlaxformerSwitchXXLLayer) {
  expect_equal_to_flaxformer_layer("flaxformer_layer_switch_xxl", moe::switch_xxl);
}

TEST(Authors, FlaxformerExpertChoiceLayer) {
  Comparison file("flaxformer_layer_experts_choose");
  const auto layer = make_layer_of(moe::expert_choice_8b_64e, file);
  const Matrix<float> x = file.matrix("x");
  Routing<float> routing;
  layer.router().route(x, groups_of(file.golden.number("groups"), x.rows()), routing);
  file.expect_equal_plan(routing);
  file.gradient = {};
  file.expect_equal_loss("z_loss", moe::router_z_loss(routing));
  expect_equal_layer(file, layer, routing);
}

// ---- vmoe

// The model in the size of the file, and its layer. The names are those of the authors' parameters.
template <class M>
auto load_model(const M& published, const Golden& golden) {
  const Index index = golden.number("layer");
  const M model = moe::sized_as(published, golden.file, index);
  EXPECT_EQ(model.d_ff, golden.number("d_ff"));
  return std::pair(model, moe::load_layer<float>(model, golden.file, index));
}

void expect_equal_to_vmoe(const std::string& name, Priority priority) {
  Comparison file(name);
  const auto [model, layer] = load_model(moe::vmoe_l16, file.golden);
  using Layer = std::remove_const_t<decltype(layer)>;
  EXPECT_EQ(model.router.noise_stddev, 1.0 / kNumExperts);
  const auto routing = route_under_noise(
      layer.router(), {.top_k = 2, .capacity_factor = 1.0, .priority = priority}, file);  // 4 seats
  file.expect_equal_plan(routing);
  file.gradient = {};
  file.expect_equal_loss("balance_loss", loss_of_first_choices(routing));
  file.expect_equal_loss("importance_loss", moe::importance_loss(routing, moe::Importance::probs));
  file.expect_equal_loss("load_loss", moe::load_loss(routing, moe::LoadThreshold::one));

  Layer::Cache cache;
  file.expect_close(layer.forward(file.matrix("x"), routing, cache), file.matrix("y"), "y");
  Layer grad = moe::zeros_like(layer);
  file.expect_close(layer.backward(file.matrix("d_y"), cache, grad, file.gradient), file.matrix("d_x"),
                    "d_x");
  file.expect_equal_layer_gradients(model, grad);
}

TEST(Authors, VMoE) { expect_equal_to_vmoe("vmoe", Priority::token_order); }
TEST(Authors, VMoEPrioritised) { expect_equal_to_vmoe("vmoe_prioritised", Priority::token_max_gate); }

TEST(Authors, VMoEExpertChoice) {  // 4 seats, by the model's rule too
  Comparison file("vmoe_expert_choice");
  const auto router = make_router<moe::ExpertChoiceRouter<float>>(file, moe::expert_choice_8b_64e.router);
  Routing<float> routing;
  router.route(file.matrix("x"), {}, routing);
  file.expect_equal_plan(routing);
  file.expect_equal_gradients(router, routing);
}

void expect_equal_to_soft_moe(const std::string& name) {
  Comparison file(name);
  const auto [model, layer] = load_model(moe::soft_moe_s16, file.golden);
  using Layer = std::remove_const_t<decltype(layer)>;
  EXPECT_EQ(model.num_experts(), file.golden.number("num_experts"));
  EXPECT_EQ(model.layer.slots_per_expert, file.golden.number("slots_per_expert"));
  const Matrix<float> x = file.matrix("x");
  Layer::Cache cache;
  file.expect_close(layer.forward(x, cache, groups_of(file.golden.number("groups"), x.rows())),
                    file.matrix("y"), "y");
  file.expect_close(cache.routing.dispatch, file.matrix("dispatch"), "dispatch");
  file.expect_close(cache.routing.combine, file.matrix("combine"), "combine");
  Layer grad = moe::zeros_like(layer);
  file.expect_close(layer.backward(file.matrix("d_y"), cache, grad), file.matrix("d_x"), "d_x");
  file.expect_equal_layer_gradients(model, grad);
}

TEST(Authors, SoftMoE) { expect_equal_to_soft_moe("soft_moe"); }
TEST(Authors, SoftMoEOfFewTokens) { expect_equal_to_soft_moe("soft_moe_few_tokens"); }

// ---- tensor2tensor

void expect_equal_to_tensor2tensor(const std::string& name, const moe::NoisyTopKOptions& options) {
  Comparison file(name);
  const auto router = make_router<moe::NoisyTopKRouter<float>>(file, options);
  const auto routing =
      route_under_noise(router, {.gate = {.renormalise = true}, .top_k = options.top_k}, file);
  file.expect_equal_plan(routing);
  file.expect_equal_loss("importance_loss", moe::importance_loss(routing));
  file.expect_equal_loss("load_loss", moe::load_loss(routing));
  file.expect_equal_gradients(router, routing);
}

TEST(Authors, Tensor2TensorTop2) { expect_equal_to_tensor2tensor("tensor2tensor_top2", {.top_k = 2}); }
TEST(Authors, Tensor2TensorTop4) {
  expect_equal_to_tensor2tensor("tensor2tensor_top4", moe::shazeer_2017.router);
}

TEST(Authors, Tensor2TensorInInference) {
  Comparison file("tensor2tensor_eval");
  const auto router = make_router<moe::NoisyTopKRouter<float>>(file, {.top_k = 2});
  Routing<float> routing;
  router.route(file.matrix("x"), {}, routing);
  file.expect_equal_plan(routing);
  file.expect_equal_loss("importance_loss", moe::importance_loss(routing));
  file.expect_equal_loss("load_loss", moe::load_loss(routing));
  const moe::IndexVector demand = moe::demand_per_expert(routing);
  EXPECT_EQ(demand.cast<float>(), file.matrix("load"));
}

TEST(Authors, Tensor2TensorLayer) {  // their loss is the sum of both
  Comparison file("tensor2tensor_layer");
  const auto layer = make_layer_of(moe::shazeer_2017, file);
  const auto routing = route_under_noise(
      layer.router(), {.gate = {.renormalise = true}, .top_k = layer.router().options().top_k}, file);
  file.expect_equal_plan(routing);
  file.gradient = {};
  moe::Loss<float> sum = moe::importance_loss(routing);
  const moe::Loss<float> load = moe::load_loss(routing);
  sum.value += load.value;
  sum.gradient += load.gradient;
  file.expect_equal_loss("sum_of_losses", sum);
  expect_equal_layer(file, layer, routing);
}

// ---- lingvo

// 3 seats. `divisor` is what their loss divides both means over tokens by, where ours divides by 1.
void expect_equal_to_lingvo(const std::string& name, const moe::TopKOptions& options, double divisor) {
  Comparison file(name);
  const auto router = make_router<moe::TopKRouter<float>>(file, options);
  BatchInfo info;
  info.mask = file.golden.matrix<std::int64_t>("mask").array() == 1;
  Routing<float> routing;
  router.route(file.matrix("x"), info, routing);
  file.expect_equal_plan(routing);
  file.expect_equal_loss("balance_loss", loss_of_first_choices(routing), 1 / (divisor * divisor));
  file.expect_equal_gradients(router, routing);
}

TEST(Authors, Lingvo) {
  expect_equal_to_lingvo("lingvo_all", with_seats(moe::glam_64b_64e.router, 0.75), 1);
  // In inference GShard takes the second expert always, too.
  expect_equal_to_lingvo("lingvo_all", with_seats(moe::gshard_600b.router, 0.75), 1);
}
TEST(Authors, LingvoWithPadding) {  // they divide by all tokens, padding included
  expect_equal_to_lingvo("lingvo_all_masked", with_seats(moe::glam_64b_64e.router, 0.75), 16.0 / 13);
}
TEST(Authors,
     LingvoGatesAfterDrops) {  // they add an epsilon to the share of tokens that are no padding
  expect_equal_to_lingvo("lingvo_after",
                         {.top_k = 2, .renormalise = true, .capacity = 0.75, .renormalise_after_drop = true},
                         1 + 1e-6);
}

// GShard in training, with another threshold.
TEST(Authors, LingvoRandomSecondExpert) {
  Comparison file("lingvo_random");
  moe::TopKOptions options = with_seats(moe::gshard_600b.router, 0.75);
  options.training_capacity = options.capacity;
  options.random_second_threshold = file.golden.config.at("second_expert_threshold").get<double>();
  const auto router = make_router<moe::TopKRouter<float>>(file, options);
  const auto routing = route_under_draws(router, file);
  file.expect_equal_plan(routing);
  file.expect_equal_loss("balance_loss", loss_of_first_choices(routing));
  file.expect_equal_gradients(router, routing);
}

// The whole layer, with the model's threshold and rule of seats, which gives 4.
TEST(Authors, LingvoLayer) {
  Comparison file("lingvo_layer");
  const auto layer = make_layer_of(moe::gshard_600b, file);
  const auto routing = route_under_draws(layer.router(), file);
  file.expect_equal_plan(routing);
  file.gradient = {};
  file.expect_equal_loss("balance_loss", loss_of_first_choices(routing));
  expect_equal_layer(file, layer, routing);
}

// ---- mesh_tensorflow: second experts need a gate above the threshold; 3 seats

TEST(Authors, MeshThresholdOfSecondExpert) {
  Comparison file("mesh_threshold");
  moe::TopKOptions options = with_seats(moe::st_moe_32b.router, 0.75);
  options.second_threshold = file.golden.config.at("second_threshold").get<double>();
  options.random_second_threshold = 0;
  const auto router = make_router<moe::TopKRouter<float>>(file, options);
  Routing<float> routing;
  router.route(file.matrix("x"), {}, routing);
  file.expect_equal_plan(routing);
  file.expect_equal_loss("balance_loss", loss_of_first_choices(routing));
  file.expect_equal_gradients(router, routing);
}

// The seats that their layer gave are those of the models' rules: 4 of 30 and of 26 tokens.
void expect_equal_capacity(const Comparison& file, const moe::TopKOptions& options, Index tokens) {
  EXPECT_EQ(moe::expert_capacity(tokens, kNumExperts, options.top_k, *options.training_capacity,
                                 options.capacity_rule),
            file.golden.matrix<std::int64_t>("capacity")(0, 0));
}

// Switch in training, under the file's jitter of the router's inputs in place of the router's own.
TEST(Authors, MeshSwitchLayer) {
  Comparison file("mesh_layer_switch");
  const auto layer = make_layer_of(moe::switch_base_8, file);
  const moe::TopKOptions& options = layer.router().options();
  expect_equal_capacity(file, options, file.golden.number("group_size"));
  const Matrix<float> x = file.matrix("x"), jitter = file.matrix("jitter");
  EXPECT_LE((jitter.array() - 1).abs().maxCoeff(), options.jitter);
  const BatchInfo info = groups_of(file.golden.number("groups"), x.rows());
  Routing<float> routing;
  layer.router().route(x.cwiseProduct(jitter), info, routing);  // for the logits
  moe::begin_routing(x.rows(), kNumExperts, info, routing, "test", {.router_logits = true});
  routing.input_factor = jitter;
  moe::RouterWorkspace<float> workspace;
  moe::route_by_logits({.top_k = options.top_k,
                        .capacity_factor = options.training_capacity,
                        .capacity_rule = options.capacity_rule},
                       {}, info, routing, workspace, moe::DefaultExecutor{});
  file.expect_equal_plan(routing);
  file.gradient = {};
  file.expect_equal_loss("balance_loss", moe::sequence_balance_loss(routing, info));
  file.expect_equal_loss("z_loss", moe::router_z_loss(routing));
  expect_equal_layer(file, layer, routing);
}

// ST-MoE in training: its second expert at random, its experts.
TEST(Authors, MeshRandomSecondExpertLayer) {
  Comparison file("mesh_layer_random");
  const auto layer = make_layer_of(moe::st_moe_32b, file);
  expect_equal_capacity(file, layer.router().options(), file.golden.number("group_size"));
  const auto routing = route_under_draws(layer.router(), file);
  file.expect_equal_plan(routing);
  file.gradient = {};
  file.expect_equal_loss("balance_loss", loss_of_first_choices(routing));
  expect_equal_layer(file, layer, routing);
}

// ---- Megatron-LM

// Their loss counts the choices that scores would make without a bias and without groups.
void expect_equal_to_megatron(const std::string& name, const moe::TopKOptions& options) {
  Comparison file(name);
  const auto router = make_router<moe::TopKRouter<float>>(file, options);
  Routing<float> routing;
  router.route(file.matrix("x"), {}, routing);
  file.expect_equal_plan(routing);
  const auto demand = file.golden.matrix<std::int64_t>("demand");
  file.expect_equal_loss("balance_loss",
                         moe::load_balancing_loss(routing, demand.cast<Index>(), routing.num_tokens()));
  file.expect_equal_loss("z_loss", moe::router_z_loss(routing));
  file.expect_equal_gradients(router, routing);
}

TEST(Authors, MegatronSoftmaxOfChosen) {  // 3 seats, to the largest gates
  expect_equal_to_megatron("megatron_softmax", {.top_k = 2,
                                                .softmax_before_selection = false,
                                                .capacity = 1.0,
                                                .priority = Priority::assignment_gate});
}
TEST(Authors, MegatronSoftmax) { expect_equal_to_megatron("megatron_pre_softmax", {.top_k = 2}); }
TEST(Authors, MegatronGroupsByTheirBest) {
  expect_equal_to_megatron("megatron_groups_softmax",
                           {.top_k = 3,
                            .gate_scale = 16.0,
                            .group_limit = {.groups = 4, .kept = 2, .score = moe::GroupScore::max}});
}
TEST(Authors, MegatronSigmoidAndGroupsByTwo) {
  expect_equal_to_megatron("megatron_groups_sigmoid",
                           {.top_k = 4,
                            .score = Score::sigmoid,
                            .renormalise = true,
                            .renormalise_epsilon = 1e-20,
                            .gate_scale = 2.5,
                            .selection_bias = true,
                            .group_limit = {.groups = 4, .kept = 2, .score = moe::GroupScore::top_two_sum}});
}
TEST(Authors, MegatronSqrtSoftplus) {
  expect_equal_to_megatron("megatron_sqrtsoftplus", {.top_k = 2,
                                                     .score = Score::sqrt_softplus,
                                                     .renormalise = true,
                                                     .renormalise_epsilon = 1e-20,
                                                     .gate_scale = 1.5,
                                                     .selection_bias = true});
}

void expect_equal_to_sinkhorn(const std::string& name, Index top_k) {
  Comparison file(name);
  const auto router = make_router<moe::SinkhornRouter<float>>(file, {.top_k = top_k});
  moe::Rng rng(1);
  Routing<float> routing;
  router.route(file.matrix("x"), rng, {}, routing);
  file.expect_equal_plan(routing);
  file.expect_equal_gradients(router, routing);
}

TEST(Authors, MegatronSinkhorn) { expect_equal_to_sinkhorn("megatron_sinkhorn", 1); }
TEST(Authors, MegatronSinkhornTop2) { expect_equal_to_sinkhorn("megatron_sinkhorn_top2", 2); }

// ---- ReMoE, Dynamic MoE, hash layers, Tutel

TEST(Authors, ReMoE) {
  Comparison file("remoe");
  const auto router = make_router<moe::TopKRouter<float>>(file, {.top_k = kNumExperts, .score = Score::relu});
  Routing<float> routing;
  router.route(file.matrix("x"), {}, routing);
  file.expect_equal_plan(routing);
  EXPECT_NEAR(1 - double(routing.chosen.size()) / double(routing.router_logits.size()),
              file.matrix("sparsity")(0, 0), 1e-6);
  file.expect_equal_loss("l1_loss", moe::relu_balance_loss(routing, file.golden.number("top_k")));
  file.expect_equal_gradients(router, routing);
}

TEST(Authors, DynamicMoE) {
  Comparison file("dynamic_moe");
  using Expert = moe::GatedFeedForward<float>;
  using Layer = moe::MoELayer<Expert, moe::TopKRouter<float>>;
  const Layer layer(
      file.experts<Expert>(kNumExperts, {.d_model = kDModel, .d_ff = file.golden.number("d_ff")}),
      make_router<moe::TopKRouter<float>>(
          file, {.top_k = kNumExperts, .top_p = file.golden.config.at("top_p").get<double>()}));
  Layer::Cache cache;
  file.expect_close(layer.forward(file.matrix("x"), cache), file.matrix("y"), "y");
  file.expect_equal_plan(cache.routing);
  Layer grad = moe::zeros_like(layer);
  file.expect_close(layer.backward(file.matrix("d_y"), cache, grad), file.matrix("d_x"), "d_x");
  file.expect_equal_parameters(grad.router());
  file.expect_equal_expert_gradients(grad.experts());
}

TEST(Authors, HashLayer) {
  Comparison file("hash_layer");
  using Expert = moe::FeedForward<float>;
  using Layer = moe::MoELayer<Expert, moe::HashRouter<float>>;
  const auto indices = [&](const char* tensor) -> moe::IndexVector {
    return file.golden.matrix<std::int64_t>(tensor).cast<Index>();
  };
  const Layer layer(
      file.experts<Expert>(kNumExperts,
                           {.d_model = kDModel, .d_ff = file.golden.number("d_ff"), .bias = true}),
      moe::HashRouter<float>({.d_model = kDModel, .num_experts = kNumExperts, .table = indices("table")}));
  BatchInfo info;
  info.token_ids = indices("token_ids");
  Layer::Cache cache;
  file.expect_close(layer.forward(file.matrix("x"), cache, info), file.matrix("y"), "y");
  Layer grad = moe::zeros_like(layer);
  file.expect_close(layer.backward(file.matrix("d_y"), cache, grad), file.matrix("d_x"), "d_x");
  file.expect_equal_expert_gradients(grad.experts());
}

void expect_equal_to_tutel(const std::string& name, Priority priority) {
  Comparison file(name);
  EXPECT_EQ(moe::expert_capacity(16, kNumExperts, 2, 1.0),
            file.golden.matrix<std::int64_t>("capacity")(0, 0));
  const auto router = make_router<moe::TopKRouter<float>>(
      file, {.top_k = 2, .renormalise = true, .noise_stddev = 1.0 / kNumExperts});
  const auto routing = route_under_noise(
      router, {.gate = {.renormalise = true}, .top_k = 2, .capacity_factor = 1.0, .priority = priority},
      file);
  file.expect_equal_plan(routing);
  file.expect_equal_loss("balance_loss", loss_of_first_choices(routing));
  file.expect_equal_gradients(router, routing);
}

TEST(Authors, Tutel) { expect_equal_to_tutel("tutel", Priority::token_order); }
TEST(Authors, TutelPrioritised) { expect_equal_to_tutel("tutel_prioritised", Priority::token_max_gate); }

// ---- Capacities. No expert has more seats here than there are tokens; theirs may. Tutel's rule, top_k *
// floor(factor * ceil(tokens / experts)), is not one of this library's.

TEST(Authors, Capacities) {
  const Golden golden("authors_capacities");
  const auto cases = golden.matrix<std::int64_t>("cases");
  const Matrix<double> factor = golden.matrix<double>("factor");
  struct Rule {
    const char* name;
    moe::CapacityRule rule;
    bool times_k;  // whether they multiply their factor by top_k
  };
  for (const Rule& r : {Rule{"megatron", {}, true}, Rule{"vmoe", moe::vmoe_l16.router.capacity_rule, true},
                        Rule{"vmoe_ceil", {}, true}, Rule{"vmoe_round", {moe::Rounding::nearest_even}, true},
                        Rule{"lingvo", moe::gshard_600b.router.capacity_rule, false},
                        Rule{"lingvo", moe::glam_64b_64e.router.capacity_rule, false},
                        Rule{"flaxformer", moe::st_moe_32b.router.capacity_rule, false},
                        Rule{"flaxformer", moe::expert_choice_8b_64e.router.capacity_rule, false},
                        Rule{"flaxformer_2", moe::switch_xxl.router.capacity_rule, false},
                        Rule{"flaxformer_2", moe::switch_c.router.capacity_rule, false},
                        Rule{"mesh", moe::switch_base_8.router.capacity_rule, false},
                        Rule{"mesh", moe::switch_large_128.router.capacity_rule, false},
                        Rule{"colossalai", moe::openmoe_8b_32e.router.capacity_rule, true},
                        Rule{"colossalai", moe::openmoe_34b_32e.router.capacity_rule, true}}) {
    const auto seats = golden.matrix<std::int64_t>(r.name);
    for (Index i = 0; i < cases.rows(); ++i) {
      const Index tokens = cases(i, 0), k = cases(i, 2);
      const double ours = r.times_k ? factor(i, 0) : factor(i, 0) / double(k);
      EXPECT_EQ(moe::expert_capacity(tokens, cases(i, 1), k, ours, r.rule),
                std::min<Index>(tokens, seats(i, 0)))
          << r.name << " " << cases.row(i) << " " << factor(i, 0);
    }
  }
}

}  // namespace
