// SPDX-License-Identifier: MIT
// What a call writes may not overlap what it reads: such calls throw before anything is written.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "laws.hpp"

namespace moe {
namespace {

constexpr Index kModel = 4, kExperts = 4;

template <class S>
Matrix<S> draws(Index rows, Index cols) {
  Rng rng(3);
  return laws::normal_matrix<S>(rows, cols, rng);
}

// Throws with both names, and leaves `memory` as it was.
template <class S>
void expect_refused(const std::function<void()>& call, const ConstMatrixRef<S>& memory,
                    const std::string& what) {
  const Matrix<S> before = memory;
  const S* const data = memory.data();
  try {
    call();
    ADD_FAILURE() << what << ": no exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find(" overlap: "), std::string::npos)
        << what << ": " << error.what();
  }
  EXPECT_EQ(memory.data(), data) << what;
  EXPECT_TRUE(laws::same_bits(memory, before)) << what;
}

// ---- The check itself, beside a count of the elements that two views of one array share.

template <class A, class B>
bool share_an_element(const A& a, const B& b) {
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < a.cols(); ++j)
      for (Index k = 0; k < b.rows(); ++k)
        for (Index l = 0; l < b.cols(); ++l)
          if (&a.coeffRef(i, j) == &b.coeffRef(k, l)) return true;
  return false;
}

// More arrays than are compared at a time.
struct ManyArrays {
  Matrix<float> first, columns;
  template <class F>
  void for_each_array(const F& f) const {
    f(first);
    for (Index j = 0; j < columns.cols(); ++j) f(columns.col(j));
  }
};

// The first array of one thing lies in the other.
struct View {
  Matrix<float> own;
  Eigen::Map<const Matrix<float>> seen;
  template <class F>
  void for_each_array(const F& f) const {
    f(own);
    f(seen);
  }
};

TEST(Overlap, OfThingsOfManyArraysIsSeenWhicheverArrayItIs) {
  const ManyArrays many{draws<float>(2, 2), draws<float>(2, 40)};
  const Matrix<float> other = draws<float>(2, 2);
  EXPECT_NO_THROW(require_apart("here", "a", View{other, {other.data(), 2, 2}}, "b", many));
  EXPECT_THROW(require_apart("here", "a", View{other, {many.first.data(), 2, 2}}, "b", many),
               std::invalid_argument);
  for (Index j = 0; j < many.columns.cols(); ++j)
    EXPECT_THROW(require_apart("here", "a", View{other, {many.columns.data() + j, 1, 1}}, "b", many),
                 std::invalid_argument)
        << j;
}

TEST(Overlap, OfAnyTwoBlocksOfAMatrixIsExact) {
  const Matrix<float> m = draws<float>(4, 5);
  Index apart = 0, overlapping = 0;
  std::vector<ConstMatrixRef<float>> blocks;
  for (Index i = 0; i < m.rows(); ++i)
    for (Index j = 0; j < m.cols(); ++j)
      for (Index rows = 0; i + rows <= m.rows(); ++rows)
        for (Index cols = 1; j + cols <= m.cols(); ++cols) blocks.emplace_back(m.block(i, j, rows, cols));
  for (const auto& a : blocks)
    for (const auto& b : blocks) {
      const bool expected = share_an_element(a, b);
      ++(expected ? overlapping : apart);
      bool refused = false;
      try {
        require_apart("here", "a", a, "b", b);
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      ASSERT_EQ(refused, expected) << a.rows() << " x " << a.cols() << " beside " << b.rows() << " x "
                                   << b.cols();
    }
  EXPECT_GT(apart, 1000);
  EXPECT_GT(overlapping, 1000);
}

TEST(Overlap, OfVectorsMapsAndBuffers) {
  std::vector<double> memory(24);
  const auto map = [&](Index begin, Index rows, Index cols) {
    return Eigen::Map<Matrix<double>>(memory.data() + begin, rows, cols);
  };
  const auto apart = [](const auto& a, const auto& b) {
    try {
      require_apart("here", "a", a, "b", b);
      require_apart("here", "b", b, "a", a);
      return true;
    } catch (const std::invalid_argument&) {
      return false;
    }
  };
  EXPECT_TRUE(apart(map(0, 3, 4), map(12, 3, 4)));
  EXPECT_FALSE(apart(map(0, 3, 4), map(11, 3, 4)));
  EXPECT_FALSE(apart(map(0, 3, 4), map(11, 2, 5)));
  EXPECT_TRUE(apart(map(0, 3, 4), map(0, 0, 4)));
  EXPECT_TRUE(apart(map(0, 3, 4), map(12, 4, 3)));
  using Column = Eigen::Map<Vector<double>>;
  EXPECT_FALSE(apart(Column(memory.data() + 5, 1), map(0, 3, 4)));
  EXPECT_TRUE(apart(Column(memory.data() + 12, 12), map(0, 3, 4)));
  EXPECT_FALSE(apart(map(0, 3, 4).leftCols(2), Column(memory.data() + 2, 3)));
  EXPECT_TRUE(apart(map(0, 3, 4).leftCols(2), Column(memory.data() + 2, 2)));
  using Backwards = Eigen::Map<Matrix<double>, 0, Eigen::OuterStride<>>;
  const Backwards backwards(memory.data() + 20, 3, 4, Eigen::OuterStride<>(-4));  // 12 to 23
  EXPECT_FALSE(apart(backwards, map(9, 1, 4)));
  EXPECT_TRUE(apart(backwards, map(8, 1, 4)));
  Buffer<double> buffer;
  buffer.resize(12);
  Eigen::Map<Matrix<double>> old(buffer.data() + 8, 1, 4);
  buffer.resize(4);  // what it may grow into is its own, too
  EXPECT_FALSE(apart(buffer, old));
  RowBuffer<double> rows;
  rows.resize(3, 4);
  EXPECT_FALSE(apart(rows, rows.block(2, 1)));
  EXPECT_TRUE(apart(rows, buffer));
}

TEST(Overlap, MessagesHaveBothNamesAndSizes) {
  Matrix<double> m = draws<double>(5, 4);
  try {
    require_apart("here", "y", m, "x", m.topRows(3));
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "here: y and x overlap: 5 x 32 bytes and 3 x 32 bytes, expected memory of their own");
  }
}

// ---- Layers.

// Every view x of y [8, kModel + 1] that has kModel columns, where y must be resized, and of y [8, kModel],
// where it has the wanted shape or another number of rows.
template <class S, class Forward>
void expect_blocks_refused(const std::string& what, const Forward& forward) {
  Matrix<S> wide = draws<S>(8, kModel + 1);
  expect_refused<S>([&] { forward(wide.leftCols(kModel), wide); }, wide, what + ": the first columns");
  expect_refused<S>([&] { forward(wide.block(2, 1, 5, kModel), wide); }, wide, what + ": some columns");
  Matrix<S> y = draws<S>(8, kModel);
  expect_refused<S>([&] { forward(y, y); }, y, what + ": all of it");
  expect_refused<S>([&] { forward(y.bottomRows(3), y); }, y, what + ": the last rows");
  expect_refused<S>([&] { forward(y.middleRows(1, 6), y); }, y, what + ": rows in the middle");
  const Eigen::Map<Matrix<S>> shifted(y.data() + 2, 7, kModel);
  expect_refused<S>([&] { forward(shifted, y); }, y, what + ": a map that begins within a row");
  // Beside each other in one matrix: x is apart from y.
  Matrix<S> apart;
  EXPECT_NO_THROW(forward(wide.leftCols(kModel), apart)) << what;
}

template <class S>
MoELayer<FeedForward<S>, TopKRouter<S>> make_layer() {
  Rng rng(1);
  return {make_experts<FeedForward<S>>(kExperts, {.d_model = kModel, .d_ff = 5}, rng),
          TopKRouter<S>({.d_model = kModel, .num_experts = kExperts}, rng),
          {make_experts<FeedForward<S>>(1, {.d_model = kModel, .d_ff = 5}, rng), true},
          true};
}

using Layer = MoELayer<FeedForward<double>, TopKRouter<double>>;

TEST(Overlap, OfInputAndOutputIsRefusedByLayers) {
  const Layer layer = make_layer<double>();
  Layer::Workspace workspace;
  Layer::Cache cache;
  Rng rng(2);
  expect_blocks_refused<double>("inference", [&](const auto& x, auto& y) { layer.forward(x, y, workspace); });
  expect_blocks_refused<double>("with a cache", [&](const auto& x, auto& y) { layer.forward(x, y, cache); });
  expect_blocks_refused<double>("training", [&](const auto& x, auto& y) { layer.forward(x, rng, y, cache); });
  Layer grad = zeros_like(layer);
  expect_blocks_refused<double>("backward", [&](const auto& d_y, auto& d_x) {
    layer.forward(draws<double>(d_y.rows(), kModel), cache);
    layer.backward(d_y, cache, grad, {}, d_x);
  });
}

TEST(Overlap, OfInputAndOutputIsRefusedByPackedLayers) {
  const auto packed = pack<F32>(make_layer<float>());
  PackedWorkspace workspace;
  expect_blocks_refused<float>("packed", [&](const auto& x, auto& y) { packed.forward(x, y, workspace); });
  expect_blocks_refused<float>("packed, replayed", [&](const auto& x, auto& y) {
    const Routing<float> routing = packed.route(x);
    packed.forward(x, routing, y, workspace);
  });
  Matrix<float> x = draws<float>(6, kModel), y;
  packed.forward(x, y, workspace);
  ReusedMatrix<float>& logits = workspace.routing.router_logits;
  expect_refused<float>([&] { packed.forward(x, logits, workspace); }, logits, "y in the workspace");
  expect_refused<float>([&] { packed.forward(logits, y, workspace); }, logits, "x in the workspace");
  Routing<float> routing = packed.route(x);
  expect_refused<float>([&] { packed.forward(x, routing, routing.router_probs, workspace); },
                        routing.router_probs, "y in the routing");
  Matrix<float> again;
  packed.forward(x, workspace.routing, again, workspace);  // its own routing, which it reads only
  EXPECT_TRUE(laws::same_bits(again, y));
}

TEST(Overlap, OfInputAndOutputIsRefusedBySoftLayers) {
  Rng rng(1);
  for (const bool normalise : {true, false}) {
    const SoftMoELayer layer(make_experts<FeedForward<double>>(kExperts, {.d_model = kModel, .d_ff = 5}, rng),
                             {.d_model = kModel, .num_experts = kExperts, .normalise = normalise}, rng);
    SoftMoEWorkspace<double> workspace;
    SoftMoECache<double> cache;
    auto grad = zeros_like(layer);
    expect_blocks_refused<double>("inference",
                                  [&](const auto& x, auto& y) { layer.forward(x, y, workspace); });
    expect_blocks_refused<double>("with a cache",
                                  [&](const auto& x, auto& y) { layer.forward(x, y, cache); });
    expect_blocks_refused<double>("backward", [&](const auto& d_y, auto& d_x) {
      layer.forward(draws<double>(d_y.rows(), kModel), cache);
      layer.backward(d_y, cache, grad, d_x);
    });
    const Matrix<double> x = draws<double>(6, kModel);
    Matrix<double> y;
    layer.forward(x, y, cache);
    layer.backward(x, cache, grad, y);
    for (ReusedMatrix<double>* in :
         {&cache.routing.x, &cache.routing.logits, &cache.routing.dispatch, &cache.routing.combine,
          &cache.gradient.d_y, &cache.gradient.d_combine, &cache.gradient.d_logits}) {
      expect_refused<double>([&] { layer.forward(*in, y, cache); }, *in, "x in the cache");
      expect_refused<double>([&] { layer.forward(x, *in, cache); }, *in, "y in the cache");
      expect_refused<double>([&] { layer.backward(*in, cache, grad, y); }, *in, "d_y in the cache");
      expect_refused<double>([&] { layer.backward(x, cache, grad, *in); }, *in, "d_x in the cache");
    }
    Matrix<double>& by_slots = grad.router().w_slots;
    expect_refused<double>([&] { layer.backward(x, cache, grad, by_slots); }, by_slots, "d_x in grad");
  }
}

TEST(Overlap, OfTheCacheAndAnotherArgumentIsRefused) {
  const Layer layer = make_layer<double>();
  Layer::Cache cache;
  Layer grad = zeros_like(layer);
  const Matrix<double> x = draws<double>(6, kModel);
  Matrix<double> y, d_x;
  layer.forward(x, y, cache);
  cache.routing.noise = {x, x, x, 2};
  cache.routing.input_factor = x;
  layer.backward(y, cache, grad, {}, d_x);
  Routing<double>& routing = cache.routing;
  const std::vector<ReusedMatrix<double>*> arrays{&cache.x,
                                                  &routing.router_logits,
                                                  &routing.router_probs,
                                                  &routing.noise.draws,
                                                  &routing.input_factor,
                                                  &cache.router.d_logits,
                                                  &cache.router.input};
  for (ReusedMatrix<double>* in : arrays) {
    ASSERT_EQ(in->size(), 6 * kModel);
    expect_refused<double>([&] { layer.forward(*in, y, cache); }, *in, "x");
    expect_refused<double>([&] { layer.forward(x, *in, cache); }, *in, "y");
    expect_refused<double>([&] { layer.forward(*in, routing, cache); }, *in, "x of a replay");
    expect_refused<double>([&] { layer.backward(*in, cache, grad, {}, d_x); }, *in, "d_y");
    expect_refused<double>([&] { layer.backward(x, cache, grad, {}, *in); }, *in, "d_x");
  }
  for (RowBuffer<double>* rows : {&cache.x_rows, &cache.y_rows, &cache.d_rows, &cache.d_x_rows}) {
    const Matrix<double> before = rows->matrix();
    EXPECT_THROW(layer.forward(rows->block(0, 6), y, cache), std::invalid_argument);
    EXPECT_THROW(layer.backward(rows->block(0, 6), cache, grad, {}, d_x), std::invalid_argument);
    EXPECT_EQ(rows->matrix(), before);
  }
  RoutingGradient<double>& own = cache.routing_gradient;
  own.d_router_logits = x;
  expect_refused<double>([&] { layer.backward(x, cache, grad, own, d_x); }, own.d_router_logits,
                         "its gradient");
  RoutingGradient<double> gradient;
  gradient.d_router_probs = x;
  expect_refused<double>([&] { layer.backward(x, cache, grad, gradient, gradient.d_router_probs); },
                         gradient.d_router_probs, "d_x in the gradient");
  Matrix<double>& by_router = grad.router().w_router;  // [kExperts, kModel]
  Matrix<double>& by_expert = grad.experts()[0].w_up;
  expect_refused<double>([&] { layer.backward(x, cache, grad, {}, by_router); }, by_router, "d_x in grad");
  expect_refused<double>([&] { layer.backward(x, cache, grad, {}, by_expert); }, by_expert,
                         "d_x in grad's expert");
  const Matrix<double> four = x.topRows(kExperts);
  layer.forward(four, y, cache);
  expect_refused<double>([&] { layer.backward(by_router, cache, grad, {}, d_x); }, by_router, "d_y in grad");
}

TEST(Overlap, OfALayerAndItsGradientIsRefused) {
  Layer layer = make_layer<double>();
  const Layer before = layer;
  Layer::Cache cache;
  const Matrix<double> x = draws<double>(6, kModel);
  const Matrix<double> y = layer.forward(x, cache);
  EXPECT_THROW(layer.backward(x, cache, layer), std::invalid_argument);
  EXPECT_EQ(layer.forward(x), y);
}

// A cache's own routing may be replayed: it gives what a copy gives.
TEST(Overlap, TheCachesOwnRoutingMayBeReplayed) {
  const Layer layer = make_layer<double>();
  const Matrix<double> x = draws<double>(6, kModel), other = 2 * x;
  Layer::Cache cache, expected_cache;
  layer.forward(x, cache);
  const Routing<double> copy = cache.routing;
  Layer grad = zeros_like(layer), expected_grad = grad;
  EXPECT_TRUE(laws::same_bits(layer.forward(other, cache.routing, cache),
                              layer.forward(other, copy, expected_cache)));
  EXPECT_TRUE(
      laws::same_bits(layer.backward(x, cache, grad), layer.backward(x, expected_cache, expected_grad)));
}

// A level of the cache's routing would be freed while it is copied.
TEST(Overlap, OfALevelOfTheCachesRoutingIsRefused) {
  Rng rng(1);
  using Router = TopKRouter<double>;
  const Router parent({.d_model = kModel, .num_experts = 1, .top_k = 1}, rng);
  const MoELayer layer(
      make_experts<FeedForward<double>>(kExperts, {.d_model = kModel, .d_ff = 5}, rng),
      HierarchicalRouter(parent, {Router({.d_model = kModel, .num_experts = kExperts}, rng)}));
  decltype(layer)::Cache cache;
  const Matrix<double> x = draws<double>(6, kModel);
  layer.forward(x, cache);
  const Matrix<double>& logits = cache.routing.levels[1].router_logits;
  expect_refused<double>([&] { layer.forward(x, cache.routing.levels[1], cache); }, logits, "a level");
}

// ---- Routers.

template <class Router>
class OverlapOf : public testing::Test {};
using Routers =
    testing::Types<TopKRouter<double>, NoisyTopKRouter<double>, ExpertChoiceRouter<double>,
                   SinkhornRouter<double>, SparseMixerRouter<double>, HierarchicalRouter<TopKRouter<double>>>;
TYPED_TEST_SUITE(OverlapOf, Routers);

template <class Router>
Router make_router() {
  Rng rng(1);
  if constexpr (requires(Router r) { r.parent(); }) {
    const TopKRouter<double> level({.d_model = kModel, .num_experts = 2}, rng);
    return Router(level, {level, level});
  } else {
    return Router({.d_model = kModel, .num_experts = kExperts}, rng);
  }
}

TYPED_TEST(OverlapOf, RoutersIsRefused) {
  const TypeParam router = make_router<TypeParam>();
  Routing<double> routing;
  RouterWorkspace<double> workspace;
  const Matrix<double> x = draws<double>(6, kModel);
  Rng rng(2);
  router.route(x, {}, routing, workspace);
  routing.noise = {x, x, routing.router_probs, 2};
  workspace.d_noise = workspace.token_choice.ranking = workspace.sinkhorn.plan = x;
  for (ReusedMatrix<double>* in : {&routing.router_probs, &routing.noise.stddev, &workspace.d_noise,
                                   &workspace.token_choice.ranking, &workspace.sinkhorn.plan}) {
    ASSERT_EQ(in->size(), 6 * kModel);
    expect_refused<double>([&] { router.route(*in, {}, routing, workspace); }, *in, "x in the routing");
    if constexpr (requires { router.route(x, rng, BatchInfo{}, routing); })
      expect_refused<double>([&] { router.route(*in, rng, {}, routing, workspace); }, *in,
                             "x in the routing, training");
  }
  TypeParam grad = zeros_like(router);
  RoutingGradient<double> gradient;
  gradient.d_router_probs = draws<double>(6, kExperts);
  Matrix<double> memory = draws<double>(9, kModel), d_x = memory.topRows(6);
  const auto backward = [&](const ConstMatrixRef<double>& seen, MatrixRef<double> by_x,
                            const auto& by_routing) {
    router.backward(seen, routing, by_routing, by_x, grad, workspace);
  };
  expect_refused<double>([&] { backward(memory.topRows(6), memory.topRows(6), gradient); }, memory,
                         "d_x is x");
  expect_refused<double>([&] { backward(memory.topRows(6), memory.bottomRows(6), gradient); }, memory,
                         "d_x holds rows of x");
  expect_refused<double>([&] { backward(x, gradient.d_router_probs, gradient); }, gradient.d_router_probs,
                         "d_x in the gradient");
  expect_refused<double>([&] { backward(x, routing.router_probs, gradient); }, routing.router_probs,
                         "d_x in the routing");
  expect_refused<double>([&] { backward(workspace.d_noise, d_x, gradient); }, workspace.d_noise,
                         "x in the workspace");
  expect_refused<double>([&] { backward(x, workspace.d_noise, gradient); }, workspace.d_noise,
                         "d_x in the workspace");
  TypeParam::visit([](const ParameterInfo&, const auto& g) { EXPECT_EQ(g.squaredNorm(), 0.0); }, grad);
  EXPECT_NO_THROW(backward(memory.topRows(6), d_x, gradient));
  Matrix<double>* by_logits = nullptr;
  TypeParam::visit(
      [&](const ParameterInfo&, auto& g) {
        if constexpr (std::is_same_v<decltype(g), Matrix<double>&>) by_logits = &g;
      },
      grad);
  const Index experts = by_logits->rows();
  router.route(x.topRows(experts), {}, routing);
  gradient = {};
  expect_refused<double>([&] { backward(x.topRows(experts), *by_logits, gradient); }, *by_logits,
                         "d_x in grad");
  expect_refused<double>([&] { backward(*by_logits, d_x.topRows(experts), gradient); }, *by_logits,
                         "x in grad");
  router.route(x, {}, routing);
  TypeParam own = router;
  EXPECT_THROW(own.backward(x, routing, gradient, d_x, own), std::invalid_argument);
}

TEST(Overlap, OfWhatAHashRouterReadsAndWritesIsRefused) {
  const HashRouter<double> router(
      {.d_model = kModel, .num_experts = kExperts, .table = IndexVector::Zero(3)});
  Routing<double> routing;
  BatchInfo info;
  info.token_ids = IndexVector::Ones(6);
  router.route(draws<double>(6, kModel), info, routing);
  expect_refused<double>([&] { router.route(routing.router_probs, info, routing); }, routing.router_probs,
                         "x");
}

TEST(Overlap, OfDrawsAndTheRoutingIsRefused) {
  const auto router = make_router<SparseMixerRouter<double>>();
  Routing<double> routing;
  RouterWorkspace<double> workspace;
  ReusedMatrix<double>& in_workspace = workspace.sparse_mixer.draws;
  routing.router_logits = in_workspace = Matrix<double>::Constant(6, 2 * (kExperts + 1), 0.5);
  for (ReusedMatrix<double>* in : {&routing.router_logits, &in_workspace})
    expect_refused<double>(
        [&] { router.route_with_draws(draws<double>(6, kModel), *in, {}, routing, workspace); }, *in,
        "draws");
}

// ---- Functions.

TEST(Overlap, OfWhatDispatchAndCombineWriteIsRefused) {
  const Layer layer = make_layer<double>();
  Matrix<double> x = draws<double>(6, kModel), other = x;
  Routing<double> routing = layer.route(x);
  DispatchPlan<double>& plan = routing.plan;
  RowBuffer<double> rows, y_rows, d_rows;
  Buffer<double> d_gate;
  dispatch(x, plan, rows);
  const auto refused = [&](const std::function<void()>& call, const char* what) {
    const Matrix<double> before = rows.matrix();
    const Buffer<double> gates = plan.gate;
    expect_refused<double>(call, x, what);
    EXPECT_EQ(rows.matrix(), before) << what;
    EXPECT_EQ(plan.gate, gates) << what;
  };
  const auto all = layer.experts();
  const GroupedExperts<FeedForward<double>> experts({all.begin(), all.end()});
  ExpertWorkspace<double> workspace;
  ExpertCache<double> cache;
  auto grads = experts;
  const Buffer<Index>& begin = plan.expert_begin;
  refused([&] { dispatch(rows.block(0, 6), plan, rows); }, "dispatch: rows and x");
  refused([&] { experts.forward(rows, begin, rows, workspace); }, "experts");
  refused([&] { experts.forward(rows, begin, rows, cache); }, "experts with a cache");
  experts.forward(rows, begin, y_rows, cache);
  refused([&] { experts.backward(rows, begin, y_rows, cache, rows, grads); }, "d_x_rows and x_rows");
  refused([&] { experts.backward(y_rows, begin, rows, cache, rows, grads); }, "d_x_rows and d_y_rows");
  EXPECT_THROW(grads.backward(rows, begin, y_rows, cache, d_rows, grads), std::invalid_argument);
  refused([&] { combine(rows, plan, x, rows.block(3, 6)); }, "combine: y and rows");
  refused([&] { combine_backward(x, rows, plan, rows, d_gate); }, "combine_backward: d_rows and rows");
  refused([&] { combine_backward(rows.block(0, 6), y_rows, plan, rows, d_gate); }, "d_rows and d_y");
  refused([&] { combine_backward(x, rows, plan, d_rows, plan.gate); }, "combine_backward: d_gate and plan");
  refused([&] { dispatch_backward(rows, plan, x, x, rows.block(1, 6), d_gate); }, "d_x and d_rows");
  // x is read where a token is passed through, or where gates scale inputs.
  EXPECT_NO_THROW(combine(y_rows, plan, x, x));
  plan.passed_through.push_back(2);
  refused([&] { combine(y_rows, plan, x, x); }, "combine: y and x");
  refused([&] { dispatch_backward(rows, plan, x, x, x, d_gate); }, "dispatch_backward: d_x and d_y");
  plan.passed_through.clear();
  plan.gate_side = GateSide::input;
  d_gate.assign(plan.num_assignments(), 0.0);
  refused([&] { dispatch_backward(rows, plan, x, other, x, d_gate); }, "dispatch_backward: d_x and x");
  refused([&] { dispatch_backward(rows, plan, x, x, other, plan.gate); }, "d_gate and plan");
  // Blocks of columns of one matrix are apart.
  plan.gate_side = GateSide::output;
  Matrix<double> both = draws<double>(6, 2 * kModel);
  const Matrix<double> left = both.leftCols(kModel);
  plan.passed_through.push_back(2);
  combine(y_rows, plan, both.leftCols(kModel), both.rightCols(kModel));
  EXPECT_EQ(both.leftCols(kModel), left);
}

template <class S>
void expect_products_refused() {
  Matrix<S> m = draws<S>(12, 8);
  Vector<S> b = m.col(0).head(8);
  const auto refused = [&](const std::function<void()>& call, const char* what) {
    expect_refused<S>(call, m, what);
  };
  const Matrix<S> other = draws<S>(8, 8);
  refused([&] { linear(m.topRows(8), other, m.bottomRows(8)); }, "linear: y and x");
  refused([&] { linear(other, m.topRows(8), m.bottomRows(8)); }, "linear: y and w");
  refused([&] { linear_backward_input(m.topRows(8), other, m.bottomRows(8)); }, "linear_backward_input: d_y");
  refused([&] { linear_backward_input(other, m.topRows(8), m.bottomRows(8)); }, "linear_backward_input: w");
  refused([&] { linear_backward_weight(m.topRows(8), other, m.bottomRows(8)); },
          "linear_backward_weight: d_y");
  refused([&] { linear_backward_weight(other, m.topRows(8), m.bottomRows(8)); }, "linear_backward_weight: x");
  refused([&] { add_bias(Eigen::Map<Vector<S>>(m.data() + 8, 8), m.topRows(2)); }, "add_bias");
  refused([&] { bias_backward(m.topRows(2), Eigen::Map<Vector<S>>(m.data() + 8, 8)); }, "bias_backward");
  // A product of a matrix with itself reads both.
  Matrix<S> squares(8, 8), expected(8, 8);
  linear(other, other, squares);
  linear(other, Matrix<S>(other), expected);
  EXPECT_TRUE(laws::same_bits(squares, expected));
  // Blocks of columns of one matrix are apart.
  Matrix<S> wide = draws<S>(8, 16);
  const Matrix<S> left = wide.leftCols(8);
  linear(wide.leftCols(8), other, wide.rightCols(8));
  EXPECT_EQ(wide.leftCols(8), left);
}

TEST(Overlap, OfAProductAndItsOperandsIsRefused) {
  expect_products_refused<float>();
  expect_products_refused<double>();
}

template <class E>
class OverlapOfAn : public testing::Test {};
using Experts = testing::Types<FeedForward<double>, GatedFeedForward<double>, ThreeWayFeedForward<double>,
                               ZeroExpert<double>, CopyExpert<double>, ConstantExpert<double>>;
TYPED_TEST_SUITE(OverlapOfAn, Experts);

TYPED_TEST(OverlapOfAn, ExpertIsRefused) {
  typename TypeParam::Options options{.d_model = kModel};
  if constexpr (requires { options.d_ff; }) options.d_ff = 3;
  Rng rng(1);
  const TypeParam expert(options, rng);
  Matrix<double> m = draws<double>(10, kModel);
  const Matrix<double> x = draws<double>(6, kModel);
  Matrix<double> y = x, cache(6, expert.cache_cols());
  TypeParam grad = zeros_like(expert);
  expect_refused<double>([&] { expert.forward(m.topRows(6), m.bottomRows(6)); }, m, "y and x");
  expect_refused<double>([&] { expert.forward(m.topRows(6), m.bottomRows(6), cache); }, m,
                         "y and x, a cache");
  expert.forward(x, y, cache);
  expect_refused<double>([&] { expert.backward(m.topRows(6), x, cache, m.bottomRows(6), grad); }, m,
                         "d_x and x");
  expect_refused<double>([&] { expert.backward(x, m.topRows(6), cache, m.bottomRows(6), grad); }, m,
                         "d_x and d_y");
  TypeParam::visit(
      [&](const ParameterInfo& info, auto& g) {
        if (g.rows() != 6 || g.cols() != kModel) return;
        if constexpr (std::is_same_v<decltype(g), Matrix<double>&>) {
          expect_refused<double>([&] { expert.backward(x, x, cache, g, grad); }, g, "d_x in grad");
          expect_refused<double>([&] { expert.backward(x, g, cache, y, grad); }, g, "d_y in grad");
          EXPECT_EQ(info.name, "w_gate");  // of a ThreeWayFeedForward
        }
      },
      grad);
  TypeParam own = expert;
  EXPECT_THROW(own.backward(x, x, cache, y, own), std::invalid_argument);
  if (expert.cache_cols() < kModel) return;
  const auto in = cache.leftCols(kModel);
  expect_refused<double>([&] { expert.forward(in, y, cache); }, cache, "cache and x");
  expect_refused<double>([&] { expert.forward(x, in, cache); }, cache, "cache and y");
  expect_refused<double>([&] { expert.backward(in, x, cache, y, grad); }, cache, "cache and x");
  expect_refused<double>([&] { expert.backward(x, in, cache, y, grad); }, cache, "cache and d_y");
  expect_refused<double>([&] { expert.backward(x, x, cache, in, grad); }, cache, "cache and d_x");
}

}  // namespace
}  // namespace moe
