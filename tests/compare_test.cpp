// SPDX-License-Identifier: MIT
#include "compare.hpp"

#include <gtest/gtest.h>

#include <limits>

#include <moe/core/types.hpp>

#include "laws.hpp"

namespace {

using moe::Index;
using moe::Matrix;

TEST(Compare, MeasuresTheLargestDifference) {
  const Matrix<float> a{{1, 2, 3}, {4, 5, 6}}, b{{1, 2, 3}, {4, 5, -8}};
  EXPECT_EQ(largest_difference(a, a), 0);
  EXPECT_EQ(largest_difference(a, b), 14);
  EXPECT_EQ(relative_error(a, b), 14.0 / 8);
  EXPECT_EQ(relative_error(a, b, 28), 0.5);
  EXPECT_EQ(relative_error(Matrix<float>(0, 3), Matrix<float>(0, 3)), 0);
  EXPECT_TRUE(laws::equal_to_rounding(a, a));
  EXPECT_FALSE(laws::equal_to_rounding(a, b));
}

TEST(Compare, NoticesWhatIsNotFiniteAtAnyPlaceInEither) {
  const Matrix<float> a = Matrix<float>::Constant(3, 5, 2);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    for (Index i = 0; i < a.size(); ++i) {
      Matrix<float> b = a, zero = Matrix<float>::Zero(3, 5);
      b.data()[i] = zero.data()[i] = bad;
      EXPECT_FALSE(largest_difference(a, b) < 1e30) << i;
      EXPECT_FALSE(largest_difference(b, a) < 1e30) << i;
      EXPECT_FALSE(largest_difference(b, b) < 1e30) << i;
      EXPECT_FALSE(relative_error(a, b) < 1e30) << i;
      EXPECT_FALSE(relative_error(b, a) < 1e30) << i;
      EXPECT_FALSE(relative_error(b, b) < 1e30) << i;
      EXPECT_FALSE(laws::equal_to_rounding(a, b)) << i;
      EXPECT_FALSE(laws::equal_to_rounding(b, a)) << i;
      EXPECT_FALSE(all_zero(zero)) << i;
    }
}

TEST(Compare, NoticesOtherShapes) {
  EXPECT_FALSE(largest_difference(Matrix<float>(0, 3), Matrix<float>(0, 2)) < 1e30);
  EXPECT_FALSE(relative_error(Matrix<float>::Zero(2, 3), Matrix<float>::Zero(3, 2)) < 1e30);
}

}  // namespace
