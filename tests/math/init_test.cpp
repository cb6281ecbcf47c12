// SPDX-License-Identifier: MIT
#include <cmath>

#include <gtest/gtest.h>

#include <moe/math/init.hpp>

namespace init_test {
namespace {

using moe::Index;
using moe::Matrix;
using moe::Rng;
using moe::Vector;

template <class M>
double mean_square(const M& m) {
  return m.template cast<double>().squaredNorm() / double(m.size());
}

TEST(Init, DrawsInRowMajorOrderWhateverTheStorage) {
  Rng a(1), b(1), c(1), expected(1);
  Matrix<double> rows(3, 4);
  Eigen::MatrixXd cols(3, 4);
  Matrix<float> singles(3, 4);
  moe::fill_normal(rows, 2.0, a);
  moe::fill_normal(cols, 2.0, b);
  moe::fill_normal(singles, 2.0, c);
  for (Index i = 0; i < 3; ++i) {
    for (Index j = 0; j < 4; ++j) {
      const double z = 2.0 * expected.normal();
      EXPECT_EQ(rows(i, j), z);
      EXPECT_EQ(cols(i, j), z);
      EXPECT_EQ(singles(i, j), float(z));
    }
  }
  EXPECT_EQ(a, expected);
  EXPECT_EQ(b, expected);
}

TEST(Init, FillsABlockAndLeavesTheRest) {
  Rng rng(2);
  Matrix<float> m = Matrix<float>::Constant(4, 4, 9);
  auto block = m.middleCols(1, 2);
  moe::fill_uniform(block, -1, 1, rng);
  EXPECT_TRUE((m.col(0).array() == 9).all());
  EXPECT_TRUE((m.col(3).array() == 9).all());
  EXPECT_TRUE((m.middleCols(1, 2).array() < 1).all());
}

TEST(Init, UniformFillsItsInterval) {
  Rng rng(3);
  Matrix<double> m(100, 100);
  moe::fill_uniform(m, 2, 5, rng);
  EXPECT_GE(m.minCoeff(), 2);
  EXPECT_LT(m.maxCoeff(), 5);
  EXPECT_NEAR(m.mean(), 3.5, 5 * std::sqrt(9.0 / 12 / 1e4));
}

// The mean square of n normal draws is within 5 sqrt(2 / n) of the variance, relatively.
TEST(Init, LecunHasVarianceOneOverTheInputs) {
  Rng rng(4);
  const Matrix<double> w = moe::lecun_normal<double>(200, 50, rng);
  ASSERT_EQ(w.rows(), 200);
  ASSERT_EQ(w.cols(), 50);
  EXPECT_NEAR(mean_square(w) * 50, 1, 5 * std::sqrt(2.0 / 1e4));
}

TEST(Init, HeHasVarianceTwoOverTheInputs) {
  Rng rng(5);
  const Matrix<float> w = moe::he_normal<float>(200, 50, rng);
  EXPECT_NEAR(mean_square(w) * 50 / 2, 1, 5 * std::sqrt(2.0 / 1e4));
}

TEST(Init, FloatAndDoubleDrawTheSameNumbers) {
  Rng a(6), b(6);
  const Matrix<float> single = moe::lecun_normal<float>(7, 3, a);
  const Matrix<double> twice = moe::lecun_normal<double>(7, 3, b);
  EXPECT_TRUE((single.array() == twice.cast<float>().array()).all());
}

TEST(Init, EmptyWeightsAreFine) {
  Rng rng(7);
  EXPECT_EQ(moe::lecun_normal<float>(3, 0, rng).size(), 0);
  EXPECT_EQ(moe::he_normal<float>(0, 3, rng).size(), 0);
  EXPECT_EQ(rng, Rng(7));
}

}  // namespace
}  // namespace init_test
