// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <moe/moe.hpp>

#include "layers.hpp"

// Gradients of activations, experts and routers on their own; of layers that are unlike those of
// the other files here; and combinations without meaning.
namespace {

using namespace gradients;

// ---- Activations.

// Derivatives against central differences on [-9, 9], off the kinks.
template <class Activation>
void check_activation(const Activation& activation) {
  constexpr double h = 1e-5;
  for (double x = -9.003; x < 9; x += 0.01) {
    const double numeric = (activation.forward(x + h) - activation.forward(x - h)) / (2 * h);
    ASSERT_NEAR(double(activation.derivative(x)), numeric, 1e-8) << "at " << x;
    ASSERT_NEAR(double(activation.derivative(float(x))), numeric, 1e-5) << "at " << x;
  }
}

template <class Unit>
void check_unit(const Unit& unit) {
  constexpr double h = 1e-5;
  for (double g = -9.003; g < 9; g += 0.07) {
    for (double u = -9.0043; u < 9; u += 0.19) {
      const double by_gate = (unit.forward(g + h, u) - unit.forward(g - h, u)) / (2 * h);
      const double by_up = (unit.forward(g, u + h) - unit.forward(g, u - h)) / (2 * h);
      const auto derivative = unit.derivative(g, u);
      ASSERT_NEAR(double(derivative.by_gate), by_gate, 1e-7) << "at " << g << ", " << u;
      ASSERT_NEAR(double(derivative.by_up), by_up, 1e-7) << "at " << g << ", " << u;
      const auto single = unit.derivative(float(g), float(u));
      ASSERT_NEAR(double(single.by_gate), by_gate, 1e-4) << "at " << g << ", " << u;
      ASSERT_NEAR(double(single.by_up), by_up, 1e-4) << "at " << g << ", " << u;
    }
  }
}

// An activation and a unit as a user may write them: for one scalar at a time.
struct Softplus {
  double forward(double x) const { return std::log1p(std::exp(x)); }
  double derivative(double x) const { return 1 / (1 + std::exp(-x)); }
};
struct Bilinear {
  double forward(double g, double u) const { return g * u; }
  moe::GluDerivative<double> derivative(double g, double u) const { return {u, g}; }
};

}  // namespace

TEST(Gradients, OfActivationsAreTheirSlopes) {
  check_activation(moe::ReLU{});
  check_activation(moe::GELU{});
  check_activation(moe::GELUTanh{});
  check_activation(moe::SiLU{});
}

TEST(Gradients, OfGatedUnitsAreTheirSlopes) {
  check_unit(moe::SwiGLU{});
  check_unit(moe::GEGLU{});
  check_unit(moe::GEGLUTanh{});
  check_unit(moe::ReGLU{});
  check_unit(moe::ClampedSwiGLU{});
  check_unit(moe::ClampedSwiGLU{.alpha = 1.0, .limit = 0.5, .offset = 0.25});
}

// ---- Experts.

namespace {

// With biases and without, also wider than a vector register's worth of d_ff.
template <class Expert>
void check_expert(typename Expert::Options options) {
  Tally tally;
  Rng rng(21);
  for (const Index d_ff : {1, 5, 19}) {
    for (const bool bias : {false, true}) {
      options.d_model = kDModel;
      options.d_ff = d_ff;
      options.bias = bias;
      Expert expert(options, rng);
      randomise(expert, rng);
      tally.check(4, rng, [&](const Matrix<double>& x, moe::GradientReport& report) {
        Kinks kinks;
        for (Index i = 0; i < x.rows(); ++i) find_kinks(expert, &x(i, 0), 1e-5, kinks);
        tally.beyond_kinks += kinks.crossed;
        if (kinks.nearest <= 100) return false;
        report = moe::check_gradients(expert, x);
        EXPECT_EQ(report.checked, x.size() + moe::num_parameters(expert));
        return true;
      });
    }
  }
  EXPECT_EQ(tally.checks, 6);
}

}  // namespace

TEST(Gradients, OfFeedForwardExpertsAreExact) {
  check_expert<moe::FeedForward<double, moe::ReLU>>({});
  check_expert<moe::FeedForward<double, moe::GELU>>({});
  check_expert<moe::FeedForward<double, moe::GELUTanh>>({});
  check_expert<moe::FeedForward<double, moe::SiLU>>({});
  check_expert<moe::FeedForward<double, Softplus>>({});
}

TEST(Gradients, OfGatedExpertsAreExact) {
  check_expert<moe::GatedFeedForward<double, moe::SwiGLU>>({});
  check_expert<moe::GatedFeedForward<double, moe::GEGLU>>({});
  check_expert<moe::GatedFeedForward<double, moe::GEGLUTanh>>({});
  check_expert<moe::GatedFeedForward<double, moe::ReGLU>>({});
  check_expert<moe::GatedFeedForward<double, moe::ClampedSwiGLU>>({});
  check_expert<moe::GatedFeedForward<double, moe::ClampedSwiGLU>>({.glu = {.limit = 0.8}});
  check_expert<moe::GatedFeedForward<double, Bilinear>>({});
}

// ---- Routers.

namespace {

template <class Router>
void check_router(const Router& router, Rng& rng, Tally& tally) {
  for (const bool training : {true, false}) {
    for (const bool grouped : {true, false}) {
      moe::GradientCheckOptions options;
      if (training) options.rng = Rng(rng());
      if (grouped) {
        options.info.mask = moe::Mask::Constant(kTokens, true);
        options.info.mask[4] = false;
        options.info.group_begin = moe::IndexVector{{0, 0, 3, kTokens}};
      }
      tally.check(kTokens, rng, [&](const Matrix<double>& x, moe::GradientReport& report) {
        report = moe::check_gradients(router, x, options);
        EXPECT_EQ(report.checked, x.size() + moe::num_parameters(router));
        return true;
      });
    }
  }
}

// Every seating; make(seating, top_k) makes the router.
template <class Router, class Make>
void check_routers(const Make& make) {
  Tally tally;
  Rng rng(22);
  for (const Seating& seating : all_seatings()) {
    for (const Index top_k : {Index(1), Index(2), Index(3), kNumExperts}) {
      SCOPED_TRACE(name_of(seating) + ", top_k " + std::to_string(top_k));
      auto options = seated<typename Router::Options>(make(), seating);
      options.top_k = top_k;
      options.allow_constant_gate = true;
      Router router(options, rng);
      randomise(router, rng);
      check_router(router, rng, tally);
    }
  }
  EXPECT_EQ(tally.checks, 10 * 4 * 4);
  EXPECT_LE(tally.redraws, tally.checks / 2);
}

}  // namespace

TEST(Gradients, OfTopKRoutersAreExact) {
  using Router = moe::TopKRouter<double>;
  using Options = Router::Options;
  check_routers<Router>([] { return Options{.bias = true}; });
  check_routers<Router>([] { return Options{.jitter = 0.3}; });
  check_routers<Router>([] { return Options{.softmax_before_selection = false, .jitter = 0.3}; });
  check_routers<Router>([] { return Options{.renormalise = true, .bias = true}; });
  check_routers<Router>(
      [] { return Options{.renormalise = true, .jitter = 0.3, .renormalise_after_drop = true}; });
}

TEST(Gradients, OfNoisyTopKRoutersAreExact) {
  using Router = moe::NoisyTopKRouter<double>;
  using Options = Router::Options;
  check_routers<Router>([] { return Options{}; });
  check_routers<Router>([] { return Options{.noise_epsilon = 0, .renormalise_after_drop = true}; });
}

TEST(Gradients, OfExpertChoiceRoutersAreExact) {
  Tally tally;
  Rng rng(23);
  for (const double capacity : {0.0, 0.5, 1.0, 2.5, 4.0}) {
    SCOPED_TRACE("capacity " + std::to_string(capacity));
    moe::ExpertChoiceRouter<double> router(
        {.d_model = kDModel, .num_experts = kNumExperts, .capacity = capacity}, rng);
    check_router(router, rng, tally);
  }
  EXPECT_EQ(tally.checks, 5 * 4);
}

// ---- Layers of other shapes.

TEST(Gradients, AreExactWithOneExpert) {
  Tally tally;
  Rng rng(24);
  for (const bool before : {true, false}) {
    const moe::TopKRouter<double> router({.d_model = kDModel,
                                          .num_experts = 1,
                                          .top_k = 1,
                                          .softmax_before_selection = before,
                                          .training_capacity = 0.5},
                                         rng);
    check_all_layers<SwiGLUExpert>(router, rng, tally);
  }
  EXPECT_GT(tally.dropped, 0);
}

TEST(Gradients, AreExactWhereAllExpertsAreChosen) {
  Tally tally;
  Rng rng(25);
  for (const bool before : {true, false}) {
    const moe::TopKRouter<double> router(
        {.d_model = kDModel, .num_experts = 3, .top_k = 3, .softmax_before_selection = before}, rng);
    check_all_layers<SwiGLUExpert>(router, rng, tally);
  }
  moe::NoisyTopKRouter<double> router({.d_model = kDModel, .num_experts = 3, .top_k = 3}, rng);
  randomise(router, rng);
  check_all_layers<SwiGLUExpert>(router, rng, tally);
  EXPECT_GE(tally.checks, 3 * kLossesOfARouter * 2 / kEvery);
}

TEST(Gradients, AreExactWithUnavailableExperts) {
  Tally tally;
  Rng rng(26);
  for (const Seating& seating : all_seatings()) {
    SCOPED_TRACE(name_of(seating));
    // Of four experts two are left, one less than a token asks for.
    moe::TopKRouter<double> router(
        seated<moe::TopKRouter<double>::Options>({.top_k = 3, .bias = true}, seating), rng);
    router.b_router[0] = router.b_router[2] = -std::numeric_limits<double>::infinity();
    check_all_layers<SwiGLUExpert>(router, rng, tally);
    check_router(router, rng, tally);
  }
  EXPECT_GE(tally.checks, 10 * (kLossesOfARouter * 2 / kEvery + 4));
}

namespace {

// Gates that scale the experts' inputs.
struct InputGates {
  using Scalar = double;
  moe::TopKRouter<double> inner;

  Index d_model() const { return inner.d_model(); }
  Index num_experts() const { return inner.num_experts(); }
  void route(const moe::ConstMatrixRef<double>& x, const moe::BatchInfo& info,
             moe::Routing<double>& routing) const {
    inner.route(x, info, routing, moe::Sequential{});
    routing.plan.gate_side = moe::GateSide::input;
  }
  void backward(const moe::ConstMatrixRef<double>& x, const moe::Routing<double>& routing,
                const moe::RoutingGradient<double>& gradient, moe::MatrixRef<double> d_x,
                InputGates& grad) const {
    inner.backward(x, routing, gradient, d_x, grad.inner, moe::Sequential{});
  }
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::TopKRouter<double>::visit(f, self.inner...);
  }
};

}  // namespace

TEST(Gradients, AreExactWhereGatesScaleInputs) {
  Tally tally;
  Rng rng(27);
  for (const Seating& seating : all_seatings()) {
    SCOPED_TRACE(name_of(seating));
    const InputGates router{{seated<moe::TopKRouter<double>::Options>({.top_k = 2}, seating), rng}};
    for (const Shared shared : {Shared::none, Shared::plain})
      check_layer(make_layer<SwiGLUExpert>(router, shared, true, rng), {}, {}, rng, tally);
    tally.check(kTokens, rng, [&](const Matrix<double>& x, moe::GradientReport& report) {
      report = moe::check_gradients(router, x);
      return true;
    });
  }
  EXPECT_EQ(tally.checks, 10 * 3);
  EXPECT_GT(tally.dropped, 20);
}

// ---- Combinations without meaning.

TEST(Gradients, OfConstantGatesAreRefused) {
  Rng rng(28);
  const Matrix<double> x = Matrix<double>::Ones(kTokens, kDModel);
  const auto refuses = [&](const auto& router) {
    auto layer = make_layer<SwiGLUExpert>(router, Shared::none, false, rng);
    typename decltype(layer)::Cache cache;
    EXPECT_NO_THROW(layer.forward(x));
    EXPECT_THROW(layer.forward(x, rng, cache), std::invalid_argument);
    auto grad = moe::zeros_like(layer);
    layer.forward(x, cache);
    EXPECT_THROW(layer.backward(x, cache, grad), std::invalid_argument);
  };
  refuses(
      moe::TopKRouter<double>({.d_model = kDModel, .num_experts = 2, .top_k = 1, .renormalise = true}, rng));
  refuses(moe::TopKRouter<double>(
      {.d_model = kDModel, .num_experts = 2, .top_k = 1, .softmax_before_selection = false}, rng));
  refuses(moe::NoisyTopKRouter<double>({.d_model = kDModel, .num_experts = 2, .top_k = 1}, rng));
}

TEST(Gradients, OfExpertsThatChooseTheirNextBestTokenDoNotExist) {
  Rng rng(29);
  EXPECT_THROW(moe::ExpertChoiceRouter<double>(
                   {.d_model = kDModel, .num_experts = kNumExperts, .overflow = Overflow::next_best}, rng),
               std::invalid_argument);
}

TEST(Gradients, OfGatedSharedExpertsNeedSharedExpertsAndGatesOfOutputs) {
  Rng rng(30);
  const moe::TopKRouter<double> router({.d_model = kDModel, .num_experts = kNumExperts}, rng);
  using Layer = moe::MoELayer<SwiGLUExpert, moe::TopKRouter<double>>;
  EXPECT_THROW(Layer(make_experts<SwiGLUExpert>(kNumExperts, rng), router, {{}, true}),
               std::invalid_argument);
  const auto layer = make_layer<SwiGLUExpert>(InputGates{router}, Shared::gated, false, rng);
  EXPECT_THROW(layer.forward(Matrix<double>::Ones(kTokens, kDModel)), std::invalid_argument);
}

// ---- The check itself.

namespace {

// An expert whose backward pass forgets `lost` of one gradient.
struct Forgetful : SwiGLUExpert {
  using SwiGLUExpert::SwiGLUExpert;
  double lost = 0;

  void backward(const moe::ConstMatrixRef<double>& x, const moe::ConstMatrixRef<double>& d_y,
                moe::MatrixRef<double> cache, moe::MatrixRef<double> d_x, Forgetful& grad) const {
    SwiGLUExpert::backward(x, d_y, cache, d_x, grad);
    grad.w_up(1, 2) *= 1 - lost;
  }
};

}  // namespace

TEST(Gradients, ThatAreWrongInOneEntryAreNoticed) {
  Rng rng(31);
  Forgetful expert({.d_model = kDModel, .d_ff = kDFf}, rng);
  Matrix<double> x(4, kDModel);
  moe::fill_normal(x, 1.0, rng);
  EXPECT_LE(moe::check_gradients(expert, x).worst, kTolerance);
  expert.lost = 1e-3;
  const moe::GradientReport report = moe::check_gradients(expert, x);
  EXPECT_GT(report.worst, 10 * kTolerance);
  EXPECT_EQ(report.where, "w_up");
}
