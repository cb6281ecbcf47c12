// SPDX-License-Identifier: MIT
#pragma once

// How well a trained model predicts, and what its experts serve.

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <string>
#include <vector>

#include "language_model.hpp"
#include "report.hpp"
#include "text.hpp"

namespace examples {

using Counts = std::vector<std::vector<double>>;  // [expert][column]

struct Measured {
  double bits = 0;                // per byte
  std::vector<double> kind_bits;  // of every kind
  // Assignments of every expert: by kind of text, by class of the last byte, by the last byte, and
  // by both the last byte and the kind. Empty for a model without router.
  Counts by_kind, by_class, by_byte, by_byte_and_kind;
};

// Predicts the bytes at `positions`, in batches in that order.
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
      const auto count = [&](Counts& counts, Index columns, auto column) {
        counts.resize(experts, std::vector<double>(std::size_t(columns)));
        for (std::size_t e = 0; e < experts; ++e)
          for (Index a = plan.expert_begin[Index(e)]; a < plan.expert_begin[Index(e) + 1]; ++a)
            counts[e][column(plan.token[a])] += 1;
      };
      const auto kind = [&](Index t) { return std::size_t(batch.kind[std::size_t(t)]); };
      const auto last = [&](Index t) { return batch.context(t, kContext - 1); };
      count(result.by_kind, text.num_kinds(), kind);
      count(result.by_class, Index(kByteClasses.size()), [&](Index t) { return class_of(last(t)); });
      count(result.by_byte, kBytes, [&](Index t) { return std::size_t(last(t)); });
      count(result.by_byte_and_kind, kBytes * text.num_kinds(),
            [&](Index t) { return last(t) * nats.size() + kind(t); });
    }
  });
  for (std::size_t kind = 0; kind < nats.size(); ++kind)
    result.kind_bits.push_back(nats[kind] / bytes[kind] / std::numbers::ln2);
  result.bits = std::accumulate(nats.begin(), nats.end(), 0.0) / double(positions.size()) / std::numbers::ln2;
  return result;
}

inline moe::IndexVector load_of(const Counts& counts) {
  moe::IndexVector load(Index(counts.size()));
  for (std::size_t e = 0; e < counts.size(); ++e)
    load[Index(e)] = Index(std::accumulate(counts[e].begin(), counts[e].end(), 0.0));
  return load;
}

// Experts that take less than a hundredth of an even share.
inline Index num_unused(const moe::IndexVector& load) {
  return (load.array() * load.size() * 100 < load.sum()).count();
}

// Entropy of a count, in bits.
inline double entropy(const std::vector<double>& counts) {
  const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
  double bits = 0;
  for (const double count : counts)
    if (count > 0) bits -= count / total * std::log2(count / total);
  return bits;
}

inline double entropy_of_expert(const Counts& counts) {
  std::vector<double> load;
  for (const auto& row : counts) load.push_back(std::accumulate(row.begin(), row.end(), 0.0));
  return entropy(load);
}

// What the column tells about the expert: their mutual information, in bits.
inline double information(const Counts& counts) {
  std::vector<double> columns(counts[0].size()), cells;
  for (const auto& row : counts) {
    cells.insert(cells.end(), row.begin(), row.end());
    for (std::size_t c = 0; c < row.size(); ++c) columns[c] += row[c];
  }
  return std::max(0.0, entropy_of_expert(counts) + entropy(columns) - entropy(cells));
}

// Mean and standard deviation over seeds.
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

}  // namespace examples
