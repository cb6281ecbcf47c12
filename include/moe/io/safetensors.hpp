// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <moe/io/dtype.hpp>
#include <moe/io/file.hpp>
#include <moe/types.hpp>

// Checkpoints in safetensors files: 8 bytes that hold the length of a header, the header in JSON,
// the tensors. A header is believed only after every number in it was checked against the others.
namespace moe {

namespace detail {

inline constexpr std::size_t kMaxHeaderBytes = 100'000'000;  // as in the reference implementation

inline std::string_view text_at(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Whether text begins so, whatever the case of its letters, after blanks and a mark of UTF-8.
inline bool begins_as(std::string_view text, std::string_view lower_case) {
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  text.remove_prefix((std::min)(text.find_first_not_of(" \t\r\n"), text.size()));
  return text.size() >= lower_case.size() &&
         std::equal(lower_case.begin(), lower_case.end(), text.begin(), [](char expected, char c) {
           return expected == (c >= 'A' && c <= 'Z' ? char(c - 'A' + 'a') : c);
         });
}

// What a file is instead of a safetensors file or an index, by its first bytes: what servers and tools leave
// where they did not bring the file, and other formats of weights. Empty where the bytes do not say. Short
// magic numbers could be the length of a header, too: this is for files that have none.
inline std::string other_format(std::span<const std::byte> bytes) {
  const std::string_view text = text_at(bytes);
  if (text.starts_with("version https://git-lfs.github.com/"))
    return "a Git LFS pointer, not the file: git lfs pull";
  if (begins_as(text, "<!doctype html") || begins_as(text, "<html")) return "an HTML page";
  if (text.starts_with("PK\x03\x04")) return "a zip archive, as PyTorch writes .bin and .pt";
  if (text.starts_with("\x1f\x8b")) return "a gzip file";
  if (text.starts_with("\x28\xb5\x2f\xfd")) return "a zstd file";
  if (text.starts_with("GGUF")) return "a GGUF file";
  if (text.starts_with("\x89HDF\r\n")) return "an HDF5 file";
  if (text.size() > 1 && text[0] == '\x80' && text[1] >= 2 && text[1] <= 5) return "a Python pickle";
  constexpr std::size_t kLengthBytes = 8, kShown = 60;
  const std::string_view begin = text.substr(0, kShown);
  const bool printable = std::all_of(begin.begin(), begin.end(), [](char c) {
    return (c >= ' ' && c <= '~') || c == '\n' || c == '\r' || c == '\t';
  });
  if (printable && begin.size() >= kLengthBytes) return "text that begins with " + in_quotes(begin);
  return "";
}

// Throws where the first bytes say what the file is.
inline void refuse_other_format(std::span<const std::byte> bytes, std::string_view where,
                                const char* expected) {
  const std::string found = other_format(bytes);
  if (!found.empty()) fail_checkpoint(where, ": the file is ", found, ", expected ", expected);
}

/// What the two JSON readers share. Events come one by one, so what nests deeply needs no stack,
/// and a key that comes twice is seen. Every problem is a CheckpointError thrown from the event.
class JsonEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return scalar("null"); }
  bool boolean(bool value) override { return scalar(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override {
    return scalar(value == 0 ? "-0" : std::to_string(value));  // only negative ones come here
  }
  bool number_unsigned(number_unsigned_t value) override { return scalar(std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return scalar(text); }
  bool string(string_t& value) override { return scalar("the string " + in_quotes(value)); }
  bool binary(binary_t&) override { return scalar("binary data"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    fail_checkpoint(where_, ": ", what_, " is not JSON in UTF-8: byte ", position, ": ",
                    printable(error.what()));
  }

 protected:
  JsonEvents(std::string_view where, const char* what) : where_(where), what_(what) {}

  // A value that is neither an object nor an array and has no meaning of its own.
  virtual bool scalar(const std::string& found) = 0;

  template <class... Parts>
  [[noreturn]] void fail_here(const Parts&... parts) const {
    fail_checkpoint(where_, ": ", parts...);
  }

 private:
  std::string where_;
  const char* what_;
};

// Sends all of `json` to `events`.
inline void parse_json(std::string_view json, JsonEvents& events, std::string_view where, const char* what) {
  // The parser would take a zero byte for the end, and skip the mark of UTF-8 at the beginning.
  const std::size_t zero = json.find('\0');
  require_checkpoint(zero == std::string_view::npos, where, ": ", what, " is not JSON in UTF-8: byte ", zero,
                     " is 0");
  if (!json.starts_with('{'))
    fail_checkpoint(where, ": ", what, " is not a JSON object: it begins with ",
                    json.empty() ? "nothing" : in_quotes(json.substr(0, 1)), ", expected '{'");
  nlohmann::json::sax_parse(json.begin(), json.end(), &events);
}

/// A tensor of a dtype that DType does not have. How many bytes its shape has is not known.
struct UnreadTensor {
  std::string dtype{};
  std::span<const std::byte> bytes{};
};

/// What a safetensors file says about itself.
struct Header {
  std::map<std::string, TensorView, std::less<>> tensors{};
  std::map<std::string, UnreadTensor, std::less<>> unread{};

  std::map<std::string, std::string> metadata{};

  bool contains(std::string_view name) const { return tensors.contains(name) || unread.contains(name); }
};

class HeaderEvents final : public JsonEvents {
 public:
  HeaderEvents(std::span<const std::byte> data, std::string_view where)
      : JsonEvents(where, "the header"), data_(data) {}

  Header take() { return std::move(header_); }

  bool start_object(std::size_t) override {
    if (place_ == Place::start) {
      place_ = Place::top;
    } else if (place_ == Place::entry && name_ == "__metadata__") {
      place_ = Place::metadata;
    } else if (place_ == Place::entry) {
      place_ = Place::tensor;
      tensor_ = {};
    } else {
      return scalar("an object");
    }
    return true;
  }

  bool key(string_t& key) override {
    if (place_ == Place::top) {
      const bool again = key == "__metadata__" ? has_metadata_ : header_.contains(key);
      if (again) fail_here("the header has ", in_quotes(key), " twice");
      if (key == "__metadata__") has_metadata_ = true;
      name_ = std::move(key);
      place_ = Place::entry;
    } else if (place_ == Place::metadata) {
      if (header_.metadata.contains(key)) fail_here("__metadata__ has ", in_quotes(key), " twice");
      key_ = std::move(key);
      place_ = Place::metadata_value;
    } else {
      start_member(key);
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::tensor) add_tensor();
    place_ = place_ == Place::top ? Place::end : Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ == Place::shape)
      place_ = Place::dimension;
    else if (place_ == Place::offsets)
      place_ = Place::offset;
    else
      return scalar("an array");
    return true;
  }
  bool end_array() override {
    place_ = Place::tensor;
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::metadata_value) {
      header_.metadata.emplace(std::move(key_), std::move(value));
      place_ = Place::metadata;
    } else if (place_ == Place::dtype) {
      tensor_.dtype = std::move(value);
      place_ = Place::tensor;
    } else {
      return JsonEvents::string(value);
    }
    return true;
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ == Place::dimension) {
      if (!std::in_range<Index>(value))
        fail_here("tensor ", in_quotes(name_), ": dimension ", value, " is more than ",
                  (std::numeric_limits<Index>::max)());
      tensor_.shape->push_back(Index(value));
    } else if (place_ == Place::offset) {
      tensor_.offsets->push_back(value);
    } else {
      return JsonEvents::number_unsigned(value);
    }
    return true;
  }

  // Throws unless the tensors cover the data, each byte once. O(tensors * log(tensors)).
  void check_cover() const {
    struct Covered {
      std::size_t begin, size;
      std::string_view name;
    };
    std::vector<Covered> tensors;
    tensors.reserve(header_.tensors.size() + header_.unread.size());
    const auto add = [&](const auto& list) {
      for (const auto& [name, tensor] : list)
        tensors.push_back({std::size_t(tensor.bytes.data() - data_.data()), tensor.bytes.size(), name});
    };
    add(header_.tensors);
    add(header_.unread);
    std::sort(tensors.begin(), tensors.end(), [](const Covered& a, const Covered& b) {
      return std::tie(a.begin, a.size, a.name) < std::tie(b.begin, b.size, b.name);
    });
    std::size_t end = 0;
    std::string_view previous;
    for (const auto& [begin, size, name] : tensors) {
      if (begin < end)
        fail_here("tensors overlap: ", in_quotes(name), " begins at ", begin, " of the data, where ",
                  in_quotes(previous), " ends at ", end);
      if (begin > end)
        fail_here("a hole in the data: no tensor holds the bytes from ", end, " to ", begin, ", where ",
                  in_quotes(name), " begins");
      end += size;
      previous = name;
    }
    if (end != data_.size())
      fail_here("the tensors end at ", end, " of the data, but it has ", data_.size(), " bytes");
  }

 private:
  // What the next event belongs to.
  enum class Place {
    start,           // nothing was read yet
    top,             // the names of the tensors
    entry,           // a tensor, or the metadata
    metadata,        // the keys of the metadata
    metadata_value,  // a value of it
    tensor,          // the members of a tensor
    dtype,
    shape,      // the array,
    dimension,  // and what is in it
    offsets,
    offset,
    end,
  };

  struct Tensor {
    std::optional<std::string> dtype{};
    std::optional<std::vector<Index>> shape{};
    std::optional<std::vector<std::uint64_t>> offsets{};
  };

  bool scalar(const std::string& found) override {
    switch (place_) {
      case Place::start:
        fail_here("the header is ", found, ", expected an object");
      case Place::entry:
        fail_here(name_ == "__metadata__" ? name_ : "tensor " + in_quotes(name_), " is ", found,
                  ", expected an object");
      case Place::metadata_value:
        fail_here("__metadata__: ", in_quotes(key_), " is ", found, ", expected a string");
      case Place::dtype:
        fail_here("tensor ", in_quotes(name_), ": dtype is ", found, ", expected a string");
      case Place::shape:
        fail_here("tensor ", in_quotes(name_), ": shape is ", found, ", expected an array");
      case Place::offsets:
        fail_here("tensor ", in_quotes(name_), ": data_offsets is ", found, ", expected an array");
      case Place::dimension:
        fail_here("tensor ", in_quotes(name_), ": dimension ", tensor_.shape->size(), " is ", found,
                  ", expected an integer of at least 0");
      case Place::offset:
        fail_here("tensor ", in_quotes(name_), ": data_offsets[", tensor_.offsets->size(), "] is ", found,
                  ", expected an integer of at least 0");
      default:
        fail_here("the header has ", found, " where nothing is expected");
    }
  }

  void start_member(const std::string& key) {
    bool again = false;
    if (key == "dtype") {
      again = tensor_.dtype.has_value();
      place_ = Place::dtype;
    } else if (key == "shape") {
      again = tensor_.shape.has_value();
      tensor_.shape.emplace();
      place_ = Place::shape;
    } else if (key == "data_offsets") {
      again = tensor_.offsets.has_value();
      tensor_.offsets.emplace();
      place_ = Place::offsets;
    } else {
      fail_here("tensor ", in_quotes(name_), " has the unknown member ", in_quotes(key),
                ", expected dtype, shape and data_offsets");
    }
    if (again) fail_here("tensor ", in_quotes(name_), " has ", in_quotes(key), " twice");
  }

  void add_tensor() {
    auto& [dtype, shape, offsets] = tensor_;
    if (!dtype || !shape || !offsets)
      fail_here("tensor ", in_quotes(name_), " has no ",
                !dtype   ? "dtype"
                : !shape ? "shape"
                         : "data_offsets");
    if (offsets->size() != 2)
      fail_here("tensor ", in_quotes(name_), ": data_offsets has ", offsets->size(), " entries, expected 2");
    const std::uint64_t begin = (*offsets)[0], end = (*offsets)[1];
    if (begin > end)
      fail_here("tensor ", in_quotes(name_), ": data_offsets begin at ", begin, ", after their end at ", end);
    if (end > data_.size())
      fail_here("tensor ", in_quotes(name_), ": data_offsets end at ", end, ", but the file has only ",
                data_.size(), " bytes of data");
    const auto bytes = data_.subspan(std::size_t(begin), std::size_t(end - begin));
    const std::optional<DType> known = dtype_named(*dtype);
    if (!known) {
      header_.unread.emplace(std::move(name_), UnreadTensor{std::move(*dtype), bytes});
      return;
    }
    const std::optional<std::size_t> expected = num_bytes(*known, *shape);
    if (!expected)
      fail_here("tensor ", in_quotes(name_), ": the shape ", text_of(*shape), " of ", *dtype,
                " has more than ", (std::numeric_limits<Index>::max)(), " bytes");
    if (bytes.size() != *expected)
      fail_here("tensor ", in_quotes(name_), ": data_offsets hold ", bytes.size(), " bytes, expected ",
                *expected, " for ", *dtype, " ", text_of(*shape));
    TensorView view{.name = name_, .dtype = *known, .shape = std::move(*shape), .bytes = bytes};
    header_.tensors.emplace(std::move(name_), std::move(view));
  }

  std::span<const std::byte> data_;
  Header header_;
  bool has_metadata_ = false;
  Place place_ = Place::start;
  std::string name_, key_;
  Tensor tensor_;
};

// The header `json` of a file whose tensors are in `data`.
inline Header parse_header(std::string_view json, std::span<const std::byte> data, std::string_view where) {
  HeaderEvents events(data, where);
  parse_json(json, events, where, "the header");
  events.check_cover();
  return events.take();
}

// A whole safetensors file in memory. The views point into `bytes`. O(header * log(tensors)).
// Throws CheckpointError; `where` names the file in its message.
inline Header parse_safetensors(std::span<const std::byte> bytes, std::string_view where) {
  require_little_endian();
  constexpr std::size_t kLengthBytes = 8;
  const std::uint64_t length = bytes.size() < kLengthBytes ? 0 : load<std::uint64_t>(bytes, 0);
  const bool has_header = bytes.size() > kLengthBytes && length <= bytes.size() - kLengthBytes &&
                          bytes[kLengthBytes] == std::byte('{');
  if (!has_header) refuse_other_format(bytes, where, "a safetensors file");
  require_checkpoint(bytes.size() >= kLengthBytes, where, ": the file has ", bytes.size(),
                     " bytes, expected at least ", kLengthBytes);
  require_checkpoint(length <= kMaxHeaderBytes, where, ": the header is to have ", length,
                     " bytes, expected at most ", kMaxHeaderBytes);
  require_checkpoint(length <= bytes.size() - kLengthBytes, where, ": the header is to have ", length,
                     " bytes, but the file ends ", bytes.size() - kLengthBytes, " bytes after its length");
  const auto header = bytes.subspan(kLengthBytes, std::size_t(length));
  return parse_header(text_at(header), bytes.subspan(kLengthBytes + header.size()), where);
}

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

// Nothing where a name is no shard's.
inline std::optional<ShardSet> shard_set_of(std::string_view name) {
  constexpr std::string_view kOf = "-of-", kEnd = ".safetensors";
  const std::size_t of = name.rfind(kOf);
  if (of == std::string_view::npos || !name.ends_with(kEnd)) return std::nullopt;
  const std::size_t begin = name.substr(0, of).find_last_not_of("0123456789") + 1;  // 0 where there is none
  const char *const count = name.data() + of + kOf.size(), *const end =
                                                               name.data() + name.size() - kEnd.size();
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
  const auto end = alike.begin() + std::ptrdiff_t((std::min)(alike.size(), kMaxHints));
  std::partial_sort(alike.begin(), end, alike.end());
  std::string text;
  for (auto it = alike.begin(); it != end; ++it)
    text += (text.empty() ? ": did you mean " : " or ") + in_quotes(it->second);
  return text.empty() ? text : text + "?";
}

}  // namespace detail

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
  /// model-00001-of-00005.safetensors to model-00005-of-00005.safetensors. Hidden files of a directory
  /// do not count: macOS leaves a ._m.safetensors beside m.safetensors. Of the files of an index only
  /// the tensors that it lists are there. O(headers * log(tensors)). Throws CheckpointError where a
  /// file cannot be read, is missing, or breaks a rule of the format: tensors must cover the data
  /// exactly, no key comes twice, and a tensor has a dtype, a shape, data_offsets and nothing else,
  /// and as many bytes as its shape says where the dtype is one of DType. Values are not looked at,
  /// they may be NaN.
  static Checkpoint open(const std::filesystem::path& path) {
    std::error_code error;
    if (!std::filesystem::is_directory(path, error)) return open_one(path);
    const std::vector<std::filesystem::path> files = files_in(path);
    return files.size() == 1 ? open_one(files.front()) : open_all(path, files);
  }

  /// Opens .safetensors files as one checkpoint, which has the path of the first. Throws
  /// CheckpointError as above, for no files, and for a tensor that is in two of them.
  static Checkpoint open(const std::vector<std::filesystem::path>& files) {
    detail::require_checkpoint(!files.empty(), "Checkpoint::open: a list of 0 files, expected at least 1");
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
    const detail::Header& header = contents_->header;
    if (const auto it = header.tensors.find(name); it != header.tensors.end()) return it->second;
    if (const auto it = header.unread.find(name); it != header.unread.end())
      detail::fail_checkpoint(path().string(), ": tensor ", detail::in_quotes(name), ": dtype ",
                              detail::in_quotes(it->second.dtype), " is not read, expected ",
                              detail::dtype_names());
    detail::fail_checkpoint(path().string(), ": there is no tensor ", detail::in_quotes(name), " among ",
                            names().size(), detail::hint(name, names()));
  }

  /// The tensors whose names begin with `prefix`, under the rest of their names: one model of a file of
  /// several. O(tensors). Throws CheckpointError where there are none.
  /// Example: checkpoint.below("thinker.").at("model.norm.weight") is "thinker.model.norm.weight".
  Checkpoint below(std::string_view prefix) const {
    Contents contents{.path = contents_->path, .files = contents_->files};
    contents.header.metadata = metadata();
    for (const auto& [name, tensor] : contents_->header.tensors) {
      if (!name.starts_with(prefix)) continue;
      TensorView& below = contents.header.tensors[name.substr(prefix.size())] = tensor;
      below.name = name.substr(prefix.size());
    }
    for (const auto& [name, tensor] : contents_->header.unread)
      if (name.starts_with(prefix)) contents.header.unread[name.substr(prefix.size())] = tensor;
    if (contents.header.tensors.empty() && contents.header.unread.empty())
      detail::fail_checkpoint(path().string(), ": none of ", names().size(), " names begins with ",
                              detail::in_quotes(prefix));
    return Checkpoint(std::move(contents));
  }

  /// All names, sorted, also of tensors that `at` refuses for their dtype.
  const std::vector<std::string>& names() const { return contents_->names; }

  /// The metadata of the files. Where two files differ in a value, that of the file whose name sorts
  /// first; of a list of files, that of the earlier one.
  const std::map<std::string, std::string>& metadata() const { return contents_->header.metadata; }

  /// The file, the index, or the directory of a set of files.
  const std::filesystem::path& path() const { return contents_->path; }

  /// Keeps every view and its bytes valid while it lives.
  std::shared_ptr<const void> owner() const { return contents_; }

 private:
  struct Contents {
    std::filesystem::path path{};
    std::vector<std::shared_ptr<const void>> files{};
    detail::Header header{};
    std::vector<std::string> names{};
  };

  explicit Checkpoint(Contents contents) {
    for (const auto& [name, tensor] : contents.header.tensors) contents.names.push_back(name);
    for (const auto& [name, tensor] : contents.header.unread) contents.names.push_back(name);
    std::sort(contents.names.begin(), contents.names.end());
    contents_ = std::make_shared<const Contents>(std::move(contents));
  }

  // The index of a directory, or else its one file or the files of its one set, sorted.
  static std::vector<std::filesystem::path> files_in(const std::filesystem::path& directory) {
    std::vector<std::filesystem::path> indices, files;
    std::set<std::string, std::less<>> names;
    std::error_code error;
    for (std::filesystem::directory_iterator it(directory, error), end; !error && it != end;
         it.increment(error)) {
      const std::string name = it->path().filename().string();
      if (name.starts_with('.')) continue;
      if (name.ends_with(".safetensors.index.json")) indices.push_back(it->path());
      if (!name.ends_with(".safetensors")) continue;
      files.push_back(it->path());
      names.insert(name);
    }
    if (error) detail::fail_checkpoint(directory.string(), ": cannot list the directory: ", error.message());
    if (indices.size() == 1) return indices;
    const auto set = names.empty() ? std::nullopt : detail::shard_set_of(*names.begin());
    if (!indices.empty() || (files.size() != 1 && !set))
      detail::fail_checkpoint(directory.string(), ": the directory holds ", indices.size(),
                              " .safetensors.index.json and ", files.size(),
                              " .safetensors files, expected 1 index, or no index and 1 file or one "
                              "set as model-00001-of-00002.safetensors");
    if (set) detail::require_shards(directory.string(), *set, names);
    std::sort(files.begin(), files.end());
    return files;
  }

  static Checkpoint open_one(const std::filesystem::path& path) {
    if (path.extension() != ".json") return open_all(path, {path});
    Contents contents{.path = path};
    read_index(contents);
    return Checkpoint(std::move(contents));
  }

  static Checkpoint open_all(const std::filesystem::path& path,
                             const std::vector<std::filesystem::path>& files) {
    Contents contents{.path = path};
    std::map<std::string, std::size_t> file_of;
    for (std::size_t i = 0; i < files.size(); ++i) {
      detail::Header header = read_header(contents, files[i]);
      const auto add = [&](const auto& tensors) {
        for (const auto& [name, tensor] : tensors) {
          const auto [before, is_new] = file_of.try_emplace(name, i);
          if (!is_new)
            detail::fail_checkpoint(files[i].string(), ": tensor ", detail::in_quotes(name), " is in ",
                                    files[before->second].string(), " too, expected one of them");
        }
      };
      add(header.tensors);
      add(header.unread);
      contents.header.tensors.merge(header.tensors);
      contents.header.unread.merge(header.unread);
      contents.header.metadata.merge(header.metadata);
    }
    return Checkpoint(std::move(contents));
  }

  // The header of a file that the contents are to keep in memory.
  static detail::Header read_header(Contents& contents, const std::filesystem::path& path) {
    detail::require_little_endian();
    detail::FileBytes file = detail::map_file(path);
    detail::Header header = detail::parse_safetensors(file.bytes, path.string());
    contents.files.push_back(std::move(file.owner));
    return header;
  }

  static void read_index(Contents& contents) {
    const std::string index = contents.path.string();
    std::map<std::string, std::vector<std::string>> names_of_shard;
    const detail::FileBytes bytes = detail::read_file(contents.path);
    for (const auto& [name, shard] : detail::parse_index(bytes.bytes, index))
      names_of_shard[shard].push_back(name);
    for (const auto& [shard, names] : names_of_shard) {
      const std::filesystem::path path = detail::shard_path(contents.path, names.front(), shard);
      std::error_code error;
      if (!std::filesystem::exists(path, error))
        detail::fail_checkpoint(index, ": weight_map: ", detail::in_quotes(names.front()), " is in ",
                                detail::in_quotes(shard), ", which does not exist");
      detail::Header header = read_header(contents, path);
      for (const std::string& name : names) {
        if (!header.contains(name))
          detail::fail_checkpoint(index, ": weight_map: ", detail::in_quotes(name), " is in ",
                                  detail::in_quotes(shard), ", which does not hold it");
        contents.header.tensors.insert(header.tensors.extract(name));
        contents.header.unread.insert(header.unread.extract(name));
      }
      contents.header.metadata.merge(header.metadata);
    }
  }

  std::shared_ptr<const Contents> contents_;
};

/// A tensor to write: its name, dtype, shape and bytes. What a Checkpoint gives can be written as
/// it is.
using TensorToWrite = TensorView;

namespace detail {

inline std::string json_string(std::string_view text, std::string_view where, const char* what) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    fail_checkpoint(where, ": the ", what, " ", in_quotes(text), " is not UTF-8");
  }
}

// The order of the reference implementation: large elements first, so that each tensor is aligned
// for its dtype. Where sizes are equal it has one too, and then goes by name.
inline int write_order(DType dtype) {
  constexpr std::array kOrder{DType::U64,     DType::I64, DType::F64,     DType::F32,
                              DType::U32,     DType::I32, DType::BF16,    DType::F16,
                              DType::U16,     DType::I16, DType::F8_E8M0, DType::F8_E4M3,
                              DType::F8_E5M2, DType::I8,  DType::U8,      DType::BOOL};
  static_assert(kOrder.size() == kDTypes.size());
  return int(std::find(kOrder.begin(), kOrder.end(), dtype) - kOrder.begin());
}

/// A safetensors file: what comes first, then the bytes of the tensors in this order.
struct FileLayout {
  std::string head;  ///< the length of the header, and the header
  std::vector<const TensorToWrite*> tensors;
};

inline FileLayout layout_of(std::span<const TensorToWrite> tensors,
                            const std::map<std::string, std::string>& metadata, std::string_view where) {
  FileLayout layout;
  for (const TensorToWrite& tensor : tensors) {
    require_checkpoint(tensor.name != "__metadata__", where, ": no tensor can have the name '__metadata__'");
    check_bytes(tensor, where);
    layout.tensors.push_back(&tensor);
  }
  auto& order = layout.tensors;
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->name < b->name; });
  const auto twice =
      std::adjacent_find(order.begin(), order.end(), [](auto* a, auto* b) { return a->name == b->name; });
  if (twice != order.end()) fail_checkpoint(where, ": two tensors have the name ", in_quotes((*twice)->name));
  std::stable_sort(order.begin(), order.end(),
                   [](auto* a, auto* b) { return write_order(a->dtype) < write_order(b->dtype); });

  std::string json = "{";
  if (!metadata.empty()) {
    json += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata)
      json += (json.back() == '{' ? "" : ",") + json_string(key, where, "key of the metadata") + ":" +
              json_string(value, where, "value of the metadata");
    json += '}';
  }
  std::size_t end = 0;
  for (const TensorToWrite* tensor : order) {
    const std::size_t begin = std::exchange(end, end + tensor->bytes.size());
    json += (json.size() == 1 ? "" : ",") + json_string(tensor->name, where, "name") + ":{\"dtype\":\"" +
            std::string(name_of(tensor->dtype)) + "\",\"shape\":[";
    for (std::size_t i = 0; i < tensor->shape.size(); ++i)
      json += (i == 0 ? "" : ",") + std::to_string(tensor->shape[i]);
    json += "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
  }
  json += '}';
  constexpr std::size_t kAlignment = 8;
  json.resize((json.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  require_checkpoint(json.size() <= kMaxHeaderBytes, where, ": the header has ", json.size(),
                     " bytes, expected at most ", kMaxHeaderBytes);
  const std::uint64_t length = json.size();
  layout.head.resize(sizeof(length));
  std::memcpy(layout.head.data(), &length, sizeof(length));
  layout.head += json;
  return layout;
}

}  // namespace detail

/// Writes a safetensors file. The bytes depend on the arguments only, not on the order of the
/// tensors, and are those that the reference implementation writes (which has no order of metadata
/// with several keys; here they are sorted). Every tensor is aligned for its dtype. The file is
/// written beside `path`, synced and renamed: whoever reads finds the old file or the new one, and
/// who has mapped the old one keeps it. The new file has the permissions of any new file; a link is
/// replaced, not followed. O(bytes). Throws CheckpointError, and leaves the old file as it was,
/// where a name comes twice, is "__metadata__" or no UTF-8, where bytes do not fit a shape, where
/// the header is too long for a reader, and where the system fails.
inline void write_safetensors(const std::filesystem::path& path, std::span<const TensorToWrite> tensors,
                              const std::map<std::string, std::string>& metadata = {}) {
  detail::require_little_endian();
  const detail::FileLayout layout = detail::layout_of(tensors, metadata, path.string());
  std::vector<std::span<const std::byte>> parts{std::as_bytes(std::span(layout.head))};
  for (const TensorToWrite* tensor : layout.tensors) parts.push_back(tensor->bytes);
  detail::replace_file(path, parts);
}

}  // namespace moe
