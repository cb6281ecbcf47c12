// SPDX-License-Identifier: MIT
// A packed layer's results are bitwise the same for every executor and number of threads.
#include <gtest/gtest.h>

#include <cstring>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

namespace moe {
namespace {

template <class... Formats>
void expect_same_for_every_executor(GateSide side, Overflow overflow, const PackOptions& options = {}) {
  using E = GatedFeedForward<float>;
  Rng rng(1);
  const MoELayer layer(make_experts<E>(7, {.d_model = 33, .d_ff = 29}, rng),
                       TopKRouter<float>({.d_model = 33,
                                          .num_experts = 7,
                                          .top_k = 2,
                                          .gate_side = side,
                                          .capacity = 1.0,
                                          .overflow = overflow},
                                         rng),
                       {make_experts<E>(2, {.d_model = 33, .d_ff = 50}, rng), side == GateSide::output},
                       true);
  const auto fast = pack<Formats...>(
      layer, [](Index e) { return e % Index(sizeof...(Formats)); }, options);
  Matrix<float> x(537, 33);
  fill_normal(x, 1.0, rng);
  BatchInfo info;
  info.mask = Mask::Constant(x.rows(), true);
  for (const Index t : {0, 17, 64, 200, 536}) info.mask[t] = false;
  const Matrix<float> expected = fast.forward(x, info, Sequential{});
  const auto expect_same = [&](const auto& executor, const char* what, int threads) {
    const Matrix<float> y = fast.forward(x, info, executor);
    EXPECT_EQ(std::memcmp(y.data(), expected.data(), std::size_t(y.size()) * sizeof(float)), 0)
        << what << ", " << threads << " threads";
  };
  for (const int threads : {1, 2, 3, 8}) {
    Eigen::ThreadPool pool(threads);
    expect_same(ThreadPoolExecutor(pool), "thread pool", threads);
#ifdef _OPENMP
    expect_same(OpenMP{.num_threads = threads}, "OpenMP", threads);
#endif
  }
  expect_same(DefaultExecutor{}, "default", 0);
}

TEST(Threads, PackedLayersAreTheSameForEveryExecutor) {
  expect_same_for_every_executor<F32>(GateSide::output, Overflow::pass_through);
  expect_same_for_every_executor<F32>(GateSide::input, Overflow::drop);
  expect_same_for_every_executor<BF16>(GateSide::output, Overflow::next_best);
  expect_same_for_every_executor<Int8>(GateSide::output, Overflow::next_best);
  expect_same_for_every_executor<Int4Offset>(GateSide::input, Overflow::drop);
  expect_same_for_every_executor<FP8>(GateSide::output, Overflow::drop);
  expect_same_for_every_executor<Int4>(GateSide::output, Overflow::drop, {.int8_activations = true});
  expect_same_for_every_executor<MXFP4, BF16>(GateSide::output, Overflow::drop, {.int8_activations = true});
  expect_same_for_every_executor<Int4, BF16, F32>(GateSide::output, Overflow::drop);
}

}  // namespace
}  // namespace moe
