// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <variant>
#include <vector>

#include <moe/experts/three_way_feed_forward.hpp>
#include <moe/experts/zero_computation_experts.hpp>
#include <moe/moe.hpp>

// A Mixture-of-Experts layer to believe in: scalar loops, one idea a function, a search through
// everything wherever the library sorts or counts. It reads the library's types and calls none of
// its functions. Everything is computed in the scalar S of the weights.
namespace reference {

using moe::Index;
using moe::Matrix;
using moe::Vector;

template <class T>
T& at(std::vector<T>& list, Index i) {
  return list[std::size_t(i)];
}
template <class T>
const T& at(const std::vector<T>& list, Index i) {
  return list[std::size_t(i)];
}
template <class T>
bool contains(const std::vector<T>& list, const T& value) {
  for (const T& entry : list)
    if (entry == value) return true;
  return false;
}

// ---- Experts: one token's row at a time.

template <class S>
S sigmoid(S x) {
  return S(1) / (S(1) + std::exp(-x));
}

template <class S>
S activate(const moe::ReLU&, S x) {
  return x > S(0) ? x : S(0);
}
template <class S>
S activate(const moe::GELU&, S x) {
  return x * (S(1) + std::erf(x / std::sqrt(S(2)))) / S(2);
}
template <class S>
S activate(const moe::GELUTanh&, S x) {
  const S pi = std::acos(S(-1));
  return x * (S(1) + std::tanh(std::sqrt(S(2) / pi) * (x + S(0.044715) * x * x * x))) / S(2);
}
template <class S>
S activate(const moe::SiLU&, S x) {
  return x * sigmoid(x);
}

template <class S, class Activation>
S activate_gated(const moe::Glu<Activation>& unit, S gate, S up) {
  return activate(unit.activation, gate) * up;
}
template <class S>
S activate_gated(const moe::ClampedSwiGLU& unit, S gate, S up) {
  const S limit = S(unit.limit);
  if (gate > limit) gate = limit;
  if (up > limit) up = limit;
  if (up < -limit) up = -limit;
  return (up + S(unit.offset)) * gate * sigmoid(S(unit.alpha) * gate);
}

// w x + b, w being [out, in]; b may be empty.
template <class S>
Vector<S> linear(const Vector<S>& x, const Matrix<S>& w, const Vector<S>& b = {}) {
  Vector<S> y(w.rows());
  for (Index o = 0; o < w.rows(); ++o) {
    y[o] = b.size() > 0 ? b[o] : S(0);
    for (Index i = 0; i < w.cols(); ++i) y[o] += w(o, i) * x[i];
  }
  return y;
}

template <class S, class Activation>
Vector<S> expert_output(const moe::FeedForward<S, Activation>& expert, const Vector<S>& x) {
  Vector<S> hidden = linear(x, expert.w_up, expert.b_up);
  for (Index i = 0; i < hidden.size(); ++i) hidden[i] = activate(expert.activation(), hidden[i]);
  return linear(hidden, expert.w_down, expert.b_down);
}

template <class S, class Unit>
Vector<S> expert_output(const moe::GatedFeedForward<S, Unit>& expert, const Vector<S>& x) {
  const Vector<S> gate = linear(x, expert.w_gate, expert.b_gate);
  const Vector<S> up = linear(x, expert.w_up, expert.b_up);
  Vector<S> hidden(gate.size());
  for (Index i = 0; i < hidden.size(); ++i) hidden[i] = activate_gated(expert.glu(), gate[i], up[i]);
  return linear(hidden, expert.w_down, expert.b_down);
}

template <class S>
Vector<S> expert_output(const moe::ThreeWayFeedForward<S>& expert, const Vector<S>& x) {
  const Vector<S> a = linear(x, expert.w_gate), up = linear(x, expert.w_up);
  Vector<S> hidden(up.size());
  for (Index i = 0; i < up.size(); ++i)
    hidden[i] = a[i] * (a[up.size() + i] * sigmoid(a[up.size() + i])) * up[i];
  return linear(hidden, expert.w_down);
}

template <class S>
Vector<S> expert_output(const moe::ZeroExpert<S>&, const Vector<S>& x) {
  return Vector<S>::Zero(x.size());
}

template <class S>
Vector<S> expert_output(const moe::CopyExpert<S>&, const Vector<S>& x) {
  return x;
}

template <class S>
Vector<S> expert_output(const moe::ConstantExpert<S>& expert, const Vector<S>& x) {
  S z[2] = {0, 0};
  for (int k = 0; k < 2; ++k)
    for (Index j = 0; j < x.size(); ++j) z[k] += expert.w_c(k, j) * x[j];
  const S copy = S(1) / (S(1) + std::exp(z[1] - z[0])), constant = S(1) - copy;
  Vector<S> y(x.size());
  for (Index j = 0; j < x.size(); ++j) y[j] = copy * x[j] + constant * expert.v[j];
  return y;
}

template <class S, class... Kinds>
Vector<S> expert_output(const moe::VariantExpert<Kinds...>& expert, const Vector<S>& x) {
  return std::visit([&](const auto& kind) { return expert_output(kind, x); }, expert.get());
}

// ---- The layer: y [tokens, d_model] under a given plan.

template <class S>
Vector<S> row_of(const Matrix<S>& m, Index i) {
  Vector<S> row(m.cols());
  for (Index j = 0; j < m.cols(); ++j) row[j] = m(i, j);
  return row;
}

// The experts' outputs times their gates (or the experts' outputs for the input times the gate); or
// x for a token that is passed through.
template <class S, class Expert>
Vector<S> routed_sum(Index t, const Vector<S>& x, const std::vector<Expert>& experts,
                     const moe::DispatchPlan<S>& plan) {
  for (const Index passed : plan.passed_through)
    if (passed == t) return x;
  Vector<S> sum(x.size());
  for (Index j = 0; j < x.size(); ++j) sum[j] = S(0);
  for (Index e = 0; e < Index(experts.size()); ++e) {
    for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
      if (plan.token[a] != t) continue;
      const bool scale_input = plan.gate_side == moe::GateSide::input;
      Vector<S> input = x;
      for (Index j = 0; j < x.size(); ++j)
        if (scale_input) input[j] *= plan.gate[a];
      const Vector<S> output = expert_output(at(experts, e), input);
      for (Index j = 0; j < x.size(); ++j) sum[j] += scale_input ? output[j] : plan.gate[a] * output[j];
    }
  }
  return sum;
}

// w_shared_gate [shared experts, d_model] and b_output [d_model] may be empty.
template <class S, class Expert>
Matrix<S> layer_output(const Matrix<S>& x, const std::vector<Expert>& experts,
                       const std::vector<Expert>& shared, const Matrix<S>& w_shared_gate,
                       const Vector<S>& b_output, const moe::DispatchPlan<S>& plan) {
  Matrix<S> y(x.rows(), x.cols());
  for (Index t = 0; t < x.rows(); ++t) {
    if (plan.token_state[t] != moe::TokenState::valid) {
      const bool masked = plan.token_state[t] == moe::TokenState::masked;
      for (Index j = 0; j < x.cols(); ++j) y(t, j) = masked ? S(0) : std::numeric_limits<S>::quiet_NaN();
      continue;
    }
    const Vector<S> row = row_of(x, t);
    Vector<S> sum = routed_sum(t, row, experts, plan);
    for (Index s = 0; s < Index(shared.size()); ++s) {
      S gate = S(1);
      if (w_shared_gate.size() > 0) gate = sigmoid(linear(row, w_shared_gate)[s]);
      const Vector<S> output = expert_output(at(shared, s), row);
      for (Index j = 0; j < x.cols(); ++j) sum[j] += gate * output[j];
    }
    for (Index j = 0; j < x.cols(); ++j) y(t, j) = sum[j] + (b_output.size() > 0 ? b_output[j] : 0);
  }
  return y;
}

// ---- Routing.

// A choice of a token, and what became of it.
template <class S>
struct Choice {
  Index token;
  Index rank;  // 0 is the token's first choice
  Index expert;
  S gate;
  Index seat;   // the expert at which it sits in the end, or -1
  S seat_gate;  // the gate there
};

// What a router decides about a batch.
template <class S>
struct Decision {
  Matrix<S> probs;  // [tokens, experts]
  std::vector<moe::TokenState> state;
  std::vector<Choice<S>> choices;  // by token, then by rank
  std::vector<moe::Dropped> dropped;
  std::vector<Index> passed_through;
};

// How tokens choose.
struct Rule {
  Index top_k = 1;
  bool gates_sum_to_one = false;  // softmax over the experts in use, else over all experts
  std::optional<double> capacity_factor{};
  moe::Overflow overflow = moe::Overflow::drop;
  moe::Priority priority = moe::Priority::token_order;
  bool renormalise_after_drop = false;
};

// x w^T (+ b) [tokens, experts].
template <class S>
Matrix<S> logits(const Matrix<S>& x, const Matrix<S>& w, const Vector<S>& b = {}) {
  Matrix<S> z(x.rows(), w.rows());
  for (Index t = 0; t < x.rows(); ++t) {
    const Vector<S> row = linear(row_of(x, t), w, b);
    for (Index e = 0; e < w.rows(); ++e) z(t, e) = row[e];
  }
  return z;
}

// x w_router^T + draws * (log(1 + exp(x w_noise^T)) + epsilon).
template <class S>
Matrix<S> noisy_logits(const Matrix<S>& x, const Matrix<S>& w_router, const Matrix<S>& w_noise,
                       double epsilon, const moe::ConstMatrixRef<S>& draws) {
  Matrix<S> z = logits(x, w_router);
  const Matrix<S> a = logits(x, w_noise);
  for (Index t = 0; t < z.rows(); ++t)
    for (Index e = 0; e < z.cols(); ++e)
      z(t, e) += draws(t, e) * (std::log(S(1) + std::exp(a(t, e))) + S(epsilon));
  return z;
}

template <class S>
constexpr S kInfinity = std::numeric_limits<S>::infinity();

// Expert e's share of the softmax of token t's logits over the experts `among`.
template <class S>
S softmax(const Matrix<S>& z, Index t, Index e, const std::vector<Index>& among) {
  if (z(t, e) == -kInfinity<S>) return S(0);
  S sum = 0;
  for (const Index other : among) sum += std::exp(z(t, other) - z(t, e));
  return S(1) / sum;
}

inline std::vector<Index> numbers(Index begin, Index end) {
  std::vector<Index> all;
  for (Index i = begin; i < end; ++i) all.push_back(i);
  return all;
}

template <class S>
moe::TokenState state_of(const Matrix<S>& z, Index t, const moe::BatchInfo& info) {
  if (info.mask.size() > 0 && !info.mask[t]) return moe::TokenState::masked;
  bool all_unavailable = true;
  for (Index e = 0; e < z.cols(); ++e) {
    if (std::isnan(z(t, e)) || z(t, e) == kInfinity<S>) return moe::TokenState::poisoned;
    if (z(t, e) != -kInfinity<S>) all_unavailable = false;
  }
  return all_unavailable ? moe::TokenState::poisoned : moe::TokenState::valid;
}

// The gate of an expert that is one of those `in_use`.
template <class S>
S gate_of(const Matrix<S>& z, Index t, Index e, bool gates_sum_to_one, const std::vector<Index>& in_use) {
  return softmax(z, t, e, gates_sum_to_one ? in_use : numbers(0, z.cols()));
}

// The best expert of token t that is neither unavailable nor `excluded`, or -1.
template <class S>
Index best_expert(const Matrix<S>& z, Index t, const std::vector<Index>& excluded) {
  Index best = -1;
  for (Index e = 0; e < z.cols(); ++e) {
    if (z(t, e) == -kInfinity<S> || contains(excluded, e)) continue;
    if (best < 0 || z(t, e) > z(t, best)) best = e;
  }
  return best;
}

struct Group {
  Index begin, end;
};

inline std::vector<Group> groups_of(const moe::BatchInfo& info, Index tokens) {
  if (info.group_begin.size() == 0) return {{0, tokens}};
  std::vector<Group> groups;
  for (Index g = 0; g + 1 < info.group_begin.size(); ++g)
    groups.push_back({info.group_begin[g], info.group_begin[g + 1]});
  return groups;
}

// The smallest number of seats that is no less than factor * top_k * tokens / experts, at most one
// for each token.
template <class S>
Index seats_of_an_expert(const Decision<S>& decision, Group group, Index experts, Index top_k,
                         double factor) {
  Index tokens = 0;
  for (Index t = group.begin; t < group.end; ++t)
    if (at(decision.state, t) == moe::TokenState::valid) ++tokens;
  Index seats = 0;
  while (seats < tokens && double(seats) < factor * double(top_k) * double(tokens) / double(experts)) ++seats;
  return seats;
}

// The group's choices, as indices, in the order in which they are seated.
template <class S>
std::vector<Index> in_order_of_priority(const Decision<S>& decision, Group group, moe::Priority priority) {
  const std::vector<Choice<S>>& choices = decision.choices;
  std::vector<Index> order;
  const auto belongs = [&](const Choice<S>& c) { return c.token >= group.begin && c.token < group.end; };
  if (priority == moe::Priority::assignment_gate) {
    for (;;) {  // of the choices that are left, the first with the largest gate
      Index next = -1;
      for (Index c = 0; c < Index(choices.size()); ++c) {
        if (!belongs(at(choices, c)) || contains(order, c)) continue;
        if (next < 0 || at(choices, c).gate > at(choices, next).gate) next = c;
      }
      if (next < 0) return order;
      order.push_back(next);
    }
  }
  std::vector<Index> tokens = numbers(group.begin, group.end);
  if (priority == moe::Priority::token_max_gate || priority == moe::Priority::token_max_prob) {
    tokens.clear();
    for (;;) {  // of the tokens that are left, the first with the largest gate or probability
      Index next = -1;
      S largest = -1;
      for (Index t = group.begin; t < group.end; ++t) {
        if (contains(tokens, t)) continue;
        S own = 0;
        for (const Choice<S>& c : choices) {
          if (c.token != t) continue;
          const S value = priority == moe::Priority::token_max_gate ? c.gate : decision.probs(t, c.expert);
          if (value > own) own = value;
        }
        if (own > largest) {
          largest = own;
          next = t;
        }
      }
      if (next < 0) break;
      tokens.push_back(next);
    }
  }
  Index ranks = 0;
  for (const Choice<S>& c : choices)
    if (c.rank >= ranks) ranks = c.rank + 1;
  for (Index rank = 0; rank < ranks; ++rank)
    for (const Index t : tokens)
      for (Index c = 0; c < Index(choices.size()); ++c)
        if (at(choices, c).token == t && at(choices, c).rank == rank) order.push_back(c);
  return order;
}

// The experts at which token t sits.
template <class S>
std::vector<Index> seats_of_token(const std::vector<Choice<S>>& choices, Index t) {
  std::vector<Index> experts;
  for (const Choice<S>& c : choices)
    if (c.token == t && c.seat >= 0) experts.push_back(c.seat);
  return experts;
}

// The experts at which as many choices of the group sit as there are seats.
template <class S>
std::vector<Index> full_experts(const std::vector<Choice<S>>& choices, Group group, Index experts,
                                Index seats) {
  std::vector<Index> full;
  for (Index e = 0; e < experts; ++e) {
    Index taken = 0;
    for (const Choice<S>& c : choices)
      if (c.token >= group.begin && c.token < group.end && c.seat == e) ++taken;
    if (taken >= seats) full.push_back(e);
  }
  return full;
}

template <class S>
void seat_group(const Matrix<S>& z, const Rule& rule, Group group, Decision<S>& decision) {
  std::vector<Choice<S>>& choices = decision.choices;
  const Index seats = seats_of_an_expert(decision, group, z.cols(), rule.top_k, *rule.capacity_factor);
  const std::vector<Index> order = in_order_of_priority(decision, group, rule.priority);
  for (const Index c : order)
    if (!contains(full_experts(choices, group, z.cols(), seats), at(choices, c).expert))
      at(choices, c).seat = at(choices, c).expert;
  for (const Index i : order) {
    Choice<S>& c = at(choices, i);
    if (c.seat >= 0) continue;
    if (rule.overflow == moe::Overflow::next_best) {
      std::vector<Index> excluded = full_experts(choices, group, z.cols(), seats);
      for (const Index e : seats_of_token(choices, c.token)) excluded.push_back(e);
      c.seat = best_expert(z, c.token, excluded);
    }
    if (c.seat < 0) decision.dropped.push_back({c.token, c.expert, c.rank});
  }
}

// The states and probabilities of a batch; nothing chosen yet. A token is poisoned where its logits
// say so, with or without noise.
template <class S>
Decision<S> begin_decision(const Matrix<S>& clean_z, const Matrix<S>& z, const moe::BatchInfo& info) {
  Decision<S> decision;
  decision.probs.resize(z.rows(), z.cols());
  for (Index t = 0; t < z.rows(); ++t) {
    moe::TokenState state = state_of(clean_z, t, info);
    if (state == moe::TokenState::valid) state = state_of(z, t, info);
    decision.state.push_back(state);
    for (Index e = 0; e < z.cols(); ++e)
      decision.probs(t, e) = state == moe::TokenState::valid ? softmax(z, t, e, numbers(0, z.cols())) : S(0);
  }
  return decision;
}

// Tokens choose experts by the logits z; `clean_z` are the logits without noise.
template <class S>
Decision<S> token_choice(const Matrix<S>& clean_z, const Matrix<S>& z, const Rule& rule,
                         const moe::BatchInfo& info) {
  Decision<S> decision = begin_decision(clean_z, z, info);
  std::vector<Choice<S>>& choices = decision.choices;
  for (Index t = 0; t < z.rows(); ++t) {
    if (at(decision.state, t) != moe::TokenState::valid) continue;
    std::vector<Index> chosen;
    while (Index(chosen.size()) < rule.top_k) {
      const Index e = best_expert(z, t, chosen);
      if (e < 0) break;
      chosen.push_back(e);
    }
    for (Index rank = 0; rank < Index(chosen.size()); ++rank) {
      const Index e = at(chosen, rank);
      const S gate = gate_of(z, t, e, rule.gates_sum_to_one, chosen);
      choices.push_back({t, rank, e, gate, -1, gate});
    }
  }
  if (!rule.capacity_factor) {
    for (Choice<S>& c : choices) c.seat = c.expert;
    return decision;
  }
  for (const Group group : groups_of(info, z.rows())) seat_group(z, rule, group, decision);
  const bool next_best = rule.overflow == moe::Overflow::next_best;
  for (Choice<S>& c : choices)
    if (c.seat >= 0 && (next_best || (rule.renormalise_after_drop && rule.gates_sum_to_one)))
      c.seat_gate = gate_of(z, c.token, c.seat, rule.gates_sum_to_one, seats_of_token(choices, c.token));
  if (rule.overflow == moe::Overflow::pass_through) {
    for (Index t = 0; t < z.rows(); ++t) {
      bool has_choices = false;
      for (const Choice<S>& c : choices) has_choices = has_choices || c.token == t;
      if (has_choices && seats_of_token(choices, t).empty()) decision.passed_through.push_back(t);
    }
  }
  return decision;
}

// Experts choose tokens.
template <class S>
Decision<S> expert_choice(const Matrix<S>& z, double capacity_factor, moe::Overflow overflow,
                          const moe::BatchInfo& info) {
  Decision<S> decision = begin_decision(z, z, info);
  const Index experts = z.cols();
  std::vector<std::vector<Index>> tokens_of;  // by expert
  tokens_of.resize(std::size_t(experts));
  for (const Group group : groups_of(info, z.rows())) {
    const Index seats = seats_of_an_expert(decision, group, experts, 1, capacity_factor);
    for (Index e = 0; e < experts; ++e) {
      for (Index seat = 0; seat < seats; ++seat) {
        Index best = -1;
        for (Index t = group.begin; t < group.end; ++t) {
          if (at(decision.state, t) != moe::TokenState::valid || z(t, e) == -kInfinity<S>) continue;
          if (contains(at(tokens_of, e), t)) continue;
          if (best < 0 || decision.probs(t, e) > decision.probs(best, e)) best = t;
        }
        if (best >= 0) at(tokens_of, e).push_back(best);
      }
    }
  }
  for (Index t = 0; t < z.rows(); ++t) {
    Index rank = 0;
    for (Index e = 0; e < experts; ++e) {
      if (!contains(at(tokens_of, e), t)) continue;
      decision.choices.push_back({t, rank++, e, decision.probs(t, e), e, decision.probs(t, e)});
    }
    if (rank == 0 && overflow == moe::Overflow::pass_through &&
        at(decision.state, t) == moe::TokenState::valid)
      decision.passed_through.push_back(t);
  }
  return decision;
}

}  // namespace reference
