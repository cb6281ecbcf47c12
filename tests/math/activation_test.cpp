// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <map>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/random.hpp>
#include <moe/math/activation.hpp>

namespace activation_test {
namespace {

using moe::Index;
using moe::Vector;

TEST(Activation, ReluIsZeroUpToZero) {
  const moe::ReLU relu;
  EXPECT_EQ(relu.forward(2.5), 2.5);
  EXPECT_EQ(relu.forward(0.0), 0.0);
  EXPECT_EQ(relu.forward(-3.0), 0.0);
  EXPECT_EQ(relu.derivative(1e-300), 1.0);
  EXPECT_EQ(relu.derivative(0.0), 0.0);
  EXPECT_EQ(relu.derivative(-1.0), 0.0);
}

// Values from the formulas, computed with Python's math module.
TEST(Activation, KnownValues) {
  EXPECT_DOUBLE_EQ(moe::GELU{}.forward(1.0), 0.8413447460685429);
  EXPECT_NEAR(moe::GELU{}.forward(-2.5), -0.015524163314440398, 1e-16);
  EXPECT_DOUBLE_EQ(moe::GELU{}.forward(0.3), 0.18537342665668577);
  EXPECT_DOUBLE_EQ(moe::GELUTanh{}.forward(1.0), 0.8411919906082768);
  EXPECT_NEAR(moe::GELUTanh{}.forward(-2.5), -0.015084266089998577, 1e-16);
  EXPECT_DOUBLE_EQ(moe::GELUTanh{}.forward(0.3), 0.18537092354275922);
  EXPECT_DOUBLE_EQ(moe::SiLU{}.forward(1.0), 0.7310585786300049);
  EXPECT_DOUBLE_EQ(moe::SiLU{}.forward(-2.0), -0.2384058440442351);
  EXPECT_DOUBLE_EQ(moe::SwiGLU{}.forward(1.0, 3.0), 3 * 0.7310585786300049);
  EXPECT_DOUBLE_EQ(moe::GEGLU{}.forward(1.0, -2.0), -2 * 0.8413447460685429);
  EXPECT_DOUBLE_EQ(moe::GEGLUTanh{}.forward(1.0, -2.0), -2 * 0.8411919906082768);
  EXPECT_DOUBLE_EQ(moe::ReGLU{}.forward(-1.0, 5.0), 0.0);
  EXPECT_DOUBLE_EQ(moe::ReGLU{}.forward(2.0, 5.0), 10.0);
}

// openai/gpt-oss, model.py, swiglu(): computed in double.
TEST(Activation, ClampedSwigluIsThatOfGptOss) {
  const moe::ClampedSwiGLU glu;
  EXPECT_DOUBLE_EQ(glu.forward(1.0, 0.5), 1.268693648899232);
  EXPECT_DOUBLE_EQ(glu.forward(9.0, -9.0), -41.99971876981991);
  EXPECT_NEAR(glu.forward(-9.0, 9.0), -1.602542389246808e-05, 1e-18);
}

TEST(Activation, ClampedSwigluHasNoSlopeBeyondItsClampsAndItsOwnWithinThem) {
  const moe::ClampedSwiGLU glu;
  EXPECT_EQ(glu.derivative(7.5, 1.0).by_gate, 0);
  EXPECT_NE(glu.derivative(7.5, 1.0).by_up, 0);
  EXPECT_EQ(glu.derivative(1.0, 7.5).by_up, 0);
  EXPECT_EQ(glu.derivative(1.0, -7.5).by_up, 0);
  EXPECT_NE(glu.derivative(1.0, 7.5).by_gate, 0);
  // The ends themselves count as inside, as in torch.clamp; the gate has no lower clamp.
  EXPECT_NE(glu.derivative(7.0, 1.0).by_gate, 0);
  EXPECT_NE(glu.derivative(1.0, 7.0).by_up, 0);
  EXPECT_NE(glu.derivative(1.0, -7.0).by_up, 0);
  EXPECT_NE(glu.derivative(-9.0, 1.0).by_gate, 0);
}

TEST(Activation, ClampedSwigluFollowsItsMembers) {
  const moe::ClampedSwiGLU plain{.alpha = 1, .limit = 1e9, .offset = 0};
  for (const double g : {-3.0, 0.2, 4.0})
    EXPECT_DOUBLE_EQ(plain.forward(g, 1.7), moe::SwiGLU{}.forward(g, 1.7));
  const moe::ClampedSwiGLU tight{.alpha = 1, .limit = 0.5, .offset = 0};
  EXPECT_DOUBLE_EQ(tight.forward(3.0, -2.0), moe::SwiGLU{}.forward(0.5, -0.5));
}

template <class A>
class UnaryActivation : public testing::Test {};
using Unary = testing::Types<moe::ReLU, moe::GELU, moe::GELUTanh, moe::SiLU>;
TYPED_TEST_SUITE(UnaryActivation, Unary);

TYPED_TEST(UnaryActivation, DerivativeIsTheDifferenceQuotient) {
  const TypeParam act;
  const double step = 1e-5;
  for (double x = -6.05; x < 6; x += 0.1)
    EXPECT_NEAR(act.derivative(x), (act.forward(x + step) - act.forward(x - step)) / (2 * step), 1e-9) << x;
}

template <class U>
class GatedActivation : public testing::Test {};
using Gated = testing::Types<moe::SwiGLU, moe::GEGLU, moe::GEGLUTanh, moe::ReGLU, moe::ClampedSwiGLU>;
TYPED_TEST_SUITE(GatedActivation, Gated);

TYPED_TEST(GatedActivation, DerivativesAreTheDifferenceQuotients) {
  const TypeParam glu;
  const double step = 1e-5;
  for (double g = -8.05; g < 9; g += 0.7) {
    for (double u = -9.03; u < 9; u += 0.9) {
      const auto slope = glu.derivative(g, u);
      EXPECT_NEAR(slope.by_gate, (glu.forward(g + step, u) - glu.forward(g - step, u)) / (2 * step), 1e-7)
          << g << ' ' << u;
      EXPECT_NEAR(slope.by_up, (glu.forward(g, u + step) - glu.forward(g, u - step)) / (2 * step), 1e-7)
          << g << ' ' << u;
    }
  }
}

// ---- Arrays.

// Inputs of every size, with zeros, both signs and the tails.
template <class S>
Vector<S> inputs(Index n, std::uint64_t seed) {
  moe::Rng rng(seed);
  Vector<S> x(n);
  for (Index i = 0; i < n; ++i) x[i] = i % 11 == 0 ? S(0) : S(rng.normal() * std::exp(rng.uniform(-3, 4)));
  return x;
}

// A few ulp of the result; where terms cancel (1 + tanh, 1 + erf), of the terms.
template <class S>
void expect_close(S pack, S scalar, S terms) {
  EXPECT_NEAR(double(pack), double(scalar),
              16 * double(std::numeric_limits<S>::epsilon()) * double(std::abs(terms)) + 1e-34);
}

template <class A, class S>
void pack_form_equals_scalar_form(const A& act) {
  const Index n = 1000;
  const Vector<S> x = inputs<S>(n, 5);
  Vector<S> out(n), d = Vector<S>::Ones(n);
  moe::activate(act, n, x.data(), out.data());
  moe::activate_backward(act, n, x.data(), d.data());
  for (Index i = 0; i < n; ++i) {
    expect_close(out[i], act.forward(x[i]), x[i]);
    expect_close(d[i], act.derivative(x[i]), S(1) + std::min(std::abs(x[i] * x[i]), S(100)));
  }
}

// However large a finite argument is, its value and slope are their limits, not 0 times infinity.
template <class S, class A>
void expect_limits(const A& activation) {
  for (const S size : {S(1e5), S(1e15), S(2e19), S(1e30), std::numeric_limits<S>::max()})
    for (const S x : {size, -size}) {
      std::vector<S> in(16, x), y(16), d(16, S(1));
      moe::activate(activation, Index(16), in.data(), y.data());
      moe::activate_backward(activation, Index(16), in.data(), d.data());
      // Packs have the smallest normal number for exp of minus infinity.
      const S limit = x > S(0) ? S(1) : S(0), rest = 100 * std::numeric_limits<S>::min();
      for (const S value : {activation.forward(x), y[3]}) EXPECT_EQ(value, limit * x) << x;
      for (const S slope : {activation.derivative(x), d[3]}) EXPECT_NEAR(slope, limit, rest) << x;
    }
}
TYPED_TEST(UnaryActivation, OfTheLargestNumbersHasItsLimits) {
  expect_limits<float>(TypeParam{});
  expect_limits<double>(TypeParam{});
}

TYPED_TEST(GatedActivation, OfTheLargestNumbersIsANumber) {
  const TypeParam glu;
  for (const float size : {1e15f, 2e19f, std::numeric_limits<float>::max()})
    for (const float g : {size, -size}) {
      const auto slope = glu.derivative(g, 0.5f);
      for (const float v : {glu.forward(g, 0.5f), slope.by_gate, slope.by_up})
        EXPECT_FALSE(std::isnan(v)) << g;
    }
}

TYPED_TEST(UnaryActivation, PackFormEqualsScalarForm) {
  pack_form_equals_scalar_form<TypeParam, float>({});
  pack_form_equals_scalar_form<TypeParam, double>({});
  pack_form_equals_scalar_form<TypeParam, long double>({});
}

template <class U, class S>
void gated_pack_form_equals_scalar_form(const U& glu) {
  const Index n = 1000;
  const Vector<S> g = inputs<S>(n, 6), u = inputs<S>(n, 7);
  Vector<S> out(n), d_g(n), d_u(n);
  const Vector<S> d = Vector<S>::Constant(n, S(-0.75));
  moe::activate_gated(glu, n, g.data(), u.data(), out.data());
  moe::activate_gated_backward(glu, n, g.data(), u.data(), d.data(), d_g.data(), d_u.data());
  for (Index i = 0; i < n; ++i) {
    const auto slope = glu.derivative(g[i], u[i]);
    const S by_gate_terms = (S(1) + std::min(std::abs(g[i] * g[i]), S(100))) * (S(1) + std::abs(u[i]));
    expect_close(out[i], glu.forward(g[i], u[i]), g[i] * (S(1) + std::abs(u[i])));
    expect_close(d_g[i], S(-0.75) * S(slope.by_gate), by_gate_terms);
    expect_close(d_u[i], S(-0.75) * S(slope.by_up), g[i]);
  }
}

TYPED_TEST(GatedActivation, PackFormEqualsScalarForm) {
  gated_pack_form_equals_scalar_form<TypeParam, float>({});
  gated_pack_form_equals_scalar_form<TypeParam, double>({});
  gated_pack_form_equals_scalar_form<TypeParam, long double>({});
}

template <class A, class S>
void results_do_not_depend_on_place(const A& act) {
  std::map<S, std::pair<S, S>> known;  // x -> value, slope
  const Vector<S> pool = inputs<S>(40, 8);
  moe::Rng rng(9);
  for (Index n = 1; n <= 70; ++n) {
    Vector<S> x(n), out(n), d = Vector<S>::Ones(n);
    for (S& v : x) v = pool[rng.index(40)];
    moe::activate(act, n, x.data(), out.data());
    moe::activate_backward(act, n, x.data(), d.data());
    for (Index i = 0; i < n; ++i) {
      const auto [at, first] = known.try_emplace(x[i], out[i], d[i]);
      ASSERT_EQ(out[i], at->second.first) << "place " << i << " of " << n;
      ASSERT_EQ(d[i], at->second.second) << "place " << i << " of " << n;
    }
  }
}

TYPED_TEST(UnaryActivation, AResultDoesNotDependOnItsPlaceOrOnTheLength) {
  results_do_not_depend_on_place<TypeParam, float>({});
  results_do_not_depend_on_place<TypeParam, double>({});
}

TYPED_TEST(GatedActivation, AResultDoesNotDependOnItsPlaceOrOnTheLength) {
  const TypeParam glu;
  std::map<float, std::vector<float>> known;  // g -> value, slopes; u is a function of g
  const Vector<float> pool = inputs<float>(40, 10);
  moe::Rng rng(11);
  for (Index n = 1; n <= 70; ++n) {
    Vector<float> g(n), out(n), d_g(n), d_u(n);
    for (float& v : g) v = pool[rng.index(40)];
    const Vector<float> u = (g.array() + 0.5f).matrix();
    const Vector<float> d = Vector<float>::Ones(n);
    moe::activate_gated(glu, n, g.data(), u.data(), out.data());
    moe::activate_gated_backward(glu, n, g.data(), u.data(), d.data(), d_g.data(), d_u.data());
    for (Index i = 0; i < n; ++i) {
      const std::vector<float> now{out[i], d_g[i], d_u[i]};
      ASSERT_EQ(now, known.try_emplace(g[i], now).first->second) << "place " << i << " of " << n;
    }
  }
}

TYPED_TEST(UnaryActivation, WorksInPlaceAndWritesNothingBeyondTheEnd) {
  const TypeParam act;
  for (const Index n : {0, 1, 15, 16, 17, 33}) {
    Vector<double> x = inputs<double>(n + 1, 12), expected(n);
    moe::activate(act, n, x.data(), expected.data());
    const double beyond = x[n];
    moe::activate(act, n, x.data(), x.data());
    EXPECT_TRUE((x.head(n).array() == expected.array()).all());
    EXPECT_EQ(x[n], beyond);
    Vector<double> d = Vector<double>::Constant(n + 1, 3);
    moe::activate_backward(act, n, expected.data(), d.data());
    EXPECT_EQ(d[n], 3);
  }
}

TYPED_TEST(GatedActivation, BackwardMayOverwriteTheGradientOfTheOutput) {
  const TypeParam glu;
  const Index n = 37;
  const Vector<float> g = inputs<float>(n, 13), u = inputs<float>(n, 14), d = inputs<float>(n, 15);
  Vector<float> d_g(n), d_u(n), both = d, other(n);
  moe::activate_gated_backward(glu, n, g.data(), u.data(), d.data(), d_g.data(), d_u.data());
  moe::activate_gated_backward(glu, n, g.data(), u.data(), both.data(), both.data(), other.data());
  EXPECT_TRUE((both.array() == d_g.array()).all());
  EXPECT_TRUE((other.array() == d_u.array()).all());
}

TEST(Activation, BackwardMultipliesByTheSlope) {
  const Index n = 20;
  const Vector<double> x = inputs<double>(n, 16);
  Vector<double> d = Vector<double>::LinSpaced(n, -1, 1), scaled = d;
  moe::activate_backward(moe::ReLU{}, n, x.data(), scaled.data());
  for (Index i = 0; i < n; ++i) EXPECT_EQ(scaled[i], x[i] > 0 ? d[i] : 0);
}

// ---- Activations of the user's own, with a scalar form only.

struct Softplus {
  double forward(double x) const { return std::log1p(std::exp(x)); }
  double derivative(double x) const { return 1 / (1 + std::exp(-x)); }
};

struct SquaredReLU {
  template <std::floating_point S>
  S forward(S x) const {
    return x > 0 ? x * x : 0;
  }
  template <std::floating_point S>
  S derivative(S x) const {
    return x > 0 ? 2 * x : 0;
  }
};

struct Bilinear {
  float forward(float g, float u) const { return g * u; }
  moe::GluDerivative<float> derivative(float g, float u) const { return {u, g}; }
};

// Takes anything, but what it does compiles for scalars only.
struct Unconstrained {
  template <class T>
  T forward(T x) const {
    return std::tanh(x);
  }
  template <class T>
  auto derivative(T x) const {
    return 1 - std::tanh(x) * std::tanh(x);
  }
};

// One that says that it takes packs: the scalar form is wrong on purpose.
struct Packed {
  static constexpr bool takes_packs = true;
  template <class T>
  T forward(const T& x) const {
    return T(x + x);
  }
  float forward(float) const { return -1; }
  template <class T>
  T derivative(const T& x) const {
    return T(x + x);
  }
};

TEST(Activation, ThoseThatTakePacksSaySo) {
  static_assert(moe::TakesPacks<moe::SwiGLU> && moe::TakesPacks<Packed>);
  static_assert(!moe::TakesPacks<Unconstrained> && !moe::TakesPacks<moe::Glu<Unconstrained>>);
  const Index n = 21;
  const Vector<float> x = inputs<float>(n, 19), u = inputs<float>(n, 20);
  Vector<float> out(n), d = Vector<float>::Ones(n);
  moe::activate(Unconstrained{}, n, x.data(), out.data());
  moe::activate_backward(Unconstrained{}, n, x.data(), d.data());
  for (Index i = 0; i < n; ++i) {
    EXPECT_EQ(out[i], std::tanh(x[i]));
    EXPECT_EQ(d[i], 1 - std::tanh(x[i]) * std::tanh(x[i]));
  }
  moe::activate_gated(moe::Glu<Unconstrained>{}, n, x.data(), u.data(), out.data());
  for (Index i = 0; i < n; ++i) EXPECT_EQ(out[i], std::tanh(x[i]) * u[i]);
  moe::activate(Packed{}, n, x.data(), out.data());
  for (Index i = 0; i < n; ++i) EXPECT_EQ(out[i], x[i] + x[i]);
}

TEST(Activation, OnesOfTheUserNeedTheScalarFormOnly) {
  for (const Index n : {1, 5, 16, 35}) {
    const Vector<float> x = inputs<float>(n, 17).cwiseMin(20.f), u = inputs<float>(n, 18);
    Vector<float> out(n), d = Vector<float>::Constant(n, 2);
    moe::activate(Softplus{}, n, x.data(), out.data());
    moe::activate_backward(Softplus{}, n, x.data(), d.data());
    for (Index i = 0; i < n; ++i) {
      EXPECT_EQ(out[i], float(Softplus{}.forward(double(x[i]))));
      EXPECT_EQ(d[i], 2 * float(Softplus{}.derivative(double(x[i]))));
    }
    moe::activate(SquaredReLU{}, n, x.data(), out.data());
    for (Index i = 0; i < n; ++i) EXPECT_EQ(out[i], x[i] > 0 ? x[i] * x[i] : 0);
    moe::activate_gated(Bilinear{}, n, x.data(), u.data(), out.data());
    Vector<float> d_g(n), d_u(n);
    moe::activate_gated_backward(Bilinear{}, n, x.data(), u.data(), out.data(), d_g.data(), d_u.data());
    for (Index i = 0; i < n; ++i) {
      EXPECT_EQ(out[i], x[i] * u[i]);
      EXPECT_EQ(d_g[i], out[i] * u[i]);
      EXPECT_EQ(d_u[i], out[i] * x[i]);
    }
  }
}

TEST(Activation, AnyUnaryOneMakesAGatedUnit) {
  const moe::Glu<Softplus> glu;
  EXPECT_DOUBLE_EQ(glu.forward(0.0, 3.0), 3 * std::log(2.0));
  EXPECT_DOUBLE_EQ(glu.derivative(0.0, 3.0).by_gate, 1.5);
  EXPECT_DOUBLE_EQ(glu.derivative(0.0, 3.0).by_up, std::log(2.0));
}

}  // namespace
}  // namespace activation_test
