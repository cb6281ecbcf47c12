// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <vector>

#include <moe/balance/loss.hpp>
#include <moe/core/check.hpp>
#include <moe/core/reused.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/routing.hpp>

// The load that noise makes differentiable: how many tokens an expert would get under fresh noise.
namespace moe {

/// How load_loss asks whether an expert would be chosen again under fresh noise.
enum class LoadThreshold {
  /// An expert among the k is measured against the (k+1)-th noisy logit, another against the k-th
  /// (Shazeer et al. 2017, eq. 8 to 10; tensor2tensor).
  two,
  /// Every expert is measured against the k-th noisy logit (V-MoE).
  one,
};

namespace detail {

// The estimated load of every expert, and its derivative.
template <class S>
class EstimatedLoad {
 public:
  EstimatedLoad(const Routing<S>& routing, LoadThreshold threshold, const char* where)
      : routing_(routing), threshold_(threshold) {
    const Index tokens = routing.num_tokens(), experts = routing.num_experts();
    const RoutingNoise<S>& noise = routing.noise;
    check_plan_arrays(routing.plan, where);
    check_choices(routing.chosen, tokens, experts, where);
    const Index least = noise.empty() ? 0 : 1;
    require(noise.top_k >= least && noise.top_k <= experts, where, ": noise.top_k = ", noise.top_k,
            " is not between ", least, " and num_experts = ", experts);
    if (!noise.empty()) {
      require_shape(routing.router_logits, tokens, experts, where, "router_logits");
      require_shape(noise.draws, tokens, experts, where, "noise.draws");
      require_shape(noise.stddev, tokens, experts, where, "noise.stddev");
      require_shape(noise.noisy_logits, tokens, experts, where, "noise.noisy_logits");
    }
    best_.resize((std::min)(noise.top_k + 1, experts));
    values.setZero(experts);
    for (Index t = 0; t < tokens; ++t) {
      if (!routing.is_valid(t)) continue;
      if (is_estimated(t)) {
        estimate(t, [&](Index e, Index, S u) {
          values[e] += Sum<S>(S(0.5) * (S(1) + std::erf(u * S(1 / std::numbers::sqrt2))));
        });
      } else {
        const Choices<S>& chosen = routing.chosen;
        for (Index c = chosen.token_begin[t]; c < chosen.token_begin[t + 1]; ++c)
          values[chosen.expert[c]] += 1;
      }
    }
  }

  Vector<Sum<S>> values;  // [num_experts]

  RoutingGradient<S> backward(const Vector<Sum<S>>& d_values) {
    const Index tokens = routing_.num_tokens(), experts = routing_.num_experts();
    const RoutingNoise<S>& noise = routing_.noise;
    RoutingGradient<S> gradient;
    ReusedMatrix<S>& d_logits = gradient.d_router_logits;
    ReusedMatrix<S>& d_stddev = gradient.d_noise_stddev;
    d_logits.setZero(tokens, experts);
    if (!noise.empty()) d_stddev.setZero(tokens, experts);
    for (Index t = 0; t < tokens; ++t) {
      if (!routing_.is_valid(t) || !is_estimated(t)) continue;
      estimate(t, [&](Index e, Index limit, S u) {
        constexpr S kDensity = S(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
        const S d_u = S(d_values[e]) * kDensity * std::exp(S(-0.5) * u * u);
        const S d = d_u / noise.stddev(t, e);
        d_logits(t, e) += d;
        d_stddev(t, e) -= u * d;
        d_logits(t, limit) -= d;  // noisy = logit + draw * stddev
        d_stddev(t, limit) -= noise.draws(t, limit) * d;
      });
    }
    return gradient;
  }

 private:
  // Whether there is noise, and an expert that the token did not take; best_ is then its noisy
  // order.
  bool is_estimated(Index t) {
    const RoutingNoise<S>& noise = routing_.noise;
    const Index experts = routing_.num_experts();
    if (noise.empty() || best_.size() <= noise.top_k) return false;
    top_k(experts, &noise.noisy_logits(t, 0), noise.top_k + 1, best_.data());
    if (is_unavailable(noise.noisy_logits(t, best_[noise.top_k]))) return false;
    for (Index e = 0; e < experts; ++e)
      if (!(noise.stddev(t, e) > S(0))) return false;
    return true;
  }

  // For every expert of an estimated token: f(e, the expert that sets the threshold, u), of Phi(u).
  template <class F>
  void estimate(Index t, const F& f) const {
    const RoutingNoise<S>& noise = routing_.noise;
    const S* const noisy = &noise.noisy_logits(t, 0);
    for (Index e = 0; e < routing_.num_experts(); ++e) {
      if (is_unavailable(noisy[e])) continue;
      const bool inside = threshold_ == LoadThreshold::two && noisy[e] > noisy[best_[noise.top_k]];
      const Index limit = best_[inside ? noise.top_k : noise.top_k - 1];
      f(e, limit, (routing_.router_logits(t, e) - noisy[limit]) / noise.stddev(t, e));
    }
  }

  const Routing<S>& routing_;
  LoadThreshold threshold_;
  IndexVector best_;
};

template <class S>
void require_no_noise_in_levels(const Routing<S>& routing) {
  for (std::size_t level = 0; level < routing.levels.size(); ++level) {
    require(routing.levels[level].noise.empty(), "load_loss: level ", level, " of ", routing.levels.size(),
            " has noise: use hierarchical_load_loss");
    require_no_noise_in_levels(routing.levels[level]);
  }
}

}  // namespace detail

/// CV^2 of the experts' estimated load (Shazeer et al. 2017, eq. 8 to 11, without the coefficient):
/// load_e = sum over t of Phi((logit_te - threshold_te) / stddev_te). As in the authors' code the
/// thresholds are not constants: the gradient flows into the logits and the noise that set them.
/// Without noise (inference, or k = number of available experts) load is the number of tokens that
/// chose the expert and the gradient is zero. Gradient by router_logits and by the noise's stddev.
/// O(tokens * num_experts * top_k). Throws std::invalid_argument when the members of the routing do
/// not fit each other, and for a HierarchicalRouter's whose levels have noise: see
/// hierarchical_load_loss.
template <class S>
Loss<S> load_loss(const Routing<S>& routing, LoadThreshold threshold = LoadThreshold::two) {
  detail::require_no_noise_in_levels(routing);
  detail::EstimatedLoad<S> load(routing, threshold, "load_loss");
  Loss<S> loss;
  loss.value = S(squared_variation(load.values));
  loss.gradient = load.backward(load.values);
  return loss;
}

/// A loss of a hierarchy, with its gradient by every one of routing.levels.
template <class S>
struct LevelsLoss {
  S value = 0;                                ///< without a coefficient
  std::vector<RoutingGradient<S>> gradients;  ///< by each of routing.levels
};

/// load_loss of a HierarchicalRouter's routing (Shazeer et al. 2017, appendix B, eq. 14 with eq.
/// 11): CV^2 over all experts (i, j) of
///   load_ij = load_i * load_ij of child i / tokens that chose group i
/// with the estimated loads of the parent and of the children; 0 for a group that no token chose.
/// The number of tokens is a constant to the gradient. `routing` is of one hierarchy of two levels.
/// Pass the gradients to HierarchicalRouter::backward_levels. O(tokens * num_experts * top_k).
/// Throws std::invalid_argument when levels are missing, have levels themselves or do not fit each
/// other.
template <class S>
LevelsLoss<S> hierarchical_load_loss(const Routing<S>& routing,
                                     LoadThreshold threshold = LoadThreshold::two) {
  constexpr const char* kWhere = "hierarchical_load_loss";
  require(routing.levels.size() >= 2, kWhere, ": the routing has ", routing.levels.size(),
          " levels, expected a parent's and at least 1 child's");
  const Index groups = Index(routing.levels.size()) - 1;
  require(routing.levels[0].num_experts() == groups, kWhere, ": the parent has ",
          routing.levels[0].num_experts(), " experts, expected ", groups, " children");
  const Index leaves = routing.levels[1].num_experts();
  std::vector<detail::EstimatedLoad<S>> load;
  for (std::size_t level = 0; level < routing.levels.size(); ++level) {
    const Routing<S>& of_level = routing.levels[level];
    require(of_level.levels.empty(), kWhere, ": level ", level, " has ", of_level.levels.size(),
            " levels itself, expected 0");
    require(level == 0 || of_level.num_experts() == leaves, kWhere, ": level ", level, " has ",
            of_level.num_experts(), " experts, expected ", leaves);
    load.emplace_back(of_level, threshold, kWhere);
  }
  const auto share = [&](Index i) {  // 1 / tokens of group i
    const Index tokens = routing.levels[std::size_t(i) + 1].plan.num_valid_tokens();
    return tokens > 0 ? Sum<S>(1) / Sum<S>(tokens) : Sum<S>(0);
  };
  Vector<Sum<S>> all(groups * leaves);
  for (Index i = 0; i < groups; ++i)
    all.segment(i * leaves, leaves) = load[0].values[i] * share(i) * load[std::size_t(i) + 1].values;
  LevelsLoss<S> loss;
  loss.value = S(squared_variation(all));
  Vector<Sum<S>> d_parent(groups);
  loss.gradients.resize(routing.levels.size());
  for (Index i = 0; i < groups; ++i) {
    detail::EstimatedLoad<S>& child = load[std::size_t(i) + 1];
    const auto d = all.segment(i * leaves, leaves);
    d_parent[i] = share(i) * d.dot(child.values);
    loss.gradients[std::size_t(i) + 1] = child.backward(load[0].values[i] * share(i) * d);
  }
  loss.gradients[0] = load[0].backward(d_parent);
  return loss;
}

}  // namespace moe
