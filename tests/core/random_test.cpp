// SPDX-License-Identifier: MIT
#include <cmath>
#include <concepts>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/random.hpp>

namespace random_test {
namespace {

using moe::Index;
using moe::Rng;

static_assert(std::uniform_random_bit_generator<Rng>);
static_assert(std::copyable<Rng>);

// The published splitmix64.c and xoshiro256plusplus.c, run by a Python transcription; the vector
// for seed 0 is also that of the Rust crate rand (Xoshiro256PlusPlus::seed_from_u64(0)).
TEST(Rng, IsXoshiro256PlusPlusSeededBySplitmix64) {
  const std::uint64_t of_seed_0[] = {5987356902031041503u,  7051070477665621255u,  6633766593972829180u,
                                     211316841551650330u,   9136120204379184874u,  379361710973160858u,
                                     15813423377499357806u, 15596884590815070553u, 5439680534584881407u,
                                     1369371744833522710u};
  const std::uint64_t of_seed_42[] = {15021278609987233951u, 5881210131331364753u,  18149643915985481100u,
                                      12933668939759105464u, 14637574242682825331u, 10848501901068131965u,
                                      2312344417745909078u,  11162538943635311430u, 3831705504650218695u,
                                      17217215411128672468u};
  Rng zero(0), forty_two(42), unnamed;
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(zero(), of_seed_0[i]) << i;
    EXPECT_EQ(unnamed(), of_seed_0[i]) << i;
    EXPECT_EQ(forty_two(), of_seed_42[i]) << i;
  }
}

// From the raw numbers by the same Python program.
TEST(Rng, UniformAndNormalFollowFromTheRawNumbers) {
  Rng uniform(7), normal(7);
  const double expected[] = {0.05536043647833311, 0.17211585444811772, 0.7175761283586594,
                             0.42720981929150526, 0.9636595218812296,  0.46570368914047844};
  for (const double u : expected) EXPECT_EQ(uniform.uniform(), u);
  for (const double z : {0.15864398364230053, -1.4267532562805325, -2.515258995020244})
    EXPECT_NEAR(normal.normal(), z, 1e-14);
  EXPECT_EQ(uniform, normal);  // both have made six steps
}

TEST(Rng, ACopyCopiesTheStream) {
  Rng rng(5);
  for (int i = 0; i < 100; ++i) rng();
  Rng copy = rng;
  EXPECT_EQ(copy, rng);
  std::vector<double> from_copy;
  for (int i = 0; i < 10; ++i) from_copy.push_back(copy.normal());
  EXPECT_NE(copy, rng);
  for (const double z : from_copy) EXPECT_EQ(rng.normal(), z);
  EXPECT_EQ(copy, rng);
}

TEST(Rng, GoesOnFromAStateThatWasSaved) {
  Rng rng(3);
  for (int i = 0; i < 5; ++i) rng();
  const Rng::State saved = rng.state();
  std::vector<std::uint64_t> expected, numbers;
  for (int i = 0; i < 100; ++i) expected.push_back(rng());
  Rng other(4);
  other.set_state(saved);
  for (int i = 0; i < 100; ++i) numbers.push_back(other());
  EXPECT_EQ(numbers, expected);
  EXPECT_EQ(other, rng);
  EXPECT_THROW(other.set_state({0, 0, 0, 0}), std::invalid_argument);
  EXPECT_EQ(other, rng);
}

TEST(Rng, SeedsGiveDifferentStreams) {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    Rng a(seed), b(seed + 1);
    EXPECT_NE(a(), b()) << seed;
  }
}

TEST(Rng, UniformStaysInItsInterval) {
  Rng rng(6);
  for (int i = 0; i < 100000; ++i) {
    const double u = rng.uniform();
    EXPECT_TRUE(u >= 0 && u < 1) << u;
    const double v = rng.uniform(-3, -1);
    EXPECT_TRUE(v >= -3 && v < -1) << v;
  }
}

// Bounds of five standard errors.
TEST(Rng, UniformHasTheMomentsOfTheUniformDistribution) {
  Rng rng(8);
  const int n = 200000;
  double sum = 0, squares = 0, products = 0, previous = 0;
  for (int i = 0; i < n; ++i) {
    const double u = rng.uniform() - 0.5;
    sum += u;
    squares += u * u;
    products += u * previous;
    previous = u;
  }
  EXPECT_NEAR(sum / n, 0, 5 * std::sqrt(1.0 / 12 / n));
  EXPECT_NEAR(squares / n, 1.0 / 12, 5 * std::sqrt(1.0 / 180 / n));
  EXPECT_NEAR(products / n, 0, 5 * (1.0 / 12) / std::sqrt(double(n)));
}

TEST(Rng, NormalHasTheMomentsAndTailsOfTheNormalDistribution) {
  Rng rng(9);
  const int n = 200000;
  double power[5] = {};
  int beyond_two = 0;
  for (int i = 0; i < n; ++i) {
    const double z = rng.normal();
    ASSERT_TRUE(std::isfinite(z));
    double p = 1;
    for (double& sum : power) {
      sum += p;
      p *= z;
    }
    beyond_two += std::abs(z) > 2;
  }
  EXPECT_NEAR(power[1] / n, 0, 5 * std::sqrt(1.0 / n));
  EXPECT_NEAR(power[2] / n, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(power[3] / n, 0, 5 * std::sqrt(15.0 / n));
  EXPECT_NEAR(power[4] / n, 3, 5 * std::sqrt(96.0 / n));
  EXPECT_NEAR(double(beyond_two) / n, 0.0455002638963584, 5 * std::sqrt(0.0455 * 0.9545 / n));
}

TEST(Rng, IndexStaysInBoundsAndReachesEveryOne) {
  Rng rng(10);
  for (const Index n : {1, 2, 3, 7, 100}) {
    std::vector<int> count(std::size_t(n), 0);
    const int draws = 2000 * int(n);
    for (int i = 0; i < draws; ++i) {
      const Index drawn = rng.index(n);
      ASSERT_TRUE(drawn >= 0 && drawn < n);
      ++count[std::size_t(drawn)];
    }
    for (const int c : count) EXPECT_NEAR(c, 2000, 6 * std::sqrt(2000));
  }
  const Index huge = Index(1) << 52;
  for (int i = 0; i < 1000; ++i) {
    const Index drawn = rng.index(huge);
    EXPECT_TRUE(drawn >= 0 && drawn < huge);
  }
}

}  // namespace
}  // namespace random_test
