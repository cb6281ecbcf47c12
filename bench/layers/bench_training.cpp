// SPDX-License-Identifier: MIT
// A training step of layers of known shapes, against what the machine can do and against the same layer
// whose experts multiply by Eigen.
#include <algorithm>
#include <chrono>
#include <vector>

#include "bench.hpp"
#include "machine.hpp"

namespace moe::bench {
namespace {

using Expert = GatedFeedForward<float>;

// The expert as a user of Eigen writes it, with the parameters of the library's.
struct EigenExpert {
  using Scalar = float;
  Expert parameters;

  Index d_model() const { return parameters.d_model(); }
  Index d_ff() const { return parameters.d_ff(); }
  Index cache_cols() const { return 2 * d_ff(); }

  void forward(const ConstMatrixRef<float>& x, MatrixRef<float> y) const {
    Matrix<float> cache(x.rows(), cache_cols());
    forward(x, y, cache);
  }
  void forward(const ConstMatrixRef<float>& x, MatrixRef<float> y, MatrixRef<float> cache) const {
    auto gate = cache.leftCols(d_ff()), up = cache.rightCols(d_ff());
    gate.noalias() = x * parameters.w_gate.transpose();
    up.noalias() = x * parameters.w_up.transpose();
    const Matrix<float> hidden = gate.array() / (1 + (-gate.array()).exp()) * up.array();
    y.noalias() = hidden * parameters.w_down.transpose();
  }
  void backward(const ConstMatrixRef<float>& x, const ConstMatrixRef<float>& d_y, MatrixRef<float> cache,
                MatrixRef<float> d_x, EigenExpert& grad) const {
    const auto gate = cache.leftCols(d_ff()).array(), up = cache.rightCols(d_ff()).array();
    const Matrix<float> logistic = (1 / (1 + (-gate).exp())).matrix();
    const Matrix<float> hidden = (gate * logistic.array() * up).matrix();
    grad.parameters.w_down.noalias() += d_y.transpose() * hidden;
    Matrix<float> d_hidden(x.rows(), d_ff());
    d_hidden.noalias() = d_y * parameters.w_down;
    const Matrix<float> d_up = (d_hidden.array() * gate * logistic.array()).matrix();
    const Matrix<float> d_gate =
        (d_hidden.array() * up * logistic.array() * (1 + gate * (1 - logistic.array()))).matrix();
    grad.parameters.w_gate.noalias() += d_gate.transpose() * x;
    grad.parameters.w_up.noalias() += d_up.transpose() * x;
    d_x.noalias() = d_gate * parameters.w_gate;
    d_x.noalias() += d_up * parameters.w_up;
  }
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    Expert::visit(f, self.parameters...);
  }
};

struct Shape {
  const char* name;
  Index d_model, d_ff, num_experts, top_k;
};
constexpr Shape kShapes[] = {
    {"tiny", 64, 32, 8, 2}, {"Qwen3-30B-A3B", 2048, 768, 128, 8}, {"OLMoE", 2048, 1024, 64, 8}};

std::vector<Expert> zero_experts(const Shape& shape) {
  return std::vector<Expert>(std::size_t(shape.num_experts),
                             Expert({.d_model = shape.d_model, .d_ff = shape.d_ff}));
}

// Uniform numbers by a generator that is fast enough for gigabytes.
void fill(std::vector<Expert>& experts) {
  DefaultExecutor{}.for_each(Index(experts.size()), [&](Index e, Index) {
    Expert& expert = experts[std::size_t(e)];
    std::uint32_t state = std::uint32_t(e + 1);
    for (Matrix<float>* w : {&expert.w_gate, &expert.w_up, &expert.w_down})
      for (Index i = 0; i < w->size(); ++i) {
        state = state * 1664525u + 1013904223u;
        w->data()[i] = (float(state >> 8) / float(1 << 23) - 1.0f) / std::sqrt(float(w->cols()));
      }
  });
}

// The parameters of one shape at a time, moved from layer to layer: those of the large ones take gigabytes.
struct Parameters {
  const Shape* shape = nullptr;
  std::vector<Expert> experts, grads;
};

Parameters& parameters_of(const Shape& shape) {
  static Parameters parameters;
  if (parameters.shape != &shape) {
    parameters = {};
    parameters = {&shape, zero_experts(shape), zero_experts(shape)};
    fill(parameters.experts);
  }
  return parameters;
}

// Steps of layers with experts of type E, which borrow the parameters for the time of a step.
template <class E>
class Contender {
 public:
  explicit Contender(const Shape& shape)
      : router_({.d_model = shape.d_model, .num_experts = shape.num_experts, .top_k = shape.top_k}, rng_) {}

  double seconds_of_step(Parameters& parameters, const Matrix<float>& x, const Matrix<float>& d_y) {
    Layer layer(take(parameters.experts), router_), grad(take(parameters.grads), router_);
    const auto start = std::chrono::steady_clock::now();
    layer.forward(x, rng_, y_, cache_);
    layer.backward(d_y, cache_, grad, none_, d_x_);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    benchmark::DoNotOptimize(d_x_.data());
    give_back(layer, parameters.experts);
    give_back(grad, parameters.grads);
    return seconds.count();
  }
  const DispatchPlan<float>& plan() const { return cache_.routing.plan; }

 private:
  using Layer = MoELayer<E, TopKRouter<float>>;

  static std::vector<E> take(std::vector<Expert>& from) {
    std::vector<E> experts;
    for (Expert& expert : from) experts.push_back(E{std::move(expert)});
    return experts;
  }
  static void give_back(Layer& from, std::vector<Expert>& to) {
    for (std::size_t e = 0; e < to.size(); ++e) {
      if constexpr (std::is_same_v<E, Expert>)
        to[e] = std::move(from.experts()[e]);
      else
        to[e] = std::move(from.experts()[e].parameters);
    }
  }

  Rng rng_{1};
  TopKRouter<float> router_;
  typename Layer::Cache cache_;
  Matrix<float> y_, d_x_;
  const RoutingGradient<float> none_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

// Ours, the same by Eigen and the probes of the machine run in turn.
void BM_TrainingStep(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const Index tokens = state.range(1);
  const int threads = int(DefaultExecutor{}.concurrency());
  const Matrix<float> x = normal(tokens, shape.d_model), d_y = normal(tokens, shape.d_model, 2);
  Parameters& parameters = parameters_of(shape);
  Contender<Expert> ours(shape);
  Contender<EigenExpert> eigen(shape);
  std::vector<double> times, ratios;
  double peak = 0, bytes_per_second = 0, probes = 0, seconds = 0;
  const auto probe = [&] {
    peak += peak_flops(best_instruction_set(), threads);
    bytes_per_second += bandwidth(threads);
    ++probes;
  };
  for ([[maybe_unused]] auto _ : state) {
    ours.seconds_of_step(parameters, x, d_y);
    eigen.seconds_of_step(parameters, x, d_y);
    for (int round = 0; round < 7; ++round) {
      probe();
      times.push_back(ours.seconds_of_step(parameters, x, d_y));
      probe();
      ratios.push_back(eigen.seconds_of_step(parameters, x, d_y) / times.back());
    }
    seconds = median(times);
    state.SetIterationTime(seconds);
  }
  peak /= probes;
  bytes_per_second /= probes;
  double used_experts = 0;
  for (Index e = 0; e < ours.plan().num_experts(); ++e) used_experts += ours.plan().rows_of(e) > 0 ? 1 : 0;
  // A multiply-add is two. Weights are read forward and backward, gradients are read and written.
  const double weights = 3.0 * double(shape.d_model * shape.d_ff);
  const double flops =
      6.0 * double(tokens * shape.top_k) * weights + 6.0 * double(tokens * shape.num_experts * shape.d_model);
  const double bytes = 4.0 * sizeof(float) * used_experts * weights;
  state.SetLabel(shape.name);
  count_tokens(state, tokens);
  count_flops(state, flops);
  state.counters["roofline"] = std::max(flops / peak, bytes / bytes_per_second) / seconds;
  state.counters["vs_eigen"] = median(ratios);
  state.counters["peak"] = peak;
  state.counters["bytes/s"] = bytes_per_second;
}
BENCHMARK(BM_TrainingStep)
    ->ArgNames({"shape", "tokens"})
    ->Args({0, 16})
    ->ArgsProduct({{1, 2}, {64, 512}})
    ->Iterations(1)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace moe::bench
