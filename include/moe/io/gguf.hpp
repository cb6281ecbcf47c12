// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <moe/core/types.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/header.hpp>
#include <moe/io/json_events.hpp>

// GGUF files of versions 2 and 3, by docs/gguf.md of ggml: a header of key-value pairs and of what is said of
// each tensor, then the tensors. A number is believed only after it was checked against the size of the file.
namespace moe::io {

/// Whether a file begins as GGUF files do. No safetensors file does: its header would be too long.
inline bool is_gguf(std::span<const std::byte> bytes) { return text_at(bytes).starts_with("GGUF"); }

/// The name of ggml's tensor type `number`, e.g. "Q4_K"; types that no specification has any more, or yet,
/// have their number, e.g. "type 99".
inline std::string gguf_type_name(std::uint32_t number) {
  constexpr std::array kNames{
      "F32",   "F16",    "Q4_0",  "Q4_1", "",     "",        "Q5_0",   "Q5_1",    "Q8_0",  "Q8_1",   "Q2_K",
      "Q3_K",  "Q4_K",   "Q5_K",  "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S",
      "IQ2_S", "IQ4_XS", "I8",    "I16",  "I32",  "I64",     "F64",    "IQ1_M",   "BF16",  "",       "",
      "",      "TQ1_0",  "TQ2_0", "",     "",     "",        "MXFP4",  "NVFP4",   "Q1_0"};
  const std::string_view name = number < kNames.size() ? kNames[number] : "";
  return name.empty() ? "type " + std::to_string(number) : std::string(name);
}

/// Reads a GGUF file from its beginning to its end.
class GGUFReader {
 public:
  /// Views point into `bytes`; `where` names the file in messages.
  GGUFReader(std::span<const std::byte> bytes, std::string_view where) : bytes_(bytes), where_(where) {}

  /// All that the file says. O(header * log(tensors)). Throws CheckpointError.
  Header read() {
    if (!is_gguf(bytes_)) {
      refuse_other_format(bytes_, where_, "a GGUF file");
      fail_here("begins with ", in_quotes(text_at(bytes_.first((std::min)(left(), kMagicBytes)))),
                ", expected 'GGUF'");
    }
    at_ = kMagicBytes;
    const auto version = number<std::uint32_t>("a version");
    if (version != 2 && version != 3)
      fail_here("has version ", version, version % 65536 == 0 ? " (is it big-endian?)" : "",
                ", expected 2 or 3, little-endian");
    const auto tensors = number<std::uint64_t>("a tensor_count");
    const auto pairs = number<std::uint64_t>("a metadata_kv_count");
    check_count(pairs, kLeastPair, "a metadata_kv_count");
    for (std::uint64_t i = 0; i < pairs; ++i) {
      subject_ = "key " + std::to_string(i);
      read_pair();
    }
    subject_ = "the header";
    check_count(tensors, kLeastTensor, "a tensor_count");
    for (std::uint64_t i = 0; i < tensors; ++i) {
      subject_ = "tensor " + std::to_string(i);
      read_info();
    }
    place_tensors();
    return std::move(header_);
  }

 private:
  // What is said of a tensor.
  struct Info {
    TensorView view{};         // without bytes
    std::string unread{};      // its type, where DType does not have it
    std::uint64_t offset = 0;  // of its bytes in the data
    std::uint64_t size = 0;    // of them; of an unread one not known
  };

  // Types of values.
  enum ValueType : std::uint32_t {
    kU8,
    kI8,
    kU16,
    kI16,
    kU32,
    kI32,
    kF32,
    kBool,
    kString,
    kArray,
    kU64,
    kI64,
    kF64
  };
  static constexpr std::array<std::size_t, 13> kLeastValue{1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};  // bytes

  static constexpr std::size_t kMagicBytes = 4;
  static constexpr std::size_t kLeastPair = 8 + 1 + 4 + 1;    // a key of one letter, its type, a byte
  static constexpr std::size_t kLeastTensor = 8 + 4 + 4 + 8;  // a name without letters, no dimensions
  static constexpr std::size_t kMostKey = 65535, kMostName = 64, kMostDimensions = 4;
  static constexpr std::uint64_t kEnd = (std::numeric_limits<std::uint64_t>::max)();
  static constexpr std::size_t kMostNested = 16;  // the specification has no limit, the stack has

  template <class... Parts>
  [[noreturn]] void fail_here(const Parts&... parts) const {
    fail_checkpoint(where_, ": ", subject_, " ", parts...);
  }

  std::size_t left() const { return bytes_.size() - at_; }

  std::span<const std::byte> take(std::uint64_t size, const char* what) {
    if (size > left())
      fail_here("has ", what, " of ", size, " bytes at ", at_, ", but the file has only ", bytes_.size(),
                " bytes");
    const auto taken = bytes_.subspan(at_, std::size_t(size));
    at_ += taken.size();
    return taken;
  }
  template <class T>
  T number(const char* what) {
    return load<T>(take(sizeof(T), what), 0);
  }
  // Text of at most `most` bytes.
  std::string_view text(const char* what, std::uint64_t most) {
    const auto size = number<std::uint64_t>("a length");
    if (size > most) fail_here("has ", what, " of ", size, " bytes, expected at most ", most);
    return text_at(take(size, what));
  }

  void check_count(std::uint64_t count, std::size_t least, const char* what) const {
    if (count > left() / least)
      fail_here("has ", what, " of ", count, ", but the ", left(), " bytes that follow hold at most ",
                left() / least);
  }

  void read_pair() {
    const std::string_view key = text("a name", kMostKey);
    const bool ascii = std::all_of(key.begin(), key.end(), [](char c) { return c >= ' ' && c <= '~'; });
    if (key.empty() || !ascii) fail_here("is ", in_quotes(key), ", expected at least 1 letter of ASCII");
    subject_ = "key " + in_quotes(key);
    const auto type = number<std::uint32_t>("a type");
    const std::size_t begin = at_;
    std::string value;
    append_value(type, 0, value);
    if (!header_.metadata.emplace(key, std::move(value)).second) fail_here("comes twice, expected once");
    if (key != "general.alignment") return;
    if (type != kU32)
      fail_here("has type ", type, ", expected ", std::uint32_t(kU32), ", an integer of 32 bits");
    alignment_ = load<std::uint32_t>(bytes_.subspan(begin), 0);
    if (alignment_ == 0 || alignment_ % 8 != 0) fail_here("is ", alignment_, ", expected a multiple of 8");
  }

  template <class T>
  void append_number(std::string& out) {
    const T value = number<T>("a value");
    std::array<char, 32> text;
    const auto result = std::to_chars(text.data(), text.data() + text.size(), value);
    out.append(text.data(), result.ptr);
  }

  // Appends the next value as text.
  void append_value(std::uint32_t type, std::size_t nested, std::string& out) {
    switch (type) {
      case kU8:
        return append_number<std::uint8_t>(out);
      case kI8:
        return append_number<std::int8_t>(out);
      case kU16:
        return append_number<std::uint16_t>(out);
      case kI16:
        return append_number<std::int16_t>(out);
      case kU32:
        return append_number<std::uint32_t>(out);
      case kI32:
        return append_number<std::int32_t>(out);
      case kU64:
        return append_number<std::uint64_t>(out);
      case kI64:
        return append_number<std::int64_t>(out);
      case kF32:
        return append_number<float>(out);
      case kF64:
        return append_number<double>(out);
      case kBool: {
        const int value = number<std::uint8_t>("a value");
        if (value > 1) fail_here("has a truth value of ", value, ", expected 0 or 1");
        out += value == 0 ? "false" : "true";
        return;
      }
      case kString: {
        const std::string_view value = text("a string", kEnd);
        using json = nlohmann::json;  // what is no UTF-8 is replaced, as of a tokenizer's parts of letters
        out += nested == 0 ? std::string(value)
                           : json(value).dump(-1, ' ', false, json::error_handler_t::replace);
        return;
      }
      case kArray:
        return append_array(nested + 1, out);
      default:
        check_type(type);
    }
  }

  void check_type(std::uint32_t type) const {
    if (type >= kLeastValue.size())
      fail_here("has a value of type ", type, ", expected at most ", kLeastValue.size() - 1);
  }

  void append_array(std::size_t nested, std::string& out) {
    if (nested > kMostNested)
      fail_here("has arrays within arrays, ", nested, " deep, expected at most ", kMostNested);
    const auto type = number<std::uint32_t>("an array's type");
    const auto size = number<std::uint64_t>("an array's length");
    check_type(type);
    check_count(size, kLeastValue[type], "an array's length");
    out += '[';
    for (std::uint64_t i = 0; i < size; ++i) {
      if (i > 0) out += ',';
      append_value(type, nested, out);
    }
    out += ']';
  }

  void read_info() {
    Info info;
    TensorView& view = info.view;
    view.name = text("a name", kMostName);
    subject_ = "tensor " + in_quotes(view.name);
    if (!names_.insert(view.name).second) fail_here("comes twice, expected once");
    const auto dimensions = number<std::uint32_t>("a number of dimensions");
    if (dimensions > kMostDimensions)
      fail_here("has ", dimensions, " dimensions, expected at most ", kMostDimensions);
    for (std::uint32_t i = 0; i < dimensions; ++i) {
      const auto size = number<std::uint64_t>("a dimension");
      if (!std::in_range<Index>(size))
        fail_here("has a dimension of ", size, ", expected at most ", (std::numeric_limits<Index>::max)());
      view.shape.insert(view.shape.begin(), Index(size));  // the file has the innermost one first
    }
    const std::string type = gguf_type_name(number<std::uint32_t>("a type"));
    const auto known = std::find_if(kDTypes.begin(), kDTypes.end(), [&](auto& t) { return t.name == type; });
    if (known != kDTypes.end()) {
      view.dtype = known->dtype;
      check_blocks(view, where_);
      const std::optional<std::size_t> bytes = num_bytes(view.dtype, view.shape);
      if (!bytes)
        fail_here("has the shape ", text_of(view.shape), " of ", type, ", more than ",
                  (std::numeric_limits<Index>::max)(), " bytes");
      info.size = *bytes;
    } else {
      info.unread = type;
    }
    info.offset = number<std::uint64_t>("an offset");
    if (info.offset % alignment_ != 0)
      fail_here("has an offset of ", info.offset, ", expected a multiple of ", alignment_);
    infos_.push_back(std::move(info));
  }

  std::uint64_t aligned(std::uint64_t at) const { return (at + alignment_ - 1) / alignment_ * alignment_; }

  // Gives the tensors their bytes. Each begins where the one before it ends, aligned; the last one ends with
  // the file, or where that is aligned; an unread one ends where the next begins.
  void place_tensors() {
    const auto data = bytes_.subspan(std::size_t((std::min)(aligned(at_), std::uint64_t(bytes_.size()))));
    std::sort(infos_.begin(), infos_.end(), [](const Info& a, const Info& b) {
      return std::tie(a.offset, a.size, a.view.name) < std::tie(b.offset, b.size, b.view.name);
    });
    std::uint64_t end = 0;
    for (std::size_t i = 0; i < infos_.size(); ++i) {
      auto& [view, unread, offset, size] = infos_[i];
      subject_ = "tensor " + in_quotes(view.name);
      if (offset < end)
        fail_here("overlaps: it begins at ", offset, " of the data, where another ends at ", end);
      if (offset > aligned(end))
        fail_here("begins at ", offset, " of the data, expected ", aligned(end), ": there is a hole");
      if (offset > data.size() || size > data.size() - offset)
        fail_here("has ", size, " bytes from ", offset, " of the data on, but the file has only ",
                  data.size());
      const bool last = i + 1 == infos_.size();
      if (!unread.empty())
        size = (std::min)(std::uint64_t(data.size()), last ? kEnd : infos_[i + 1].offset) - offset;
      if (!unread.empty() && size == 0 && std::count(view.shape.begin(), view.shape.end(), 0) == 0)
        fail_here("has the shape ", text_of(view.shape), ", but no bytes before the next tensor");
      end = offset + size;
      view.bytes = data.subspan(std::size_t(offset), std::size_t(size));
      std::string name = view.name;
      if (unread.empty())
        header_.tensors.emplace(std::move(name), std::move(view));
      else
        header_.unread.emplace(std::move(name), UnreadTensor{std::move(unread), view.bytes});
    }
    subject_ = "the file";
    if (data.size() > aligned(end))
      fail_here("has ", data.size(), " bytes of data, but the tensors end at ", end);
  }

  std::span<const std::byte> bytes_;
  std::string_view where_;
  std::size_t at_ = 0;
  std::string subject_ = "the header";
  std::uint64_t alignment_ = 32;
  Header header_;
  std::set<std::string, std::less<>> names_;
  std::vector<Info> infos_;
};

/// A whole GGUF file in memory. The views point into `bytes`. O(header * log(tensors)). Throws
/// CheckpointError; `where` names the file in its message.
inline Header parse_gguf(std::span<const std::byte> bytes, std::string_view where) {
  require_little_endian();
  Header header = GGUFReader(bytes, where).read();
  header.is_gguf = true;
  return header;
}

/// Throws CheckpointError where a GGUF file says that it is one of another number of files, or a number of
/// the set that was seen before.
inline void check_split(const Header& header, std::size_t files, std::set<std::string>& seen,
                        std::string_view where) {
  const auto split = header.metadata.find("split.count"), number = header.metadata.find("split.no");
  if (!header.is_gguf || split == header.metadata.end()) return;
  if (split->second == "0" && files == 1) return;  // as llama.cpp writes where it merged files
  if (split->second != std::to_string(files))
    fail_checkpoint(where, ": split.count is ", split->second, ", but there are ", files, " files");
  if (number != header.metadata.end() && !seen.insert(number->second).second)
    fail_checkpoint(where, ": split.no is ", number->second, ", as of a file before it, expected another");
}

}  // namespace moe::io
