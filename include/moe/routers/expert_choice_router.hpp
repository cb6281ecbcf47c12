// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <vector>

#include <moe/core/reused.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>
#include <moe/math/softmax.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/check_router.hpp>
#include <moe/routing/edit_experts.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/token_choice_backward.hpp>

namespace moe {

/// Options of ExpertChoiceRouter; the same for every scalar.
struct ExpertChoiceOptions {
  Index d_model = 0;
  Index num_experts = 0;
  /// Mean number of experts a token gets; an expert takes expert_capacity(valid tokens of the
  /// group, num_experts, 1, capacity, capacity_rule) tokens, in training and in inference.
  double capacity = 2.0;
  CapacityRule capacity_rule{};
  /// What becomes of a token that no expert takes: drop (its routed sum is zero) or pass_through.
  Overflow overflow = Overflow::drop;
};

/// Expert choice (Zhou et al. 2022): each expert takes the tokens with its largest router_probs
/// (softmax over the experts), as many as its capacity holds. Experts are always full, so no balance
/// loss is needed; a token gets no, one or many experts, and its gates are its router_probs. Which
/// tokens an expert takes depends on all tokens of the group: not for autoregressive decoding.
/// Ties go to the lower token.
template <class S>
class ExpertChoiceRouter {
 public:
  using Scalar = S;

  using Options = ExpertChoiceOptions;

  /// w_router is zero, to be filled from elsewhere. Throws std::invalid_argument for options out of range,
  /// and for Overflow::next_best, which means nothing here.
  explicit ExpertChoiceRouter(const Options& options) : options_(options) {
    require(options.d_model > 0, "ExpertChoiceRouter: d_model = ", options.d_model, ", expected at least 1");
    require(options.num_experts > 0, "ExpertChoiceRouter: num_experts = ", options.num_experts,
            ", expected at least 1");
    require(options.overflow != Overflow::next_best,
            "ExpertChoiceRouter: overflow is next_best, but experts choose tokens here: expected "
            "drop or pass_through");
    expert_capacity(0, options.num_experts, 1, options.capacity);  // throws if out of range
    check_capacity_rule(options.capacity_rule, "ExpertChoiceRouter");
    w_router.setZero(options.num_experts, options.d_model);
  }
  /// w_router is normal with variance 1 / d_model.
  ExpertChoiceRouter(const Options& options, Rng& rng) : ExpertChoiceRouter(options) {
    w_router = lecun_normal<S>(options.num_experts, options.d_model, rng);
  }

  Index d_model() const { return w_router.cols(); }
  Index num_experts() const { return w_router.rows(); }
  const Options& options() const { return options_; }

  /// Routing, the same in training and in inference. O(tokens * num_experts * d_model).
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    begin_route(*this, x, info, routing, workspace, "ExpertChoiceRouter::route",
                {.router_logits = true, .router_probs = true});
    const Index tokens = x.rows(), experts = num_experts();
    ReusedMatrix<S>&z = routing.router_logits, &p = routing.router_probs;
    z.resize(tokens, experts);
    p.resize(tokens, experts);
    router_linear(x, w_router, z, executor);
    for_each_block(tokens, executor, [&](Index begin, Index end, Index) {
      for (Index t = begin; t < end; ++t) {
        TokenState& state = routing.plan.token_state[t];
        check_logits(experts, &z(t, 0), state);
        if (state == TokenState::valid)
          softmax(experts, &z(t, 0), &p(t, 0));
        else
          p.row(t).setZero();
      }
    });
    choose_tokens(info, routing, workspace, executor);
    list_choices(routing);
  }

  /// Adds to d_x [tokens, d_model] and to grad's w_router. `x` has zeros in rows of tokens that are
  /// not valid. O(tokens * num_experts * d_model).
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, ExpertChoiceRouter& grad, RouterWorkspace<S>& workspace,
                const E& executor = {}) const {
    check_backward(x, routing, grad);
    check_router_operands(x, routing, gradient, d_x, grad, workspace, "ExpertChoiceRouter::backward");
    ReusedMatrix<S>& d_logits = workspace.d_logits;
    selection_backward(SeatingRule{}, routing, gradient, workspace.token_choice, d_logits);
    add_valid_rows(routing, gradient.d_router_logits, d_logits);
    router_linear_backward(x, w_router, d_logits, grad.w_router, d_x, executor);
  }

  /// The same with a workspace of its own, here and below: it allocates.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    route(x, info, routing, workspace, executor);
  }
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, ExpertChoiceRouter& grad, const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    backward(x, routing, gradient, d_x, grad, workspace, executor);
  }

  /// Throws what backward would throw for its arguments, and changes nothing.
  void check_backward(const ConstMatrixRef<S>& x, const Routing<S>& routing,
                      const ExpertChoiceRouter& grad) const {
    check_router_backward(*this, x, routing, grad, "ExpertChoiceRouter::backward");
  }

  /// Appends an expert whose logits come from `w` [d_model].
  void add_expert(const Vector<S>& w) {
    w_router = with_row(w_router, w, "ExpertChoiceRouter::add_expert");
    options_.num_experts = num_experts();
  }

  /// Removes experts, named in any order. Throws, and changes nothing, when one does not exist or is named
  /// twice, or none would be left.
  void remove_experts(const std::vector<Index>& experts) {
    constexpr const char* kWhere = "ExpertChoiceRouter::remove_experts";
    const std::vector<Index> kept = experts_without(experts, num_experts(), 1, kWhere);
    w_router = take_rows(w_router, kept, num_experts(), kWhere, "w_router");
    options_.num_experts = num_experts();
  }
  /// The same for one expert.
  void remove_expert(Index expert) { remove_experts({expert}); }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_array(f, {"w_router"}, self.w_router...);
  }

  Matrix<S> w_router;  ///< [num_experts, d_model]

 private:
  // Fills the plan but for `choice`: every expert's tokens, group by group.
  template <class E>
  void choose_tokens(const BatchInfo& info, Routing<S>& routing, RouterWorkspace<S>& workspace,
                     const E& executor) const {
    const ReusedMatrix<S>&z = routing.router_logits, &p = routing.router_probs;
    DispatchPlan<S>& plan = routing.plan;
    const Index tokens = plan.num_tokens, experts = num_experts(), groups = info.num_groups();
    Reused<IndexVector>& capacity = workspace.capacity;
    count_valid_tokens(plan, info, capacity);
    const auto seats = [&](Index valid) {
      return expert_capacity(valid, experts, 1, options_.capacity, options_.capacity_rule);
    };
    Index most = 0;  // seats of one expert
    for (Index g = 0; g < groups; ++g) most += capacity[g] = seats(capacity[g]);
    // With any mask, and wherever the groups begin: each of them may round up.
    const CapacityRule& rule = options_.capacity_rule;
    const Index rounded = (std::min)(rule.minimum, tokens) + (std::min)(rule.multiple_of, tokens);
    const Index room = (std::min)(tokens, seats(tokens) + 1 + groups * rounded);
    ExpertChoiceWorkspace& own = workspace.expert_choice;
    Buffer<Index>&candidates = own.candidates, &taken = own.taken, &count = own.count;
    candidates.resize(executor.concurrency() * tokens);
    taken.reserve(experts * room);
    taken.resize(experts * most);  // [experts, most]
    count.resize(experts);
    executor.for_each(experts, [&](Index e, Index worker) {
      Index* const list = candidates.data() + worker * tokens;
      Index n = 0;
      for (Index g = 0; g < groups; ++g) {
        Index* end = list;
        for (Index t = info.begin_of(g); t < info.end_of(g, tokens); ++t)
          if (plan.token_state[t] == TokenState::valid && !is_unavailable(z(t, e))) *end++ = t;
        Index* const kept = list + std::min<Index>(end - list, capacity[g]);
        std::nth_element(list, kept, end, [&](Index a, Index b) {
          return !is_equal(p(a, e), p(b, e)) ? p(a, e) > p(b, e) : a < b;
        });
        std::sort(list, kept);
        std::copy(list, kept, taken.data() + e * most + n);
        n += kept - list;
      }
      count[e] = n;
    });
    plan.token.reserve(experts * room);
    plan.gate.reserve(experts * room);
    for (Index e = 0; e < experts; ++e) {
      for (Index i = 0; i < count[e]; ++i) {
        const Index t = taken[e * most + i];
        plan.token.push_back(t);
        plan.gate.push_back(p(t, e));
      }
      plan.expert_begin[e + 1] = plan.token.size();
    }
  }

  // Lists the plan by token, and the tokens that nobody took.
  void list_choices(Routing<S>& routing) const {
    DispatchPlan<S>& plan = routing.plan;
    Choices<S>& chosen = routing.chosen;
    const Index tokens = plan.num_tokens, assignments = plan.num_assignments();
    for (const Index t : plan.token) ++chosen.token_begin[t + 1];
    for (Index t = 0; t < tokens; ++t) chosen.token_begin[t + 1] += chosen.token_begin[t];
    chosen.expert.reserve(plan.token.capacity());
    chosen.gate.reserve(plan.token.capacity());
    plan.choice.reserve(plan.token.capacity());
    chosen.expert.resize(assignments);
    chosen.gate.resize(assignments);
    plan.choice.resize(assignments);
    for (Index e = 0; e < plan.num_experts(); ++e) {
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
        const Index c = chosen.token_begin[plan.token[a]]++;  // put back below
        chosen.expert[c] = e;
        chosen.gate[c] = plan.gate[a];
        plan.choice[a] = c;
      }
    }
    for (Index t = tokens; t > 0; --t) chosen.token_begin[t] = chosen.token_begin[t - 1];
    chosen.token_begin[0] = 0;
    plan.passed_through.reserve(tokens);
    if (options_.overflow != Overflow::pass_through) return;
    for (Index t = 0; t < tokens; ++t)
      if (plan.token_state[t] == TokenState::valid && chosen.token_begin[t] == chosen.token_begin[t + 1])
        plan.passed_through.push_back(t);
  }

  Options options_;
};

}  // namespace moe
