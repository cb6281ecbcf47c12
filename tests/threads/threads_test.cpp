// SPDX-License-Identifier: MIT
// Several threads may call one layer, and a task may call one. These tests are built with and without OpenMP,
// and run under ThreadSanitizer.
#include <gtest/gtest.h>

#include <thread>
#include <type_traits>
#include <unsupported/Eigen/CXX11/ThreadPool>
#include <vector>

#include <moe/moe.hpp>

namespace moe {
namespace {

#ifndef _OPENMP
static_assert(std::is_same_v<DefaultExecutor, Sequential>);
#endif

TEST(Threads, ManyCallersMayShareALayer) {
  Rng rng(3);
  const MoELayer layer(make_experts<GatedFeedForward<float>>(4, {.d_model = 16, .d_ff = 24}, rng),
                       TopKRouter<float>({.d_model = 16, .num_experts = 4}, rng));
  Matrix<float> x(150, 16);
  fill_normal(x, 1.0, rng);
  const Matrix<float> expected = layer.forward(x, BatchInfo{}, Sequential{});
  const Routing<float> routing = layer.route(x, BatchInfo{}, Sequential{});
  Eigen::ThreadPool pool(2);
  std::vector<Matrix<float>> results(6);
  std::vector<std::thread> callers;
  for (std::size_t i = 0; i < results.size(); ++i)
    callers.emplace_back([&, i] {
      if (i % 3 == 0)
        results[i] = layer.forward(x);
      else if (i % 3 == 1)
        results[i] = layer.forward(x, BatchInfo{}, ThreadPoolExecutor(pool));
      else
        results[i] = layer.forward(x, routing, Sequential{});
    });
  for (std::thread& caller : callers) caller.join();
  for (const Matrix<float>& y : results) EXPECT_TRUE(y == expected);
}

TEST(Threads, ACallFromInsideATaskRunsThere) {
  Rng rng(3);
  const MoELayer layer(make_experts<FeedForward<float>>(3, {.d_model = 8, .d_ff = 8}, rng),
                       TopKRouter<float>({.d_model = 8, .num_experts = 3}, rng));
  Matrix<float> x(800, 8);
  fill_normal(x, 1.0, rng);
  const Matrix<float> expected = layer.forward(x, BatchInfo{}, Sequential{});
  Eigen::ThreadPool pool(3);
  const ThreadPoolExecutor executor(pool);
  std::vector<Matrix<float>> results(8);
  executor.for_each(
      8, [&](Index task, Index) { results[std::size_t(task)] = layer.forward(x, BatchInfo{}, executor); });
  for (const Matrix<float>& y : results) EXPECT_TRUE(y == expected);
}

}  // namespace
}  // namespace moe
