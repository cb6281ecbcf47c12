// SPDX-License-Identifier: MIT
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include <moe/core/executor.hpp>

namespace executor_test {
namespace {

using moe::Index;

// Every executor of the library, each made by a type of its own.
struct MakeSequential {
  moe::Sequential executor{};
};
template <int kThreads>
struct MakePool {
  Eigen::ThreadPool pool{kThreads};
  moe::ThreadPoolExecutor<Eigen::ThreadPool> executor{pool};
};
#ifdef _OPENMP
template <int kThreads>
struct MakeOpenMP {
  moe::OpenMP executor{kThreads};
};
using Makers = testing::Types<MakeSequential, MakePool<1>, MakePool<3>, MakeOpenMP<0>, MakeOpenMP<1>,
                              MakeOpenMP<2>, MakeOpenMP<3>>;
static_assert(std::is_same_v<moe::DefaultExecutor, moe::OpenMP>);
static_assert(moe::Executor<moe::OpenMP>);
#else
using Makers = testing::Types<MakeSequential, MakePool<1>, MakePool<3>>;
static_assert(std::is_same_v<moe::DefaultExecutor, moe::Sequential>);
#endif
static_assert(moe::Executor<moe::Sequential>);
static_assert(moe::Executor<moe::ThreadPoolExecutor<Eigen::ThreadPool>>);
static_assert(!moe::Executor<int>);

template <class Maker>
class ExecutorOf : public testing::Test {
 protected:
  Maker maker_{};
};
TYPED_TEST_SUITE(ExecutorOf, Makers);

TYPED_TEST(ExecutorOf, RunsEveryTaskOnce) {
  const auto& executor = this->maker_.executor;
  for (const Index n : {0, 1, 2, 3, 7, 64, 1000}) {
    std::vector<std::atomic<int>> count(static_cast<std::size_t>(n));
    executor.for_each(n, [&](Index task, Index) { ++count[std::size_t(task)]; });
    for (const auto& c : count) EXPECT_EQ(c, 1) << "of " << n;
  }
}

// Counts the calls that reach it.
struct Counting {
  int* calls;
  Index concurrency() const { return 3; }
  template <class F>
  void for_each(Index n, F&& f) const {
    ++*calls;
    for (Index i = 0; i < n; ++i) f(i, 2);
  }
};

TEST(Executor, ThreadsAreNotWokenForLittleWork) {
  int calls = 0, tasks = 0;
  Index last_worker = -1;
  const auto task = [&](Index, Index worker) {
    ++tasks;
    last_worker = worker;
  };
  moe::for_each_shared(5, moe::kLeastShared - 1, Counting{&calls}, task);
  EXPECT_EQ(calls, 0);
  EXPECT_EQ(tasks, 5);
  EXPECT_EQ(last_worker, 0);
  moe::for_each_shared(5, moe::kLeastShared, Counting{&calls}, task);
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(tasks, 10);
  EXPECT_EQ(last_worker, 2);
}

TYPED_TEST(ExecutorOf, NoTasksAreNoCalls) {
  for (const Index n : {0, -1, -100}) this->maker_.executor.for_each(n, [&](Index, Index) { ADD_FAILURE(); });
}

TYPED_TEST(ExecutorOf, WorkersAreBelowItsConcurrency) {
  const auto& executor = this->maker_.executor;
  const Index concurrency = executor.concurrency();
  EXPECT_GE(concurrency, 1);
  std::mutex mutex;
  std::set<Index> workers;
  executor.for_each(500, [&](Index, Index worker) {
    const std::lock_guard lock(mutex);
    workers.insert(worker);
  });
  EXPECT_GE(*workers.begin(), 0);
  EXPECT_LT(*workers.rbegin(), concurrency);
}

TYPED_TEST(ExecutorOf, AWorkerIsOneThreadAtATime) {
  const auto& executor = this->maker_.executor;
  std::vector<std::atomic<int>> busy(std::size_t(executor.concurrency()));
  executor.for_each(300, [&](Index, Index worker) {
    EXPECT_EQ(busy[std::size_t(worker)].fetch_add(1), 0);
    std::this_thread::yield();
    busy[std::size_t(worker)].fetch_sub(1);
  });
}

TYPED_TEST(ExecutorOf, ReturnsOnlyWhenAllHaveEnded) {
  std::atomic<int> ended{0};
  this->maker_.executor.for_each(50, [&](Index, Index) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    ++ended;
  });
  EXPECT_EQ(ended, 50);
}

TYPED_TEST(ExecutorOf, RethrowsAnExceptionAfterAllTasksHaveEnded) {
  std::atomic<int> ended{0};
  try {
    this->maker_.executor.for_each(100, [&](Index task, Index) {
      if (task == 13) throw std::runtime_error("task 13");
      ++ended;
    });
    FAIL() << "nothing was thrown";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "task 13");
  }
  EXPECT_EQ(ended, 99);
}

TYPED_TEST(ExecutorOf, OfManyExceptionsRethrowsOneAndIsFitForUseAgain) {
  const auto& executor = this->maker_.executor;
  std::atomic<int> thrown{0};
  EXPECT_THROW(executor.for_each(40,
                                 [&](Index task, Index) {
                                   ++thrown;
                                   throw std::out_of_range(std::to_string(task));
                                 }),
               std::out_of_range);
  EXPECT_EQ(thrown, 40);
  std::atomic<int> count{0};
  executor.for_each(40, [&](Index, Index) { ++count; });
  EXPECT_EQ(count, 40);
}

// On the caller's own thread too, which works like the others.
TYPED_TEST(ExecutorOf, ACallFromInsideATaskRunsOnItsThread) {
  const auto& executor = this->maker_.executor;
  for (const Index outer : {2, 8}) {  // of 2, some threads of the pool have nothing else to do
    std::atomic<int> inner{0}, elsewhere{0};
    executor.for_each(outer, [&](Index, Index) {
      const auto thread = std::this_thread::get_id();
      executor.for_each(5, [&](Index, Index worker) {
        elsewhere += std::this_thread::get_id() != thread;
        EXPECT_LT(worker, executor.concurrency());
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // time for others to take one
        ++inner;
      });
    });
    EXPECT_EQ(inner, 5 * outer);
    EXPECT_EQ(elsewhere, 0);
  }
}

TYPED_TEST(ExecutorOf, AnExceptionOfAnInnerCallReachesTheCaller) {
  const auto& executor = this->maker_.executor;
  EXPECT_THROW(
      executor.for_each(
          4,
          [&](Index, Index) { executor.for_each(3, [](Index, Index) { throw std::logic_error("inner"); }); }),
      std::logic_error);
}

TYPED_TEST(ExecutorOf, BlocksCoverEveryRowOnce) {
  for (const Index n : {0, 1, 63, 64, 65, 200}) {
    std::vector<std::atomic<int>> count(static_cast<std::size_t>(n));
    moe::for_each_block(n, this->maker_.executor, [&](Index begin, Index end, Index) {
      EXPECT_LT(begin, end);
      EXPECT_LE(end - begin, moe::kTokenBlock);
      for (Index i = begin; i < end; ++i) ++count[std::size_t(i)];
    });
    for (const auto& c : count) EXPECT_EQ(c, 1);
  }
}

TEST(Sequential, RunsInOrderOnTheCallersThreadAndRethrowsTheFirst) {
  std::vector<Index> order;
  const auto caller = std::this_thread::get_id();
  try {
    moe::Sequential{}.for_each(5, [&](Index task, Index worker) {
      EXPECT_EQ(worker, 0);
      EXPECT_EQ(std::this_thread::get_id(), caller);
      order.push_back(task);
      if (task >= 2) throw std::runtime_error(std::to_string(task));
    });
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "2");
  }
  EXPECT_EQ(order, (std::vector<Index>{0, 1, 2, 3, 4}));
}

TEST(ThreadPoolExecutor, UsesThePoolAndTheCaller) {
  Eigen::ThreadPool pool(2);
  const moe::ThreadPoolExecutor executor(pool);
  EXPECT_EQ(executor.concurrency(), 3);
  // Two tasks that wait for each other would hang on one thread.
  std::atomic<int> arrived{0};
  std::set<std::thread::id> threads;
  std::mutex mutex;
  executor.for_each(3, [&](Index, Index) {
    {
      const std::lock_guard lock(mutex);
      threads.insert(std::this_thread::get_id());
    }
    ++arrived;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (arrived < 3 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  });
  EXPECT_EQ(threads.size(), 3u);
  EXPECT_EQ(threads.count(std::this_thread::get_id()), 1u);
}

TEST(ThreadPoolExecutor, RunsInlineOnAThreadOfItsPool) {
  Eigen::ThreadPool pool(1);
  const moe::ThreadPoolExecutor executor(pool);
  std::atomic<int> count{0};
  std::atomic<bool> ended{false};
  pool.Schedule([&] {  // with the only thread busy here, waiting for it would hang
    executor.for_each(10, [&](Index, Index) { ++count; });
    ended = true;
  });
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!ended && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  EXPECT_TRUE(ended);
  EXPECT_EQ(count, 10);
}

// Every thread of the pool waits for the call, which so has no helper. They give up in the end, so that
// a call that waits for them in turn fails this test and does not hang it.
TEST(ThreadPoolExecutor, DoesNotWaitForThreadsThatWaitForIt) {
  constexpr int kThreads = 2;
  auto calls = std::make_unique<std::atomic<int>>(0);
  std::atomic<int> waiting{0}, gave_up{0};
  std::atomic<bool> ended{false};
  {
    Eigen::ThreadPool pool(kThreads);
    for (int i = 0; i < kThreads; ++i)
      pool.Schedule([&] {
        ++waiting;
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (!ended && std::chrono::steady_clock::now() < end) std::this_thread::yield();
        gave_up += !ended;
      });
    while (waiting < kThreads) std::this_thread::yield();
    moe::ThreadPoolExecutor(pool).for_each(10, [&count = *calls](Index, Index) { ++count; });
    EXPECT_EQ(*calls, 10);
    calls.reset();  // helpers that start now have nothing to take and must not look for it
    ended = true;
  }  // they have started when the pool is gone
  EXPECT_EQ(gave_up, 0);
}

// A pool that takes one task and has no memory for the next.
class FullPool : public Eigen::ThreadPool {
 public:
  FullPool() : Eigen::ThreadPool(3) {}
  void Schedule(std::function<void()> task) override {
    if (taken_++ > 0) throw std::bad_alloc();
    Eigen::ThreadPool::Schedule(std::move(task));
  }

 private:
  int taken_ = 0;
};

TEST(ThreadPoolExecutor, APoolThatRefusesATaskIsReportedAfterAllTasksHaveEnded) {
  FullPool pool;
  std::atomic<int> count{0};
  EXPECT_THROW(moe::ThreadPoolExecutor<FullPool>(pool).for_each(100, [&](Index, Index) { ++count; }),
               std::bad_alloc);
  EXPECT_EQ(count, 100);
}

#ifdef _OPENMP
TEST(OpenMP, TakesTheNumberOfThreadsItIsGivenOrThatOfOpenMp) {
  EXPECT_EQ(moe::OpenMP{3}.concurrency(), 3);
  const int before = omp_get_max_threads();
  for (const int threads : {1, 2, 3}) {
    omp_set_num_threads(threads);
    EXPECT_EQ(moe::OpenMP{}.concurrency(), threads);
    EXPECT_EQ(moe::OpenMP{2}.concurrency(), 2);
  }
  omp_set_num_threads(before);
}

TEST(OpenMP, RunsInlineInsideAParallelRegionOfTheCaller) {
  std::atomic<int> count{0}, elsewhere{0};
#pragma omp parallel num_threads(2)
  {
    const auto thread = std::this_thread::get_id();
    moe::OpenMP{3}.for_each(10, [&](Index, Index worker) {
      elsewhere += std::this_thread::get_id() != thread || worker != 0;
      ++count;
    });
  }
  EXPECT_EQ(count, 10 * 2);
  EXPECT_EQ(elsewhere, 0);
}
#endif

}  // namespace
}  // namespace executor_test
