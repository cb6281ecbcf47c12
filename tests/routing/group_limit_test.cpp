// SPDX-License-Identifier: MIT
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include <moe/routing/group_limit.hpp>

namespace {

using moe::GroupLimit;
using moe::GroupScore;
using moe::Index;
using moe::Vector;

constexpr double kNever = -std::numeric_limits<double>::infinity();

// The experts that are left.
std::vector<Index> left(const GroupLimit& limit, Vector<double> values) {
  std::vector<double> scratch(static_cast<std::size_t>(limit.groups));
  std::vector<Index> order(static_cast<std::size_t>(limit.kept));
  const Vector<double> before = values;
  moe::limit_to_groups(limit, values.size(), values.data(), scratch.data(), order.data());
  std::vector<Index> experts;
  for (Index e = 0; e < values.size(); ++e) {
    if (values[e] == kNever) continue;
    EXPECT_EQ(values[e], before[e]);
    experts.push_back(e);
  }
  return experts;
}

// DeepSeek-V2 ranks groups by their largest value, DeepSeek-V3 by the sum of their two largest.
TEST(GroupLimit, MaxAndSumOfTwoMayKeepDifferentGroups) {
  const Vector<double> q{{.30, .02, .20, .19, .10, .09, .06, .04}};
  EXPECT_EQ(left({4, 1, GroupScore::max}, q), (std::vector<Index>{0, 1}));
  EXPECT_EQ(left({4, 1, GroupScore::top_two_sum}, q), (std::vector<Index>{2, 3}));
  EXPECT_EQ(left({4, 2, GroupScore::max}, q), (std::vector<Index>{0, 1, 2, 3}));
}

// Experts of other groups are out, not at zero: with negative values a zero would win
// (deepseek-ai/DeepSeek-V3 issue 741).
TEST(GroupLimit, NegativeValuesStayInTheirGroup) {
  const Vector<double> c{{-.1, -.3, -.2, -.25, -1, -1, -1, -1}};
  EXPECT_EQ(left({2, 1, GroupScore::top_two_sum}, c), (std::vector<Index>{0, 1, 2, 3}));
  Vector<double> values = c;
  double scratch[2];
  Index order[1], best[2];
  moe::limit_to_groups({2, 1, GroupScore::top_two_sum}, Index(8), values.data(), scratch, order);
  moe::top_k(Index(8), values.data(), Index(2), best);
  EXPECT_EQ(best[0], 0);
  EXPECT_EQ(best[1], 2);
}

TEST(GroupLimit, EqualGroupsKeepTheLowerOne) {
  const Vector<double> level = Vector<double>::Ones(6);
  EXPECT_EQ(left({3, 1}, level), (std::vector<Index>{0, 1}));
  EXPECT_EQ(left({3, 2, GroupScore::top_two_sum}, level), (std::vector<Index>{0, 1, 2, 3}));
}

TEST(GroupLimit, UnavailableExpertsCountNothing) {
  const Vector<double> v{{kNever, kNever, kNever, -5, -1, -9}};
  EXPECT_EQ(left({3, 1}, v), (std::vector<Index>{4, 5}));
  EXPECT_EQ(left({3, 2}, v), (std::vector<Index>{3, 4, 5}));
  EXPECT_EQ(left({3, 1, GroupScore::top_two_sum}, v), (std::vector<Index>{3}));  // -5 against -10
}

TEST(GroupLimit, KeepingAllChangesNothing) {
  const Vector<double> v{{1, 2, 3, 4}};
  EXPECT_EQ(left({2, 2}, v).size(), 4u);
  EXPECT_EQ(left({}, v).size(), 4u);
}

}  // namespace
