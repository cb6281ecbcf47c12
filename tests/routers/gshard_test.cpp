// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include <moe/models/published/gshard.hpp>
#include <moe/moe.hpp>

#include "compare.hpp"

// The routers of GShard, GLaM and ST-MoE against their authors' algorithm (Lepikhin et al. 2021, algorithm
// 1), written down as mesh (_top_2_gating) and lingvo (Top2GatingOnLogits) have it: with masks and cumulative
// sums, group by group.
namespace gshard_test {
namespace {

using moe::Index;
using moe::Matrix;
using moe::Rng;
using moe::Vector;

constexpr Index kGroup = 40, kGroups = 3, kModel = 6, kExperts = 8;

enum class Policy { all, threshold, random };

struct Authors {
  Policy policy;
  double threshold;
  Index capacity;  // of an expert in a group
};

// combine [tokens, experts]: the gate of a token at an expert; zero where it has no seat.
Matrix<double> top_2_gating(const Matrix<double>& logits, const Authors& authors, Rng rng) {
  Matrix<double> combine = Matrix<double>::Zero(logits.rows(), kExperts);
  std::vector<double> uniform;
  for (Index t = 0; t < logits.rows(); ++t)
    uniform.push_back(authors.policy == Policy::random ? rng.uniform() : 0);
  for (Index begin = 0; begin < logits.rows(); begin += kGroup) {
    std::vector<Index> index_1, index_2;
    std::vector<double> gate_1, gate_2;
    for (Index s = 0; s < kGroup; ++s) {
      Vector<double> raw = logits.row(begin + s).transpose().array().exp();
      raw /= raw.sum();
      Index best, second;
      const double g1 = raw.maxCoeff(&best);
      raw[best] = 0;
      const double g2 = raw.maxCoeff(&second);
      index_1.push_back(best);
      index_2.push_back(second);
      gate_1.push_back(g1 / (g1 + g2 + 1e-9));
      gate_2.push_back(g2 / (g1 + g2 + 1e-9));
    }
    const auto at = [](auto& list, Index s) -> auto& { return list[std::size_t(s)]; };
    std::vector<Index> position(kExperts, 0), count(kExperts, 0);
    for (Index s = 0; s < kGroup; ++s) {
      const Index e = at(index_1, s);
      if (at(position, e)++ >= authors.capacity) continue;
      ++at(count, e);
      combine(begin + s, e) = at(gate_1, s);
    }
    std::fill(position.begin(), position.end(), 0);
    for (Index s = 0; s < kGroup; ++s) {
      const Index e = at(index_2, s);
      const double gate = at(gate_2, s);
      if (authors.policy == Policy::threshold && !(gate > authors.threshold)) continue;
      if (authors.policy == Policy::random &&
          !(at(uniform, begin + s) < gate / std::max(authors.threshold, 1e-9)))
        continue;
      if (at(position, e)++ + at(count, e) >= authors.capacity) continue;
      combine(begin + s, e) = gate;
    }
  }
  return combine;
}

struct Tally {
  Index dropped = 0, left_out = 0;
};

// The model's router in training and in inference, over random batches with experts that are liked more
// than others.
template <class M>
Tally expect_as_authors(const M& model, const Authors& training, const Authors& inference) {
  Tally tally;
  Rng rng(1);
  moe::TopKRouter<double> router(model.scaled_to(kModel, 4, kExperts).router, rng);
  moe::BatchInfo info;
  info.group_begin = moe::IndexVector{{0, kGroup, 2 * kGroup, 3 * kGroup}};
  for (int round = 0; round < 40; ++round) {
    Matrix<double> x(kGroups * kGroup, kModel);
    moe::fill_normal(router.w_router, 0.7, rng);
    moe::fill_normal(x, 1.0, rng);
    x.col(0).setOnes();
    const bool trains = round % 2 == 0;
    const Rng draws(rng());
    moe::Routing<double> routing;
    if (trains) {
      Rng copy = draws;
      router.route(x, copy, info, routing);
    } else {
      router.route(x, info, routing);
    }
    const auto& plan = routing.plan;
    Matrix<double> combine = Matrix<double>::Zero(x.rows(), kExperts);
    for (Index e = 0; e < kExperts; ++e)
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a)
        combine(plan.token[a], e) = plan.gate[a];
    const Matrix<double> expected = top_2_gating(routing.router_logits, trains ? training : inference, draws);
    EXPECT_LT(largest_difference(combine, expected), 1e-8) << "round " << round;
    EXPECT_EQ((combine.array() > 0).count(), (expected.array() > 0).count());
    tally.dropped += plan.dropped.size();
    tally.left_out += 2 * x.rows() - routing.chosen.size();
  }
  return tally;
}

// Seats of 40 tokens at 8 experts: 2 * 40 / 8 = 10, up to a multiple of 4.
TEST(GShard, RoutesAsItsAuthors) {
  const Tally tally = expect_as_authors(moe::gshard_600b, {Policy::random, 0.5, 12}, {Policy::all, 0, 12});
  EXPECT_GT(tally.dropped, 100);
  EXPECT_GT(tally.left_out, 100);
}

TEST(GShard, RoutesGLaMAsItsAuthors) {
  const Tally tally = expect_as_authors(moe::glam_64b_64e, {Policy::all, 0, 12}, {Policy::all, 0, 12});
  EXPECT_GT(tally.dropped, 100);
  EXPECT_EQ(tally.left_out, 0);
}

// 1.25 * 40 / 8 = 6.25 seats in training, 10 in inference.
TEST(GShard, RoutesSTMoEAsItsAuthors) {
  const Tally tally =
      expect_as_authors(moe::st_moe_32b, {Policy::random, 0.2, 6}, {Policy::threshold, 0.2, 10});
  EXPECT_GT(tally.dropped, 100);
  EXPECT_GT(tally.left_out, 100);
}

}  // namespace
}  // namespace gshard_test
