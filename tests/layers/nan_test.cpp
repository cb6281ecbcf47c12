// SPDX-License-Identifier: MIT
// A NaN stays one in every activation, forward and backward, plain and in the kernels of packed layers. Built
// twice: once more with -ffast-math; hence NaN are made and found as bits.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

namespace moe::nan_test {
namespace {

template <class S>
S nan_of(bool negative) {
  using Bits = std::conditional_t<sizeof(S) == 4, std::uint32_t, std::uint64_t>;
  const Bits quiet = std::bit_cast<Bits>(std::numeric_limits<S>::quiet_NaN());
  const Bits sign = Bits(1) << (8 * sizeof(S) - 1);
  const volatile Bits bits =
      (quiet & ~sign) | (negative ? sign : Bits(0));  // no constant that a compiler works with
  return std::bit_cast<S>(Bits(bits));
}
template <class S>
bool is_nan(S value) {
  return number_kind(value) == NumberKind::nan;
}

template <class A, class S>
struct Of {
  using Activation = A;
  using Scalar = S;
};

template <class T>
class UnaryNaN : public testing::Test {};
using Unary = testing::Types<Of<ReLU, float>, Of<GELU, float>, Of<GELUTanh, float>, Of<SiLU, float>,
                             Of<ReLU, double>, Of<GELU, double>, Of<GELUTanh, double>, Of<SiLU, double>>;
TYPED_TEST_SUITE(UnaryNaN, Unary);

// At every place of a pack and of what is left behind whole packs.
TYPED_TEST(UnaryNaN, StaysOneForwardAndBackward) {
  using S = typename TypeParam::Scalar;
  const typename TypeParam::Activation activation{};
  for (const bool negative : {false, true})
    for (Index place = 0; place < 21; ++place) {
      std::vector<S> x(21, S(0.5)), y(21), d(21, S(1));
      x[std::size_t(place)] = nan_of<S>(negative);
      activate(activation, Index(21), x.data(), y.data());
      activate_backward(activation, Index(21), x.data(), d.data());
      for (Index i = 0; i < 21; ++i) {
        EXPECT_EQ(is_nan(y[std::size_t(i)]), i == place) << i << ", " << place;
        EXPECT_EQ(is_nan(d[std::size_t(i)]), i == place) << i << ", " << place;
      }
      EXPECT_TRUE(is_nan(activation.forward(nan_of<S>(negative))));
      EXPECT_TRUE(is_nan(activation.derivative(nan_of<S>(negative))));
    }
}

template <class T>
class GatedNaN : public testing::Test {};
using Gated = testing::Types<Of<SwiGLU, float>, Of<GEGLU, float>, Of<GEGLUTanh, float>, Of<ReGLU, float>,
                             Of<ClampedSwiGLU, float>, Of<ReGLU, double>, Of<ClampedSwiGLU, double>>;
TYPED_TEST_SUITE(GatedNaN, Gated);

// In the gate or in the linear branch; the gradient by the one that holds it is NaN.
TYPED_TEST(GatedNaN, StaysOneForwardAndBackward) {
  using S = typename TypeParam::Scalar;
  const typename TypeParam::Activation unit{};
  for (const bool in_gate : {false, true})
    for (const bool negative : {false, true})
      for (const Index place : {0, 7, 15, 16, 20}) {
        std::vector<S> g(21, S(0.5)), u(21, S(0.25)), y(21), d(21, S(1)), d_u(21);
        (in_gate ? g : u)[std::size_t(place)] = nan_of<S>(negative);
        activate_gated(unit, Index(21), g.data(), u.data(), y.data());
        activate_gated_backward(unit, Index(21), g.data(), u.data(), d.data(), d.data(), d_u.data());
        for (Index i = 0; i < 21; ++i) EXPECT_EQ(is_nan(y[std::size_t(i)]), i == place) << i << ", " << place;
        EXPECT_TRUE(is_nan(d[std::size_t(place)])) << in_gate;
        if (in_gate || std::is_same_v<typename TypeParam::Activation, ClampedSwiGLU>) {
          EXPECT_TRUE(is_nan(d_u[std::size_t(place)])) << in_gate;
        }
      }
}

TEST(PackedNaN, StaysOneInTheActivationsOfEverySetOfKernels) {
  using kernels::Unit;
  for (const InstructionSet set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512}) {
    const kernels::Kernels* const table = kernels::find(set);
    if (table == nullptr) continue;
    for (const Unit unit : {Unit::relu, Unit::gelu, Unit::gelu_tanh, Unit::silu, Unit::clamped_swiglu})
      for (const bool gated : {false, true})
        for (const bool negative : {false, true})
          for (Index place = 0; place < table->columns; ++place) {
            if (unit == Unit::clamped_swiglu && !gated) continue;
            const kernels::Activation activation{unit, gated, 1.702f, 7, 1};
            std::vector<float> c(std::size_t(table->columns), 0.5f), out(c.size());
            c[std::size_t(place)] = nan_of<float>(negative);
            table->activate(activation, 1, c.data(), nullptr, out.data(), table->columns);
            const Index width = gated ? table->columns / 2 : table->columns;
            for (Index i = 0; i < width; ++i)
              EXPECT_EQ(is_nan(out[std::size_t(i)]), i == place % width)
                  << name_of(set) << ", unit " << int(unit) << ", " << gated << ", " << place << ", " << i;
          }
  }
}

// A diverged expert shows: in both layers the same tokens are NaN.
TEST(PackedNaN, OfAnExpertsWeightShowsInThePlainAndInThePackedLayer) {
  Rng rng(2);
  MoELayer layer{make_experts<GatedFeedForward<float, ReGLU>>(4, {.d_model = 8, .d_ff = 16}, rng),
                 TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 1}, rng)};
  layer.experts()[2].w_gate.setConstant(nan_of<float>(true));
  Matrix<float> x(50, 8);
  fill_normal(x, 1.0, rng);
  const auto routing = layer.route(x);
  const Matrix<float> y = layer.forward(x, routing);
  const auto packed = pack<F32>(layer);
  const Matrix<float> fast = packed.forward(x, routing);
  Index seen = 0;
  for (Index t = 0; t < x.rows(); ++t) {
    const bool diverged = trace(routing, t)[0].expert == 2;
    seen += diverged;
    for (Index j = 0; j < 8; ++j) {
      EXPECT_EQ(is_nan(y(t, j)), diverged) << t;
      EXPECT_EQ(is_nan(fast(t, j)), diverged) << t;
    }
  }
  EXPECT_GT(seen, 0);
}

}  // namespace
}  // namespace moe::nan_test
