// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/models/model.hpp>

// Where a checkpoint holds a layer: under the model's own names or below other modules.
namespace moe::io {

inline std::string replaced(std::string text, std::string_view what, Index number) {
  const std::size_t at = text.find(what);
  if (at != std::string::npos) text.replace(at, what.size(), std::to_string(number));
  return text;
}

// Whether the modules of one path, as "model." or "Encoder/", are modules of another, in their order.
inline bool is_within(std::string_view path, std::string_view longer) {
  const auto take = [](std::string_view& rest) {
    const std::string_view module = rest.substr(0, rest.find_first_of("./"));
    rest.remove_prefix((std::min)(module.size() + 1, rest.size()));
    return module;
  };
  while (!path.empty()) {
    const std::string_view module = take(path);
    do {
      if (longer.empty()) return false;
    } while (take(longer) != module);
  }
  return true;
}

// The names that a checkpoint gives to the tensors of one layer of a model. They are the model's own where
// the checkpoint has any layer under them. Else the model may be a part of a larger one, or lie there without
// what stood around it: "model.layers.0." is "language_model.model.layers.0.",
// "model.language_model.layers.0." or "layers.0.". What stands before "layers." is then the one path that has
// a router after it, and modules added to the model's or taken out of them; modules are not exchanged, so an
// encoder is no decoder.
class LayerNames {
 public:
  // `needed` is a tensor that every layer of the model has. Throws CheckpointError where there are several
  // paths.
  LayerNames(const Checkpoint& checkpoint, const TensorSource& needed, Index layer, const char* where)
      : layer_(layer) {
    constexpr std::string_view kLayer = "{layer}";
    const std::size_t at = needed.name.find(kLayer);
    if (at == std::string_view::npos) return;
    const std::string_view own = needed.name.substr(0, at), rest = needed.name.substr(at + kLayer.size());
    const std::size_t module = own.find_last_of("./", at < 2 ? 0 : at - 2) + 1;  // 0 where there is none
    const auto& names = checkpoint.names();
    const auto first = std::lower_bound(names.begin(), names.end(), own);
    if (first != names.end() && first->starts_with(own)) return;
    std::set<std::string, std::less<>> paths;
    for (std::string_view name : names) {
      if (!name.ends_with(rest)) continue;
      name.remove_suffix(rest.size());
      const std::size_t number = name.find_last_not_of("0123456789") + 1;
      if (number == name.size() || !name.substr(0, number).ends_with(own.substr(module))) continue;
      const std::string_view path = name.substr(0, number - (at - module));
      const bool whole = path.empty() || path.ends_with('.') || path.ends_with('/');
      if (whole && (is_within(own.substr(0, module), path) || is_within(path, own.substr(0, module))))
        paths.emplace(path);
    }
    if (paths.size() > 1) fail(checkpoint, own, paths, where);
    if (paths.empty()) return;
    own_path_ = own.substr(0, module);
    path_ = *paths.begin();
  }

  std::string operator()(std::string_view name, Index expert) const {
    std::string here(name);
    if (path_ && name.starts_with(own_path_)) here.replace(0, own_path_.size(), *path_);
    return replaced(replaced(std::move(here), "{layer}", layer_), "{expert}", expert);
  }

  Index layer() const { return layer_; }

 private:
  [[noreturn]] static void fail(const Checkpoint& checkpoint, std::string_view own,
                                const std::set<std::string, std::less<>>& paths, const char* where) {
    constexpr std::size_t kShown = 4;
    std::string list;
    std::size_t shown = 0;
    for (const std::string& path : paths)
      if (shown++ < kShown) list += (list.empty() ? "" : ", ") + in_quotes(path);
    fail_checkpoint(where, ": no name in ", checkpoint.path().string(), " begins with ", in_quotes(own),
                    ", and ", paths.size(), " other paths lead to such layers, expected 1: ", list,
                    shown > kShown ? ", ..." : "", "; Checkpoint::below takes one");
  }

  Index layer_;
  std::string_view own_path_{};
  std::optional<std::string> path_{};  // in place of own_path_
};

// `needed` is a parameter that every layer of the model has.
template <class M>
LayerNames find_names(const M& model, const TensorSource& needed, const Checkpoint& checkpoint, Index layer,
                      const char* where) {
  require(layer >= 0, where, ": layer = ", layer, ", expected at least 0");
  require(!needed.empty(), where, ": the tensor names of ", model.name, " are not known");
  return LayerNames(checkpoint, needed, layer, where);
}

}  // namespace moe::io
