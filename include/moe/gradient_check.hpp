// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/balance/loss.hpp>
#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/experts/expert.hpp>
#include <moe/math/init.hpp>
#include <moe/math/softmax.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/router.hpp>

// Backward passes against central differences, for the library's tests and for experts, routers, layers and
// models of your own. Everything runs on the calling thread.
namespace moe {

/// How check_gradients compares.
struct GradientCheckOptions {
  double step = 1e-5;        ///< h of (f(x + h) - f(x - h)) / 2h
  double margin = 100;       ///< the routing must be the same this many steps away, see crossed
  double floor = 1e-3;       ///< errors are relative to the largest entry of an array, at least this
  std::uint64_t seed = 1;    ///< of the random weights with which outputs are summed up
  std::optional<Rng> rng{};  ///< training mode: every evaluation uses a copy of it
  BatchInfo info{};          ///< of the batch, for routers and layers
};

/// What check_gradients found.
struct GradientReport {
  /// Largest |analytic - numeric| of an array over the larger of its largest entry, analytic or
  /// numeric, and options.floor; the worst of all arrays. A correct backward pass in double gives
  /// less than 1e-6; NaN and infinity count as the largest double.
  double worst = 0;
  std::string where;    ///< the array where that was
  double analytic = 0;  ///< the entry where that was
  double numeric = 0;   ///< the same by central differences
  Index checked = 0;    ///< number of entries compared
  Index crossed = 0;    ///< entries at which a routing changed within the margin: if any, the
                        ///< numbers mean nothing and x should be drawn again
};

/// What selection decided in the routings that an objective adds. Where that changes its slope may jump.
class RoutingSignature {
 public:
  /// Adds what one routing decided. O(choices + tokens * num_experts).
  void add(const Routing<double>& r) {
    append(r.plan.expert_begin);
    append(r.plan.token);
    append(r.plan.passed_through);
    append(r.chosen.expert);
    if (r.noise.empty()) return;
    // Each token's best top_k + 1 experts: load_loss takes the last two as thresholds.
    Buffer<Index> best;
    const Index k = (std::min)(r.noise.top_k + 1, r.num_experts());
    best.assign(r.num_tokens() * k, 0);
    for (Index t = 0; t < r.num_tokens(); ++t)
      if (r.is_valid(t)) top_k(r.num_experts(), &r.noise.noisy_logits(t, 0), k, &best[t * k]);
    append(best);
  }
  /// Forgets all routings.
  void clear() { decided_.clear(); }
  friend bool operator==(const RoutingSignature&, const RoutingSignature&) = default;

 private:
  void append(const Buffer<Index>& part) {
    decided_.push_back(part.size());
    decided_.insert(decided_.end(), part.begin(), part.end());
  }
  std::vector<Index> decided_;
};

namespace detail {

template <class Thing>
inline constexpr bool kIsDouble = std::is_same_v<typename Thing::Scalar, double>;

struct GradientArray {
  std::string name;
  double* value;  // perturbed in place
  const double* analytic;
  Index size;
};

// value(signature) evaluates the objective at the present values of the arrays.
template <class Value>
GradientReport compare_gradients(const std::vector<GradientArray>& arrays,
                                 const GradientCheckOptions& options, const Value& value) {
  constexpr double kWorst = (std::numeric_limits<double>::max)();  // stands for NaN and infinity
  const auto positive = [](double v, const char* what) {
    require(number_kind(v) == NumberKind::finite && v > 0, "check_gradients: options.", what, " = ", v,
            ", expected a finite number above 0");
  };
  positive(options.step, "step");
  positive(options.margin, "margin");
  positive(options.floor, "floor");
  GradientReport report;
  RoutingSignature here, there;
  value(here);
  for (const GradientArray& array : arrays) {
    double largest = options.floor, error = 0, worst_analytic = 0, worst_numeric = 0;
    for (Index i = 0; i < array.size; ++i) {
      const double center = array.value[i];
      double at[2];
      bool crossed = false;
      for (const int side : {0, 1}) {
        const double sign = side == 0 ? -1 : 1;
        array.value[i] = center + sign * options.margin * options.step;
        there.clear();
        value(there);
        crossed |= !(there == here);
        array.value[i] = center + sign * options.step;
        there.clear();
        at[side] = value(there);
        crossed |= !(there == here);
      }
      array.value[i] = center;
      report.crossed += crossed;
      ++report.checked;
      const double numeric = (at[1] - at[0]) / (2 * options.step);
      const double analytic = array.analytic[i];
      largest = (std::max)({largest, std::abs(numeric), std::abs(analytic)});
      double difference = std::abs(analytic - numeric);
      if (number_kind(difference) != NumberKind::finite) difference = kWorst;
      if (difference > error) {
        error = difference;
        worst_analytic = analytic;
        worst_numeric = numeric;
      }
    }
    const double relative = is_equal(error, kWorst) ? kWorst : error / largest;
    if (relative > report.worst) {
      report.worst = relative;
      report.where = array.name;
      report.analytic = worst_analytic;
      report.numeric = worst_numeric;
    }
  }
  return report;
}

// Lists the arrays of a thing and of its gradient.
template <class Thing>
void add_arrays(Thing& thing, const Thing& grad, std::vector<GradientArray>& arrays) {
  Thing::visit(
      [&](const ParameterInfo& info, auto& value, const auto& analytic) {
        using S = typename std::remove_cvref_t<decltype(value)>::Scalar;
        static_assert(std::is_same_v<S, double> || std::is_integral_v<S>, "check_gradients needs double");
        if constexpr (std::is_same_v<S, double>)
          if (info.kind == Kind::parameter)
            arrays.push_back({std::string(info.name), value.data(), analytic.data(), value.size()});
      },
      thing, grad);
}

// The same, after x with d_x.
template <class Thing>
std::vector<GradientArray> gradient_arrays(Thing& thing, const Thing& grad, Matrix<double>& x,
                                           const Matrix<double>& d_x) {
  std::vector<GradientArray> arrays{{"x", x.data(), d_x.data(), x.size()}};
  if constexpr (requires { Thing::visit([](const ParameterInfo&, auto&...) {}, thing); })
    add_arrays(thing, grad, arrays);
  return arrays;
}

inline Matrix<double> random_weights(Index rows, Index cols, Rng& rng) {
  Matrix<double> weights(rows, cols);
  fill_uniform(weights, -1, 1, rng);
  return weights;
}

struct NoLoss {
  Loss<double> operator()(const Routing<double>&) const { return {}; }
};

}  // namespace detail

/// Checks an expert: d_x and every parameter's gradient of a random weighted sum of its output, for
/// x [rows, d_model], in double. O(parameters) forward passes: keep it small. Throws
/// std::invalid_argument for a step, margin or floor that is not positive.
/// @code
/// moe::Rng rng(1);
/// const moe::GatedFeedForward<double> expert({.d_model = 4, .d_ff = 6}, rng);
/// moe::Matrix<double> x(5, 4);
/// moe::fill_normal(x, 1.0, rng);
/// assert(moe::check_gradients(expert, x).worst < 1e-6);
/// @endcode
template <TrainableExpert E>
GradientReport check_gradients(const E& expert, Matrix<double> x, const GradientCheckOptions& options = {}) {
  static_assert(detail::kIsDouble<E>, "check_gradients needs double: MyType<double>");
  Rng rng(options.seed);
  const Matrix<double> d_y = detail::random_weights(x.rows(), x.cols(), rng);
  E work = expert, grad = zeros_like(expert);
  Matrix<double> y(x.rows(), x.cols()), d_x(x.rows(), x.cols());
  Matrix<double> cache(x.rows(), expert.cache_cols());
  expert.forward(x, y, cache);
  expert.backward(x, d_y, cache, d_x, grad);
  return detail::compare_gradients(detail::gradient_arrays(work, grad, x, d_x), options,
                                   [&](RoutingSignature&) {
                                     work.forward(x, y, cache);
                                     return d_y.cwiseProduct(y).sum();
                                   });
}

/// Checks a router: d_x and every parameter's gradient of a random weighted sum of router_logits,
/// router_probs, the noise's stddev, the chosen gates and the plan's gates.
template <TrainableRouter R>
GradientReport check_gradients(const R& router, Matrix<double> x, const GradientCheckOptions& options = {}) {
  static_assert(detail::kIsDouble<R>, "check_gradients needs double: MyType<double>");
  R work = router, grad = zeros_like(router);
  Routing<double> routing;
  const auto route_with = [&](auto&... rng) {
    if constexpr (requires { work.route(x, rng..., options.info, routing, Sequential{}); })
      work.route(x, rng..., options.info, routing, Sequential{});
    else
      work.route(x, rng..., options.info, routing);
  };
  const auto route = [&] {
    if constexpr (requires(Rng & rng) { work.route(x, rng, options.info, routing); }) {
      if (options.rng) {
        Rng rng = *options.rng;
        return route_with(rng);
      }
    }
    route_with();
  };
  route();
  Rng rng(options.seed);
  RoutingGradient<double> weights;
  if (routing.router_logits.size() > 0)  // a router of routers has none
    weights.d_router_logits = detail::random_weights(x.rows(), router.num_experts(), rng);
  weights.d_router_probs = detail::random_weights(x.rows(), router.num_experts(), rng);
  if (!routing.noise.empty())
    weights.d_noise_stddev = detail::random_weights(x.rows(), router.num_experts(), rng);
  for (Index i = 0; i < routing.chosen.size(); ++i) weights.d_chosen_gate.push_back(rng.uniform(-1, 1));
  for (Index i = 0; i < routing.plan.num_assignments(); ++i) weights.d_gate.push_back(rng.uniform(-1, 1));
  for (Index i = 0; i < routing.router_logits.size(); ++i)
    if (is_unavailable(routing.router_logits.data()[i])) weights.d_router_logits.data()[i] = 0;
  Matrix<double> d_x = Matrix<double>::Zero(x.rows(), x.cols());
  Matrix<double> valid_x = x;
  for (Index t = 0; t < x.rows(); ++t)
    if (!routing.is_valid(t)) valid_x.row(t).setZero();
  RouterWorkspace<double> workspace;
  route_backward_with(work, valid_x, routing, weights, d_x, grad, workspace, Sequential{});
  return detail::compare_gradients(
      detail::gradient_arrays(work, grad, x, d_x), options, [&](RoutingSignature& seen) {
        route();
        seen.add(routing);
        double sum = 0;
        for (Index t = 0; t < x.rows(); ++t) {
          if (!routing.is_valid(t)) continue;
          sum += weights.d_router_probs.row(t).dot(routing.router_probs.row(t));
          if (!routing.noise.empty()) sum += weights.d_noise_stddev.row(t).dot(routing.noise.stddev.row(t));
          if (weights.d_router_logits.size() == 0) continue;
          for (Index e = 0; e < routing.num_experts(); ++e)  // 0 times minus infinity would be NaN
            if (!is_equal(weights.d_router_logits(t, e), 0.0))
              sum += weights.d_router_logits(t, e) * routing.router_logits(t, e);
        }
        const Index choices = (std::min)(routing.chosen.size(), weights.d_chosen_gate.size());
        for (Index i = 0; i < choices; ++i) sum += weights.d_chosen_gate[i] * routing.chosen.gate[i];
        const Index kept = (std::min)(routing.plan.num_assignments(), weights.d_gate.size());
        for (Index i = 0; i < kept; ++i) sum += weights.d_gate[i] * routing.plan.gate[i];
        return sum;
      });
}

/// Checks a layer: d_x and every parameter's gradient of a random weighted sum of its output, plus
/// `loss(routing)`, e.g. `[](const auto& r) { return moe::load_balancing_loss(r); }`.
template <class Layer, class RoutingLoss = detail::NoLoss>
requires requires {
  typename Layer::Cache;
  typename Layer::Workspace;
}
GradientReport check_gradients(const Layer& layer, Matrix<double> x, const GradientCheckOptions& options = {},
                               const RoutingLoss& loss = {}) {
  static_assert(detail::kIsDouble<Layer>, "check_gradients needs double: MyType<double>");
  Layer work = layer, grad = zeros_like(layer);
  typename Layer::Cache cache;
  Matrix<double> y;
  const auto forward = [&] {
    if (options.rng) {
      Rng rng = *options.rng;
      work.forward(x, rng, y, cache, options.info, Sequential{});
    } else {
      work.forward(x, y, cache, options.info, Sequential{});
    }
  };
  forward();
  Rng rng(options.seed);
  const Matrix<double> d_y = detail::random_weights(x.rows(), x.cols(), rng);
  Matrix<double> d_x;
  layer.backward(d_y, cache, grad, loss(cache.routing).gradient, d_x, Sequential{});
  return detail::compare_gradients(detail::gradient_arrays(work, grad, x, d_x), options,
                                   [&](RoutingSignature& seen) {
                                     forward();
                                     seen.add(cache.routing);
                                     return d_y.cwiseProduct(y).sum() + loss(cache.routing).value;
                                   });
}

/// Checks a function of everything that is visited of a model of your own, e.g. of two layers and an
/// embedding: objective(model, grad) returns its value and, unless grad is null, adds its gradient to what
/// grad points to. Called with the same arrays it must return the same: where it needs random numbers, it
/// copies an Rng. An objective(model, grad, signature) adds its routings to the signature, which is how
/// crossed counts. options.rng and options.info are not used. O(parameters) evaluations. Throws as the others
/// do, and where the gradient has lost its shape. Example: check_gradients(model, [&](const auto& m, auto*
/// grad) { ... }).
template <class Model, class Objective>
requires(!std::is_convertible_v<const Objective&, Matrix<double>> &&
         (std::is_invocable_r_v<double, const Objective&, const Model&, Model*> ||
          std::is_invocable_r_v<double, const Objective&, const Model&, Model*, RoutingSignature&>))
    GradientReport check_gradients(const Model& model, const Objective& objective,
                                   const GradientCheckOptions& options = {}) {
  Model work = model, grad = zeros_like(model);
  const auto value = [&](Model* to, RoutingSignature& signature) -> double {
    if constexpr (std::is_invocable_v<const Objective&, const Model&, Model*>)
      return objective(std::as_const(work), to);
    else
      return objective(std::as_const(work), to, signature);
  };
  RoutingSignature unused;
  value(&grad, unused);
  std::vector<detail::GradientArray> arrays;
  detail::add_arrays(work, grad, arrays);
  return detail::compare_gradients(arrays, options,
                                   [&](RoutingSignature& signature) { return value(nullptr, signature); });
}

}  // namespace moe
