// SPDX-License-Identifier: MIT
// Results are bitwise the same for every executor and number of threads. Run under ThreadSanitizer, too.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <thread>
#include <type_traits>
#include <unsupported/Eigen/CXX11/ThreadPool>
#include <vector>

#include <moe/moe.hpp>

#include "../mixed_experts.hpp"

namespace moe {
namespace {

constexpr Index kVocabulary = 40;

template <class S>
void append(std::string& bytes, const S* data, Index n) {
  if (n > 0) bytes.append(reinterpret_cast<const char*>(data), std::size_t(n) * sizeof(S));
}

// Everything that a training step and an inference step compute, as bytes.
template <class Layer, class E>
std::string everything(const Layer& layer, const Matrix<float>& x, const BatchInfo& info, const E& executor) {
  std::string bytes;
  typename Layer::Cache cache;
  typename Layer::Workspace workspace;
  Layer grad = zeros_like(layer);
  Rng rng(99);
  Matrix<float> y, y_train, d_x;
  layer.forward(x, y, workspace, info, executor);
  layer.forward(x, rng, y_train, cache, info, executor);
  const Routing<float>& r = cache.routing;
  IndexVector device(layer.num_experts());
  for (Index e = 0; e < device.size(); ++e) device[e] = e % 2;
  std::vector<Loss<float>> losses{load_balancing_loss(r), importance_loss(r), sequence_balance_loss(r, info),
                                  device_balance_loss(r, device), relu_balance_loss(r, 1)};
  if (r.router_logits.size() > 0) losses.push_back(router_z_loss(r));
  LevelsLoss<float> load_of_levels;
  if (r.levels.empty()) {
    losses.push_back(load_loss(r));
  } else {
    load_of_levels = hierarchical_load_loss(r);
    append(bytes, &load_of_levels.value, 1);
  }
  RoutingGradient<float> of_losses;
  if constexpr (TrainableRouter<std::decay_t<decltype(layer.router())>>)
    for (const Loss<float>& loss : losses) of_losses += loss.gradient;
  Matrix<float> d_y = Matrix<float>::Constant(x.rows(), x.cols(), 0.25f) + 0.5f * x;
  layer.backward(d_y, cache, grad, of_losses, d_x, executor);
  if constexpr (requires { grad.router().parent(); })
    layer.router().backward_levels(cache.x, r, load_of_levels.gradients, d_x, grad.router(), executor);
  append(bytes, y.data(), y.size());
  append(bytes, y_train.data(), y_train.size());
  append(bytes, d_x.data(), d_x.size());
  for (const Loss<float>& loss : losses) append(bytes, &loss.value, 1);
  append(bytes, r.router_logits.data(), r.router_logits.size());
  append(bytes, r.router_probs.data(), r.router_probs.size());
  append(bytes, r.plan.token.data(), r.plan.token.size());
  append(bytes, r.plan.gate.data(), r.plan.gate.size());
  Layer::visit([&](const ParameterInfo&, const auto& g) { append(bytes, g.data(), g.size()); }, grad);
  return bytes;
}

template <class Expert, class E>
std::string everything(const SoftMoELayer<Expert>& layer, const Matrix<float>& x, const BatchInfo& info,
                       const E& executor) {
  using Layer = SoftMoELayer<Expert>;
  std::string bytes;
  typename Layer::Cache cache;
  typename Layer::Workspace workspace;
  Layer grad = zeros_like(layer);
  Matrix<float> y, y_train, d_x;
  layer.forward(x, y, workspace, info, executor);
  layer.forward(x, y_train, cache, info, executor);
  layer.backward(x, cache, grad, d_x, executor);
  for (const Matrix<float>* m : {&y, &y_train, &d_x}) append(bytes, m->data(), m->size());
  for (const ReusedMatrix<float>* m : {&cache.routing.dispatch, &cache.routing.combine})
    append(bytes, m->data(), m->size());
  Layer::visit([&](const ParameterInfo&, const auto& g) { append(bytes, g.data(), g.size()); }, grad);
  return bytes;
}

template <class Layer>
void expect_same_everywhere(Layer layer, const std::string& what) {
  Rng rng(5);
  Layer::visit([&](const ParameterInfo&, auto& p) { fill_normal(p, 0.2, rng); }, layer);
  Matrix<float> x(437, layer.d_model());
  fill_normal(x, 1.0, rng);
  BatchInfo info;
  info.mask = Mask::Constant(x.rows(), true);
  for (const Index t : {0, 17, 64, 200, 436}) info.mask[t] = false;
  info.group_begin.resize(4);
  info.group_begin << 0, 100, 101, 437;
  info.token_ids.resize(x.rows());  // for routers that look at them
  for (Index& id : info.token_ids) id = rng.index(kVocabulary);

  const std::string expected = everything(layer, x, info, Sequential{});
  EXPECT_TRUE(everything(layer, x, info, Sequential{}) == expected) << what << ", run twice";
  for (const int threads : {1, 2, 3, 8}) {
    Eigen::ThreadPool pool(threads);
    EXPECT_TRUE(everything(layer, x, info, ThreadPoolExecutor(pool)) == expected)
        << what << ", thread pool of " << threads;
#ifdef _OPENMP
    EXPECT_TRUE(everything(layer, x, info, OpenMP{.num_threads = threads}) == expected)
        << what << ", OpenMP with " << threads << " threads";
#endif
  }
#ifdef _OPENMP
  const int before = omp_get_max_threads();
  for (const int threads : {1, 2, 3}) {
    omp_set_num_threads(threads);
    EXPECT_TRUE(everything(layer, x, info, DefaultExecutor{}) == expected)
        << what << ", the default executor after omp_set_num_threads(" << threads << ")";
  }
  omp_set_num_threads(before);
#else
  EXPECT_TRUE(everything(layer, x, info, DefaultExecutor{}) == expected) << what;
#endif
}

// A router whose gates scale inputs has no gated shared experts beside it.
template <class Router>
void expect_same_with(const Router& router, const std::string& what, bool gated_shared = true) {
  Rng rng(2);
  const typename GatedFeedForward<float>::Options gated{.d_model = router.d_model(), .d_ff = 29};
  using Layer = MoELayer<GatedFeedForward<float>, Router>;
  expect_same_everywhere(
      Layer(make_experts<GatedFeedForward<float>>(router.num_experts(), gated, rng), router,
            {make_experts<GatedFeedForward<float>>(2, gated, rng), gated_shared}, true),
      what + " with shared experts");
}

// Experts of both kinds: the layer does not know whose router it has, so one router is enough.
void expect_same_with_all_experts(const TopKRouter<float>& router, const std::string& what) {
  Rng rng(1);
  using Expert = FeedForward<float, GELUTanh>;
  const Expert::Options plain{.d_model = router.d_model(), .d_ff = 37, .bias = true};
  expect_same_everywhere(MoELayer(make_experts<Expert>(router.num_experts(), plain, rng), router), what);
  expect_same_with(router, what);
}

// Backward of one routing on several threads at once, each with a workspace of its own.
template <class Router>
void expect_shared_routing(Router router, const std::string& what) {
  Rng rng(6);
  Router::visit([&](const ParameterInfo&, auto& p) { fill_normal(p, 0.5, rng); }, router);
  Matrix<float> x(90, router.d_model());
  fill_normal(x, 1.0, rng);
  Routing<float> routing;
  RouterWorkspace<float> workspace;
  router.route(x, rng, {}, routing, workspace, Sequential{});
  RoutingGradient<float> gradient = load_balancing_loss(routing).gradient;
  gradient.d_gate.assign(routing.plan.num_assignments(), 0.5f);
  const auto backward = [&](RouterWorkspace<float>& own) {
    std::string bytes;
    Router grad = zeros_like(router);
    Matrix<float> d_x = Matrix<float>::Zero(x.rows(), x.cols());
    router.backward(x, routing, gradient, d_x, grad, own, Sequential{});
    append(bytes, d_x.data(), d_x.size());
    Router::visit([&](const ParameterInfo&, const auto& g) { append(bytes, g.data(), g.size()); }, grad);
    return bytes;
  };
  const std::string expected = backward(workspace);
  std::vector<std::string> results(3);
  std::vector<std::thread> threads;
  for (std::string& result : results)
    threads.emplace_back([&] {
      RouterWorkspace<float> own;
      for (int again = 0; again < 3; ++again) result = backward(own);
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::string& result : results) EXPECT_TRUE(result == expected) << what;
}

TEST(Threads, BackwardOfOneRoutingOnSeveralAtOnce) {
  Rng rng(1);
  const TopKRouter<float> top_k({.d_model = 16,
                                 .num_experts = 6,
                                 .top_k = 3,
                                 .second_threshold = 0.1,
                                 .renormalise = true,
                                 .jitter = 0.1,
                                 .training_capacity = 0.8},
                                rng);
  expect_shared_routing(top_k, "a threshold and jitter");
  expect_shared_routing(TopKRouter<float>({.d_model = 16,
                                           .num_experts = 6,
                                           .top_k = 2,
                                           .renormalise = true,
                                           .noise_stddev = 0.2,
                                           .training_capacity = 0.8,
                                           .overflow = Overflow::next_best},
                                          rng),
                        "next best");
  expect_shared_routing(NoisyTopKRouter<float>({.d_model = 16, .num_experts = 6, .top_k = 2}, rng), "noisy");
  expect_shared_routing(SinkhornRouter<float>({.d_model = 16, .num_experts = 6, .top_k = 2}, rng),
                        "sinkhorn");
  expect_shared_routing(SparseMixerRouter<float>({.d_model = 16, .num_experts = 6}, rng), "sparse mixer");
  const TopKRouter<float> level({.d_model = 16, .num_experts = 3, .top_k = 2, .jitter = 0.1}, rng);
  expect_shared_routing(HierarchicalRouter(level, {level, level, level}), "hierarchical");
}

TEST(Threads, TopKIsTheSameForEveryExecutor) {
  Rng rng(1);
  int i = 0;
  for (const Overflow overflow : {Overflow::drop, Overflow::next_best, Overflow::pass_through})
    for (const Priority priority : {Priority::token_order, Priority::token_max_gate,
                                    Priority::assignment_gate, Priority::token_max_prob})
      expect_same_with_all_experts(
          TopKRouter<float>({.d_model = 33,
                             .num_experts = 7,
                             .top_k = 2,
                             .softmax_before_selection = ++i % 2 == 0,
                             .jitter = 0.05,
                             .training_capacity = 1.0,
                             .overflow = overflow,
                             .priority = priority,
                             .renormalise_after_drop = true},
                            rng),
          "overflow " + std::to_string(int(overflow)) + ", priority " + std::to_string(int(priority)));
}

TEST(Threads, NoisyTopKIsTheSameForEveryExecutor) {
  Rng rng(1);
  expect_same_with(NoisyTopKRouter<float>({.d_model = 33, .num_experts = 7, .top_k = 3}, rng), "noisy top-k");
}

TEST(Threads, ExpertChoiceIsTheSameForEveryExecutor) {
  Rng rng(1);
  expect_same_with(
      ExpertChoiceRouter<float>(
          {.d_model = 33, .num_experts = 7, .capacity = 1.5, .overflow = Overflow::pass_through}, rng),
      "expert choice");
}

TEST(Threads, OtherScoresAreTheSameForEveryExecutor) {
  Rng rng(1);
  expect_same_with(
      TopKRouter<float>({.d_model = 33,
                         .num_experts = 8,
                         .top_k = 2,
                         .score = Score::sigmoid,
                         .renormalise = true,
                         .selection_bias = true,
                         .group_limit = {.groups = 4, .kept = 2, .score = GroupScore::top_two_sum},
                         .noise_stddev = 0.2,
                         .training_capacity = 1.0},
                        rng),
      "sigmoid, groups, noise");
  expect_same_with(TopKRouter<float>({.d_model = 33, .num_experts = 7, .top_k = 7, .top_p = 0.4}, rng),
                   "top-p");
  expect_same_with(
      TopKRouter<float>({.d_model = 33, .num_experts = 7, .top_k = 7, .score = Score::relu}, rng), "ReLU");
  expect_same_with(
      TopKRouter<float>({.d_model = 33, .num_experts = 7, .top_k = 2, .second_threshold = 0.2}, rng),
      "second threshold");
  expect_same_with(TopKRouter<float>({.d_model = 33,
                                      .num_experts = 7,
                                      .top_k = 3,
                                      .random_second_threshold = 0.5,
                                      .training_capacity = 1.0},
                                     rng),
                   "random second experts");
  expect_same_with(
      TopKRouter<float>({.d_model = 33, .num_experts = 7, .top_k = 2, .score = Score::sqrt_softplus}, rng),
      "sqrt-softplus");
  expect_same_with(TopKRouter<float>({.d_model = 33,
                                      .num_experts = 7,
                                      .top_k = 2,
                                      .score = Score::sigmoid,
                                      .gate_side = GateSide::input,
                                      .training_capacity = 1.0},
                                     rng),
                   "gates of inputs", false);
}

TEST(Threads, SinkhornIsTheSameForEveryExecutor) {
  Rng rng(1);
  expect_same_with(SinkhornRouter<float>({.d_model = 33, .num_experts = 7, .top_k = 2}, rng), "Sinkhorn");
}

TEST(Threads, SparseMixerIsTheSameForEveryExecutor) {
  Rng rng(1);
  expect_same_with(SparseMixerRouter<float>({.d_model = 33, .num_experts = 7, .jitter = 0.3}, rng),
                   "SparseMixer");
}

TEST(Threads, RoutersOfRoutersAreTheSameForEveryExecutor) {
  Rng rng(1);
  using Level = NoisyTopKRouter<float>;
  const Level parent({.d_model = 33, .num_experts = 3, .top_k = 2}, rng);
  std::vector<Level> children;
  for (int i = 0; i < 3; ++i)
    children.emplace_back(Level::Options{.d_model = 33, .num_experts = 4, .top_k = 2}, rng);
  expect_same_with(HierarchicalRouter(parent, children), "a router of routers");
}

TEST(Threads, HashesAreTheSameForEveryExecutor) {
  Rng rng(1);
  expect_same_with(HashRouter<float>({.d_model = 33,
                                      .num_experts = 7,
                                      .table = random_hash_table(kVocabulary, 7, rng),
                                      .capacity = 1.0,
                                      .overflow = Overflow::pass_through}),
                   "hashes");
}

TEST(Threads, SoftMoEIsTheSameForEveryExecutor) {
  Rng rng(1);
  for (const bool normalise : {true, false}) {
    const SoftMoEOptions options{
        .d_model = 150, .num_experts = 9, .slots_per_expert = 8, .normalise = normalise};
    expect_same_everywhere(
        SoftMoELayer(make_experts<GatedFeedForward<float>>(9, {.d_model = 150, .d_ff = 29}, rng), options,
                     rng),
        normalise ? "Soft MoE" : "Soft MoE of plain dot products");
  }
}

TEST(Threads, OtherExpertsAreTheSameForEveryExecutor) {
  Rng rng(1);
  const TopKOptions options{.d_model = 33, .num_experts = 8, .top_k = 2, .training_capacity = 1.0};
  const TopKRouter<float> router(options, rng);
  expect_same_everywhere(
      MoELayer(make_experts<ThreeWayFeedForward<float>>(8, {.d_model = 33, .d_ff = 29}, rng), router),
      "three-way experts");
  expect_same_everywhere(MoELayer(make_mixed_experts(33, 29, rng), router), "null experts");
}

// One hot expert has many blocks of rows, a wide layer many blocks of columns.
TEST(Threads, AHotExpertIsTheSameForEveryExecutor) {
  Rng rng(1);
  expect_same_with_all_experts(TopKRouter<float>({.d_model = 300, .num_experts = 2, .top_k = 2}, rng),
                               "two experts that see every token");
}

}  // namespace
}  // namespace moe
