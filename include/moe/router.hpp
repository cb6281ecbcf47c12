// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <optional>
#include <vector>

#include <moe/buffer.hpp>
#include <moe/check.hpp>
#include <moe/executor.hpp>
#include <moe/parameters.hpp>
#include <moe/random.hpp>
#include <moe/softmax.hpp>
#include <moe/types.hpp>

// What routers take (BatchInfo), what they give (Routing with its DispatchPlan), what flows back
// (RoutingGradient), and the concepts that a router satisfies.
namespace moe {

/// What a router may need to know about a batch beside x [tokens, d_model]. Empty members mean
/// "nothing special".
struct BatchInfo {
  /// True for a real token, false for padding, as attention masks have it [tokens]. A token that is
  /// masked out goes nowhere, uses no capacity, enters no loss; its output row and its d_x are zero.
  Mask mask{};
  /// One id a token, for routers that look at ids (hash routing) [tokens].
  IndexVector token_ids{};
  /// First token of every group, then the number of tokens [groups + 1]. Rules that couple tokens
  /// (capacity, expert choice) work within a group. Empty: one group.
  IndexVector group_begin{};

  Index num_groups() const { return group_begin.size() > 0 ? group_begin.size() - 1 : 1; }
  Index begin_of(Index group) const { return group_begin.size() > 0 ? group_begin[group] : 0; }
  Index end_of(Index group, Index tokens) const {
    return group_begin.size() > 0 ? group_begin[group + 1] : tokens;
  }
};

enum class TokenState : std::uint8_t {
  valid,
  masked,    ///< padding: output row and d_x are zero
  poisoned,  ///< a logit is NaN or +inf, or all are -inf: output row is NaN, d_x is zero
};

/// What every token chose before capacity, as rows of a compressed sparse matrix.
template <class S>
struct Choices {
  Buffer<Index> token_begin;  ///< first choice of a token [tokens + 1]
  Buffer<Index> expert;       ///< chosen expert: a token's best first, ascending where experts
                              ///< choose [choices]
  Buffer<S> gate;             ///< its gate over the set that the token chose [choices]

  Index num_tokens() const { return std::max<Index>(token_begin.size() - 1, 0); }
  Index size() const { return expert.size(); }
  friend bool operator==(const Choices&, const Choices&) = default;
  template <class F>
  void for_each_array(const F& f) const {
    f(gate);
  }
};

/// An assignment that found no seat: a token's `choice`-th choice (0 is the first) was `expert`.
struct Dropped {
  Index token, expert, choice;
  friend bool operator==(const Dropped&, const Dropped&) = default;
};

/// What a gate multiplies: the output of the expert (nearly always) or its input (Llama-4).
enum class GateSide { output, input };

/// Who goes where: assignments of tokens to experts, as rows of a compressed sparse matrix. Within
/// an expert tokens ascend, and each appears at most once.
template <class S>
struct DispatchPlan {
  Index num_tokens = 0;
  Buffer<TokenState> token_state;  ///< [tokens]
  Buffer<Index> expert_begin;      ///< first assignment of an expert [num_experts + 1]
  Buffer<Index> token;             ///< [assignments]
  Buffer<S> gate;                  ///< [assignments]
  Buffer<Index> choice;            ///< the entry of Routing::chosen it stems from [assignments]
  GateSide gate_side = GateSide::output;
  Buffer<Dropped> dropped;       ///< in order of priority, group by group
  Buffer<Index> passed_through;  ///< tokens to whose sum x is added; a router lists those that no
                                 ///< expert of theirs had a seat for, ascending

  Index num_experts() const { return std::max<Index>(expert_begin.size() - 1, 0); }
  Index num_assignments() const { return token.size(); }
  Index rows_of(Index expert) const { return expert_begin[expert + 1] - expert_begin[expert]; }
  Index num_valid_tokens() const {
    return Index(std::count(token_state.begin(), token_state.end(), TokenState::valid));
  }
  friend bool operator==(const DispatchPlan&, const DispatchPlan&) = default;
  template <class F>
  void for_each_array(const F& f) const {
    f(gate);
  }
};

/// The noise that a router added to its logits in training. Where it added none, empty() is true and
/// the matrices mean nothing.
template <class S>
struct RoutingNoise {
  Matrix<S> draws;         ///< standard normal [tokens, num_experts]
  Matrix<S> stddev;        ///< [tokens, num_experts]
  Matrix<S> noisy_logits;  ///< router_logits + draws * stddev [tokens, num_experts]
  Index top_k = 0;         ///< how many experts a token chooses; 0: no noise was added

  bool empty() const { return top_k == 0; }
  void clear() { top_k = 0; }
  template <class F>
  void for_each_array(const F& f) const {
    for (const Matrix<S>* m : {&draws, &stddev, &noisy_logits}) f(*m);
  }
};

/// Scratch memory of routers, kept so that a reused Routing allocates nothing. Holds no results, is
/// not copied.
template <class S>
struct RoutingScratch {
  Buffer<Index> order, load, seat, position;
  Buffer<S> row;
  Buffer<double> second_draws, sums;
  IndexVector capacity;
  Matrix<S> ranking, d_logits, d_noise, input, d_input;
  BatchInfo info;  // what a router made of routers tells them

  RoutingScratch() = default;
  RoutingScratch(const RoutingScratch&) {}
  RoutingScratch(RoutingScratch&&) = default;
  RoutingScratch& operator=(const RoutingScratch&) { return *this; }
  RoutingScratch& operator=(RoutingScratch&&) = default;
  template <class F>
  void for_each_array(const F& f) const {
    f(row);
    for (const Matrix<S>* m : {&ranking, &d_logits, &d_noise, &input, &d_input}) f(*m);
  }
};

/// Everything that a router decided about a batch, and all that its backward pass needs.
template <class S>
struct Routing {
  Matrix<S> router_logits;        ///< before noise [tokens, num_experts]
  Matrix<S> router_probs;         ///< scores of the logits that selection looked at, with a sum of 1 (a
                                  ///< softmax, for most routers); rows of tokens that are not valid are
                                  ///< zero [tokens, num_experts]
  Choices<S> chosen;              ///< demand, before capacity
  DispatchPlan<S> plan;           ///< after capacity
  RoutingNoise<S> noise;          ///< in training, where the router is noisy
  bool has_input_factor = false;  ///< whether the router jittered its input
  Matrix<S> input_factor;         ///< what it multiplied x by; means nothing where it did not
  /// The routings that this one is made of, where a router is made of routers (HierarchicalRouter:
  /// the parent's, then that of each child); empty otherwise.
  std::vector<Routing> levels{};

  mutable RoutingScratch<S> scratch{};

  Index num_tokens() const { return plan.num_tokens; }
  Index num_experts() const { return plan.num_experts(); }
  bool is_valid(Index token) const { return plan.token_state[token] == TokenState::valid; }
  /// The logits that selection looked at: with noise where there is any.
  const Matrix<S>& selection_logits() const { return noise.empty() ? router_logits : noise.noisy_logits; }
  /// Calls f for every array of scalars that it consists of, or for parts that have this function: what a
  /// view of a matrix may reach. So it is with the other types that have it. See require_apart.
  template <class F>
  void for_each_array(const F& f) const {
    for (const Matrix<S>* m : {&router_logits, &router_probs, &input_factor}) f(*m);
    f(chosen);
    f(plan);
    f(noise);
    for (const Routing& level : levels) f(level);
    f(scratch);
  }
};

/// Gradient of a loss by what a routing shows. An empty member means zero. Made by the losses, added
/// and scaled by the user, taken by the router's backward pass.
template <class S>
struct RoutingGradient {
  Matrix<S> d_router_logits{};  ///< [tokens, num_experts]
  Matrix<S> d_router_probs{};   ///< [tokens, num_experts]
  Matrix<S> d_noise_stddev{};   ///< [tokens, num_experts]
  Buffer<S> d_chosen_gate{};    ///< by Routing::chosen.gate [choices]
  Buffer<S> d_gate{};           ///< by Routing::plan.gate [assignments]

  /// Whether every member is absent: the gradient is zero.
  bool empty() const {
    return d_router_logits.size() == 0 && d_router_probs.size() == 0 && d_noise_stddev.size() == 0 &&
           d_chosen_gate.empty() && d_gate.empty();
  }

  /// Throws std::invalid_argument, and changes nothing, where shapes differ.
  RoutingGradient& operator+=(const RoutingGradient& other) {
    check(d_router_logits, other.d_router_logits, "d_router_logits");
    check(d_router_probs, other.d_router_probs, "d_router_probs");
    check(d_noise_stddev, other.d_noise_stddev, "d_noise_stddev");
    check(d_chosen_gate, other.d_chosen_gate, "d_chosen_gate");
    check(d_gate, other.d_gate, "d_gate");
    add(d_router_logits, other.d_router_logits);
    add(d_router_probs, other.d_router_probs);
    add(d_noise_stddev, other.d_noise_stddev);
    add(d_chosen_gate, other.d_chosen_gate);
    add(d_gate, other.d_gate);
    return *this;
  }
  RoutingGradient& operator*=(S factor) {
    d_router_logits *= factor;
    d_router_probs *= factor;
    d_noise_stddev *= factor;
    for (S& d : d_chosen_gate) d *= factor;
    for (S& d : d_gate) d *= factor;
    return *this;
  }
  template <class F>
  void for_each_array(const F& f) const {
    for (const Matrix<S>* m : {&d_router_logits, &d_router_probs, &d_noise_stddev}) f(*m);
    for (const Buffer<S>* b : {&d_chosen_gate, &d_gate}) f(*b);
  }
  friend RoutingGradient operator+(RoutingGradient a, const RoutingGradient& b) { return a += b; }
  friend RoutingGradient operator*(S factor, RoutingGradient a) { return a *= factor; }
  friend RoutingGradient operator*(RoutingGradient a, S factor) { return a *= factor; }

 private:
  static void check(const Matrix<S>& to, const Matrix<S>& from, const char* what) {
    if (to.size() > 0 && from.size() > 0)
      require_shape(from, to.rows(), to.cols(), "RoutingGradient: sum", what);
  }
  static void check(const Buffer<S>& to, const Buffer<S>& from, const char* what) {
    if (!to.empty() && !from.empty())
      require(from.size() == to.size(), "RoutingGradient: sum: ", what, " has ", from.size(),
              " entries, expected ", to.size());
  }
  static void add(Matrix<S>& to, const Matrix<S>& from) {
    if (to.size() == 0)
      to = from;
    else if (from.size() > 0)
      to += from;
  }
  static void add(Buffer<S>& to, const Buffer<S>& from) {
    if (to.empty())
      to = from;
    else
      for (Index i = 0; i < from.size(); ++i) to[i] += from[i];
  }
};

/// Throws std::invalid_argument unless the members of `info` fit a batch of `tokens`.
/// O(tokens + groups).
inline void check_batch_info(const BatchInfo& info, Index tokens, const char* where) {
  require(info.mask.size() == 0 || info.mask.size() == tokens, where, ": mask has ", info.mask.size(),
          " entries, expected ", tokens, " tokens");
  require(info.token_ids.size() == 0 || info.token_ids.size() == tokens, where, ": token_ids has ",
          info.token_ids.size(), " entries, expected ", tokens, " tokens");
  const IndexVector& begin = info.group_begin;
  if (begin.size() == 0) return;
  require(begin.size() >= 2, where, ": group_begin has ", begin.size(), " entry, expected at least 2");
  require(begin[0] == 0 && begin[begin.size() - 1] == tokens, where, ": group_begin goes from ", begin[0],
          " to ", begin[begin.size() - 1], ", expected from 0 to ", tokens, " tokens");
  for (Index g = 1; g < begin.size(); ++g) {
    require(begin[g - 1] <= begin[g], where, ": group_begin[", g, "] = ", begin[g],
            " is less than the entry before it, ", begin[g - 1]);
  }
}

/// Makes `routing` an empty one for a batch: shapes set, tokens valid or masked, nothing chosen.
/// Every router begins with this. router_logits and router_probs are not touched: a router fills
/// them, or a reused routing keeps the old ones. levels are cleared: a router that reuses their
/// memory moves them out before. O(tokens + num_experts); allocates only when shapes grow. Throws
/// std::invalid_argument for counts out of range and when `info` does not fit.
template <class S>
void begin_routing(Index tokens, Index num_experts, const BatchInfo& info, Routing<S>& routing,
                   const char* where) {
  require(tokens >= 0, where, ": ", tokens, " tokens, expected at least 0");
  require(num_experts >= 1, where, ": ", num_experts, " experts, expected at least 1");
  check_batch_info(info, tokens, where);
  routing.noise.clear();
  routing.has_input_factor = false;
  routing.levels.clear();
  DispatchPlan<S>& plan = routing.plan;
  plan.num_tokens = tokens;
  plan.token_state.assign(tokens, TokenState::valid);
  for (Index t = 0; t < info.mask.size(); ++t)
    if (!info.mask[t]) plan.token_state[t] = TokenState::masked;
  plan.expert_begin.assign(num_experts + 1, 0);
  plan.token.clear();
  plan.gate.clear();
  plan.choice.clear();
  plan.gate_side = GateSide::output;
  plan.dropped.clear();
  plan.passed_through.clear();
  routing.chosen.token_begin.assign(tokens + 1, 0);
  routing.chosen.expert.clear();
  routing.chosen.gate.clear();
}

/// Throws std::invalid_argument unless the arrays of a plan fit each other. O(num_experts).
template <class S>
void check_plan_arrays(const DispatchPlan<S>& plan, const char* where) {
  const Index experts = plan.num_experts(), assignments = plan.num_assignments();
  require(plan.token_state.size() == plan.num_tokens, where, ": token_state has ", plan.token_state.size(),
          " entries, expected ", plan.num_tokens, " tokens");
  require(plan.gate.size() == assignments, where, ": gate has ", plan.gate.size(), " entries, expected ",
          assignments, " assignments");
  require(experts >= 1, where, ": the routing is over ", experts, " experts, expected at least 1");
  require(plan.expert_begin[0] == 0 && plan.expert_begin[experts] == assignments, where,
          ": expert_begin goes from ", plan.expert_begin[0], " to ", plan.expert_begin[experts],
          ", expected from 0 to ", assignments, " assignments");
  for (Index e = 0; e < experts; ++e)
    require(plan.expert_begin[e] <= plan.expert_begin[e + 1], where, ": expert_begin[", e + 1,
            "] = ", plan.expert_begin[e + 1], " is less than the entry before it, ", plan.expert_begin[e]);
}

/// Throws std::invalid_argument unless a plan from outside is one that the library may follow.
/// O(tokens + assignments).
template <class S>
void check_plan(const DispatchPlan<S>& plan, Index tokens, Index num_experts, const char* where) {
  require(plan.num_tokens == tokens, where, ": the routing is of ", plan.num_tokens, " tokens, expected ",
          tokens);
  require(plan.num_experts() == num_experts, where, ": the routing is over ", plan.num_experts(),
          " experts, expected ", num_experts);
  check_plan_arrays(plan, where);
  for (Index e = 0; e < num_experts; ++e) {
    const Index begin = plan.expert_begin[e], end = plan.expert_begin[e + 1];
    for (Index a = begin; a < end; ++a) {
      const Index t = plan.token[a];
      require(t >= 0 && t < tokens, where, ": assignment ", a, " is of token ", t, " of ", tokens);
      require(a == begin || plan.token[a - 1] < t, where, ": tokens of expert ", e, " must ascend, but ",
              plan.token[a > begin ? a - 1 : a], " goes before ", t);
      require(plan.token_state[t] == TokenState::valid, where, ": assignment ", a, " is of token ", t,
              ", which is masked or poisoned");
    }
  }
  for (Index i = 0; i < plan.passed_through.size(); ++i) {
    const Index t = plan.passed_through[i];
    require(t >= 0 && t < tokens, where, ": passed_through[", i, "] is token ", t, " of ", tokens);
    require(i == 0 || plan.passed_through[i - 1] < t, where, ": passed_through must ascend, but ",
            plan.passed_through[i > 0 ? i - 1 : i], " goes before ", t);
    require(plan.token_state[t] == TokenState::valid, where, ": passed_through[", i, "] is token ", t,
            ", which is masked or poisoned");
  }
}

/// Marks valid tokens with a NaN or an infinity in their row of x [tokens, d_model] as poisoned.
/// O(tokens * d_model). Throws when x has another number of rows than the plan has tokens.
template <class S>
void mark_poisoned_rows(const ConstMatrixRef<S>& x, DispatchPlan<S>& plan) {
  require(x.rows() == plan.token_state.size(), "mark_poisoned_rows: x has ", x.rows(), " rows, expected ",
          plan.token_state.size(), " tokens");
  for (Index t = 0; t < x.rows(); ++t)
    for (Index j = 0; j < x.cols(); ++j)
      if (plan.token_state[t] == TokenState::valid && number_kind(x(t, j)) != NumberKind::finite)
        plan.token_state[t] = TokenState::poisoned;
}

/// Throws std::invalid_argument unless `chosen` lists choices that `tokens` tokens may make among
/// `num_experts` experts, each at most once. O(tokens + choices * choices of a token).
template <class S>
void check_choices(const Choices<S>& chosen, Index tokens, Index num_experts, const char* where) {
  const Buffer<Index>& begin = chosen.token_begin;
  require(tokens >= 0, where, ": num_tokens = ", tokens, ", expected at least 0");
  require(begin.size() == tokens + 1, where, ": chosen.token_begin has ", begin.size(), " entries, expected ",
          tokens + 1);
  require(begin[0] == 0 && begin[tokens] == chosen.size(), where, ": chosen.token_begin goes from ", begin[0],
          " to ", begin[tokens], ", expected from 0 to ", chosen.size(), " choices");
  require(chosen.gate.size() == chosen.size(), where, ": chosen.gate has ", chosen.gate.size(),
          " entries, expected ", chosen.size(), " choices");
  for (Index t = 0; t < tokens; ++t)
    require(begin[t] <= begin[t + 1], where, ": chosen.token_begin[", t + 1, "] = ", begin[t + 1],
            " is less than the entry before it, ", begin[t]);
  for (Index c = 0; c < chosen.size(); ++c)
    require(chosen.expert[c] >= 0 && chosen.expert[c] < num_experts, where, ": choice ", c, " is expert ",
            chosen.expert[c], " of ", num_experts);
  for (Index t = 0; t < tokens; ++t)
    for (Index c = begin[t]; c < begin[t + 1]; ++c)
      for (Index d = begin[t]; d < c; ++d)
        require(chosen.expert[c] != chosen.expert[d], where, ": token ", t, " chose expert ",
                chosen.expert[c], " twice, as choices ", d - begin[t], " and ", c - begin[t]);
}

/// A router for inference. Its route() fills a Routing for x [tokens, d_model]; begin_routing and
/// dispatch_all or apply_capacity do most of it. An overload with an executor as the last argument
/// is used where there is one. A token that can not be routed must be marked as poisoned in
/// plan.token_state; a router that does not look at x at all does so where x is not finite
/// (mark_poisoned_rows).
template <class R>
concept Router = requires(const R& router, const ConstMatrixRef<typename R::Scalar>& x, const BatchInfo& info,
                          Routing<typename R::Scalar>& routing) {
  typename R::Scalar;
  { router.d_model() } -> std::convertible_to<Index>;
  { router.num_experts() } -> std::convertible_to<Index>;
  router.route(x, info, routing);
};

/// A router with a backward pass: adds to d_x [tokens, d_model] and to the gradient's parameters.
/// x is what route() saw, with zeros in the rows of tokens that are not valid. A router that acts
/// otherwise in training has an overload route(x, rng, info, routing). One whose backward may throw has
/// check_backward(x, routing, grad), which throws the same before anything is added to a gradient.
/// backward may use routing.scratch: two threads must not share a routing there.
template <class R>
concept TrainableRouter = Router<R> &&
    requires(const R& router, R& grad, const ConstMatrixRef<typename R::Scalar>& x,
             const Routing<typename R::Scalar>& routing, const RoutingGradient<typename R::Scalar>& gradient,
             MatrixRef<typename R::Scalar> d_x) {
  router.backward(x, routing, gradient, d_x, grad);
  R::visit([](const ParameterInfo&, auto&...) {}, grad);
};

/// What a router's gates multiply, where it says so before it routes: by gate_side() or by its options.
/// DispatchPlan::gate_side says it for certain.
template <class R>
std::optional<GateSide> gate_side_of(const R& router) {
  if constexpr (requires { std::optional<GateSide>(router.gate_side()); })
    return router.gate_side();
  else if constexpr (requires { GateSide(router.options().gate_side); })
    return router.options().gate_side;
  else
    return std::nullopt;
}

/// Calls router.route for inference, with the executor where the router takes one.
template <Router R, Executor E>
void route_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x, const BatchInfo& info,
                Routing<typename R::Scalar>& routing, const E& executor) {
  if constexpr (requires { router.route(x, info, routing, executor); })
    router.route(x, info, routing, executor);
  else
    router.route(x, info, routing);
}

/// The same for training; a router without a way of its own for training routes as in inference.
template <Router R, Executor E>
void route_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x, Rng& rng, const BatchInfo& info,
                Routing<typename R::Scalar>& routing, const E& executor) {
  if constexpr (requires { router.route(x, rng, info, routing, executor); })
    router.route(x, rng, info, routing, executor);
  else if constexpr (requires { router.route(x, rng, info, routing); })
    router.route(x, rng, info, routing);
  else
    route_with(router, x, info, routing, executor);
}

/// Calls router.backward, with the executor where the router takes one.
template <TrainableRouter R, Executor E>
void route_backward_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x,
                         const Routing<typename R::Scalar>& routing,
                         const RoutingGradient<typename R::Scalar>& gradient,
                         MatrixRef<typename R::Scalar> d_x, R& grad, const E& executor) {
  if constexpr (requires { router.backward(x, routing, gradient, d_x, grad, executor); })
    router.backward(x, routing, gradient, d_x, grad, executor);
  else
    router.backward(x, routing, gradient, d_x, grad);
}

}  // namespace moe
