// SPDX-License-Identifier: MIT

// Trains a small byte-level language model with a Mixture-of-Experts layer, and beside it a dense one
// that does the same number of operations for a token, the router's included; measures both on text
// that was held out, and shows what the experts serve. The model is in language_model.hpp, the text
// in text.hpp, the drawing in report.hpp. `train_text --help` lists the options.

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <numeric>

#include "language_model.hpp"
#include "report.hpp"
#include "text.hpp"

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

using namespace examples;

namespace {

constexpr Index kModelWidth = 64;  // d_model
constexpr Index kTokens = 1024;    // predictions a step

struct Settings {
  std::uint64_t seed = 1;
  Index seeds = 3, steps = 2000, experts = 16, top_k = 1, d_ff = 256, threads = 0;
  double balance = 0.05;
  std::vector<std::string> files;
  std::string report = "report.html";
  bool tune = false, expert_choice = false;

  // Operations (a multiply-add is two) that the layer does for a token, forward.
  Index flops() const { return 4 * kModelWidth * top_k * d_ff + 2 * kModelWidth * experts; }
  // Width of a dense layer with as many.
  Index dense_d_ff() const { return top_k * d_ff + (experts + 1) / 2; }
};

// ---- What is compared.

enum class LayerKind { top_k, dense, expert_choice };

struct Variant {
  std::string name;
  LayerKind layer;
  double balance = 0;  // coefficient of the balance loss
  double rate = 0;     // learning rate
  bool one_kind = false;
};

// Learning rates chosen on the validation text, see `--tune`. Bits per byte there after 2,000 steps,
// one seed:
//   TABLE
constexpr std::array<double, 6> kRates = {2.5e-3, 5e-3, 1e-2, 1.5e-2, 2.5e-2, 4e-2};
constexpr double kRateMoE = 1e-2, kRateDense = 2.5e-2, kRateUnbalanced = 1e-2,
                 kRateExpertChoice = 1e-2;

std::vector<Variant> list_variants(const Settings& settings) {
  std::vector<Variant> variants = {{"MoE", LayerKind::top_k, settings.balance, kRateMoE},
                                   {"dense", LayerKind::dense, 0, kRateDense}};
  if (settings.balance > 0)
    variants.push_back({"MoE, no balance loss", LayerKind::top_k, 0, kRateUnbalanced});
  if (settings.expert_choice) {
    variants.push_back({"expert choice", LayerKind::expert_choice, 0, kRateExpertChoice});
    variants.push_back({"MoE, batches of one kind", LayerKind::top_k, settings.balance, kRateMoE, true});
    variants.push_back({"expert choice, batches of one kind", LayerKind::expert_choice, 0,
                        kRateExpertChoice, true});
  }
  return variants;
}

// Calls f(model) with a new model of the variant.
template <class F>
void with_model(const Variant& variant, const Settings& settings, std::uint64_t seed, F&& f) {
  using Expert = moe::FeedForward<float>;
  moe::Rng rng(seed);
  const auto moe_model = [&](auto router) {
    auto experts = moe::make_experts<Expert>(
        settings.experts, {.d_model = kModelWidth, .d_ff = settings.d_ff}, rng);
    f(LanguageModel(moe::MoELayer(std::move(experts), std::move(router)), rng));
  };
  switch (variant.layer) {
    case LayerKind::top_k:
      return moe_model(moe::TopKRouter<float>(
          {.d_model = kModelWidth, .num_experts = settings.experts, .top_k = settings.top_k}, rng));
    case LayerKind::expert_choice:
      return moe_model(moe::ExpertChoiceRouter<float>({.d_model = kModelWidth,
                                                       .num_experts = settings.experts,
                                                       .capacity = double(settings.top_k)},
                                                      rng));
    case LayerKind::dense:
      return f(LanguageModel(
          DenseLayer{Expert({.d_model = kModelWidth, .d_ff = settings.dense_d_ff()}, rng)}, rng));
  }
}

// ---- Measuring.

using Counts = std::vector<std::vector<double>>;  // [expert][column]

struct Measured {
  double bits = 0;                 // per byte
  std::vector<double> kind_bits;   // of every kind
  Counts by_kind, by_class, by_byte;  // tokens of every expert; empty for a dense model
};

template <class Model>
Measured measure(const Model& model, const Text& text, const std::vector<Index>& positions) {
  Measured result;
  std::vector<double> nats(std::size_t(text.num_kinds())), bytes(nats.size());
  predict(model, text, positions, [&](const Batch& batch, const auto& cache) {
    for (std::size_t t = 0; t < batch.target.size(); ++t) {
      nats[batch.kind[t]] += double(cache.loss[t]);
      bytes[batch.kind[t]] += 1;
    }
    if constexpr (Model::kHasRouter) {
      const auto& plan = cache.layer.routing.plan;
      const std::size_t experts = std::size_t(plan.num_experts());
      result.by_kind.resize(experts, std::vector<double>(nats.size()));
      result.by_class.resize(experts, std::vector<double>(kByteClasses.size()));
      result.by_byte.resize(experts, std::vector<double>(std::size_t(kBytes)));
      for (std::size_t e = 0; e < experts; ++e) {
        for (Index a = plan.expert_begin[Index(e)]; a < plan.expert_begin[Index(e) + 1]; ++a) {
          const Index t = plan.token[a];
          const Byte last = batch.context(t, kContext - 1);
          result.by_kind[e][batch.kind[std::size_t(t)]] += 1;
          result.by_class[e][std::size_t(class_of(last))] += 1;
          result.by_byte[e][last] += 1;
        }
      }
    }
  });
  for (std::size_t kind = 0; kind < nats.size(); ++kind)
    result.kind_bits.push_back(nats[kind] / bytes[kind] / std::numbers::ln2);
  result.bits = std::accumulate(nats.begin(), nats.end(), 0.0) / double(positions.size()) /
                std::numbers::ln2;
  return result;
}

moe::IndexVector load_of(const Counts& counts) {
  moe::IndexVector load(Index(counts.size()));
  for (std::size_t e = 0; e < counts.size(); ++e)
    load[Index(e)] = Index(std::accumulate(counts[e].begin(), counts[e].end(), 0.0));
  return load;
}

// Experts that take less than a hundredth of an even share.
Index num_unused(const moe::IndexVector& load) {
  return (load.array() * load.size() * 100 < load.sum()).count();
}

// Mutual information of row and column, in bits; with `by_row`, the entropy of the row instead.
double information(const Counts& counts, bool by_row = false) {
  std::vector<double> columns(counts[0].size());
  double total = 0, bits = 0;
  for (const auto& row : counts)
    for (std::size_t c = 0; c < row.size(); ++c) columns[c] += row[c], total += row[c];
  for (const auto& row : counts) {
    const double sum = std::accumulate(row.begin(), row.end(), 0.0);
    if (by_row && sum > 0) bits -= sum / total * std::log2(sum / total);
    for (std::size_t c = 0; !by_row && c < row.size(); ++c)
      if (row[c] > 0) bits += row[c] / total * std::log2(row[c] * total / (sum * columns[c]));
  }
  return bits;
}

struct Statistic {
  double mean = 0, deviation = 0;
  std::size_t n = 0;

  explicit Statistic(const std::vector<double>& values) : n(values.size()) {
    for (const double v : values) mean += v / double(n);
    for (const double v : values) deviation += (v - mean) * (v - mean);
    deviation = n > 1 ? std::sqrt(deviation / double(n - 1)) : 0;
  }
  std::string show(int digits) const {
    return fixed(mean, digits) + (n > 1 ? " +- " + fixed(deviation, digits) : "");
  }
};

// ---- Runs.

struct Run {
  std::vector<double> step, training, validation;  // the loss curves, bits per byte
  Measured test;          // in batches of all kinds
  Measured test_in_order;  // in batches of neighbouring bytes; only where the router looks at the batch
  double ms_per_step = 0;
  std::uint64_t hash = 0;  // of the trained parameters
};

std::uint64_t fnv1a(const void* data, std::size_t size, std::uint64_t hash) {
  for (std::size_t i = 0; i < size; ++i)
    hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
  return hash;
}

// A bar on a terminal, a line for every run elsewhere.
class Progress {
 public:
  explicit Progress(Index steps) : total_(steps) {
#if __has_include(<unistd.h>)
    terminal_ = isatty(STDERR_FILENO) != 0;
#endif
  }

  void step(const std::string& what, double bits) {
    ++done_;
    if (!terminal_ || (done_ % 10 != 0 && done_ != total_)) return;
    const int width = int(30 * done_ / total_);
    std::fprintf(stderr, "\r[%s%s] %3d%%  %s  %.2f bits/byte  %s left\x1b[K",
                 std::string(std::size_t(width), '#').c_str(),
                 std::string(std::size_t(30 - width), '.').c_str(), int(100 * done_ / total_),
                 what.c_str(), bits, time_left().c_str());
  }
  void end_run(const std::string& what) {
    std::fprintf(stderr, "%s%s  (%s left)\n", terminal_ ? "\r\x1b[K" : "", what.c_str(),
                 time_left().c_str());
  }

 private:
  std::string time_left() const {
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    const int left = int(seconds * double(total_ - done_) / double(done_) + 0.5);
    return std::to_string(left / 60) + (left % 60 < 10 ? ":0" : ":") + std::to_string(left % 60);
  }

  bool terminal_ = false;
  Index total_, done_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Every n-th entry.
std::vector<Index> thinned(const std::vector<Index>& positions, std::size_t n) {
  std::vector<Index> some;
  for (std::size_t i = 0; i < positions.size(); i += n) some.push_back(positions[i]);
  return some;
}

std::vector<Index> shuffled(std::vector<Index> positions) {
  moe::Rng rng(0);
  for (Index i = Index(positions.size()) - 1; i > 0; --i)
    std::swap(positions[std::size_t(i)], positions[std::size_t(rng.index(i + 1))]);
  return positions;
}

Run train_and_measure(const Variant& variant, const Settings& settings, const Text& text,
                      std::uint64_t seed, Progress& progress) {
  Run run;
  with_model(variant, settings, seed, [&](auto model) {
    const std::vector<Index> validation = thinned(shuffled(text.positions(Split::validation)), 16);
    const Index every = std::max<Index>(1, settings.steps / 20);
    const std::string name = variant.name + ", seed " + std::to_string(seed);
    double sum = 0, recent = 8;
    train(model, text,
          {.steps = settings.steps, .tokens = kTokens, .rate = variant.rate,
           .balance = variant.balance, .seed = seed, .one_kind = variant.one_kind},
          [&](Index step, double bits, double seconds) {
            sum += bits;
            recent = 0.95 * recent + 0.05 * bits;
            progress.step(name + "  step " + std::to_string(step + 1), recent);
            run.ms_per_step = 1000 * seconds / double(step + 1);
            if ((step + 1) % every != 0) return;
            run.step.push_back(double(step + 1));
            run.training.push_back(sum / double(every));
            run.validation.push_back(measure(model, text, validation).bits);
            sum = 0;
          });
    run.test = measure(model, text, shuffled(text.positions(Split::test)));
    if (variant.layer == LayerKind::expert_choice)
      run.test_in_order = measure(model, text, text.positions(Split::test));
    run.hash = 0xcbf29ce484222325u;
    decltype(model)::visit(
        [&](const ParameterInfo&, const auto& p) {
          run.hash = fnv1a(p.data(), std::size_t(p.size()) * sizeof(float), run.hash);
        },
        model);
    run.hash = fnv1a(&run.test.bits, sizeof(double), run.hash);
    progress.end_run(name + ": " + fixed(run.test.bits, 3) + " bits per byte, " +
                     fixed(run.ms_per_step, 1) + " ms a step");
  });
  return run;
}

// Chooses the rate of every variant: the same candidates for each, one seed that the comparison does
// not use, by the bits per byte on the validation text.
void tune(std::vector<Variant>& variants, const Settings& settings, const Text& text) {
  Progress progress(Index(variants.size() * kRates.size()) * settings.steps);
  std::string table = "Validation bits per byte by learning rate, " + grouped(settings.steps) +
                      " steps, one seed\n" + std::string(36, ' ');
  for (const double rate : kRates) table += fixed(rate, 4) + "   ";
  for (Variant& variant : variants) {
    table += "\n" + variant.name + std::string(35 - variant.name.size(), ' ');
    double best = 0;
    const double old_rate = variant.rate;
    for (const double rate : kRates) {
      const std::uint64_t seed = settings.seed + std::uint64_t(settings.seeds);
      double bits = 0, recent = 8;
      with_model(variant, settings, seed, [&](auto model) {
        const std::string name = variant.name + ", rate " + fixed(rate, 4);
        train(model, text,
              {.steps = settings.steps, .tokens = kTokens, .rate = rate,
               .balance = variant.balance, .seed = seed, .one_kind = variant.one_kind},
              [&](Index, double loss, double) {
                recent = 0.95 * recent + 0.05 * loss;
                progress.step(name, recent);
              });
        bits = measure(model, text, shuffled(text.positions(Split::validation))).bits;
        progress.end_run(name + ": " + fixed(bits, 4) + " bits per byte");
      });
      table += fixed(bits, 3) + (rate == old_rate ? "*   " : "    ");
      if (best == 0 || bits < best) {
        best = bits;
        variant.rate = rate;
      }
    }
  }
  std::cout << table << "\n(*: the rate that is used without --tune)\n\n";
}
