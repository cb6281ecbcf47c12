// SPDX-License-Identifier: MIT

// A router of your own: what a type needs to satisfy moe::Router. This one learns nothing: it sends
// a token to an expert by the last byte of its context (a hash layer; Roller et al. 2021). It is
// compared with a learned router in the language model of train_text, both at the learning rate that
// was chosen for the learned one.
//
//   custom_router [--steps N] [--seeds N]

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <string>
#include <utility>

#include "language_model.hpp"
#include "measure.hpp"
#include "text.hpp"

using namespace examples;

class ByteRouter {
 public:
  using Scalar = float;
  using Table = std::array<Index, kBytes>;  // the expert of every byte

  ByteRouter(Index d_model, Index num_experts, const Table& expert_of)
      : d_model_(d_model), num_experts_(num_experts), expert_of_(expert_of) {}

  Index d_model() const { return d_model_; }
  Index num_experts() const { return num_experts_; }

  // Fills `routing` for x [tokens, d_model]. Here only info.token_ids counts, the last bytes.
  void route(const moe::ConstMatrixRef<float>& x, const moe::BatchInfo& info,
             moe::Routing<float>& routing) const {
    moe::begin_routing(x.rows(), num_experts_, info, routing, "ByteRouter::route");
    moe::require(info.token_ids.size() == x.rows(), "ByteRouter::route: ", info.token_ids.size(),
                 " token_ids, expected one for each of ", x.rows(), " tokens");
    // A router that does not look at x must say itself which rows can not be used.
    moe::mark_poisoned_rows(x, routing.plan);
    moe::Choices<float>& chosen = routing.chosen;
    for (Index t = 0; t < x.rows(); ++t) {
      if (routing.is_valid(t)) {  // not padding
        const Index id = info.token_ids[t];
        moe::require(id >= 0 && id < kBytes, "ByteRouter::route: token_ids[", t, "] = ", id,
                     " is not a byte of ", kBytes);
        chosen.expert.push_back(expert_of_[std::size_t(id)]);
        chosen.gate.push_back(1.0f);
      }
      chosen.token_begin[t + 1] = chosen.size();
    }
    moe::dispatch_all(chosen, routing.plan);
  }

 private:
  Index d_model_, num_experts_;
  Table expert_of_;
};

static_assert(moe::Router<ByteRouter>);

// Gives each byte, the most frequent first, to the expert with the fewest training tokens so far.
ByteRouter::Table balanced_table(const Text& text, Index num_experts) {
  std::array<Index, kBytes> count{}, order;
  for (const Index position : text.positions(Split::train)) ++count[text.bytes[std::size_t(position) - 1]];
  std::iota(order.begin(), order.end(), Index(0));
  const auto key = [&](Index byte) { return std::pair(-count[std::size_t(byte)], byte); };
  std::sort(order.begin(), order.end(), [&](Index a, Index b) { return key(a) < key(b); });
  std::vector<Index> load(std::size_t(num_experts), 0);
  ByteRouter::Table expert_of{};
  for (const Index byte : order) {
    const auto least = std::min_element(load.begin(), load.end());
    expert_of[std::size_t(byte)] = least - load.begin();
    *least += count[std::size_t(byte)];
  }
  return expert_of;
}

constexpr Index kModelWidth = 64, kExperts = 16;

template <class Router>
void compare(const char* name, const Text& text, TrainingOptions options, int seeds,
             const Router& make_router) {
  std::vector<double> bits, imbalance;
  double ms = 0;
  for (int i = 0; i < seeds; ++i) {
    options.seed = std::uint64_t(i + 1);
    moe::Rng rng(options.seed);
    auto experts =
        moe::make_experts<moe::FeedForward<float>>(kExperts, {.d_model = kModelWidth, .d_ff = 256}, rng);
    LanguageModel model(moe::MoELayer(std::move(experts), make_router(rng)), rng);
    train(model, text, options,
          [&](Index step, double, double seconds) { ms = 1000 * seconds / double(step + 1); });
    const Measured measured = measure(model, text, text.positions(Split::test));
    bits.push_back(measured.bits);
    imbalance.push_back(moe::max_over_mean(load_of(measured.by_kind)));
  }
  std::printf("%-26s %-16s %-16s %-8.4f %.1f\n", name, Statistic(bits).show(3).c_str(),
              Statistic(imbalance).show(2).c_str(), options.rate, ms);
  std::fflush(stdout);
}

int main(int argc, char** argv) try {
  TrainingOptions options{.steps = 1000, .rate = 0.01};
  int seeds = 1;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    const int value = i + 1 < argc ? std::atoi(argv[i + 1]) : 0;
    if ((name != "--steps" && name != "--seeds") || value < 1) {
      std::fprintf(stderr, "custom_router: %s: expected --steps N or --seeds N, N at least 1\n", argv[i]);
      return 2;
    }
    if (name == "--steps")
      options.steps = value;
    else
      seeds = value;
  }

  const Text text = load_text();
  const ByteRouter::Table table = balanced_table(text, kExperts);
  std::printf("%td experts, %td steps of %td bytes, %d seed%s\n\n", kExperts, options.steps, options.tokens,
              seeds, seeds > 1 ? "s" : "");
  std::printf("%-26s %-16s %-16s %-8s %s\n", "router", "bits per byte", "largest / mean", "rate",
              "ms a step");
  compare("fixed, by the last byte", text, options, seeds,
          [&](moe::Rng&) { return ByteRouter(kModelWidth, kExperts, table); });
  options.balance = 0.05;
  compare("learned, top 1", text, options, seeds, [&](moe::Rng& rng) {
    return moe::TopKRouter<float>({.d_model = kModelWidth, .num_experts = kExperts, .top_k = 1}, rng);
  });
} catch (const std::exception& error) {
  std::fprintf(stderr, "custom_router: %s\n", error.what());
  return 1;
}
