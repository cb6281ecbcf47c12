// SPDX-License-Identifier: MIT
#include <functional>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

// Every public entry point with every kind of bad argument: the exception is std::invalid_argument,
// and its message names the place and holds every number that matters.
namespace {

using moe::BatchInfo;
using moe::Buffer;
using moe::Index;
using moe::IndexVector;
using moe::Matrix;
using moe::Overflow;
using moe::Priority;
using moe::Rng;
using moe::RowBuffer;
using moe::Vector;
using Routing = moe::Routing<double>;
using Gradient = moe::RoutingGradient<double>;
using Plain = moe::FeedForward<double>;
using Gated = moe::GatedFeedForward<double>;
using Either = moe::VariantExpert<Plain, Gated>;
using TopK = moe::TopKRouter<double>;
using Noisy = moe::NoisyTopKRouter<double>;
using ExpertChoice = moe::ExpertChoiceRouter<double>;
using Sinkhorn = moe::SinkhornRouter<double>;
using Mixer = moe::SparseMixerRouter<double>;
using Layer = moe::MoELayer<Gated, TopK>;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Case {
  const char* name;
  std::function<void()> call;
  std::vector<std::string> in_message;  // a number is to stand there as a whole one
};

bool contains(const std::string& message, const std::string& part) {
  const bool number = part.find_first_not_of("-.0123456789") == std::string::npos;
  const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
  for (auto at = message.find(part); at != std::string::npos; at = message.find(part, at + 1)) {
    const char before = at == 0 ? ' ' : message[at - 1];
    const auto end = at + part.size();
    const bool ends = end == message.size() || !is_digit(message[end]);
    if (!number || (ends && !is_digit(before) && before != '-' && before != '.')) return true;
  }
  return false;
}

void expect_errors(std::initializer_list<Case> cases) {
  for (const Case& c : cases) {
    try {
      c.call();
      ADD_FAILURE() << c.name << ": nothing was thrown";
    } catch (const std::invalid_argument& error) {
      for (const std::string& part : c.in_message)
        EXPECT_TRUE(contains(error.what(), part))
            << c.name << ": \"" << error.what() << "\" has no \"" << part << '"';
    } catch (const std::exception& error) {
      ADD_FAILURE() << c.name << ": another exception: " << error.what();
    }
  }
}

// ---- Arguments that are right, to be spoilt.

Matrix<double> ones(Index rows, Index cols) { return Matrix<double>::Ones(rows, cols); }

// A batch of 5 tokens, 4 wide, 3 experts, each token at two of them.
constexpr Index kTokens = 5, kModel = 4, kExperts = 3;

template <class R>
R make_router(typename R::Options options = {}) {
  Rng rng(1);
  options.d_model = kModel;
  options.num_experts = kExperts;
  return R(options, rng);
}

Matrix<double> input() {
  Rng rng(2);
  Matrix<double> x(kTokens, kModel);
  moe::fill_normal(x, 1.0, rng);
  return x;
}

Routing good_routing() {
  Routing routing;
  make_router<TopK>().route(input(), {}, routing);
  return routing;
}

Routing noisy_routing() {
  Routing routing;
  Rng rng(3);
  make_router<Noisy>().route(input(), rng, {}, routing);
  return routing;
}

// A good routing after `spoil`.
template <class Spoil>
Routing spoilt(const Spoil& spoil, Routing routing = good_routing()) {
  spoil(routing);
  return routing;
}

Gated::Options expert_options(Index d_model = kModel, Index d_ff = 6) {
  return {.d_model = d_model, .d_ff = d_ff, .bias = true};
}

std::vector<Gated> make_experts(Index count, const Gated::Options& options = expert_options()) {
  Rng rng(4);
  return moe::make_experts<Gated>(count, options, rng);
}

Layer make_layer(bool shared = false) {
  return Layer(make_experts(kExperts), make_router<TopK>(),
               {.experts = make_experts(shared ? 1 : 0), .gated = shared});
}

RowBuffer<double> rows(Index count, Index cols = kModel) {
  RowBuffer<double> buffer;
  buffer.resize(count, cols);
  buffer.matrix().setOnes();
  return buffer;
}

BatchInfo with_mask(Index n) { return {.mask = moe::Mask::Constant(n, true)}; }
BatchInfo with_ids(Index n) { return {.token_ids = IndexVector::Zero(n)}; }
BatchInfo with_groups(IndexVector begin) { return {.group_begin = std::move(begin)}; }

Buffer<double> filled(Index n) {
  Buffer<double> buffer;
  buffer.assign(n, 1.0);
  return buffer;
}

// ---- The ground.

TEST(Errors, OfTheGround) {
  expect_errors({
      {"fail", [] { moe::fail("a", 1, "b", 2.5); }, {"a1b2.5"}},
      {"require", [] { moe::require(false, "x is ", 3, ", not ", 4); }, {"x is 3, not 4"}},
      {"require_shape: rows",
       [] { moe::require_shape(ones(2, 3), 5, 3, "here", "m"); },
       {"here: m", "[2, 3]", "[5, 3]"}},
      {"require_shape: columns",
       [] { moe::require_shape(ones(2, 3), 2, 7, "here", "m"); },
       {"here: m", "[2, 3]", "[2, 7]"}},
      {"Buffer::resize", [] { Buffer<int>().resize(-1); }, {"Buffer::resize", "-1", "0"}},
      {"Buffer::assign", [] { Buffer<int>().assign(-2, 7); }, {"-2", "0"}},
      {"RowBuffer::resize: rows", [] { RowBuffer<int>().resize(-1, 4); }, {"[-1, 4]", "[0, 0]"}},
      {"RowBuffer::resize: columns", [] { RowBuffer<int>().resize(3, -4); }, {"[3, -4]", "[0, 0]"}},
      {"Rng::index: zero", [] { Rng().index(0); }, {"Rng::index", "0", "1"}},
      {"Rng::index: negative", [] { Rng().index(-6); }, {"-6", "1"}},
      {"lecun_normal: out",
       [] {
         Rng rng;
         moe::lecun_normal<float>(-1, 3, rng);
       },
       {"lecun_normal", "[-1, 3]"}},
      {"lecun_normal: in",
       [] {
         Rng rng;
         moe::lecun_normal<float>(2, -3, rng);
       },
       {"[2, -3]"}},
      {"he_normal: out",
       [] {
         Rng rng;
         moe::he_normal<float>(-1, 3, rng);
       },
       {"he_normal", "[-1, 3]"}},
      {"he_normal: in",
       [] {
         Rng rng;
         moe::he_normal<float>(2, -3, rng);
       },
       {"[2, -3]"}},
      {"top_k: too many",
       [] {
         moe::top_k(Vector<double>{{1, 2, 3}}, 4);
       },
       {"top_k", "4", "3"}},
      {"top_k: negative",
       [] {
         moe::top_k(Vector<double>{{1, 2, 3}}, -2);
       },
       {"-2", "3"}},
      {"make_experts", [] { make_experts(-3); }, {"make_experts", "-3", "0"}},
      {"visit_array",
       [] {
         const Matrix<double> a = ones(2, 3), b = ones(2, 4);
         moe::visit_array([](const auto&, const auto&, const auto&) {}, {"w_up"}, a, b);
       },
       {"w_up", "[2, 4]", "[2, 3]"}},
#ifdef _OPENMP
      {"OpenMP: for_each", [] { moe::OpenMP{-2}.for_each(3, [](Index, Index) {}); }, {"OpenMP", "-2", "0"}},
      {"OpenMP: concurrency", [] { moe::OpenMP{-2}.concurrency(); }, {"-2", "0"}},
#endif
  });
}

// ---- Products and scores.

TEST(Errors, OfProducts) {
  // x [5, 4], w [3, 4], y [5, 3].
  const auto linear = [](Index x_rows, Index x_cols, Index w_rows, Index w_cols, Index y_rows, Index y_cols) {
    return [=] {
      Matrix<double> y = ones(y_rows, y_cols);
      moe::linear(ones(x_rows, x_cols), ones(w_rows, w_cols), y);
    };
  };
  const auto by_input = [](Index d_y_rows, Index d_y_cols, Index d_x_rows, Index d_x_cols) {
    return [=] {
      Matrix<double> d_x = ones(d_x_rows, d_x_cols);
      moe::linear_backward_input(ones(d_y_rows, d_y_cols), ones(3, 4), d_x);
    };
  };
  const auto by_weight = [](Index d_y_rows, Index x_rows, Index d_w_rows, Index d_w_cols) {
    return [=] {
      Matrix<double> d_w = ones(d_w_rows, d_w_cols);
      moe::linear_backward_weight(ones(d_y_rows, 3), ones(x_rows, 4), d_w);
    };
  };
  expect_errors({
      {"linear: widths", linear(5, 4, 3, 7, 5, 3), {"linear: w", "[3, 7]", "[3, 4]"}},
      {"linear: rows", linear(5, 4, 3, 4, 6, 3), {"linear: y", "[6, 3]", "[5, 3]"}},
      {"linear: outputs", linear(5, 4, 3, 4, 5, 2), {"linear: w", "[3, 4]", "[2, 4]"}},
      {"by input: outputs", by_input(5, 2, 5, 4), {"linear_backward_input: w", "[3, 4]", "[2, 4]"}},
      {"by input: inputs", by_input(5, 3, 5, 9), {"[3, 4]", "[3, 9]"}},
      {"by input: rows", by_input(5, 3, 6, 4), {"d_x", "[6, 4]", "[5, 4]"}},
      {"by weight: rows", by_weight(5, 6, 3, 4), {"linear_backward_weight: x", "[6, 4]", "[5, 4]"}},
      {"by weight: outputs", by_weight(5, 5, 2, 4), {"d_w", "[2, 4]", "[3, 4]"}},
      {"by weight: inputs", by_weight(5, 5, 3, 8), {"x", "[5, 4]", "[5, 8]"}},
      {"add_bias",
       [] {
         Matrix<double> y = ones(5, 3);
         moe::add_bias(Vector<double>(Vector<double>::Ones(2)), y);
       },
       {"add_bias", "2", "3"}},
      {"bias_backward",
       [] {
         Vector<double> d_b = Vector<double>::Ones(7);
         moe::bias_backward(ones(5, 3), d_b);
       },
       {"bias_backward", "7", "3"}},
  });
}

TEST(Errors, OfScores) {
  const auto router_linear = [](Index w_cols, Index rows, Index cols) {
    return [=] {
      Matrix<double> logits = ones(rows, cols);
      moe::router_linear(ones(5, 4), ones(3, w_cols), logits, moe::Sequential{});
    };
  };
  const auto backward = [](Index d_z_rows, Index d_z_cols, Index d_w_rows, Index d_w_cols, Index d_x_rows,
                           Index d_x_cols) {
    return [=] {
      Matrix<double> d_w = ones(d_w_rows, d_w_cols), d_x = ones(d_x_rows, d_x_cols);
      moe::router_linear_backward(ones(5, 4), ones(3, 4), ones(d_z_rows, d_z_cols), d_w, d_x,
                                  moe::Sequential{});
    };
  };
  expect_errors({
      {"router_linear: logits' rows", router_linear(4, 6, 3), {"router_linear", "[6, 3]", "[5, 3]"}},
      {"router_linear: logits' columns", router_linear(4, 5, 2), {"[5, 2]", "[5, 3]"}},
      {"router_linear: width", router_linear(9, 5, 3), {"[3, 9]", "[3, 4]"}},
      {"backward: d_logits' rows", backward(6, 3, 3, 4, 5, 4), {"d_logits", "[6, 3]", "[5, 3]"}},
      {"backward: d_logits' columns", backward(5, 2, 3, 4, 5, 4), {"[5, 2]", "[5, 3]"}},
      {"backward: d_w's rows", backward(5, 3, 2, 4, 5, 4), {"d_w", "[2, 4]", "[3, 4]"}},
      {"backward: d_w's columns", backward(5, 3, 3, 9, 5, 4), {"[3, 9]", "[3, 4]"}},
      {"backward: d_x's rows", backward(5, 3, 3, 4, 6, 4), {"d_x", "[6, 4]", "[5, 4]"}},
      {"backward: d_x's columns", backward(5, 3, 3, 4, 5, 9), {"[5, 9]", "[5, 4]"}},
  });
}

// ---- What describes a batch and a routing.

// Every kind of bad BatchInfo for 5 tokens, at an entry point that takes one.
void expect_bad_info(const char* where, const std::function<void(const BatchInfo&)>& call) {
  SCOPED_TRACE(where);
  expect_errors({
      {"mask", [&] { call(with_mask(4)); }, {where, "mask", "4", "5"}},
      {"long mask", [&] { call(with_mask(6)); }, {where, "mask", "6", "5"}},
      {"token_ids", [&] { call(with_ids(7)); }, {where, "token_ids", "7", "5"}},
      {"one group_begin", [&] { call(with_groups(IndexVector{{5}})); }, {where, "group_begin", "1", "2"}},
      {"groups' begin",
       [&] {
         call(with_groups(IndexVector{{1, 5}}));
       },
       {where, "from 1 to 5", "from 0 to 5"}},
      {"groups' end",
       [&] {
         call(with_groups(IndexVector{{0, 4}}));
       },
       {where, "from 0 to 4", "from 0 to 5"}},
      {"groups beyond the end",
       [&] {
         call(with_groups(IndexVector{{0, 9, 5}}));
       },
       {where, "group_begin[2] = 5", "9"}},
      {"negative group",
       [&] {
         call(with_groups(IndexVector{{0, -2, 5}}));
       },
       {where, "group_begin[1] = -2", "0"}},
  });
}

TEST(Errors, OfABatchInfo) {
  expect_bad_info("check", [](const auto& info) { moe::check_batch_info(info, 5, "check"); });
  expect_bad_info("begin", [](const auto& info) {
    Routing routing;
    moe::begin_routing(5, 3, info, routing, "begin");
  });
  expect_bad_info("count_valid_tokens", [](const auto& info) {
    IndexVector valid;
    moe::count_valid_tokens(good_routing().plan, info, valid);
  });
  expect_bad_info("apply_capacity", [](const auto& info) {
    Routing r = good_routing();
    moe::CapacityWorkspace<double> workspace;
    moe::apply_capacity(r.chosen, r.router_probs, IndexVector(IndexVector::Ones(info.num_groups())), {}, info,
                        r.plan, workspace);
  });
  const auto routers = [](auto router, const char* where) {
    expect_bad_info(where, [&](const BatchInfo& info) {
      Routing routing;
      router.route(input(), info, routing);
    });
    expect_bad_info(where, [&](const BatchInfo& info) {
      Routing routing;
      Rng rng;
      if constexpr (requires { router.route(input(), rng, info, routing); })
        router.route(input(), rng, info, routing);
      else
        router.route(input(), info, routing);
    });
  };
  routers(make_router<TopK>(), "TopKRouter::route");
  routers(make_router<Noisy>(), "NoisyTopKRouter::route");
  routers(make_router<ExpertChoice>(), "ExpertChoiceRouter::route");
  const Layer layer = make_layer();
  expect_bad_info("route", [&](const auto& info) { layer.route(input(), info); });
  expect_bad_info("route", [&](const auto& info) { layer.forward(input(), info); });
  expect_bad_info("route", [&](const auto& info) {
    Layer::Cache cache;
    layer.forward(input(), cache, info);
  });
  expect_bad_info("route", [&](const auto& info) {
    Layer::Cache cache;
    Rng rng;
    layer.forward(input(), rng, cache, info);
  });
  expect_errors({
      {"begin_routing: tokens",
       [] {
         Routing r;
         moe::begin_routing(-1, 3, {}, r, "begin");
       },
       {"begin", "-1", "0"}},
      {"begin_routing: experts",
       [] {
         Routing r;
         moe::begin_routing(5, 0, {}, r, "begin");
       },
       {"begin", "0", "1"}},
  });
}

// Every kind of bad plan for 5 tokens and 3 experts, at an entry point that follows plans.
// `by_token` says whether it looks at tokens, too.
void expect_bad_plan(const char* where, const std::function<void(const Routing&)>& call,
                     bool by_token = true) {
  SCOPED_TRACE(where);
  const auto bad = [&](void (*spoil)(moe::DispatchPlan<double>&)) {
    return [&call, spoil] { call(spoilt([&](Routing& r) { spoil(r.plan); })); };
  };
  expect_errors({
      {"token_state", bad([](auto& p) { p.token_state.resize(4); }), {where, "4", "5"}},
      {"gate", bad([](auto& p) { p.gate.resize(9); }), {where, "9", "10"}},
      {"token", bad([](auto& p) { p.token.resize(9); }), {where, "9", "10"}},
      {"first expert_begin", bad([](auto& p) { p.expert_begin[0] = 1; }), {where, "1", "0", "10"}},
      {"last expert_begin", bad([](auto& p) { p.expert_begin[3] = 11; }), {where, "11", "10"}},
      {"descending expert_begin",
       bad([](auto& p) { p.expert_begin[1] = 70; }),
       {where, "expert_begin[2]", "70"}},
      {"negative expert_begin",
       bad([](auto& p) { p.expert_begin[1] = -8; }),
       {where, "expert_begin[1] = -8", "0"}},
  });
  if (!by_token) return;
  expect_errors({
      {"number of tokens",
       bad([](auto& p) {
         p.num_tokens = 6;
         p.token_state.resize(6);
       }),
       {where, "6", "5"}},
      {"token too large", bad([](auto& p) { p.token[p.expert_begin[1] - 1] = 5; }), {where, "token 5 of 5"}},
      {"token negative", bad([](auto& p) { p.token[0] = -1; }), {where, "token -1 of 5"}},
      {"tokens descend",
       bad([](auto& p) {
         p.expert_begin = {0, 2, 2, 2};
         p.token = {3, 1};
         p.gate.resize(2);
       }),
       {where, "3 goes before 1"}},
      {"a token twice",
       bad([](auto& p) {
         p.expert_begin = {0, 2, 2, 2};
         p.token = {3, 3};
         p.gate.resize(2);
       }),
       {where, "3 goes before 3"}},
      {"a masked token",
       bad([](auto& p) {
         p.expert_begin = {0, 1, 1, 1};
         p.token = {2};
         p.gate.resize(1);
         p.token_state[2] = moe::TokenState::masked;
       }),
       {where, "token 2", "masked"}},
      {"passed_through too large",
       bad([](auto& p) {
         p.passed_through = {1, 5};
       }),
       {where, "passed_through[1]", "token 5 of 5"}},
      {"passed_through negative", bad([](auto& p) { p.passed_through = {-1}; }), {where, "token -1 of 5"}},
      {"passed_through descends",
       bad([](auto& p) {
         p.passed_through = {4, 2};
       }),
       {where, "4 goes before 2"}},
      {"a masked token passed through",
       bad([](auto& p) {
         p.expert_begin = {0, 0, 0, 0};
         p.token.clear();
         p.gate.clear();
         p.passed_through = {3};
         p.token_state[3] = moe::TokenState::poisoned;
       }),
       {where, "token 3", "poisoned"}},
  });
}

TEST(Errors, OfAPlan) {
  expect_bad_plan("check", [](const Routing& r) { moe::check_plan(r.plan, 5, 3, "check"); });
  expect_bad_plan("dispatch", [](const Routing& r) {
    RowBuffer<double> x_rows;
    moe::dispatch(input(), r.plan, x_rows);
  });
  expect_bad_plan("combine", [](const Routing& r) {
    Matrix<double> y = ones(5, 4);
    moe::combine(rows(r.plan.num_assignments()), r.plan, input(), y);
  });
  expect_bad_plan("combine_backward", [](const Routing& r) {
    RowBuffer<double> d_rows;
    Buffer<double> d_gate;
    moe::combine_backward(input(), rows(r.plan.num_assignments()), r.plan, d_rows, d_gate);
  });
  expect_bad_plan("dispatch_backward", [](const Routing& r) {
    Matrix<double> d_x = ones(5, 4);
    Buffer<double> d_gate = filled(r.plan.num_assignments());
    moe::dispatch_backward(rows(r.plan.num_assignments()), r.plan, input(), input(), d_x, d_gate);
  });
  expect_bad_plan(
      "unserved_tokens", [](const Routing& r) { moe::unserved_tokens(r); }, false);
  const Layer layer = make_layer(), shared = make_layer(true);
  expect_bad_plan("MoELayer::forward", [&](const Routing& r) { layer.forward(input(), r); });
  expect_bad_plan("MoELayer::forward", [&](const Routing& r) { shared.forward(input(), r); });
  expect_bad_plan("MoELayer::forward", [&](const Routing& r) {
    Layer::Cache cache;
    layer.forward(input(), r, cache);
  });
  expect_bad_plan(
      "load_balancing_loss", [](const Routing& r) { moe::load_balancing_loss(r); }, false);
  expect_bad_plan(
      "importance_loss", [](const Routing& r) { moe::importance_loss(r); }, false);
  expect_bad_plan(
      "load_loss", [](const Routing& r) { moe::load_loss(r); }, false);
  expect_bad_plan(
      "router_z_loss", [](const Routing& r) { moe::router_z_loss(r); }, false);
  expect_bad_plan(
      "routing_entropy", [](const Routing& r) { moe::routing_entropy(r); }, false);
  expect_bad_plan(
      "trace", [](const Routing& r) { moe::trace(r, 0); }, false);
  expect_errors({
      {"check_plan: experts",
       [] { moe::check_plan(good_routing().plan, 5, 4, "check"); },
       {"check", "3", "4"}},
      {"no experts at all",
       [] { moe::check_plan(moe::DispatchPlan<double>(), 0, 0, "check"); },
       {"check", "0", "1"}},
      {"MoELayer::forward: routing of other experts",
       [&] {
         Routing r;
         moe::begin_routing(5, 4, {}, r, "");
         layer.forward(input(), r);
       },
       {"MoELayer::forward", "4", "3"}},
      {"an empty routing", [&] { layer.forward(input(), Routing()); }, {"0", "5"}},
      {"a routing of another batch", [&] { layer.forward(ones(7, kModel), good_routing()); }, {"5", "7"}},
      {"mark_poisoned_rows",
       [] {
         Routing r = good_routing();
         moe::mark_poisoned_rows<double>(ones(7, kModel), r.plan);
       },
       {"mark_poisoned_rows", "7", "5"}},
  });
}

// Every kind of bad choices of 5 tokens among 3 experts.
void expect_bad_choices(const char* where, const std::function<void(Routing&)>& call) {
  SCOPED_TRACE(where);
  const auto bad = [&](void (*spoil)(moe::Choices<double>&)) {
    return [&call, spoil] {
      Routing r = spoilt([&](Routing& routing) { spoil(routing.chosen); });
      call(r);
    };
  };
  expect_errors({
      {"tokens", bad([](auto& c) { c.token_begin.resize(5); }), {where, "5", "6"}},
      {"begin", bad([](auto& c) { c.token_begin[0] = 1; }), {where, "from 1 to 10", "from 0 to 10"}},
      {"end", bad([](auto& c) { c.token_begin[5] = 12; }), {where, "from 0 to 12", "from 0 to 10"}},
      {"descends", bad([](auto& c) { c.token_begin[1] = 8; }), {where, "token_begin[2] = 4", "8"}},
      {"gates", bad([](auto& c) { c.gate.resize(9); }), {where, "9", "10"}},
      {"expert too large", bad([](auto& c) { c.expert[6] = 3; }), {where, "choice 6", "3 of 3"}},
      {"expert negative", bad([](auto& c) { c.expert[2] = -1; }), {where, "choice 2", "-1 of 3"}},
      {"an expert twice",
       bad([](auto& c) { c.expert[7] = c.expert[6]; }),
       {where, "token 3", "twice", "0 and 1"}},
  });
}

TEST(Errors, OfChoices) {
  expect_bad_choices("check", [](Routing& r) { moe::check_choices(r.chosen, 5, 3, "check"); });
  expect_bad_choices("dispatch_all", [](Routing& r) { moe::dispatch_all(r.chosen, r.plan); });
  expect_bad_choices("apply_capacity", [](Routing& r) {
    moe::CapacityWorkspace<double> workspace;
    moe::apply_capacity(r.chosen, r.router_probs, IndexVector(IndexVector::Ones(1)), {}, {}, r.plan,
                        workspace);
  });
  expect_bad_choices("importance_loss", [](Routing& r) { moe::importance_loss(r); });
  expect_bad_choices("load_loss", [](Routing& r) { moe::load_loss(r); });
  expect_bad_choices("selection_backward", [](Routing& r) {
    moe::TokenChoiceWorkspace<double> workspace;
    moe::ReusedMatrix<double> d_logits;
    moe::selection_backward({}, r, Gradient{}, workspace, d_logits);
  });
  const Layer layer = make_layer();
  expect_bad_choices("MoELayer::forward", [&](Routing& r) {
    Layer::Cache cache;
    layer.forward(input(), r, cache);
  });
  const auto backward = [](auto router) {
    expect_bad_choices("Router::backward", [&](Routing& r) {
      Matrix<double> d_x = ones(5, 4);
      auto grad = moe::zeros_like(router);
      router.backward(input(), r, Gradient{}, d_x, grad);
    });
  };
  backward(make_router<TopK>());
  backward(make_router<Noisy>());
  backward(make_router<ExpertChoice>());
  expect_errors({
      {"plan.choice: size",
       [] { moe::check_choices(spoilt([](Routing& r) { r.plan.choice.resize(9); }), "check"); },
       {"check", "9", "10"}},
      {"plan.choice: too large",
       [] { moe::check_choices(spoilt([](Routing& r) { r.plan.choice[4] = 10; }), "check"); },
       {"check", "assignment 4", "10 of 10"}},
      {"plan.choice: negative",
       [] { moe::check_choices(spoilt([](Routing& r) { r.plan.choice[4] = -2; }), "check"); },
       {"check", "assignment 4", "-2 of 10"}},
      {"router_probs",
       [] { moe::check_choices(spoilt([](Routing& r) { r.router_probs = ones(5, 2); }), "check"); },
       {"check", "router_probs", "[5, 2]", "[5, 3]"}},
      {"demand_per_expert: too large",
       [] { moe::demand_per_expert(spoilt([](Routing& r) { r.chosen.expert[0] = 3; })); },
       {"demand_per_expert", "3 of 3"}},
      {"demand_per_expert: negative",
       [] { moe::demand_per_expert(spoilt([](Routing& r) { r.chosen.expert[0] = -1; })); },
       {"demand_per_expert", "-1 of 3"}},
  });
}

// ---- Capacity.

TEST(Errors, OfCapacity) {
  const auto apply = [](IndexVector capacity, Overflow overflow, Priority priority, void (*spoil)(Routing&),
                        Matrix<double> scores = ones(5, 3)) {
    return [=] {
      Routing r = spoilt(spoil);
      moe::CapacityWorkspace<double> workspace;
      moe::apply_capacity(r.chosen, scores, capacity, {overflow, priority}, {}, r.plan, workspace);
    };
  };
  const auto nothing = [](Routing&) {};
  const auto nan_gate = [](Routing& r) { r.chosen.gate[7] = kNan; };
  const IndexVector one{{2}};
  expect_errors({
      {"tokens", [] { moe::expert_capacity(-7, 8, 2, 1); }, {"expert_capacity", "-7", "0"}},
      {"experts", [] { moe::expert_capacity(10, 0, 0, 1); }, {"num_experts = 0", "1"}},
      {"negative experts", [] { moe::expert_capacity(10, -3, 0, 1); }, {"num_experts = -3", "1"}},
      {"top_k too large", [] { moe::expert_capacity(10, 8, 9, 1); }, {"top_k = 9", "8"}},
      {"top_k negative", [] { moe::expert_capacity(10, 8, -1, 1); }, {"top_k = -1", "8"}},
      {"factor negative", [] { moe::expert_capacity(10, 8, 2, -0.5); }, {"-0.5", "0"}},
      {"factor infinite", [] { moe::expert_capacity(10, 8, 2, kInf); }, {"inf", "0"}},
      {"factor NaN", [] { moe::expert_capacity(10, 8, 2, kNan); }, {"nan", "0"}},
      {"rule: minimum",
       [] { moe::expert_capacity(10, 8, 2, 1, {.minimum = -4}); },
       {"expert_capacity", "capacity_rule.minimum = -4", "0"}},
      {"rule: multiple of zero",
       [] { moe::expert_capacity(10, 8, 2, 1, {.multiple_of = 0}); },
       {"expert_capacity", "capacity_rule.multiple_of = 0", "1"}},
      {"rule: negative multiple",
       [] { moe::expert_capacity(10, 8, 2, 1, {.multiple_of = -2}); },
       {"capacity_rule.multiple_of = -2", "1"}},
      {"count_valid_tokens",
       [] {
         IndexVector valid;
         moe::count_valid_tokens(spoilt([](Routing& r) { r.plan.token_state.resize(4); }).plan, {}, valid);
       },
       {"count_valid_tokens", "4", "5"}},
      {"no capacity",
       apply(IndexVector(), Overflow::drop, Priority::token_order, nothing),
       {"apply_capacity", "0", "1"}},
      {"a capacity too many",
       apply(IndexVector{{2, 2}}, Overflow::drop, Priority::token_order, nothing),
       {"2", "1"}},
      {"capacity negative",
       apply(IndexVector{{-4}}, Overflow::drop, Priority::token_order, nothing),
       {"capacity[0] = -4", "0"}},
      {"next_best without scores",
       apply(one, Overflow::next_best, Priority::token_order, nothing, Matrix<double>()),
       {"scores", "[0, 0]", "[5, 3]"}},
      {"next_best: scores' rows",
       apply(one, Overflow::next_best, Priority::token_order, nothing, ones(4, 3)),
       {"[4, 3]", "[5, 3]"}},
      {"next_best: scores' columns",
       apply(one, Overflow::next_best, Priority::token_order, nothing, ones(5, 2)),
       {"[5, 2]", "[5, 3]"}},
      {"NaN has no place in an order of tokens",
       apply(one, Overflow::drop, Priority::token_max_gate, nan_gate),
       {"choice 7 of 10", "NaN"}},
      {"NaN has no place in an order of gates",
       apply(one, Overflow::drop, Priority::assignment_gate, nan_gate),
       {"choice 7 of 10", "NaN"}},
      {"an order of probabilities without them",
       [] {
         Routing r = spoilt([](Routing&) {});
         moe::CapacityWorkspace<double> workspace;
         moe::apply_capacity(r.chosen, ones(5, 3), IndexVector(IndexVector::Ones(1)),
                             {.priority = Priority::token_max_prob}, {}, r.plan, workspace);
       },
       {"apply_capacity", "token_max_prob", "probs"}},
      {"NaN has no place in an order of probabilities",
       [] {
         Routing r = spoilt([](Routing& spoil) { spoil.router_probs(3, 1) = kNan; });
         moe::CapacityWorkspace<double> workspace;
         moe::apply_capacity(r.chosen, ones(5, 3), IndexVector(IndexVector::Ones(1)),
                             {.priority = Priority::token_max_prob}, {}, r.plan, workspace, &r.router_probs);
       },
       {"token 3 of 5", "NaN"}},
  });
}

// ---- Moving rows.

TEST(Errors, OfDispatch) {
  const Routing r = good_routing();
  const auto& plan = r.plan;
  auto on_inputs = plan;
  on_inputs.gate_side = moe::GateSide::input;
  const auto experts = make_experts(kExperts);
  const auto combine = [&](Index row_count, Index cols, Index x_rows, Index x_cols, Index y_rows,
                           Index y_cols) {
    return [=, &plan] {
      Matrix<double> y = ones(y_rows, y_cols);
      moe::combine(rows(row_count, cols), plan, ones(x_rows, x_cols), y);
    };
  };
  const auto combine_backward = [&](Index row_count, Index d_y_rows, Index d_y_cols) {
    return [=, &plan] {
      RowBuffer<double> d_rows;
      Buffer<double> d_gate;
      moe::combine_backward(ones(d_y_rows, d_y_cols), rows(row_count), plan, d_rows, d_gate);
    };
  };
  const auto dispatch_backward = [&](Index row_count, std::pair<Index, Index> x, std::pair<Index, Index> d_y,
                                     std::pair<Index, Index> d_x, Index gates) {
    return [=] {
      Matrix<double> out = ones(d_x.first, d_x.second);
      Buffer<double> d_gate = filled(gates);
      moe::dispatch_backward(rows(row_count), on_inputs, ones(x.first, x.second), ones(d_y.first, d_y.second),
                             out, d_gate);
    };
  };
  const auto run = [&](Index count, Index row_count, Index cols, bool cached) {
    return [=, &plan] {
      const moe::GroupedExperts<Gated> some(make_experts(count));
      RowBuffer<double> y_rows;
      moe::ExpertWorkspace<double> workspace;
      moe::ExpertCache<double> cache;
      if (cached)
        some.forward(rows(row_count, cols), plan.expert_begin, y_rows, cache);
      else
        some.forward(rows(row_count, cols), plan.expert_begin, y_rows, workspace);
    };
  };
  const auto run_backward = [&](Index count, Index grad_count, Index x_count, Index d_y_count, Index d_y_cols,
                                const moe::DispatchPlan<double>& cached) {
    return [=, &plan] {
      const moe::GroupedExperts<Gated> some(make_experts(count));
      moe::GroupedExperts<Gated> grads(make_experts(grad_count));
      const moe::GroupedExperts<Gated> cached_experts(make_experts(cached.num_experts()));
      RowBuffer<double> y_rows, d_x_rows;
      moe::ExpertCache<double> cache;
      cached_experts.forward(rows(cached.num_assignments()), cached.expert_begin, y_rows, cache);
      some.backward(rows(x_count), plan.expert_begin, rows(d_y_count, d_y_cols), cache, d_x_rows, grads);
    };
  };
  const auto run_rows = [](std::initializer_list<Index> begin) {
    return [begin = std::vector<Index>(begin)] {
      RowBuffer<double> y_rows;
      moe::ExpertWorkspace<double> workspace;
      moe::GroupedExperts<Gated>(make_experts(3)).forward(rows(10, 4), begin, y_rows, workspace);
    };
  };
  Routing other_batch, other_experts;
  make_router<TopK>({.top_k = 1}).route(input(), {}, other_batch);
  moe::begin_routing(5, 4, {}, other_experts, "");
  expect_errors({
      {"dispatch",
       [&] {
         RowBuffer<double> x_rows;
         moe::dispatch(ones(6, 4), plan, x_rows);
       },
       {"dispatch", "5", "6"}},
      {"combine: rows", combine(9, 4, 5, 4, 5, 4), {"combine", "9", "10"}},
      {"combine: x's rows", combine(10, 4, 6, 4, 5, 4), {"x", "[6, 4]", "[5, 4]"}},
      {"combine: x's width", combine(10, 4, 5, 7, 5, 4), {"[5, 7]", "[5, 4]"}},
      {"combine: y's rows", combine(10, 4, 5, 4, 6, 4), {"combine", "5", "6"}},
      {"combine: y's width", combine(10, 4, 5, 4, 5, 7), {"y", "[5, 7]", "[5, 4]"}},
      {"combine_backward: rows", combine_backward(11, 5, 4), {"combine_backward", "11", "10"}},
      {"combine_backward: d_y's rows", combine_backward(10, 6, 4), {"5", "6"}},
      {"combine_backward: d_y's width", combine_backward(10, 5, 7), {"d_y", "[5, 7]", "[5, 4]"}},
      {"dispatch_backward: rows",
       dispatch_backward(9, {5, 4}, {5, 4}, {5, 4}, 10),
       {"dispatch_backward", "9", "10"}},
      {"dispatch_backward: x", dispatch_backward(10, {6, 4}, {5, 4}, {5, 4}, 10), {"x", "[6, 4]", "[5, 4]"}},
      {"dispatch_backward: d_y",
       dispatch_backward(10, {5, 4}, {5, 7}, {5, 4}, 10),
       {"d_y", "[5, 7]", "[5, 4]"}},
      {"dispatch_backward: d_x's rows", dispatch_backward(10, {5, 4}, {5, 4}, {6, 4}, 10), {"5", "6"}},
      {"dispatch_backward: d_x's width",
       dispatch_backward(10, {5, 4}, {5, 4}, {5, 3}, 10),
       {"d_x", "[5, 3]", "[5, 4]"}},
      {"dispatch_backward: d_gate", dispatch_backward(10, {5, 4}, {5, 4}, {5, 4}, 8), {"d_gate", "8", "10"}},
      {"experts: number", run(2, 10, 4, false), {"GroupedExperts::forward", "2", "3"}},
      {"experts: rows", run(3, 9, 4, false), {"GroupedExperts::forward", "9", "10"}},
      {"experts: width", run(3, 10, 5, false), {"5", "4"}},
      {"experts, cached: number", run(4, 10, 4, true), {"GroupedExperts::forward", "4", "3"}},
      {"experts, cached: rows", run(3, 11, 4, true), {"GroupedExperts::forward", "11", "10"}},
      {"experts, cached: width", run(3, 10, 5, true), {"5", "4"}},
      {"first expert_begin", run_rows({1, 3, 5, 10}), {"GroupedExperts::forward", "1", "0", "10"}},
      {"last expert_begin", run_rows({0, 3, 5, 11}), {"GroupedExperts::forward", "11", "10"}},
      {"descending expert_begin", run_rows({0, 70, 5, 10}), {"expert_begin[2]", "70"}},
      {"negative expert_begin", run_rows({0, -8, 5, 10}), {"expert_begin[1] = -8", "0"}},
      {"backward: experts", run_backward(2, 3, 10, 10, 4, plan), {"GroupedExperts::backward", "2", "3"}},
      {"backward: gradients", run_backward(3, 4, 10, 10, 4, plan), {"4", "3"}},
      {"backward: rows", run_backward(3, 3, 9, 10, 4, plan), {"x_rows", "9", "10"}},
      {"backward: d_y's rows", run_backward(3, 3, 10, 8, 4, plan), {"d_y_rows", "[8, 4]", "[10, 4]"}},
      {"backward: d_y's width", run_backward(3, 3, 10, 10, 5, plan), {"[10, 5]", "[10, 4]"}},
      {"backward: cache of another batch",
       run_backward(3, 3, 10, 10, 4, other_batch.plan),
       {"cache", "rows of expert"}},
      {"backward: cache of another layer",
       run_backward(3, 3, 10, 10, 4, other_experts.plan),
       {"cache", "4", "3"}},
      {"ExpertCache::resize",
       [&] {
         const auto two = make_experts(2);
         moe::ExpertCache<double>().resize(std::span<const Gated>(two), plan.expert_begin, 0);
       },
       {"ExpertCache::resize", "2", "3"}},
  });
}

// ---- Routing by logits, and its gradient.

TEST(Errors, OfTokenChoice) {
  const auto route = [](Index top_k, Index rows, Index cols) {
    return [=] {
      Routing r;
      moe::begin_routing(5, 3, {}, r, "");
      r.router_logits = ones(rows, cols);
      moe::RouterWorkspace<double> workspace;
      moe::route_by_logits({.top_k = top_k}, {}, {}, r, workspace, moe::Sequential{});
    };
  };
  expect_errors({
      {"route_by_logits: top_k", route(4, 5, 3), {"route_by_logits", "4", "3"}},
      {"route_by_logits: no top_k", route(0, 5, 3), {"top_k = 0", "1", "3"}},
      {"route_by_logits: rows", route(2, 6, 3), {"route_by_logits", "5", "6"}},
      {"route_by_logits: columns", route(2, 5, 4), {"[5, 4]", "[5, 3]"}},
      {"route_by_logits: noise",
       [] {
         Routing r = noisy_routing();
         r.noise.noisy_logits = ones(5, 2);
         moe::RouterWorkspace<double> workspace;
         moe::route_by_logits({.top_k = 2}, {}, {}, r, workspace, moe::Sequential{});
       },
       {"[5, 2]", "[5, 3]"}},
      {"route_by_logits: capacity factor",
       [] {
         Routing r;
         moe::begin_routing(5, 3, {}, r, "");
         r.router_logits = ones(5, 3);
         moe::RouterWorkspace<double> workspace;
         moe::route_by_logits({.top_k = 2, .capacity_factor = -1}, {}, {}, r, workspace, moe::Sequential{});
       },
       {"-1", "0"}},
      {"route_by_logits: draws",
       [] {
         Routing r;
         moe::begin_routing(5, 3, {}, r, "");
         r.router_logits = ones(5, 3);
         const std::vector<double> draws(4);
         moe::RouterWorkspace<double> workspace;
         moe::route_by_logits({.top_k = 2, .second_threshold = 0.5}, {.second_draws = draws}, {}, r,
                              workspace, moe::Sequential{});
       },
       {"4 second_draws", "5"}},
      {"add_valid_rows: d",
       [] {
         Matrix<double> d_logits = ones(5, 3);
         moe::add_valid_rows(good_routing(), ones(4, 3), d_logits);
       },
       {"add_valid_rows", "[4, 3]", "[5, 3]"}},
      {"add_valid_rows: d_logits",
       [] {
         Matrix<double> d_logits = ones(5, 2);
         moe::add_valid_rows(good_routing(), ones(5, 3), d_logits);
       },
       {"[5, 2]", "[5, 3]"}},
      {"with_row",
       [] { moe::with_row(ones(3, 4), Vector<double>(Vector<double>::Ones(5)), "here"); },
       {"here", "5", "4"}},
      {"experts_without: expert", [] { moe::experts_without({3}, 3, 1, "here"); }, {"here", "3 of 3"}},
      {"experts_without: negative",
       [] {
         moe::experts_without({0, -1}, 3, 1, "here");
       },
       {"-1 of 3"}},
      {"experts_without: twice",
       [] {
         moe::experts_without({2, 2}, 3, 1, "here");
       },
       {"expert 2", "2 to remove"}},
      {"experts_without: too few",
       [] { moe::experts_without({0}, 2, 2, "here"); },
       {"here", "1 of 2", "at least 2"}},
      {"take_rows",
       [] {
         moe::take_rows(ones(3, 4), {0, 1}, 4, "here", "m");
       },
       {"m", "[3, 4]", "[4, 4]"}},
  });
}

// Every kind of bad RoutingGradient for good_routing(): 5 tokens, 3 experts, 10 choices.
void expect_bad_gradient(const std::function<void(const Gradient&)>& call) {
  expect_errors({
      {"d_router_logits",
       [&] { call({.d_router_logits = ones(4, 3)}); },
       {"d_router_logits", "[4, 3]", "[5, 3]"}},
      {"d_router_probs",
       [&] { call({.d_router_probs = ones(5, 2)}); },
       {"d_router_probs", "[5, 2]", "[5, 3]"}},
      {"d_noise_stddev",
       [&] { call({.d_noise_stddev = ones(6, 3)}); },
       {"d_noise_stddev", "[6, 3]", "[5, 3]"}},
      {"d_chosen_gate", [&] { call({.d_chosen_gate = filled(9)}); }, {"d_chosen_gate", "9", "10"}},
      {"d_gate", [&] { call({.d_gate = filled(11)}); }, {"d_gate", "11", "10"}},
  });
}

TEST(Errors, OfARoutingGradient) {
  expect_bad_gradient([](const Gradient& g) { moe::check_routing_gradient(g, good_routing(), "check"); });
  expect_bad_gradient([](const Gradient& g) {
    moe::TokenChoiceWorkspace<double> workspace;
    moe::ReusedMatrix<double> d_logits;
    moe::selection_backward({}, good_routing(), g, workspace, d_logits);
  });
  expect_bad_gradient([](const Gradient& g) {  // sums of two batches
    Gradient all{ones(5, 3), ones(5, 3), ones(5, 3), filled(10), filled(10)};
    all += g;
  });
  const auto backward = [](const auto& router) {
    expect_bad_gradient([&](const Gradient& g) {
      Matrix<double> d_x = ones(5, 4);
      auto grad = moe::zeros_like(router);
      router.backward(input(), good_routing(), g, d_x, grad);
    });
  };
  backward(make_router<TopK>());
  backward(make_router<Noisy>());
  backward(make_router<ExpertChoice>());
  const Layer layer = make_layer();
  Layer::Cache cache;
  layer.forward(input(), cache);
  expect_bad_gradient([&](const Gradient& g) {
    Layer grad = moe::zeros_like(layer);
    layer.backward(input(), cache, grad, g);
  });
}

// ---- Losses and metrics.

TEST(Errors, OfLosses) {
  const auto balance = [](Index size, Index first, Index tokens) {
    return [=] {
      IndexVector demand = IndexVector::Ones(size);
      demand[0] = first;
      moe::load_balancing_loss(good_routing(), demand, tokens);
    };
  };
  const auto load = [](void (*spoil)(moe::RoutingNoise<double>&)) {
    return [=] { moe::load_loss(spoilt([&](Routing& r) { spoil(r.noise); }, noisy_routing())); };
  };
  const auto no_logits = [](Routing& r) { r.router_logits = ones(5, 2); };
  const auto no_probs = [](Routing& r) { r.router_probs = ones(4, 3); };
  expect_errors({
      {"demand", balance(4, 1, 5), {"load_balancing_loss", "4", "3"}},
      {"negative demand", balance(3, -2, 5), {"demand[0] = -2", "0"}},
      {"negative tokens", balance(3, 1, -5), {"num_tokens = -5", "0"}},
      {"load balancing: router_probs",
       [&] { moe::load_balancing_loss(spoilt(no_probs)); },
       {"router_probs", "[4, 3]", "[5, 3]"}},
      {"load balancing: no router_probs",
       [&] { moe::load_balancing_loss(spoilt([](Routing& r) { r.router_probs = {}; })); },
       {"router_probs", "the router did not fill them", "[0, 0]", "[5, 3]"}},
      {"importance: router_logits",
       [&] { moe::importance_loss(spoilt(no_logits), moe::Importance::probs); },
       {"importance_loss", "[5, 2]", "[5, 3]"}},
      {"load: router_logits",
       [&] { moe::load_loss(spoilt(no_logits, noisy_routing())); },
       {"load_loss", "[5, 2]", "[5, 3]"}},
      {"load: draws", load([](auto& n) { n.draws = ones(6, 3); }), {"draws", "[6, 3]", "[5, 3]"}},
      {"load: stddev", load([](auto& n) { n.stddev = ones(5, 4); }), {"stddev", "[5, 4]", "[5, 3]"}},
      {"load: noisy_logits",
       load([](auto& n) { n.noisy_logits = ones(1, 1); }),
       {"noisy_logits", "[1, 1]", "[5, 3]"}},
      {"load: top_k", load([](auto& n) { n.top_k = 4; }), {"top_k = 4", "3"}},
      {"load: negative top_k", load([](auto& n) { n.top_k = -1; }), {"top_k = -1", "3"}},
      {"z: router_logits",
       [&] { moe::router_z_loss(spoilt(no_logits)); },
       {"router_z_loss", "[5, 2]", "[5, 3]"}},
  });
}

TEST(Errors, OfMetrics) {
  const IndexVector load{{1, -4, 2}};
  expect_errors({
      {"coefficient_of_variation",
       [&] { moe::coefficient_of_variation(load); },
       {"coefficient_of_variation", "load[1] = -4", "0"}},
      {"max_over_mean", [&] { moe::max_over_mean(load); }, {"max_over_mean", "load[1] = -4", "0"}},
      {"routing_entropy",
       [] { moe::routing_entropy(spoilt([](Routing& r) { r.router_probs = ones(4, 3); })); },
       {"routing_entropy", "[4, 3]", "[5, 3]"}},
      {"trace: too large", [] { moe::trace(good_routing(), 5); }, {"trace", "5 of 5"}},
      {"trace: negative", [] { moe::trace(good_routing(), -1); }, {"trace", "-1 of 5"}},
  });
}

// ---- Experts.

template <class E>
void expect_expert_errors(const char* name) {
  const auto make = [](Index d_model, Index d_ff, bool bias = true) {
    Rng rng(5);
    return E({.d_model = d_model, .d_ff = d_ff, .bias = bias}, rng);
  };
  const E expert = make(4, 6);
  const Index wide = expert.cache_cols();
  const auto forward = [&](Index x_cols, Index y_rows, Index y_cols, Index c_rows, Index c_cols) {
    return [=, &expert] {
      Matrix<double> y = ones(y_rows, y_cols), cache = ones(c_rows, c_cols);
      expert.forward(ones(5, x_cols), y, cache);
    };
  };
  const auto backward = [&](std::pair<Index, Index> d_y, std::pair<Index, Index> c,
                            std::pair<Index, Index> d_x, E grad, Index x_cols = 4) {
    return [=, &expert]() mutable {
      Matrix<double> cache = ones(c.first, c.second), out = ones(d_x.first, d_x.second);
      expert.backward(ones(5, x_cols), ones(d_y.first, d_y.second), cache, out, grad);
    };
  };
  const std::string shape = "[5, " + std::to_string(wide) + "]";
  SCOPED_TRACE(name);
  expect_errors({
      {"d_model", [&] { make(0, 6); }, {name, "d_model = 0", "1"}},
      {"negative d_model", [&] { make(-4, 6); }, {name, "d_model = -4", "1"}},
      {"d_ff", [&] { make(4, 0); }, {name, "d_ff = 0", "1"}},
      {"negative d_ff", [&] { make(4, -6); }, {name, "d_ff = -6", "1"}},
      {"forward: x", forward(3, 5, 4, 5, wide), {name, "x", "[5, 3]", "[5, 4]"}},
      {"forward: y's rows", forward(4, 6, 4, 5, wide), {name, "y", "[6, 4]", "[5, 4]"}},
      {"forward: y's width", forward(4, 5, 7, 5, wide), {name, "y", "[5, 7]", "[5, 4]"}},
      {"forward: cache's rows", forward(4, 5, 4, 4, wide), {name, "cache", shape}},
      {"forward: cache's width", forward(4, 5, 4, 5, 2), {name, "cache", "[5, 2]", shape}},
      {"inference: x",
       [&] {
         Matrix<double> y = ones(5, 4);
         expert.forward(ones(5, 3), y);
       },
       {"[5, 3]", "[5, 4]"}},
      {"inference: y",
       [&] {
         Matrix<double> y = ones(6, 4);
         expert.forward(ones(5, 4), y);
       },
       {"[6, 4]", "[5, 4]"}},
      {"backward: x", backward({5, 4}, {5, wide}, {5, 4}, expert, 3), {name, "[5, 3]", "[5, 4]"}},
      {"backward: d_y", backward({6, 4}, {5, wide}, {5, 4}, expert), {"d_y", "[6, 4]", "[5, 4]"}},
      {"backward: cache", backward({5, 4}, {5, 9}, {5, 4}, expert), {"cache", "[5, 9]", shape}},
      {"backward: d_x", backward({5, 4}, {5, wide}, {5, 3}, expert), {"d_x", "[5, 3]", "[5, 4]"}},
      {"backward: grad's d_ff", backward({5, 4}, {5, wide}, {5, 4}, make(4, 7)), {"[7, 4]", "[6, 4]"}},
      {"backward: grad's d_model", backward({5, 4}, {5, wide}, {5, 4}, make(3, 6)), {"[6, 3]", "[6, 4]"}},
      {"backward: grad without biases",
       backward({5, 4}, {5, wide}, {5, 4}, make(4, 6, false)),
       {"b_", "[0, 1]", "[6, 1]"}},
  });
}

TEST(Errors, OfExperts) {
  expect_expert_errors<Plain>("FeedForward");
  expect_expert_errors<Gated>("GatedFeedForward");
  Rng rng(6);
  const Either plain = Plain({.d_model = 4, .d_ff = 6}, rng);
  Either gated = Gated({.d_model = 4, .d_ff = 6}, rng);
  Matrix<double> y = ones(5, 4), cache = ones(5, 12);
  expect_errors({
      {"VariantExpert: backward",
       [&] { plain.backward(input(), input(), cache, y, gated); },
       {"VariantExpert", "1", "0"}},
      {"VariantExpert: visit",
       [&] { Either::visit([](const auto&, auto&, auto&) {}, gated, plain); },
       {"VariantExpert", "0", "1"}},
      {"VariantExpert: forward", [&] { plain.forward(ones(5, 3), y, cache); }, {"[5, 3]", "[5, 4]"}},
      {"weights of another shape",
       [&] {
         Plain broken({.d_model = 4, .d_ff = 6}, rng);
         broken.w_down = ones(4, 7);
         broken.forward(input(), y, cache);
       },
       {"[4, 7]", "[4, 6]"}},
      {"a bias of another length",
       [&] {
         Plain broken({.d_model = 4, .d_ff = 6, .bias = true}, rng);
         broken.b_down = Vector<double>::Ones(3);
         broken.forward(input(), y, cache);
       },
       {"3", "4"}},
  });
}

// ---- Routers.

template <class R>
void expect_router_errors(const char* name) {
  const auto make = [](Index d_model, Index experts) {
    Rng rng(7);
    typename R::Options options;
    options.d_model = d_model;
    options.num_experts = experts;
    return R(options, rng);
  };
  R router = make_router<R>();
  Routing routing = good_routing();
  const auto backward = [&](std::pair<Index, Index> x, std::pair<Index, Index> d_x, R grad,
                            void (*spoil)(Routing&) = nullptr) {
    return [=, &router, &routing]() mutable {
      Routing r = routing;
      if (spoil != nullptr) spoil(r);
      Matrix<double> out = ones(d_x.first, d_x.second);
      router.backward(ones(x.first, x.second), r, Gradient{}, out, grad);
    };
  };
  const auto route = [&](Index cols, bool training) {
    return [=, &router] {
      Routing r;
      Rng rng(8);
      if constexpr (requires { router.route(ones(5, cols), rng, {}, r); }) {
        if (training) return router.route(ones(5, cols), rng, {}, r);
      }
      router.route(ones(5, cols), {}, r);
    };
  };
  SCOPED_TRACE(name);
  expect_errors({
      {"d_model", [&] { make(0, 3); }, {name, "d_model = 0", "1"}},
      {"negative d_model", [&] { make(-2, 3); }, {name, "d_model = -2", "1"}},
      {"num_experts", [&] { make(4, 0); }, {name, "num_experts = 0", "1"}},
      {"negative num_experts", [&] { make(4, -3); }, {name, "num_experts = -3", "1"}},
      {"route: x", route(3, false), {name, "route", "[5, 3]", "[5, 4]"}},
      {"training: x", route(7, true), {name, "route", "[5, 7]", "[5, 4]"}},
      {"backward: tokens", backward({6, 4}, {6, 4}, router), {name, "backward", "5", "6"}},
      {"backward: x's width", backward({5, 3}, {5, 4}, router), {name, "x", "[5, 3]", "[5, 4]"}},
      {"backward: d_x's rows", backward({5, 4}, {6, 4}, router), {"d_x", "[6, 4]", "[5, 4]"}},
      {"backward: d_x's width", backward({5, 4}, {5, 3}, router), {"d_x", "[5, 3]", "[5, 4]"}},
      {"backward: grad's experts", backward({5, 4}, {5, 4}, make(4, 5)), {"[5, 4]", "[3, 4]"}},
      {"backward: grad's d_model", backward({5, 4}, {5, 4}, make(7, 3)), {"[3, 7]", "[3, 4]"}},
      {"backward: a routing over other experts",
       backward({5, 4}, {5, 4}, router, [](Routing& r) { moe::begin_routing(5, 8, {}, r, ""); }),
       {"8", "3"}},
      {"backward: router_probs",
       backward({5, 4}, {5, 4}, router, [](Routing& r) { r.router_probs = ones(5, 2); }),
       {"router_probs", "[5, 2]", "[5, 3]"}},
      {"backward: a routing without choices",
       backward({5, 4}, {5, 4}, router, [](Routing& r) { r.chosen = {}; }),
       {"0", "6"}},
      {"backward: plan.choice",
       backward({5, 4}, {5, 4}, router, [](Routing& r) { r.plan.choice.clear(); }),
       {"0", "10"}},
      {"backward: plan.choice out of range",
       backward({5, 4}, {5, 4}, router, [](Routing& r) { r.plan.choice[3] = 77; }),
       {"assignment 3", "77 of 10"}},
      {"backward: input_factor",
       backward({5, 4}, {5, 4}, router, [](Routing& r) { r.input_factor = ones(5, 3); }),
       {"input_factor", "[5, 3]", "[5, 4]"}},
      {"backward: noise's draws",
       backward({5, 4}, {5, 4}, router,
                [](Routing& r) {
                  r.noise = {ones(4, 3), ones(5, 3), ones(5, 3), 2};
                }),
       {"draws", "[4, 3]", "[5, 3]"}},
      {"backward: noise's stddev",
       backward({5, 4}, {5, 4}, router,
                [](Routing& r) {
                  r.noise = {ones(5, 3), ones(5, 2), ones(5, 3), 2};
                }),
       {"stddev", "[5, 2]", "[5, 3]"}},
      {"add_expert", [&] { router.add_expert(Vector<double>::Ones(3)); }, {name, "add_expert", "3", "4"}},
      {"remove_expert", [&] { router.remove_expert(3); }, {name, "remove_expert", "3 of 3"}},
      {"remove_expert: negative", [&] { router.remove_expert(-1); }, {name, "-1 of 3"}},
      {"remove_expert: the last ones",
       [&] {
         R few = router;
         for (int i = 0; i < 3; ++i) few.remove_expert(0);
       },
       {name, "remove_expert", " experts, and at least "}},
  });
}

// Of routers with a capacity. `options` are right but for the rule.
template <class R>
void expect_capacity_rule_errors(const char* name, typename R::Options options = {}) {
  const auto make = [&](moe::CapacityRule rule) {
    return [=]() mutable {
      options.d_model = kModel;
      options.num_experts = kExperts;
      options.capacity_rule = rule;
      R{options};
    };
  };
  SCOPED_TRACE(name);
  expect_errors({
      {"minimum", make({.minimum = -1}), {name, ": capacity_rule.minimum = -1", "0"}},
      {"multiple_of", make({.multiple_of = 0}), {name, ": capacity_rule.multiple_of = 0", "1"}},
  });
}

template <class R>
void expect_token_choice_errors(const char* name) {
  using Options = typename R::Options;
  const auto top_k = [](Index k) {
    return [k] {
      Options options;
      options.top_k = k;
      make_router<R>(options);
    };
  };
  const auto capacity = [](std::optional<double> inference, std::optional<double> training) {
    return [=] {
      Options options;
      options.capacity = inference;
      options.training_capacity = training;
      make_router<R>(options);
    };
  };
  Options options;
  options.top_k = 1;
  if constexpr (requires { options.renormalise; }) options.renormalise = true;
  const R constant = make_router<R>(options);
  const auto train = [&] {
    Routing r;
    Rng rng(9);
    constant.route(input(), rng, {}, r);
  };
  const auto backward = [&] {
    Routing r;
    constant.route(input(), {}, r);  // inference is fine
    Matrix<double> d_x = ones(5, 4);
    R grad = moe::zeros_like(constant);
    constant.backward(input(), r, Gradient(), d_x, grad);
  };
  SCOPED_TRACE(name);
  expect_errors({
      {"top_k zero", top_k(0), {name, "top_k = 0", "3"}},
      {"top_k negative", top_k(-2), {name, "top_k = -2", "3"}},
      {"top_k too large", top_k(4), {name, "top_k = 4", "3"}},
      {"capacity negative", capacity(-0.5, {}), {name, ": capacity = -0.5", "0"}},
      {"capacity infinite", capacity(kInf, {}), {name, ": capacity = inf", "0"}},
      {"capacity NaN", capacity(kNan, {}), {name, ": capacity = nan", "0"}},
      {"training_capacity negative", capacity({}, -3), {name, ": training_capacity = -3", "0"}},
      {"training_capacity infinite", capacity({}, kInf), {name, ": training_capacity = inf", "0"}},
      {"constant gates in training", train, {name, "top_k = 1", "num_experts = 3"}},
      {"constant gates in backward", backward, {name, "top_k = 1", "num_experts = 3"}},
  });
}

TEST(Errors, OfRouters) {
  expect_router_errors<TopK>("TopKRouter");
  expect_router_errors<Noisy>("NoisyTopKRouter");
  expect_router_errors<ExpertChoice>("ExpertChoiceRouter");
  expect_router_errors<Sinkhorn>("SinkhornRouter");
  expect_router_errors<Mixer>("SparseMixerRouter");
  expect_token_choice_errors<TopK>("TopKRouter");
  expect_token_choice_errors<Noisy>("NoisyTopKRouter");
  expect_capacity_rule_errors<TopK>("TopKRouter");
  expect_capacity_rule_errors<Noisy>("NoisyTopKRouter");
  expect_capacity_rule_errors<Sinkhorn>("SinkhornRouter");
  expect_capacity_rule_errors<ExpertChoice>("ExpertChoiceRouter");
  expect_capacity_rule_errors<moe::HashRouter<double>>("HashRouter", {.table = IndexVector::Zero(9)});
  expect_errors({
      {"jitter negative", [] { make_router<TopK>({.jitter = -0.1}); }, {"jitter = -0.1", "[0, 1)"}},
      {"jitter of one", [] { make_router<TopK>({.jitter = 1}); }, {"jitter = 1", "[0, 1)"}},
      {"jitter NaN", [] { make_router<TopK>({.jitter = kNan}); }, {"jitter = nan", "[0, 1)"}},
      {"renormalise_epsilon",
       [] { make_router<TopK>({.renormalise_epsilon = -1}); },
       {"renormalise_epsilon = -1", "0"}},
      {"gate_scale", [] { make_router<TopK>({.gate_scale = -2}); }, {"gate_scale = -2", "0"}},
      {"gate_scale of zero", [] { make_router<TopK>({.gate_scale = 0}); }, {"gate_scale = 0", "0"}},
      {"gate_scale infinite", [] { make_router<TopK>({.gate_scale = kInf}); }, {"inf", "0"}},
      {"noise_stddev", [] { make_router<TopK>({.noise_stddev = -1}); }, {"noise_stddev = -1", "0"}},
      {"noise_stddev NaN", [] { make_router<TopK>({.noise_stddev = kNan}); }, {"nan", "0"}},
      {"top_p of zero", [] { make_router<TopK>({.top_p = 0}); }, {"top_p = 0", "(0, 1]"}},
      {"top_p above one", [] { make_router<TopK>({.top_p = 1.5}); }, {"top_p = 1.5", "(0, 1]"}},
      {"second_threshold",
       [] { make_router<TopK>({.second_threshold = -1}); },
       {"second_threshold = -1", "0"}},
      {"random_second_threshold",
       [] { make_router<TopK>({.random_second_threshold = -0.5}); },
       {"random_second_threshold = -0.5", "0"}},
      {"random_second_threshold NaN",
       [] { make_router<TopK>({.random_second_threshold = kNan}); },
       {"random_second_threshold = nan", "0"}},
      {"random_second_threshold beside top_p",
       [] { make_router<TopK>({.top_p = 0.5, .random_second_threshold = 0.2}); },
       {"random_second_threshold = 0.2", "top_p", "0"}},
      {"second_threshold beside groups",
       [] {
         make_router<TopK>({.top_k = 1, .second_threshold = 0.2, .group_limit = {.groups = 3, .kept = 2}});
       },
       {"second_threshold = 0.2", "0"}},
      {"two kinds of scores",
       [] { make_router<TopK>({.score = moe::Score::sigmoid, .softmax_before_selection = false}); },
       {"TopKRouter", "softmax"}},
      {"groups do not divide",
       [] { make_router<TopK>({.group_limit = {.groups = 2}}); },
       {"2 groups", "num_experts = 3"}},
      {"no group kept",
       [] { make_router<TopK>({.group_limit = {.groups = 3, .kept = 0}}); },
       {"kept groups = 0", "groups = 3"}},
      {"more groups kept than there are",
       [] { make_router<TopK>({.group_limit = {.groups = 3, .kept = 4}}); },
       {"kept groups = 4", "groups = 3"}},
      {"too few experts in the kept groups",
       [] { make_router<TopK>({.top_k = 2, .group_limit = {.groups = 3, .kept = 1}}); },
       {"1 experts", "top_k = 2"}},
      {"two best of one",
       [] {
         make_router<TopK>(
             {.top_k = 1, .group_limit = {.groups = 3, .kept = 2, .score = moe::GroupScore::top_two_sum}});
       },
       {"groups of 1", "2"}},
      {"add_expert to groups",
       [] {
         TopK router = make_router<TopK>({.top_k = 1, .group_limit = {.groups = 3, .kept = 2}});
         router.add_expert(Vector<double>::Ones(4));
       },
       {"TopKRouter::add_expert", "3 groups", "num_experts = 4"}},
      {"selection bias of another length",
       [] {
         TopK router = make_router<TopK>({.selection_bias = true});
         router.selection_bias = Vector<double>::Ones(2);
         Routing r;
         router.route(input(), {}, r);
       },
       {"selection_bias", "2", "3"}},
      {"a ranking of another shape",
       [] {
         Routing r = good_routing();
         const moe::ReusedMatrix<double> ranking = ones(5, 2);
         moe::begin_routing(5, 3, {}, r, "test");
         r.router_logits = ones(5, 3);
         moe::RouterWorkspace<double> workspace;
         moe::route_by_logits({}, {.ranking = &ranking}, {}, r, workspace, moe::Sequential{});
       },
       {"given_ranking", "[5, 2]", "[5, 3]"}},
      {"update_selection_bias: sizes",
       [] {
         Vector<double> bias = Vector<double>::Zero(3);
         moe::update_selection_bias(bias, IndexVector(IndexVector::Ones(4)), 0.1);
       },
       {"update_selection_bias", "3", "4"}},
      {"update_selection_bias: counts",
       [] {
         Vector<double> bias = Vector<double>::Zero(2);
         moe::update_selection_bias(bias, IndexVector{{1, -5}}, 0.1);
       },
       {"tokens_per_expert[1] = -5", "0"}},
      {"update_selection_bias: rate",
       [] {
         Vector<double> bias = Vector<double>::Zero(2);
         moe::update_selection_bias(bias, IndexVector{{1, 5}}, kNan);
       },
       {"rate = nan"}},
      {"noise_epsilon negative",
       [] { make_router<Noisy>({.noise_epsilon = -1}); },
       {"noise_epsilon = -1", "0"}},
      {"noise_epsilon infinite", [] { make_router<Noisy>({.noise_epsilon = kInf}); }, {"inf", "0"}},
      {"expert choice: capacity", [] { make_router<ExpertChoice>({.capacity = -2}); }, {"-2", "0"}},
      {"expert choice: capacity NaN", [] { make_router<ExpertChoice>({.capacity = kNan}); }, {"nan", "0"}},
      {"expert choice: next_best",
       [] { make_router<ExpertChoice>({.overflow = Overflow::next_best}); },
       {"ExpertChoiceRouter", "next_best"}},
      {"bias of another length",
       [] {
         TopK router = make_router<TopK>({.bias = true});
         router.b_router = Vector<double>::Ones(2);
         Routing r;
         router.route(input(), {}, r);
       },
       {"2", "3"}},
      {"noise weights of another shape",
       [] {
         Noisy router = make_router<Noisy>();
         router.w_noise = ones(2, 4);
         Routing r;
         Rng rng(10);
         router.route(input(), rng, {}, r);
       },
       {"w_noise", "[2, 4]", "[3, 4]"}},
      {"backward without the bias of grad",
       [] {
         const TopK router = make_router<TopK>({.bias = true});
         TopK grad = make_router<TopK>();
         Matrix<double> d_x = ones(5, 4);
         router.backward(input(), good_routing(), Gradient{}, d_x, grad);
       },
       {"b_router", "[0, 1]", "[3, 1]"}},
  });
}

// ---- The layer.

// A router whose plan is of as many tokens and experts as it is told.
struct Careless {
  using Scalar = double;
  Index tokens, experts;
  Index d_model() const { return kModel; }
  Index num_experts() const { return kExperts; }
  void route(const moe::ConstMatrixRef<double>&, const BatchInfo&, Routing& routing) const {
    moe::begin_routing(tokens, experts, {}, routing, "Careless::route");
  }
};

// A router that chooses and then forgets dispatch_all.
struct NoSeats {
  using Scalar = double;
  Index d_model() const { return kModel; }
  Index num_experts() const { return kExperts; }
  void route(const moe::ConstMatrixRef<double>& x, const BatchInfo& info, Routing& routing) const {
    moe::begin_routing(x.rows(), kExperts, info, routing, "NoSeats::route");
    for (Index t = 0; t < x.rows(); ++t) {
      routing.chosen.expert.push_back(0);
      routing.chosen.gate.push_back(1.0);
      routing.chosen.token_begin[t + 1] = t + 1;
    }
  }
};

TEST(Errors, OfTheLayer) {
  const Layer layer = make_layer();
  Layer::Cache good_cache;
  layer.forward(input(), good_cache);
  const auto build = [](Index experts, Index d_model, Index shared, Index shared_d_model,
                        bool gated = false) {
    return [=] {
      Layer(make_experts(experts, expert_options(d_model)), make_router<TopK>(),
            {.experts = make_experts(shared, expert_options(shared_d_model)), .gated = gated});
    };
  };
  const auto backward = [&](Matrix<double> d_y, Layer grad) {
    return [=, &layer, &good_cache]() mutable { layer.backward(d_y, good_cache, grad); };
  };
  const auto other_cache = [&](auto other, Matrix<double> x) {
    return [=, &layer] {
      Layer::Cache cache;
      other.forward(x, cache);
      Layer grad = moe::zeros_like(layer);
      layer.backward(input(), cache, grad);
    };
  };
  Rng rng(11);
  const TopK router_5({.d_model = 4, .num_experts = 5}, rng), wide({.d_model = 9, .num_experts = 3}, rng);
  const Layer layer_5(make_experts(5), router_5), layer_9(make_experts(3, expert_options(9)), wide),
      other_ff(make_experts(3, expert_options(4, 8)), make_router<TopK>());
  expect_errors({
      {"no experts", build(0, 4, 0, 4), {"MoELayer", "0", "1"}},
      {"too few experts", build(2, 4, 0, 4), {"MoELayer", "2", "3"}},
      {"too many experts", build(5, 4, 0, 4), {"MoELayer", "5", "3"}},
      {"width of an expert", build(3, 6, 0, 4), {"MoELayer", "expert 0", "6", "4"}},
      {"width of a shared expert", build(3, 4, 1, 6), {"MoELayer", "expert 3", "6", "4"}},
      {"gated nobody", build(3, 4, 0, 4, true), {"MoELayer", "0", "1"}},
      {"route: x", [&] { layer.route(ones(5, 3)); }, {"MoELayer", "3", "4"}},
      {"forward: x",
       [&] { layer.forward(ones(5, 3)); },
       {"MoELayer::forward", "3", "d_model = 4", "tokens are rows"}},
      {"forward with a workspace: x",
       [&] {
         Matrix<double> y;
         Layer::Workspace w;
         layer.forward(ones(5, 6), y, w);
       },
       {"6", "4"}},
      {"forward with a cache: x",
       [&] {
         Layer::Cache c;
         layer.forward(ones(5, 3), c);
       },
       {"3", "4"}},
      {"forward into y with a cache: x",
       [&] {
         Layer::Cache c;
         Matrix<double> y;
         layer.forward(ones(5, 3), y, c);
       },
       {"3", "4"}},
      {"training: x",
       [&] {
         Layer::Cache c;
         Rng r;
         layer.forward(ones(5, 3), r, c);
       },
       {"3", "4"}},
      {"training into y: x",
       [&] {
         Layer::Cache c;
         Rng r;
         Matrix<double> y;
         layer.forward(ones(5, 3), r, y, c);
       },
       {"3", "4"}},
      {"forward: y is x",
       [&] {
         Matrix<double> x = input();
         Layer::Workspace w;
         layer.forward(x, x, w);
       },
       {"MoELayer::forward", "y and x overlap", "5 x 32 bytes"}},
      {"forward with a cache: y is x",
       [&] {
         Matrix<double> x = input();
         Layer::Cache c;
         layer.forward(x, x, c);
       },
       {"MoELayer::forward", "y and x overlap", "5 x 32 bytes"}},
      {"backward: d_x is d_y",
       [&] {
         Matrix<double> d = input();
         Layer grad = moe::zeros_like(layer);
         layer.backward(d, good_cache, grad, {}, d);
       },
       {"MoELayer::backward", "d_x and d_y overlap", "5 x 32 bytes"}},
      {"a router's plan of fewer tokens",
       [] {
         const moe::MoELayer<Gated, Careless> careless(make_experts(kExperts), Careless{4, 3});
         careless.forward(input());
       },
       {"MoELayer::route", "4", "5"}},
      {"a router's plan over more experts",
       [] {
         const moe::MoELayer<Gated, Careless> careless(make_experts(kExperts), Careless{5, 7});
         careless.forward(input());
       },
       {"MoELayer::route", "7", "3"}},
      {"a router that seats nobody",
       [] {
         const moe::MoELayer<Gated, NoSeats> no_seats(make_experts(kExperts), NoSeats{});
         no_seats.forward(input());
       },
       {"MoELayer::route", "5", "dispatch_all"}},
      {"a router that seats nobody, in training",
       [] {
         const moe::MoELayer<Gated, NoSeats> no_seats(make_experts(kExperts), NoSeats{});
         moe::MoELayer<Gated, NoSeats>::Cache c;
         Rng draws(9);
         no_seats.forward(input(), draws, c);
       },
       {"MoELayer::route", "5", "dispatch_all"}},
      {"b_output",
       [&] {
         Layer l = layer;
         l.b_output.setZero(6);
         l.forward(input());
       },
       {"MoELayer::forward", "b_output", "6", "4"}},
      {"w_shared_gate",
       [] {
         Layer l = make_layer(true);
         l.w_shared_gate.setZero(2, 4);
         l.forward(input());
       },
       {"MoELayer::forward", "w_shared_gate", "[2, 4]", "[1, 4]"}},
      {"replay: x", [&] { layer.forward(ones(5, 3), good_routing()); }, {"3", "4"}},
      {"replay with a cache: x",
       [&] {
         Layer::Cache c;
         layer.forward(ones(5, 3), good_routing(), c);
       },
       {"3", "4"}},
      {"replay with a cache: tokens",
       [&] {
         Layer::Cache c;
         layer.forward(ones(6, 4), good_routing(), c);
       },
       {"5", "6"}},
      {"backward: d_y's rows", backward(ones(6, 4), layer), {"MoELayer::backward", "[6, 4]", "[5, 4]"}},
      {"backward: d_y's width", backward(ones(5, 3), layer), {"[5, 3]", "[5, 4]"}},
      {"backward: grad's experts", backward(input(), layer_5), {"grad", "5", "3"}},
      {"backward: grad's width", backward(input(), layer_9), {"grad", "9", "4"}},
      {"backward: grad's shared experts", backward(input(), make_layer(true)), {"3 + 1", "3 + 0"}},
      {"backward: grad's d_ff", backward(input(), other_ff), {"[8, 4]", "[6, 4]"}},
      {"backward: an unused cache",
       [&] {
         Layer::Cache c;
         Layer grad = layer;
         layer.backward(input(), c, grad);
       },
       {"MoELayer::backward", "0", "4", "no forward pass filled this cache"}},
      {"backward: the cache of more experts", other_cache(layer_5, input()), {"5", "3"}},
      {"backward: the cache of a wider layer", other_cache(layer_9, ones(5, 9)), {"9", "4"}},
      {"backward: the cache of a wider expert", other_cache(other_ff, input()), {"32", "24"}},
      {"backward: a cache used for inference since",
       [&] {
         Layer::Cache c;
         Matrix<double> y;
         Layer grad = layer;
         layer.forward(input(), c);
         layer.forward(ones(8, 4), y, static_cast<Layer::Workspace&>(c));
         layer.backward(input(), c, grad);
       },
       {"MoELayer::backward", "5", "8"}},
      {"add_expert: width",
       [&] {
         Layer l = layer;
         l.add_expert(make_experts(1, expert_options(6))[0], Vector<double>::Ones(4));
       },
       {"MoELayer::add_expert", "6", "4"}},
      {"add_expert: weights",
       [&] {
         Layer l = layer;
         l.add_expert(make_experts(1)[0], Vector<double>::Ones(3));
       },
       {"3", "4"}},
      {"remove_expert",
       [&] {
         Layer l = layer;
         l.remove_expert(3);
       },
       {"3 of 3"}},
      {"remove_expert: negative",
       [&] {
         Layer l = layer;
         l.remove_expert(-1);
       },
       {"-1 of 3"}},
      {"remove_expert: too few",
       [&] {
         Layer l = layer;
         l.remove_expert(0);
         l.remove_expert(0);
       },
       {"2"}},
      {"visit: experts",
       [&] { Layer::visit([](const auto&, const auto&, const auto&) {}, layer, layer_5); },
       {"MoELayer::visit", "5", "3"}},
      {"visit: shared experts",
       [&] {
         const Layer shared = make_layer(true);
         Layer::visit([](const auto&, const auto&, const auto&) {}, layer, shared);
       },
       {"MoELayer::visit", "3 + 1", "3 + 0"}},
      {"visit: widths",
       [&] { Layer::visit([](const auto&, const auto&, const auto&) {}, layer, other_ff); },
       {"[8, 4]", "[6, 4]"}},
  });
}

// ---- check_gradients.

TEST(Errors, OfCheckGradients) {
  Rng rng(12);
  const Gated expert(expert_options(), rng);
  const auto with = [&](moe::GradientCheckOptions options) {
    return [=, &expert] { moe::check_gradients(expert, input(), options); };
  };
  expect_errors({
      {"expert: x", [&] { moe::check_gradients(expert, ones(2, 3)); }, {"[2, 3]", "[2, 4]"}},
      {"router: x", [] { moe::check_gradients(make_router<TopK>(), ones(2, 3)); }, {"[2, 3]", "[2, 4]"}},
      {"layer: x", [] { moe::check_gradients(make_layer(), ones(2, 3)); }, {"3", "4"}},
      {"step", with({.step = 0}), {"step = 0", "0"}},
      {"negative step", with({.step = -1}), {"step = -1", "0"}},
      {"step NaN", with({.step = kNan}), {"step = nan", "0"}},
      {"margin", with({.margin = -1}), {"margin = -1", "0"}},
      {"floor", with({.floor = 0}), {"floor = 0", "0"}},
  });
}

// An expert whose gradient is not a number in one array and exact in the arrays after it.
struct Broken : Plain {
  using Plain::Plain;
  void backward(const moe::ConstMatrixRef<double>& x, const moe::ConstMatrixRef<double>& d_y,
                moe::MatrixRef<double> cache, moe::MatrixRef<double> d_x, Broken& grad) const {
    Plain::backward(x, d_y, cache, d_x, grad);
    d_x(0, 0) = kNan;
  }
};

TEST(Errors, CheckGradientsReportsNotANumberAsTheWorst) {
  Rng rng(13);
  const moe::GradientReport report = moe::check_gradients(Broken({.d_model = 4, .d_ff = 6}, rng), input());
  EXPECT_GT(report.worst, 1e-6);
  EXPECT_EQ(report.where, "x");
}

}  // namespace
