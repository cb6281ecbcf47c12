// SPDX-License-Identifier: MIT
// The formats of packed weights against each other: one layer in all of them, timed in turn. See README.md
// for the counters.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include "machine.hpp"
#include "packed/layers.hpp"
#include "peers/ggml.hpp"

namespace moe::bench {
namespace {

// A format, with activations as floats or in 8 bits.
struct Form {
  std::string name, format;
  std::unique_ptr<AnyLayer> (*make)(const Shape&, const PackOptions&);
  bool int8 = false, nibbles = false;

  PackOptions options() const {
    // For AVX2 where the processor has more, e.g. to compare: MOE_BENCH_AVX2=1.
    PackOptions options{.int8_activations = int8};
    if (std::getenv("MOE_BENCH_AVX2")) options.instruction_set = InstructionSet::avx2;
    return options;
  }
  double peak(InstructionSet set, int threads) const {
    return int8 ? peak_int8_ops(set, nibbles, threads) : peak_flops(set, threads);
  }
};
template <class F>
std::unique_ptr<AnyLayer> make(const Shape& shape, const PackOptions& options) {
  return std::make_unique<Layer<F, GatedFeedForward<float>>>(shape, options);
}
const std::vector<Form> kForms{
    {"f32", "f32", make<F32>},
    {"bf16", "bf16", make<BF16>},
    {"int8", "int8", make<Int8>},
    {"int4_offset", "int4_offset", make<Int4Offset>},
    {"int4", "int4", make<Int4>},
    {"fp8", "fp8", make<FP8>},
    {"mxfp4", "mxfp4", make<MXFP4>},
    {"int8_rounded", "int8", make<Int8>, true},
    {"int4_offset_rounded", "int4_offset", make<Int4Offset>, true, true},
    {"int4_rounded", "int4", make<Int4>, true, true},
    {"mxfp4_rounded", "mxfp4", make<MXFP4>, true, true},
};
const Form& form_of(const std::string& name) {
  return *std::find_if(kForms.begin(), kForms.end(), [&](const Form& form) { return form.name == name; });
}

// The layers of a shape, which are made when they are asked for.
AnyLayer& layer_of(const Shape& shape, const Form& form) {
  static const Shape* held = nullptr;
  static std::map<std::string, std::unique_ptr<AnyLayer>> layers;
  if (held != &shape) layers.clear();
  held = &shape;
  std::unique_ptr<AnyLayer>& layer = layers[form.name];
  if (!layer) layer = form.make(shape, form.options());
  return *layer;
}

// What ggml has beside a format: the last that was asked for.
std::vector<GgmlForm>& ggml_of(const Shape& shape, const std::string& format) {
  static std::pair<const Shape*, std::string> held;
  static std::vector<GgmlForm> forms;
  const std::pair<const Shape*, std::string> wanted(&shape, format);
  if (held == wanted) return forms;
  forms.clear();
  forms = ggml_forms(shape, format);
  held = wanted;
  return forms;
}

double median_of(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// Runs ggml once; false where its output is not ours.
bool try_ggml(std::vector<GgmlForm>& forms, const Matrix<float>& x, const Choices<float>& chosen, int threads,
              const Matrix<float>& expected) {
  for (GgmlForm& form : forms) {
    form.layer->forward(x, chosen, threads);
    form.error = (form.layer->y - expected).norm() / expected.norm();
    form.over_ours.clear();
    if (!(form.error < form.largest_error)) return false;
  }
  return true;
}

void count_ggml(benchmark::State& state, const std::vector<GgmlForm>& forms) {
  std::string label;
  for (const GgmlForm& form : forms) {
    state.counters["vs_" + form.counter] = median_of(form.over_ours);
    state.counters[form.counter + "_error"] = form.error;
    label += (label.empty() ? "ggml: " : ", ") + form.type + " in " + form.layer->buffer_type();
  }
  state.SetLabel(label);
}

void run_row(benchmark::State& state, const Shape& shape, const Form& form, Index tokens, int threads) {
  AnyLayer* const layers[] = {&layer_of(shape, form), &layer_of(shape, form_of("f32")),
                              &layer_of(shape, form_of("bf16"))};
  std::vector<Routing<float>> routings;
  for (Index r = 0; r < 16; ++r) routings.push_back(make_routing(shape, tokens, false, r));
  Matrix<float> x;
  fill(x, tokens, shape.d_model, 7);
  x *= std::sqrt(float(shape.d_model));
  layers[0]->forward(x, routings[0], threads);
  layers[1]->forward(x, routings[0], threads);
  const double error = (layers[0]->y - layers[1]->y).norm() / layers[1]->y.norm();
  std::vector<GgmlForm>& ggml = ggml_of(shape, form.format);
  if (!try_ggml(ggml, x, routings[0].chosen, threads, layers[1]->y)) {
    state.SkipWithError("vs_ggml has another result");
    return;
  }

  const Index megabytes = shape.tiny ? 8 : 512;
  std::vector<double> seconds, over_f32, over_bf16, bandwidths, peaks;
  const int rounds = shape.tiny ? 1 : tokens > 64 ? 5 : 11;
  for (int round = 0; round < rounds; ++round) {
    bandwidths.push_back(bandwidth(threads, megabytes));
    if (round < 3) peaks.push_back(form.peak(layers[0]->instruction_set(), threads));
    const auto& routing = routings[std::size_t(round) % routings.size()];
    double taken[3];
    for (int k = 0; k < 3; ++k) taken[k] = seconds_of([&] { layers[k]->forward(x, routing, threads); });
    for (GgmlForm& theirs : ggml)
      theirs.over_ours.push_back(theirs.layer->forward(x, routing.chosen, threads) / taken[0]);
    seconds.push_back(taken[0]);
    over_f32.push_back(taken[1] / taken[0]);
    over_bf16.push_back(taken[2] / taken[0]);
  }
  const double time = median_of(seconds);
  const double touched = double(std::min(shape.num_experts, tokens * shape.top_k));
  const double bytes = double(layers[0]->memory_bytes()) / double(shape.count()) * touched +
                       2 * double(tokens * shape.d_model) * sizeof(float);
  const double flops = 2 * double(tokens * shape.top_k) * shape.expert_parameters();
  state.SetIterationTime(time);
  state.counters["bits"] =
      8 * double(layers[0]->memory_bytes()) / (double(shape.count()) * shape.expert_parameters());
  state.counters["error"] = error;
  state.counters["roofline"] = std::max(bytes / median_of(bandwidths), flops / median_of(peaks)) / time;
  state.counters["GBps"] = bytes / time * 1e-9;
  state.counters["GFLOPs"] = flops / time * 1e-9;
  state.counters["vs_f32"] = median_of(over_f32);
  state.counters["vs_bf16"] = median_of(over_bf16);
  count_ggml(state, ggml);
}

const Shape kShapes[] = {{"tiny", 64, 96, 8, 0, 2, true, true},
                         {"olmoe", 2048, 1024, 64, 0, 8},
                         {"qwen3_30b_a3b", 2048, 768, 128, 0, 8}};

[[maybe_unused]] const bool kRegistered = [] {
#ifdef _OPENMP
  const std::vector<int> thread_counts{1, kMaxThreads};
#else
  const std::vector<int> thread_counts{1};
#endif
  for (const Shape& shape : kShapes)
    for (const Form& form : kForms)
      for (const int threads : thread_counts)
        for (const Index tokens : {1, 8, 64, 512}) {
          if (shape.tiny && (tokens != 8 || threads != 1)) continue;
          const std::string name = std::string(shape.tiny ? "FormatsTiny/" : "Formats/") + shape.name + "/" +
                                   form.name + "/threads:" + std::to_string(threads) +
                                   "/tokens:" + std::to_string(tokens);
          benchmark::RegisterBenchmark(name.c_str(),
                                       [&shape, &form, tokens, threads](benchmark::State& state) {
                                         for ([[maybe_unused]] auto _ : state)
                                           run_row(state, shape, form, tokens, threads);
                                       })
              ->Iterations(1)
              ->UseManualTime()
              ->Unit(benchmark::kMillisecond);
        }
  return true;
}();

}  // namespace
}  // namespace moe::bench
