// SPDX-License-Identifier: MIT
// Sums over many tokens keep their digits: in floats they are what they are in double.
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

namespace sums_test {
namespace {

using moe::Index;
using moe::IndexVector;
using moe::Loss;
using moe::Matrix;
using moe::Routing;
using moe::Vector;

// A routing of many tokens, every one of which chose one expert, a second for every third token.
// Probabilities are near each other, as those of a balanced router are.
template <class S>
Routing<S> many_tokens(Index tokens, Index experts) {
  Routing<S> r;
  moe::begin_routing(tokens, experts, {}, r, "many_tokens");
  r.router_logits.resize(tokens, experts);
  r.router_probs.resize(tokens, experts);
  moe::Rng rng(3);
  for (Index t = 0; t < tokens; ++t) {
    for (Index e = 0; e < experts; ++e) r.router_logits(t, e) = S(float(1 + 0.5 * rng.uniform()));
    moe::softmax(experts, &r.router_logits(t, 0), &r.router_probs(t, 0));
    for (Index e = 0; e < experts; ++e) r.router_probs(t, e) = S(float(r.router_probs(t, e)));
    for (Index c = 0; c < (t % 3 == 0 ? 2 : 1); ++c) {
      r.chosen.expert.push_back((t + c) % experts);
      r.chosen.gate.push_back(S(float(0.125 + 0.0625 * rng.uniform())));
    }
    r.chosen.token_begin[t + 1] = r.chosen.size();
  }
  moe::dispatch_all(r.chosen, r.plan);
  return r;
}

template <class S>
std::vector<std::pair<std::string, Loss<S>>> losses_of(const Routing<S>& r) {
  const Index tokens = r.num_tokens();
  moe::BatchInfo sequences;
  sequences.group_begin = IndexVector{{0, tokens / 2, tokens}};
  IndexVector device(r.num_experts());
  for (Index e = 0; e < device.size(); ++e) device[e] = e % 4;
  return {{"load_balancing_loss", moe::load_balancing_loss(r)},
          {"sequence_balance_loss", moe::sequence_balance_loss(r, sequences)},
          {"device_balance_loss", moe::device_balance_loss(r, device)},
          {"relu_balance_loss", moe::relu_balance_loss(r, 2)},
          {"importance_loss of gates", moe::importance_loss(r)},
          {"importance_loss of probs", moe::importance_loss(r, moe::Importance::probs)},
          {"router_z_loss", moe::router_z_loss(r)},
          {"load_loss", moe::load_loss(r)}};
}

// In float the balance losses were 5% off for so many tokens, importance and z-loss 1e-3.
TEST(Sums, OfLossesOverManyTokensAreThoseOfDouble) {
  const auto in_float = losses_of(many_tokens<float>(1 << 17, 64));
  const auto in_double = losses_of(many_tokens<double>(1 << 17, 64));
  for (std::size_t i = 0; i < in_float.size(); ++i) {
    const double value = double(in_float[i].second.value), right = in_double[i].second.value;
    // The variation of importance is a difference of large numbers, each of which was rounded to float.
    const double allowed = in_float[i].first.find("importance") == 0 ? 1e-4 : 1e-6;
    EXPECT_LE(std::abs(value - right), allowed * std::abs(right))
        << in_float[i].first << ": " << value << ", " << right;
  }
}

// With noise, load is a sum over tokens of probabilities that are not whole numbers.
TEST(Sums, OfTheEstimatedLoadAreThoseOfDouble) {
  const auto loss = [](auto zero) {
    using S = decltype(zero);
    Routing<S> r = many_tokens<S>(1 << 16, 4);
    r.noise.top_k = 1;
    r.noise.draws.setZero(r.num_tokens(), 4);
    r.noise.stddev.setConstant(r.num_tokens(), 4, S(0.5));
    r.noise.noisy_logits = r.router_logits;
    moe::detail::EstimatedLoad<S> load(r, moe::LoadThreshold::two, "test");
    return Vector<double>(load.values.template cast<double>());
  };
  const Vector<double> in_float = loss(0.0f), in_double = loss(0.0);
  for (Index e = 0; e < 4; ++e) EXPECT_NEAR(in_float[e], in_double[e], 1e-7 * in_double[e]) << e;
}

TEST(Sums, OfABiasGradientOverAMillionRowsAreRoundedOnce) {
  const Index rows = 1 << 20;
  for (const Index cols : {3, 67, 600}) {
    const Matrix<float> d_y = Matrix<float>::Constant(cols == 3 ? rows : rows / (cols / 4), cols, 0.1f);
    Vector<float> d_b = Vector<float>::Constant(cols, 1.0f);
    moe::bias_backward(d_y, d_b);
    const float right = 1.0f + float(double(0.1f) * double(d_y.rows()));
    for (Index j = 0; j < cols; ++j) EXPECT_EQ(d_b[j], right) << cols << ", " << j;
  }
}

// The bound that math/linear.hpp states, for every set of kernels, at the worst input: equal terms, whose
// rounding errors all have one sign.
TEST(Sums, OfAWeightGradientOverAMillionRowsKeepTheirBound) {
  const Index rows = 1 << 20;
  const Matrix<float> d_y = Matrix<float>::Constant(rows, 2, 0.1f),
                      x = Matrix<float>::Constant(rows, 3, 0.3f);
  const double right = double(0.1f) * double(0.3f) * double(rows);
  for (const auto set :
       {moe::InstructionSet::portable, moe::InstructionSet::avx2, moe::InstructionSet::avx512}) {
    if (!moe::is_available(set)) continue;
    Matrix<float> d_w = Matrix<float>::Zero(2, 3);
    moe::kernels::find_dense_backward(set)->linear_backward_weight(rows, 3, 2, d_y.data(), 2, x.data(), 3,
                                                                   d_w.data(), 3);
    const double bound = (256 + double(rows) / 256) * 0x1p-24;
    for (Index i = 0; i < 2; ++i)
      for (Index j = 0; j < 3; ++j)
        EXPECT_LE(std::abs(double(d_w(i, j)) - right), bound * right)
            << moe::name_of(set) << ": " << d_w(i, j);
  }
}

// Equal terms again: cut at 256 the error is at most that of 64 roundings of the sum, in one chain of 4,096
// it is over 200.
TEST(Sums, OfLinearAreCutAtEvery256) {
  for (const Index rows : {1, 3, 6, 8, 9, 40, 200}) {
    const Index in = 4096, out = 20;
    const Matrix<float> x = Matrix<float>::Constant(rows, in, 0.1f),
                        w = Matrix<float>::Constant(out, in, 0.3f);
    const double right = double(0.1f) * double(0.3f) * double(in);
    for (const auto set :
         {moe::InstructionSet::portable, moe::InstructionSet::avx2, moe::InstructionSet::avx512}) {
      if (!moe::is_available(set)) continue;
      Matrix<float> y(rows, out);
      moe::kernels::find_dense(set)->linear(rows, in, out, x.data(), in, w.data(), in, y.data(), out, false);
      for (Index i = 0; i < y.size(); ++i)
        ASSERT_LE(std::abs(double(y.data()[i]) - right), 64 * 0x1p-24 * right)
            << moe::name_of(set) << ", " << rows << " rows: " << y.data()[i];
    }
  }
}

// What a layer adds up over its tokens: biases of the router, of experts and of the output, weights, and a
// constant expert's vector. 65,536 equal tokens; the gradients are then those of one token times as many.
template <class S, class E>
auto gradient_of_equal_tokens(std::vector<E> experts, Index tokens) {
  moe::TopKRouter<S> router({.d_model = 3, .num_experts = 2, .top_k = 2, .bias = true});
  router.w_router << S(0.5), S(-0.25), S(0.125), S(-0.5), S(0.25), S(0.75);
  moe::MoELayer<E, moe::TopKRouter<S>> layer(std::move(experts), router, {}, true);
  typename decltype(layer)::Cache cache;
  Matrix<S> x(tokens, 3), d_y(tokens, 3);
  x.rowwise() = Eigen::Matrix<S, 1, 3>(S(0.3f), S(0.7f), S(-0.1f));
  d_y.rowwise() = Eigen::Matrix<S, 1, 3>(S(0.1f), S(0.3f), S(-0.7f));
  layer.forward(x, cache);
  auto grad = moe::zeros_like(layer);
  layer.backward(d_y, cache, grad);
  std::vector<std::pair<std::string, Matrix<double>>> list;
  decltype(layer)::visit(
      [&](const moe::ParameterInfo& info, const auto& g) {
        list.push_back({std::string(info.name), g.template cast<double>()});
      },
      grad);
  return list;
}

template <template <class> class E>
void expect_no_digits_lost() {
  constexpr Index kTokens = 1 << 16;
  const auto experts = [](auto zero) {
    using S = decltype(zero);
    moe::Rng rng(5);
    if constexpr (requires { E<S>({.d_model = 3, .d_ff = 2, .bias = true}, rng); })
      return moe::make_experts<E<S>>(2, {.d_model = 3, .d_ff = 2, .bias = true}, rng);
    else
      return moe::make_experts<E<S>>(2, {.d_model = 3}, rng);
  };
  const auto many = gradient_of_equal_tokens<float>(experts(0.0f), kTokens);
  const auto one = gradient_of_equal_tokens<double>(experts(0.0), 1);
  ASSERT_EQ(many.size(), one.size());
  for (std::size_t i = 0; i < many.size(); ++i) {
    const Matrix<double> right = double(kTokens) * one[i].second;
    EXPECT_LE((many[i].second - right).cwiseAbs().maxCoeff(), 2e-5 * right.cwiseAbs().maxCoeff())
        << many[i].first;
  }
}

template <class S>
using GatedExpert = moe::GatedFeedForward<S>;
template <class S>
using PlainExpert = moe::FeedForward<S, moe::GELU>;

TEST(Sums, OfALayersGradientsOverManyTokensKeepTheirDigits) {
  expect_no_digits_lost<PlainExpert>();
  expect_no_digits_lost<GatedExpert>();
  expect_no_digits_lost<moe::ConstantExpert>();
}

// Sinkhorn's algorithm makes every expert's share of the tokens even.
TEST(Sums, OfSinkhornsColumnsOverManyTokensKeepTheirDigits) {
  const Index tokens = 1 << 19, experts = 4;
  Matrix<float> z(tokens, experts);
  moe::SinkhornWorkspace<float> workspace{.plan = Matrix<float>(tokens, experts)};
  moe::Rng rng(7);
  for (Index i = 0; i < z.size(); ++i) z.data()[i] = float(0.5 * rng.uniform());
  moe::Buffer<moe::TokenState> state;
  state.assign(tokens, moe::TokenState::valid);
  moe::detail::balance_by_sinkhorn(z, state, Index(0), tokens, {.tolerance = 0, .max_iterations = 20},
                                   workspace);
  for (Index e = 0; e < experts; ++e)
    EXPECT_NEAR(workspace.plan.col(e).cast<double>().sum(), 0.25, 1e-6) << e;
}

// Soft MoE adds up tokens into slots, and their weights into the sums of its softmax.
TEST(Sums, OfSoftMoEOverManyTokensKeepTheirDigits) {
  const auto run = [](auto zero, Index tokens) {
    using S = decltype(zero);
    moe::SoftMoELayer<moe::CopyExpert<S>> layer({moe::CopyExpert<S>({.d_model = 2})},
                                                {.d_model = 2, .num_experts = 1, .normalise = false});
    layer.router().w_slots << S(0.5), S(0.25);
    Matrix<S> x(tokens, 2), d_y(tokens, 2);
    x.rowwise() = Eigen::Matrix<S, 1, 2>(S(0.3f), S(0.7f));
    d_y.rowwise() = Eigen::Matrix<S, 1, 2>(S(0.1f), S(0.3f));
    typename decltype(layer)::Cache cache;
    const Matrix<S> y = layer.forward(x, cache);
    return y.template cast<double>().eval();
  };
  const Matrix<double> many = run(0.0f, 1 << 18), one = run(0.0, 1);
  for (Index j = 0; j < 2; ++j) EXPECT_NEAR(many(0, j), one(0, j), 1e-4 * one(0, j)) << j;
}

}  // namespace
}  // namespace sums_test
