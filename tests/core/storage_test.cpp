// SPDX-License-Identifier: MIT
#include <concepts>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/moe.hpp>

namespace storage_test {
namespace {

using moe::GatedFeedForward;
using moe::Index;
using moe::Mapped;
using moe::MappedMatrix;
using moe::Matrix;
using moe::Rng;

template <class Call>
void expect_refused(const Call& call, const std::string& expected) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown, expected " << expected;
  } catch (const std::invalid_argument& error) {
    EXPECT_EQ(error.what(), expected);
  }
}

Matrix<float> count(Index rows, Index cols) {
  Matrix<float> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = float(i);
  return m;
}

static_assert(std::copyable<MappedMatrix<float>>);

TEST(MappedMatrix, ReadsMemoryOfOthers) {
  const auto owner = std::make_shared<std::vector<float>>(20, 3.f);
  (*owner)[7] = 5;
  const MappedMatrix<float> m({owner, owner->data() + 2}, 3, 4);
  EXPECT_EQ(m.rows(), 3);
  EXPECT_EQ(m.cols(), 4);
  EXPECT_EQ(m.size(), 12);
  EXPECT_EQ(m.data(), owner->data() + 2);
  EXPECT_EQ(m.view()(1, 1), 5);
  EXPECT_EQ(m.view().sum(), 38);
}

TEST(MappedMatrix, KeepsItsOwnerAliveAndSoDoCopies) {
  auto owner = std::make_shared<std::vector<float>>(4, 2.f);
  const std::weak_ptr<std::vector<float>> watch = owner;
  {
    MappedMatrix<float> copy(Matrix<float>::Zero(1, 1));
    {
      const MappedMatrix<float> m({owner, owner->data()}, 2, 2);
      owner.reset();
      copy = m;
    }
    EXPECT_FALSE(watch.expired());
    EXPECT_EQ(copy.view(), Matrix<float>::Constant(2, 2, 2));
  }
  EXPECT_TRUE(watch.expired());
}

TEST(MappedMatrix, TakesTheValuesOfAMatrix) {
  Matrix<float> m = count(3, 5);
  const float* const at = m.data();
  const MappedMatrix<float> moved(std::move(m));
  EXPECT_EQ(moved.data(), at);
  const MappedMatrix<float> copy = moved;
  EXPECT_EQ(copy.data(), at);
  EXPECT_EQ(copy.view(), count(3, 5));
}

TEST(MappedMatrix, IsAWeightOfLinear) {
  Rng rng(1);
  const Matrix<float> w = moe::lecun_normal<float>(33, 140, rng), x = count(9, 140) / 500;
  Matrix<float> y(9, 33), expected(9, 33);
  moe::linear(x, w, expected);
  moe::linear(x, MappedMatrix<float>(w), y);
  EXPECT_EQ(y, expected);
  Matrix<float> narrow(9, 32);
  expect_refused([&] { moe::linear(x, MappedMatrix<float>(w), narrow); },
                 "linear: w has shape [33, 140], expected [32, 140]");
}

TEST(MappedMatrix, RefusesWhatIsNoMatrix) {
  const auto bytes = std::make_shared<std::vector<float>>(8);
  const std::shared_ptr<const float> values(bytes, bytes->data());
  expect_refused([&] { MappedMatrix<float>(values, -1, 4); },
                 "MappedMatrix: shape [-1, 4], expected at least 0");
  expect_refused([&] { MappedMatrix<float>(std::shared_ptr<const float>(), 2, 3); },
                 "MappedMatrix: no values, expected 6");
  const auto* const odd = reinterpret_cast<const float*>(reinterpret_cast<const char*>(bytes->data()) + 3);
  expect_refused(
      [&] {
        MappedMatrix<float>({bytes, odd}, 1, 2);
      },
      "MappedMatrix: the address is 3 bytes past a multiple of 4");
  EXPECT_EQ(MappedMatrix<float>(std::shared_ptr<const float>(), 0, 3).cols(), 3);
}

// ---- Experts

template <class Owned, class Mapped>
concept SameExceptForTraining =
    moe::TrainableExpert<Owned> && moe::BufferedExpert<Owned> && moe::BufferedExpert<Mapped> &&
    !moe::TrainableExpert<Mapped> &&
    std::copyable<Mapped> && std::constructible_from<Owned, typename Owned::Options> &&
    !std::constructible_from<Mapped, typename Mapped::Options> &&
    !std::constructible_from<Mapped, typename Mapped::Options, Rng&>;
static_assert(SameExceptForTraining<GatedFeedForward<float>, GatedFeedForward<float, moe::SwiGLU, Mapped>>);
static_assert(SameExceptForTraining<moe::FeedForward<double>, moe::FeedForward<double, moe::ReLU, Mapped>>);

template <class E>
concept HasBackward = requires(const E& expert, E& grad, const Matrix<typename E::Scalar>& x,
                               Matrix<typename E::Scalar> y) {
  expert.backward(x, x, y, y, grad);
};
static_assert(HasBackward<GatedFeedForward<float>>);
static_assert(!HasBackward<GatedFeedForward<float, moe::SwiGLU, Mapped>>);

template <class S>
auto mapped(const GatedFeedForward<S, moe::ClampedSwiGLU>& e) {
  using E = GatedFeedForward<S, moe::ClampedSwiGLU, Mapped>;
  E result{{.d_model = e.d_model(), .d_ff = e.d_ff(), .bias = e.has_bias(), .glu = e.glu()},
           MappedMatrix<S>(e.w_gate),
           MappedMatrix<S>(e.w_up),
           MappedMatrix<S>(e.w_down)};
  result.b_gate = e.b_gate;
  result.b_up = e.b_up;
  result.b_down = e.b_down;
  return result;
}
template <class S>
auto mapped(const moe::FeedForward<S, moe::GELU>& e) {
  using E = moe::FeedForward<S, moe::GELU, Mapped>;
  E result{{.d_model = e.d_model(), .d_ff = e.d_ff(), .bias = e.has_bias()},
           MappedMatrix<S>(e.w_up),
           MappedMatrix<S>(e.w_down)};
  result.b_up = e.b_up;
  result.b_down = e.b_down;
  return result;
}

template <class E>
void expect_the_same_mapped(bool bias) {
  using S = typename E::Scalar;
  Rng rng(3);
  E owned({.d_model = 20, .d_ff = 35, .bias = bias}, rng);
  E::visit([&](const moe::ParameterInfo&, auto& p) { moe::fill_normal(p, 0.5, rng); }, owned);
  const auto other = mapped(owned);
  for (const Index rows : {0, 1, 40}) {
    Matrix<S> x(rows, 20), y(rows, 20), expected(rows, 20);
    moe::fill_normal(x, 1.0, rng);
    owned.forward(x, expected);
    other.forward(x, y);
    EXPECT_EQ(y, expected);
  }
  EXPECT_EQ(moe::num_parameters(other), moe::num_parameters(owned));
  EXPECT_EQ(other.cache_cols(), owned.cache_cols());

  const moe::TopKRouter<S> router({.d_model = 20, .num_experts = 3, .top_k = 2}, rng);
  const moe::MoELayer layer(std::vector{owned, owned, owned}, router, {{owned}, true}, true);
  const moe::MoELayer mapped_layer(std::vector{other, other, other}, router, {{other}, true}, true);
  static_assert(requires(const Matrix<S>& x) { mapped_layer.forward(x); });
  Matrix<S> x(50, 20);
  moe::fill_normal(x, 1.0, rng);
  EXPECT_EQ(mapped_layer.forward(x), layer.forward(x));
  EXPECT_EQ(mapped_layer.forward(x, {}, moe::Sequential{}), layer.forward(x));
  EXPECT_EQ(moe::num_parameters(mapped_layer), moe::num_parameters(layer));
}

TEST(MappedExpert, ComputesTheSame) {
  for (const bool bias : {false, true}) {
    expect_the_same_mapped<GatedFeedForward<float, moe::ClampedSwiGLU>>(bias);
    expect_the_same_mapped<GatedFeedForward<double, moe::ClampedSwiGLU>>(bias);
    expect_the_same_mapped<moe::FeedForward<float, moe::GELU>>(bias);
    expect_the_same_mapped<moe::FeedForward<double, moe::GELU>>(bias);
  }
}

TEST(Expert, TakesWeightsThatExist) {
  Matrix<float> up = count(3, 2);
  const float* const at = up.data();
  const moe::FeedForward<float> plain({.d_model = 2, .d_ff = 3, .bias = true}, std::move(up), count(2, 3));
  EXPECT_EQ(plain.w_up.data(), at);
  EXPECT_EQ(plain.w_down, count(2, 3));
  EXPECT_EQ(plain.b_up, moe::Vector<float>::Zero(3));
  const GatedFeedForward<float> gated({.d_model = 2, .d_ff = 3}, count(3, 2), 2 * count(3, 2), count(2, 3));
  EXPECT_EQ(gated.w_gate, count(3, 2));
  EXPECT_EQ(gated.w_up, 2 * count(3, 2));
  EXPECT_EQ(gated.w_down, count(2, 3));
}

TEST(Expert, RefusesWeightsOfOtherShapes) {
  using Plain = moe::FeedForward<float>;
  using Gated = GatedFeedForward<float>;
  const Matrix<float> up = count(3, 2), down = count(2, 3);
  expect_refused([&] { Plain({.d_model = 2, .d_ff = 3}, down, down); },
                 "FeedForward: w_up has shape [2, 3], expected [3, 2]");
  expect_refused([&] { Plain({.d_model = 2, .d_ff = 3}, up, up); },
                 "FeedForward: w_down has shape [3, 2], expected [2, 3]");
  expect_refused([&] { Plain({.d_model = 0, .d_ff = 3}, up, down); },
                 "FeedForward: d_model = 0, expected at least 1");
  expect_refused([&] { Gated({.d_model = 2, .d_ff = 3}, down, up, down); },
                 "GatedFeedForward: w_gate has shape [2, 3], expected [3, 2]");
  expect_refused([&] { Gated({.d_model = 2, .d_ff = 3}, up, down, down); },
                 "GatedFeedForward: w_up has shape [2, 3], expected [3, 2]");
  expect_refused([&] { Gated({.d_model = 2, .d_ff = 3}, up, up, up); },
                 "GatedFeedForward: w_down has shape [3, 2], expected [2, 3]");
  expect_refused([&] { Gated({.d_model = 2, .d_ff = -1}, up, up, down); },
                 "GatedFeedForward: d_ff = -1, expected at least 1");
}

}  // namespace
}  // namespace storage_test
