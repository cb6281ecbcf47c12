// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "bench.hpp"

// Layers of the shapes of known models, their weights and their routings.
namespace moe::bench {

inline constexpr int kMaxThreads = 2;

struct Shape {
  const char* name;
  Index d_model, d_ff, num_experts, num_shared, top_k;
  bool gated = true;
  bool tiny = false;  // for a test: everything runs once, nothing is measured

  Index count() const { return num_experts + num_shared; }
  double expert_parameters() const { return double((gated ? 3 : 2) * d_model * d_ff); }
};

// ---- Weights: random enough, and made fast.

inline void fill(Matrix<float>& m, Index rows, Index cols, std::uint32_t seed) {
  m.resize(rows, cols);
  const float scale = std::sqrt(3.0f / float(cols)) / 2147483648.0f;
  float* const to = m.data();
  for (Index i = 0; i < m.size(); ++i) {
    std::uint32_t bits = (std::uint32_t(i) + seed * 0x632BE5ABu) * 2654435761u;
    bits = (bits ^ (bits >> 15)) * 0x85EBCA6Bu;
    to[i] = float(std::int32_t(bits ^ (bits >> 13))) * scale;
  }
}

// Peers hold so many experts, of weights that our expert of the same number modulo this has, too.
inline Index peer_experts(const Shape& shape) {
  const double bytes = shape.expert_parameters() * sizeof(float);
  return std::clamp<Index>(Index(1.5e9 / bytes), 2, shape.count());
}

struct Filled {
  Matrix<float> gate, up, down;
};
inline Filled make_weights(const Shape& shape, Index expert) {
  const auto seed = std::uint32_t(expert % peer_experts(shape)) * 3;
  Filled w;
  if (shape.gated) fill(w.gate, shape.d_ff, shape.d_model, seed + 1);
  fill(w.up, shape.d_ff, shape.d_model, seed + 2);
  fill(w.down, shape.d_model, shape.d_ff, seed + 3);
  return w;
}
template <class E>
E make_expert(const Shape& shape, Index expert) {
  Filled w = make_weights(shape, expert);
  if constexpr (requires(E e) { e.w_gate; })
    return E({.d_model = shape.d_model, .d_ff = shape.d_ff}, std::move(w.gate), std::move(w.up),
             std::move(w.down));
  else
    return E({.d_model = shape.d_model, .d_ff = shape.d_ff}, std::move(w.up), std::move(w.down));
}

// ---- Routings.

// Uniform: experts in turn. Skewed: one expert for every token (k = 1: for every other one), the others
// in turn. Both begin elsewhere in every repetition, so that few tokens meet cold weights.
inline Routing<float> make_routing(const Shape& shape, Index tokens, bool skewed, Index repetition) {
  const Index experts = shape.num_experts, k = shape.top_k;
  Routing<float> routing;
  Choices<float>& chosen = routing.chosen;
  Index next = repetition * (tokens * k + 1);
  const Index hot = repetition % experts;
  const auto choose = [&](Index e) {
    chosen.expert.push_back(e);
    chosen.gate.push_back(1.0f / float(k + chosen.expert.size() % 3));
  };
  chosen.token_begin.push_back(0);
  for (Index t = 0; t < tokens; ++t) {
    Index i = 0;
    if (skewed && (k > 1 || t % 2 == 0)) {
      choose(hot);
      ++i;
    }
    for (; i < k; ++i, ++next) choose(skewed ? (hot + 1 + next % (experts - 1)) % experts : next % experts);
    chosen.token_begin.push_back(chosen.expert.size());
  }
  routing.plan.num_tokens = tokens;
  routing.plan.token_state.assign(tokens, TokenState::valid);
  routing.plan.expert_begin.assign(experts + 1, 0);
  dispatch_all(chosen, routing.plan);
  return routing;
}

// The plan with the shared experts, which take every token, behind the others.
inline DispatchPlan<float> with_shared(DispatchPlan<float> plan, Index num_shared) {
  for (Index s = 0; s < num_shared; ++s) {
    for (Index t = 0; t < plan.num_tokens; ++t) {
      plan.token.push_back(t);
      plan.gate.push_back(1.0f);
      plan.choice.push_back(0);
    }
    plan.expert_begin.push_back(plan.token.size());
  }
  return plan;
}

// ---- Layers, of which one is alive at a time.

#ifdef _OPENMP
using Threads = OpenMP;
inline Threads on_threads(int threads) { return {threads}; }
#else
using Threads = Sequential;
inline Threads on_threads(int) { return {}; }
#endif

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
template <class F>
double seconds_of(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return seconds_since(start);
}

// Notes how long each call of for_each takes: what is left of a forward is not in the experts.
struct Timed {
  Threads threads;
  std::vector<double>* spans;

  Index concurrency() const { return threads.concurrency(); }
  template <class F>
  void for_each(Index n, F&& f) const {
    spans->push_back(seconds_of([&] { threads.for_each(n, f); }));
  }
};

class AnyLayer {
 public:
  virtual ~AnyLayer() = default;
  virtual std::size_t memory_bytes() const = 0;
  virtual InstructionSet instruction_set() const = 0;
  virtual void forward(const Matrix<float>& x, const Routing<float>& routing, int threads) = 0;
  virtual void forward(const Matrix<float>& x, int threads) = 0;
  // The share of a forward with the router that is not in the experts' phases.
  virtual double overhead(const Matrix<float>& x, int threads) = 0;

  Matrix<float> y;
};

template <class Format, class E>
class Layer : public AnyLayer {
 public:
  Layer(const Shape& shape, const PackOptions& options) : layer_(make(shape, options)) {}

  std::size_t memory_bytes() const override { return layer_.memory_bytes(); }
  InstructionSet instruction_set() const override { return layer_.instruction_set(); }
  void forward(const Matrix<float>& x, const Routing<float>& routing, int threads) override {
    layer_.forward(x, routing, y, workspace_, on_threads(threads));
  }
  void forward(const Matrix<float>& x, int threads) override {
    layer_.forward(x, y, workspace_, {}, on_threads(threads));
  }
  double overhead(const Matrix<float>& x, int threads) override {
    // Under a ready routing all calls of for_each are the experts'. With a router they come last.
    std::vector<double> spans;
    const Timed timed{on_threads(threads), &spans};
    const Routing<float> routing = layer_.route(x);
    layer_.forward(x, routing, y, workspace_, timed);
    const std::size_t phases = spans.size();
    spans.clear();
    const double whole = seconds_of([&] { layer_.forward(x, y, workspace_, {}, timed); });
    double inside = 0;
    for (std::size_t i = spans.size() - phases; i < spans.size(); ++i) inside += spans[i];
    return 1 - inside / whole;
  }

 private:
  static PackedMoELayer<E, TopKRouter<float>> make(const Shape& shape, const PackOptions& options) {
    Rng rng(1);
    TopKRouter<float> router({.d_model = shape.d_model,
                              .num_experts = shape.num_experts,
                              .top_k = shape.top_k,
                              .renormalise = shape.top_k > 1},
                             rng);
    return pack<Format>(
        PackedParts<TopKRouter<float>>{.router = router, .num_shared_experts = shape.num_shared},
        [&](Index e) { return make_expert<E>(shape, e); }, options);
  }

  PackedMoELayer<E, TopKRouter<float>> layer_;
  PackedWorkspace workspace_;
};

}  // namespace moe::bench
