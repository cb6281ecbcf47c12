// SPDX-License-Identifier: MIT
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/random.hpp>
#include <moe/math/softmax.hpp>

namespace softmax_test {
namespace {

using moe::Index;
using moe::Matrix;
using moe::NumberKind;
using moe::Vector;

template <class S>
constexpr S kInf = std::numeric_limits<S>::infinity();

template <class S>
Vector<S> softmax_of(const Vector<S>& logits) {
  Vector<S> probs(logits.size());
  moe::softmax(logits.size(), logits.data(), probs.data());
  return probs;
}

// Logits, their softmax and their log-sum-exp, computed with Python in double.
const Vector<double> kLogits{{1, .5, -.25, 2, -1, .75, 0, -2}};
const Vector<double> kProbs{{0.168261792, 0.102055936, 0.0482078106, 0.457382973, 0.0227717573, 0.131042416,
                             0.0619000541, 0.00837726136}};
constexpr double kLogSumExp = 2.7822342245942675;

template <class S>
class SoftmaxOf : public testing::Test {};
using Scalars = testing::Types<float, double, long double>;
TYPED_TEST_SUITE(SoftmaxOf, Scalars);

TYPED_TEST(SoftmaxOf, AKnownRowIsAsComputedElsewhere) {
  using S = TypeParam;
  const Vector<S> logits = kLogits.cast<S>(), p = softmax_of(logits);
  for (Index i = 0; i < 8; ++i) EXPECT_NEAR(double(p[i]), kProbs[i], 1e-7) << i;
  EXPECT_NEAR(double(moe::log_sum_exp(Index(8), logits.data())), kLogSumExp, sizeof(S) == 4 ? 1e-6 : 1e-15);
}

TYPED_TEST(SoftmaxOf, LargeLogitsDoNotOverflow) {
  using S = TypeParam;
  const S huge = std::numeric_limits<S>::max() / 2;
  const Vector<S> p = softmax_of(Vector<S>{{huge, -huge, huge}});
  EXPECT_EQ(p[0], S(0.5));
  EXPECT_EQ(p[1], S(0));
  EXPECT_EQ(p[2], S(0.5));
  const Vector<S> shifted{{10000, 10000 - std::log(S(3))}};
  EXPECT_NEAR(double(softmax_of(shifted)[0]), 0.75, 1e-3);  // 3 : 1
  const Vector<S> equal{{10000, 10000}};
  EXPECT_EQ(moe::log_sum_exp(Index(2), equal.data()), S(10000) + std::log(S(2)));
  const Vector<S> low{{-10000, -10000}};
  EXPECT_EQ(moe::log_sum_exp(Index(2), low.data()), S(-10000) + std::log(S(2)));
}

TYPED_TEST(SoftmaxOf, MinusInfinityGivesExactlyZeroAndCountsNothing) {
  using S = TypeParam;
  const Vector<S> with{{-kInf<S>, S(0.3), -kInf<S>, S(-1.7), S(2), -kInf<S>}};
  const Vector<S> without{{S(0.3), S(-1.7), S(2)}};
  const Vector<S> p = softmax_of(with), q = softmax_of(without);
  for (const Index i : {0, 2, 5}) {
    EXPECT_EQ(p[i], S(0));
    EXPECT_FALSE(std::signbit(p[i]));
  }
  EXPECT_EQ(p[1], q[0]);
  EXPECT_EQ(p[3], q[1]);
  EXPECT_EQ(p[4], q[2]);
  EXPECT_EQ(moe::log_sum_exp(Index(6), with.data()), moe::log_sum_exp(Index(3), without.data()));
}

TYPED_TEST(SoftmaxOf, OneFiniteLogitTakesAll) {
  using S = TypeParam;
  for (const S z : {S(0), S(-3), std::numeric_limits<S>::lowest()}) {
    const Vector<S> row{{-kInf<S>, z, -kInf<S>}};
    const Vector<S> p = softmax_of(row);
    EXPECT_EQ(p[0], S(0));
    EXPECT_EQ(p[1], S(1));
    EXPECT_EQ(p[2], S(0));
    EXPECT_EQ(moe::log_sum_exp(Index(3), row.data()), z);
  }
}

TYPED_TEST(SoftmaxOf, EqualLogitsGiveEqualBitsWhereverTheyStand) {
  using S = TypeParam;
  moe::Rng rng(1);
  for (Index n = 1; n <= 70; ++n) {
    Vector<S> z(n);
    for (S& v : z) v = S(rng.normal());
    const S repeated = S(rng.normal());
    std::vector<Index> places;
    for (Index i = 0; i < n; i += 1 + rng.index(5)) {
      z[i] = repeated;
      places.push_back(i);
    }
    const Vector<S> p = softmax_of(z);
    for (const Index i : places) EXPECT_EQ(p[i], p[places[0]]) << "place " << i << " of " << n;
  }
}

TYPED_TEST(SoftmaxOf, EqualLogitsShareExactlyWhereTheCountIsAPowerOfTwo) {
  using S = TypeParam;
  for (const Index n : {1, 2, 4, 8, 64, 256}) {
    const Vector<S> p = softmax_of(Vector<S>(Vector<S>::Constant(n, S(-4.2))));
    for (const S v : p) EXPECT_EQ(v, S(1) / S(n));
  }
}

TYPED_TEST(SoftmaxOf, RowsSumToOneAndWorkInPlace) {
  using S = TypeParam;
  moe::Rng rng(2);
  for (const Index n : {1, 3, 16, 17, 300}) {
    Vector<S> z(n);
    for (S& v : z) v = S(10 * rng.normal());
    const Vector<S> p = softmax_of(z);
    EXPECT_NEAR(double(p.sum()), 1.0, double(n) * double(std::numeric_limits<S>::epsilon()));
    EXPECT_GE(p.minCoeff(), S(0));
    moe::softmax(n, z.data(), z.data());
    EXPECT_TRUE((z.array() == p.array()).all());
  }
}

TYPED_TEST(SoftmaxOf, AMatrixIsItsRows) {
  using S = TypeParam;
  moe::Rng rng(3);
  Matrix<S> z(5, 7);
  for (S& v : z.reshaped()) v = S(rng.normal());
  const Matrix<S> p = moe::softmax(z);
  ASSERT_EQ(p.rows(), 5);
  ASSERT_EQ(p.cols(), 7);
  for (Index t = 0; t < 5; ++t) {
    const Vector<S> row = softmax_of(Vector<S>(z.row(t).transpose()));
    EXPECT_TRUE((p.row(t).transpose().array() == row.array()).all());
  }
  EXPECT_EQ(moe::softmax(Matrix<S>(0, 4)).rows(), 0);
  EXPECT_EQ(moe::softmax(Matrix<S>(3, 0)).cols(), 0);
}

TEST(Softmax, BackwardIsTheDifferenceQuotientAndAdds) {
  moe::Rng rng(4);
  const Index n = 9;
  Vector<double> z(n), weight(n);
  for (double& v : z) v = rng.normal();
  for (double& v : weight) v = rng.normal();
  z[4] = -kInf<double>;
  const Vector<double> p = softmax_of(z);
  Vector<double> d_z = Vector<double>::Constant(n, 0.5);
  moe::softmax_backward(n, p.data(), weight.data(), d_z.data());
  EXPECT_EQ(d_z[4], 0.5);  // no gradient to an unavailable one
  for (Index i = 0; i < n; ++i) {
    if (i == 4) continue;
    const double step = 1e-6;
    Vector<double> up = z, down = z;
    up[i] += step;
    down[i] -= step;
    const double numeric = (weight.dot(softmax_of(up)) - weight.dot(softmax_of(down))) / (2 * step);
    EXPECT_NEAR(d_z[i] - 0.5, numeric, 1e-9) << i;
  }
  EXPECT_NEAR(d_z.sum(), 0.5 * n, 1e-14);  // the same shift of all logits changes nothing
}

TEST(Softmax, TheGradientOfLogSumExpIsTheSoftmax) {
  const double step = 1e-6;
  const Vector<double> p = softmax_of(kLogits);
  for (Index i = 0; i < 8; ++i) {
    Vector<double> up = kLogits, down = kLogits;
    up[i] += step;
    down[i] -= step;
    const double numeric =
        (moe::log_sum_exp(Index(8), up.data()) - moe::log_sum_exp(Index(8), down.data())) / (2 * step);
    EXPECT_NEAR(p[i], numeric, 1e-9);
  }
}

TEST(Softmax, MaxFiniteSkipsWhatIsNotFinite) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float row[] = {nan, -kInf<float>, -3, kInf<float>, -2, nan};
  EXPECT_EQ(moe::max_finite(Index(6), row), -2);
}

template <class S>
class NumberKindOf : public testing::Test {};
TYPED_TEST_SUITE(NumberKindOf, Scalars);

TYPED_TEST(NumberKindOf, EveryKindIsRecognised) {
  using S = TypeParam;
  using Limits = std::numeric_limits<S>;
  for (const S v : {S(0), S(1), S(1e-3), Limits::max(), Limits::min(), Limits::denorm_min(),
                    Limits::min() / 2, Limits::epsilon()}) {
    EXPECT_EQ(moe::number_kind(v), NumberKind::finite) << v;
    EXPECT_EQ(moe::number_kind(-v), NumberKind::finite) << -v;
  }
  EXPECT_EQ(moe::number_kind(Limits::infinity()), NumberKind::infinite);
  EXPECT_EQ(moe::number_kind(-Limits::infinity()), NumberKind::infinite);
  EXPECT_EQ(moe::number_kind(Limits::quiet_NaN()), NumberKind::nan);
  EXPECT_EQ(moe::number_kind(-Limits::quiet_NaN()), NumberKind::nan);
  EXPECT_EQ(moe::number_kind(std::copysign(Limits::quiet_NaN(), S(-1))), NumberKind::nan);
}

TYPED_TEST(NumberKindOf, OnlyMinusInfinityIsUnavailable) {
  using S = TypeParam;
  using Limits = std::numeric_limits<S>;
  EXPECT_TRUE(moe::is_unavailable(-Limits::infinity()));
  for (const S v : {Limits::infinity(), Limits::lowest(), S(-1), S(0), Limits::quiet_NaN(),
                    std::copysign(Limits::quiet_NaN(), S(-1))})
    EXPECT_FALSE(moe::is_unavailable(v)) << v;
}

TEST(NumberKind, ReadsEveryPayloadOfNan) {
  for (const std::uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu})
    EXPECT_EQ(moe::number_kind(std::bit_cast<float>(bits)), NumberKind::nan) << std::hex << bits;
  for (const std::uint64_t bits : {0x7ff0000000000001u, 0xfff8000000000000u, 0xffffffffffffffffu})
    EXPECT_EQ(moe::number_kind(std::bit_cast<double>(bits)), NumberKind::nan) << std::hex << bits;
  EXPECT_EQ(moe::number_kind(std::bit_cast<float>(0x7f7fffffu)), NumberKind::finite);
  EXPECT_EQ(moe::number_kind(std::bit_cast<double>(0x7fefffffffffffffu)), NumberKind::finite);
}

}  // namespace
}  // namespace softmax_test
