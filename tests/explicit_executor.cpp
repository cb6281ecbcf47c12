// SPDX-License-Identifier: MIT
// Compiled with OpenMP and passing Sequential everywhere: its symbols must not name the OpenMP
// executor, else some function of the library relies on the default.
#include <moe/moe.hpp>

namespace moe {
namespace {

template <class Router>
void use(const Router& router) {
  Rng rng(1);
  using E = FeedForward<float>;
  const typename E::Options options{.d_model = 4, .d_ff = 4};
  const MoELayer<E, Router> layer(make_experts<E>(4, options, rng), router,
                                  {make_experts<E>(1, options, rng), true}, true);
  auto grad = zeros_like(layer);
  typename MoELayer<E, Router>::Cache cache;
  typename MoELayer<E, Router>::Workspace workspace;
  Matrix<float> x(3, 4), y, d_x;
  fill_normal(x, 1.0, rng);
  const Sequential one;
  const BatchInfo info;
  const Routing<float> routing = layer.route(x, info, one);
  y = layer.forward(x, info, one);
  layer.forward(x, y, workspace, info, one);
  y = layer.forward(x, routing, one);
  y = layer.forward(x, cache, info, one);
  layer.forward(x, y, cache, info, one);
  y = layer.forward(x, rng, cache, info, one);
  layer.forward(x, rng, y, cache, info, one);
  y = layer.forward(x, routing, cache, one);
  d_x = layer.backward(y, cache, grad, {}, one);
  layer.backward(y, cache, grad, {}, d_x, one);
}

void use_soft() {
  Rng rng(1);
  using E = FeedForward<float>;
  const E::Options options{.d_model = 4, .d_ff = 4};
  const SoftMoELayer<E> soft(make_experts<E>(4, options, rng), {.d_model = 4, .num_experts = 4}, rng);
  SoftMoELayer<E> grad = zeros_like(soft);
  SoftMoELayer<E>::Cache cache;
  SoftMoELayer<E>::Workspace workspace;
  Matrix<float> x(3, 4), y, d_x;
  fill_normal(x, 1.0, rng);
  const Sequential one;
  const BatchInfo info;
  y = soft.forward(x, info, one);
  soft.forward(x, y, workspace, info, one);
  y = soft.forward(x, cache, info, one);
  soft.forward(x, y, cache, info, one);
  d_x = soft.backward(y, cache, grad, one);
  soft.backward(y, cache, grad, d_x, one);
}

// check_gradients takes no executor: it must not rely on the default either.
void check() {
  Rng rng(1);
  const TopKRouter<double> router({.d_model = 4, .num_experts = 4}, rng);
  const Matrix<double> x = Matrix<double>::Ones(2, 4);
  check_gradients(router, x);
  check_gradients(MoELayer(make_experts<FeedForward<double>>(4, {.d_model = 4, .d_ff = 4}, rng), router), x);
}

}  // namespace

void use_everything() {
  check();
  Rng rng(1);
  use(TopKRouter<float>({.d_model = 4, .num_experts = 4}, rng));
  use(NoisyTopKRouter<float>({.d_model = 4, .num_experts = 4}, rng));
  use(ExpertChoiceRouter<float>({.d_model = 4, .num_experts = 4}, rng));
  use(SinkhornRouter<float>({.d_model = 4, .num_experts = 4}, rng));
  use(SparseMixerRouter<float>({.d_model = 4, .num_experts = 4}, rng));
  use(HashRouter<float>({.d_model = 4, .num_experts = 4}));
  use_soft();
}

}  // namespace moe
