// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <moe/experts/zero_computation_experts.hpp>
#include <moe/moe.hpp>

#include "expert_laws.hpp"
#include "reference_moe.hpp"

namespace laws {

// An expert with two vectors added to its output, under the names that the laws look for: the
// experts here have no such weights, and two of them none at all.
template <class Inner>
struct Beside {
  using Scalar = typename Inner::Scalar;
  Inner inner;
  moe::Vector<Scalar> w_up, w_down;

  moe::Index d_model() const { return inner.d_model(); }
  moe::Index cache_cols() const { return inner.cache_cols(); }
  void forward(const moe::ConstMatrixRef<Scalar>& x, moe::MatrixRef<Scalar> y) const {
    inner.forward(x, y);
    moe::add_bias(w_up, y);
    moe::add_bias(w_down, y);
  }
  void forward(const moe::ConstMatrixRef<Scalar>& x, moe::MatrixRef<Scalar> y,
               moe::MatrixRef<Scalar> cache) const {
    inner.forward(x, y, cache);
    moe::add_bias(w_up, y);
    moe::add_bias(w_down, y);
  }
  void backward(const moe::ConstMatrixRef<Scalar>& x, const moe::ConstMatrixRef<Scalar>& d_y,
                moe::MatrixRef<Scalar> cache, moe::MatrixRef<Scalar> d_x, Beside& grad) const {
    inner.backward(x, d_y, cache, d_x, grad.inner);
    moe::bias_backward(d_y, grad.w_up);
    moe::bias_backward(d_y, grad.w_down);
  }
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    Inner::visit(f, self.inner...);
    moe::visit_array(f, {"w_up"}, self.w_up...);
    moe::visit_array(f, {"w_down"}, self.w_down...);
  }
};

template <class Inner, class S>
moe::Vector<S> expert_output(const Beside<Inner>& expert, const moe::Vector<S>& x) {
  return reference::expert_output(expert.inner, x) + expert.w_up + expert.w_down;
}

}  // namespace laws

namespace {

using moe::BatchInfo;
using moe::Index;
using moe::Matrix;
using moe::Rng;
using moe::Vector;

template <class S>
using AnyKind = moe::VariantExpert<moe::GatedFeedForward<S>, moe::ZeroExpert<S>, moe::CopyExpert<S>,
                                   moe::ConstantExpert<S>>;

// Kind 0 is a GatedFeedForward, as in AnyKind.
template <class S>
AnyKind<S> make_kind(Index kind, Index d_model, Index d_ff, Rng& rng) {
  switch (kind) {
    case 0:
      return moe::GatedFeedForward<S>({.d_model = d_model, .d_ff = d_ff}, rng);
    case 1:
      return moe::ZeroExpert<S>({.d_model = d_model}, rng);
    case 2:
      return moe::CopyExpert<S>({.d_model = d_model}, rng);
    default:
      return moe::ConstantExpert<S>({.d_model = d_model}, rng);
  }
}

}  // namespace

namespace laws {
namespace {

template <class Inner>
struct BesideOf {
  using Expert = Beside<Inner>;
  static Expert make(Index d_model, Index, Rng& rng) {
    using S = typename Inner::Scalar;
    return {Inner({.d_model = d_model}, rng), Vector<S>::Zero(d_model), Vector<S>::Zero(d_model)};
  }
};

// Each null expert at one of the laws' shapes at least, a GatedFeedForward where names are checked.
template <class S>
struct AnyKindOf {
  using Expert = AnyKind<S>;
  static Expert make(Index d_model, Index d_ff, Rng& rng) {
    return make_kind<S>((d_model + d_ff + 1) % 4, d_model, d_ff, rng);
  }
};

[[maybe_unused]] const bool null_experts_checked =
    check_experts<BesideOf<moe::ZeroExpert<float>>, BesideOf<moe::ZeroExpert<double>>,
                  BesideOf<moe::CopyExpert<float>>, BesideOf<moe::CopyExpert<double>>,
                  BesideOf<moe::ConstantExpert<float>>, BesideOf<moe::ConstantExpert<double>>,
                  AnyKindOf<float>, AnyKindOf<double>>("Null");

}  // namespace

}  // namespace laws

// ---- Each alone.

namespace {

static_assert(moe::TrainableExpert<moe::ZeroExpert<float>>);
static_assert(moe::TrainableExpert<moe::CopyExpert<float>>);
static_assert(moe::TrainableExpert<moe::ConstantExpert<float>>);
static_assert(std::copyable<moe::ZeroExpert<float>> && std::copyable<moe::CopyExpert<float>> &&
              std::copyable<moe::ConstantExpert<float>>);
static_assert(moe::TrainableExpert<AnyKind<float>> && std::copyable<AnyKind<double>>);

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class S>
Matrix<S> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  Rng rng(seed);
  Matrix<S> m(rows, cols);
  moe::fill_normal(m, 1.0, rng);
  return m;
}

// The output and the gradient by x; the parameters' is added to grad.
template <class E>
std::pair<Matrix<double>, Matrix<double>> run(const E& expert, const Matrix<double>& x,
                                              const Matrix<double>& d_y, E& grad) {
  Matrix<double> y = Matrix<double>::Constant(x.rows(), x.cols(), kNaN), d_x = y;
  Matrix<double> cache(x.rows(), expert.cache_cols());
  expert.forward(x, y, cache);
  expert.backward(x, d_y, cache, d_x, grad);
  Matrix<double> inference = Matrix<double>::Constant(x.rows(), x.cols(), kNaN);
  expert.forward(x, inference);
  EXPECT_EQ(inference, y);
  return {y, d_x};
}

}  // namespace

TEST(NullExperts, ZeroGivesZeroWhateverItGets) {
  moe::ZeroExpert<double> expert({.d_model = 3}), grad = moe::zeros_like(expert);
  Matrix<double> x = random_matrix<double>(4, 3, 1);
  x(1, 2) = kNaN;
  const auto [y, d_x] = run(expert, x, random_matrix<double>(4, 3, 2), grad);
  EXPECT_EQ(y, Matrix<double>::Zero(4, 3));
  EXPECT_EQ(d_x, Matrix<double>::Zero(4, 3));
}

TEST(NullExperts, CopyGivesWhatItGets) {
  moe::CopyExpert<double> expert({.d_model = 3}), grad = moe::zeros_like(expert);
  const Matrix<double> x = random_matrix<double>(4, 3, 1), d_y = random_matrix<double>(4, 3, 2);
  const auto [y, d_x] = run(expert, x, d_y, grad);
  EXPECT_EQ(y, x);
  EXPECT_EQ(d_x, d_y);
}

TEST(NullExperts, ConstantGivesValuesKnownByHand) {
  // Logits (log 3, 0): the shares are 3/4 of x and 1/4 of v.
  const double log3 = std::log(3.0);
  moe::ConstantExpert<double> expert({.d_model = 2});
  expert.w_c << log3, 0, 0, 0;
  expert.v << 10, 20;
  auto grad = moe::zeros_like(expert);
  const auto [y, d_x] = run(expert, Matrix<double>{{1, 0}}, Matrix<double>{{1, 2}}, grad);
  EXPECT_NEAR(y(0, 0), 0.75 * 1 + 0.25 * 10, 1e-14);
  EXPECT_NEAR(y(0, 1), 0.25 * 20, 1e-14);
  // By the shares: (1, 50), on average 13.25. By the logits: -9.1875 and 9.1875.
  EXPECT_NEAR(d_x(0, 0), 0.75 * 1 - 9.1875 * log3, 1e-13);
  EXPECT_NEAR(d_x(0, 1), 0.75 * 2, 1e-13);
  EXPECT_TRUE(grad.w_c.isApprox(Matrix<double>{{-9.1875, 0}, {9.1875, 0}}, 1e-14));
  EXPECT_TRUE(grad.v.isApprox(Vector<double>{{0.25, 0.5}}, 1e-14));
}

TEST(NullExperts, ConstantStandsLargeLogits) {
  moe::ConstantExpert<double> expert({.d_model = 2});
  expert.w_c << 1000, 0, 0, 1000;
  expert.v << 5, 7;
  auto grad = moe::zeros_like(expert);
  const Matrix<double> x{{3, 0}, {0, 3}};
  const auto [y, d_x] = run(expert, x, Matrix<double>::Ones(2, 2), grad);
  EXPECT_EQ(y, (Matrix<double>{{3, 0}, {5, 7}}));
  EXPECT_EQ(d_x, (Matrix<double>{{1, 1}, {0, 0}}));
}

TEST(NullExperts, HaveExactGradients) {
  Rng rng(3);
  const auto check = [](const auto& expert) {
    const auto report = moe::check_gradients(expert, random_matrix<double>(4, expert.d_model(), 4));
    EXPECT_LE(report.worst, 1e-6) << report.where << ": " << report.analytic << ", by differences "
                                  << report.numeric;
    EXPECT_EQ(report.crossed, 0);
    EXPECT_EQ(report.checked, 4 * expert.d_model() + moe::num_parameters(expert));
  };
  for (const Index d_model : {1, 3, 21}) {
    SCOPED_TRACE(d_model);
    check(moe::ZeroExpert<double>({.d_model = d_model}));
    check(moe::CopyExpert<double>({.d_model = d_model}));
    check(moe::ConstantExpert<double>({.d_model = d_model}, rng));
    for (Index kind = 0; kind < 4; ++kind) check(make_kind<double>(kind, d_model, 5, rng));
  }
}

TEST(NullExperts, KeepNothingAndHaveFewParameters) {
  Rng rng(5);
  const auto zeros = moe::make_experts<moe::ZeroExpert<float>>(2, {.d_model = 40}, rng);
  const auto copies = moe::make_experts<moe::CopyExpert<float>>(2, {.d_model = 40}, rng);
  EXPECT_EQ(rng(), Rng(5)());  // nothing drawn
  const auto constants = moe::make_experts<moe::ConstantExpert<float>>(2, {.d_model = 40}, rng);
  EXPECT_NE(constants[0].v, constants[1].v);
  for (const Index cols : {zeros[0].cache_cols(), copies[0].cache_cols(), constants[0].cache_cols()})
    EXPECT_EQ(cols, 0);
  EXPECT_EQ(moe::num_parameters(zeros[0]), 0);
  EXPECT_EQ(moe::num_parameters(copies[0]), 0);
  EXPECT_EQ(moe::num_parameters(constants[0]), 3 * 40);
  EXPECT_EQ(moe::zeros_like(zeros[0]).d_model(), 40);
  EXPECT_EQ(moe::zeros_like(copies[0]).d_model(), 40);
  const auto like = moe::zeros_like(constants[0]);
  EXPECT_EQ(like.d_model(), 40);
  EXPECT_EQ(like.w_c.norm() + like.v.norm(), 0);
}

TEST(NullExperts, ConstantStartsFromZerosOrFromNormalParameters) {
  const moe::ConstantExpert<double> empty({.d_model = 1000});
  EXPECT_EQ(empty.w_c.norm() + empty.v.norm(), 0);
  Rng rng(6);
  const moe::ConstantExpert<double> drawn({.d_model = 1000}, rng);
  EXPECT_NEAR(drawn.w_c.squaredNorm() / 2, 1, 0.15);
  EXPECT_NEAR(drawn.v.squaredNorm() / 1000, 1, 0.15);
}

// ---- What does not fit.

namespace {

template <class E>
std::string refusal(const E& make) {
  try {
    make();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

template <class E>
void expect_refusals(const std::string& name) {
  for (const Index d_model : {Index(0), Index(-1)}) {
    const std::string expected = name + ": d_model = " + std::to_string(d_model) + ", expected at least 1";
    Rng rng(7);
    EXPECT_EQ(refusal([&] { E({.d_model = d_model}); }), expected);
    EXPECT_EQ(refusal([&] { E({.d_model = d_model}, rng); }), expected);
  }
  Rng rng(7);
  const E expert({.d_model = 3}, rng);
  E grad = moe::zeros_like(expert), narrow_grad({.d_model = 2});
  const Matrix<double> x = random_matrix<double>(4, 3, 8), narrow = random_matrix<double>(4, 2, 8),
                       shorter = random_matrix<double>(3, 3, 8);
  Matrix<double> y(4, 3), y_short(3, 3), y_narrow(4, 2);
  Matrix<double> cache(4, 0), cache_wide(4, 1), cache_short(3, 0);
  EXPECT_EQ(refusal([&] { expert.forward(narrow, y); }),
            name + "::forward: x has shape [4, 2], expected [4, 3]");
  EXPECT_EQ(refusal([&] { expert.forward(x, y_short); }),
            name + "::forward: y has shape [3, 3], expected [4, 3]");
  EXPECT_EQ(refusal([&] { expert.forward(x, y_narrow); }),
            name + "::forward: y has shape [4, 2], expected [4, 3]");
  EXPECT_THROW(expert.forward(narrow, y, cache), std::invalid_argument);
  EXPECT_THROW(expert.forward(x, y_short, cache), std::invalid_argument);
  EXPECT_THROW(expert.forward(x, y, cache_wide), std::invalid_argument);
  EXPECT_THROW(expert.forward(x, y, cache_short), std::invalid_argument);
  EXPECT_THROW(expert.backward(narrow, x, cache, y, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, shorter, cache, y, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, narrow, cache, y, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, x, cache_wide, y, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, x, cache_short, y, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, x, cache, y_short, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, x, cache, y_narrow, grad), std::invalid_argument);
  EXPECT_THROW(expert.backward(x, x, cache, y, narrow_grad), std::invalid_argument);
  EXPECT_EQ(refusal([&] { expert.backward(x, x, cache, y, grad); }), "accepted");
}

}  // namespace

TEST(NullExperts, RefuseWhatDoesNotFit) {
  expect_refusals<moe::ZeroExpert<double>>("ZeroExpert");
  expect_refusals<moe::CopyExpert<double>>("CopyExpert");
  expect_refusals<moe::ConstantExpert<double>>("ConstantExpert");
}

// ---- In a layer.

namespace {

template <class S>
using Layer = moe::MoELayer<AnyKind<S>, moe::TopKRouter<S>>;

// Two experts of each kind of AnyKind, behind each other; a gated shared one of each kind too where
// asked for.
template <class S>
Layer<S> layer_of_all_kinds(Index d_model, bool shared, Rng& rng) {
  const auto four = [&](Index d_ff) {
    std::vector<AnyKind<S>> experts;
    for (Index kind = 0; kind < 4; ++kind) experts.push_back(make_kind<S>(kind, d_model, d_ff, rng));
    return experts;
  };
  std::vector<AnyKind<S>> experts = four(5);
  for (AnyKind<S>& expert : four(7)) experts.push_back(std::move(expert));
  moe::SharedExperts<AnyKind<S>> beside;
  if (shared) beside = {four(3), true};
  Layer<S> layer(std::move(experts),
                 moe::TopKRouter<S>({.d_model = d_model, .num_experts = 8, .top_k = 2}, rng),
                 std::move(beside), shared);
  Layer<S>::visit([&](const moe::ParameterInfo&, auto& p) { moe::fill_normal(p, 0.5, rng); }, layer);
  return layer;
}

bool every_expert_has_rows(const moe::DispatchPlan<double>& plan) {
  for (Index e = 0; e < plan.num_experts(); ++e)
    if (plan.rows_of(e) == 0) return false;
  return true;
}

}  // namespace

TEST(NullExpertsInALayer, GiveTheReferencesOutput) {
  Rng rng(9);
  for (const bool shared : {false, true}) {
    const Layer<double> layer = layer_of_all_kinds<double>(6, shared, rng);
    const Matrix<double> x = random_matrix<double>(60, 6, 10);
    const auto routing = layer.route(x);
    EXPECT_TRUE(every_expert_has_rows(routing.plan));
    const auto list = [](auto experts) {
      return std::vector<AnyKind<double>>(experts.begin(), experts.end());
    };
    const Matrix<double> expected =
        reference::layer_output(x, list(layer.experts()), list(layer.shared_experts()), layer.w_shared_gate,
                                layer.b_output, routing.plan);
    const Matrix<double> y = layer.forward(x);
    EXPECT_TRUE(y.isApprox(expected, 1e-12));
    Layer<double>::Cache cache;
    EXPECT_EQ(layer.forward(x, cache), y);
  }
}

TEST(NullExpertsInALayer, HaveExactGradients) {
  for (const bool shared : {false, true}) {
    SCOPED_TRACE(shared);
    Rng rng(11);
    const Layer<double> layer = layer_of_all_kinds<double>(3, shared, rng);
    moe::GradientReport report;
    report.crossed = 1;
    Matrix<double> x(14, 3);
    for (int draw = 0; draw < 200 && report.crossed > 0; ++draw) {  // until no choice is near
      moe::fill_normal(x, 1.0, rng);
      if (!every_expert_has_rows(layer.route(x).plan)) continue;
      report = moe::check_gradients(layer, x, {},
                                    [](const auto& routing) { return moe::load_balancing_loss(routing); });
    }
    EXPECT_EQ(report.crossed, 0);
    EXPECT_EQ(report.checked, x.size() + moe::num_parameters(layer));
    EXPECT_LE(report.worst, 1e-6) << report.where << ": " << report.analytic << ", by differences "
                                  << report.numeric;
  }
}

namespace {

// What a step of inference and one of training compute.
template <class LayerType>
struct Step {
  Matrix<float> inference, y, d_x;
  std::vector<Matrix<float>> gradients;

  template <class Executor>
  Step(const LayerType& layer, const Matrix<float>& x, const BatchInfo& info, const Executor& executor) {
    typename LayerType::Cache cache;
    LayerType grad = moe::zeros_like(layer);
    inference = layer.forward(x, info, executor);
    y = layer.forward(x, cache, info, executor);
    d_x = layer.backward(y, cache, grad, {}, executor);
    LayerType::visit([&](const moe::ParameterInfo&, const auto& g) { gradients.push_back(Matrix<float>(g)); },
                     grad);
  }
};

template <class LayerType>
void expect_same(const Step<LayerType>& a, const Step<LayerType>& b) {
  EXPECT_TRUE(laws::same_bits(a.inference, b.inference));
  EXPECT_TRUE(laws::same_bits(a.y, b.y));
  EXPECT_TRUE(laws::same_bits(a.d_x, b.d_x));
  ASSERT_EQ(a.gradients.size(), b.gradients.size());
  for (std::size_t i = 0; i < a.gradients.size(); ++i)
    EXPECT_TRUE(laws::same_bits(a.gradients[i], b.gradients[i])) << "parameter " << i;
}

}  // namespace

#ifdef _OPENMP
TEST(NullExpertsInALayer, AreTheSameForEveryNumberOfThreads) {
  for (const bool shared : {false, true}) {
    Rng rng(12);
    const Layer<float> layer = layer_of_all_kinds<float>(19, shared, rng);
    const Matrix<float> x = random_matrix<float>(900, 19, 13);  // some experts have several tasks
    BatchInfo info;
    info.mask = moe::Mask::Constant(x.rows(), true);
    info.mask[17] = false;
    const Step<Layer<float>> expected(layer, x, info, moe::Sequential{});
    for (const int threads : {1, 2, 3, 8}) {
      SCOPED_TRACE(threads);
      expect_same(Step<Layer<float>>(layer, x, info, moe::OpenMP{threads}), expected);
    }
  }
}
#endif

TEST(NullExpertsInALayer, KeepAPoisonedTokenToItself) {
  for (const bool shared : {false, true}) {
    Rng rng(14);
    const Layer<float> layer = layer_of_all_kinds<float>(9, shared, rng);
    const Matrix<float> clean = random_matrix<float>(80, 9, 15);
    BatchInfo masked;
    masked.mask = moe::Mask::Constant(clean.rows(), true);
    for (const Index t : {0, 33, 79}) masked.mask[t] = false;
    const Step<Layer<float>> expected(layer, clean, masked, moe::Sequential{});
    for (const float poison :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
          -std::numeric_limits<float>::infinity()}) {
      SCOPED_TRACE(poison);
      Matrix<float> x = clean;
      for (const Index t : {0, 33, 79}) x(t, t % 9) = poison;
      Step<Layer<float>> step(layer, x, {}, moe::Sequential{});
      for (const Index t : {0, 33, 79}) {  // NaN here, zero for a masked token
        for (Matrix<float>* y : {&step.inference, &step.y}) {
          EXPECT_TRUE(y->row(t).array().isNaN().all());
          y->row(t).setZero();
        }
      }
      expect_same(step, expected);
    }
  }
}

TEST(NullExpertsInALayer, DoNotSeeWhatABufferHeldBefore) {
  Rng rng(20);
  const Layer<float> layer = layer_of_all_kinds<float>(7, true, rng);
  const Matrix<float> x = random_matrix<float>(50, 7, 21), larger = random_matrix<float>(90, 7, 22);
  const moe::Sequential sequential;
  Layer<float>::Workspace workspace;
  Layer<float>::Cache cache;
  Layer<float> grad = moe::zeros_like(layer), other_grad = grad;
  Matrix<float> inference, y, d_x;
  layer.forward(larger, inference, workspace, {}, sequential);
  layer.forward(larger, y, cache, {}, sequential);
  layer.backward(y, cache, other_grad, {}, d_x, sequential);
  layer.forward(x, inference, workspace, {}, sequential);
  layer.forward(x, y, cache, {}, sequential);
  layer.backward(y, cache, grad, {}, d_x, sequential);
  const Step<Layer<float>> fresh(layer, x, {}, sequential);
  EXPECT_TRUE(laws::same_bits(inference, fresh.inference));
  EXPECT_TRUE(laws::same_bits(y, fresh.y));
  EXPECT_TRUE(laws::same_bits(d_x, fresh.d_x));
}

TEST(NullExpertsInALayer, MayBeAllThatThereIs) {
  const Matrix<float> x = random_matrix<float>(300, 8, 16);
  Rng rng(17);
  const moe::TopKRouter<float> router({.d_model = 8, .num_experts = 3, .renormalise = true}, rng);
  using Zeros = moe::MoELayer<moe::ZeroExpert<float>, moe::TopKRouter<float>>;
  using Copies = moe::MoELayer<moe::CopyExpert<float>, moe::TopKRouter<float>>;
  using Constants = moe::MoELayer<moe::ConstantExpert<float>, moe::TopKRouter<float>>;
  const Zeros zeros(moe::make_experts<moe::ZeroExpert<float>>(3, {.d_model = 8}, rng), router);
  const Copies copies(moe::make_experts<moe::CopyExpert<float>>(3, {.d_model = 8}, rng), router);
  const Constants constants(moe::make_experts<moe::ConstantExpert<float>>(3, {.d_model = 8}, rng), router);
  EXPECT_EQ(moe::num_parameters(zeros), 3 * 8);  // the router's
  EXPECT_EQ(moe::num_parameters(copies), 3 * 8);
  EXPECT_EQ(moe::num_parameters(constants), 3 * 8 + 3 * 3 * 8);

  const Step<Zeros> zero(zeros, x, {}, moe::Sequential{});
  EXPECT_TRUE((zero.y.array() == 0).all() && (zero.inference.array() == 0).all());
  EXPECT_TRUE((zero.d_x.array() == 0).all() && (zero.gradients[0].array() == 0).all());
  const Step<Copies> copy(copies, x, {}, moe::Sequential{});
  EXPECT_TRUE(copy.y.isApprox(x, 1e-6f));  // gates that sum to 1
  EXPECT_EQ(copy.inference, copy.y);
  EXPECT_TRUE(copy.d_x.isApprox(copy.y, 1e-5f));
  const Step<Constants> constant(constants, x, {}, moe::Sequential{});
  EXPECT_EQ(constant.inference, constant.y);
#ifdef _OPENMP
  expect_same(Step<Zeros>(zeros, x, {}, moe::OpenMP{3}), zero);
  expect_same(Step<Copies>(copies, x, {}, moe::OpenMP{3}), copy);
  expect_same(Step<Constants>(constants, x, {}, moe::OpenMP{3}), constant);
#endif
}

TEST(NullExpertsInALayer, MayGetNoTokens) {
  Rng rng(18);
  const Layer<float> layer = layer_of_all_kinds<float>(5, true, rng);
  const Step<Layer<float>> step(layer, Matrix<float>(0, 5), {}, moe::Sequential{});
  EXPECT_EQ(step.y.rows() + step.inference.rows() + step.d_x.rows(), 0);
  for (const Matrix<float>& gradient : step.gradients) EXPECT_TRUE((gradient.array() == 0).all());
  EXPECT_EQ(layer.forward(random_matrix<float>(1, 5, 19)).rows(), 1);
}
