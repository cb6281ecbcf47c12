// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <locale>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/types.hpp>
#include <moe/kernels/instruction_set.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/layers/soft_routing.hpp>
#include <moe/math/activation.hpp>
#include <moe/routers/expert_choice_router.hpp>
#include <moe/routers/hash_router.hpp>
#include <moe/routers/noisy_top_k_router.hpp>
#include <moe/routers/sinkhorn_router.hpp>
#include <moe/routers/sparse_mixer_router.hpp>
#include <moe/routers/top_k_router.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/group_limit.hpp>
#include <moe/routing/router.hpp>
#include <moe/routing/scores.hpp>

// Options as text, "d_model=4 num_experts=3 score=sigmoid". A file has those that are not at their defaults.
// So an option that was added later is at its default for a file without it, and one that a reader does not
// know is seen where it matters: the default of a new option is what was done before, and defaults do not
// change.
namespace moe::io {

// The name of an enumerator; nullptr where there is none of this value.
inline const char* enumerator(Score value) {
  switch (value) {
    case Score::softmax:
      return "softmax";
    case Score::sigmoid:
      return "sigmoid";
    case Score::sqrt_softplus:
      return "sqrt_softplus";
    case Score::relu:
      return "relu";
  }
  return nullptr;
}
inline const char* enumerator(GateSide value) {
  switch (value) {
    case GateSide::output:
      return "output";
    case GateSide::input:
      return "input";
  }
  return nullptr;
}
inline const char* enumerator(Rounding value) {
  switch (value) {
    case Rounding::up:
      return "up";
    case Rounding::down:
      return "down";
    case Rounding::nearest_even:
      return "nearest_even";
  }
  return nullptr;
}
inline const char* enumerator(Overflow value) {
  switch (value) {
    case Overflow::drop:
      return "drop";
    case Overflow::next_best:
      return "next_best";
    case Overflow::pass_through:
      return "pass_through";
  }
  return nullptr;
}
inline const char* enumerator(Priority value) {
  switch (value) {
    case Priority::token_order:
      return "token_order";
    case Priority::token_max_gate:
      return "token_max_gate";
    case Priority::assignment_gate:
      return "assignment_gate";
    case Priority::token_max_prob:
      return "token_max_prob";
  }
  return nullptr;
}
inline const char* enumerator(GroupScore value) {
  switch (value) {
    case GroupScore::max:
      return "max";
    case GroupScore::top_two_sum:
      return "top_two_sum";
  }
  return nullptr;
}

inline const char* enumerator(InstructionSet value) {
  switch (value) {
    case InstructionSet::portable:
      return "portable";
    case InstructionSet::avx2:
      return "avx2";
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::amx:
      return "amx";
  }
  return nullptr;
}
inline const char* enumerator(kernels::Unit value) {
  switch (value) {
    case kernels::Unit::relu:
      return "relu";
    case kernels::Unit::gelu:
      return "gelu";
    case kernels::Unit::gelu_tanh:
      return "gelu_tanh";
    case kernels::Unit::silu:
      return "silu";
    case kernels::Unit::clamped_swiglu:
      return "clamped_swiglu";
  }
  return nullptr;
}

inline std::string option_text(bool value) { return value ? "true" : "false"; }
inline std::string option_text(Index value) { return std::to_string(value); }
inline std::string option_text(double value) {
  std::ostringstream text;
  text.imbue(std::locale::classic());  // whatever decimal point the program prints
  text.precision(17);
  text << value;
  return text.str();
}
inline std::string option_text(const std::optional<double>& value) {
  return value ? option_text(*value) : "none";
}
template <class E>
requires std::is_enum_v<E> std::string option_text(E value) {
  const char* const name = enumerator(value);
  return name ? name : std::to_string(static_cast<int>(value));
}

template <class T, class Options>
concept Is = std::is_same_v<std::remove_const_t<T>, Options>;

// f(name, value) for all options that decide what a router makes of its parameters, or a unit of its inputs.
// A structured binding has all members: who adds one to the options comes by here. Those without f are seen
// in the arrays, or only allow something.
template <Is<CapacityRule> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [rounding, minimum, multiple_of] = options;
  f("capacity_rounding", rounding);
  f("capacity_minimum", minimum);
  f("capacity_multiple_of", multiple_of);
}
template <Is<GroupLimit> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [groups, kept, score] = options;
  f("groups", groups);
  f("kept_groups", kept);
  f("group_score", score);
}
template <Is<TopKOptions> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [d_model, num_experts, top_k, top_p, second_threshold, random_second_threshold, score,
         softmax_before_selection, renormalise, renormalise_epsilon, renormalise_minimum, gate_scale,
         gate_side, bias, selection_bias, group_limit, noise_stddev, jitter, capacity, training_capacity,
         capacity_rule, overflow, priority, renormalise_after_drop, allow_constant_gate] = options;
  f("d_model", d_model);
  f("num_experts", num_experts);
  f("top_k", top_k);
  f("top_p", top_p);
  f("second_threshold", second_threshold);
  f("random_second_threshold", random_second_threshold);
  f("score", score);
  f("softmax_before_selection", softmax_before_selection);
  f("renormalise", renormalise);
  f("renormalise_epsilon", renormalise_epsilon);
  f("renormalise_minimum", renormalise_minimum);
  f("gate_scale", gate_scale);
  f("gate_side", gate_side);
  visit_options(group_limit, f);
  f("noise_stddev", noise_stddev);
  f("jitter", jitter);
  f("capacity", capacity);
  f("training_capacity", training_capacity);
  visit_options(capacity_rule, f);
  f("overflow", overflow);
  f("priority", priority);
  f("renormalise_after_drop", renormalise_after_drop);
}
template <Is<NoisyTopKOptions> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [d_model, num_experts, top_k, noise_epsilon, capacity, training_capacity, capacity_rule, overflow,
         priority, renormalise_after_drop, allow_constant_gate] = options;
  f("d_model", d_model);
  f("num_experts", num_experts);
  f("top_k", top_k);
  f("noise_epsilon", noise_epsilon);
  f("capacity", capacity);
  f("training_capacity", training_capacity);
  visit_options(capacity_rule, f);
  f("overflow", overflow);
  f("priority", priority);
  f("renormalise_after_drop", renormalise_after_drop);
}
template <Is<SinkhornOptions> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [d_model, num_experts, top_k, tolerance, max_iterations, capacity, training_capacity, capacity_rule,
         overflow, priority] = options;
  f("d_model", d_model);
  f("num_experts", num_experts);
  f("top_k", top_k);
  f("tolerance", tolerance);
  f("max_iterations", max_iterations);
  f("capacity", capacity);
  f("training_capacity", training_capacity);
  visit_options(capacity_rule, f);
  f("overflow", overflow);
  f("priority", priority);
}
template <Is<SparseMixerOptions> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [d_model, num_experts, jitter] = options;
  f("d_model", d_model);
  f("num_experts", num_experts);
  f("top_k", SparseMixerOptions::top_k);  // no member, but in files
  f("jitter", jitter);
}
template <Is<ExpertChoiceOptions> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [d_model, num_experts, capacity, capacity_rule, overflow] = options;
  f("d_model", d_model);
  f("num_experts", num_experts);
  f("capacity", capacity);
  visit_options(capacity_rule, f);
  f("overflow", overflow);
}
template <Is<HashOptions> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [d_model, num_experts, table, capacity, capacity_rule, overflow] = options;
  f("d_model", d_model);
  f("num_experts", num_experts);
  f("capacity", capacity);
  visit_options(capacity_rule, f);
  f("overflow", overflow);
}
template <Is<SoftMoEOptions> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [d_model, num_experts, slots_per_expert, normalise] = options;
  f("d_model", d_model);
  f("num_experts", num_experts);
  f("slots_per_expert", slots_per_expert);
  f("normalise", normalise);
}
template <Is<ClampedSwiGLU> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [alpha, limit, offset] = options;
  f("alpha", alpha);
  f("limit", limit);
  f("offset", offset);
}

template <class Options>
concept ListedOptions = requires(const Options& options) {
  visit_options(options, [](const char*, const auto&) {});
};

// "name=value name=value ...": texts are joined by blanks, values have none.
inline void append_option(std::string& text, std::string_view name, std::string_view value) {
  text.append(text.empty() ? "" : " ").append(name).append("=").append(value);
}

// All options.
template <ListedOptions Options>
std::string options_text(const Options& options) {
  std::string text;
  visit_options(options,
                [&](const char* name, const auto& value) { append_option(text, name, option_text(value)); });
  return text;
}

// Options by name; nothing where the text is not such a list.
inline std::optional<std::map<std::string, std::string, std::less<>>> parse_options(std::string_view text) {
  std::map<std::string, std::string, std::less<>> options;
  while (!text.empty()) {
    const std::string_view option = text.substr(0, text.find(' '));
    text.remove_prefix((std::min)(option.size() + 1, text.size()));
    const std::size_t equals = option.find('=');
    if (equals == std::string_view::npos || equals == 0) return std::nullopt;
    if (!options.emplace(option.substr(0, equals), option.substr(equals + 1)).second) return std::nullopt;
  }
  return options;
}

// A value as this version writes it: files before there were names have the numbers of enumerators.
template <class T>
std::string option_text_now(const std::string& text) {
  if constexpr (std::is_enum_v<T>) {
    int number = 0;
    const char* const end = text.data() + text.size();
    const auto [read, error] = std::from_chars(text.data(), end, number);
    if (read == end && error == std::errc() && enumerator(T(number))) return enumerator(T(number));
  }
  return text;
}

// What a file has of all options: those that differ from the defaults.
struct LeaveDefaultsOut {
  template <ListedOptions Options>
  std::string operator()(std::string_view all, const Options& defaults) const {
    const auto given = parse_options(all);
    if (!given) return std::string(all);
    std::string text;
    visit_options(defaults, [&](const char* name, const auto& value) {
      const auto at = given->find(name);
      if (at != given->end() && at->second != option_text(value)) append_option(text, name, at->second);
    });
    return text;
  }
};

// All options of what a file of any version has, and in `unknown` those that this version does not have.
struct AddDefaults {
  std::vector<std::string>& unknown;

  template <ListedOptions Options>
  std::string operator()(std::string_view saved, const Options& defaults) const {
    auto given = parse_options(saved);
    if (!given) return std::string(saved);
    std::string text;
    visit_options(defaults, [&]<class T>(const char* name, const T& value) {
      const auto at = given->find(name);
      append_option(text, name, at == given->end() ? option_text(value) : option_text_now<T>(at->second));
      if (at != given->end()) given->erase(at);
    });
    for (const auto& [name, value] : *given) unknown.push_back(name + "=" + value);
    return text;
  }
};

// Two texts without the options of the same value; as they are where one is not just a list of options.
inline std::pair<std::string, std::string> without_common_options(const std::string& a,
                                                                  const std::string& b) {
  const auto all_a = parse_options(a), all_b = parse_options(b);
  if (!all_a || !all_b) return {a, b};
  const auto rest = [](const auto& options, const auto& others) {
    std::string text;
    for (const auto& [name, value] : options) {
      const auto at = others.find(name);
      if (at == others.end() || at->second != value) append_option(text, name, value);
    }
    return text;
  };
  return {rest(*all_a, *all_b), rest(*all_b, *all_a)};
}

}  // namespace moe::io
