// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <unsupported/Eigen/CXX11/ThreadPool>
#include <utility>
#include <vector>

#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/gradient_check.hpp>
#include <moe/layers/soft_moe_layer.hpp>

#include "compare.hpp"
#include "laws.hpp"

namespace soft_moe_layer_test {
namespace {

using laws::normal_matrix;
using laws::randomise;
using laws::same_bits;
using moe::BatchInfo;
using moe::Executor;
using moe::Index;
using moe::IndexVector;
using moe::Mask;
using moe::Matrix;
using moe::ParameterInfo;
using moe::Rng;
using moe::Sequential;
using moe::SoftMoELayer;
using moe::SoftMoEOptions;
using moe::TokenState;

template <class S>
using Plain = moe::FeedForward<S, moe::GELU>;
template <class S>
using Gated = moe::GatedFeedForward<S>;
using Layer = SoftMoELayer<Plain<double>>;

static_assert(std::copyable<Layer> && std::copyable<Layer::Cache> && std::copyable<Layer::Workspace>);

// An expert for inference only: three times its input.
struct Triple {
  using Scalar = double;
  Index width = 2;
  Index d_model() const { return width; }
  void forward(const moe::ConstMatrixRef<double>& x, moe::MatrixRef<double> y) const { y = 3 * x; }
};
static_assert(moe::Expert<Triple> && !moe::TrainableExpert<Triple>);

// A layer whose parameters all differ from zero, the scale included.
template <class E>
SoftMoELayer<E> make_layer(const SoftMoEOptions& options, Rng& rng, bool bias = true, Index d_ff = 5) {
  const typename E::Options expert{.d_model = options.d_model, .d_ff = d_ff, .bias = bias};
  SoftMoELayer<E> layer(moe::make_experts<E>(options.num_experts, expert, rng), options, rng);
  randomise(layer, rng);
  if (options.normalise) layer.router().scale[0] = typename E::Scalar(rng.uniform(0.5, 4.0));
  return layer;
}

Layer small_layer(std::uint64_t seed = 1, bool normalise = true) {
  Rng rng(seed);
  return make_layer<Plain<double>>(
      {.d_model = 4, .num_experts = 3, .slots_per_expert = 2, .normalise = normalise}, rng);
}

BatchInfo masked(Index tokens, const std::vector<Index>& out) {
  BatchInfo info;
  info.mask = Mask::Constant(tokens, true);
  for (const Index t : out) info.mask[t] = false;
  return info;
}

BatchInfo grouped(std::initializer_list<Index> begin) {
  BatchInfo info;
  info.group_begin.resize(Index(begin.size()));
  std::copy(begin.begin(), begin.end(), info.group_begin.data());
  return info;
}

// What a training step and an inference step compute.
template <class S>
struct Step {
  Matrix<S> inference, y, d_x, logits, dispatch, combine;
  std::vector<Matrix<S>> gradients;
};

template <class L, Executor Ex = Sequential>
Step<typename L::S> run(const L& layer, const Matrix<typename L::S>& x, const BatchInfo& info,
                        const Matrix<typename L::S>& d_y, const Ex& executor = {}) {
  Step<typename L::S> step;
  typename L::Cache cache;
  typename L::Workspace workspace;
  L grad = moe::zeros_like(layer);
  layer.forward(x, step.inference, workspace, info, executor);
  layer.forward(x, step.y, cache, info, executor);
  layer.backward(d_y, cache, grad, step.d_x, executor);
  EXPECT_TRUE(same_bits(workspace.routing.dispatch, cache.routing.dispatch));
  EXPECT_TRUE(same_bits(workspace.routing.combine, cache.routing.combine));
  step.logits = cache.routing.logits;
  step.dispatch = cache.routing.dispatch;
  step.combine = cache.routing.combine;
  L::visit([&](const ParameterInfo&, const auto& g) { step.gradients.push_back(Matrix<typename L::S>(g)); },
           grad);
  return step;
}

template <class S>
void expect_same_gradients(const Step<S>& a, const Step<S>& b, const std::string& what) {
  ASSERT_EQ(a.gradients.size(), b.gradients.size());
  for (std::size_t i = 0; i < a.gradients.size(); ++i)
    EXPECT_TRUE(same_bits(a.gradients[i], b.gradients[i])) << what << ", parameter " << i;
}

template <class S>
void expect_same_step(const Step<S>& a, const Step<S>& b, const std::string& what) {
  EXPECT_TRUE(same_bits(a.inference, b.inference)) << what;
  EXPECT_TRUE(same_bits(a.y, b.y)) << what;
  EXPECT_TRUE(same_bits(a.d_x, b.d_x)) << what;
  EXPECT_TRUE(same_bits(a.dispatch, b.dispatch)) << what;
  EXPECT_TRUE(same_bits(a.combine, b.combine)) << what;
  expect_same_gradients(a, b, what);
}

// Largest difference, relative to the larger of 1 and the largest entry expected.
template <class M>
double error(const M& got, const Matrix<double>& expected) {
  return relative_error(got, expected, 1);
}

// The squared norm of all parameters of a gradient.
template <class L>
double norm(const L& grad) {
  double sum = 0;
  L::visit([&](const ParameterInfo&, const auto& g) { sum += double(g.squaredNorm()); }, grad);
  return sum;
}

// ---- The formula.

// Logits [[1, 0], [0, 2]].
TEST(SoftMoELayer, WeightsAreSoftmaxesOverTokensAndOverSlots) {
  SoftMoELayer<Triple> layer({{}, {}}, {.d_model = 2, .num_experts = 2, .normalise = false});
  layer.router().w_slots << 1, 0, 0, 1;
  Matrix<double> x(2, 2), y, dispatch(2, 2), combine(2, 2);
  x << 1, 0, 0, 2;
  dispatch << .731058579, .119202922, .268941421, .880797078;
  combine << .731058579, .268941421, .119202922, .880797078;
  decltype(layer)::Workspace workspace;
  layer.forward(x, y, workspace);
  EXPECT_EQ(workspace.routing.logits, x);
  EXPECT_LE(error(workspace.routing.dispatch, dispatch), 1e-9);
  EXPECT_LE(error(workspace.routing.combine, combine), 1e-9);
  EXPECT_LE(error(y, 3 * combine * dispatch.transpose() * x), 1e-8);
}

TEST(SoftMoELayer, LogitsAreScaledCosinesWithEpsilonUnderTheRoot) {
  SoftMoELayer<Triple> layer({{}}, {.d_model = 2, .num_experts = 1, .slots_per_expert = 2});
  EXPECT_EQ(layer.router().scale.size(), 1);
  EXPECT_EQ(layer.router().scale[0], 1.0);
  layer.router().scale[0] = 2;
  layer.router().w_slots << 0, 2, 1e-3, 0;
  Matrix<double> x(2, 2), y, logits(2, 2);
  x << 3, 4, 1e-3, 0;
  // Cosines 0.8 and 0.6, but for entries of 1e-3, whose squares are as large as epsilon.
  const double half = std::sqrt(0.5);
  logits << 2 * 0.8, 2 * 0.6 * half, 0, 2 * half * half;
  decltype(layer)::Workspace workspace;
  layer.forward(x, y, workspace);
  EXPECT_LE(error(workspace.routing.logits, logits), 1e-6);
  layer.router().scale[0] = 0;
  layer.forward(x, y, workspace);
  EXPECT_EQ(workspace.routing.dispatch, (Matrix<double>::Constant(2, 2, 0.5)));
  EXPECT_EQ(workspace.routing.combine, (Matrix<double>::Constant(2, 2, 0.5)));
}

// Slot e * slots_per_expert + p belongs to expert e, in every group.
TEST(SoftMoELayer, EverySlotGoesToItsExpert) {
  Rng rng(1);
  SoftMoELayer layer(moe::make_experts<Plain<double>>(3, {.d_model = 4, .d_ff = 5, .bias = true}, rng),
                     {.d_model = 4, .num_experts = 3, .slots_per_expert = 2, .normalise = false}, rng);
  for (Index e = 0; e < 3; ++e) {
    auto& expert = layer.experts()[std::size_t(e)];
    expert.w_down.setZero();
    expert.b_down.setConstant(double(e + 1));  // every output of expert e is e + 1
  }
  const Matrix<double> x = normal_matrix<double>(7, 4, rng);
  Matrix<double> y;
  Layer::Workspace w;
  layer.forward(x, y, w, grouped({0, 3, 7}));
  for (Index t = 0; t < 7; ++t) {
    double expected = 0;
    for (Index s = 0; s < 6; ++s) expected += w.routing.combine(t, s) * double(s / 2 + 1);
    EXPECT_NEAR(y(t, 0), expected, 1e-12) << t;
  }
}

// ---- Against loops that a reader can believe.

struct Reference {
  Matrix<double> logits, dispatch, combine, y;
};

bool is_valid(const BatchInfo& info, Index t) { return info.mask.size() == 0 || info.mask[t]; }

template <class E>
Reference reference(const SoftMoELayer<E>& layer, const Matrix<double>& x, const BatchInfo& info) {
  const Index tokens = x.rows(), d = x.cols(), slots = layer.num_slots();
  Reference r;
  r.logits.setZero(tokens, slots);
  r.dispatch.setZero(tokens, slots);
  r.combine.setZero(tokens, slots);
  r.y.setZero(tokens, d);
  const auto length = [&](const Matrix<double>& rows, Index i) {
    double sum = 1e-6;
    for (Index j = 0; j < d; ++j) sum += rows(i, j) * rows(i, j);
    return std::sqrt(sum);
  };
  for (Index g = 0; g < info.num_groups(); ++g) {
    std::vector<Index> valid;
    for (Index t = info.begin_of(g); t < info.end_of(g, tokens); ++t)
      if (is_valid(info, t)) valid.push_back(t);
    for (const Index t : valid)
      for (Index s = 0; s < slots; ++s) {
        for (Index j = 0; j < d; ++j) r.logits(t, s) += x(t, j) * layer.router().w_slots(s, j);
        if (layer.options().normalise)
          r.logits(t, s) *= layer.router().scale[0] / length(x, t) / length(layer.router().w_slots, s);
      }
    for (Index s = 0; s < slots; ++s) {
      double sum = 0;
      for (const Index t : valid) sum += std::exp(r.logits(t, s));
      for (const Index t : valid) r.dispatch(t, s) = std::exp(r.logits(t, s)) / sum;
    }
    for (const Index t : valid) {
      double sum = 0;
      for (Index s = 0; s < slots; ++s) sum += std::exp(r.logits(t, s));
      for (Index s = 0; s < slots; ++s) r.combine(t, s) = std::exp(r.logits(t, s)) / sum;
    }
    for (Index s = 0; s < slots; ++s) {
      Matrix<double> in = Matrix<double>::Zero(1, d), out(1, d);
      for (const Index t : valid)
        for (Index j = 0; j < d; ++j) in(0, j) += r.dispatch(t, s) * x(t, j);
      layer.experts()[std::size_t(s / layer.slots_per_expert())].forward(in, out);
      for (const Index t : valid)
        for (Index j = 0; j < d; ++j) r.y(t, j) += r.combine(t, s) * out(0, j);
    }
  }
  return r;
}

// The same layer in another scalar.
template <class To, class From>
To converted(const From& from, To to) {
  std::vector<double> values;
  From::visit(
      [&](const ParameterInfo&, const auto& p) {
        for (Index i = 0; i < p.size(); ++i) values.push_back(double(p.data()[i]));
      },
      from);
  std::size_t next = 0;
  To::visit(
      [&](const ParameterInfo&, auto& p) {
        using S = typename std::remove_cvref_t<decltype(p)>::Scalar;
        for (Index i = 0; i < p.size(); ++i) p.data()[i] = S(values[next++]);
      },
      to);
  EXPECT_EQ(next, values.size());
  return to;
}

// A batch with none, one or several groups, some of them empty, and none, some or all tokens
// masked.
BatchInfo random_info(Index tokens, Rng& rng) {
  BatchInfo info;
  if (rng.index(2) == 0) {
    info.group_begin.setZero(2 + rng.index(4));
    info.group_begin[info.group_begin.size() - 1] = tokens;
    for (Index g = 1; g + 1 < info.group_begin.size(); ++g) info.group_begin[g] = rng.index(tokens + 1);
    std::sort(info.group_begin.begin(), info.group_begin.end());
  }
  if (rng.index(2) == 0) {
    const double share = rng.index(8) == 0 ? 0.0 : rng.uniform();
    info.mask.resize(tokens);
    for (Index t = 0; t < tokens; ++t) info.mask[t] = rng.uniform() < share;
  }
  return info;
}

template <template <class> class E, class S>
void expect_like_the_reference(double tolerance) {
  Rng rng(11);
  double worst = 0;
  int groups = 0, masks = 0, several_slots = 0, long_batches = 0;
  for (int i = 0; i < 240; ++i) {
    SCOPED_TRACE("configuration " + std::to_string(i));
    const bool big = i % 20 == 0;
    const SoftMoEOptions options{.d_model = 1 + rng.index(big ? 150 : 9),
                                 .num_experts = 1 + rng.index(big ? 40 : 5),
                                 .slots_per_expert = 1 + rng.index(3),
                                 .normalise = rng.index(3) > 0};
    const bool bias = rng.index(2) == 0;
    const auto layer = make_layer<E<S>>(options, rng, bias);
    const auto exact = converted(layer, make_layer<E<double>>(options, rng, bias));
    const Matrix<S> x = normal_matrix<S>(big ? 70 + rng.index(200) : rng.index(13), options.d_model, rng);
    const BatchInfo info = random_info(x.rows(), rng);
    const Reference expected = reference(exact, x.template cast<double>(), info);
    typename SoftMoELayer<E<S>>::Workspace workspace;
    Matrix<S> y;
    layer.forward(x, y, workspace, info, Sequential{});
    for (const double e : {error(workspace.routing.logits, expected.logits), error(y, expected.y),
                           error(workspace.routing.dispatch, expected.dispatch),
                           error(workspace.routing.combine, expected.combine)})
      worst = std::max(worst, e);
    ASSERT_LE(worst, tolerance);
    ASSERT_TRUE(same_bits(layer.forward(x, info, Sequential{}), y));
    groups += info.num_groups() > 1;
    masks += info.mask.size() > 0 && info.mask.any() && !info.mask.all();
    several_slots += options.slots_per_expert > 1;
    long_batches += x.rows() > moe::kTokenBlock;
  }
  for (const int seen : {groups, masks, several_slots}) EXPECT_GE(seen, 50);
  EXPECT_GE(long_batches, 10);
}

TEST(SoftMoELayer, EqualsTheReferenceInDouble) {
  expect_like_the_reference<Plain, double>(1e-12);
  expect_like_the_reference<Gated, double>(1e-12);
}
TEST(SoftMoELayer, EqualsTheReferenceInFloat) {
  expect_like_the_reference<Plain, float>(1e-5);
  expect_like_the_reference<Gated, float>(1e-5);
}

// ---- Gradients.

template <class E>
struct LayerAtX {
  SoftMoELayer<E> layer;
  Matrix<double> x;
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"x"}, self.x...);
    moe::visit_part("", f, self.layer...);
  }
};

template <class E>
moe::GradientReport check_layer(const SoftMoELayer<E>& layer, const Matrix<double>& x, const BatchInfo& info,
                                double step = 1e-5) {
  typename SoftMoELayer<E>::Cache cache;
  Rng rng(3);
  const Matrix<double> d_y = normal_matrix<double>(x.rows(), x.cols(), rng);
  Matrix<double> y;
  const auto objective = [&](const LayerAtX<E>& at, LayerAtX<E>* grad) {
    at.layer.forward(at.x, y, cache, info, Sequential{});
    if (grad) at.layer.backward(d_y, cache, grad->layer, grad->x, Sequential{});
    return d_y.cwiseProduct(y).sum();
  };
  return moe::check_gradients(LayerAtX<E>{layer, x}, objective, {.step = step});
}

template <class E>
void expect_exact_gradients() {
  Rng rng(21);
  Index checked = 0;
  for (int i = 0; i < 24; ++i) {
    const SoftMoEOptions options{.d_model = 3,
                                 .num_experts = 1 + rng.index(3),
                                 .slots_per_expert = 1 + rng.index(2),
                                 .normalise = i % 2 == 0};
    const auto layer = make_layer<E>(options, rng, i % 4 < 2, 2);
    const Index tokens = 6;
    BatchInfo info;
    if (i % 3 != 0) info = masked(tokens, {1, 4});
    if (i % 8 >= 4) info.group_begin = IndexVector{{0, 2, 2, tokens}};
    Matrix<double> x = normal_matrix<double>(tokens, options.d_model, rng);
    const bool tiny = i % 5 == 0;  // a row as small as epsilon's root, hence smaller steps
    if (tiny) x.row(2) *= 1e-3;
    const moe::GradientReport report = check_layer(layer, x, info, tiny ? 1e-7 : 1e-5);
    EXPECT_LE(report.worst, 1e-6) << i << ", " << report.where << ": " << report.analytic
                                  << ", by differences " << report.numeric;
    EXPECT_EQ(report.checked, x.size() + moe::num_parameters(layer));
    checked += report.checked;
  }
  EXPECT_GT(checked, 1000);
}

TEST(SoftMoELayer, GradientsAreExact) {
  expect_exact_gradients<Plain<double>>();
  expect_exact_gradients<Gated<double>>();
}

TEST(SoftMoELayer, GradientsAreExactOverManyBlocksOfTokensAndColumns) {
  Rng rng(22);
  const Layer layer =
      make_layer<Plain<double>>({.d_model = 150, .num_experts = 33, .slots_per_expert = 2}, rng, true, 1);
  const Matrix<double> x = normal_matrix<double>(140, 150, rng), d_y = normal_matrix<double>(140, 150, rng);
  const BatchInfo info = grouped({0, 130, 140});
  const Matrix<double> direction = normal_matrix<double>(140, 150, rng);
  Layer along = layer, grad = moe::zeros_like(layer);
  Layer::visit([&](const ParameterInfo&, auto& p) { moe::fill_normal(p, 1.0, rng); }, along);
  Layer::Cache cache;
  layer.forward(x, cache, info, Sequential{});
  const Matrix<double> d_x = layer.backward(d_y, cache, grad, Sequential{});
  // The derivative in one direction of everything at once.
  double analytic = d_x.cwiseProduct(direction).sum();
  Layer::visit(
      [&](const ParameterInfo&, const auto& a, const auto& g) { analytic += a.cwiseProduct(g).sum(); }, along,
      grad);
  const auto value = [&](double step) {
    Layer moved = layer;
    Layer::visit([&](const ParameterInfo&, auto& p, const auto& a) { p += step * a; }, moved, along);
    return d_y.cwiseProduct(moved.forward(x + step * direction, info, Sequential{})).sum();
  };
  const double h = 1e-5, numeric = (value(h) - value(-h)) / (2 * h);
  EXPECT_NEAR(analytic, numeric, 1e-6 * std::abs(numeric));
}

TEST(SoftMoELayer, BackwardAddsUpAndMayBeCalledAgain) {
  const Layer layer = small_layer();
  Rng rng(2);
  Matrix<double> x = normal_matrix<double>(9, 4, rng);
  const Matrix<double> d_y = normal_matrix<double>(9, 4, rng);
  Layer::Cache cache;
  layer.forward(x, cache);
  x.setConstant(std::numeric_limits<double>::quiet_NaN());  // the cache owns what it needs
  Layer once = moe::zeros_like(layer), twice = moe::zeros_like(layer);
  const Matrix<double> d_x = layer.backward(d_y, cache, once);
  EXPECT_TRUE(same_bits(layer.backward(d_y, cache, twice), d_x));
  EXPECT_TRUE(same_bits(layer.backward(d_y, cache, twice), d_x));
  Layer::visit(
      [](const ParameterInfo& info, const auto& a, const auto& b) {
        EXPECT_TRUE(b.isApprox(2 * a, 1e-14)) << info.name;
        EXPECT_GT(a.norm(), 0.0) << info.name;
      },
      once, twice);
}

// ---- Laws.

TEST(SoftMoELayer, SharesOfAGroupAndOfATokenAddUpToOne) {
  Rng rng(5);
  const Layer layer = small_layer();
  BatchInfo info = masked(12, {0, 5, 6});
  info.group_begin = IndexVector{{0, 5, 7, 12}};
  Layer::Workspace w;
  Matrix<double> y;
  layer.forward(normal_matrix<double>(12, 4, rng), y, w, info);
  for (Index s = 0; s < 6; ++s) {
    EXPECT_NEAR(w.routing.dispatch.col(s).segment(0, 5).sum(), 1, 1e-12);
    EXPECT_EQ(w.routing.dispatch.col(s).segment(5, 2).sum(), 0);
    EXPECT_NEAR(w.routing.dispatch.col(s).segment(7, 5).sum(), 1, 1e-12);
  }
  for (Index t = 0; t < 12; ++t)
    EXPECT_NEAR(w.routing.combine.row(t).sum(), info.mask[t] ? 1 : 0, 1e-12) << t;
}

TEST(SoftMoELayer, PermutingTokensPermutesOutputs) {
  Rng rng(6);
  const Layer layer = small_layer();
  const Index tokens = 100;
  const Matrix<double> x = normal_matrix<double>(tokens, 4, rng), d_y = normal_matrix<double>(tokens, 4, rng);
  std::vector<Index> order(std::size_t(tokens), 0);
  std::iota(order.begin(), order.end(), Index(0));
  for (Index t = tokens - 1; t > 0; --t)
    std::swap(order[std::size_t(t)], order[std::size_t(rng.index(t + 1))]);
  Matrix<double> moved_x(tokens, 4), moved_d_y(tokens, 4);
  for (Index t = 0; t < tokens; ++t) {
    moved_x.row(t) = x.row(order[std::size_t(t)]);
    moved_d_y.row(t) = d_y.row(order[std::size_t(t)]);
  }
  const auto here = run(layer, x, {}, d_y), there = run(layer, moved_x, {}, moved_d_y);
  for (Index t = 0; t < tokens; ++t) {
    EXPECT_TRUE(there.y.row(t).isApprox(here.y.row(order[std::size_t(t)]), 1e-12)) << t;
    EXPECT_TRUE(there.d_x.row(t).isApprox(here.d_x.row(order[std::size_t(t)]), 1e-11)) << t;
  }
  for (std::size_t i = 0; i < here.gradients.size(); ++i)
    EXPECT_TRUE(there.gradients[i].isApprox(here.gradients[i], 1e-11)) << i;
}

TEST(SoftMoELayer, AGroupIsABatchOfItsOwn) {
  Rng rng(7);
  const Layer layer = small_layer();
  const std::vector<Index> begin{0, 1, 71, 71, 201};
  const Matrix<double> x = normal_matrix<double>(201, 4, rng), d_y = normal_matrix<double>(201, 4, rng);
  const auto together = run(layer, x, grouped({0, 1, 71, 71, 201}), d_y);
  for (std::size_t g = 0; g + 1 < begin.size(); ++g) {
    const Index first = begin[g], count = begin[g + 1] - first;
    const auto alone = run(layer, x.middleRows(first, count), {}, d_y.middleRows(first, count));
    EXPECT_TRUE(same_bits(alone.y, Matrix<double>(together.y.middleRows(first, count)))) << g;
    EXPECT_TRUE(same_bits(alone.d_x, Matrix<double>(together.d_x.middleRows(first, count)))) << g;
  }
}

TEST(SoftMoELayer, AMaskedTokenIsAsGoodAsAbsent) {
  Rng rng(8);
  const Layer layer = small_layer();
  const Matrix<double> x = normal_matrix<double>(9, 4, rng), d_y = normal_matrix<double>(9, 4, rng);
  const auto with = run(layer, x, masked(9, {0, 4, 8}), d_y);
  Matrix<double> less(6, 4), d_less(6, 4);
  for (Index t = 0, i = 0; t < 9; ++t)
    if (t % 4 != 0) {
      less.row(i) = x.row(t);
      d_less.row(i++) = d_y.row(t);
    }
  const auto without = run(layer, less, {}, d_less);
  for (Index t = 0, i = 0; t < 9; ++t) {
    if (t % 4 == 0) {
      EXPECT_TRUE((with.y.row(t).array() == 0).all() && (with.d_x.row(t).array() == 0).all()) << t;
      continue;
    }
    EXPECT_TRUE(with.y.row(t).isApprox(without.y.row(i), 1e-13)) << t;
    EXPECT_TRUE(with.d_x.row(t).isApprox(without.d_x.row(i++), 1e-12)) << t;
  }
  for (std::size_t i = 0; i < with.gradients.size(); ++i)
    EXPECT_TRUE(with.gradients[i].isApprox(without.gradients[i], 1e-12)) << i;
}

// ---- Masked and poisoned tokens, to the last bit.

template <class S>
void expect_contained(bool normalise, S huge) {
  constexpr S kNaN = std::numeric_limits<S>::quiet_NaN();
  constexpr S kInfinity = std::numeric_limits<S>::infinity();
  Rng rng(9);
  const auto layer = make_layer<Gated<S>>(
      {.d_model = 12, .num_experts = 5, .slots_per_expert = 2, .normalise = normalise}, rng);
  const std::vector<Index> bad{0, 3, 64, 99};
  const Matrix<S> clean = normal_matrix<S>(100, 12, rng), d_clean = normal_matrix<S>(100, 12, rng);
  for (const bool groups : {false, true}) {
    BatchInfo info, mask = masked(100, bad);
    if (groups) mask.group_begin = info.group_begin = IndexVector{{0, 1, 64, 65, 90, 100}};
    const auto expected = run(layer, clean, mask, d_clean);
    for (const S poison : {kNaN, -kNaN, kInfinity, -kInfinity, huge}) {
      if (poison == S(0)) continue;
      const std::string what = "poison " + std::to_string(poison) + (groups ? ", groups" : "");
      Matrix<S> x = clean, d_y = d_clean;
      for (const Index t : bad) {
        if (moe::number_kind(poison) == moe::NumberKind::finite)
          x.row(t).setConstant(poison);
        else
          x(t, t % 12) = poison;
        d_y.row(t).setConstant(kNaN);  // what a loss makes of an output of NaN
      }
      expect_same_step(run(layer, x, mask, d_y), expected, what + ", masked");
      const auto got = run(layer, x, info, d_y);
      for (Index t = 0; t < 100; ++t) {
        const bool poisoned = std::find(bad.begin(), bad.end(), t) != bad.end();
        for (const auto& [y, wanted] :
             {std::pair(&got.y, &expected.y), std::pair(&got.inference, &expected.inference)}) {
          if (!poisoned) {
            EXPECT_TRUE(same_bits(&(*y)(t, 0), &(*wanted)(t, 0), 12)) << what << ", token " << t;
            continue;
          }
          for (Index j = 0; j < 12; ++j) {
            EXPECT_EQ(moe::number_kind((*y)(t, j)), moe::NumberKind::nan) << what << ", " << t;
            EXPECT_EQ((*wanted)(t, j), S(0)) << what << ", token " << t;
          }
        }
      }
      EXPECT_TRUE(same_bits(got.d_x, expected.d_x)) << what;
      EXPECT_TRUE(same_bits(got.dispatch, expected.dispatch)) << what;
      EXPECT_TRUE(same_bits(got.combine, expected.combine)) << what;
      EXPECT_TRUE(same_bits(got.logits, expected.logits)) << what;
      expect_same_gradients(got, expected, what);
    }
  }
}

// Without normalisation finite numbers may have a logit that overflows.
TEST(SoftMoELayer, APoisonedTokenIsAMaskedOneWithAnOutputOfNaN) {
  expect_contained<float>(true, 0);
  expect_contained<float>(false, 3e38f);
  expect_contained<double>(true, 0);
  expect_contained<double>(false, 1e308);
}

TEST(SoftMoELayer, PoisonedTokensAreNamed) {
  const Layer layer = small_layer();
  Rng rng(1);
  Matrix<double> x = normal_matrix<double>(4, 4, rng), y;
  x(1, 2) = std::numeric_limits<double>::infinity();
  Layer::Workspace w;
  layer.forward(x, y, w, masked(4, {3}));
  EXPECT_EQ(w.routing.token_state, (moe::Buffer<TokenState>{TokenState::valid, TokenState::poisoned,
                                                            TokenState::valid, TokenState::masked}));
}

// 0 times infinity is NaN: a masked token must not take a share of 0 of it.
TEST(SoftMoELayer, AnExpertThatOverflowsDoesNotReachMaskedTokens) {
  Layer layer = small_layer();
  layer.experts()[1].w_down.setConstant(1e308);
  layer.experts()[1].b_down.setConstant(std::numeric_limits<double>::infinity());
  Rng rng(1);
  const Matrix<double> x = normal_matrix<double>(7, 4, rng), d_y = normal_matrix<double>(7, 4, rng);
  const auto step = run(layer, x, masked(7, {2, 6}), d_y);
  const Matrix<double> zero = Matrix<double>::Zero(1, 4);
  for (const Matrix<double>* rows : {&step.y, &step.inference, &step.d_x})
    for (Index t = 0; t < 7; ++t) EXPECT_EQ(same_bits(&(*rows)(t, 0), zero.data(), 4), t == 2 || t == 6) << t;
}

// Where the sum of squares overflows, the direction is still known.
TEST(SoftMoELayer, LongRowsAreNormalisedToo) {
  Rng rng(4);
  auto layer = make_layer<Plain<float>>({.d_model = 4, .num_experts = 3}, rng);
  layer.router().w_slots.row(1) *= 1e30f;
  const Matrix<float> x = normal_matrix<float>(5, 4, rng);
  Matrix<float> y;
  SoftMoELayer<Plain<float>>::Cache ordinary, huge;
  layer.forward(x, y, ordinary);
  layer.forward(1e30f * x, y, huge);
  EXPECT_TRUE(huge.routing.logits.isApprox(ordinary.routing.logits, 1e-5f));
  EXPECT_LE(huge.routing.logits.cwiseAbs().maxCoeff(), layer.router().scale[0] * 1.0001f);
  EXPECT_GT(huge.routing.logits.col(1).cwiseAbs().minCoeff(), 0.0f);
  for (const TokenState state : huge.routing.token_state) EXPECT_EQ(state, TokenState::valid);
}

// ---- Nothing to do.

TEST(SoftMoELayer, ABatchWithoutValidTokensGivesNothing) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  Layer layer = small_layer();
  for (auto& expert : layer.experts()) expert.b_down.setConstant(kNaN);  // must not be asked
  Rng rng(1);
  const Matrix<double> x = normal_matrix<double>(5, 4, rng);
  const auto check = [&](const BatchInfo& info, const Matrix<double>& tokens, double y) {
    const auto step = run(layer, tokens, info, Matrix<double>(tokens));
    EXPECT_EQ(step.y.rows(), tokens.rows());
    for (Index i = 0; i < step.y.size(); ++i) {
      EXPECT_TRUE(same_bits(step.y.data() + i, &y, 1));
      EXPECT_EQ(step.d_x.data()[i], 0.0);
    }
    for (const auto& g : step.gradients) EXPECT_TRUE((g.array() == 0).all());
  };
  BatchInfo none = masked(5, {0, 1, 2, 3, 4});
  check({}, Matrix<double>(0, 4), 0);
  check(grouped({0, 0, 0}), Matrix<double>(0, 4), 0);
  check(none, x, 0);
  none.group_begin = IndexVector{{0, 2, 2, 5}};
  check(none, x, 0);
  check({}, Matrix<double>::Constant(5, 4, kNaN), kNaN);
  layer.router().w_slots(0, 0) = kNaN;  // poisons every token
  check({}, x, kNaN);
}

TEST(SoftMoELayer, AGroupWithoutValidTokensChangesNoOther) {
  Rng rng(2);
  const Layer layer = small_layer();
  const Matrix<double> x = normal_matrix<double>(8, 4, rng), d_y = normal_matrix<double>(8, 4, rng);
  BatchInfo info = masked(8, {0, 1, 2});
  info.group_begin = IndexVector{{0, 3, 3, 8}};
  const auto step = run(layer, x, info, d_y);
  const auto alone = run(layer, x.bottomRows(5), {}, d_y.bottomRows(5));
  EXPECT_TRUE(same_bits(Matrix<double>(step.y.bottomRows(5)), alone.y));
  EXPECT_TRUE(same_bits(Matrix<double>(step.d_x.bottomRows(5)), alone.d_x));
  EXPECT_TRUE((step.y.topRows(3).array() == 0).all() && (step.d_x.topRows(3).array() == 0).all());
  for (std::size_t i = 1; i < step.gradients.size(); ++i)  // w_slots sums over all tokens at once
    EXPECT_TRUE(step.gradients[i].isApprox(alone.gradients[i], 1e-13)) << i;
}

// ---- Executors.

template <class L>
void expect_same_everywhere(const L& layer, const std::string& what) {
  Rng rng(5);
  const Matrix<float> x = normal_matrix<float>(437, layer.d_model(), rng),
                      d_y = normal_matrix<float>(437, layer.d_model(), rng);
  BatchInfo info = masked(437, {0, 17, 64, 200, 436});
  info.group_begin = IndexVector{{0, 100, 101, 437}};
  for (const BatchInfo& batch : {info, BatchInfo{}}) {
    const auto expected = run(layer, x, batch, d_y);
    for (const int threads : {1, 2, 3, 8}) {
      Eigen::ThreadPool pool(threads);
      expect_same_step(run(layer, x, batch, d_y, moe::ThreadPoolExecutor(pool)), expected,
                       what + ", thread pool of " + std::to_string(threads));
#ifdef _OPENMP
      expect_same_step(run(layer, x, batch, d_y, moe::OpenMP{.num_threads = threads}), expected,
                       what + ", OpenMP with " + std::to_string(threads));
#endif
    }
  }
}

TEST(SoftMoELayer, ResultsAreTheSameForEveryExecutor) {
  Rng rng(1);
  expect_same_everywhere(
      make_layer<Plain<float>>({.d_model = 33, .num_experts = 7, .slots_per_expert = 3}, rng, true, 37),
      "normalised");
  expect_same_everywhere(
      make_layer<Gated<float>>({.d_model = 150, .num_experts = 90, .normalise = false}, rng, false, 9),
      "many experts");
  expect_same_everywhere(
      make_layer<Gated<float>>({.d_model = 20, .num_experts = 1, .slots_per_expert = 300}, rng, false, 9),
      "many slots");
}

TEST(SoftMoELayer, ManyCallersMayShareALayer) {
  Rng rng(3);
  const Layer layer = small_layer();
  const Matrix<double> x = normal_matrix<double>(150, 4, rng);
  const Matrix<double> expected = layer.forward(x, BatchInfo{}, Sequential{});
  std::vector<Matrix<double>> results(4);
  std::vector<std::thread> callers;
  for (auto& y : results) callers.emplace_back([&] { y = layer.forward(x, BatchInfo{}, Sequential{}); });
  for (std::thread& caller : callers) caller.join();
  for (const auto& y : results) EXPECT_TRUE(same_bits(y, expected));
}

// ---- A value, and its parameters.

TEST(SoftMoELayer, BuffersOfOtherBatchesMayBeReused) {
  Rng rng(12);
  const Layer layer = small_layer(), other = small_layer(2, false);
  Layer::Cache cache;
  Layer::Workspace workspace;
  Matrix<double> y, y_inference, d_x;
  for (const Index tokens : {9, 0, 130, 3, 70}) {
    const Matrix<double> x = normal_matrix<double>(tokens, 4, rng),
                         d_y = normal_matrix<double>(tokens, 4, rng);
    const BatchInfo info = random_info(tokens, rng);
    for (const Layer* l : {&layer, &other}) {
      const auto expected = run(*l, x, info, d_y);
      Layer grad = moe::zeros_like(*l);
      l->forward(x, y_inference, workspace, info);
      l->forward(x, y, cache, info);
      l->backward(d_y, cache, grad, d_x);
      EXPECT_TRUE(same_bits(y, expected.y) && same_bits(y_inference, expected.y)) << tokens;
      EXPECT_TRUE(same_bits(d_x, expected.d_x)) << tokens;
      EXPECT_TRUE(same_bits(grad.router().w_slots, expected.gradients[0])) << tokens;
    }
  }
}

TEST(SoftMoELayer, NamesAndCountsItsParameters) {
  Rng rng(1);
  const auto names = [](const auto& layer) {
    std::vector<std::string> list;
    layer.visit([&](const ParameterInfo& info, const auto&) { list.emplace_back(info.name); }, layer);
    return list;
  };
  const SoftMoEOptions options{.d_model = 4, .num_experts = 2, .slots_per_expert = 3};
  const auto layer = make_layer<Plain<double>>(options, rng, false);
  EXPECT_THAT(names(layer), testing::ElementsAre("w_slots", "scale", "experts.0.w_up", "experts.0.w_down",
                                                 "experts.1.w_up", "experts.1.w_down"));
  EXPECT_EQ(moe::num_parameters(layer), 6 * 4 + 1 + 2 * 2 * 4 * 5);
  EXPECT_EQ(layer.num_slots(), 6);
  EXPECT_EQ(layer.experts().size(), 2u);
  EXPECT_EQ(norm(moe::zeros_like(layer)), 0.0);
  EXPECT_TRUE(moe::zeros_like(layer).options().normalise);
  const auto plain = make_layer<Plain<double>>({.d_model = 4, .num_experts = 2, .normalise = false}, rng);
  EXPECT_THAT(names(plain), testing::Not(testing::Contains("scale")));
  const SoftMoELayer<Triple> fixed({{}, {}}, {.d_model = 2, .num_experts = 2});
  EXPECT_THAT(names(fixed), testing::ElementsAre("w_slots", "scale"));
}

TEST(SoftMoELayer, IsAValue) {
  Rng rng(1);
  const Layer layer = small_layer();
  const Matrix<double> x = normal_matrix<double>(5, 4, rng), y = layer.forward(x);
  Layer copy = layer;
  copy.router().w_slots.setZero();
  copy.experts()[0].w_up.setZero();
  EXPECT_TRUE(same_bits(layer.forward(x), y));
  EXPECT_FALSE(same_bits(copy.forward(x), y));
  copy = layer;
  EXPECT_TRUE(same_bits(copy.forward(x), y));
  // Copied caches are as good as their originals.
  Layer::Cache cache;
  layer.forward(x, cache);
  Layer::Cache second = cache;
  Layer a = moe::zeros_like(layer), b = moe::zeros_like(layer);
  EXPECT_TRUE(same_bits(layer.backward(y, cache, a), layer.backward(y, second, b)));
}

// ---- The router alone.

// Two groups, the first of which has no valid token: rows of slots stand by expert, then by group.
TEST(SoftRouter, MixesTokensIntoRowsByExpertAndBack) {
  Rng rng(4);
  const SoftMoEOptions options{.d_model = 4, .num_experts = 3, .slots_per_expert = 2};
  const moe::SoftRouter<double> router(options, rng);
  const Matrix<double> x = normal_matrix<double>(9, 4, rng);
  BatchInfo info = masked(9, {0, 1});
  info.group_begin = IndexVector{{0, 2, 5, 9}};
  moe::SoftRouting<double> routing;
  moe::RowBuffer<double> rows;
  Matrix<double> y;
  router.check_forward(x, info, "test");
  router.mix(x, info, routing, rows);
  EXPECT_EQ(routing.expert_begin, (moe::Buffer<Index>{0, 4, 8, 12}));
  EXPECT_EQ(routing.live, (moe::Buffer<Index>{1, 2}));
  const auto of_group = [&](const Matrix<double>& m, Index g) {
    return m.middleRows(info.group_begin[g], info.group_begin[g + 1] - info.group_begin[g]);
  };
  for (Index e = 0; e < 3; ++e)
    for (Index g = 1; g < 3; ++g)
      for (Index p = 0; p < 2; ++p) {
        const auto expected =
            (of_group(routing.dispatch, g).col(e * 2 + p).transpose() * of_group(x, g)).eval();
        EXPECT_TRUE(rows.matrix().row((e * 2 + g - 1) * 2 + p).isApprox(expected, 1e-13)) << e << g << p;
      }
  router.unmix(rows, routing, y);
  for (Index g = 1; g < 3; ++g)
    EXPECT_TRUE(of_group(y, g).isApprox(
        of_group(routing.combine, g) * of_group(routing.dispatch, g).transpose() * of_group(x, g), 1e-13));
  EXPECT_TRUE((of_group(y, 0).array() == 0).all());
}

TEST(SoftRouter, OfALayerIsTheRouterAlone) {
  Rng a(6), b(6);
  const SoftMoEOptions options{.d_model = 2, .num_experts = 2, .slots_per_expert = 3};
  const SoftMoELayer<Triple> layer({{}, {}}, options, a);
  const moe::SoftRouter<double> router(options, b);
  EXPECT_EQ(layer.router().w_slots, router.w_slots);
  EXPECT_EQ(moe::num_parameters(router), 6 * 2 + 1);
  EXPECT_EQ(moe::zeros_like(router).scale[0], 0.0);
  EXPECT_EQ(layer.router().options().slots_per_expert, 3);
}

// ---- Errors.

TEST(SoftMoELayer, RefusesWhatDoesNotFit) {
  Rng rng(1);
  const auto experts = [](Index count, Index d_model) {
    Rng fresh(1);
    return moe::make_experts<Plain<double>>(count, {.d_model = d_model, .d_ff = 5, .bias = true}, fresh);
  };
  const SoftMoEOptions options{.d_model = 4, .num_experts = 3, .slots_per_expert = 2};
  const Layer layer(experts(3, 4), options, rng);
  Layer changed = layer, unscaled = layer, grad = moe::zeros_like(layer);
  changed.router().w_slots.setZero(5, 4);
  unscaled.router().scale.resize(0);
  const Layer fewer_slots(experts(3, 4), {.d_model = 4, .num_experts = 3}, rng),
      fewer_experts(experts(2, 4), {.d_model = 4, .num_experts = 2, .slots_per_expert = 3}, rng),
      narrow(experts(3, 3), {.d_model = 3, .num_experts = 3, .slots_per_expert = 2}, rng),
      plain(experts(3, 4), {.d_model = 4, .num_experts = 3, .slots_per_expert = 2, .normalise = false}, rng);
  Layer wide = layer;
  for (auto& e : wide.experts()) e = Plain<double>({.d_model = 4, .d_ff = 6, .bias = true});
  Layer one_wide = layer;  // two experts could take their gradients before the third refuses
  one_wide.experts()[1] = wide.experts()[1];
  Matrix<double> x = normal_matrix<double>(6, 4, rng);
  const Matrix<double> before = x;
  Layer::Workspace workspace;
  Layer::Cache cache, unused;
  layer.forward(before, cache);
  const auto cache_of = [&](const Layer& other, Index tokens) {
    Layer::Cache c;
    other.forward(Matrix<double>::Ones(tokens, other.d_model()), c);
    return c;
  };
  // A gradient of another layer, and a cache of one.
  const auto into = [&](const Layer& other) {
    Layer g = moe::zeros_like(other);
    try {
      layer.backward(before, cache, g);
    } catch (...) {
      EXPECT_EQ(norm(g), 0.0);
      throw;
    }
  };
  const auto from = [&](Layer::Cache c) { layer.backward(before, c, grad); };
  struct Case {
    std::function<void()> call;
    std::string message;
  };
  const std::vector<Case> cases{
      {[&] { Layer({}, {.d_model = 0, .num_experts = 1}); }, "d_model = 0, expected at least 1"},
      {[&] { Layer({}, {.d_model = 4, .num_experts = 0}); }, "num_experts = 0, expected at least 1"},
      {[&] { Layer(experts(1, 4), {.d_model = 4, .num_experts = 1, .slots_per_expert = -1}); },
       "slots_per_expert = -1, expected at least 1"},
      {[&] { Layer(experts(2, 4), options); }, "2 experts, expected num_experts = 3"},
      {[&] { Layer(experts(3, 5), options, rng); }, "expert 0 has d_model = 5, expected 4"},
      {[&] { layer.forward(Matrix<double>::Ones(6, 5)); }, "x has 5 columns, expected d_model = 4"},
      {[&] { layer.forward(x, x, workspace); }, "forward: y and x overlap"},
      {[&] { layer.forward(x, x, cache); }, "forward: y and x overlap"},
      {[&] { layer.forward(x, masked(5, {})); }, "mask has 5 entries, expected 6"},
      {[&] {
         layer.forward(x, grouped({0, 5}));
       },
       "group_begin goes from 0 to 5, expected from 0 to 6"},
      {[&] {
         layer.forward(x, grouped({0, 4, 3, 6}));
       },
       "group_begin[2] = 3 is less"},
      {[&] { changed.forward(x); }, "w_slots has shape [5, 4], expected [6, 4]"},
      {[&] { unscaled.forward(x); }, "scale has 0 entries, expected 1"},
      {[&] { layer.backward(Matrix<double>::Ones(5, 4), cache, grad); },
       "d_y has shape [5, 4], expected [6, 4]"},
      {[&] { layer.backward(x, cache, grad, x); }, "backward: d_x and d_y overlap"},
      {[&] { changed.backward(before, cache, grad); }, "w_slots has shape [5, 4], expected [6, 4]"},
      {[&] { from(unused); }, "d_model = 0"},
      {[&] { from(cache_of(narrow, 6)); }, "d_model = 3, 3 experts and 6 slots, expected 4, 3 and 6"},
      {[&] { from(cache_of(fewer_slots, 6)); }, "3 experts and 3 slots, expected 4, 3 and 6"},
      {[&] { from(cache_of(fewer_experts, 6)); }, "2 experts and 6 slots, expected 4, 3 and 6"},
      {[&] { from(cache_of(layer, 7)); }, "d_y has shape [6, 4], expected [7, 4]"},
      {[&] { from(cache_of(plain, 6)); }, "x_unit has shape [0, 0], expected [6, 4]"},
      {[&] { from(cache_of(wide, 6)); }, "12 columns for expert 0, expected 10"},
      {[&] { into(narrow); }, "grad is a layer with d_model = 3 and 3 experts, expected 4 and 3"},
      {[&] { into(fewer_experts); }, "grad is a layer with d_model = 4 and 2 experts"},
      {[&] { into(fewer_slots); }, "w_slots has shape [3, 4], expected [6, 4]"},
      {[&] { into(plain); }, "scale has shape [0, 1], expected [1, 1]"},
      {[&] { into(wide); }, "w_up has shape [6, 4], expected [5, 4]"},
      {[&] { into(one_wide); }, "w_up has shape [6, 4], expected [5, 4]"},
      {[&] { Layer::visit([](const auto&, const auto&...) {}, layer, fewer_experts); },
       "a layer of 2 experts beside one of 3"},
      {[&] { Layer::visit([](const auto&, const auto&...) {}, layer, plain); }, "scale has shape"},
  };
  for (const Case& c : cases) {
    try {
      c.call();
      ADD_FAILURE() << "not refused: " << c.message;
    } catch (const std::invalid_argument& e) {
      EXPECT_THAT(e.what(), testing::HasSubstr(c.message));
    }
    EXPECT_EQ(norm(grad), 0.0) << c.message;
    EXPECT_TRUE(same_bits(x, before)) << c.message;
  }
}

}  // namespace
}  // namespace soft_moe_layer_test
