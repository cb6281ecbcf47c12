// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/parameters.hpp>
#include <moe/core/types.hpp>
#include <moe/io/checksum.hpp>
#include <moe/io/file.hpp>
#include <moe/io/header.hpp>
#include <moe/io/layer_file.hpp>
#include <moe/io/read_options.hpp>
#include <moe/io/read_tensor.hpp>
#include <moe/io/safetensors.hpp>
#include <moe/packed/packed_moe_layer.hpp>
#include <moe/version.hpp>

// Packed layers in files: written as they lie in memory, and used where the system maps the file.
//
// A file is a safetensors file, so that tools which know those show what it has:
//   experts.7            U64, the bytes of an expert as kernels read them, from a multiple of 4096 bytes on
//   experts.7.padding    U64, zeros up to the next such multiple
//   router.w_router, ... F32, what the router's visit shows; router.table, I64, a HashRouter's table
//   w_shared_gate        F32 [shared experts, d_model], where there is one
//   b_output             F32 [d_model], where there is one
// and in its metadata, all of it text:
//   format               "moe_packed"
//   format_version       of what is said here and of how bytes lie: kPackedFileVersion
//   moe_version          of the library that wrote it
//   scalar               "float", of activations
//   instruction_set      portable, avx2, avx512 or amx: whose kernels read the bytes
//   panels               how these read them: columns and streams of a panel, lanes of a register
//   router               the router's options that are not at their defaults
//   num_shared_experts   the last ones of the experts
//   experts.7            the format of an expert, its widths, activation, and how activations are rounded;
//                        missing where the expert was left out
//   checksum.NAME        of the bytes of the tensor NAME
//   checksum             of all other metadata and of the tensors' names, types and shapes
// A reader checks, in this order: that the file is a safetensors file whose tensors cover it exactly, format,
// format_version, checksum, then that this processor and library read the same panels, and all parts against
// each other. It does not read the experts: that is what verify_packed is for.
namespace moe {

namespace io {

inline constexpr const char *kPackedFormat = "moe_packed", *kPackedFileVersion = "1";
inline constexpr std::size_t kPage = 4096;

// What a file says of an expert beside its format.
struct PackedExpertOptions {
  PackedShape shape{};
  ActivationRounding rounding{};
};
template <Is<PackedExpertOptions> Options, class F>
void visit_options(Options& options, const F& f) {
  auto& [shape, rounding] = options;
  auto& [d_model, d_ff, activation, has_bias] = shape;
  auto& [unit, gated, alpha, limit, offset] = activation;
  auto& [to_bfloat16, to_int8] = rounding;
  f("d_model", d_model);
  f("d_ff", d_ff);
  f("unit", unit);
  f("gated", gated);
  f("alpha", alpha);
  f("limit", limit);
  f("offset", offset);
  f("bias", has_bias);
  f("bf16_dot_product", to_bfloat16);
  f("int8_activations", to_int8);
}

inline std::string panels_text(const kernels::Kernels& kernels) {
  return "columns=" + option_text(kernels.columns) + " streams=" + option_text(kernels.streams) +
         " lanes=" + option_text(kernels.lanes);
}

inline std::string expert_name(Index e) { return Name("experts", e).str(); }

// The checksum of what a header says.
template <class Tensors>
std::string header_checksum(const std::map<std::string, std::string>& metadata, const Tensors& tensors) {
  std::set<std::string> lines;
  for (const auto& [key, value] : metadata)
    if (key != "checksum") lines.insert("metadata " + key + "=" + value + "\n");
  for (const TensorView& tensor : tensors) lines.insert(description_of(tensor) + "\n");
  std::string text;
  for (const std::string& line : lines) text += line;
  return checksum_of(std::as_bytes(std::span(text)));
}

// Calls f(name, array) for the arrays of a layer beside its experts.
template <class Parts, class F>
void for_each_array_beside_experts(Parts& parts, const F& f) {
  const auto visit = [&](const ParameterInfo& info, auto& array) { f(info.name.str(), array); };
  if constexpr (requires { parts.router.visit(visit, parts.router); })
    visit_part("router", visit, parts.router);
  if (parts.w_shared_gate.size() > 0) f(std::string("w_shared_gate"), parts.w_shared_gate);
  if (parts.b_output.size() > 0) f(std::string("b_output"), parts.b_output);
}

template <class R>
std::string router_text(const R& router) {
  return with_router_options<R>(describe_part(router), LeaveDefaultsOut());
}

// A packed file whose header was checked.
class PackedFile {
 public:
  explicit PackedFile(const std::filesystem::path& path)
      : where_(path.string()), file_(map_file(path)), header_(parse_safetensors(file_.bytes, where_)) {
    require_text("format", kPackedFormat);
    require_text("format_version", kPackedFileVersion);
    std::vector<TensorView> tensors;
    for (const auto& [name, tensor] : header_.tensors) tensors.push_back(tensor);
    require_text("checksum", header_checksum(header_.metadata, tensors));
    require_text("scalar", "float");
  }

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    fail_checkpoint(where_, ": ", parts...);
  }

  const std::shared_ptr<const void>& owner() const { return file_.owner; }
  const Header& header() const { return header_; }
  bool contains(const std::string& name) const { return header_.tensors.contains(name); }
  const TensorView& tensor(const std::string& name) const {
    const auto at = header_.tensors.find(name);
    if (at == header_.tensors.end()) fail("tensor ", in_quotes(name), " is missing");
    return at->second;
  }
  const std::string& text(const std::string& key) const {
    const auto at = header_.metadata.find(key);
    if (at == header_.metadata.end()) fail("the metadata has no ", in_quotes(key));
    return at->second;
  }
  void require_text(const std::string& key, const std::string& expected) const {
    const auto at = header_.metadata.find(key);
    const bool there = at != header_.metadata.end();
    if (!there || at->second != expected)
      fail("this is no file of a packed layer that can be used here: its metadata has ",
           there ? key + " = " + in_quotes(at->second) : "no " + key, ", expected ", in_quotes(expected));
  }
  // The value of an option, or of a list of them.
  template <class T>
  T read(const std::string& key) const {
    T value{};
    bool read = false;
    if constexpr (ListedOptions<T>)
      read = read_options(text(key), value);
    else
      read = read_option(text(key), value);
    if (!read)
      fail("the metadata has ", key, " = ", in_quotes(text(key)), ", which this version does not know");
    return value;
  }
  // Throws unless the bytes of a tensor are those that were written. O(bytes).
  void verify(const TensorView& tensor) const {
    const std::string found = checksum_of(tensor.bytes), &expected = text("checksum." + tensor.name);
    if (found != expected)
      fail("the bytes of ", in_quotes(tensor.name), " are damaged: their checksum is ", found, ", expected ",
           in_quotes(expected));
  }
  // The bytes of an expert.
  std::span<const std::byte> expert_bytes(const std::string& name) const {
    const std::span<const std::byte> bytes = tensor(name).bytes;
    const std::size_t begin = std::size_t(bytes.data() - file_.bytes.data());
    if (begin % kPage != 0)
      fail(in_quotes(name), " begins at byte ", begin, ", expected a multiple of ", kPage);
    return bytes;
  }

 private:
  std::string where_;
  FileBytes file_;
  Header header_;
};

// The router of a file, whose arrays are still to be read.
template <class R>
R router_in(const PackedFile& file) {
  auto options = file.read<typename R::Options>("router");
  if constexpr (requires { options.bias; }) options.bias = file.contains("router.b_router");
  if constexpr (requires { options.selection_bias; })
    options.selection_bias = file.contains("router.selection_bias");
  if constexpr (requires { options.table; }) {
    const TensorView& tensor = file.tensor(kTable);
    std::vector<std::int64_t> table(std::size_t(tensor.size()));
    read_tensor(tensor, table.data());
    options.table.resize(tensor.size());
    std::copy(table.begin(), table.end(), options.table.begin());
  }
  return R(options);
}

// What the header says of an expert, with the bytes of the file.
template <Format... F>
PackedExpert expert_in(const PackedFile& file, Index e, InstructionSet set) {
  const std::string name = expert_name(e);
  const auto options = file.read<PackedExpertOptions>(name);
  const auto texts = parse_options(file.text(name));
  const auto format = texts->find("format");
  std::optional<PackedExpert> expert;
  const auto add = [&]<Format Of>(Of of) {
    if (format == texts->end() || format->second != name_of_format<Of>()) return;
    expert.emplace(of, options.shape, set, options.rounding, file.expert_bytes(name), file.owner());
  };
  (add(F()), ...);
  if (expert) return *std::move(expert);
  std::string expected;
  ((expected.append(expected.empty() ? "" : " or ").append(name_of_format<F>())), ...);
  file.fail("expert ", e, " is in ", format == texts->end() ? "no format" : printable(format->second),
            ", expected ", expected);
}

template <Format... F>
PackedExperts experts_in(const PackedFile& file, Index d_model, Index count) {
  const auto set = file.read<InstructionSet>("instruction_set");
  if (!is_available(set))
    file.fail("it was packed for ", name_of(set), ", which this processor does not have, expected ",
              name_of(best_instruction_set()), " or less");
  file.require_text("panels", panels_text(*kernels::find(set)));
  PackedExperts experts(set, d_model);
  for (Index e = 0; e < count; ++e)
    if (file.header().metadata.contains(expert_name(e)))
      experts.add(expert_in<F...>(file, e, set));
    else
      experts.leave_out();
  return experts;
}

template <class R>
PackedParts<R> parts_in(const PackedFile& file, R router) {
  const std::string text = router_text(router);
  if (file.text("router") != text) {
    const auto [saved, expected] = without_common_options(file.text("router"), text);
    file.fail("it was saved with router = ", printable(saved), ", expected ", expected);
  }
  PackedParts<R> parts{.router = std::move(router),
                       .num_shared_experts = file.read<Index>("num_shared_experts")};
  const std::size_t tensors = file.header().tensors.size();
  if (parts.num_shared_experts < 0 || std::size_t(parts.num_shared_experts) > tensors)
    file.fail("it has num_shared_experts = ", parts.num_shared_experts, ", expected 0 to ", tensors,
              ", the number of tensors");
  if (file.contains("w_shared_gate")) {
    const TensorView& gate = file.tensor("w_shared_gate");
    if (gate.shape.size() == 2) parts.w_shared_gate.resize(gate.shape[0], gate.shape[1]);
  }
  if (file.contains("b_output")) parts.b_output.resize(file.tensor("b_output").size());
  for_each_array_beside_experts(parts, [&](const std::string& name, auto& array) {
    const TensorView& tensor = file.tensor(name);
    if (tensor.dtype != DType::F32 || tensor.shape != shape_of(array))
      file.fail(description_of(tensor), ", expected F32 ", text_of(shape_of(array)));
    file.verify(tensor);
    read_tensor(tensor, array.data());
  });
  return parts;
}

// Throws unless every tensor of the file is one of the layer's, and a hash table the router's.
template <class Layer>
void require_no_others(const PackedFile& file, const Layer& layer) {
  std::set<std::string> known;
  const PackedExperts& experts = layer.packed_experts();
  for (Index e = 0; e < experts.size(); ++e)
    if (experts.has(e)) known.insert({expert_name(e), expert_name(e) + ".padding"});
  for_each_array_beside_experts(layer.parts(),
                                [&](const std::string& name, const auto&) { known.insert(name); });
  const std::vector<std::int64_t> table = hash_table_of(layer);
  if (!table.empty()) {
    known.insert(kTable);
    file.verify(file.tensor(kTable));
    require_table(file.tensor(kTable), table, "the file");
  }
  for (const auto& [name, tensor] : file.header().tensors)
    if (!known.contains(name)) file.fail("tensor ", in_quotes(name), " is not one of a packed layer");
}

template <class Layer, class... F, class MakeRouter>
Layer map_packed(const std::filesystem::path& path, const MakeRouter& make_router) {
  const PackedFile file(path);
  try {
    auto parts = parts_in(file, make_router(file));
    const Index d_model = parts.router.d_model();
    const Index count = parts.router.num_experts() + parts.num_shared_experts;
    auto experts = experts_in<F...>(file, d_model, count);
    Layer layer(std::move(parts), std::move(experts));
    require_no_others(file, layer);
    return layer;
  } catch (const std::invalid_argument& error) {  // sizes or options that do not fit each other
    file.fail(error.what());
  }
}

template <class Layer>
using RouterOf = std::remove_cvref_t<decltype(std::declval<const Layer&>().router())>;

}  // namespace io

/// Writes a packed layer to a file as it lies in memory, to be mapped by map_packed, on processors that have
/// its instruction set; the head of moe/io/packed_file.hpp says what is in it. The file is replaced as a
/// whole or not at all: see write_safetensors. A router of your own takes part by visit and describe(), as in
/// save_layer. O(bytes). Throws CheckpointError where it cannot be written, and std::invalid_argument for a
/// format without a name (see NamedFormat).
/// @code
/// moe::Rng rng(1);
/// moe::MoELayer layer(moe::make_experts<moe::FeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng),
///                     moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng));
/// const auto packed = moe::pack<moe::F32>(layer);
/// moe::save_packed("example.moe", packed);
/// const auto mapped = moe::map_packed<decltype(packed), moe::F32>("example.moe");
/// const moe::Matrix<float> x = moe::Matrix<float>::Ones(3, 8);
/// assert(mapped.forward(x) == packed.forward(x));
/// @endcode
template <PackableExpert E, Router R>
void save_packed(const std::filesystem::path& path, const PackedMoELayer<E, R>& layer) {
  io::require_little_endian();
  std::map<std::string, std::string> metadata;
  std::vector<TensorToWrite> tensors;
  const auto add = [&](std::string name, DType dtype, std::vector<Index> shape,
                       std::span<const std::byte> bytes) {
    metadata["checksum." + name] = io::checksum_of(bytes);
    tensors.push_back({std::move(name), dtype, std::move(shape), bytes});
  };
  static constexpr std::array<std::byte, io::kPage> kZeros{};
  const PackedExperts& experts = layer.packed_experts();
  for (Index e = 0; e < experts.size(); ++e) {
    if (!experts.has(e)) continue;
    const std::string name = io::expert_name(e);
    const PackedFormat& format = experts[e].product().format();
    require(!format.name.empty(), "save_packed: the format of expert ", e, " has no name in files");
    metadata[name] = "format=" + std::string(format.name) + " " +
                     io::options_text(io::PackedExpertOptions{experts[e].shape(), format.rounding()});
    const std::span<const std::byte> bytes = experts[e].bytes();
    const std::size_t left = (io::kPage - bytes.size() % io::kPage) % io::kPage;
    add(name, DType::U64, {Index(bytes.size() / 8)}, bytes);
    if (left > 0) add(name + ".padding", DType::U64, {Index(left / 8)}, std::span(kZeros).first(left));
  }
  io::for_each_array_beside_experts(layer.parts(), [&](std::string name, const auto& array) {
    add(std::move(name), DType::F32, io::shape_of(array),
        std::as_bytes(std::span(array.data(), std::size_t(array.size()))));
  });
  const std::vector<std::int64_t> table = io::hash_table_of(layer);
  if (!table.empty()) add(io::kTable, DType::I64, {Index(table.size())}, std::as_bytes(std::span(table)));
  metadata["format"] = io::kPackedFormat;
  metadata["format_version"] = io::kPackedFileVersion;
  metadata[io::kVersion] = MOE_VERSION_STRING;
  metadata["scalar"] = "float";
  metadata["instruction_set"] = io::enumerator(layer.instruction_set());
  metadata["panels"] = io::panels_text(*kernels::find(layer.instruction_set()));
  metadata["router"] = io::router_text(layer.router());
  metadata["num_shared_experts"] = io::option_text(layer.num_shared_experts());
  metadata["checksum"] = io::header_checksum(metadata, tensors);
  const io::FileLayout layout = io::layout_of(tensors, metadata, path.string(), io::kPage);
  io::replace_file(path, io::parts_of(layout));
}

/// The packed layer of a file that save_packed wrote, with the outputs of that layer to the bit. Nothing of
/// the experts is read: pages come into memory when tokens need them, or by prefetch, are shared with other
/// processes that map the file, and make room for others where memory is short. Layer is a PackedMoELayer of
/// the experts and the router that were saved; F are the formats that experts may be in. The layer keeps the
/// file mapped: it may be deleted or replaced, but not be written to or cut while it lives. O(num_experts)
/// and what the router takes. Throws CheckpointError for a file that is damaged, cut, of another format or
/// version, for an instruction set that this processor does not have, and what else does not fit; the bytes
/// of experts are not looked at: see verify_packed. Example: see save_packed.
template <class Layer, Format... F>
Layer map_packed(const std::filesystem::path& path) {
  return io::map_packed<Layer, F...>(path, &io::router_in<io::RouterOf<Layer>>);
}

/// The same for a router whose options a file cannot give, as a HierarchicalRouter: `router` has the options
/// of the one that was saved, and gets its arrays. Throws CheckpointError, too, for other options.
template <class Layer, Format... F>
Layer map_packed(const std::filesystem::path& path, const io::RouterOf<Layer>& router) {
  return io::map_packed<Layer, F...>(path, [&](const io::PackedFile&) { return router; });
}

/// Reads all of a file that save_packed wrote. O(bytes). Throws CheckpointError where a byte is not the one
/// that was written. Whoever copies such files over a network calls it once after that.
inline void verify_packed(const std::filesystem::path& path) {
  const io::PackedFile file(path);
  for (const auto& [name, tensor] : file.header().tensors) file.verify(tensor);
}

}  // namespace moe
