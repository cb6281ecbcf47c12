// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <moe/io/dtype.hpp>
#include <moe/io/json_events.hpp>

// Which files a checkpoint of several is made of: by an index, or by their names.
namespace moe::io {

class IndexEvents final : public JsonEvents {
 public:
  explicit IndexEvents(std::string_view where) : JsonEvents(where, "the index") {}

  // Tensor -> file.
  std::map<std::string, std::string> take() {
    if (!keys_.contains("weight_map")) fail_here("the index has no weight_map");
    return std::move(weight_map_);
  }

  bool start_object(std::size_t) override {
    if (depth_ == 1 && key_ == "weight_map")
      in_map_ = true;
    else if (in_map_)
      return scalar("an object");
    ++depth_;
    return true;
  }
  bool end_object() override {
    if (--depth_ == 1) in_map_ = false;
    return true;
  }
  bool start_array(std::size_t) override {
    if (in_map_ || (depth_ == 1 && key_ == "weight_map")) return scalar("an array");
    ++depth_;
    return true;
  }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool key(string_t& key) override {
    if (depth_ > 1 && !in_map_) return true;  // of something that nobody looks at
    if (in_map_ ? weight_map_.contains(key) : !keys_.insert(key).second)
      fail_here("the index has ", in_quotes(key), " twice");
    key_ = std::move(key);
    return true;
  }
  bool string(string_t& value) override {
    if (!in_map_) return JsonEvents::string(value);
    weight_map_.emplace(std::move(key_), std::move(value));
    return true;
  }

 private:
  bool scalar(const std::string& found) override {
    if (in_map_) fail_here("weight_map: ", in_quotes(key_), " is ", found, ", expected a string");
    if (depth_ == 1 && key_ == "weight_map") fail_here("weight_map is ", found, ", expected an object");
    return true;
  }

  std::map<std::string, std::string> weight_map_;
  std::set<std::string> keys_;  // of the object at the top
  std::string key_;
  std::size_t depth_ = 0;
  bool in_map_ = false;
};

// The weight_map of an index file. Throws CheckpointError.
inline std::map<std::string, std::string> parse_index(std::span<const std::byte> bytes,
                                                      std::string_view where) {
  require_checkpoint(bytes.size() <= kMaxHeaderBytes, where, ": the index has ", bytes.size(),
                     " bytes, expected at most ", kMaxHeaderBytes);
  if (!text_at(bytes).starts_with('{')) refuse_other_format(bytes, where, "an index");
  IndexEvents events(where);
  parse_json(text_at(bytes), events, where, "the index");
  return events.take();
}

// The file that an index means: below its directory, whatever it says.
inline std::filesystem::path shard_path(const std::filesystem::path& index, const std::string& tensor,
                                        const std::string& shard) {
  const std::filesystem::path path(shard);
  const bool leaves = path.has_root_path() || std::find(path.begin(), path.end(), "..") != path.end();
  if (shard.empty() || leaves || shard.find('\0') != std::string::npos)
    fail_checkpoint(index.string(), ": weight_map: ", in_quotes(tensor), " is in ", in_quotes(shard),
                    ", which is no file below the directory of the index");
  return index.parent_path() / path;
}

// The set of files that one belongs to by its name, as model-00002-of-00005.safetensors.
struct ShardSet {
  std::string begin;        // "model-"
  std::size_t digits;       // 5, of a file's number
  std::string end;          // "-of-00005.safetensors"
  std::uint64_t num_files;  // 5

  // The name of file `number`, from 1 on.
  std::string name(std::uint64_t number) const {
    const std::string text = std::to_string(number);
    return begin + std::string(digits - (std::min)(digits, text.size()), '0') + text + end;
  }
};

// Nothing where a name is no shard's, which ends with `extension`.
inline std::optional<ShardSet> shard_set_of(std::string_view name,
                                            std::string_view extension = ".safetensors") {
  constexpr std::string_view kOf = "-of-";
  const std::size_t of = name.rfind(kOf);
  if (of == std::string_view::npos || !name.ends_with(extension)) return std::nullopt;
  const std::size_t begin = name.substr(0, of).find_last_not_of("0123456789") + 1;  // 0 where there is none
  const char *const count = name.data() + of + kOf.size(), *const end =
                                                               name.data() + name.size() - extension.size();
  std::uint64_t num_files = 0;
  if (begin == of || count >= end) return std::nullopt;
  const auto [read, error] = std::from_chars(count, end, num_files);
  if (read != end || error != std::errc()) return std::nullopt;
  return ShardSet{std::string(name.substr(0, begin)), of - begin, std::string(name.substr(of)), num_files};
}

// Throws unless these names of files in a directory are all those of one set.
inline void require_shards(const std::string& directory, const ShardSet& set,
                           std::set<std::string, std::less<>> names) {
  const std::size_t found = names.size();
  for (std::uint64_t number = 1; number <= set.num_files; ++number)
    if (names.erase(set.name(number)) == 0)
      fail_checkpoint(directory, ": there is no ", in_quotes(set.name(number)), " among ", found,
                      " .safetensors files, expected all ", set.num_files, " of the set, or an index");
  if (!names.empty())
    fail_checkpoint(directory, ": ", in_quotes(*names.begin()), " is not among the ", set.num_files,
                    " files of the set of ", in_quotes(set.name(1)), ", expected one set, or an index");
}

// The files of a set in a directory, sorted. Throws unless all are there.
inline std::vector<std::filesystem::path> files_of(const ShardSet& set,
                                                   const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> files;
  for (std::uint64_t number = 1; number <= set.num_files; ++number) {
    std::error_code error;
    files.push_back(directory / set.name(number));
    if (!std::filesystem::exists(files.back(), error))
      fail_checkpoint(files.back().string(), ": there is no such file, expected all ", set.num_files,
                      " of the set");
  }
  return files;
}

}  // namespace moe::io
