// SPDX-License-Identifier: MIT
#include <algorithm>
#include <limits>
#include <ostream>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/random.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/token_choice.hpp>

namespace moe {

// For the messages of failed comparisons.
static void PrintTo(const Dropped& d, std::ostream* out) {
  *out << "{token " << d.token << ", expert " << d.expert << ", choice " << d.choice << '}';
}

}  // namespace moe

namespace {

using moe::BatchInfo;
using moe::CapacityRule;
using moe::Dropped;
using moe::expert_capacity;
using moe::Index;
using moe::IndexVector;
using moe::Matrix;
using moe::Overflow;
using moe::Priority;
using moe::Rounding;

constexpr double kInf = std::numeric_limits<double>::infinity();

// ---- expert_capacity.

TEST(Capacity, OfHundredTokensEightExpertsTwoChoicesAndAQuarterToSpareIs32) {
  EXPECT_EQ(expert_capacity(100, 8, 2, 1.25), 32);  // as Megatron-LM, DeepSpeed top-2
  EXPECT_EQ(expert_capacity(100, 8, 1, 1.25), 16);  // as DeepSpeed top-1
  EXPECT_EQ(expert_capacity(100, 8, 2, 1.0), 25);   // as FairScale
}

TEST(Capacity, IsRoundedUp) {
  EXPECT_EQ(expert_capacity(10, 3, 1, 1.0), 4);
  EXPECT_EQ(expert_capacity(9, 3, 1, 1.0), 3);
  EXPECT_EQ(expert_capacity(8, 3, 2, 1.0), 6);
  EXPECT_EQ(expert_capacity(1000, 7, 1, 0.001), 1);
}

// A factor of n / 20 as people write it, in exact arithmetic: n top_k tokens / (20 num_experts).
TEST(Capacity, OfADecimalFactorIsThatOfExactArithmetic) {
  EXPECT_EQ(expert_capacity(80, 8, 6, 1.05), 63);  // 63.00000000000001 in double
  const auto expect_exact = [](Index n, Index k, Index tokens, Index experts) {
    const double factor = double(n) / 20;
    const Index top = n * k * tokens, bottom = 20 * experts;
    const Index down = std::min(tokens, top / bottom), up = std::min(tokens, (top + bottom - 1) / bottom);
    const Index twice = 2 * (top % bottom);
    const Index even = twice == bottom ? top / bottom + top / bottom % 2 : top / bottom + (twice > bottom);
    const auto seats = [&](moe::Rounding rounding) {
      return expert_capacity(tokens, experts, k, factor, {.rounding = rounding});
    };
    const auto where = [&] {
      return std::to_string(factor) + " * " + std::to_string(k) + " * " + std::to_string(tokens) + " / " +
             std::to_string(experts);
    };
    ASSERT_EQ(seats(moe::Rounding::up), up) << where();
    ASSERT_EQ(seats(moe::Rounding::down), down) << where();
    ASSERT_EQ(seats(moe::Rounding::nearest_even), std::min(tokens, even)) << where();
  };
  for (Index n = 1; n <= 40; ++n)
    for (const Index experts : {6, 8, 12, 60, 64, 128, 160, 256})
      for (Index k = 1; k <= 6; ++k) {
        for (Index tokens = 1; tokens <= 240; ++tokens) expect_exact(n, k, tokens, experts);
        for (const Index tokens : {4096, 65536, 1000000, 123456789}) expect_exact(n, k, tokens, experts);
      }
}

// Seats as the authors' own lines give them, for 100 tokens, 8 experts, two of them a token and a factor
// of 1.25 (the Python is theirs). mesh, lingvo, flaxformer and lucidrains do not multiply by top_k: their
// factor of 1.25 is ours of 0.625. Tutel's, 2 * int(1.25 * ceil(100 / 8)), rounds twice and is no rule here.
TEST(Capacity, FollowsTheAuthorsRules) {
  struct Case {
    std::string code;
    double factor;
    CapacityRule rule;
    Index seats;
    Index tokens = 100;
  };
  const CapacityRule mesh{Rounding::down, 4}, lingvo{Rounding::down, 4, 4},
      flaxformer{Rounding::nearest_even, 4}, vmoe{.multiple_of = 4}, openmoe{Rounding::down, 4, 2};
  for (const Case& c : {
           Case{"mesh: max(min(S, int(S * cf / E)), 4)", 1.25 / 2, mesh, 15},
           {"lucidrains st-moe: the same", 1.25 / 2, mesh, 15},
           {"lingvo: int(S * cf / E), 0 is 4, up to a multiple of 4", 1.25 / 2, lingvo, 16},
           {"flaxformer: max(int(round(S * cf / E)), 4)", 1.25 / 2, flaxformer, 16},
           {"vmoe: ceil(S * k * cf / E), up to a multiple of 4", 1.25, vmoe, 32},
           {"Megatron-LM: ceil(T * k / E * cf)", 1.25, {}, 32},
           {"DeepSpeed top-1: max(ceil(T / E * cf), 4)", 1.25 / 2, {.minimum = 4}, 16},
           {"DeepSpeed top-k: max(ceil(T / E * cf * k), 4)", 1.25, {.minimum = 4}, 32},
           {"MegaBlocks: int(cf * k * T / E)", 1.25, {Rounding::down}, 31},
           {"FairScale: 2 * T // E", 1.0, {Rounding::down}, 25},
           {"OpenMoE: int(k * cf * T / E), + C % 2, at least 4", 1.25, openmoe, 32},
           {"NLLB: 2 * ceil(T / E)", 1.0, {.multiple_of = 2}, 26},
           // Ten tokens: 1.56 seats, or 3.125.
           {"mesh", 1.25 / 2, mesh, 4, 10},
           {"lingvo", 1.25 / 2, lingvo, 4, 10},
           {"flaxformer", 1.25 / 2, flaxformer, 4, 10},
           {"vmoe", 1.25, vmoe, 4, 10},
           {"Megatron-LM", 1.25, {}, 4, 10},
           {"MegaBlocks", 1.25, {Rounding::down}, 3, 10},
           {"OpenMoE", 1.25, openmoe, 4, 10},
           // 200 tokens: 31.25 seats, or 62.5.
           {"mesh", 1.25 / 2, mesh, 31, 200},
           {"lingvo", 1.25 / 2, lingvo, 32, 200},
           {"flaxformer", 1.25 / 2, flaxformer, 31, 200},
           {"vmoe", 1.25, vmoe, 64, 200},
           {"MegaBlocks", 1.25, {Rounding::down}, 62, 200},
           {"OpenMoE", 1.25, openmoe, 62, 200},
       })
    EXPECT_EQ(expert_capacity(c.tokens, 8, 2, c.factor, c.rule), c.seats)
        << c.code << ", " << c.tokens << " tokens";
}

// Python's round: 0, 2, 2, 4, 4 for the halves from 0.5 to 4.5.
TEST(Capacity, HalvesGoToTheEvenNeighbour) {
  const CapacityRule rule{Rounding::nearest_even};
  const Index halves[] = {0, 2, 2, 4, 4};
  for (Index i = 0; i < 5; ++i) EXPECT_EQ(expert_capacity(2 * i + 1, 2, 1, 1.0, rule), halves[i]);
  EXPECT_EQ(expert_capacity(10, 8, 1, 1.125, rule), 1);  // 1.40625
  EXPECT_EQ(expert_capacity(10, 8, 1, 1.25, rule), 2);   // 1.5625
}

TEST(Capacity, IsWhatTheRuleSays) {
  for (const Rounding rounding : {Rounding::up, Rounding::down, Rounding::nearest_even})
    for (Index minimum = 0; minimum < 10; minimum += 3)
      for (Index multiple = 1; multiple < 6; ++multiple)
        for (Index tokens = 0; tokens < 40; ++tokens)
          for (const double factor : {0.0, 0.3, 1.0, 1.25, 2.0, 9.0}) {
            const Index seats = expert_capacity(tokens, 6, 2, factor, {rounding, minimum, multiple});
            const Index plain = expert_capacity(tokens, 6, 2, factor, {rounding});
            ASSERT_LE(seats, tokens);
            ASSERT_GE(seats, std::min(tokens, std::max(plain, minimum)));
            if (seats < tokens) {
              ASSERT_EQ(seats % multiple, 0);
              ASSERT_LT(seats, std::max(plain, minimum) + multiple);  // and no more than needed
            }
          }
}

TEST(Capacity, OfARuleIsAtMostTheNumberOfTokens) {
  constexpr Index kMost = std::numeric_limits<Index>::max();
  EXPECT_EQ(expert_capacity(3, 8, 2, 1.0, {.minimum = 4}), 3);
  EXPECT_EQ(expert_capacity(0, 8, 2, 1.0, {.minimum = 4}), 0);
  EXPECT_EQ(expert_capacity(100, 8, 2, 1.0, {.minimum = kMost, .multiple_of = 7}), 100);
  EXPECT_EQ(expert_capacity(100, 8, 2, 1.0, {.multiple_of = kMost}), 100);
  EXPECT_EQ(expert_capacity(100, 8, 2, 0.0, {.multiple_of = kMost}), 0);
  EXPECT_EQ(expert_capacity(0, 8, 8, std::numeric_limits<double>::max()), 0);
}

TEST(Capacity, IsAtMostTheNumberOfTokensAndAtLeastZero) {
  EXPECT_EQ(expert_capacity(10, 2, 1, 2.0), 10);
  EXPECT_EQ(expert_capacity(10, 2, 1, 2.5), 10);
  EXPECT_EQ(expert_capacity(10, 2, 2, 1e300), 10);
  EXPECT_EQ(expert_capacity(10, 2, 1, std::numeric_limits<double>::max()), 10);
  EXPECT_EQ(expert_capacity(10, 2, 1, 0.0), 0);
  EXPECT_EQ(expert_capacity(10, 2, 0, 1.0), 0);
  EXPECT_EQ(expert_capacity(0, 2, 1, 1.0), 0);
  EXPECT_EQ(expert_capacity(10, 1, 1, 1.0), 10);
  const Index many = Index(1) << 50;
  EXPECT_EQ(expert_capacity(many, 4, 4, 1.0), many);
  EXPECT_EQ(expert_capacity(many, 4, 1, 1.0), many / 4);
}

TEST(Capacity, GrowsWithTheFactor) {
  for (Index tokens = 0; tokens < 50; ++tokens)
    for (double factor = 0; factor < 3; factor += 0.1)
      EXPECT_LE(expert_capacity(tokens, 6, 2, factor), expert_capacity(tokens, 6, 2, factor + 0.1));
}

TEST(Capacity, RefusesWhatIsOutOfRange) {
  EXPECT_THROW(expert_capacity(-1, 8, 2, 1.0), std::invalid_argument);
  EXPECT_THROW(expert_capacity(10, 0, 0, 1.0), std::invalid_argument);
  EXPECT_THROW(expert_capacity(10, 8, 9, 1.0), std::invalid_argument);
  EXPECT_THROW(expert_capacity(10, 8, -1, 1.0), std::invalid_argument);
  EXPECT_THROW(expert_capacity(10, 8, 2, -0.5), std::invalid_argument);
  EXPECT_THROW(expert_capacity(10, 8, 2, kInf), std::invalid_argument);
  EXPECT_THROW(expert_capacity(10, 8, 2, std::numeric_limits<double>::quiet_NaN()), std::invalid_argument);
}

// ---- apply_capacity.

using Token = std::vector<std::pair<Index, double>>;  // its choices: expert and gate, best first

struct Seating {
  moe::Routing<double> routing;
  moe::CapacityWorkspace<double> workspace;
  Matrix<double> scores;
  moe::ReusedMatrix<double> probs;
  BatchInfo info;

  Seating(Index experts, const std::vector<Token>& tokens, BatchInfo batch = {}) : info(std::move(batch)) {
    moe::begin_routing(Index(tokens.size()), experts, info, routing, "test");
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      for (const auto& [expert, gate] : tokens[t]) {
        routing.chosen.expert.push_back(expert);
        routing.chosen.gate.push_back(gate);
      }
      routing.chosen.token_begin[Index(t) + 1] = routing.chosen.size();
    }
  }

  void seat(const std::vector<Index>& capacity, Overflow overflow = Overflow::drop,
            Priority priority = Priority::token_order) {
    const IndexVector seats = Eigen::Map<const IndexVector>(capacity.data(), Index(capacity.size()));
    moe::apply_capacity(routing.chosen, scores, seats, {overflow, priority}, info, routing.plan, workspace,
                        &probs);
  }

  std::vector<std::vector<Index>> tokens_of_experts() const {
    const auto& plan = routing.plan;
    std::vector<std::vector<Index>> lists;
    for (Index e = 0; e < plan.num_experts(); ++e)
      lists.emplace_back(plan.token.begin() + plan.expert_begin[e],
                         plan.token.begin() + plan.expert_begin[e + 1]);
    return lists;
  }
  std::vector<Dropped> dropped() const { return {routing.plan.dropped.begin(), routing.plan.dropped.end()}; }
  std::vector<Index> passed() const {
    return {routing.plan.passed_through.begin(), routing.plan.passed_through.end()};
  }
};

using Lists = std::vector<std::vector<Index>>;
using Drops = std::vector<Dropped>;

// Four tokens with two choices of three experts each. With two seats the three priorities differ.
const std::vector<Token> kFour = {
    {{0, .6}, {1, .4}}, {{0, .55}, {2, .45}}, {{0, .95}, {1, .05}}, {{1, .8}, {0, .2}}};

TEST(ApplyCapacity, InTokenOrderSeatsAllFirstChoicesBeforeAnySecond) {
  Seating s(3, kFour);
  s.seat({2});
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0, 1}, {0, 3}, {1}}));
  EXPECT_EQ(s.dropped(), (Drops{{2, 0, 0}, {2, 1, 1}, {3, 0, 1}}));
  EXPECT_TRUE(s.passed().empty());
}

TEST(ApplyCapacity, ByTheTokensLargestGateTakesTokensInThatOrder) {
  Seating s(3, kFour);
  s.seat({2}, Overflow::drop, Priority::token_max_gate);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0, 2}, {2, 3}, {1}}));
  EXPECT_EQ(s.dropped(), (Drops{{1, 0, 0}, {3, 0, 1}, {0, 1, 1}}));
}

TEST(ApplyCapacity, ByGateLetsEveryExpertKeepItsLargest) {
  Seating s(3, kFour);
  s.seat({2}, Overflow::drop, Priority::assignment_gate);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0, 2}, {0, 3}, {1}}));
  EXPECT_EQ(s.dropped(), (Drops{{1, 0, 0}, {3, 0, 1}, {2, 1, 1}}));
}

// Probabilities (.50, .40, .10) and (.45, .28, .27): the first token's is larger, the second's gate is once
// the gates of two choices sum to 1.
TEST(ApplyCapacity, ByTheLargestProbabilityIsNotByTheLargestRenormalisedGate) {
  const Matrix<double> p{{.50, .40, .10}, {.45, .28, .27}};
  Seating s(3, {{{0, .50 / .90}, {1, .40 / .90}}, {{0, .45 / .73}, {1, .28 / .73}}});
  s.probs = p;
  s.seat({1}, Overflow::drop, Priority::token_max_gate);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{1}, {1}, {}}));
  s.seat({1}, Overflow::drop, Priority::token_max_prob);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0}, {0}, {}}));
  EXPECT_EQ(s.dropped(), (Drops{{1, 0, 0}, {1, 1, 1}}));
  // The same through a router, whose tokens come in the other order.
  for (const auto priority : {Priority::token_max_gate, Priority::token_max_prob}) {
    moe::Routing<double> routing;
    moe::begin_routing(2, 3, {}, routing, "test");
    routing.router_logits = p.colwise().reverse().array().log();
    moe::RouterWorkspace<double> workspace;
    moe::route_by_logits(
        {.gate = {.renormalise = true}, .top_k = 2, .capacity_factor = 0.7, .priority = priority}, {}, {},
        routing, workspace, moe::Sequential{});
    ASSERT_EQ(routing.plan.num_assignments(), 2);
    for (const Index t : routing.plan.token) EXPECT_EQ(t, priority == Priority::token_max_gate ? 0 : 1);
  }
}

TEST(ApplyCapacity, KeepsTheGatesAndNamesTheChoices) {
  Seating s(3, kFour);
  s.seat({2}, Overflow::drop, Priority::token_max_gate);
  const auto& plan = s.routing.plan;
  const std::vector<double> gates{.6, .95, .05, .8, .45};
  const std::vector<Index> choices{0, 4, 5, 6, 3};
  EXPECT_EQ(std::vector<double>(plan.gate.begin(), plan.gate.end()), gates);
  EXPECT_EQ(std::vector<Index>(plan.choice.begin(), plan.choice.end()), choices);
}

TEST(ApplyCapacity, WithoutOverflowSeatsEverything) {
  for (const auto priority : {Priority::token_order, Priority::token_max_gate, Priority::assignment_gate}) {
    Seating s(3, kFour);
    s.seat({4}, Overflow::drop, priority);
    EXPECT_EQ(s.tokens_of_experts(), (Lists{{0, 1, 2, 3}, {0, 2, 3}, {1}}));
    EXPECT_TRUE(s.dropped().empty());
    Seating all(3, kFour);
    moe::dispatch_all(all.routing.chosen, all.routing.plan);
    EXPECT_EQ(all.routing.plan, s.routing.plan);
  }
}

TEST(ApplyCapacity, GivesTiesToTheLowerToken) {
  const std::vector<Token> equal(4, Token{{1, .5}, {0, .5}});
  for (const auto priority : {Priority::token_order, Priority::token_max_gate, Priority::assignment_gate,
                              Priority::token_max_prob}) {
    Seating s(2, equal);
    s.probs = Matrix<double>::Constant(4, 2, .5);
    s.seat({3}, Overflow::drop, priority);
    EXPECT_EQ(s.tokens_of_experts(), (Lists{{0, 1, 2}, {0, 1, 2}}));
    EXPECT_EQ(s.dropped(), (Drops{{3, 1, 0}, {3, 0, 1}}));
  }
  // Of one token's equal gates the better choice goes first.
  Seating one(2, {{{1, .5}, {0, .5}}});
  one.seat({0}, Overflow::drop, Priority::assignment_gate);
  EXPECT_EQ(one.dropped(), (Drops{{0, 1, 0}, {0, 0, 1}}));
}

TEST(ApplyCapacity, OfZeroDropsEverything) {
  for (const auto overflow : {Overflow::drop, Overflow::next_best, Overflow::pass_through}) {
    Seating s(3, kFour);
    s.scores = Matrix<double>::Zero(4, 3);
    s.seat({0}, overflow);
    EXPECT_EQ(s.tokens_of_experts(), (Lists{{}, {}, {}}));
    EXPECT_EQ(
        s.dropped(),
        (Drops{{0, 0, 0}, {1, 0, 0}, {2, 0, 0}, {3, 1, 0}, {0, 1, 1}, {1, 2, 1}, {2, 1, 1}, {3, 0, 1}}));
    EXPECT_EQ(s.passed(),
              overflow == Overflow::pass_through ? (std::vector<Index>{0, 1, 2, 3}) : std::vector<Index>{});
  }
}

TEST(ApplyCapacity, TokensMayHaveFewerChoicesThanOthersOrNone) {
  Seating s(2, {{}, {{1, 1.}}, {{1, .7}, {0, .3}}, {}, {{0, 1.}}});
  s.seat({1}, Overflow::pass_through);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{4}, {1}}));
  EXPECT_EQ(s.dropped(), (Drops{{2, 1, 0}, {2, 0, 1}}));
  EXPECT_EQ(s.passed(), (std::vector<Index>{2}));  // who chose nothing lost nothing
}

TEST(ApplyCapacity, PassesThroughOnlyTokensThatLostAll) {
  Seating s(3, kFour);
  s.seat({2}, Overflow::pass_through);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0, 1}, {0, 3}, {1}}));
  EXPECT_EQ(s.dropped(), (Drops{{2, 0, 0}, {2, 1, 1}, {3, 0, 1}}));
  EXPECT_EQ(s.passed(), (std::vector<Index>{2}));
  s.seat({1}, Overflow::pass_through);  // a reused plan starts afresh
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0}, {3}, {1}}));
  EXPECT_EQ(s.passed(), (std::vector<Index>{2}));
  s.seat({4}, Overflow::pass_through);
  EXPECT_TRUE(s.passed().empty());
}

// ---- next_best.

TEST(NextBest, TakesTheMostProbableExpertWithRoom) {
  Seating s(3, std::vector<Token>(5, Token{{0, 1.}}));
  s.scores.resize(5, 3);
  s.scores << 3, 0, 1,  //
      3, 0, 1,          //
      3, 0, 1,          //
      3, 1, 0,          //
      3, 0, 1;
  s.seat({2}, Overflow::next_best);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0, 1}, {3}, {2, 4}}));
  EXPECT_TRUE(s.dropped().empty());
  s.seat({1}, Overflow::next_best);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0}, {2}, {1}}));
  EXPECT_EQ(s.dropped(), (Drops{{3, 0, 0}, {4, 0, 0}}));
}

TEST(NextBest, SeatsAllOriginalChoicesFirst) {
  Seating s(3, {{{0, 1.}}, {{0, 1.}}, {{1, 1.}}});
  s.scores = Matrix<double>::Zero(3, 3);
  s.scores.row(1) << 2, 1, 0;  // token 1 would like expert 1, the original choice of token 2
  s.seat({1}, Overflow::next_best);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0}, {2}, {1}}));
}

TEST(NextBest, OverflowsInTheOrderOfPriority) {
  const std::vector<Token> tokens = {{{0, .5}}, {{0, .6}}, {{0, .7}}};
  Seating s(3, tokens);
  s.scores.resize(3, 3);
  s.scores << 2, 1, 0, 2, 1, 0, 2, 1, 0;
  s.seat({1}, Overflow::next_best);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0}, {1}, {2}}));
  for (const auto priority : {Priority::token_max_gate, Priority::assignment_gate}) {
    s.seat({1}, Overflow::next_best, priority);
    EXPECT_EQ(s.tokens_of_experts(), (Lists{{2}, {1}, {0}}));
  }
}

TEST(NextBest, NeverTakesAnExpertThatTheTokenUsesAlready) {
  // Token 2's first choice is full, and of the others only its own second choice has room.
  Seating s(3, {{{0, .6}, {1, .4}}, {{0, .6}, {1, .4}}, {{0, .6}, {2, .4}}});
  s.scores = Matrix<double>::Zero(3, 3);
  s.seat({2}, Overflow::next_best);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0, 1}, {0, 1}, {2}}));
  EXPECT_EQ(s.dropped(), (Drops{{2, 0, 0}}));
  // Both choices of token 2 overflow: the first takes expert 2, and the second finds it in use.
  Seating both(3, std::vector<Token>(3, Token{{0, .6}, {1, .4}}));
  both.scores = Matrix<double>::Zero(3, 3);
  both.seat({2}, Overflow::next_best);
  EXPECT_EQ(both.tokens_of_experts(), (Lists{{0, 1}, {0, 1}, {2}}));
  EXPECT_EQ(both.dropped(), (Drops{{2, 1, 1}}));
  EXPECT_EQ(both.routing.plan.choice[4], 4);  // the seat stems from token 2's first choice
}

TEST(NextBest, NeverTakesAnUnavailableExpert) {
  Seating s(3, {{{0, 1.}}, {{0, 1.}}, {{0, 1.}}});
  s.scores = Matrix<double>::Zero(3, 3);
  s.scores(1, 1) = -kInf;
  s.scores.row(2) << 0, -kInf, -kInf;
  s.seat({1}, Overflow::next_best);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0}, {}, {1}}));
  EXPECT_EQ(s.dropped(), (Drops{{2, 0, 0}}));
}

TEST(NextBest, GivesTiesToTheLowerExpert) {
  Seating s(4, {{{2, 1.}}, {{2, 1.}}});
  s.scores = Matrix<double>::Constant(2, 4, 0.5);
  s.seat({1}, Overflow::next_best);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{1}, {}, {0}, {}}));
}

// ---- Groups and masks.

TEST(ApplyCapacity, EveryGroupHasSeatsOfItsOwn) {
  BatchInfo info;
  info.group_begin = IndexVector{{0, 3, 3, 5}};
  Seating s(2, std::vector<Token>(5, Token{{0, .5}}), info);
  s.seat({2, 7, 1}, Overflow::pass_through);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{0, 1, 3}, {}}));
  EXPECT_EQ(s.dropped(), (Drops{{2, 0, 0}, {4, 0, 0}}));
  EXPECT_EQ(s.passed(), (std::vector<Index>{2, 4}));
}

TEST(ApplyCapacity, PriorityIsWithinAGroup) {
  BatchInfo info;
  info.group_begin = IndexVector{{0, 2, 4}};
  Seating s(1, {{{0, .1}}, {{0, .2}}, {{0, .8}}, {{0, .9}}}, info);
  s.seat({1, 1}, Overflow::drop, Priority::token_max_gate);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{1, 3}}));
  EXPECT_EQ(s.dropped(), (Drops{{0, 0, 0}, {2, 0, 0}}));
}

TEST(ApplyCapacity, MaskedTokensChooseNothingAndAreNotCounted) {
  BatchInfo info;
  info.mask = moe::Mask::Constant(6, true);
  info.mask[0] = info.mask[4] = false;
  info.group_begin = IndexVector{{0, 2, 2, 6}};
  Seating s(2, {{}, {{0, 1.}}, {{1, 1.}}, {{1, 1.}}, {}, {{1, 1.}}}, info);
  IndexVector valid;
  moe::count_valid_tokens(s.routing.plan, info, valid);
  EXPECT_EQ(valid, (IndexVector{{1, 0, 3}}));
  EXPECT_EQ(s.routing.plan.num_valid_tokens(), 4);
  s.seat({1, 0, 2}, Overflow::pass_through);
  EXPECT_EQ(s.tokens_of_experts(), (Lists{{1}, {2, 3}}));
  EXPECT_EQ(s.passed(), (std::vector<Index>{5}));  // not the masked ones
  const BatchInfo whole;
  moe::count_valid_tokens(s.routing.plan, whole, valid);
  EXPECT_EQ(valid, (IndexVector{{4}}));
}

TEST(ApplyCapacity, AnEmptyBatchIsFine) {
  Seating s(3, {});
  s.scores.resize(0, 3);
  for (const auto overflow : {Overflow::drop, Overflow::next_best, Overflow::pass_through}) {
    s.seat({0}, overflow);
    EXPECT_EQ(s.routing.plan.num_assignments(), 0);
    EXPECT_TRUE(s.dropped().empty());
  }
}

// ---- Laws.

TEST(Capacity, NeverDropsABalancedBatchAtFactorOne) {
  for (Index experts = 1; experts <= 9; ++experts) {
    for (Index k = 1; k <= experts; ++k) {
      for (Index tokens = 1; tokens <= 40; ++tokens) {
        std::vector<Token> choices(static_cast<std::size_t>(tokens));
        for (Index t = 0; t < tokens; ++t)  // loads differ by one at most
          for (Index i = 0; i < k; ++i)
            choices[std::size_t(t)].emplace_back((t * k + i) % experts, 1.0 / double(k));
        Seating s(experts, choices);
        s.seat({expert_capacity(tokens, experts, k, 1.0)});
        ASSERT_TRUE(s.dropped().empty()) << tokens << " tokens, " << experts << " experts, k = " << k;
      }
    }
  }
}

TEST(Capacity, OneLessDropsFromABalancedBatch) {
  for (const auto& [tokens, experts, k] :
       {std::tuple<Index, Index, Index>{24, 4, 1}, {24, 4, 2}, {24, 6, 3}}) {
    std::vector<Token> choices(static_cast<std::size_t>(tokens));
    for (Index t = 0; t < tokens; ++t)
      for (Index i = 0; i < k; ++i) choices[std::size_t(t)].emplace_back((t * k + i) % experts, 1.0);
    Seating s(experts, choices);
    s.seat({expert_capacity(tokens, experts, k, 1.0) - 1});
    EXPECT_EQ(Index(s.dropped().size()), experts);
  }
}

TEST(ApplyCapacity, NothingIsLostSilently) {
  moe::Rng rng(21);
  for (int round = 0; round < 600; ++round) {
    const Index tokens = rng.index(30), experts = 1 + rng.index(6);
    BatchInfo info;
    if (round % 3 == 0) info.group_begin = IndexVector{{0, tokens / 3, tokens}};
    std::vector<Token> choices(static_cast<std::size_t>(tokens));
    Matrix<double> scores(tokens, experts);
    for (double& v : scores.reshaped()) v = rng.index(5) == 0 ? -kInf : double(rng.index(4));
    for (Index t = 0; t < tokens; ++t) {
      const Index k = rng.index(experts + 1), first = rng.index(experts);
      for (Index i = 0; i < k; ++i)
        choices[std::size_t(t)].emplace_back((first + i) % experts, double(rng.index(5)) / 4);
    }
    std::vector<Index> capacity;
    for (Index g = 0; g < info.num_groups(); ++g) capacity.push_back(rng.index(8));
    const auto overflow = Overflow(round % 3);
    const auto priority = Priority(round / 3 % 3);
    Seating s(experts, choices, info);
    s.scores = scores;
    s.seat(capacity, overflow, priority);
    const auto& plan = s.routing.plan;
    const auto& chosen = s.routing.chosen;

    // Every choice is kept or dropped, exactly once.
    std::set<Index> seen(plan.choice.begin(), plan.choice.end());
    ASSERT_EQ(Index(seen.size()), plan.num_assignments());
    for (const Dropped& d : s.dropped()) {
      const Index c = chosen.token_begin[d.token] + d.choice;
      ASSERT_LT(c, chosen.token_begin[d.token + 1]);
      ASSERT_EQ(d.expert, chosen.expert[c]);
      ASSERT_TRUE(seen.insert(c).second);
    }
    ASSERT_EQ(Index(seen.size()), chosen.size());

    std::set<Index> losers;
    for (const Dropped& d : s.dropped()) losers.insert(d.token);
    for (Index e = 0; e < experts; ++e) {
      std::vector<Index> load(capacity.size(), 0);
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
        const Index t = plan.token[a], c = plan.choice[a];
        losers.erase(t);
        ASSERT_TRUE(a == plan.expert_begin[e] || plan.token[a - 1] < t);
        ASSERT_TRUE(chosen.token_begin[t] <= c && c < chosen.token_begin[t + 1]);
        ASSERT_EQ(plan.gate[a], chosen.gate[c]);
        if (overflow != Overflow::next_best) {
          ASSERT_EQ(chosen.expert[c], e);
        }
        if (chosen.expert[c] != e) {
          ASSERT_NE(scores(t, e), -kInf);
        }
        ++load[info.num_groups() == 2 && t >= info.group_begin[1] ? 1u : 0u];
      }
      for (std::size_t g = 0; g < capacity.size(); ++g) ASSERT_LE(load[g], capacity[g]);
      // No seat of an expert stays empty while one of its choices is dropped.
      for (const Dropped& d : s.dropped()) {
        if (d.expert != e) continue;
        const std::size_t g = info.num_groups() == 2 && d.token >= info.group_begin[1] ? 1 : 0;
        ASSERT_EQ(load[g], capacity[g]);
      }
    }
    if (overflow == Overflow::pass_through) {
      ASSERT_EQ(s.passed(), std::vector<Index>(losers.begin(), losers.end()));
    } else {
      ASSERT_TRUE(s.passed().empty());
    }
  }
}

}  // namespace
