// SPDX-License-Identifier: MIT

// Trains a small byte-level language model with a Mixture-of-Experts layer, and beside it a dense
// one that does the same number of operations for a token, the router's included; measures both on
// text that was held out, and shows what the experts serve. The model is in language_model.hpp, the
// text in text.hpp, the drawing in report.hpp. `train_text --help` lists the options.

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>
#include <iterator>
#include <numeric>
#include <tuple>
#include <utility>

#include "language_model.hpp"
#include "measure.hpp"
#include "picture.hpp"
#include "report.hpp"
#include "text.hpp"

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

using namespace examples;

namespace {

constexpr Index kModelWidth = 64;  // d_model
constexpr Index kTokens = 1024;    // predictions a step
constexpr Index kSample = 8192;    // positions of the validation text that a loss curve looks at

struct Settings {
  std::uint64_t seed = 1;
  Index seeds = 3, steps = 2000, experts = 16, top_k = 1, d_ff = 256, threads = 0;
  double balance = 0.05;
  std::vector<std::string> files;
  std::string report = "report.html", picture = "routing.svg";
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

// Learning rates found by `train_text --tune --expert-choice`: bits per byte of the validation text
// after 2,000 steps, mean of two seeds that the demonstration does not use.
//                         0.0040   0.0063   0.0100   0.0160   0.0250   0.0400   0.0630
//   MoE                    2.025    1.977    1.970    1.980    1.987    2.022    2.069
//   dense                  2.281    2.204    2.151    2.144    2.153    2.152    2.168
//   MoE, no balance loss   2.149    2.046    2.006    2.017    2.037    2.083    2.118
//   expert choice          2.293    2.425    2.400    2.312    2.266    2.434    2.709
constexpr std::array<double, 7> kRates = {0.004, 0.0063, 0.01, 0.016, 0.025, 0.04, 0.063};
constexpr int kTuningSeeds = 2;
constexpr double kRateMoE = 0.01, kRateDense = 0.016, kRateUnbalanced = 0.01, kRateExpertChoice = 0.025;

std::vector<Variant> list_variants(const Settings& settings) {
  std::vector<Variant> variants = {{"MoE", LayerKind::top_k, settings.balance, kRateMoE},
                                   {"dense", LayerKind::dense, 0, kRateDense}};
  if (settings.balance > 0)
    variants.push_back({"MoE, no balance loss", LayerKind::top_k, 0, kRateUnbalanced});
  if (settings.expert_choice) {
    variants.push_back({"expert choice", LayerKind::expert_choice, 0, kRateExpertChoice});
    variants.push_back({"MoE, one kind a batch", LayerKind::top_k, settings.balance, kRateMoE, true});
    variants.push_back(
        {"expert choice, one kind a batch", LayerKind::expert_choice, 0, kRateExpertChoice, true});
  }
  return variants;
}

// Calls f(model) with a new model of the variant.
template <class F>
void with_model(const Variant& variant, const Settings& settings, std::uint64_t seed, F&& f) {
  using Expert = moe::FeedForward<float>;
  moe::Rng rng(seed);
  const auto moe_model = [&](auto router) {
    auto experts =
        moe::make_experts<Expert>(settings.experts, {.d_model = kModelWidth, .d_ff = settings.d_ff}, rng);
    f(LanguageModel(moe::MoELayer(std::move(experts), std::move(router)), rng));
  };
  switch (variant.layer) {
    case LayerKind::top_k:
      return moe_model(moe::TopKRouter<float>(
          {.d_model = kModelWidth, .num_experts = settings.experts, .top_k = settings.top_k}, rng));
    case LayerKind::expert_choice:
      return moe_model(moe::ExpertChoiceRouter<float>(
          {.d_model = kModelWidth, .num_experts = settings.experts, .capacity = double(settings.top_k)},
          rng));
    case LayerKind::dense:
      return f(LanguageModel(DenseLayer{Expert({.d_model = kModelWidth, .d_ff = settings.dense_d_ff()}, rng)},
                             rng));
  }
}

// ---- Runs.

struct Run {
  std::vector<double> step, training, validation;  // the loss curves, bits per byte
  Measured mixed;                                  // in batches of all kinds
  Measured one_kind;  // in batches of one kind; only for a router that looks at the whole batch
  double ms_per_step = 0;
  std::uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a of the trained parameters and the bits per byte

  void add_to_hash(const void* data, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i)
      hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
  }
};

// Shows on stderr how far the training is: a bar on a terminal, a line for every run elsewhere.
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
    const std::size_t width = std::size_t(20 * done_ / total_);
    std::string line = "[" + std::string(width, '#') + std::string(20 - width, '.') + "] " +
                       std::to_string(100 * done_ / total_) + "%  " + what + ": " + fixed(bits, 2) +
                       " bits per byte, " + time_left();
    line.resize(std::min<std::size_t>(line.size(), 79));
    std::fprintf(stderr, "\r%s\x1b[K", line.c_str());
  }
  void end_run(const std::string& what) const {
    std::fprintf(stderr, "%s%s (%s)\n", terminal_ ? "\r\x1b[K" : "", what.c_str(), time_left().c_str());
  }

 private:
  std::string time_left() const {
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    const int left = int(seconds * double(total_ - done_) / double(done_) + 0.5);
    return std::to_string(left / 60) + (left % 60 < 10 ? ":0" : ":") + std::to_string(left % 60) + " left";
  }

  bool terminal_ = false;
  Index total_, done_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Positions in an order in which batches hold all kinds; or, one kind after the other, one kind.
std::vector<Index> shuffled(const Text& text, Split split, bool one_kind) {
  std::vector<Index> positions = text.positions(split);
  moe::Rng rng(0);
  for (std::size_t i = positions.size(); i > 1; --i)
    std::swap(positions[i - 1], positions[std::size_t(rng.index(Index(i)))]);
  if (!one_kind) return positions;
  std::vector<Index> by_kind;
  for (Index kind = 0; kind < text.num_kinds(); ++kind)
    std::copy_if(positions.begin(), positions.end(), std::back_inserter(by_kind),
                 [&](Index i) { return text.kind_of[std::size_t(i)] == kind; });
  return by_kind;
}

// Trains a new model of the variant and measures it on a split that it has not seen.
Run train_and_measure(const Variant& variant, const Settings& settings, const Text& text, std::uint64_t seed,
                      Split split, Progress& progress) {
  Run run;
  const TrainingOptions options{.steps = settings.steps,
                                .tokens = kTokens,
                                .rate = variant.rate,
                                .balance = variant.balance,
                                .seed = seed,
                                .one_kind = variant.one_kind};
  const std::string name = variant.name + ", seed " + std::to_string(seed);
  std::vector<Index> sample = shuffled(text, Split::validation, false);  // for the loss curve
  sample.resize(std::min(sample.size(), std::size_t(kSample)));
  with_model(variant, settings, seed, [&](auto model) {
    const Index every = std::max<Index>(1, settings.steps / 20);
    double sum = 0;
    train(model, text, options, [&](Index step, double bits, double seconds) {
      progress.step(name, bits);
      run.ms_per_step = 1000 * seconds / double(step + 1);
      sum += bits;
      if ((step + 1) % every != 0) return;
      run.step.push_back(double(step + 1));
      run.training.push_back(sum / double(every));
      run.validation.push_back(measure(model, text, sample).bits);
      sum = 0;
    });
    run.mixed = measure(model, text, shuffled(text, split, false));
    if (variant.layer == LayerKind::expert_choice)
      run.one_kind = measure(model, text, shuffled(text, split, true));
    decltype(model)::visit(
        [&](const ParameterInfo&, const auto& p) {
          run.add_to_hash(p.data(), std::size_t(p.size()) * sizeof(float));
        },
        model);
    run.add_to_hash(&run.mixed.bits, sizeof run.mixed.bits);
  });
  progress.end_run(name + ", rate " + fixed(variant.rate, 4) + ": " + fixed(run.mixed.bits, 3) +
                   " bits per byte, " + fixed(run.ms_per_step, 1) + " ms a step");
  return run;
}

void print(const Report::Table& table) {
  std::vector<std::size_t> width;
  for (const std::string& cell : table.header) width.push_back(cell.size());
  for (const auto& row : table.rows)
    for (std::size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
  const auto line = [&](const std::vector<std::string>& row) {
    for (std::size_t i = 0; i < row.size(); ++i)
      std::cout << (i > 0 ? "   " : "") << (i + 1 < row.size() ? padded(row[i], width[i]) : row[i]);
    std::cout << '\n';
  };
  std::cout << table.title << "\n\n";
  line(table.header);
  for (const auto& row : table.rows) line(row);
  std::cout << '\n';
}

// Chooses the rate of every variant by the bits per byte of the validation text: the same
// candidates for each, and seeds that the comparison does not use. Training on batches of one kind
// takes the rate of training on all kinds.
void tune(std::vector<Variant>& variants, const Settings& settings, const Text& text) {
  const Index tuned =
      std::count_if(variants.begin(), variants.end(), [](const Variant& v) { return !v.one_kind; });
  Progress progress(tuned * Index(kRates.size()) * kTuningSeeds * settings.steps);
  Report::Table table{
      "Validation bits per byte by learning rate, mean of " + std::to_string(kTuningSeeds) + " seeds",
      {""},
      {}};
  for (const double rate : kRates) table.header.push_back(fixed(rate, 4));
  for (Variant& variant : variants) {
    if (variant.one_kind) {
      variant.rate = std::find_if(variants.begin(), variants.end(), [&](const Variant& v) {
                       return v.layer == variant.layer;
                     })->rate;
      continue;
    }
    auto& row = table.rows.emplace_back(1, variant.name);
    double best = 0, best_rate = 0;
    for (const double rate : kRates) {
      variant.rate = rate;
      double bits = 0;
      for (int i = 0; i < kTuningSeeds; ++i) {
        const std::uint64_t seed = settings.seed + std::uint64_t(settings.seeds + i);
        bits += train_and_measure(variant, settings, text, seed, Split::validation, progress).mixed.bits /
                kTuningSeeds;
      }
      row.push_back(fixed(bits, 3));
      if (best == 0 || bits < best) best = bits, best_rate = rate;
    }
    variant.rate = best_rate;
  }
  print(table);
}

// ---- What is printed, and the report.

// The names of the largest entries with their shares: "C++ 71%, Bible 28%".
template <class Names>
std::string largest(const std::vector<double>& counts, const Names& names) {
  const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
  std::vector<std::size_t> order(counts.size());
  std::iota(order.begin(), order.end(), std::size_t(0));
  const auto key = [&](std::size_t i) { return std::pair(-counts[i], i); };
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return key(a) < key(b); });
  std::string result;
  for (std::size_t i = 0; i < std::min<std::size_t>(3, order.size()); ++i) {
    const double share = total > 0 ? counts[order[i]] / total : 0;
    if (share < 0.05) break;
    result += (i > 0 ? ", " : "") + std::string(names[order[i]]) + " " + fixed(100 * share, 0) + "%";
  }
  return result.empty() ? "-" : result;
}

// One statistic of all runs of a variant.
template <class F>
Statistic over(const std::vector<Run>& runs, F&& f) {
  std::vector<double> values;
  for (const Run& run : runs) values.push_back(f(run));
  return Statistic(values);
}

std::vector<double> mean_curve(const std::vector<Run>& runs, std::vector<double> Run::*curve) {
  std::vector<double> mean((runs[0].*curve).size());
  for (const Run& run : runs)
    for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += (run.*curve)[i] / double(runs.size());
  return mean;
}

// Number of parameters of a model, and without the experts that a token does not use.
std::string describe_parameters(const Settings& settings, LayerKind layer) {
  const Index unused = layer == LayerKind::dense ? 0 : settings.experts - settings.top_k;
  std::string result;
  with_model({"", layer}, settings, settings.seed, [&](const auto& model) {
    const Index all = moe::num_parameters(model);
    result = grouped(all) + " parameters";
    if (unused > 0)
      result += ", " + grouped(all - unused * 2 * kModelWidth * settings.d_ff) +
                " without the experts that a token does not use";
  });
  return result;
}

std::vector<std::string> describe(const Settings& settings, const Text& text) {
  std::string kinds;
  for (std::size_t kind = 0; kind < text.kinds.size(); ++kind)
    kinds += (kind > 0 ? ", " : "") + text.kinds[kind] + " " +
             grouped(text.kind_begin[kind + 1] - text.kind_begin[kind]);
  const std::uint64_t last = settings.seed + std::uint64_t(settings.seeds) - 1;
  return {"Bytes of text: " + kinds + "; 80% to train, 10% to validate, 10% held out.",
          "MoE: " + std::to_string(settings.experts) + " experts of d_ff " + grouped(settings.d_ff) +
              ", top_k " + std::to_string(settings.top_k) + ", balance loss " + fixed(settings.balance, 3) +
              "; " + grouped(settings.flops()) + " operations a token, router included.",
          "MoE: " + describe_parameters(settings, LayerKind::top_k) + ".",
          "Dense: d_ff " + grouped(settings.dense_d_ff()) + "; " +
              grouped(4 * kModelWidth * settings.dense_d_ff()) + " operations a token; " +
              describe_parameters(settings, LayerKind::dense) + ".",
          "Both: d_model " + std::to_string(kModelWidth) + ", context " + std::to_string(kContext) +
              " bytes, " + grouped(settings.steps) + " training steps of " + grouped(kTokens) + " bytes, " +
              (last > settings.seed ? "seeds " : "seed ") + std::to_string(settings.seed) +
              (last > settings.seed ? " to " + std::to_string(last) : "") + "."};
}

Report::Table bits_table(const std::vector<Variant>& variants, const std::vector<std::vector<Run>>& runs,
                         const Text& text) {
  const std::size_t seeds = runs[0].size();
  Report::Table table{
      "Held-out bits per byte" +
          (seeds > 1 ? ", mean +- standard deviation over " + std::to_string(seeds) + " seeds" : ""),
      {"", "learning rate", "all"},
      {}};
  for (const std::string& kind : text.kinds) table.header.push_back(kind);
  for (std::size_t v = 0; v < variants.size(); ++v) {
    auto& row = table.rows.emplace_back();
    row = {variants[v].name, fixed(variants[v].rate, 4),
           over(runs[v], [](const Run& run) { return run.mixed.bits; }).show(3)};
    for (std::size_t kind = 0; kind < text.kinds.size(); ++kind)
      row.push_back(over(runs[v], [&](const Run& run) { return run.mixed.kind_bits[kind]; }).show(3));
  }
  return table;
}

Report::Table balance_table(const std::vector<Variant>& variants, const std::vector<std::vector<Run>>& runs) {
  Report::Table table{"Balance on held-out text (unused: less than 1% of an even share of the tokens)",
                      {"", "standard deviation / mean", "largest / mean", "unused experts", "bits per byte"},
                      {}};
  for (std::size_t v = 0; v < variants.size(); ++v) {
    if (variants[v].layer == LayerKind::dense) continue;
    const auto of_load = [&](auto f, int digits) {
      return over(runs[v], [&](const Run& run) { return double(f(load_of(run.mixed.by_kind))); })
          .show(digits);
    };
    table.rows.push_back({variants[v].name, of_load(moe::coefficient_of_variation, 2),
                          of_load(moe::max_over_mean, 2), of_load(num_unused, 1),
                          over(runs[v], [](const Run& run) { return run.mixed.bits; }).show(3)});
  }
  return table;
}

Report::Table expert_table(const Run& run, const Text& text, std::uint64_t seed) {
  Report::Table table{"What the experts of the MoE with seed " + std::to_string(seed) +
                          " serve, on held-out text (at most three entries, of at least 5%)",
                      {"expert", "tokens", "share", "kinds of text", "classes of the last byte"},
                      {}};
  const moe::IndexVector load = load_of(run.mixed.by_kind);
  const auto row = [&](const std::string& name, Index tokens, const std::vector<double>& kinds,
                       const std::vector<double>& classes) {
    table.rows.push_back({name, grouped(tokens), fixed(100 * double(tokens) / double(load.sum()), 1) + "%",
                          largest(kinds, text.kinds), largest(classes, kByteClasses)});
  };
  std::vector<double> all_kinds(text.kinds.size()), all_classes(kByteClasses.size());
  for (Index e = 0; e < load.size(); ++e) {
    const auto &kinds = run.mixed.by_kind[std::size_t(e)], &classes = run.mixed.by_class[std::size_t(e)];
    row(std::to_string(e), load[e], kinds, classes);
    for (std::size_t i = 0; i < kinds.size(); ++i) all_kinds[i] += kinds[i];
    for (std::size_t i = 0; i < classes.size(); ++i) all_classes[i] += classes[i];
  }
  row("all", load.sum(), all_kinds, all_classes);
  return table;
}

std::vector<std::string> conclusions(const std::vector<Variant>& variants,
                                     const std::vector<std::vector<Run>>& runs) {
  const auto compare = [&](std::size_t a, std::size_t b) {
    const auto bits = [](const Run& run) { return run.mixed.bits; };
    const Statistic of_a = over(runs[a], bits), of_b = over(runs[b], bits);
    const double gain = of_b.mean - of_a.mean;
    const bool clear = std::abs(gain) > 2 * std::max(of_a.deviation, of_b.deviation);
    return variants[a].name + " against " + variants[b].name + ": " + fixed(std::abs(gain), 3) +
           " bits per byte " + (gain > 0 ? "better" : "worse") +
           (of_a.n == 1 ? ", of one seed each."
            : clear     ? "."
                        : ", which is within two standard deviations of the seeds.");
  };
  std::vector<std::string> lines = {compare(0, 1)};
  if (variants.size() > 2 && variants[2].layer == LayerKind::top_k) lines.push_back(compare(0, 2));
  const auto about = [&](Counts Measured::*counts, auto f) {
    return over(runs[0], [&](const Run& run) { return f(run.mixed.*counts); }).show(2);
  };
  const Statistic more = over(runs[0], [](const Run& run) {
    return information(run.mixed.by_byte_and_kind) - information(run.mixed.by_byte);
  });
  const std::string entropy = about(&Measured::by_kind, entropy_of_expert);
  lines.push_back("Which expert a token goes to has an entropy of " + entropy + " bits. Of these " + entropy +
                  " bits the kind of text explains " + about(&Measured::by_kind, information) +
                  ", the class of the last byte " + about(&Measured::by_class, information) +
                  ", the last byte itself " + about(&Measured::by_byte, information) +
                  ", the last byte and the kind together " + more.show(2) +
                  " more than the byte alone (mutual information).");
  return lines;
}

Report::Table expert_choice_table(const std::vector<Variant>& variants,
                                  const std::vector<std::vector<Run>>& runs) {
  Report::Table table{"Expert choice: held-out bits per byte by what a batch holds",
                      {"", "batches of all kinds", "batches of one kind", "ms a step"},
                      {}};
  for (std::size_t v = 0; v < variants.size(); ++v) {
    if (variants[v].layer == LayerKind::dense) continue;
    const bool couples = variants[v].layer == LayerKind::expert_choice;
    table.rows.push_back(
        {variants[v].name, over(runs[v], [](const Run& run) { return run.mixed.bits; }).show(3),
         couples ? over(runs[v], [](const Run& run) { return run.one_kind.bits; }).show(3) : "the same",
         over(runs[v], [](const Run& run) { return run.ms_per_step; }).show(1)});
  }
  return table;
}

// Experts in order of what they serve most, so that the pattern shows.
std::vector<std::size_t> pattern_order(const Counts& counts) {
  std::vector<std::size_t> order(counts.size());
  std::iota(order.begin(), order.end(), std::size_t(0));
  const auto key = [&](std::size_t e) {
    const auto best = std::max_element(counts[e].begin(), counts[e].end());
    const double total = std::accumulate(counts[e].begin(), counts[e].end(), 0.0);
    return std::tuple(best - counts[e].begin(), total > 0 ? -*best / total : 0, e);
  };
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return key(a) < key(b); });
  return order;
}

void write_report(const Settings& settings, const Text& text, const std::vector<Variant>& variants,
                  const std::vector<std::vector<Run>>& runs, std::vector<Report::Table> tables) {
  Report report;
  report.title = "A small language model with a Mixture-of-Experts layer";
  report.settings = describe(settings, text);
  report.tables = std::move(tables);
  report.notes = conclusions(variants, runs);
  report.chart_title = "Loss curves";
  if (settings.seeds > 1) report.chart_title += ", mean over " + std::to_string(settings.seeds) + " seeds";
  report.x_title = "training step";
  report.y_title = "bits per byte";
  const Index sample = std::min(kSample, Index(text.positions(Split::validation).size()));
  report.chart_note = "Validation: a sample of " + grouped(sample) +
                      " positions of the validation text. Training: mean over the steps since the "
                      "point before; the batches are drawn with repetition, so the model has seen "
                      "part of their text before.";
  for (std::size_t v = 0; v < variants.size(); ++v) {
    const auto line = [&](const char* what, bool dashed, std::vector<double> Run::*curve) {
      report.lines.push_back(
          {variants[v].name + what, int(v), dashed, runs[v][0].step, mean_curve(runs[v], curve)});
    };
    line(", validation", false, &Run::validation);
    line(", training", true, &Run::training);
  }
  const Measured& measured = runs[0][0].mixed;
  const moe::IndexVector load = load_of(measured.by_kind);
  const auto add_map = [&](const std::string& columns, const Counts& counts, auto names) {
    Report::HeatMap map{
        "Experts by " + columns + ": seed " + std::to_string(settings.seed) + ", held-out text, % of a row",
        "expert (tokens)",
        columns,
        {},
        {names.begin(), names.end()},
        {}};
    std::vector<double> all(counts[0].size());
    for (const std::size_t e : pattern_order(measured.by_class)) {
      map.rows.push_back("expert " + std::to_string(e) + " (" + grouped(load[Index(e)]) + ")");
      map.counts.push_back(counts[e]);
      for (std::size_t i = 0; i < all.size(); ++i) all[i] += counts[e][i];
    }
    map.rows.push_back("all (" + grouped(load.sum()) + ")");
    map.counts.push_back(all);
    report.heat_maps.push_back(map);
  };
  add_map("kind of text", measured.by_kind, text.kinds);
  add_map("class of the last byte", measured.by_class, kByteClasses);
  report.write(settings.report);
}

// What each expert serves, in the models with top-k routing, most of what comes first first.
void draw_routing(const Settings& settings, const std::vector<Variant>& variants,
                  const std::vector<std::vector<Run>>& runs) {
  std::vector<Panel> panels;
  for (std::size_t v = 0; v < variants.size(); ++v) {
    if (variants[v].layer != LayerKind::top_k || variants[v].one_kind) continue;
    const Counts& counts = runs[v][0].mixed.by_class;
    Panel panel{variants[v].balance > 0 ? "With balance loss" : "Without", {}, {}};
    for (const std::size_t e : pattern_order(counts)) {
      panel.experts.push_back("expert " + std::to_string(e));
      panel.counts.push_back(counts[e]);
    }
    panels.push_back(panel);
  }
  write_picture(settings.picture, {kByteClasses.begin(), kByteClasses.end()}, panels);
}

// ---- The command line.

struct Option {
  const char *name, *value, *help;
  std::function<void(const std::string&)> set;
};

template <class T>
T parse(const std::string& name, const std::string& value, T least, T most) {
  T number{};
  const char* const end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, number);
  if (error != std::errc() || stop != end || !(number >= least && number <= most)) {
    std::ostringstream message;
    message << name << " is '" << value << "', expected a number from " << least << " to " << most;
    throw std::invalid_argument(message.str());
  }
  return number;
}

std::vector<Option> list_options(Settings& s) {
  const auto index = [](Index& to, const char* name, Index least, Index most) {
    return [=, &to](const std::string& value) { to = parse<Index>(name, value, least, most); };
  };
  return {
      {"--seed", "N", "first seed; each seed of a model draws other weights and batches (1)",
       [&](const std::string& v) { s.seed = parse<std::uint64_t>("--seed", v, 0, 1000000000); }},
      {"--seeds", "N", "how many seeds to train every model with (3)", index(s.seeds, "--seeds", 1, 100)},
      {"--steps", "N", "training steps of 1,024 bytes (2000)", index(s.steps, "--steps", 1, 1000000)},
      {"--experts", "N", "experts of the MoE layer (16)", index(s.experts, "--experts", 1, 4096)},
      {"--top-k", "N", "experts that a token uses (1)", index(s.top_k, "--top-k", 1, 4096)},
      {"--d-ff", "N", "hidden width of an expert (256); the dense layer's follows from it",
       index(s.d_ff, "--d-ff", 1, 65536)},
      {"--balance", "X", "coefficient of the balance loss (0.05)",
       [&](const std::string& v) { s.balance = parse<double>("--balance", v, 0, 1000); }},
      {"--data", "FILE",
       "train on this file in place of the text that comes with the example; may be\n"
       "                    repeated, each file is a kind of text",
       [&](const std::string& v) { s.files.push_back(v); }},
      {"--report", "FILE", "where to write the report (report.html)",
       [&](const std::string& v) { s.report = v; }},
      {"--picture", "FILE", "where to draw what each expert serves (routing.svg)",
       [&](const std::string& v) { s.picture = v; }},
      {"--threads", "N", "OpenMP threads (all cores); the numbers do not depend on it",
       index(s.threads, "--threads", 1, 1024)},
      {"--tune", nullptr,
       "first choose the learning rates anew, on the validation text; trains each model 14\n"
       "                    times, at 7 rates with 2 seeds",
       [&](const std::string&) { s.tune = true; }},
      {"--expert-choice", nullptr, "also train models whose experts choose tokens",
       [&](const std::string&) { s.expert_choice = true; }},
  };
}

void print_help(const std::vector<Option>& options) {
  std::cout << "usage: train_text [options]\n\n"
               "Trains a byte-level language model with a Mixture-of-Experts layer, and a dense one "
               "with as\nmany operations a token. Prints how well they predict text that was held "
               "out and what the\nexperts serve, and writes a report. The number in parentheses is "
               "the default.\n\n";
  for (const Option& option : options)
    std::cout << "  " << padded(option.name + (option.value ? " " + std::string(option.value) : ""), 18)
              << option.help << '\n';
  std::cout << "  " << padded("--help", 18) << "this text\n";
}

// False when there is nothing left to do.
bool parse_arguments(int argc, char** argv, Settings& settings) {
  const std::vector<Option> options = list_options(settings);
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help" || argument == "-h") {
      print_help(options);
      return false;
    }
    const auto option =
        std::find_if(options.begin(), options.end(), [&](const Option& o) { return argument == o.name; });
    if (option == options.end())
      throw std::invalid_argument("unknown option " + argument + "; --help lists the options");
    if (option->value != nullptr && ++i == argc)
      throw std::invalid_argument(argument + " needs a value: " + argument + " " + option->value);
    option->set(option->value != nullptr ? argv[i] : "");
  }
  if (settings.top_k > settings.experts)
    throw std::invalid_argument("--top-k is " + std::to_string(settings.top_k) +
                                ", expected at most --experts, " + std::to_string(settings.experts));
  return true;
}

void demonstrate(const Settings& settings) {
  const Text text = load_text(settings.files);
  if (!std::ofstream(settings.report, std::ios::app))
    throw std::runtime_error("cannot write " + settings.report);
#ifdef _OPENMP
  if (settings.threads > 0) omp_set_num_threads(int(settings.threads));
#endif
  for (const std::string& line : describe(settings, text)) std::cout << line << '\n';
  std::cout << std::endl;
  std::vector<Variant> variants = list_variants(settings);
  if (settings.tune) tune(variants, settings, text);

  Progress progress(Index(variants.size()) * settings.seeds * settings.steps);
  std::vector<std::vector<Run>> runs;  // [variant][seed]
  std::uint64_t hash = 0;
  for (const Variant& variant : variants) {
    runs.emplace_back();
    for (Index i = 0; i < settings.seeds; ++i) {
      runs.back().push_back(train_and_measure(variant, settings, text, settings.seed + std::uint64_t(i),
                                              Split::test, progress));
      hash = std::rotl(hash, 1) ^ runs.back().back().hash;
    }
  }

  std::vector<Report::Table> tables = {bits_table(variants, runs, text), balance_table(variants, runs)};
  if (settings.expert_choice) tables.push_back(expert_choice_table(variants, runs));
  for (const Report::Table& table : tables) print(table);
  print(expert_table(runs[0][0], text, settings.seed));
  for (const std::string& line : conclusions(variants, runs)) std::cout << line << '\n';
  std::printf("Checksum of all trained parameters and held-out results: %016llx\n",
              static_cast<unsigned long long>(hash));
  write_report(settings, text, variants, runs, tables);
  draw_routing(settings, variants, runs);
  std::cout << "Curves and heat maps: " << std::filesystem::absolute(settings.report).string() << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  try {
    if (parse_arguments(argc, argv, settings)) demonstrate(settings);
  } catch (const std::invalid_argument& error) {
    std::cerr << "train_text: " << error.what() << '\n';
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "train_text: " << error.what() << '\n';
    return 1;
  }
}
