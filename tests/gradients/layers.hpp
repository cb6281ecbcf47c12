// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <moe/moe.hpp>

#include "../sanitized.hpp"

// What the gradient tests share: layers too small to hide anything, every way to seat and every
// loss, and inputs that are drawn again until no selection and no kink is near.
namespace gradients {

using moe::Index;
using moe::Matrix;
using moe::Overflow;
using moe::Priority;
using moe::Rng;
using moe::Vector;

constexpr double kTolerance = 1e-6;
constexpr int kMostRedraws = 50;
constexpr Index kDModel = 3, kDFf = 2, kNumExperts = 4, kTokens = 6;

// One in how many combinations is checked.
constexpr Index kEvery = kSanitized ? 31 : 1;

template <class Thing>
void randomise(Thing& thing, Rng& rng) {
  Thing::visit([&](const moe::ParameterInfo&, auto& p) { moe::fill_normal(p, 0.7, rng); }, thing);
}

// ---- Experts.

using ReLUExpert = moe::FeedForward<double, moe::ReLU>;
using SwiGLUExpert = moe::GatedFeedForward<double, moe::SwiGLU>;
using ClampedExpert = moe::GatedFeedForward<double, moe::ClampedSwiGLU>;
using MixedExpert = moe::VariantExpert<ReLUExpert, SwiGLUExpert, ClampedExpert>;

template <class Expert>
Expert make_expert(Index index, Rng& rng);

template <>
inline ReLUExpert make_expert<ReLUExpert>(Index, Rng& rng) {
  return {{.d_model = kDModel, .d_ff = kDFf, .bias = true}, rng};
}
template <>
inline SwiGLUExpert make_expert<SwiGLUExpert>(Index, Rng& rng) {
  return {{.d_model = kDModel, .d_ff = kDFf}, rng};
}
template <>
inline ClampedExpert make_expert<ClampedExpert>(Index, Rng& rng) {
  return {{.d_model = kDModel, .d_ff = kDFf, .bias = true, .glu = {.limit = 0.9}}, rng};
}
template <>
inline MixedExpert make_expert<MixedExpert>(Index index, Rng& rng) {
  if (index % 3 == 0) return make_expert<ReLUExpert>(index, rng);
  if (index % 3 == 1) return make_expert<SwiGLUExpert>(index, rng);
  return make_expert<ClampedExpert>(index, rng);
}

template <class Expert>
std::vector<Expert> make_experts(Index count, Rng& rng) {
  std::vector<Expert> experts;
  for (Index e = 0; e < count; ++e) {
    experts.push_back(make_expert<Expert>(e, rng));
    randomise(experts.back(), rng);
  }
  return experts;
}

using ExpertTypes = testing::Types<ReLUExpert, SwiGLUExpert, ClampedExpert, MixedExpert>;

// ---- Kinks.

// Distances to a kink, each in units of what one step changes at most.
struct Kinks {
  double nearest = 1e300;  // in steps
  Index crossed = 0;       // values on the far side: switched off or clamped

  void add(double value, double kink, double change_of_a_step) {
    nearest = std::min(nearest, std::abs(value - kink) / change_of_a_step);
  }
};

// Values before an activation, by dots; and what one step of any of their parts changes at most.
inline void before_activation(const Matrix<double>& w, const Vector<double>& b, const double* x, double step,
                              const std::function<void(double, double)>& f) {
  for (Index o = 0; o < w.rows(); ++o) {
    double sum = b.size() > 0 ? b[o] : 0, slope = 1;
    for (Index i = 0; i < w.cols(); ++i) {
      sum += w(o, i) * x[i];
      slope = std::max({slope, std::abs(w(o, i)), std::abs(x[i])});
    }
    f(sum, step * slope);
  }
}

template <class Activation>
void find_kinks(const moe::FeedForward<double, Activation>& expert, const double* x, double step,
                Kinks& kinks) {
  if constexpr (std::is_same_v<Activation, moe::ReLU>)
    before_activation(expert.w_up, expert.b_up, x, step, [&](double z, double change) {
      kinks.add(z, 0, change);
      kinks.crossed += z < 0;
    });
}

template <class Unit>
void find_kinks(const moe::GatedFeedForward<double, Unit>& expert, const double* x, double step,
                Kinks& kinks) {
  if constexpr (std::is_same_v<Unit, moe::ReGLU>)
    before_activation(expert.w_gate, expert.b_gate, x, step, [&](double z, double change) {
      kinks.add(z, 0, change);
      kinks.crossed += z < 0;
    });
  if constexpr (std::is_same_v<Unit, moe::ClampedSwiGLU>) {
    const double limit = expert.glu().limit;
    before_activation(expert.w_gate, expert.b_gate, x, step, [&](double z, double change) {
      kinks.add(z, limit, change);
      kinks.crossed += z > limit;
    });
    before_activation(expert.w_up, expert.b_up, x, step, [&](double z, double change) {
      kinks.add(std::abs(z), limit, change);
      kinks.crossed += std::abs(z) > limit;
    });
  }
}

template <class... Types>
void find_kinks(const moe::VariantExpert<Types...>& expert, const double* x, double step, Kinks& kinks) {
  std::visit([&](const auto& kind) { find_kinks(kind, x, step, kinks); }, expert.get());
}

// Kinks of all experts of a layer at the rows that reach them.
template <class Layer>
Kinks find_kinks(const Layer& layer, const Matrix<double>& x, const moe::DispatchPlan<double>& plan,
                 double step) {
  Kinks kinks;
  for (Index e = 0; e < layer.num_experts(); ++e)
    for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
      Matrix<double> input = x.row(plan.token[a]);
      if (plan.gate_side == moe::GateSide::input) input *= plan.gate[a];
      find_kinks(layer.experts()[std::size_t(e)], input.data(), step, kinks);
    }
  for (const auto& shared : layer.shared_experts())
    for (Index t = 0; t < x.rows(); ++t) find_kinks(shared, &x(t, 0), step, kinks);
  return kinks;
}

// load_loss has a kink where the expert that sets a threshold changes: the k-th and the (k+1)-th
// noisy logit. The choices show the former, this adds the latter.
template <class Router>
void find_threshold_kinks(const Router& router, const Matrix<double>& x, const moe::Routing<double>& routing,
                          double step, Kinks& kinks) {
  const moe::RoutingNoise<double>& noise = routing.noise;
  const auto next = std::size_t(noise.top_k);
  if (noise.empty() || noise.top_k + 1 >= routing.num_experts()) return;
  double largest = std::max(1.0, x.cwiseAbs().maxCoeff());
  Router::visit(
      [&](const moe::ParameterInfo&, const auto& w) { largest = std::max(largest, w.cwiseAbs().maxCoeff()); },
      router);
  for (Index t = 0; t < routing.num_tokens(); ++t) {
    std::vector<double> row(noise.noisy_logits.row(t).begin(), noise.noisy_logits.row(t).end());
    std::sort(row.begin(), row.end(), std::greater<>());
    const double change = step * largest * (1 + noise.draws.row(t).cwiseAbs().maxCoeff());
    kinks.add(row[next], row[next + 1], 2 * change);
  }
}

// Kinks of routers themselves: none, for most.
template <class Router>
void find_router_kinks(const Router&, const Matrix<double>&, const moe::Routing<double>&, double, Kinks&) {}

// SparseMixer's gates jump where an expert joins or leaves those that nearly tie with the best.
inline void find_router_kinks(const moe::SparseMixerRouter<double>& router, const Matrix<double>& x,
                              const moe::Routing<double>& routing, double step, Kinks& kinks) {
  const double largest = std::max({1.0, x.cwiseAbs().maxCoeff(), router.w_router.cwiseAbs().maxCoeff()});
  const Index experts = router.num_experts();
  for (Index t = 0; t < routing.num_tokens(); ++t) {
    if (!routing.is_valid(t)) continue;
    for (const Index without : {Index(-1), routing.chosen.expert[routing.chosen.token_begin[t]]}) {
      const double* const z = &routing.router_logits(t, 0);
      double best = -1e300;
      for (Index e = 0; e < experts; ++e)
        if (e != without) best = std::max(best, z[e]);
      for (Index e = 0; e < experts; ++e) {
        if (e == without || moe::is_equal(z[e], best)) continue;
        const double size = std::max(std::abs(z[e]), best), ratio = (best - z[e]) / size;
        kinks.add(ratio, 2 * router.options().jitter, 2 * step * largest * (1 + ratio) / size);
      }
    }
  }
}

// ---- Ways to seat.

struct Seating {
  std::optional<double> capacity{};
  Overflow overflow = Overflow::drop;
  Priority priority = Priority::token_order;
};

// Dropless, and every overflow policy and priority with half of the seats that are asked for.
inline std::vector<Seating> all_seatings() {
  std::vector<Seating> all{{}};
  for (const Overflow overflow : {Overflow::drop, Overflow::next_best, Overflow::pass_through})
    for (const Priority priority :
         {Priority::token_order, Priority::token_max_gate, Priority::assignment_gate})
      all.push_back({0.5, overflow, priority});
  return all;
}

template <class Options>
Options seated(Options options, const Seating& seating) {
  options.d_model = kDModel;
  options.num_experts = kNumExperts;
  options.capacity = options.training_capacity = seating.capacity;
  options.overflow = seating.overflow;
  options.priority = seating.priority;
  return options;
}

// ---- Losses.

enum class LossKind {
  none,
  load_balancing,
  importance_of_gates,
  importance_of_probs,
  load_two,
  load_one,
  z,
  balance_of_sequences,
  balance_of_devices,
  relu_balance
};
constexpr LossKind kAllLosses[] = {LossKind::none,
                                   LossKind::load_balancing,
                                   LossKind::importance_of_gates,
                                   LossKind::importance_of_probs,
                                   LossKind::load_two,
                                   LossKind::load_one,
                                   LossKind::z,
                                   LossKind::balance_of_sequences,
                                   LossKind::balance_of_devices,
                                   LossKind::relu_balance};
// Losses do not see shared experts: those after this one are checked without any.
constexpr LossKind kLastEverywhere = LossKind::z;

struct RoutingLoss {
  LossKind kind = LossKind::none;
  moe::BatchInfo info{};  // of the batch, for its sequences

  moe::Loss<double> operator()(const moe::Routing<double>& routing) const {
    switch (kind) {
      case LossKind::none:
        return {};
      case LossKind::load_balancing:
        return moe::load_balancing_loss(routing);
      case LossKind::importance_of_gates:
        return moe::importance_loss(routing);
      case LossKind::importance_of_probs:
        return moe::importance_loss(routing, moe::Importance::probs);
      case LossKind::load_two:
        return moe::load_loss(routing);
      case LossKind::load_one:
        return moe::load_loss(routing, moe::LoadThreshold::one);
      case LossKind::z:
        return moe::router_z_loss(routing);
      case LossKind::balance_of_sequences:
        return moe::sequence_balance_loss(routing, info);
      case LossKind::balance_of_devices: {
        moe::IndexVector device(routing.num_experts());
        for (Index e = 0; e < device.size(); ++e) device[e] = e % 2;
        return moe::device_balance_loss(routing, device);
      }
      case LossKind::relu_balance:
        return moe::relu_balance_loss(routing, 1);
    }
    return {};
  }
};

// ---- The check.

// What a test went through: one without drops would show nothing about drops.
struct Tally {
  Index combinations = 0, checks = 0, redraws = 0, most_redraws = 0, entries = 0;
  Index dropped = 0, passed_through = 0, moved = 0, beyond_kinks = 0;
  double worst = 0;

  void add(const moe::DispatchPlan<double>& plan, const moe::Choices<double>& chosen) {
    dropped += plan.dropped.size();
    passed_through += plan.passed_through.size();
    for (Index e = 0; e < plan.num_experts(); ++e)
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a)
        moved += chosen.expert[plan.choice[a]] != e;
  }

  // Draws inputs until f(x, report) returns true and nothing crossed within the margin; then the
  // gradients must agree.
  template <class F>
  void check(Index tokens, Rng& rng, const F& f) {
    Matrix<double> x(tokens, kDModel);
    for (int redraw = 0; redraw <= kMostRedraws; ++redraw) {
      moe::fill_normal(x, 1.0, rng);
      moe::GradientReport report;
      if (!f(x, report) || report.crossed > 0) continue;
      EXPECT_LE(report.worst, kTolerance)
          << report.where << ": " << report.analytic << ", by differences " << report.numeric;
      ++checks;
      entries += report.checked;
      redraws += redraw;
      most_redraws = std::max<Index>(most_redraws, redraw);
      worst = std::max(worst, report.worst);
      return;
    }
    ADD_FAILURE() << "no fit input in " << kMostRedraws << " draws";
  }
};

// Checks a layer with a loss on its routing, in training mode where options.rng is there.
template <class Layer>
void check_layer(const Layer& layer, const moe::GradientCheckOptions& options, RoutingLoss loss, Rng& rng,
                 Tally& tally) {
  tally.check(kTokens, rng, [&](const Matrix<double>& x, moe::GradientReport& report) {
    typename Layer::Cache cache;
    if (options.rng) {
      Rng copy = *options.rng;
      layer.forward(x, copy, cache, options.info, moe::Sequential{});
    } else {
      layer.forward(x, cache, options.info, moe::Sequential{});
    }
    Kinks kinks = find_kinks(layer, x, cache.routing.plan, options.step);
    if (loss.kind == LossKind::load_two)
      find_threshold_kinks(layer.router(), x, cache.routing, options.step, kinks);
    find_router_kinks(layer.router(), x, cache.routing, options.step, kinks);
    if (kinks.nearest <= options.margin) return false;
    report = moe::check_gradients(layer, x, options, loss);
    if (report.crossed > 0) return false;
    tally.add(cache.routing.plan, cache.routing.chosen);
    tally.beyond_kinks += kinks.crossed;
    return true;
  });
}

enum class Shared { none, plain, gated };

template <class Expert, class Router>
moe::MoELayer<Expert, Router> make_layer(const Router& router, Shared shared, bool output_bias, Rng& rng) {
  const Index count = shared == Shared::none ? 0 : shared == Shared::plain ? 1 : 2;
  moe::MoELayer<Expert, Router> layer(make_experts<Expert>(router.num_experts(), rng), router,
                                      {make_experts<Expert>(count, rng), shared == Shared::gated},
                                      output_bias);
  if (shared == Shared::gated) moe::fill_normal(layer.w_shared_gate, 0.7, rng);
  if (output_bias) moe::fill_normal(layer.b_output, 0.7, rng);
  return layer;
}

// Losses that check_all_layers puts beside a router with no shared experts, plain and gated ones.
constexpr Index kLossesOfARouter = 10 + 7 + 7;

// A router beside every kind of shared experts and every loss, in training and in inference; half
// of the layers with an output bias, a third of the batches with padding and groups. In training
// only where gradients are exact there.
template <class Expert, class Router>
void check_all_layers(const Router& router, Rng& rng, Tally& tally, bool exact_in_training = true) {
  for (const Shared shared : {Shared::none, Shared::plain, Shared::gated}) {
    if constexpr (requires { router.options().gate_side; })
      if (shared == Shared::gated && router.options().gate_side == moe::GateSide::input) continue;
    for (const LossKind loss : kAllLosses) {
      if (shared != Shared::none && loss > kLastEverywhere) continue;
      for (const bool training : {true, false}) {
        if (training && !exact_in_training) continue;
        if (tally.combinations++ % kEvery != 0) continue;
        SCOPED_TRACE("shared experts " + std::to_string(int(shared)) + ", loss " + std::to_string(int(loss)) +
                     (training ? ", training" : ", inference"));
        moe::GradientCheckOptions options;
        if (training) options.rng = Rng(rng());
        if (rng.index(3) == 0) {
          options.info.mask = moe::Mask::Constant(kTokens, true);
          options.info.mask[2] = false;
          options.info.group_begin = moe::IndexVector{{0, 3, kTokens}};
        }
        check_layer(make_layer<Expert>(router, shared, rng.index(2) == 0, rng), options, {loss, options.info},
                    rng, tally);
      }
    }
  }
}

inline std::string name_of(const Seating& seating) {
  return "capacity " + (seating.capacity ? std::to_string(*seating.capacity) : "none") + ", overflow " +
         std::to_string(int(seating.overflow)) + ", priority " + std::to_string(int(seating.priority));
}

// check_all_layers for every way to seat. make(seating) makes the router.
template <class Expert, class MakeRouter>
Tally check_all_seatings(std::uint64_t seed, const MakeRouter& make) {
  Tally tally;
  tally.combinations = Index(seed);  // where not all are checked, others for every seed
  Rng rng(seed);
  for (const Seating& seating : all_seatings()) {
    SCOPED_TRACE(name_of(seating));
    auto router = make(seating, rng);
    randomise(router, rng);
    check_all_layers<Expert>(router, rng, tally);
  }
  EXPECT_GE(tally.checks, 10 * (10 + 7) * 2 / kEvery);
  if (kSanitized) return tally;  // a part may lack what is rare
  EXPECT_LE(tally.redraws, tally.checks / 2);
  EXPECT_GT(tally.dropped, tally.checks);
  EXPECT_GT(tally.passed_through, 0);
  EXPECT_GT(tally.moved, 0);
  if (!std::is_same_v<Expert, SwiGLUExpert>) {
    EXPECT_GT(tally.beyond_kinks, tally.checks);
  }
  return tally;
}

}  // namespace gradients
