// SPDX-License-Identifier: MIT
// The layer against what it replaces. All on one thread (BM_LayerForwardThreads: on several), with
// d_model 256, d_ff 512 and gated experts.
#include "bench.hpp"

namespace moe::bench {
namespace {

using Expert = GatedFeedForward<float>;
using Layer = MoELayer<Expert, TopKRouter<float>>;
constexpr Index kModel = 256, kHidden = 512;

Layer make_layer(Index experts, Index k) {
  Rng rng(1);
  return Layer(make_experts<Expert>(experts, {.d_model = kModel, .d_ff = kHidden}, rng),
               TopKRouter<float>({.d_model = kModel, .num_experts = experts, .top_k = k}, rng));
}

// Multiply-adds count two. Backward does each product of the forward pass twice.
double expert_flops(Index rows) { return 6.0 * double(rows * kModel * kHidden); }
double layer_flops(Index tokens, Index experts, Index k) {
  return expert_flops(tokens * k) + 2.0 * double(tokens * experts * kModel);
}

// The experts' products of a forward pass alone, on rows that lie ready.
void forward_products(const Layer& layer, const DispatchPlan<float>& plan, const RowBuffer<float>& x,
                      Matrix<float>& hidden, RowBuffer<float>& y) {
  for (Index e = 0; e < plan.num_experts(); ++e) {
    const Index begin = plan.expert_begin[e], rows = plan.rows_of(e);
    if (rows == 0) continue;
    const Expert& expert = layer.experts()[std::size_t(e)];
    linear(x.block(begin, rows), expert.w_gate, hidden.topRows(rows));
    linear(x.block(begin, rows), expert.w_up, hidden.topRows(rows));
    linear(hidden.topRows(rows), expert.w_down, y.block(begin, rows));
  }
}

void BM_LayerForward(benchmark::State& state) {
  const Index tokens = state.range(0), experts = state.range(1), k = state.range(2);
  const Layer layer = make_layer(experts, k);
  const Matrix<float> x = normal(tokens, kModel);
  Matrix<float> y;
  Layer::Workspace workspace;
  const auto forward = [&] { layer.forward(x, y, workspace, {}, Sequential{}); };
  forward();
  Matrix<float> hidden(tokens * k, kHidden);
  const double products = best_seconds(
      [&] { forward_products(layer, workspace.routing.plan, workspace.x_rows, hidden, workspace.y_rows); });
  const double whole = best_seconds(forward);
  for (auto _ : state) {
    forward();
    benchmark::DoNotOptimize(y.data());
  }
  count_tokens(state, tokens);
  count_flops(state, layer_flops(tokens, experts, k));
  state.counters["overhead"] = 1 - products / whole;
}
BENCHMARK(BM_LayerForward)
    ->ArgNames({"tokens", "experts", "k"})
    ->ArgsProduct({{1, 8, 64, 512}, {8}, {2}})
    ->Args({512, 64, 2})
    // As k grows from one to all experts: latency is the price of quality.
    ->ArgsProduct({{512}, {8}, {1, 3, 4, 5, 6, 7, 8}});

void BM_LayerForwardThreads(benchmark::State& state) {
  const Index tokens = state.range(0);
  const Layer layer = make_layer(8, 2);
  const Matrix<float> x = normal(tokens, kModel);
  Matrix<float> y;
  Layer::Workspace workspace;
  for (auto _ : state) {
    layer.forward(x, y, workspace);
    benchmark::DoNotOptimize(y.data());
  }
  count_tokens(state, tokens);
  count_flops(state, layer_flops(tokens, 8, 2));
}
BENCHMARK(BM_LayerForwardThreads)->ArgName("tokens")->Arg(64)->Arg(512)->UseRealTime();

// What one writes first: for every token, for each of its experts, three products with a vector.
void BM_NaiveLoopForward(benchmark::State& state) {
  const Index tokens = state.range(0), experts = state.range(1), k = state.range(2);
  const Layer layer = make_layer(experts, k);
  const Matrix<float> x = normal(tokens, kModel);
  Matrix<float> y(tokens, kModel);
  Vector<float> gate(kHidden), up(kHidden);
  for (auto _ : state) {
    const Matrix<float> logits = x * layer.router().w_router.transpose();
    for (Index t = 0; t < tokens; ++t) {
      const Vector<float> z = logits.row(t).transpose();
      const Vector<float> p = (z.array() - z.maxCoeff()).exp();
      const IndexVector chosen = top_k(z, k);
      y.row(t).setZero();
      for (const Index e : chosen) {
        const Expert& expert = layer.experts()[std::size_t(e)];
        gate.noalias() = expert.w_gate * x.row(t).transpose();
        up.noalias() = expert.w_up * x.row(t).transpose();
        up.array() *= gate.array() / (1 + (-gate.array()).exp());
        y.row(t).noalias() += p[e] / p.sum() * (expert.w_down * up).transpose();
      }
    }
    benchmark::DoNotOptimize(y.data());
  }
  count_tokens(state, tokens);
  count_flops(state, layer_flops(tokens, experts, k));
}
BENCHMARK(BM_NaiveLoopForward)
    ->ArgNames({"tokens", "experts", "k"})
    ->ArgsProduct({{1, 8, 64, 512}, {8}, {2}});

// A dense feed-forward as wide as all experts together (width = num_experts * d_ff), or as wide as
// the experts that a token uses plus the router's cost (the same active FLOPs).
Expert dense(Index width) {
  Rng rng(1);
  return Expert({.d_model = kModel, .d_ff = width}, rng);
}
Index active_width(Index experts, Index k) { return k * kHidden + (experts + 2) / 3; }

void run_dense_forward(benchmark::State& state, Index width) {
  const Index tokens = state.range(0);
  const Expert expert = dense(width);
  const Matrix<float> x = normal(tokens, kModel);
  Matrix<float> y(tokens, kModel), cache(tokens, expert.cache_cols());
  for (auto _ : state) {
    expert.forward(x, y, cache);
    benchmark::DoNotOptimize(y.data());
  }
  count_tokens(state, tokens);
  count_flops(state, 6.0 * double(tokens * kModel * width));
}
void BM_DenseAllParametersForward(benchmark::State& state) {
  run_dense_forward(state, state.range(1) * kHidden);
}
void BM_DenseActiveFlopsForward(benchmark::State& state) {
  run_dense_forward(state, active_width(state.range(1), state.range(2)));
}
BENCHMARK(BM_DenseAllParametersForward)
    ->ArgNames({"tokens", "experts", "k"})
    ->ArgsProduct({{1, 8, 64, 512}, {8}, {2}});
BENCHMARK(BM_DenseActiveFlopsForward)
    ->ArgNames({"tokens", "experts", "k"})
    ->ArgsProduct({{1, 8, 64, 512}, {8}, {2}});

// A training step of the layer: forward with an Rng, then backward.
void BM_LayerTrainingStep(benchmark::State& state) {
  const Index tokens = state.range(0), experts = state.range(1), k = state.range(2);
  const Layer layer = make_layer(experts, k);
  Layer grad = zeros_like(layer);
  const Matrix<float> x = normal(tokens, kModel), d_y = normal(tokens, kModel, 2);
  Matrix<float> y, d_x;
  Layer::Cache cache;
  Rng rng(1);
  const RoutingGradient<float> none;
  for (auto _ : state) {
    layer.forward(x, rng, y, cache, {}, Sequential{});
    layer.backward(d_y, cache, grad, none, d_x, Sequential{});
    benchmark::DoNotOptimize(d_x.data());
  }
  count_tokens(state, tokens);
  count_flops(state, 3 * layer_flops(tokens, experts, k));
}
BENCHMARK(BM_LayerTrainingStep)
    ->ArgNames({"tokens", "experts", "k"})
    ->ArgsProduct({{8, 64, 512}, {8}, {2}})
    ->ArgsProduct({{512}, {8}, {1, 4, 8}});

void run_dense_training(benchmark::State& state, Index width) {
  const Index tokens = state.range(0);
  const Expert expert = dense(width);
  Expert grad = zeros_like(expert);
  const Matrix<float> x = normal(tokens, kModel), d_y = normal(tokens, kModel, 2);
  Matrix<float> y(tokens, kModel), d_x(tokens, kModel), cache(tokens, expert.cache_cols());
  for (auto _ : state) {
    expert.forward(x, y, cache);
    expert.backward(x, d_y, cache, d_x, grad);
    benchmark::DoNotOptimize(d_x.data());
  }
  count_tokens(state, tokens);
  count_flops(state, 18.0 * double(tokens * kModel * width));
}
void BM_DenseAllParametersTrainingStep(benchmark::State& state) {
  run_dense_training(state, state.range(1) * kHidden);
}
void BM_DenseActiveFlopsTrainingStep(benchmark::State& state) {
  run_dense_training(state, active_width(state.range(1), state.range(2)));
}
BENCHMARK(BM_DenseAllParametersTrainingStep)
    ->ArgNames({"tokens", "experts", "k"})
    ->ArgsProduct({{8, 64, 512}, {8}, {2}});
BENCHMARK(BM_DenseActiveFlopsTrainingStep)
    ->ArgNames({"tokens", "experts", "k"})
    ->ArgsProduct({{8, 64, 512}, {8}, {2}});

}  // namespace
}  // namespace moe::bench
