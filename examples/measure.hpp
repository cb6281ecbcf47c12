// SPDX-License-Identifier: MIT
#pragma once

// How well a trained model predicts, and what its experts serve.

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

// Mutual information of row and column, in bits; with `by_row`, the entropy of the row instead.
inline double information(const Counts& counts, bool by_row = false) {
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

}  // namespace examples
