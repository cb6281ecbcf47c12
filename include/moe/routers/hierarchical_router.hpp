// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/reused.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/check_router.hpp>
#include <moe/routing/router.hpp>
#include <moe/routing/router_workspace.hpp>

namespace moe {

/// A router over a groups of experts, the parent, and in each group a router over its b experts, a
/// child (Shazeer et al. 2017, appendix B, eq. 12):
///   y = sum over i of sum over j of G_i(x) G_ij(x) E_ij(x)
/// with the parent's gates G_i, the gates G_ij of child i, and the leaf expert E_ij, which has the
/// number i * b + j of num_experts = a * b. A child sees the tokens that chose its group; it finds
/// the others masked. Children may be hierarchical themselves.
///
/// The routing is over leaves:
/// - chosen: every pair of a parent's choice and that child's choice, with the product of their
///   gates; a token's largest gate first, because losses take the first choice for the best one;
///   ties to the lower leaf. All are seated: a hierarchy is dropless, and routers with a capacity
///   are refused.
/// - router_probs: the product of the parent's and the child's. A child that did not see a token
///   says nothing about it: its leaves share their group's probability equally. So they sum to 1,
///   and the gradient of load_balancing_loss reaches the groups that were not chosen.
/// - router_logits: none. There is one set of logits a level; losses that need them refuse.
/// - levels: the routing of the parent, then that of every child.
/// A token that any level finds poisoned is poisoned, and masked for all the others: also one that chose
/// a group of which no expert is available to it, even where other groups have some.
///
/// Losses on leaves: importance_loss(routing) is CV^2 of the importance of eq. 13, sum over x of
/// G_i(x) G_ij(x); load_balancing_loss(routing) works as well. The loss of eq. 14 is
/// hierarchical_load_loss(routing); its gradients by levels, and those of any other losses on levels, go
/// through backward_levels. load_loss(routing) refuses noise that only levels see.
///
/// Cost: O(tokens * num_experts * d_model), because a child computes the logits of all tokens,
/// masked ones too. So routing is no cheaper than by one router over all leaves; in return the
/// rules of masks, groups and noise hold at every level.
/// @code
/// moe::Rng rng(1);
/// const moe::TopKRouter<float> parent({.d_model = 16, .num_experts = 4}, rng);
/// std::vector<moe::TopKRouter<float>> children;
/// for (int i = 0; i < 4; ++i)
///   children.emplace_back(moe::TopKOptions{.d_model = 16, .num_experts = 8}, rng);
/// assert(moe::HierarchicalRouter(parent, children).num_experts() == 32);
/// @endcode
template <TrainableRouter Parent, TrainableRouter Child = Parent>
class HierarchicalRouter {
 public:
  using Scalar = typename Parent::Scalar;
  using S = Scalar;
  static_assert(std::is_same_v<S, typename Child::Scalar>,
                "the parent and the children must have the same Scalar");

  /// `children` are as many as the parent has experts, of the parent's d_model and all with the
  /// same number of experts. Throws std::invalid_argument otherwise, for a router with a capacity, and for
  /// one whose gates scale another side than the parent's.
  HierarchicalRouter(Parent parent, std::vector<Child> children)
      : parent_(std::move(parent)), children_(std::move(children)) {
    check_parts("HierarchicalRouter");
  }

  Index d_model() const { return parent_.d_model(); }
  Index num_experts() const { return num_children() * leaves(); }
  /// Number of groups of experts.
  Index num_children() const { return Index(children_.size()); }
  /// The router over groups.
  Parent& parent() { return parent_; }
  /// The same, read-only.
  const Parent& parent() const { return parent_; }
  /// The routers within groups.
  std::span<Child> children() { return children_; }
  /// The same, read-only.
  std::span<const Child> children() const { return children_; }
  /// What gates multiply, where its routers say so.
  std::optional<GateSide> gate_side() const { return gate_side_of(parent_); }

  /// Most leaves that a token chooses, or 0 where a level does not say.
  Index choices_per_token() const {
    return most_choices(parent_) * (children_.empty() ? 0 : most_choices(children_[0]));
  }

  /// Routing for inference. O(tokens * num_experts * d_model); a token that only a child finds
  /// poisoned costs another pass. Throws std::invalid_argument when parts or `info` do not fit, and
  /// for a level that drops choices or whose gates scale another side than the parent's.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    route_levels(x, nullptr, info, routing, workspace, executor);
  }

  /// Routing for training. The parent draws first, then every child in turn, each for all tokens.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, Rng& rng, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    route_levels(x, &rng, info, routing, workspace, executor);
  }

  /// Adds to d_x [tokens, d_model] and to grad's parameters: exact through both factors of every
  /// gate and of every probability. `x` has zeros in rows of tokens that are not valid.
  /// O(tokens * num_experts * d_model). Throws std::invalid_argument when arguments do not fit, and
  /// for a gradient by leaves' logits or noise that is not zero: there are none.
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, HierarchicalRouter& grad, RouterWorkspace<S>& workspace,
                const E& executor = {}) const {
    constexpr const char* kWhere = "HierarchicalRouter::backward";
    check_backward(x, routing, grad);
    check_router_operands(x, routing, gradient, d_x, grad, workspace, kWhere);
    check_routing_gradient(gradient, routing, kWhere);
    for (const ReusedMatrix<S>* d : {&gradient.d_router_logits, &gradient.d_noise_stddev})
      require(std::all_of(d->data(), d->data() + d->size(), [](S v) { return is_equal(v, S(0)); }), kWhere,
              ": a gradient by logits or noise of [", d->rows(), ", ", d->cols(),
              "] leaves that is not zero, expected none: see backward_levels");
    HierarchyWorkspace<S>& own = workspace.hierarchy;
    Buffer<S>& d_leaf = own.d_gate;
    d_leaf.reserve(routing.chosen.gate.capacity());
    d_leaf.assign(routing.chosen.size(), S(0));
    for (Index c = 0; c < gradient.d_chosen_gate.size(); ++c) d_leaf[c] = gradient.d_chosen_gate[c];
    for (Index a = 0; a < gradient.d_gate.size(); ++a) d_leaf[routing.plan.choice[a]] += gradient.d_gate[a];
    const bool by_gates = !gradient.d_chosen_gate.empty() || !gradient.d_gate.empty();
    const bool by_probs = gradient.d_router_probs.size() > 0;
    own.levels.resize(routing.levels.size());
    for (Index level = 0; level <= num_children(); ++level) {
      RoutingGradient<S>& of_level = level == 0 ? own.d_parent : own.d_child;
      if (by_probs)
        probs_backward(routing, level, gradient.d_router_probs, of_level.d_router_probs);
      else
        of_level.d_router_probs.resize(0, 0);
      if (by_gates)
        gates_backward(routing, level, d_leaf, of_level.d_chosen_gate);
      else
        of_level.d_chosen_gate.clear();
      level_backward(level, x, routing, of_level, d_x, grad, workspace, executor);
    }
  }

  /// The same for losses on levels: `gradients` has one entry for each of routing.levels, in that
  /// order; an empty one means zero. Call it after the layer's backward, with the same cache:
  ///   auto [value, on_levels] = hierarchical_load_loss(cache.routing);
  ///   for (auto& gradient : on_levels) gradient = 0.1f * gradient;
  ///   layer.router().backward_levels(cache.x, cache.routing, on_levels, d_x, grad.router());
  template <Executor E = DefaultExecutor>
  void backward_levels(const ConstMatrixRef<S>& x, const Routing<S>& routing,
                       std::span<const RoutingGradient<S>> gradients, MatrixRef<S> d_x,
                       HierarchicalRouter& grad, RouterWorkspace<S>& workspace,
                       const E& executor = {}) const {
    constexpr const char* kWhere = "HierarchicalRouter::backward_levels";
    require(gradients.size() == children_.size() + 1, kWhere, ": ", gradients.size(),
            " gradients, expected 1 + ", children_.size(), " children");
    check_backward(x, routing, grad);
    for (const RoutingGradient<S>& gradient : gradients)
      check_router_operands(x, routing, gradient, d_x, grad, workspace, kWhere);
    for (std::size_t level = 0; level < gradients.size(); ++level)
      check_routing_gradient(gradients[level], routing.levels[level], kWhere);
    workspace.hierarchy.levels.resize(routing.levels.size());
    for (std::size_t level = 0; level < gradients.size(); ++level)
      level_backward(Index(level), x, routing, gradients[level], d_x, grad, workspace, executor);
  }

  /// The same with a workspace of its own, here and below: it allocates.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    route(x, info, routing, workspace, executor);
  }
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, Rng& rng, const BatchInfo& info, Routing<S>& routing,
             const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    route(x, rng, info, routing, workspace, executor);
  }
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, HierarchicalRouter& grad, const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    backward(x, routing, gradient, d_x, grad, workspace, executor);
  }
  template <Executor E = DefaultExecutor>
  void backward_levels(const ConstMatrixRef<S>& x, const Routing<S>& routing,
                       std::span<const RoutingGradient<S>> gradients, MatrixRef<S> d_x,
                       HierarchicalRouter& grad, const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    backward_levels(x, routing, gradients, d_x, grad, workspace, executor);
  }

  /// Throws what backward would throw for its arguments, and changes nothing.
  void check_backward(const ConstMatrixRef<S>& x, const Routing<S>& routing,
                      const HierarchicalRouter& grad) const {
    constexpr const char* kWhere = "HierarchicalRouter::backward";
    check_parts(kWhere);
    check_router_backward(*this, x, routing, grad, kWhere);
    require(routing.levels.size() == children_.size() + 1, kWhere, ": the routing has ",
            routing.levels.size(), " levels, expected 1 + ", children_.size(), " children");
    for (Index level = 0; level <= num_children(); ++level) check_level(routing, level, kWhere);
    if constexpr (requires { parent_.check_backward(x, routing, grad.parent_); })
      parent_.check_backward(x, routing.levels[0], grad.parent_);
    if constexpr (requires { children_[0].check_backward(x, routing, grad.children_[0]); })
      for (std::size_t i = 0; i < children_.size(); ++i)
        children_[i].check_backward(x, routing.levels[1 + i], grad.children_[i]);
    // Every pair of choices is a leaf's, and every leaf's a pair.
    for (Index t = 0; t < routing.num_tokens(); ++t) {
      Index pairs = 0;
      for_each_pair(routing, t, [&](Index, Index, Index leaf) {
        require(find_choice(routing.chosen, t, leaf) >= 0, kWhere, ": the levels send token ", t,
                " to expert ", leaf, ", which it did not choose");
        ++pairs;
      });
      const Index chosen = routing.chosen.token_begin[t + 1] - routing.chosen.token_begin[t];
      require(chosen == pairs, kWhere, ": token ", t, " chose ", chosen, " experts, but its levels ", pairs);
    }
  }

  /// Names: parent.w_router, children.0.w_router, and so on.
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    const HierarchicalRouter& first = std::get<0>(std::tie(self...));
    (require(self.children_.size() == first.children_.size(), "HierarchicalRouter::visit: ",
             self.children_.size(), " children beside ", first.children_.size()),
     ...);
    visit_level(0, f, self.parent_...);
    for (std::size_t i = 0; i < first.children_.size(); ++i)
      visit_level(Index(i) + 1, f, self.children_[i]...);
  }

 private:
  // How messages name a level: by its number in Routing::levels.
  struct Level {
    Index number;
    friend std::ostream& operator<<(std::ostream& out, const Level& level) {
      if (level.number == 0) return out << "the parent";
      return out << "child " << level.number - 1;
    }
  };

  Index leaves() const { return children_.empty() ? 0 : Index(children_[0].num_experts()); }

  template <class R>
  static Index most_choices(const R& router) {
    if constexpr (requires { router.choices_per_token(); })
      return router.choices_per_token();
    else if constexpr (requires { Index(router.options().top_k); })
      return std::min<Index>(router.options().top_k, router.num_experts());
    else
      return 0;
  }

  template <class R>
  static void require_dropless(const R& router, Level level, const char* where) {
    const auto none = [&](const std::optional<double>& factor, const char* name) {
      require(!factor, where, ": ", level, " has ", name, " = ", factor.value_or(0),
              ", expected none: a hierarchy is dropless");
    };
    if constexpr (requires { router.options().capacity; }) none(router.options().capacity, "capacity");
    if constexpr (requires { router.options().training_capacity; })
      none(router.options().training_capacity, "training_capacity");
  }

  void check_parts(const char* where) const {
    require(!children_.empty() && num_children() == parent_.num_experts(), where, ": ", children_.size(),
            " children, but the parent has num_experts = ", parent_.num_experts());
    require_dropless(parent_, {0}, where);
    for (std::size_t i = 0; i < children_.size(); ++i) {
      const Child& child = children_[i];
      require(child.d_model() == d_model(), where, ": child ", i, " has d_model = ", child.d_model(),
              ", but the parent has ", d_model());
      require(child.num_experts() == leaves(), where, ": child ", i,
              " has num_experts = ", child.num_experts(), ", but child 0 has ", leaves());
      require_dropless(child, {Index(i) + 1}, where);
      const auto side = gate_side_of(child);
      require(!side || !gate_side() || *side == *gate_side(), where, ": gates of ", Level{Index(i) + 1},
              " and of the parent scale different sides of an expert");
    }
  }

  // Throws unless a level's routing is one of this batch, of that router, and seats all choices.
  void check_level(const Routing<S>& routing, Index number, const char* where) const {
    const Routing<S>& level = routing.levels[std::size_t(number)];
    const Index experts = number == 0 ? num_children() : leaves();
    require(level.num_tokens() == routing.num_tokens() && level.num_experts() == experts, where, ": ",
            Level{number}, " made a plan of ", level.num_tokens(), " tokens and ", level.num_experts(),
            " experts, expected ", routing.num_tokens(), " and ", experts);
    check_plan_arrays(level.plan, where);
    check_choices(level, where);
    require(level.plan.num_assignments() == level.chosen.size() && level.plan.dropped.empty() &&
                level.plan.passed_through.empty(),
            where, ": ", Level{number}, " seated ", level.plan.num_assignments(), " of ", level.chosen.size(),
            " choices: a hierarchy is dropless");
    require(level.plan.gate_side == routing.levels[0].plan.gate_side, where, ": gates of ", Level{number},
            " and of the parent scale different sides of an expert");
  }

  template <class E>
  void route_levels(const ConstMatrixRef<S>& x, Rng* rng, const BatchInfo& info, Routing<S>& routing,
                    RouterWorkspace<S>& workspace, const E& executor) const {
    constexpr const char* kWhere = "HierarchicalRouter::route";
    check_parts(kWhere);
    begin_route(*this, x, info, routing, workspace, kWhere, {.router_probs = true, .levels = true});
    routing.levels.resize(children_.size() + 1);
    workspace.hierarchy.levels.resize(children_.size() + 1);
    BatchInfo& sent = workspace.hierarchy.info;
    sent.token_ids = info.token_ids;
    sent.group_begin = info.group_begin;
    sent.mask.resize(x.rows());
    const Rng first = rng != nullptr ? *rng : Rng();
    Buffer<TokenState>& state = routing.plan.token_state;
    const DispatchPlan<S>& groups = routing.levels[0].plan;
    bool again;
    do {
      if (rng != nullptr) *rng = first;
      for (Index t = 0; t < x.rows(); ++t) sent.mask[t] = state[t] == TokenState::valid;
      route_level(parent_, 0, x, rng, routing, workspace.hierarchy, executor);
      for (Index t = 0; t < x.rows(); ++t)
        if (groups.token_state[t] == TokenState::poisoned) state[t] = TokenState::poisoned;
      for (Index i = 0; i < num_children(); ++i) {
        sent.mask.setConstant(false);
        for (Index a = groups.expert_begin[i]; a < groups.expert_begin[i + 1]; ++a)
          sent.mask[groups.token[a]] = true;
        route_level(children_[std::size_t(i)], i + 1, x, rng, routing, workspace.hierarchy, executor);
      }
      // Where a child finds a token poisoned, everything is what it is when that token is masked.
      again = false;
      for (Index i = 0; i < num_children(); ++i)
        for (Index t = 0; t < x.rows(); ++t) {
          if (child_routing(routing, i).plan.token_state[t] != TokenState::poisoned) continue;
          state[t] = TokenState::poisoned;
          again = true;
        }
    } while (again);
    routing.levels[0].plan.token_state = state;
    routing.plan.gate_side = groups.gate_side;
    choose_leaves(routing, workspace.hierarchy, executor);
    dispatch_all(routing.chosen, routing.plan);
  }

  template <class R, class E>
  void route_level(const R& router, Index number, const ConstMatrixRef<S>& x, Rng* rng, Routing<S>& routing,
                   HierarchyWorkspace<S>& workspace, const E& executor) const {
    Routing<S>& level = routing.levels[std::size_t(number)];
    RouterWorkspace<S>& of_level = workspace.levels[std::size_t(number)];
    if (rng != nullptr)
      route_with(router, x, *rng, workspace.info, level, of_level, executor);
    else
      route_with(router, x, workspace.info, level, of_level, executor);
    check_level(routing, number, "HierarchicalRouter::route");
  }

  static const Routing<S>& child_routing(const Routing<S>& routing, Index i) {
    return routing.levels[std::size_t(i) + 1];
  }

  // f(choice of the parent, choice of its child, leaf) for every pair of choices of a token.
  template <class F>
  void for_each_pair(const Routing<S>& routing, Index t, const F& f) const {
    const Choices<S>& groups = routing.levels[0].chosen;
    for (Index p = groups.token_begin[t]; p < groups.token_begin[t + 1]; ++p) {
      const Choices<S>& experts = child_routing(routing, groups.expert[p]).chosen;
      for (Index c = experts.token_begin[t]; c < experts.token_begin[t + 1]; ++c)
        f(p, c, groups.expert[p] * leaves() + experts.expert[c]);
    }
  }

  // The choice of a token that is `expert`, or -1.
  static Index find_choice(const Choices<S>& chosen, Index t, Index expert) {
    for (Index c = chosen.token_begin[t]; c < chosen.token_begin[t + 1]; ++c)
      if (chosen.expert[c] == expert) return c;
    return -1;
  }

  // Fills chosen and router_probs from the levels.
  template <class E>
  void choose_leaves(Routing<S>& routing, HierarchyWorkspace<S>& workspace, const E& executor) const {
    const Index tokens = routing.num_tokens(), room = tokens * choices_per_token();
    Choices<S>& chosen = routing.chosen;
    for (Index t = 0; t < tokens; ++t) {
      Index& end = chosen.token_begin[t + 1] = chosen.token_begin[t];
      for_each_pair(routing, t, [&](Index, Index, Index) { ++end; });
    }
    Buffer<Index>&leaf = workspace.leaf, &rank = workspace.rank;
    Buffer<S>& gate = workspace.gate;
    for (Buffer<Index>* b : {&leaf, &rank, &chosen.expert}) {
      b->reserve(room);
      b->resize(chosen.token_begin[tokens]);
    }
    for (Buffer<S>* b : {&gate, &chosen.gate}) {
      b->reserve(room);
      b->resize(chosen.token_begin[tokens]);
    }
    routing.router_probs.resize(tokens, num_experts());
    for_each_block(tokens, executor, [&](Index first, Index last, Index) {
      for (Index t = first; t < last; ++t) {
        const Index begin = chosen.token_begin[t], end = chosen.token_begin[t + 1];
        Index next = begin;
        for_each_pair(routing, t, [&](Index p, Index c, Index expert) {
          const Index i = expert / leaves();
          leaf[next] = expert;
          gate[next] = routing.levels[0].chosen.gate[p] * child_routing(routing, i).chosen.gate[c];
          require(number_kind(gate[next]) != NumberKind::nan, "HierarchicalRouter::route: the gate of token ",
                  t, " and expert ", expert, " is NaN");
          rank[next] = next;
          ++next;
        });
        std::sort(rank.begin() + begin, rank.begin() + end, [&](Index a, Index b) {
          return is_equal(gate[a], gate[b]) ? leaf[a] < leaf[b] : gate[a] > gate[b];
        });
        for (Index c = begin; c < end; ++c) {
          chosen.expert[c] = leaf[rank[c]];
          chosen.gate[c] = gate[rank[c]];
        }
        leaf_probs(routing, t);
      }
    });
  }

  void leaf_probs(Routing<S>& routing, Index t) const {
    if (!routing.is_valid(t)) {
      routing.router_probs.row(t).setZero();
      return;
    }
    for (Index i = 0; i < num_children(); ++i) {
      const Routing<S>& child = child_routing(routing, i);
      const S group = routing.levels[0].router_probs(t, i);
      for (Index j = 0; j < leaves(); ++j)
        routing.router_probs(t, i * leaves() + j) =
            child.is_valid(t) ? group * child.router_probs(t, j) : group / S(leaves());
    }
  }

  // d [tokens, experts of the level] = the gradient by its probabilities.
  void probs_backward(const Routing<S>& routing, Index level, const ReusedMatrix<S>& d_leaf,
                      ReusedMatrix<S>& d) const {
    const Index b = leaves();
    d.setZero(routing.num_tokens(), level == 0 ? num_children() : b);
    for (Index t = 0; t < routing.num_tokens(); ++t) {
      if (!routing.is_valid(t)) continue;
      for (Index i = 0; level == 0 && i < num_children(); ++i) {
        const Routing<S>& child = child_routing(routing, i);
        for (Index j = 0; j < b; ++j)
          d(t, i) += d_leaf(t, i * b + j) * (child.is_valid(t) ? child.router_probs(t, j) : S(1) / S(b));
      }
      if (level == 0 || !child_routing(routing, level - 1).is_valid(t)) continue;
      const S group = routing.levels[0].router_probs(t, level - 1);
      for (Index j = 0; j < b; ++j) d(t, j) = group * d_leaf(t, (level - 1) * b + j);
    }
  }

  // d [choices of the level] = the gradient by its gates.
  void gates_backward(const Routing<S>& routing, Index level, const Buffer<S>& d_leaf, Buffer<S>& d) const {
    const Choices<S>& groups = routing.levels[0].chosen;
    const Choices<S>& own = routing.levels[std::size_t(level)].chosen;
    d.reserve(own.gate.capacity());
    d.assign(own.size(), S(0));
    for (Index t = 0; t < routing.num_tokens(); ++t) {
      if (level == 0) {
        for_each_pair(routing, t, [&](Index p, Index c, Index leaf) {
          d[p] += d_leaf[find_choice(routing.chosen, t, leaf)] *
                  child_routing(routing, groups.expert[p]).chosen.gate[c];
        });
        continue;
      }
      const Index p = find_choice(groups, t, level - 1);
      for (Index c = own.token_begin[t]; p >= 0 && c < own.token_begin[t + 1]; ++c) {
        const Index leaf = (level - 1) * leaves() + own.expert[c];
        d[c] = d_leaf[find_choice(routing.chosen, t, leaf)] * groups.gate[p];
      }
    }
  }

  template <class E>
  void level_backward(Index number, const ConstMatrixRef<S>& x, const Routing<S>& routing,
                      const RoutingGradient<S>& gradient, MatrixRef<S> d_x, HierarchicalRouter& grad,
                      RouterWorkspace<S>& workspace, const E& executor) const {
    const Routing<S>& level = routing.levels[std::size_t(number)];
    RouterWorkspace<S>& of_level = workspace.hierarchy.levels[std::size_t(number)];
    if (gradient.empty() || level.plan.num_valid_tokens() == 0) return;
    if (number == 0)
      return route_backward_with(parent_, x, level, gradient, d_x, grad.parent_, of_level, executor);
    ReusedMatrix<S>& seen = workspace.input;  // zeros for the tokens that the child did not see
    seen = x;
    for (Index t = 0; t < x.rows(); ++t)
      if (!level.is_valid(t)) seen.row(t).setZero();
    const std::size_t i = std::size_t(number) - 1;
    route_backward_with(children_[i], seen, level, gradient, d_x, grad.children_[i], of_level, executor);
  }

  // Visits a level's parameters under its name.
  template <class F, class Part, class... Parts>
  static void visit_level(Index level, F& f, Part& part, Parts&... parts) {
    visit_part(level == 0 ? Name("parent") : Name("children", level - 1), f, part, parts...);
  }

  Parent parent_;
  std::vector<Child> children_;
};

}  // namespace moe
