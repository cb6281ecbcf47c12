// SPDX-License-Identifier: MIT
#include <concepts>
#include <stdexcept>
#include <variant>
#include <vector>

#include <gtest/gtest.h>

#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/routers/top_k_router.hpp>

namespace variant_expert_test {
namespace {

using moe::Index;
using moe::Matrix;
using Plain = moe::FeedForward<double>;
using Gated = moe::GatedFeedForward<double>;
using Either = moe::VariantExpert<Plain, Gated>;
using Layer = moe::MoELayer<Either, moe::TopKRouter<double>>;

static_assert(moe::TrainableExpert<Either> && std::copyable<Either>);
static_assert(moe::TrainableExpert<moe::VariantExpert<Plain>>);
static_assert(std::constructible_from<Either, Gated> && !std::constructible_from<Either, int>);

struct Kinds {
  moe::Rng rng{1};
  Plain plain{{.d_model = 3, .d_ff = 4, .bias = true}, rng};
  Gated gated{{.d_model = 3, .d_ff = 5}, rng};
};

Matrix<double> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  moe::Rng rng(seed);
  Matrix<double> m(rows, cols);
  moe::fill_normal(m, 1.0, rng);
  return m;
}

template <class E>
void expect_same(const Either& either, const E& expert) {
  ASSERT_TRUE(std::holds_alternative<E>(either.get()));
  EXPECT_EQ(either.d_model(), expert.d_model());
  EXPECT_EQ(either.cache_cols(), expert.cache_cols());
  const Matrix<double> x = random_matrix(6, 3, 2), d_y = random_matrix(6, 3, 3);
  Matrix<double> y(6, 3), y_expected(6, 3), y_inference(6, 3), d_x(6, 3), d_x_expected(6, 3);
  Matrix<double> cache(6, expert.cache_cols()), cache_expected = cache;
  either.forward(x, y, cache);
  either.forward(x, y_inference);
  expert.forward(x, y_expected, cache_expected);
  EXPECT_EQ(y, y_expected);
  EXPECT_EQ(y_inference, y_expected);
  Either grad = moe::zeros_like(either);
  E grad_expected = moe::zeros_like(expert);
  either.backward(x, d_y, cache, d_x, grad);
  expert.backward(x, d_y, cache_expected, d_x_expected, grad_expected);
  EXPECT_EQ(d_x, d_x_expected);
  const Either expected = grad_expected;
  Either::visit([](const auto& info, const auto& a, const auto& b) { EXPECT_EQ(a, b) << info.name; }, grad,
                expected);
}

TEST(VariantExpert, IsTheKindItWasMadeOf) {
  Kinds kinds;
  expect_same<Plain>(kinds.plain, kinds.plain);
  expect_same<Gated>(kinds.gated, kinds.gated);
}

TEST(VariantExpert, GivesAccessToItsKind) {
  Kinds kinds;
  Either either = kinds.plain;
  std::get<Plain>(either.get()).b_down.setConstant(7);
  Matrix<double> y(1, 3);
  either.forward(Matrix<double>::Zero(1, 3), y);
  EXPECT_TRUE((y.array() == 7).all());
}

TEST(VariantExpert, RefusesAGradientOfAnotherKind) {
  Kinds kinds;
  const Either either = kinds.plain;
  Either grad = kinds.gated;
  const Matrix<double> x = random_matrix(2, 3, 4);
  Matrix<double> y(2, 3), d_x(2, 3), cache(2, either.cache_cols());
  either.forward(x, y, cache);
  try {
    either.backward(x, x, cache, d_x, grad);
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "VariantExpert: kind 1 where kind 0 is expected");
  }
  EXPECT_THROW(Either::visit([](const auto&, auto&, auto&) {}, either, grad), std::invalid_argument);
}

Layer mixed_layer() {
  Kinds kinds;
  moe::Rng rng(5);
  return Layer({kinds.plain, kinds.gated, kinds.gated},
               moe::TopKRouter<double>({.d_model = 3, .num_experts = 3, .top_k = 2}, rng));
}

TEST(VariantExpert, ExpertsOfOneLayerMayDiffer) {
  const Layer layer = mixed_layer();
  const Matrix<double> x = random_matrix(10, 3, 6);
  const auto routing = layer.route(x);
  const Matrix<double> y = layer.forward(x, routing);
  for (Index t = 0; t < 10; ++t) {
    Matrix<double> expected = Matrix<double>::Zero(1, 3);
    for (Index c = 2 * t; c < 2 * t + 2; ++c) {
      Matrix<double> out(1, 3);
      layer.experts()[std::size_t(routing.chosen.expert[c])].forward(x.row(t), out);
      expected += routing.chosen.gate[c] * out;
    }
    EXPECT_TRUE(y.row(t).isApprox(expected.row(0), 1e-12));
  }
}

TEST(VariantExpert, ALayerOfThemTrains) {
  const Layer layer = mixed_layer();
  const Matrix<double> x = random_matrix(10, 3, 7), d_y = random_matrix(10, 3, 8);
  Layer::Cache cache;
  Layer grad = moe::zeros_like(layer);
  layer.forward(x, cache);
  layer.backward(d_y, cache, grad);
  Layer work = layer;
  const double step = 1e-6;
  const auto objective = [&] { return work.forward(x, {}, moe::Sequential{}).cwiseProduct(d_y).sum(); };
  Layer::visit(
      [&](const moe::ParameterInfo& info, auto& p, const auto& g) {
        for (Index i = 0; i < p.size(); ++i) {
          const double center = p.data()[i];
          p.data()[i] = center + step;
          const double up = objective();
          p.data()[i] = center - step;
          const double down = objective();
          p.data()[i] = center;
          EXPECT_NEAR(g.data()[i], (up - down) / (2 * step), 1e-6) << info.name << ' ' << i;
        }
      },
      work, grad);
}

TEST(VariantExpert, ALayerRefusesAGradientWithKindsInAnotherOrder) {
  const Layer layer = mixed_layer();
  Kinds kinds;
  moe::Rng rng(9);
  Layer other({kinds.gated, kinds.plain, kinds.gated},
              moe::TopKRouter<double>({.d_model = 3, .num_experts = 3, .top_k = 2}, rng));
  Layer::Cache cache;
  const Matrix<double> x = random_matrix(4, 3, 10);
  layer.forward(x, cache);
  EXPECT_THROW(layer.backward(x, cache, other), std::invalid_argument);
}

}  // namespace

}  // namespace variant_expert_test
