// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <moe/io/dtype.hpp>
#include <moe/io/file.hpp>
#include <moe/io/gguf.hpp>
#include <moe/io/header.hpp>
#include <moe/io/quantisation.hpp>
#include <moe/io/safetensors.hpp>
#include <moe/io/shards.hpp>

// Checkpoints of one file or many: tensors by name, whichever file they are in.
namespace moe {

namespace io {

// "F64, F32, ...": what is read.
inline std::string dtype_names() {
  std::string names;
  for (const DTypeInfo& info : kDTypes) names += (names.empty() ? "" : ", ") + std::string(info.name);
  return names;
}

// How many characters to insert, remove or replace to get from one to the other.
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t(0));
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replace = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = (std::min)({replace, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

// ": did you mean 'x' or 'y'?", or nothing where no name is near.
inline std::string hint(std::string_view name, std::span<const std::string> names) {
  constexpr std::size_t kMaxHints = 3, kMaxLength = 256;
  if (name.size() > kMaxLength) return "";
  std::vector<std::pair<std::size_t, std::string_view>> alike;
  for (const std::string& other : names) {
    const std::size_t longer = (std::max)(name.size(), other.size());
    if (longer > kMaxLength || longer > 2 * (std::min)(name.size(), other.size())) continue;
    const std::size_t distance = edit_distance(name, other);
    if (distance <= longer / 2) alike.emplace_back(distance, other);
  }
  std::sort(alike.begin(), alike.end());  // those that are much farther than the nearest help nobody
  const auto far_away = [&](const auto& other) { return other.first > 2 * alike.front().first + 1; };
  alike.erase(std::find_if(alike.begin(), alike.end(), far_away), alike.end());
  const auto end = alike.begin() + std::ptrdiff_t((std::min)(alike.size(), kMaxHints));
  std::string text;
  for (auto it = alike.begin(); it != end; ++it)
    text += (text.empty() ? ": did you mean " : " or ") + in_quotes(it->second);
  return text.empty() ? text : text + "?";
}

}  // namespace io

/// The tensors of a checkpoint, read-only, by name. The files are mapped into memory where the
/// system can, so opening reads headers only. A copy is cheap and shares the mapping; everything is
/// const, so threads may share one too.
class Checkpoint {
 public:
  /// No tensors.
  Checkpoint() : contents_(std::make_shared<const Contents>()) {}
  // Copied where one would move it: there is no empty state to fall into.
  Checkpoint(const Checkpoint&) = default;
  Checkpoint& operator=(const Checkpoint&) = default;

  /// Opens a .safetensors file, an index of several (.json, as *.safetensors.index.json), or a
  /// directory that holds one index, or else exactly one .safetensors file or all files of one set, as
  /// model-00001-of-00005.safetensors to model-00005-of-00005.safetensors, or, without any of these, one GGUF
  /// file or the files of one set. Hidden files of a directory
  /// do not count: macOS leaves a ._m.safetensors beside m.safetensors. Of the files of an index only
  /// the tensors that it lists are there. O(headers * log(tensors)). Throws CheckpointError where a
  /// file cannot be read, is missing, or breaks a rule of the format: tensors must cover the data
  /// exactly, no key comes twice, and a tensor has a dtype, a shape, data_offsets and nothing else,
  /// and as many bytes as its shape says where the dtype is one of DType. Values are not looked at,
  /// they may be NaN.
  /// Where a config.json lies beside the files its quantization_config is read, too.
  /// A GGUF file (versions 2 and 3, little-endian) may also be opened by its own path, with it all files of
  /// its set, as m-00001-of-00003.gguf. Its tensors are where its header says, each byte once, and have their
  /// shapes in row-major order: the dimensions of the file from the last to the first.
  static Checkpoint open(const std::filesystem::path& path) {
    std::error_code error;
    if (!std::filesystem::is_directory(path, error)) return open_one(path);
    const std::vector<std::filesystem::path> files = files_in(path);
    return files.size() == 1 ? open_one(files.front()) : open_all(path, files);
  }

  /// Opens .safetensors files as one checkpoint, which has the path of the first. Throws
  /// CheckpointError as above, for no files, and for a tensor that is in two of them.
  static Checkpoint open(const std::vector<std::filesystem::path>& files) {
    io::require_checkpoint(!files.empty(), "Checkpoint::open: a list of 0 files, expected at least 1");
    return open_all(files.front(), files);
  }
  /// The same of files named in place: open({"one.safetensors", "two.safetensors"}).
  static Checkpoint open(std::initializer_list<std::filesystem::path> files) {
    return open(std::vector<std::filesystem::path>(files));
  }

  /// O(log(tensors)).
  bool contains(std::string_view name) const { return contents_->header.contains(name); }

  /// The tensor of this name. It, and its bytes, last as long as any copy of the checkpoint or its
  /// owner(). O(log(tensors)). Throws CheckpointError where there is none, with the names that are
  /// nearest to it, and where it has a dtype that DType does not have.
  const TensorView& at(std::string_view name) const {
    const io::Header& header = contents_->header;
    if (const auto it = header.tensors.find(name); it != header.tensors.end()) return it->second;
    if (const auto it = header.unread.find(name); it != header.unread.end())
      io::fail_checkpoint(path().string(), ": tensor ", io::in_quotes(name), ": dtype ",
                          io::in_quotes(it->second.dtype), " is not read, expected ", io::dtype_names());
    io::fail_checkpoint(path().string(), ": there is no tensor ", io::in_quotes(name), " among ",
                        names().size(), io::hint(name, names()));
  }

  /// The tensors whose names begin with `prefix`, under the rest of their names: one model of a file of
  /// several. O(tensors). Throws CheckpointError where there are none.
  /// Example: checkpoint.below("thinker.").at("model.norm.weight") is "thinker.model.norm.weight".
  Checkpoint below(std::string_view prefix) const {
    Contents contents{
        .path = contents_->path, .files = contents_->files, .quantisation = contents_->quantisation};
    contents.header.metadata = metadata();
    contents.header.is_gguf = is_gguf();
    for (const auto& [name, tensor] : contents_->header.tensors) {
      if (!name.starts_with(prefix)) continue;
      TensorView& below = contents.header.tensors[name.substr(prefix.size())] = tensor;
      below.name = name.substr(prefix.size());
    }
    for (const auto& [name, tensor] : contents_->header.unread)
      if (name.starts_with(prefix)) contents.header.unread[name.substr(prefix.size())] = tensor;
    if (contents.header.tensors.empty() && contents.header.unread.empty())
      io::fail_checkpoint(path().string(), ": none of ", names().size(), " names begins with ",
                          io::in_quotes(prefix));
    return Checkpoint(std::move(contents));
  }

  /// All names, sorted, also of tensors that `at` refuses for their dtype.
  const std::vector<std::string>& names() const& { return contents_->names; }
  /// The same of a checkpoint that is about to go.
  std::vector<std::string> names() && { return contents_->names; }  // of open(...).names()

  /// The metadata of the files; values of a GGUF file as text: numbers in decimal, true and false, arrays as
  /// JSON, but for numbers that are not finite. Where two files differ in a value, that of the file whose
  /// name sorts first; of a list of files, that of the earlier one.
  const std::map<std::string, std::string>& metadata() const& { return contents_->header.metadata; }
  /// The same of a checkpoint that is about to go.
  std::map<std::string, std::string> metadata() && { return contents_->header.metadata; }

  /// quantization_config of the config.json beside its files, as io::read_quantisation has it; nothing where
  /// there is none.
  const std::map<std::string, std::string>& quantisation() const& { return contents_->quantisation; }
  /// The same of a checkpoint that is about to go.
  std::map<std::string, std::string> quantisation() && { return contents_->quantisation; }

  /// Whether its files are GGUF.
  bool is_gguf() const { return contents_->header.is_gguf; }

  /// The file, the index, or the directory of a set of files.
  const std::filesystem::path& path() const& { return contents_->path; }
  /// The same of a checkpoint that is about to go.
  std::filesystem::path path() && { return contents_->path; }

  /// Keeps every view and its bytes valid while it lives.
  std::shared_ptr<const void> owner() const { return contents_; }

 private:
  struct Contents {
    std::filesystem::path path{};
    std::vector<std::shared_ptr<const void>> files{};
    io::Header header{};
    std::vector<std::string> names{};
    std::map<std::string, std::string> quantisation{};
  };

  explicit Checkpoint(Contents contents) {
    for (const auto& [name, tensor] : contents.header.tensors) contents.names.push_back(name);
    for (const auto& [name, tensor] : contents.header.unread) contents.names.push_back(name);
    std::sort(contents.names.begin(), contents.names.end());
    contents_ = std::make_shared<const Contents>(std::move(contents));
  }

  // The index of a directory, or else its one file or the files of its one set, sorted.
  static std::vector<std::filesystem::path> files_in(const std::filesystem::path& directory) {
    std::vector<std::filesystem::path> indices, files, gguf_files;
    std::set<std::string, std::less<>> names;
    std::error_code error;
    for (std::filesystem::directory_iterator it(directory, error), end; !error && it != end;
         it.increment(error)) {
      const std::string name = it->path().filename().string();
      if (name.starts_with('.')) continue;
      if (name.ends_with(".safetensors.index.json")) indices.push_back(it->path());
      if (name.ends_with(".gguf")) gguf_files.push_back(it->path());
      if (!name.ends_with(".safetensors")) continue;
      files.push_back(it->path());
      names.insert(name);
    }
    if (error) io::fail_checkpoint(directory.string(), ": cannot list the directory: ", error.message());
    if (indices.empty() && files.empty() && !gguf_files.empty())
      return {one_of_set(directory, std::move(gguf_files))};
    if (indices.size() == 1) return indices;
    const auto set = names.empty() ? std::nullopt : io::shard_set_of(*names.begin());
    if (!indices.empty() || (files.size() != 1 && !set))
      io::fail_checkpoint(directory.string(), ": the directory holds ", indices.size(),
                          " .safetensors.index.json and ", files.size(),
                          " .safetensors files, expected 1 index, or no index and 1 file or one "
                          "set as model-00001-of-00002.safetensors");
    if (set) io::require_shards(directory.string(), *set, names);
    std::sort(files.begin(), files.end());
    return files;
  }

  // The one GGUF file of a directory, or the first file of its one set.
  static std::filesystem::path one_of_set(const std::filesystem::path& directory,
                                          std::vector<std::filesystem::path> files) {
    std::sort(files.begin(), files.end());
    if (files.size() == 1) return files.front();
    const auto set = io::shard_set_of(files.front().filename().string(), ".gguf");
    if (!set || set->num_files != files.size() || set->name(files.size()) != files.back().filename().string())
      io::fail_checkpoint(directory.string(), ": the directory holds ", files.size(),
                          " .gguf files, expected 1 or one set as model-00001-of-00002.gguf: open one by its "
                          "own path, as ",
                          io::in_quotes(files.front().string()));
    return files.front();
  }

  static Checkpoint open_one(const std::filesystem::path& path) {
    if (const auto set = io::shard_set_of(path.filename().string(), ".gguf"); set && set->num_files > 0) {
      const std::vector<std::filesystem::path> files = io::files_of(*set, path.parent_path());
      if (std::find(files.begin(), files.end(), path) == files.end())
        io::fail_checkpoint(path.string(), ": is none of the ", set->num_files, " files of its set, ",
                            io::in_quotes(set->name(1)), " and so on");
      return open_all(path, files);
    }
    if (path.extension() != ".json") return open_all(path, {path});
    Contents contents{.path = path};
    read_index(contents);
    contents.quantisation = io::read_quantisation(path.parent_path() / "config.json");
    return Checkpoint(std::move(contents));
  }

  static Checkpoint open_all(const std::filesystem::path& path,
                             const std::vector<std::filesystem::path>& files) {
    Contents contents{.path = path};
    std::map<std::string, std::size_t> file_of;
    std::set<std::string> seen;
    for (std::size_t i = 0; i < files.size(); ++i) {
      io::Header header = read_header(contents, files[i]);
      io::check_split(header, files.size(), seen, files[i].string());
      contents.header.is_gguf |= header.is_gguf;
      const auto add = [&](const auto& tensors) {
        for (const auto& [name, tensor] : tensors) {
          const auto [before, is_new] = file_of.try_emplace(name, i);
          if (!is_new)
            io::fail_checkpoint(files[i].string(), ": tensor ", io::in_quotes(name), " is in ",
                                files[before->second].string(), " too, expected one of them");
        }
      };
      add(header.tensors);
      add(header.unread);
      contents.header.tensors.merge(header.tensors);
      contents.header.unread.merge(header.unread);
      contents.header.metadata.merge(header.metadata);
    }
    if (!contents.header.is_gguf)
      contents.quantisation = io::read_quantisation(files.front().parent_path() / "config.json");
    return Checkpoint(std::move(contents));
  }

  // The header of a file that the contents are to keep in memory.
  static io::Header read_header(Contents& contents, const std::filesystem::path& path) {
    io::require_little_endian();
    io::FileBytes file = io::map_file(path);
    const bool gguf = path.extension() == ".gguf" || io::is_gguf(file.bytes);
    io::Header header =
        gguf ? io::parse_gguf(file.bytes, path.string()) : io::parse_safetensors(file.bytes, path.string());
    contents.files.push_back(std::move(file.owner));
    return header;
  }

  static void read_index(Contents& contents) {
    const std::string index = contents.path.string();
    std::map<std::string, std::vector<std::string>> names_of_shard;
    const io::FileBytes bytes = io::read_file(contents.path);
    for (const auto& [name, shard] : io::parse_index(bytes.bytes, index))
      names_of_shard[shard].push_back(name);
    for (const auto& [shard, names] : names_of_shard) {
      const std::filesystem::path path = io::shard_path(contents.path, names.front(), shard);
      std::error_code error;
      if (!std::filesystem::exists(path, error))
        io::fail_checkpoint(index, ": weight_map: ", io::in_quotes(names.front()), " is in ",
                            io::in_quotes(shard), ", which does not exist");
      io::Header header = read_header(contents, path);
      for (const std::string& name : names) {
        if (!header.contains(name))
          io::fail_checkpoint(index, ": weight_map: ", io::in_quotes(name), " is in ", io::in_quotes(shard),
                              ", which does not hold it");
        contents.header.tensors.insert(header.tensors.extract(name));
        contents.header.unread.insert(header.unread.extract(name));
      }
      contents.header.metadata.merge(header.metadata);
    }
  }

  std::shared_ptr<const Contents> contents_;
};

}  // namespace moe
