// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <utility>

#include <moe/core/executor.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/random.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/distributed/communicator.hpp>
#include <moe/distributed/own_part.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/router.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_gradient.hpp>

// Tokens on several processes, routed as one batch.
namespace moe {

/// A router of any kind for tokens that are spread over processes: process p has a part of the batch, the
/// parts stand one after the other. What one process's tokens get may depend on those of others (capacity,
/// expert choice, Sinkhorn); so every process gathers x, routes the joined batch, and keeps the part of its
/// own tokens. The routing, d_x and the router's gradients are, bit for bit, those of one process, and the
/// gradient is the same on all. levels[0] of a routing is that of the joined batch, for losses, metrics and
/// the selection bias; own() is the way back from a loss's gradient.
///
/// Every call is collective. Groups lie within processes, or no process names any. Random generators are
/// equal on all processes, and so are the weights. Cost: that of routing the whole batch on each process,
/// [all tokens, d_model] scalars gathered forward and again backward. Where tokens choose alone and gradients
/// need not be those of one process bit for bit, the router itself is enough, without this.
template <Router R>
class JoinedRouter {
 public:
  using Scalar = typename R::Scalar;
  using S = Scalar;

  /// `router` is the same on all processes.
  JoinedRouter(Communicator comm, R router) : comm_(std::move(comm)), router_(std::move(router)) {}

  Index d_model() const { return router_.d_model(); }
  Index num_experts() const { return router_.num_experts(); }
  /// What gates multiply, where the router says so.
  std::optional<GateSide> gate_side() const { return gate_side_of(router_); }
  /// The router of the joined batch.
  R& router() { return router_; }
  /// The same, read-only.
  const R& router() const { return router_; }

  /// As in inference.
  template <Executor Ex = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const Ex& executor = {}) const {
    const TokenRange own = join(x, info, 0, routing, workspace);
    route_with(router_, workspace.input, workspace.hierarchy.info, routing.levels[0],
               workspace.hierarchy.levels[0], executor);
    own_part(routing.levels[0], own, routing);
  }
  /// As in training.
  template <Executor Ex = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, Rng& rng, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const Ex& executor = {}) const {
    Rng next = rng;
    const TokenRange own = join(x, info, Index(next() >> 1), routing, workspace);
    route_with(router_, workspace.input, rng, workspace.hierarchy.info, routing.levels[0],
               workspace.hierarchy.levels[0], executor);
    own_part(routing.levels[0], own, routing);
  }
  /// With a workspace of its own, here and below: it allocates.
  template <Executor Ex = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             const Ex& executor = {}) const {
    RouterWorkspace<S> workspace;
    route(x, info, routing, workspace, executor);
  }

  /// Adds to d_x [own tokens, d_model], and to `grad` the gradient of the joined batch.
  template <Executor Ex = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, JoinedRouter& grad, RouterWorkspace<S>& workspace,
                const Ex& executor = {}) const requires TrainableRouter<R> {
    Buffer<Index>& begin = workspace.hierarchy.leaf;
    const Buffer<Index> parts = gather_headers(
        {"JoinedRouter::backward", {d_model(), num_experts(), Index(sizeof(S))}, "d_model, experts, bytes"},
        {x.rows(),
         {gradient.d_router_logits.size() > 0, gradient.d_router_probs.size() > 0,
          gradient.d_noise_stddev.size() > 0, !gradient.d_chosen_gate.empty(), !gradient.d_gate.empty()}},
        begin, [&] {
          require(routing.levels.size() == 1, "JoinedRouter::backward: a routing of ", routing.levels.size(),
                  " levels, expected 1, the joined one");
          require_shape(x, routing.num_tokens(), d_model(), "JoinedRouter::backward", "x");
          require_shape(d_x, x.rows(), d_model(), "JoinedRouter::backward", "d_x");
          check_routing_gradient(gradient, routing, "JoinedRouter::backward");
        });
    const Routing<S>& joined = routing.levels[0];
    const TokenRange own{begin[comm_.rank()], x.rows()};
    const Index tokens = begin[comm_.size()];
    RoutingGradient<S>& joined_gradient = workspace.hierarchy.d_parent;
    comm_.agree({"JoinedRouter::backward, shapes"}, [&] {
      require(joined.num_tokens() == tokens, "JoinedRouter::backward: the joined routing is of ",
              joined.num_tokens(), " tokens, expected ", tokens);
      workspace.input.resize(tokens, d_model());
      workspace.d_input.setZero(tokens, d_model());
      workspace.d_input.middleRows(own.first, own.count) = d_x;
    });
    gather(x, begin, workspace.input);
    gather(gradient.d_router_logits, parts[1] > 0, begin, joined_gradient.d_router_logits);
    gather(gradient.d_router_probs, parts[2] > 0, begin, joined_gradient.d_router_probs);
    gather(gradient.d_noise_stddev, parts[3] > 0, begin, joined_gradient.d_noise_stddev);
    gather_choices(gradient.d_chosen_gate, parts[4] > 0, joined.chosen, begin, workspace.hierarchy.rank,
                   joined_gradient.d_chosen_gate);
    gather_assignments(gradient.d_gate, parts[5] > 0, joined.plan, begin, workspace, joined_gradient.d_gate);
    if (workspace.hierarchy.levels.empty()) workspace.hierarchy.levels.resize(1);
    route_backward_with(router_, workspace.input, joined, joined_gradient, workspace.d_input, grad.router_,
                        workspace.hierarchy.levels[0], executor);
    d_x = workspace.d_input.middleRows(own.first, own.count);
  }
  /// The same with a workspace of its own.
  template <Executor Ex = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, JoinedRouter& grad,
                const Ex& executor = {}) const requires TrainableRouter<R> {
    RouterWorkspace<S> workspace;
    backward(x, routing, gradient, d_x, grad, workspace, executor);
  }

  /// What a gradient by the joined routing, routing.levels[0], says of this process's tokens: what
  /// MoELayer::backward takes.
  RoutingGradient<S> own(const RoutingGradient<S>& gradient, const Routing<S>& routing) const {
    Buffer<Index> begin;
    gather_headers({"JoinedRouter::own"}, {routing.num_tokens()}, begin, [&] {
      require(routing.levels.size() == 1, "JoinedRouter::own: a routing of ", routing.levels.size(),
              " levels, expected 1, the joined one");
      check_routing_gradient(gradient, routing.levels[0], "JoinedRouter::own");
    });
    RoutingGradient<S> part;
    own_part(gradient, routing.levels[0], {begin[comm_.rank()], routing.num_tokens()}, part);
    return part;
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) requires requires(R& r) {
    R::visit(f, r);
  }
  { R::visit(f, self.router_...); }

 private:
  struct Header {
    Index tokens, part[5] = {};
  };
  static constexpr Index kHeader = sizeof(Header) / sizeof(Index);

  // Where each process's tokens begin, and how many processes have each part [1 + parts].
  template <class F>
  Buffer<Index> gather_headers(const Step& step, const Header& own, Buffer<Index>& begin,
                               const F& check) const {
    const Index processes = comm_.size();
    Buffer<Index> all, parts;
    comm_.agree(step, [&] {
      check();
      all.resize(processes * kHeader);
      parts.assign(kHeader, 0);
      begin.assign(processes + 1, 0);
    });
    comm_.gather(&own.tokens, kHeader, all.data());
    for (Index p = 0; p < processes; ++p) {
      begin[p + 1] = begin[p] + all[p * kHeader];
      for (Index i = 0; i < kHeader; ++i) parts[i] += all[p * kHeader + i];
    }
    return parts;
  }

  std::span<const Index> span(const Buffer<Index>& b) const { return {b.data(), b.data() + b.size()}; }

  template <class X>
  void gather(const X& own, const Buffer<Index>& begin, ReusedMatrix<S>& all) const {
    if (all.cols() == 0) return;
    const Matrix<S> rows = own;  // without gaps
    comm_.gather_rows(rows.data(), all.cols() * Index(sizeof(S)), span(begin), all.data());
  }

  // Rows of a part of a gradient, which is there where any process has it, with zeros of those that do not.
  void gather(const ReusedMatrix<S>& own, bool any, const Buffer<Index>& begin, ReusedMatrix<S>& all) const {
    all.resize(any ? begin[comm_.size()] : 0, any ? num_experts() : 0);
    if (!any) return;
    const Index tokens = begin[comm_.rank() + 1] - begin[comm_.rank()];
    Matrix<S> rows = own;
    if (own.size() == 0) rows.setZero(tokens, num_experts());
    gather(rows, begin, all);
  }

  // all [begin.back()] = the values [begin[p], begin[p + 1]) of each process p, zeros where it has none.
  void gather_values(const Buffer<S>& own, const Buffer<Index>& begin, Buffer<S>& all) const {
    Buffer<S> values = own;
    values.resize(begin[comm_.rank() + 1] - begin[comm_.rank()]);
    if (own.empty()) std::fill(values.begin(), values.end(), S(0));
    all.resize(begin[comm_.size()]);
    comm_.gather_rows(values.data(), sizeof(S), span(begin), all.data());
  }

  void gather_choices(const Buffer<S>& own, bool any, const Choices<S>& joined, const Buffer<Index>& begin,
                      Buffer<Index>& choice_begin, Buffer<S>& all) const {
    all.clear();
    if (!any) return;
    choice_begin.resize(comm_.size() + 1);
    for (Index p = 0; p <= comm_.size(); ++p) choice_begin[p] = joined.token_begin[begin[p]];
    gather_values(own, choice_begin, all);
  }

  // Values of assignments come process by process and are put in the order of the joined plan.
  void gather_assignments(const Buffer<S>& own, bool any, const DispatchPlan<S>& joined,
                          const Buffer<Index>& begin, RouterWorkspace<S>& workspace, Buffer<S>& all) const {
    all.clear();
    if (!any) return;
    Buffer<Index>& at = workspace.hierarchy.rank;
    at.assign(comm_.size() + 1, 0);
    const auto range = [&](Index p) { return TokenRange{begin[p], begin[p + 1] - begin[p]}; };
    for (Index p = 0; p < comm_.size(); ++p) {
      at[p + 1] = at[p];
      for_each_own_block(joined, range(p), [&](Index, Index first, Index end) { at[p + 1] += end - first; });
    }
    Buffer<S>& received = workspace.hierarchy.d_gate;
    gather_values(own, at, received);
    all.resize(received.size());
    for (Index p = 0; p < comm_.size(); ++p) {
      const S* next = received.data() + at[p];
      for_each_own_block(joined, range(p), [&](Index, Index first, Index end) {
        std::copy_n(next, end - first, all.data() + first);
        next += end - first;
      });
    }
  }

  // workspace.input and hierarchy.info become the joined batch, routing.levels[0] and hierarchy.levels[0] are
  // there. Returns the own tokens.
  TokenRange join(const ConstMatrixRef<S>& x, const BatchInfo& info, Index random, Routing<S>& routing,
                  RouterWorkspace<S>& workspace) const {
    constexpr const char* kWhere = "JoinedRouter::route";
    Buffer<Index>& begin = workspace.hierarchy.leaf;
    const Index groups = info.group_begin.size() > 0 ? info.num_groups() : 0;
    const Step step{
        kWhere, {d_model(), num_experts(), Index(sizeof(S)), random}, "d_model, experts, bytes, random"};
    const Buffer<Index> parts = gather_headers(
        step, {x.rows(), {info.mask.size() > 0, info.token_ids.size() > 0, groups}}, begin, [&] {
          require_shape(x, x.rows(), d_model(), kWhere, "x");
          check_batch_info(info, x.rows(), kWhere);
        });
    const Index tokens = begin[comm_.size()];
    comm_.agree({"JoinedRouter::route, shapes"}, [&] {
      require(x.rows() == 0 || parts[2] == 0 || info.token_ids.size() > 0, kWhere, ": no token_ids for ",
              x.rows(), " tokens, but other processes have them");
      require(x.rows() == 0 || parts[3] == 0 || groups > 0, kWhere, ": no group_begin for ", x.rows(),
              " tokens, but other processes have ", parts[3], " groups");
      if (routing.levels.size() != 1) routing.levels.resize(1);
      if (workspace.hierarchy.levels.empty()) workspace.hierarchy.levels.resize(1);
      workspace.input.resize(tokens, d_model());
    });
    gather(x, begin, workspace.input);
    join_info(info, parts, begin, workspace.hierarchy.info);
    return {begin[comm_.rank()], x.rows()};
  }

  void join_info(const BatchInfo& info, const Buffer<Index>& parts, const Buffer<Index>& begin,
                 BatchInfo& joined) const {
    const Index tokens = begin[comm_.size()], own = begin[comm_.rank() + 1] - begin[comm_.rank()];
    joined.mask.resize(parts[1] > 0 ? tokens : 0);
    joined.token_ids.resize(parts[2] > 0 ? tokens : 0);
    joined.group_begin.resize(parts[3] > 0 ? parts[3] + 1 : 0);
    if (parts[1] > 0) {
      Mask mask = info.mask;
      if (mask.size() == 0) mask.setConstant(own, true);
      comm_.gather_rows(mask.data(), sizeof(bool), span(begin), joined.mask.data());
    }
    if (parts[2] > 0)
      comm_.gather_rows(info.token_ids.data(), sizeof(Index), span(begin), joined.token_ids.data());
    if (parts[3] == 0) return;
    const Index groups = info.group_begin.size() > 0 ? info.num_groups() : 0;
    Buffer<Index> at, counts;
    counts.resize(comm_.size());
    at.assign(comm_.size() + 1, 0);
    comm_.gather(&groups, 1, counts.data());
    for (Index p = 0; p < comm_.size(); ++p) at[p + 1] = at[p] + counts[p];
    IndexVector first(groups);
    for (Index g = 0; g < groups; ++g) first[g] = begin[comm_.rank()] + info.group_begin[g];
    comm_.gather_rows(first.data(), sizeof(Index), span(at), joined.group_begin.data());
    joined.group_begin[parts[3]] = tokens;
  }

  Communicator comm_;
  R router_;
};

}  // namespace moe
