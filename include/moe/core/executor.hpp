// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

#ifdef _OPENMP
#include <omp.h>
#endif

// Who runs the tasks. An executor has
//   for_each(n, f)   calls f(task, worker) once for every task in [0, n) and returns when all have
//                    ended; the first exception is then rethrown on the caller
//   concurrency()    an upper bound of `worker` + 1, for sizing scratch
// Tasks may run in any order and one after the other: none may wait for another. A call from inside
// one of several tasks runs on that task's thread. Results of the library do not depend on the executor.
namespace moe {

/// What runs tasks: for_each(n, f) calls f(task, worker) once for every task in [0, n) and returns when all
/// have ended, then rethrows the first exception; worker is below concurrency(). Tasks may run in any order.
template <class E>
concept Executor = requires(const E& executor, Index n, void (*f)(Index, Index)) {
  executor.for_each(n, f);
  { executor.concurrency() } -> std::convertible_to<Index>;
};

namespace detail {

// A function of a task and a worker, during a call, without its type: what runs tasks is compiled once.
class Task {
 public:
  template <class F>
  explicit Task(F& f)
      : f_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* to, Index task, Index worker) { (*static_cast<F*>(to))(task, worker); }) {}

  void operator()(Index task, Index worker) const { call_(f_, task, worker); }

 private:
  void* f_;
  void (*call_)(void* to, Index task, Index worker);
};

[[gnu::noinline]] inline void run_in_order(Index n, const Task& f) {
  std::exception_ptr first;
  for (Index i = 0; i < n; ++i) {
    try {
      f(i, 0);
    } catch (...) {
      if (!first) first = std::current_exception();
    }
  }
  if (first) std::rethrow_exception(first);
}

}  // namespace detail

/// Runs every task on the calling thread, in order.
struct Sequential {
  Index concurrency() const { return 1; }
  template <class F>
  void for_each(Index n, F&& f) const {
    detail::run_in_order(n, detail::Task(f));
  }
};

namespace detail {

// Keeps the first exception that any thread gives it.
class FirstException {
 public:
  template <class F>
  void run(F&& f) noexcept {
    try {
      f();
    } catch (...) {
      keep();
    }
  }
  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  [[gnu::noinline]] void keep() noexcept {
    const std::lock_guard lock(mutex_);
    if (!exception_) exception_ = std::current_exception();
  }

  std::mutex mutex_;
  std::exception_ptr exception_;
};

}  // namespace detail

/// Multiply-adds that take about as long as to wake threads for them.
inline constexpr Index kLeastShared = Index(1) << 17;

/// executor.for_each(n, f), but on the calling thread where all tasks together have so few multiply-adds that
/// it is done before other threads are awake. A call from inside such a task may use the executor's threads.
template <Executor E, class F>
void for_each_shared(Index n, Index multiply_adds, const E& executor, F&& f) {
  if (multiply_adds < kLeastShared)
    Sequential{}.for_each(n, f);
  else
    executor.for_each(n, f);
}

#ifdef _OPENMP
/// Runs tasks on an OpenMP team. Exists where the translation unit is compiled with OpenMP.
struct OpenMP {
  /// Number of threads; 0 takes what omp_get_max_threads() says at each call.
  int num_threads = 0;

  /// Throws std::invalid_argument when num_threads is negative.
  Index concurrency() const {
    require(num_threads >= 0, "OpenMP: num_threads = ", num_threads, ", expected at least 0");
    return num_threads > 0 ? num_threads : omp_get_max_threads();
  }
  template <class F>
  void for_each(Index n, F&& f) const {
    const int threads = int(std::min<Index>(n, concurrency()));
    if (threads <= 1 || omp_in_parallel()) return Sequential{}.for_each(n, f);
    run_on_team(n, threads, detail::Task(f));
  }

 private:
  [[gnu::noinline]] static void run_on_team(Index n, int threads, const detail::Task& f) {
    detail::FirstException first;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (Index i = 0; i < n; ++i) first.run([&] { f(i, Index(omp_get_thread_num())); });
    first.rethrow();
  }
};
#endif

namespace detail {

// Whether this thread runs a task of a ThreadPoolExecutor. The pool does not know it of the thread
// that waits for it.
inline constinit thread_local bool inside_task = false;

// How the caller of a pool and its helpers part. A pool may start a helper long after the call, which does
// not wait for it then: the helpers own this together with the caller.
class Helpers {
 public:
  // A helper's part: runs f, which may use what is the caller's, unless the call has ended.
  template <class F>
  void help(const F& f) {
    {
      const std::lock_guard lock(mutex_);
      if (ended_) return;
      ++helping_;
    }
    f();
    const std::lock_guard lock(mutex_);
    if (--helping_ == 0) nobody_helps_.notify_one();
  }
  // The caller's, when there is nothing left to take: waits for those who still work.
  void end() {
    std::unique_lock lock(mutex_);
    ended_ = true;
    nobody_helps_.wait(lock, [&] { return helping_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable nobody_helps_;
  Index helping_ = 0;
  bool ended_ = false;
};

}  // namespace detail

/// Runs tasks on a pool of Eigen's kind (Eigen::ThreadPoolInterface), the calling thread included, which
/// waits for nobody but who has taken a task: where all threads of the pool are busy, it runs all of them.
/// The pool is borrowed. A template, because the pool's header moved between Eigen versions.
/// @code
/// Eigen::ThreadPool pool(3);  // of <unsupported/Eigen/CXX11/ThreadPool>
/// std::atomic<moe::Index> sum = 0;
/// moe::ThreadPoolExecutor(pool).for_each(10, [&](moe::Index task, moe::Index) { sum += task; });
/// assert(sum == 45);
/// @endcode
template <class Pool>
class ThreadPoolExecutor {
 public:
  /// Refers to the pool, which must outlive it.
  explicit ThreadPoolExecutor(Pool& pool) : pool_(&pool) {}

  Index concurrency() const { return Index(pool_->NumThreads()) + 1; }
  template <class F>
  void for_each(Index n, F&& f) const {
    const Index helpers = std::min<Index>(n, concurrency()) - 1;
    if (helpers < 1 || detail::inside_task || pool_->CurrentThreadId() >= 0)
      return Sequential{}.for_each(n, f);
    detail::FirstException first;
    std::atomic<Index> next{0};
    const auto work = [&](Index worker) {
      detail::inside_task = true;
      for (Index i; (i = next.fetch_add(1)) < n;) first.run([&] { f(i, worker); });
      detail::inside_task = false;
    };
    const auto shared = std::make_shared<detail::Helpers>();
    first.run([&] {  // where the pool refuses a helper, the others do its share
      for (Index worker = 1; worker <= helpers; ++worker)
        pool_->Schedule([shared, worker, &work] { shared->help([&] { work(worker); }); });
    });
    work(0);
    shared->end();
    first.rethrow();
  }

 private:
  Pool* pool_;
};

/// What calls use that name no executor: Eigen's own rule. A type, so that translation units
/// compiled with and without OpenMP may be linked together.
#ifdef _OPENMP
using DefaultExecutor = OpenMP;
#else
using DefaultExecutor = Sequential;
#endif

/// Tokens that one task of the library takes at a time: fixed, so that results do not depend on how
/// many workers there are.
inline constexpr Index kTokenBlock = 64;

/// Calls f(begin, end, worker) for every block of at most kTokenBlock of n rows.
template <class F, Executor E>
void for_each_block(Index n, const E& executor, F&& f) {
  executor.for_each((n + kTokenBlock - 1) / kTokenBlock, [&](Index block, Index worker) {
    f(block * kTokenBlock, (std::min)(n, (block + 1) * kTokenBlock), worker);
  });
}

}  // namespace moe
