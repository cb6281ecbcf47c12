// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/random.hpp>
#include <moe/math/top_k.hpp>

namespace top_k_test {
namespace {

using moe::Index;
using moe::IndexVector;
using moe::Vector;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

void expect_chosen(const Vector<double>& values, Index k, const std::vector<Index>& expected) {
  const IndexVector chosen = moe::top_k(values, k);
  EXPECT_EQ(std::vector<Index>(chosen.begin(), chosen.end()), expected);
}

TEST(TopK, TakesTheLargestBestFirst) {
  expect_chosen(Vector<double>{{1, .5, -.25, 2, -1, .75, 0, -2}}, 2, {3, 0});
  expect_chosen(Vector<double>{{1, .5, -.25, 2, -1, .75, 0, -2}}, 8, {3, 0, 5, 1, 6, 2, 4, 7});
}

TEST(TopK, GivesTiesToTheLowerIndex) {
  expect_chosen(Vector<double>{{1, 3, 3, 0}}, 1, {1});
  expect_chosen(Vector<double>{{1, 3, 3, 0}}, 2, {1, 2});
  expect_chosen(Vector<double>{{1, 3, 3, 0}}, 3, {1, 2, 0});
  expect_chosen(Vector<double>{{2, 2, 2, 2, 2}}, 3, {0, 1, 2});
  expect_chosen(Vector<double>{{0, -0.0, 0}}, 3, {0, 1, 2});  // both zeros are equal
}

TEST(TopK, PutsNanLastAndInfinitiesWhereTheyBelong) {
  expect_chosen(Vector<double>{{kNan, 1, kNan, 2}}, 4, {3, 1, 0, 2});
  expect_chosen(Vector<double>{{kNan, -kInf, kInf, -kNan}}, 4, {2, 1, 0, 3});
  expect_chosen(Vector<double>{{kNan, kNan, kNan}}, 2, {0, 1});
  expect_chosen(Vector<double>{{-kInf, kNan, -kInf}}, 3, {0, 2, 1});
}

TEST(TopK, OfZeroTakesNothingAndOfAllSorts) {
  expect_chosen(Vector<double>{{1, 2}}, 0, {});
  expect_chosen(Vector<double>{}, 0, {});
  expect_chosen(Vector<double>{{4}}, 1, {0});
  expect_chosen(Vector<double>{{1, 2, 3}}, 3, {2, 1, 0});
}

TEST(TopK, RefusesABadK) {
  const Vector<double> values{{1, 2, 3}};
  EXPECT_THROW(moe::top_k(values, 4), std::invalid_argument);
  EXPECT_THROW(moe::top_k(values, -1), std::invalid_argument);
  EXPECT_THROW(moe::top_k(Vector<float>(), 1), std::invalid_argument);
}

template <class S>
class TopKOf : public testing::Test {};
using Scalars = testing::Types<float, double, long double>;
TYPED_TEST_SUITE(TopKOf, Scalars);

// A stable sort by value alone, written without the library's order.
TYPED_TEST(TopKOf, ManyRandomRowsAgreeWithAStableSort) {
  using S = TypeParam;
  moe::Rng rng(11);
  for (int row = 0; row < 3000; ++row) {
    const Index n = 1 + rng.index(40), kinds = 1 + rng.index(12);
    Vector<S> values(n);
    for (S& v : values) {
      const Index kind = rng.index(kinds);  // few kinds, many ties
      v = kind == 10   ? std::numeric_limits<S>::quiet_NaN()
          : kind == 11 ? -std::numeric_limits<S>::infinity()
                       : S(kind) - S(4);
    }
    std::vector<Index> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), Index(0));
    std::sort(order.begin(), order.end(), [&](Index a, Index b) {
      if (std::isnan(values[a]) != std::isnan(values[b])) return std::isnan(values[b]);
      if (!std::isnan(values[a]) && values[a] != values[b]) return values[a] > values[b];
      return a < b;
    });
    for (const Index k : {Index(0), rng.index(n + 1), n}) {
      const IndexVector chosen = moe::top_k(values, k);
      ASSERT_EQ(chosen.size(), k);
      for (Index i = 0; i < k; ++i)
        ASSERT_EQ(chosen[i], order[std::size_t(i)]) << "place " << i << " of row " << row;
    }
  }
}

TEST(TopK, WritesNothingBeyondK) {
  const double values[] = {5, 4, 3, 2, 1, 6};
  Index chosen[] = {-7, -7, -7, -7};
  moe::top_k(Index(6), values, Index(3), chosen);
  EXPECT_EQ(chosen[0], 5);
  EXPECT_EQ(chosen[1], 0);
  EXPECT_EQ(chosen[2], 1);
  EXPECT_EQ(chosen[3], -7);
}

TEST(SelectedBefore, IsAStrictTotalOrder) {
  const double values[] = {1, kNan, 1, -kInf, kNan, kInf, 0};
  for (Index i = 0; i < 7; ++i) {
    EXPECT_FALSE(moe::selected_before(values, i, i));
    for (Index j = 0; j < 7; ++j) {
      if (i == j) continue;
      EXPECT_NE(moe::selected_before(values, i, j), moe::selected_before(values, j, i));
      for (Index k = 0; k < 7; ++k) {
        if (moe::selected_before(values, i, j) && moe::selected_before(values, j, k)) {
          EXPECT_TRUE(moe::selected_before(values, i, k));
        }
      }
    }
  }
}

}  // namespace
}  // namespace top_k_test
