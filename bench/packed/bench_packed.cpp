// SPDX-License-Identifier: MIT
// Packed layers of the shapes of known models, against what the machine can do and against loops that
// a user would write. See README.md for the rows and counters.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "bench.hpp"
#include "machine.hpp"
#include "packed/layers.hpp"
#include "peers/peers.hpp"

namespace moe::bench {
namespace {

enum class Routed { uniform, skewed, router };
enum class Weights { f32, bf16, bf16_dot };
constexpr const char* kRouted[] = {"uniform", "skewed", "router"};
constexpr const char* kWeights[] = {"f32", "bf16", "bf16_dot"};
std::unique_ptr<AnyLayer> make_layer(const Shape& shape, Weights weights) {
  using Gated = GatedFeedForward<float>;
  using Plain = FeedForward<float, ReLU>;
  if (shape.gated && weights == Weights::f32)
    return std::make_unique<Layer<F32, Gated>>(shape, PackOptions{});
  const PackOptions options{.bf16_dot_product = weights == Weights::bf16_dot};
  if (shape.gated) return std::make_unique<Layer<BF16, Gated>>(shape, options);
  if (weights == Weights::f32) return std::make_unique<Layer<F32, Plain>>(shape, PackOptions{});
  return std::make_unique<Layer<BF16, Plain>>(shape, options);
}

// The layer of the row before, and its peers.
struct Held {
  const Shape* shape = nullptr;
  Weights weights{};
  std::unique_ptr<AnyLayer> layer;
  const Shape* peers_shape = nullptr;
  PeerWeights peer_weights;
  struct Contender {
    const char* counter;
    std::unique_ptr<Peer> peer;
  };
  std::vector<Contender> peers;

  AnyLayer& layer_of(const Shape& wanted, Weights format) {
    if (shape != &wanted || weights != format || !layer) {
      layer.reset();
      if (peers_shape != &wanted) drop_peers();
      layer = make_layer(wanted, format);
      shape = &wanted;
      weights = format;
    }
    return *layer;
  }
  std::vector<Contender>& peers_of(const Shape& wanted) {
    if (peers_shape != &wanted) {
      drop_peers();
      peer_weights.d_model = wanted.d_model;
      peer_weights.d_ff = wanted.d_ff;
      peer_weights.num_experts = wanted.count();
      peer_weights.gated = wanted.gated;
      for (Index e = 0; e < peer_experts(wanted); ++e) {
        Filled w = make_weights(wanted, e);
        peer_weights.gate.push_back(std::move(w.gate));
        peer_weights.up.push_back(std::move(w.up));
        peer_weights.down.push_back(std::move(w.down));
      }
      peers.push_back({"vs_eigen", eigen_peer(peer_weights, kMaxThreads)});
#ifdef MOE_BENCH_ONEDNN
      peers.push_back({"vs_onednn", onednn_peer(peer_weights, kMaxThreads, false)});
      if (is_available(InstructionSet::avx512))  // what its bfloat16 needs
        peers.push_back({"vs_onednn_bf16", onednn_peer(peer_weights, kMaxThreads, true)});
#endif
#ifdef MOE_BENCH_OPENBLAS
      peers.push_back({"vs_blas", openblas_peer(peer_weights, kMaxThreads)});
#endif
      peers_shape = &wanted;
    }
    return peers;
  }
  void drop_peers() {
    peers.clear();
    peer_weights = {};
    peers_shape = nullptr;
  }
};
Held& held() {
  static Held held;
  return held;
}

// ---- Measuring.

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}
double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum / double(values.size());
}

// What the machine does around a row.
class Machine {
 public:
  Machine(const Shape& shape, InstructionSet set, Weights weights, int threads)
      : set_(set), weights_(weights), threads_(threads), megabytes_(shape.tiny ? 8 : 512) {}
  void probe() {
    bandwidth_.push_back(bench::bandwidth(threads_, megabytes_));
    if (peak_.size() < 6)
      peak_.push_back(weights_ == Weights::f32
                          ? bench::peak_flops(set_, threads_)
                          : bench::peak_bf16_flops(set_, weights_ == Weights::bf16_dot, threads_));
  }
  double bandwidth() const { return mean(bandwidth_); }
  double peak() const { return mean(peak_); }

 private:
  InstructionSet set_;
  Weights weights_;
  int threads_;
  Index megabytes_;
  std::vector<double> bandwidth_, peak_;
};

struct Work {
  double flops = 0, bytes = 0;
};
Work work_of(const Shape& shape, const DispatchPlan<float>& plan, std::size_t memory_bytes) {
  Index touched = 0;
  for (Index e = 0; e < plan.num_experts(); ++e) touched += plan.rows_of(e) > 0;
  return {2 * double(plan.num_assignments()) * shape.expert_parameters(),
          double(memory_bytes) / double(shape.count()) * double(touched) +
              2 * double(plan.num_tokens * shape.d_model) * sizeof(float)};
}

struct Batch {
  std::vector<Routing<float>> routings;
  std::vector<DispatchPlan<float>> plans;  // with shared experts

  Batch(const Shape& shape, Index tokens, bool skewed) {
    for (Index r = 0; r < 16; ++r) {
      routings.push_back(make_routing(shape, tokens, skewed, r));
      plans.push_back(with_shared(routings.back().plan, shape.num_shared));
    }
  }
};

// One of those that are timed in turn.
struct Runner {
  std::function<void(std::size_t)> run;  // repetition
  std::vector<double> seconds{};
  std::size_t repetition = 0;

  void time() {
    const std::size_t r = repetition++ % 16;
    seconds.push_back(seconds_of([&] { run(r); }));
  }
};

void run_row(benchmark::State& state, const Shape& shape, Weights weights, Index tokens, Routed routed,
             int threads) {
  AnyLayer& layer = held().layer_of(shape, weights);
  const bool skewed = routed == Routed::skewed;
  Matrix<float> x;
  fill(x, tokens, shape.d_model, 7);
  x *= std::sqrt(float(shape.d_model));
  const Batch batch(shape, tokens, skewed), uniform(shape, tokens, false);

  std::vector<Runner> runners;
  runners.push_back({[&](std::size_t r) { layer.forward(x, batch.routings[r], threads); }});
  if (skewed) runners.push_back({[&](std::size_t r) { layer.forward(x, uniform.routings[r], threads); }});
  Matrix<float> y;
  std::map<std::string, std::vector<std::size_t>> runners_of;
  std::size_t without_blas = 0;
  layer.forward(x, batch.routings[0], threads);
  const Matrix<float> expected = layer.y;
  for (auto& [counter, peer] : held().peers_of(shape)) {
    if (weights == Weights::f32 && counter == std::string("vs_onednn_bf16")) continue;
    if (counter == std::string("vs_blas")) without_blas = runners.size();
    for (const Spread spread : {Spread::experts, Spread::products}) {
      if (spread == Spread::products && threads == 1) continue;
      for (const auto& plan : batch.plans) peer->prepare(plan, threads, spread);
      runners.push_back({[&, peer = peer.get(), spread](std::size_t r) {
        peer->forward(x, batch.plans[r], threads, spread, y);
      }});
      Runner& runner = runners.back();
      runner.time();
      const float error = (y - expected).cwiseAbs().maxCoeff() / expected.cwiseAbs().maxCoeff();
      if (!(error < (weights == Weights::f32 ? 1e-4f : 3e-2f))) {
        state.SkipWithError((std::string(counter) + " has another result").c_str());
        return;
      }
      // Of two ways to use threads the one that is far behind is not measured further.
      auto& ways = runners_of[counter];
      if (!ways.empty() && runner.seconds[0] > 1.5 * runners[ways[0]].seconds[0]) {
        runners.pop_back();
      } else if (!ways.empty() && 1.5 * runner.seconds[0] < runners[ways[0]].seconds[0]) {
        runners[ways[0]] = std::move(runner);
        runners.pop_back();
      } else {
        ways.push_back(runners.size() - 1);
      }
    }
  }
  if (without_blas == 0) without_blas = runners.size();

  // A layer that a cache could hold is driven out of it by reading the probe's buffer.
  const bool evict = layer.memory_bytes() < (std::size_t(1) << 29) && !shape.tiny;
  Machine machine(shape, layer.instruction_set(), weights, threads);
  machine.probe();
  const std::size_t ours = skewed ? 2 : 1;
  for (std::size_t i = 0; i < ours; ++i) runners[i].time();
  // What takes long is run less often, peers that take very long but once.
  const auto is_slow = [&](std::size_t i) { return i >= ours && runners[i].seconds[0] > 0.4; };
  double round = evict ? 0.05 * double(runners.size()) : 0.05;
  for (std::size_t i = 0; i < without_blas; ++i)
    if (!is_slow(i)) round += runners[i].seconds[0];
  const int rounds = shape.tiny ? 1 : std::clamp(int(0.6 / round), 1, 9);
  const bool once = runners[0].seconds[0] > 0.4 || shape.tiny;
  const int block = once                  ? (runners[0].seconds[0] < 1 && !shape.tiny ? 2 : 1)
                    : evict && rounds > 4 ? 1
                                          : std::max(rounds > 4 ? 3 : 1, 5 / rounds);
  for (int i = 0; i < rounds; ++i) {
    for (std::size_t j = 0; j < without_blas; ++j) {
      if (is_slow(j)) continue;
      for (int b = 0; b < (j < ours || rounds > 4 ? block : 1); ++b) {  // ours more often
        if (evict && j + std::size_t(b) > 0) machine.probe();
        runners[j].time();
      }
    }
    machine.probe();
  }
  // Its threads wait actively for a while, so it comes last.
  for (std::size_t j = without_blas; j < runners.size(); ++j)
    for (int i = 0; i < std::min(rounds, 3) && !is_slow(j); ++i) {
      if (evict) machine.probe();
      runners[j].time();
    }

  const double seconds = median(runners[0].seconds);
  std::vector<double> bounds, flops, bytes;
  for (const auto& plan : batch.plans) {
    const Work work = work_of(shape, plan, layer.memory_bytes());
    flops.push_back(work.flops);
    bytes.push_back(work.bytes);
    bounds.push_back(std::max(work.flops / machine.peak(), work.bytes / machine.bandwidth()));
  }
  state.SetIterationTime(seconds);
  state.counters["roofline"] = mean(bounds) / seconds;
  state.counters["GFLOPs"] = mean(flops) / seconds * 1e-9;
  state.counters["GBps"] = mean(bytes) / seconds * 1e-9;
  state.counters["peak_GFLOPs"] = machine.peak() * 1e-9;
  state.counters["peak_GBps"] = machine.bandwidth() * 1e-9;
  state.counters["runs"] = double(runners[0].seconds.size());
  if (skewed) state.counters["vs_uniform"] = seconds / median(runners[1].seconds);
  for (const auto& [counter, ways] : runners_of) {
    double best = 1e30;
    for (const std::size_t i : ways) best = std::min(best, median(runners[i].seconds));
    state.counters[counter] = best / seconds;
  }
  if (without_blas < runners.size() && threads > 1)
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
}

void run_router_row(benchmark::State& state, const Shape& shape, Weights weights, Index tokens, int threads) {
  AnyLayer& layer = held().layer_of(shape, weights);
  std::vector<Matrix<float>> x(8);
  for (std::size_t i = 0; i < x.size(); ++i) {
    fill(x[i], tokens, shape.d_model, std::uint32_t(i));
    x[i] *= std::sqrt(float(shape.d_model));
  }
  const auto forward = [&](std::size_t i) {
    return seconds_of([&] { layer.forward(x[i % x.size()], threads); });
  };
  double first = forward(0);
  if (first < 0.4) first = forward(1);
  std::vector<double> whole{first}, overhead;
  const int runs = shape.tiny ? 1 : std::clamp(int(0.1 / first), 1, 21);
  for (int i = 0; i < runs; ++i) {
    if (first < 0.4) whole.push_back(forward(std::size_t(i)));
    overhead.push_back(layer.overhead(x[std::size_t(i) % x.size()], threads));
  }
  state.SetIterationTime(median(whole));
  state.counters["overhead"] = median(overhead);
  state.counters["overhead_us"] = median(overhead) * median(whole) * 1e6;
}

// ---- Memory.

double status_bytes(const std::string& name) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (word == name + ":") {
      double kilobytes = 0;
      status >> kilobytes;
      return kilobytes * 1024;
    }
  return 0;
}

// Packs from a source; by how much memory grew meanwhile beyond what is packed.
void run_pack_row(benchmark::State& state, const Shape& shape, Weights weights) {
  held().layer.reset();
  held().drop_peers();
#ifdef __GLIBC__
  malloc_trim(0);  // what was freed does not count as there
#endif
  std::ofstream("/proc/self/clear_refs") << 5;  // the peak begins anew
  const double before = status_bytes("VmRSS");
  const double seconds = seconds_of([&] { held().layer_of(shape, weights); });
  const double bytes = double(held().layer->memory_bytes());
  state.SetIterationTime(seconds);
  state.counters["packed_MB"] = bytes * 1e-6;
  state.counters["expert_MB"] = shape.expert_parameters() * sizeof(float) * 1e-6;
  state.counters["memory_over_MB"] = (status_bytes("VmHWM") - before - bytes) * 1e-6;
}

// ---- Rows.

const Shape kTiny{"tiny", 64, 96, 8, 1, 2, true, true};
const Shape kShapes[] = {
    {"switch_base_8", 768, 3072, 8, 0, 1, false}, {"olmoe", 2048, 1024, 64, 0, 8},
    {"qwen3_30b_a3b", 2048, 768, 128, 0, 8},      {"deepseek_v3_32_experts", 7168, 2048, 32, 1, 8},
    {"mixtral_8x7b", 4096, 14336, 8, 0, 2},
};

template <class F>
void add_row(const std::string& name, const F& f) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [f](benchmark::State& state) {
                                 for ([[maybe_unused]] auto _ : state) {
                                   try {
                                     f(state);
                                   } catch (const std::bad_alloc&) {
                                     state.SkipWithError("not enough memory");
                                   }
                                 }
                               })
      ->Iterations(1)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

void add_rows(const std::string& group, const Shape& shape, Weights weights,
              const std::vector<Index>& token_counts, const std::vector<Index>& on_one_thread) {
  const std::string layer = group + "/" + shape.name + "/" + kWeights[int(weights)];
  add_row(layer + "/pack",
          [&shape, weights](benchmark::State& state) { run_pack_row(state, shape, weights); });
#ifdef _OPENMP
  const std::vector<int> thread_counts{1, kMaxThreads};
#else
  const std::vector<int> thread_counts{1};
#endif
  for (const int threads : thread_counts)
    for (const Index tokens : threads > 1 ? token_counts : on_one_thread)
      for (const Routed routed : {Routed::uniform, Routed::skewed, Routed::router})
        add_row(layer + "/threads:" + std::to_string(threads) + "/tokens:" + std::to_string(tokens) +
                    "/routing:" + kRouted[int(routed)],
                [&shape, weights, tokens, routed, threads](benchmark::State& state) {
                  if (routed == Routed::router)
                    run_router_row(state, shape, weights, tokens, threads);
                  else
                    run_row(state, shape, weights, tokens, routed, threads);
                });
}

[[maybe_unused]] const bool kRegistered = [] {
  for (const Weights weights : {Weights::f32, Weights::bf16})
    add_rows("PackedTiny", kTiny, weights, {1, 40}, {1, 40});
  // The largest ones not as floats, and not all of it on one thread.
  for (const Shape& shape : kShapes) {
    const bool is_large = double(shape.count()) * shape.expert_parameters() > 1e9;
    for (const Weights weights : {Weights::f32, Weights::bf16, Weights::bf16_dot}) {
      if (is_large && weights == Weights::f32) continue;
      if (weights == Weights::bf16_dot && !kernels::find_dot(best_instruction_set(), true)) continue;
      add_rows("Packed", shape, weights, {1, 2, 8, 64, 512},
               is_large ? std::vector<Index>{1, 2, 8, 64} : std::vector<Index>{1, 2, 8, 64, 512});
    }
  }
  return true;
}();

}  // namespace
}  // namespace moe::bench
