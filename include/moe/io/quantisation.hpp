// SPDX-License-Identifier: MIT
#pragma once

#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <system_error>

#include <nlohmann/json.hpp>

#include <moe/io/dtype.hpp>
#include <moe/io/file.hpp>
#include <moe/io/json_events.hpp>

// What a model's config.json says of how its weights are stored.
namespace moe::io {

/// The scalars of the object "quantization_config" of a config.json, by name: strings as they are, all else
/// as JSON has it, e.g. {"quant_method": "gptq", "bits": "4"}. Nothing where there is no such object. Throws
/// CheckpointError for what is no JSON object.
inline std::map<std::string, std::string> parse_quantisation(std::span<const std::byte> bytes,
                                                             std::string_view where) {
  require_checkpoint(bytes.size() <= kMaxHeaderBytes, where, ": the file has ", bytes.size(),
                     " bytes, expected at most ", kMaxHeaderBytes);
  const auto config = nlohmann::json::parse(text_at(bytes), nullptr, false);
  require_checkpoint(config.is_object(), where, ": is no JSON object");
  std::map<std::string, std::string> found;
  const auto quantisation = config.find("quantization_config");
  if (quantisation == config.end() || !quantisation->is_object()) return found;
  for (const auto& [name, value] : quantisation->items()) {
    constexpr auto kReplaced = nlohmann::json::error_handler_t::replace;
    if (value.is_string())
      found[name] = value.get<std::string>();
    else if (value.is_primitive())
      found[name] = value.dump(-1, ' ', false, kReplaced);
  }
  return found;
}

/// The same of a file; nothing where there is none.
inline std::map<std::string, std::string> read_quantisation(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return {};
  return parse_quantisation(read_file(path).bytes, path.string());
}

}  // namespace moe::io
