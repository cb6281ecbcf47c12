// SPDX-License-Identifier: MIT
// A child of fork() has the calling thread alone: what starts no threads works there, also after the parent
// has run in parallel.
#if __has_include(<sys/wait.h>) && __has_include(<unistd.h>)
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include <csignal>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "../laws.hpp"
#include "../sanitized.hpp"

namespace moe {
namespace {

// Runs f in a child, which it ends: with 0 where f gives true. The child has a minute, then a signal ends it.
template <class F>
void expect_true_in_a_child(const F& f, const char* what) {
  const pid_t child = fork();
  ASSERT_GE(child, 0) << what;
  if (child == 0) {
    alarm(60);
    bool ok = false;
    try {
      ok = f();
    } catch (...) {
      _exit(2);
    }
    _exit(ok ? 0 : 1);  // not exit(), which would wait for the parent's threads
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child) << what;
  EXPECT_FALSE(WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) << what << ": the child hangs";
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << what << ": status " << status;
}

TEST(Fork, ExecutorsWithoutThreadsWorkInAChildOfAParallelProgram) {
  if (kSanitized) GTEST_SKIP() << "sanitizers do not follow a fork of several threads";
  Rng rng(1);
  using E = GatedFeedForward<float>;
  const E::Options options{.d_model = 32, .d_ff = 48};
  const MoELayer layer(make_experts<E>(6, options, rng),
                       TopKRouter<float>({.d_model = 32, .num_experts = 6}, rng),
                       {make_experts<E>(1, options, rng), true});
  const auto packed = pack<F32>(layer);
  const Matrix<float> x = laws::normal_matrix<float>(300, 32, rng);
  using Layer = std::remove_const_t<decltype(layer)>;
  Eigen::ThreadPool pool(2);
  const ThreadPoolExecutor of_pool(pool);
#ifdef _OPENMP
  const OpenMP parallel{2};
#else
  const auto& parallel = of_pool;
#endif
  Layer::Cache cache;
  Layer grad = zeros_like(layer);
  const Matrix<float> y = layer.forward(x, cache, {}, parallel), y_packed = packed.forward(x, {}, parallel);
  const Matrix<float> d_x = layer.backward(x, cache, grad, {}, parallel);
  EXPECT_TRUE(laws::same_bits(layer.forward(x, {}, of_pool), y));
  const auto same_with = [&](const auto& executor) {
    Layer::Cache own;
    Layer own_grad = zeros_like(layer);
    return laws::same_bits(layer.forward(x, {}, executor), y) &&
           laws::same_bits(packed.forward(x, {}, executor), y_packed) &&
           laws::same_bits(layer.forward(x, own, {}, executor), y) &&
           laws::same_bits(layer.backward(x, own, own_grad, {}, executor), d_x);
  };
  expect_true_in_a_child([&] { return same_with(Sequential{}); }, "Sequential");
#ifdef _OPENMP
  expect_true_in_a_child([&] { return same_with(OpenMP{1}); }, "OpenMP of one thread");
#endif
  expect_true_in_a_child(
      [&] {
        Eigen::ThreadPool childs(2);
        return same_with(ThreadPoolExecutor(childs));
      },
      "a pool of the child");
  EXPECT_TRUE(laws::same_bits(layer.forward(x, {}, parallel), y));  // the parent's threads are still there
}

}  // namespace
}  // namespace moe
#endif
