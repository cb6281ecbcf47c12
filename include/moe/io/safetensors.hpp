// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <moe/core/types.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/file.hpp>
#include <moe/io/header.hpp>
#include <moe/io/json_events.hpp>

// Safetensors files: 8 bytes that hold the length of a header, the header in JSON, the tensors. A header is
// believed only after every number in it was checked against the others.
namespace moe {

namespace io {

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

}  // namespace io

/// A tensor to write: its name, dtype, shape and bytes. What a Checkpoint gives can be written as
/// it is.
using TensorToWrite = TensorView;

namespace io {

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
  static_assert(kOrder.size() == std::size_t(std::count_if(kDTypes.begin(), kDTypes.end(),
                                                           [](auto& info) { return info.numbers == 1; })));
  return int(std::find(kOrder.begin(), kOrder.end(), dtype) - kOrder.begin());
}

/// A safetensors file: what comes first, then the bytes of the tensors in this order.
struct FileLayout {
  std::string head;  ///< the length of the header, and the header
  std::vector<const TensorToWrite*> tensors;
};

// The first tensor begins at a multiple of `alignment`, which is one of 8.
inline FileLayout layout_of(std::span<const TensorToWrite> tensors,
                            const std::map<std::string, std::string>& metadata, std::string_view where,
                            std::size_t alignment = 8) {
  FileLayout layout;
  for (const TensorToWrite& tensor : tensors) {
    require_checkpoint(tensor.name != "__metadata__", where, ": no tensor can have the name '__metadata__'");
    check_bytes(tensor, where);
    require_checkpoint(numbers_of(tensor.dtype) == 1, where, ": ", description_of(tensor),
                       " is in blocks of ", numbers_of(tensor.dtype),
                       " numbers, expected single elements in a safetensors file");
    layout.tensors.push_back(&tensor);
  }
  auto& order = layout.tensors;
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->name < b->name; });
  const auto twice =
      std::adjacent_find(order.begin(), order.end(), [](auto* a, auto* b) { return a->name == b->name; });
  if (twice != order.end()) fail_checkpoint(where, ": two tensors have the name ", in_quotes((*twice)->name));
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) {
    const int rank_a = write_order(a->dtype), rank_b = write_order(b->dtype);
    return rank_a != rank_b ? rank_a < rank_b : a->name < b->name;
  });

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
  const std::size_t head = sizeof(std::uint64_t) + json.size();
  json.resize(json.size() + (alignment - head % alignment) % alignment, ' ');
  require_checkpoint(json.size() <= kMaxHeaderBytes, where, ": the header has ", json.size(),
                     " bytes, expected at most ", kMaxHeaderBytes);
  const std::uint64_t length = json.size();
  layout.head.resize(sizeof(length));
  std::memcpy(layout.head.data(), &length, sizeof(length));
  layout.head += json;
  return layout;
}

// The parts of the file, which live as long as the layout and its tensors.
inline std::vector<std::span<const std::byte>> parts_of(const FileLayout& layout) {
  std::vector<std::span<const std::byte>> parts{std::as_bytes(std::span(layout.head))};
  for (const TensorToWrite* tensor : layout.tensors) parts.push_back(tensor->bytes);
  return parts;
}

}  // namespace io

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
  io::require_little_endian();
  const io::FileLayout layout = io::layout_of(tensors, metadata, path.string());
  io::replace_file(path, io::parts_of(layout));
}

}  // namespace moe
