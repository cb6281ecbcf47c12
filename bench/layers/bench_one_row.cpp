// SPDX-License-Identifier: MIT
// One token whose weights are in the caches, as in control, audio and decoding of small layers, against the
// lines of Eigen that compute the same. One thread, d_ff = 2 d_model, 8 gated experts, top-2.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <utility>

#include <moe/packed.hpp>

#include "bench.hpp"

namespace moe::bench {
namespace {

template <class S>
using Layer = MoELayer<GatedFeedForward<S>, TopKRouter<S>>;

template <class S>
Layer<S> make_layer(Index d_model) {
  Rng rng(1);
  return Layer<S>(
      make_experts<GatedFeedForward<S>>(8, {.d_model = d_model, .d_ff = 2 * d_model}, rng),
      TopKRouter<S>({.d_model = d_model, .num_experts = 8, .top_k = 2, .renormalise = true}, rng));
}

template <class S>
class LinesOfEigen {
 public:
  explicit LinesOfEigen(const Layer<S>& layer) : layer_(layer) {}

  const auto& operator()(const Matrix<S>& x) {
    const auto token = x.row(0).transpose();
    logits_.noalias() = layer_.router().w_router * token;
    Index best, second;
    const S largest = logits_.maxCoeff(&best);
    logits_[best] = std::numeric_limits<S>::lowest();
    const S share = 1 / (1 + std::exp(logits_.maxCoeff(&second) - largest));
    y_.setZero(x.cols());
    for (const auto& [e, gate] : {std::pair(best, share), std::pair(second, 1 - share)}) {
      const auto& expert = layer_.experts()[std::size_t(e)];
      hidden_.noalias() = expert.w_gate * token;
      up_.noalias() = expert.w_up * token;
      hidden_ = hidden_.array() / (1 + (-hidden_.array()).exp()) * up_.array();
      y_.noalias() += gate * (expert.w_down * hidden_);
    }
    return y_;
  }

 private:
  const Layer<S>& layer_;
  Eigen::Matrix<S, Eigen::Dynamic, 1> logits_, hidden_, up_, y_;
};

// Both in turn, some calls at a time.
template <class S, class Forward>
void compare(benchmark::State& state, const Layer<S>& layer, const Forward& forward) {
  const Matrix<S> x = normal(1, layer.d_model()).template cast<S>();
  Matrix<S> y;
  LinesOfEigen<S> lines(layer);
  forward(x, y);
  if (!y.row(0).transpose().isApprox(lines(x), S(1e-4))) throw std::logic_error("other output than Eigen's");
  const int calls = int(std::max<Index>(10, 200000 / (x.cols() * x.cols())));
  const auto seconds = [&](const auto& call) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) call();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / calls;
  };
  double ours = 1e9, eigen = 1e9;
  for (auto _ : state) {
    ours = std::min(ours, seconds([&] { forward(x, y); }));
    eigen = std::min(eigen, seconds([&] { benchmark::DoNotOptimize(lines(x).data()); }));
  }
  state.counters["best_us"] = 1e6 * ours;
  state.counters["vs_eigen"] = eigen / ours;
}

template <class S>
void BM_OneRow(benchmark::State& state) {
  const Layer<S> layer = make_layer<S>(state.range(0));
  typename Layer<S>::Workspace workspace;
  compare(state, layer, [&](const auto& x, auto& y) { layer.forward(x, y, workspace, {}, Sequential{}); });
}

void BM_OneRowPacked(benchmark::State& state) {
  const Layer<float> layer = make_layer<float>(state.range(0));
  const auto packed = pack<F32>(layer);
  PackedWorkspace workspace;
  compare(state, layer, [&](const auto& x, auto& y) { packed.forward(x, y, workspace, {}, Sequential{}); });
}

BENCHMARK(BM_OneRow<float>)->ArgName("d_model")->Arg(32)->Arg(64)->Arg(256);
BENCHMARK(BM_OneRow<double>)->ArgName("d_model")->Arg(32)->Arg(64)->Arg(256);
BENCHMARK(BM_OneRowPacked)->ArgName("d_model")->Arg(32)->Arg(64)->Arg(256);

}  // namespace
}  // namespace moe::bench
