// SPDX-License-Identifier: MIT
// Several processes against one: each computes the layer on the whole batch, too, and compares its part of
// that with what the processes made together, bit for bit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <moe/distributed.hpp>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "laws.hpp"

namespace {

using laws::same_bits;
using moe::Index;
using moe::Matrix;
using moe::Rng;
using testing::HasSubstr;

Index pick(Rng& rng, Index least, Index most) {
  return least + Index(rng.uniform() * double(most - least + 1));
}

// A batch, its layer and how it lies on the processes: the same on all of them.
struct Setup {
  Index d_model, num_experts, num_shared, d_ff;
  bool biased, masked, poisoned, grouped;
  std::vector<Index> begin;  // first token of a process [processes + 1]

  Index tokens() const { return begin.back(); }
};

Setup draw_setup(Rng& rng, Index processes) {
  Setup s{.d_model = pick(rng, 1, 12),
          .num_experts = pick(rng, 1, 11),
          .num_shared = rng.uniform() < 0.3 ? pick(rng, 1, 2) : 0,
          .d_ff = pick(rng, 1, 9),
          .biased = rng.uniform() < 0.5,
          .masked = rng.uniform() < 0.4,
          .poisoned = rng.uniform() < 0.2,
          .grouped = rng.uniform() < 0.3,
          .begin = {0}};
  const double many = rng.uniform() < 0.15 ? 300 : 20;  // more than products cut their sums at
  for (Index p = 0; p < processes; ++p)
    s.begin.push_back(s.begin.back() + (rng.uniform() < 0.2 ? 0 : Index(rng.uniform() * many)));
  return s;
}

template <class S>
struct Batch {
  Matrix<S> x, d_y;
  moe::BatchInfo info;
};

template <class S>
Batch<S> draw_batch(const Setup& s, Rng& rng) {
  Batch<S> batch{laws::normal_matrix<S>(s.tokens(), s.d_model, rng),
                 laws::normal_matrix<S>(s.tokens(), s.d_model, rng),
                 {}};
  if (rng.uniform() < 0.1) batch.x.rowwise() = laws::normal_matrix<S>(1, s.d_model, rng).row(0);  // all alike
  if (s.masked) {
    batch.info.mask = moe::Mask::Constant(s.tokens(), true);
    for (Index t = 0; t < s.tokens(); ++t) batch.info.mask[t] = rng.uniform() < 0.7;
  }
  if (s.poisoned && s.tokens() > 0)
    batch.x(pick(rng, 0, s.tokens() - 1), 0) = std::numeric_limits<S>::quiet_NaN();
  return batch;
}

// Groups that lie within processes: one or two of each.
void group(const Setup& s, moe::BatchInfo& info, std::vector<Index>& groups_before) {
  std::vector<Index> begin;
  groups_before = {0};
  for (std::size_t p = 0; p + 1 < s.begin.size(); ++p) {
    const Index count = s.begin[p + 1] - s.begin[p];
    if (count > 0) begin.push_back(s.begin[p]);
    if (count > 3) begin.push_back(s.begin[p] + 2);
    groups_before.push_back(Index(begin.size()));
  }
  if (begin.empty()) return;
  begin.push_back(s.tokens());
  info.group_begin = Eigen::Map<const moe::IndexVector>(begin.data(), Index(begin.size()));
}

template <class S>
Batch<S> own_batch(const Setup& s, const Batch<S>& all, const std::vector<Index>& groups_before, Index rank) {
  const Index first = s.begin[std::size_t(rank)], count = s.begin[std::size_t(rank) + 1] - first;
  Batch<S> own{all.x.middleRows(first, count), all.d_y.middleRows(first, count), {}};
  if (all.info.mask.size() > 0) own.info.mask = moe::Mask(all.info.mask.segment(first, count));
  if (all.info.group_begin.size() > 0 && count > 0) {
    const Index from = groups_before[std::size_t(rank)], to = groups_before[std::size_t(rank) + 1];
    own.info.group_begin =
        moe::IndexVector(all.info.group_begin.segment(from, to - from + 1).array() - first);
  }
  return own;
}

// Every array of a layer of several processes is that of the layer of one.
template <class Own, class Whole>
void expect_same_parameters(const Own& own, const Whole& whole) {
  std::vector<std::pair<std::string, moe::Matrix<typename Whole::Scalar>>> arrays;
  Whole::visit([&](const moe::ParameterInfo& info, const auto& a) { arrays.emplace_back(info.name, a); },
               whole);
  Own::visit(
      [&](const moe::ParameterInfo& info, const auto& a) {
        const auto found = std::find_if(arrays.begin(), arrays.end(),
                                        [&](const auto& named) { return info.name == named.first; });
        ASSERT_TRUE(found != arrays.end()) << info.name;
        EXPECT_TRUE(same_bits(moe::Matrix<typename Whole::Scalar>(a), found->second)) << info.name;
      },
      own);
}

moe::Communicator& world() {
  static moe::Communicator comm(MPI_COMM_WORLD);
  return comm;
}

// One configuration: inference, training forward, a balance loss, backward twice.
template <class S, class R>
void expect_bits_of_one_process(const Setup& s, const R& router, Rng& rng) {
  using Expert = moe::FeedForward<S>;
  using Parallel = moe::ExpertParallel<Expert>;
  const moe::Communicator& comm = world();
  std::vector<Expert> experts = moe::make_experts<Expert>(
      s.num_experts + s.num_shared, {.d_model = s.d_model, .d_ff = s.d_ff, .bias = s.biased}, rng);
  for (Expert& expert : experts) laws::randomise(expert, rng);
  const moe::MoELayer<Expert, R> one(moe::GroupedExperts<Expert>(experts), router, s.num_shared);
  const moe::MoELayer<Expert, moe::JoinedRouter<R>, Parallel> many(Parallel(comm, experts), {comm, router},
                                                                   s.num_shared);
  Batch<S> all = draw_batch<S>(s, rng);
  std::vector<Index> groups_before;
  if (s.grouped) group(s, all.info, groups_before);
  const Batch<S> own = own_batch(s, all, groups_before, comm.rank());
  const Index first = s.begin[std::size_t(comm.rank())], count = own.x.rows();

  EXPECT_TRUE(same_bits(many.forward(own.x, own.info),
                        Matrix<S>(one.forward(all.x, all.info).middleRows(first, count))));

  typename decltype(one)::Cache cache;
  std::remove_cvref_t<decltype(one)> grad = moe::zeros_like(one);
  std::remove_cvref_t<decltype(many)> own_grad = moe::zeros_like(many);
  typename std::remove_cvref_t<decltype(many)>::Cache own_cache;
  Rng noise(7), own_noise(7);
  for (int pass = 0; pass < 2; ++pass) {
    const Matrix<S> y = one.forward(all.x, noise, cache, all.info);
    const Matrix<S> own_y = many.forward(own.x, own_noise, own_cache, own.info);
    EXPECT_TRUE(same_bits(own_y, Matrix<S>(y.middleRows(first, count))));
    const moe::Loss<S> loss = moe::load_balancing_loss(cache.routing);
    const moe::Loss<S> own_loss = moe::load_balancing_loss(own_cache.routing.levels[0]);
    EXPECT_TRUE(same_bits(&loss.value, &own_loss.value, 1));
    const Matrix<S> d_x = one.backward(all.d_y, cache, grad, loss.gradient);
    const Matrix<S> own_d_x =
        many.backward(own.d_y, own_cache, own_grad, many.router().own(own_loss.gradient, own_cache.routing));
    EXPECT_TRUE(same_bits(own_d_x, Matrix<S>(d_x.middleRows(first, count))));
  }
  expect_same_parameters(own_grad, grad);
}

template <class T>
T one_of(Rng& rng, std::initializer_list<T> values) {
  return values.begin()[pick(rng, 0, Index(values.size()) - 1)];
}

template <class S>
void run_top_k(Index number) {
  Rng rng(std::uint64_t(1000 + number));
  const Setup s = draw_setup(rng, world().size());
  moe::TopKOptions options{.d_model = s.d_model,
                           .num_experts = s.num_experts,
                           .top_k = pick(rng, 1, (std::min<Index>)(3, s.num_experts)),
                           .renormalise = rng.uniform() < 0.5,
                           .gate_side = one_of(rng, {moe::GateSide::output, moe::GateSide::input}),
                           .bias = rng.uniform() < 0.5,
                           .noise_stddev = rng.uniform() < 0.3 ? 0.5 : 0,
                           .jitter = rng.uniform() < 0.3 ? 0.1 : 0,
                           .allow_constant_gate = true};
  if (rng.uniform() < 0.6) {
    options.capacity = options.training_capacity = 0.3 + rng.uniform();
    options.overflow =
        one_of(rng, {moe::Overflow::drop, moe::Overflow::next_best, moe::Overflow::pass_through});
    options.priority = one_of(rng, {moe::Priority::token_order, moe::Priority::token_max_gate,
                                    moe::Priority::assignment_gate, moe::Priority::token_max_prob});
    options.renormalise_after_drop = rng.uniform() < 0.3;
  }
  moe::TopKRouter<S> router(options, rng);
  laws::randomise(router, rng);
  expect_bits_of_one_process<S>(s, router, rng);
}

template <class S>
void run_expert_choice(Index number) {
  Rng rng(std::uint64_t(5000 + number));
  const Setup s = draw_setup(rng, world().size());
  const moe::ExpertChoiceRouter<S> router(
      {.d_model = s.d_model,
       .num_experts = s.num_experts,
       .capacity = 0.5 + rng.uniform(),
       .overflow = one_of(rng, {moe::Overflow::drop, moe::Overflow::pass_through})},
      rng);
  expect_bits_of_one_process<S>(s, router, rng);
}

// Every fourth with two threads a process.
void set_threads([[maybe_unused]] Index number) {
#ifdef _OPENMP
  omp_set_num_threads(number % 4 == 0 ? 2 : 1);
#endif
}

// In all these runs a process that sees other bits goes on to the end: the others wait for it.
template <class F>
void for_each_number(Index count, const F& run) {
  for (Index number = 0; number < count; ++number) {
    SCOPED_TRACE(number);
    set_threads(number);
    run(number);
  }
  set_threads(1);
}

TEST(Distributed, TopKInFloat) { for_each_number(120, run_top_k<float>); }
TEST(Distributed, TopKInDouble) { for_each_number(80, run_top_k<double>); }
TEST(Distributed, ExpertChoiceInFloat) { for_each_number(60, run_expert_choice<float>); }
TEST(Distributed, ExpertChoiceInDouble) { for_each_number(40, run_expert_choice<double>); }

// Every token at every expert: its row goes once to each other process that holds experts, and comes back
// once for each expert there.
TEST(Exchange, SendsATokenOnceToAProcess) {
  const moe::Communicator& comm = world();
  const Index experts = 5, tokens = 3 + comm.rank(), processes = comm.size();
  moe::DispatchPlan<float> plan;
  plan.num_tokens = tokens;
  plan.token_state.assign(tokens, moe::TokenState::valid);
  plan.expert_begin.push_back(0);
  for (Index e = 0; e < experts; ++e) {
    for (Index t = 0; t < tokens; ++t) {
      plan.token.push_back(t);
      plan.gate.push_back(float(e + 1));
    }
    plan.expert_begin.push_back(plan.token.size());
  }
  moe::Exchange<float> exchange;
  exchange.prepare(plan, 2, comm);
  Index with_experts = 0, own = 0, others_tokens = 0;
  for (Index p = 0; p < processes; ++p) {
    const Index held =
        moe::first_of_process(experts, p + 1, processes) - moe::first_of_process(experts, p, processes);
    if (p == comm.rank()) own = held;
    if (p != comm.rank()) others_tokens += 3 + p;
    if (p != comm.rank() && held > 0) ++with_experts;
  }
  EXPECT_EQ(exchange.rows_sent(comm), tokens * with_experts);
  EXPECT_EQ(exchange.rows_returned(comm), others_tokens * own);
  // What comes back is by the plan's assignments.
  Matrix<float> x(tokens, 2);
  for (Index t = 0; t < tokens; ++t) x.row(t).setConstant(float(100 * comm.rank() + t));
  moe::RowBuffer<float> rows, back;
  exchange.dispatch(x, true, rows, comm, moe::Sequential{});
  for (Index e = 0; e < own; ++e)
    for (Index r = exchange.expert_begin()[std::size_t(e)];
         r + 1 < exchange.expert_begin()[std::size_t(e) + 1]; ++r)
      EXPECT_LE(*rows.row(r), *rows.row(r + 1));  // by process, then by token
  exchange.collect([] {}, rows, back, comm, moe::Sequential{});
  ASSERT_EQ(back.rows(), plan.num_assignments());
  for (Index a = 0; a < back.rows(); ++a) EXPECT_EQ(*back.row(a), plan.gate[a] * x(plan.token[a], 0));
}

// ---- One process fails, and all hear of it. That none waits is the time limit's.

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const moe::DistributedError& e) {
    return e.what();
  }
  return "nothing thrown";
}

std::string of_last() {
  return "process " + std::to_string(world().size() - 1) + " of " + std::to_string(world().size());
}
bool is_last() { return world().rank() == world().size() - 1; }

struct Failing {
  using Scalar = float;
  bool fails = false;

  Index d_model() const { return 4; }
  void forward(const moe::ConstMatrixRef<float>& x, moe::MatrixRef<float> y) const {
    if (fails) throw std::runtime_error("out of order");
    y = x;
  }
};
using Router = moe::TopKRouter<float>;
using Layer = moe::MoELayer<Failing, moe::JoinedRouter<Router>, moe::ExpertParallel<Failing>>;

Layer failing_layer() {
  Rng rng(1);
  const Index experts = world().size();
  return {moe::ExpertParallel<Failing>(world(), experts, [&](Index e) { return Failing{e == experts - 1}; }),
          {world(), Router({.d_model = 4, .num_experts = experts, .top_k = experts}, rng)}};
}

TEST(Failure, OfAnExpertReachesAll) {
  const Layer layer = failing_layer();
  const std::string message = message_of([&] { layer.forward(Matrix<float>::Ones(3, 4)); });
  EXPECT_THAT(message, HasSubstr(of_last()));
  EXPECT_THAT(message, HasSubstr("out of order"));
}

TEST(Failure, OfAnArgumentReachesAll) {
  const Layer layer = failing_layer();
  const std::string message = message_of([&] {
    moe::together(world(), [&] { return layer.forward(Matrix<float>::Ones(3, is_last() ? 5 : 4)); });
  });
  EXPECT_THAT(message, HasSubstr(of_last()));
  EXPECT_THAT(message, HasSubstr("x has 5 columns, expected d_model = 4"));
}

TEST(Failure, AfterTheLastCallReachesAll) {
  const std::string message = message_of([&] {
    moe::together(world(), [&] {
      if (is_last()) throw std::logic_error("too late");
    });
  });
  EXPECT_THAT(message, HasSubstr(of_last() + ": too late"));
}

TEST(Failure, ProcessesThatDisagreeAreTold) {
  if (world().size() == 1) GTEST_SKIP() << "one process agrees with itself";
  const std::string number = message_of(
      [&] { moe::ExpertParallel<Failing>(world(), is_last() ? 3 : 4, [](Index) { return Failing{}; }); });
  EXPECT_THAT(number, HasSubstr(of_last() + ": it is at ExpertParallel (experts = 3"));
  const Layer layer = failing_layer();
  const std::string step = message_of([&] {
    moe::together(world(), [&] {
      if (!is_last()) layer.forward(Matrix<float>::Ones(1, 4));
    });
  });
  EXPECT_THAT(step, HasSubstr(of_last() + ": it is at the end of together"));
  const std::string random = message_of([&] {
    Rng rng(is_last() ? 1 : 2);
    moe::Routing<float> routing;
    moe::RouterWorkspace<float> workspace;
    layer.router().route(Matrix<float>::Ones(1, 4), rng, {}, routing, workspace);
  });
  EXPECT_THAT(random, HasSubstr("random"));
}

}  // namespace

int main(int argc, char** argv) {
  int level = 0;
  set_threads(1);
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  testing::InitGoogleTest(&argc, argv);
  const int own = RUN_ALL_TESTS();
  int failed = 0;
  MPI_Allreduce(&own, &failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return failed;
}
