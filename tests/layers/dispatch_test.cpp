// SPDX-License-Identifier: MIT
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/random.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/layers/dispatch.hpp>
#include <moe/layers/grouped_experts.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/math/init.hpp>
#include <moe/routers/top_k_router.hpp>

namespace dispatch_test {
namespace {

using moe::Buffer;
using moe::DispatchPlan;
using moe::GateSide;
using moe::Index;
using moe::Matrix;
using moe::RowBuffer;
using moe::TokenState;

struct Assignment {
  Index expert, token;
  double gate;
};

template <class S = double>
DispatchPlan<S> make_plan(Index tokens, Index experts, const std::vector<Assignment>& assignments,
                          GateSide side = GateSide::output) {
  DispatchPlan<S> plan;
  plan.num_tokens = tokens;
  plan.token_state.assign(tokens, TokenState::valid);
  plan.gate_side = side;
  plan.expert_begin.push_back(0);
  for (Index e = 0; e < experts; ++e) {
    for (const Assignment& a : assignments) {
      if (a.expert != e) continue;
      plan.token.push_back(a.token);
      plan.gate.push_back(S(a.gate));
    }
    plan.expert_begin.push_back(plan.token.size());
  }
  return plan;
}

// Three tokens, three experts; token 1 goes nowhere, expert 1 has nobody.
DispatchPlan<double> small_plan(GateSide side = GateSide::output) {
  return make_plan(3, 3, {{0, 0, .5}, {0, 2, 2}, {2, 0, -1}}, side);
}

template <class S>
RowBuffer<S> rows_of(const Matrix<S>& m) {
  RowBuffer<S> rows;
  rows.resize(m.rows(), m.cols());
  rows.matrix() = m;
  return rows;
}

Matrix<double> random_matrix(Index rows, Index cols, moe::Rng& rng) {
  Matrix<double> m(rows, cols);
  moe::fill_normal(m, 1.0, rng);
  return m;
}

// A plan of random size in which some tokens are masked, poisoned or passed through.
DispatchPlan<double> random_plan(GateSide side, moe::Rng& rng) {
  const Index tokens = rng.index(150), experts = 1 + rng.index(6);
  std::vector<TokenState> state(static_cast<std::size_t>(tokens), TokenState::valid);
  for (TokenState& s : state)
    if (rng.index(8) == 0) s = rng.index(2) == 0 ? TokenState::masked : TokenState::poisoned;
  std::vector<Assignment> assignments;
  std::vector<bool> used(std::size_t(tokens), false);
  for (Index e = 0; e < experts; ++e) {
    for (Index t = 0; t < tokens; ++t) {
      if (rng.index(3) != 0 || state[std::size_t(t)] != TokenState::valid) continue;
      assignments.push_back({e, t, rng.normal()});
      used[std::size_t(t)] = true;
    }
  }
  DispatchPlan<double> plan = make_plan(tokens, experts, assignments, side);
  for (Index t = 0; t < tokens; ++t) {
    plan.token_state[t] = state[std::size_t(t)];
    if (!used[std::size_t(t)] && state[std::size_t(t)] == TokenState::valid && rng.index(2) == 0)
      plan.passed_through.push_back(t);
  }
  return plan;
}

// ---- By hand.

TEST(Dispatch, CopiesTokensToTheRowsOfTheirExperts) {
  Matrix<double> x(3, 2);
  x << 1, 2, 3, 4, 5, 6;
  RowBuffer<double> rows;
  moe::dispatch(x, small_plan(), rows);
  EXPECT_EQ(rows.matrix(), (Matrix<double>{{1, 2}, {5, 6}, {1, 2}}));
  moe::dispatch(x, small_plan(GateSide::input), rows);
  EXPECT_EQ(rows.matrix(), (Matrix<double>{{.5, 1}, {10, 12}, {-1, -2}}));
}

TEST(Dispatch, TakesBlocksOfLargerMatrices) {
  Matrix<double> large = Matrix<double>::Constant(5, 4, 99);
  large.block(1, 1, 3, 2) << 1, 2, 3, 4, 5, 6;
  RowBuffer<double> rows;
  moe::dispatch(large.block(1, 1, 3, 2), small_plan(), rows);
  EXPECT_EQ(rows.matrix(), (Matrix<double>{{1, 2}, {5, 6}, {1, 2}}));
}

TEST(Combine, AddsGateTimesRowAndLeavesTheOthersZero) {
  const auto rows = rows_of<double>(Matrix<double>{{1, 2}, {3, 4}, {5, 6}});
  const Matrix<double> x = Matrix<double>::Constant(3, 2, 77);
  Matrix<double> y = Matrix<double>::Constant(3, 2, 99);
  moe::combine(rows, small_plan(), x, y);
  EXPECT_EQ(y, (Matrix<double>{{.5 - 5, 1 - 6}, {0, 0}, {6, 8}}));
  moe::combine(rows, small_plan(GateSide::input), x, y);  // gates have done their work
  EXPECT_EQ(y, (Matrix<double>{{6, 8}, {0, 0}, {3, 4}}));
}

TEST(Combine, PassesTokensThroughAndMarksPoisonedOnes) {
  auto plan = small_plan();
  plan.token_state.push_back(TokenState::masked);
  plan.token_state.push_back(TokenState::poisoned);
  plan.num_tokens = 5;
  plan.passed_through = {1};
  Matrix<double> x = Matrix<double>::Constant(5, 2, 77), y(5, 2);
  moe::combine(rows_of<double>(Matrix<double>{{1, 2}, {3, 4}, {5, 6}}), plan, x, y);
  EXPECT_EQ(y.row(1), x.row(1));
  EXPECT_EQ(y.row(2), (Matrix<double>{{6, 8}}).row(0));
  EXPECT_TRUE((y.row(3).array() == 0).all());
  EXPECT_TRUE(y.row(4).array().isNaN().all());
}

TEST(Combine, AddsExpertsToATokenThatIsPassedThrough) {  // shared experts are added in every case
  auto plan = make_plan(1, 2, {{1, 0, 2.}});
  plan.passed_through = {0};
  Matrix<double> y(1, 1);
  moe::combine(rows_of<double>(Matrix<double>{{10}}), plan, Matrix<double>{{3}}, y);
  EXPECT_EQ(y(0, 0), 23);
}

// In float 1e8 + 1 is 1e8: the result shows the order of the sum.
TEST(Combine, AddsInAscendingExpert) {
  const auto plan = make_plan<float>(1, 3, {{0, 0, 1.}, {1, 0, 1.}, {2, 0, 1.}});
  const auto sum = [&](float a, float b, float c) {
    Matrix<float> y(1, 1);
    moe::combine(rows_of<float>(Matrix<float>{{a}, {b}, {c}}), plan, Matrix<float>{{0.f}}, y);
    return y(0, 0);
  };
  EXPECT_EQ(sum(1e8f, 1, -1e8f), 0);
  EXPECT_EQ(sum(1e8f, -1e8f, 1), 1);
  EXPECT_EQ(sum(1, 1e8f, -1e8f), 0);
}

TEST(CombineBackward, ByHand) {
  const auto rows = rows_of<double>(Matrix<double>{{1, 2}, {3, 4}, {5, 6}});
  const Matrix<double> d_y{{1, 10}, {77, 77}, {2, 3}};
  RowBuffer<double> d_rows;
  Buffer<double> d_gate;
  moe::combine_backward(d_y, rows, small_plan(), d_rows, d_gate);
  EXPECT_EQ(d_rows.matrix(), (Matrix<double>{{.5, 5}, {4, 6}, {-1, -10}}));
  EXPECT_EQ(d_gate, (Buffer<double>{21, 18, 65}));
  moe::combine_backward(d_y, rows, small_plan(GateSide::input), d_rows, d_gate);
  EXPECT_EQ(d_rows.matrix(), (Matrix<double>{{1, 10}, {2, 3}, {1, 10}}));
  EXPECT_EQ(d_gate, (Buffer<double>{0, 0, 0}));  // dispatch_backward fills it
}

TEST(DispatchBackward, ByHand) {
  const auto d_rows = rows_of<double>(Matrix<double>{{1, 2}, {3, 4}, {5, 6}});
  const Matrix<double> x{{1, 10}, {77, 77}, {2, 3}}, d_y = Matrix<double>::Constant(3, 2, 55);
  Matrix<double> d_x = Matrix<double>::Constant(3, 2, 99);
  Buffer<double> d_gate{-1, -1, -1};
  auto plan = small_plan();
  plan.passed_through = {1};
  moe::dispatch_backward(d_rows, plan, x, d_y, d_x, d_gate);
  EXPECT_EQ(d_x, (Matrix<double>{{6, 8}, {55, 55}, {3, 4}}));
  EXPECT_EQ(d_gate, (Buffer<double>{-1, -1, -1}));  // combine_backward's business
  plan.gate_side = GateSide::input;
  moe::dispatch_backward(d_rows, plan, x, d_y, d_x, d_gate);
  EXPECT_EQ(d_x, (Matrix<double>{{-4.5, -5}, {55, 55}, {6, 8}}));
  EXPECT_EQ(d_gate, (Buffer<double>{21, 18, 65}));
}

// ---- Laws: backward is the adjoint of forward.

double inner(const Matrix<double>& a, const Matrix<double>& b) { return a.cwiseProduct(b).sum(); }

// x with what backward may never look at.
Matrix<double> poison(Matrix<double> m, const DispatchPlan<double>& plan) {
  for (Index t = 0; t < plan.num_tokens; ++t)
    if (plan.token_state[t] != TokenState::valid)
      m.row(t).setConstant(std::numeric_limits<double>::quiet_NaN());
  return m;
}

TEST(Dispatch, BackwardIsItsAdjoint) {
  moe::Rng rng(1);
  for (int round = 0; round < 60; ++round) {
    const auto plan = random_plan(GateSide(round % 2), rng);
    const Index cols = 1 + rng.index(9);
    const Matrix<double> x = random_matrix(plan.num_tokens, cols, rng),
                         d_y = random_matrix(plan.num_tokens, cols, rng);
    const auto r = rows_of<double>(random_matrix(plan.num_assignments(), cols, rng));
    RowBuffer<double> rows;
    moe::dispatch(poison(x, plan), plan, rows);
    Matrix<double> d_x(plan.num_tokens, cols);
    Buffer<double> d_gate;
    d_gate.assign(plan.num_assignments(), 0);
    moe::dispatch_backward(r, plan, poison(x, plan), poison(d_y, plan), d_x, d_gate);
    double expected = inner(rows.matrix(), r.matrix());
    for (const Index t : plan.passed_through) expected += x.row(t).dot(d_y.row(t));
    EXPECT_NEAR(inner(x, d_x), expected, 1e-11);
    if (plan.gate_side == GateSide::input) {  // <rows, r> is linear in the gates
      double by_gates = 0;
      for (Index a = 0; a < plan.num_assignments(); ++a) by_gates += plan.gate[a] * d_gate[a];
      EXPECT_NEAR(by_gates, inner(rows.matrix(), r.matrix()), 1e-11);
    }
  }
}

TEST(Combine, BackwardIsItsAdjoint) {
  moe::Rng rng(2);
  for (int round = 0; round < 60; ++round) {
    const auto plan = random_plan(GateSide(round % 2), rng);
    const Index cols = 1 + rng.index(9);
    const Matrix<double> x = random_matrix(plan.num_tokens, cols, rng),
                         d_y = random_matrix(plan.num_tokens, cols, rng);
    const auto rows = rows_of<double>(random_matrix(plan.num_assignments(), cols, rng));
    Matrix<double> y(plan.num_tokens, cols);
    moe::combine(rows, plan, poison(x, plan), y);
    RowBuffer<double> d_rows;
    Buffer<double> d_gate;
    moe::combine_backward(poison(d_y, plan), rows, plan, d_rows, d_gate);
    double expected = 0;
    for (Index t = 0; t < plan.num_tokens; ++t) {
      const bool passed = std::binary_search(plan.passed_through.begin(), plan.passed_through.end(), t);
      if (plan.token_state[t] == TokenState::valid && !passed) expected += y.row(t).dot(d_y.row(t));
      EXPECT_EQ(y.row(t).array().isNaN().all(), plan.token_state[t] == TokenState::poisoned);
    }
    EXPECT_NEAR(inner(rows.matrix(), d_rows.matrix()), expected, 1e-11);
    if (plan.gate_side == GateSide::output) {
      double by_gates = 0;
      for (Index a = 0; a < plan.num_assignments(); ++a) by_gates += plan.gate[a] * d_gate[a];
      EXPECT_NEAR(by_gates, expected, 1e-11);
    }
  }
}

TEST(Dispatch, AnEmptyBatchAndAPlanOfNobodyAreFine) {
  RowBuffer<double> rows;
  Buffer<double> d_gate;
  Matrix<double> none(0, 3), y(0, 3);
  const auto empty = make_plan(0, 2, {});
  moe::dispatch(none, empty, rows);
  moe::combine(rows, empty, none, y);
  RowBuffer<double> d_rows;
  moe::combine_backward(none, rows, empty, d_rows, d_gate);
  moe::dispatch_backward(d_rows, empty, none, none, y, d_gate);
  EXPECT_EQ(rows.rows(), 0);
  const auto idle = make_plan(2, 2, {});
  Matrix<double> x = Matrix<double>::Ones(2, 3), out(2, 3);
  moe::dispatch(x, idle, rows);
  moe::combine(rows, idle, x, out);
  EXPECT_TRUE((out.array() == 0).all());
}

// ---- Experts on their rows.

// Inference only; counts its calls and rows.
struct Scale {
  using Scalar = double;
  double factor = 1;
  std::atomic<int>* calls = nullptr;
  Index d_model() const { return 2; }
  void forward(const moe::ConstMatrixRef<double>& x, moe::MatrixRef<double> y) const {
    y = factor * x;
    ++*calls;
  }
};
static_assert(moe::Expert<Scale> && !moe::TrainableExpert<Scale>);

TEST(GroupedExperts, EveryExpertSeesItsRowsAndOnlyThose) {
  std::atomic<int> calls{0};
  const moe::GroupedExperts<Scale> experts(std::vector<Scale>{{10, &calls}, {100, &calls}, {1000, &calls}});
  const auto x_rows = rows_of<double>(Matrix<double>{{1, 2}, {3, 4}, {5, 6}});
  RowBuffer<double> y_rows;
  moe::ExpertWorkspace<double> workspace;
  experts.forward(x_rows, small_plan().expert_begin, y_rows, workspace);
  EXPECT_EQ(y_rows.matrix(), (Matrix<double>{{10, 20}, {30, 40}, {5000, 6000}}));
  EXPECT_EQ(calls, 2);  // the one without rows is not called
}

TEST(GroupedExperts, ManyRowsComeInBlocksThatCoverAllOfThem) {
  std::atomic<int> calls{0};
  const moe::GroupedExperts<Scale> experts(std::vector<Scale>{{1, &calls}, {-1, &calls}});
  moe::Rng rng(3);
  std::vector<Assignment> all;
  for (const Index e : {0, 1})
    for (Index t = 0; t < 500; ++t) all.push_back({e, t, 1});
  const auto plan = make_plan(500, 2, all);
  const auto x_rows = rows_of<double>(random_matrix(1000, 2, rng));
  RowBuffer<double> y_rows;
  moe::ExpertWorkspace<double> workspace;
  experts.forward(x_rows, plan.expert_begin, y_rows, workspace);
  EXPECT_EQ(y_rows.block(0, 500), x_rows.block(0, 500));
  EXPECT_EQ(y_rows.block(500, 500), -x_rows.block(500, 500));
  EXPECT_GT(calls, 2);
}

// Keeps little and says nothing of its work.
struct Slow {
  using Scalar = float;
  Index d_model() const { return 4; }
  Index cache_cols() const { return 1; }
  void forward(const moe::ConstMatrixRef<float>& x, moe::MatrixRef<float> y) const { y = x; }
  void forward(const moe::ConstMatrixRef<float>& x, moe::MatrixRef<float> y, moe::MatrixRef<float>) const {
    y = x;
  }
};

struct CountingExecutor {
  int* calls;
  Index concurrency() const { return 2; }
  template <class F>
  void for_each(Index n, F&& f) const {
    ++*calls;
    moe::Sequential{}.for_each(n, f);
  }
};

TEST(GroupedExperts, AskTheExecutorUnlessTheyKnowThatTheirWorkIsLittle) {
  moe::Rng rng(1);
  const std::vector<Index> begin{0, 3, 5};
  const auto calls_of = [&](const auto& experts, Index width) {
    moe::RowBuffer<float> x, y;
    x.resize(5, width, 5);
    x.block(0, 5).setOnes();
    typename std::decay_t<decltype(experts)>::Workspace workspace;
    int calls = 0;
    experts.forward(x, begin, y, workspace, CountingExecutor{&calls});
    return calls;
  };
  EXPECT_EQ(calls_of(moe::GroupedExperts<Slow>(std::vector<Slow>(2), 4, "test"), 4), 1);
  using E = moe::GatedFeedForward<float>;
  EXPECT_EQ(
      calls_of(moe::GroupedExperts<E>(moe::make_experts<E>(2, {.d_model = 8, .d_ff = 8}, rng), 8, "test"), 8),
      0);
  EXPECT_EQ(calls_of(moe::GroupedExperts<E>(moe::make_experts<E>(2, {.d_model = 128, .d_ff = 128}, rng), 128,
                                            "test"),
                     128),
            1);
}

TEST(MoELayer, IsNoExpertItself) {
  static_assert(!moe::Expert<moe::MoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>>>);
  static_assert(moe::Expert<moe::GatedFeedForward<float>>);
}

TEST(GroupedExperts, WithAndWithoutACacheAndAloneGiveTheSameBits) {
  using Expert = moe::FeedForward<double, moe::GELU>;
  moe::Rng rng(4);
  const moe::GroupedExperts<Expert> experts(
      moe::make_experts<Expert>(3, {.d_model = 5, .d_ff = 7, .bias = true}, rng));
  std::vector<Assignment> all;
  for (Index t = 0; t < 300; ++t) all.push_back({t % 2 == 0 ? 0 : 2, t, 1});
  const auto plan = make_plan(300, 3, all);
  const auto x_rows = rows_of<double>(random_matrix(300, 5, rng));
  RowBuffer<double> y_rows, y_with_cache;
  moe::ExpertWorkspace<double> workspace;
  moe::ExpertCache<double> cache;
  experts.forward(x_rows, plan.expert_begin, y_rows, workspace);
  experts.forward(x_rows, plan.expert_begin, y_with_cache, cache);
  EXPECT_TRUE((y_rows.matrix().array() == y_with_cache.matrix().array()).all());
  Matrix<double> alone(150, 5);
  experts[2].forward(x_rows.block(150, 150), alone);
  EXPECT_TRUE((alone.array() == y_rows.block(150, 150).array()).all());
}

TEST(GroupedExperts, BackwardIsThatOfEveryExpertAlone) {
  using Expert = moe::FeedForward<double, moe::GELU>;
  moe::Rng rng(5);
  const moe::GroupedExperts<Expert> experts(moe::make_experts<Expert>(3, {.d_model = 4, .d_ff = 6}, rng));
  std::vector<Assignment> all;
  for (Index t = 0; t < 210; ++t) all.push_back({t < 200 ? 0 : 2, t, 1});
  const auto plan = make_plan(210, 3, all);
  const auto x_rows = rows_of<double>(random_matrix(210, 4, rng)),
             d_rows = rows_of<double>(random_matrix(210, 4, rng));
  RowBuffer<double> y_rows, d_x_rows;
  moe::ExpertCache<double> cache;
  auto grads = moe::zeros_like(experts);
  experts.forward(x_rows, plan.expert_begin, y_rows, cache);
  experts.backward(x_rows, plan.expert_begin, d_rows, cache, d_x_rows, grads);
  for (const Index e : {0, 1, 2}) {
    const Index begin = plan.expert_begin[e], count = plan.rows_of(e);
    const Expert& expert = experts[e];
    Matrix<double> y(count, 4), own(count, expert.cache_cols()), d_x(count, 4);
    Expert grad = moe::zeros_like(expert);
    expert.forward(x_rows.block(begin, count), y, own);
    expert.backward(x_rows.block(begin, count), d_rows.block(begin, count), own, d_x, grad);
    EXPECT_TRUE((d_x.array() == d_x_rows.block(begin, count).array()).all());
    EXPECT_TRUE((grad.w_up.array() == grads[e].w_up.array()).all());
    EXPECT_TRUE((grad.w_down.array() == grads[e].w_down.array()).all());
  }
  EXPECT_TRUE((grads[1].w_up.array() == 0).all());
}

TEST(GroupedExperts, ComeAndGoByNumber) {
  std::atomic<int> calls{0};
  moe::GroupedExperts<Scale> experts(std::vector<Scale>{{10, &calls}, {30, &calls}});
  experts.insert(1, {20, &calls});
  experts.insert(3, {40, &calls});
  EXPECT_THROW(experts.insert(5, {50, &calls}), std::invalid_argument);
  EXPECT_THROW(experts.insert(-1, {50, &calls}), std::invalid_argument);
  ASSERT_EQ(experts.size(), 4);
  for (const Index e : {0, 1, 2, 3}) EXPECT_EQ(experts[e].factor, 10.0 * double(e + 1));
  EXPECT_THROW(experts.keep(std::vector<Index>{0, 4}), std::invalid_argument);
  EXPECT_EQ(experts.size(), 4);
  experts.keep(std::vector<Index>{3, 1});
  ASSERT_EQ(experts.size(), 2);
  EXPECT_EQ(experts[0].factor, 40);
  EXPECT_EQ(experts[1].factor, 20);
}

// ---- What compiles.

// A column-major matrix of tokens would be read as if its rows lay side by side.
template <class M>
constexpr bool kDispatches = requires(const M& x, const DispatchPlan<double>& plan, RowBuffer<double>& rows) {
  moe::dispatch(x, plan, rows);
};
template <class X, class Y>
constexpr bool kCombines = requires(const RowBuffer<double>& rows, const DispatchPlan<double>& plan,
                                    const X& x, Y& y) {
  moe::combine(rows, plan, x, y);
};
template <class D>
constexpr bool kGoesBack = requires(const D& d_y, RowBuffer<double>& rows, const DispatchPlan<double>& plan,
                                    Buffer<double>& d_gate) {
  moe::combine_backward(d_y, rows, plan, rows, d_gate);
};
template <class X, class D, class Dx>
constexpr bool kGoesBackToX = requires(const RowBuffer<double>& rows, const DispatchPlan<double>& plan,
                                       const X& x, const D& d_y, Dx& d_x, Buffer<double>& d_gate) {
  moe::dispatch_backward(rows, plan, x, d_y, d_x, d_gate);
};
using RowMajor = Matrix<double>;
using ColumnMajor = Eigen::MatrixXd;
using Strided = Eigen::Map<RowMajor, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;
static_assert(kDispatches<RowMajor> && kDispatches<moe::ConstMatrixRef<double>> &&
              kDispatches<Eigen::Block<RowMajor>>);
static_assert(!kDispatches<ColumnMajor> && !kDispatches<Strided>);
static_assert(kCombines<RowMajor, RowMajor> && kCombines<RowMajor, moe::MatrixRef<double>>);
static_assert(!kCombines<ColumnMajor, RowMajor> && !kCombines<RowMajor, ColumnMajor>);
static_assert(kGoesBack<RowMajor> && !kGoesBack<ColumnMajor>);
static_assert(kGoesBackToX<RowMajor, RowMajor, RowMajor>);
static_assert(!kGoesBackToX<ColumnMajor, RowMajor, RowMajor> &&
              !kGoesBackToX<RowMajor, ColumnMajor, RowMajor> &&
              !kGoesBackToX<RowMajor, RowMajor, ColumnMajor>);

}  // namespace
}  // namespace dispatch_test
