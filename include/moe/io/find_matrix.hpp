// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <moe/core/types.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/grouped_matrix.hpp>
#include <moe/io/packed_integers.hpp>
#include <moe/io/read_tensor.hpp>
#include <moe/io/stored_matrix.hpp>

// Under which names, and in which shapes, checkpoints keep a matrix in several tensors.
namespace moe {

namespace io {

// Finds one matrix. Names are those of gpt-oss, DeepSeek, compressed-tensors, ModelOpt, AutoGPTQ and AutoAWQ.
class MatrixFinder {
 public:
  // `where` begins messages.
  MatrixFinder(const Checkpoint& checkpoint, const std::string& name, const char* where)
      : checkpoint_(checkpoint), name_(name), where_(where) {
    constexpr std::string_view kWeight = ".weight";
    if (name.ends_with(kWeight)) module_ = name.substr(0, name.size() + 1 - kWeight.size());
  }

  StoredMatrix find() {
    if (checkpoint_.contains(name_)) {
      found_.values = checkpoint_.at(name_);
      found_.shape = found_.values.shape;
      std::vector<std::string> scales{name_ + "_scale_inv", name_ + "_scale"};
      if (!module_.empty()) scales.push_back(module_ + "scale");
      const auto scale = std::find_if(scales.begin(), scales.end(),
                                      [this](const auto& name) { return checkpoint_.contains(name); });
      if (scale != scales.end())
        with_scales(*scale);
      else
        refuse_without_scales();
    } else if (checkpoint_.contains(name_ + "_packed")) {
      found_.values = checkpoint_.at(name_ + "_packed");
      const std::string scale = name_ + "_scale";
      require_scale(scale);
      if (found_.values.dtype == DType::U8)
        with_scales(scale);
      else
        read_pack_quantized(tensor(scale));
    } else if (!module_.empty() && checkpoint_.contains(module_ + "qweight")) {
      found_.values = checkpoint_.at(module_ + "qweight");
      require_scale(module_ + "scales");
      read_gptq(tensor(module_ + "scales"), tensor(module_ + "qzeros"));
    } else if (checkpoint_.contains(name_ + "_blocks")) {
      read_gpt_oss();
    } else {
      checkpoint_.at(name_);  // throws
    }
    return std::move(found_);
  }

 private:
  using Format = StoredMatrix::Format;
  using Shape = std::vector<Index>;

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    fail_checkpoint(where_, ": ", parts...);
  }

  // A tensor that belongs to the matrix.
  const TensorView& tensor(const std::string& name) {
    const TensorView& tensor = checkpoint_.at(name);
    found_.beside.push_back(name);
    return tensor;
  }

  // One of [2] or so whose values matter to nobody, or to others.
  void leave(const std::string& name) {
    if (checkpoint_.contains(name)) found_.beside.push_back(name);
  }

  void require_shape(const TensorView& view, const Shape& shape, const char* dtypes, bool is_right) const {
    if (!is_right || view.shape != shape)
      fail(description_of(view), ": expected ", dtypes, " ", text_of(shape), " for ",
           description_of(found_.values));
    check_bytes(view, where_);
  }
  static bool is_float(const TensorView& view) {
    return view.dtype == DType::F16 || view.dtype == DType::BF16 || view.dtype == DType::F32;
  }

  void require_matrix(DType dtype) const {
    require_little_endian();
    if (found_.values.dtype != dtype || found_.values.shape.size() != 2)
      fail(description_of(found_.values), ": expected ", name_of(dtype), " with 2 dimensions");
    check_bytes(found_.values, where_);
  }

  std::string method() const {
    const auto at = checkpoint_.quantisation().find("quant_method");
    return at == checkpoint_.quantisation().end() ? "" : at->second;
  }

  void require_scale(const std::string& scale) const {
    if (!checkpoint_.contains(scale)) fail_without({scale});
  }
  [[noreturn]] void fail_without(const std::vector<std::string>& scales) const {
    std::string names;
    for (const std::string& scale : scales) names += (names.empty() ? "" : " or ") + in_quotes(scale);
    constexpr std::array<std::string_view, 9> kKnown{
        "fp8", "fbgemm_fp8", "mxfp4",      "compressed-tensors", "gptq",
        "awq", "modelopt",   "auto-round", "intel/auto-round"};
    const std::string method = this->method();
    const bool known = method.empty() || std::find(kKnown.begin(), kKnown.end(), method) != kKnown.end();
    fail(found_.values.name, " is ", name_of(found_.values.dtype), ", which is not read without its scale ",
         names, known ? "" : ", and quant_method " + in_quotes(method) + " of config.json is not known",
         hint(scales.front(), checkpoint_.names()));
  }
  // Read as they are such numbers would be wrong by orders of magnitude and still look like weights.
  void refuse_without_scales() const {
    switch (found_.values.dtype) {
      case DType::F8_E4M3:
      case DType::F8_E5M2:
      case DType::F8_E8M0:
      case DType::I8:
      case DType::U8:
        fail_without({name_ + "_scale_inv", name_ + "_scale"});
      default:
        return;
    }
  }

  // ---- Numbers of 8 bits, and bytes of two of 4 bits ----------------------------------------------------

  void with_scales(const std::string& scale) {
    const TensorView& scales = tensor(scale);
    leave_activations();
    const DType values = found_.values.dtype;
    const bool is_power = scales.dtype == DType::F8_E8M0 || scales.dtype == DType::U8;
    if (values == DType::I8 && !is_power) {
      read_int8(scales);
    } else if (values == DType::U8 && scales.dtype == DType::F8_E4M3) {
      read_nvfp4(scales);
    } else if (values == DType::U8 || values == DType::I8) {
      read_mxfp4_bytes(scales);
    } else {
      found_.format = Format::block_scaled_fp8;
      found_.scales = scales;
    }
  }

  // Scales of what weights are multiplied by.
  void leave_activations() {
    if (module_.empty()) return;
    for (const char* const name : {"input_scale", "input_zero_point", "input_global_scale"})
      leave(module_ + name);
  }

  void read_gpt_oss() {
    found_.format = Format::mxfp4;
    found_.values = checkpoint_.at(name_ + "_blocks");
    found_.scales = tensor(name_ + "_scales");
    found_.shape = found_.values.shape;
    if (found_.shape.size() >= 2) {  // [..., blocks, 16] bytes of two values
      found_.shape.pop_back();
      found_.shape.back() *= 32;
    }
    const Shape& blocks = found_.values.shape;
    if (blocks.empty() || Shape(blocks.begin(), blocks.end() - 1) != found_.scales.shape)
      fail(found_.scales.name, " has shape ", text_of(found_.scales.shape), ", expected ", text_of(blocks),
           " without the last");
  }

  // MXFP4 as [rows, cols / 2] bytes.
  void read_mxfp4_bytes(const TensorView& scales) {
    require_matrix(found_.values.dtype);
    const Index rows = found_.values.shape[0], bytes = found_.values.shape[1];
    const bool is_power = scales.dtype == DType::F8_E8M0 || scales.dtype == DType::U8;
    if (bytes % 16 != 0)
      fail(description_of(found_.values), " has rows of ", bytes, " bytes, expected a multiple of 16");
    require_shape(scales, {rows, bytes / 16}, "F8_E8M0 or U8", is_power);
    found_.format = Format::mxfp4;
    found_.scales = scales;
    found_.shape = {rows, bytes * 2};
    found_.values.dtype = DType::U8;
    found_.values.shape = {rows, bytes / 16, 16};
  }

  // NVFP4: [rows, cols / 2] bytes, a scale for some numbers of a row times or, in compressed-tensors, over a
  // global one.
  void read_nvfp4(const TensorView& scales) {
    require_matrix(DType::U8);
    const bool divides = checkpoint_.contains(name_ + "_global_scale");
    const std::string name = name_ + (divides ? "_global_scale" : "_scale_2");
    require_scale(name);
    const TensorView& global = tensor(name);
    if (global.dtype != DType::F32 || global.size() != 1)
      fail(description_of(global), ": expected F32 [1] for ", description_of(found_.values));
    check_bytes(global, where_);
    const float factor = load<float>(global.bytes, 0);
    GroupedMatrix matrix = grouped({found_.values, 4, Packing::rows}, GroupedMatrix::Code::e2m1, scales);
    for (float& scale : matrix.scales) scale = divides ? scale / factor : scale * factor;
    keep(std::move(matrix));
  }

  // A byte each, in two's complement.
  void read_int8(const TensorView& scales) {
    require_matrix(DType::I8);
    GroupedMatrix matrix = grouped({found_.values, 8, Packing::rows}, GroupedMatrix::Code::with_sign, scales);
    if (checkpoint_.contains(name_ + "_zero_point")) {
      const TensorView& zeros = tensor(name_ + "_zero_point");
      require_shape(zeros, scales.shape, "I8", zeros.dtype == DType::I8);
      const Index rows = zeros.size() / matrix.groups;  // or one for all
      read_zeros({{zeros.name, DType::I8, {rows, matrix.groups}, zeros.bytes}, 8, Packing::rows}, rows,
                 matrix, 0);
      for (int& zero : matrix.zeros) zero = std::int8_t(zero);
    }
    keep(std::move(matrix));
  }

  // ---- Words of 32 bits ---------------------------------------------------------------------------------

  // compressed-tensors: integers of 4 or 8 bits along the rows, more by 8 or 128 than they stand for, as are
  // their zero points along the columns.
  void read_pack_quantized(const TensorView& scales) {
    require_matrix(DType::I32);
    leave_activations();
    const TensorView& shape = tensor(name_ + "_shape");
    const Index rows = found_.values.shape[0], words = found_.values.shape[1];
    if (shape.shape != Shape{2}) fail(description_of(shape), ": expected I64 or I32 [2]");
    std::array<std::int64_t, 2> size{};
    read_tensor(shape, size.data());
    const bool is_4 = size[1] > 0 && words == (size[1] - 1) / 8 + 1;
    if (size[0] != rows || size[1] <= 0 || (!is_4 && words != (size[1] - 1) / 4 + 1))
      fail(description_of(found_.values), ": ", shape.name, " is ", text_of(Shape{size[0], size[1]}),
           ", expected ", rows, " rows and as many columns as its words hold of 4 or 8 bits");
    const int bits = is_4 ? 4 : 8;
    GroupedMatrix matrix =
        grouped({found_.values, bits, Packing::rows}, GroupedMatrix::Code::plain, scales, size[1]);
    matrix.zeros = {1 << (bits - 1)};
    if (checkpoint_.contains(name_ + "_zero_point")) {
      const TensorView& zeros = tensor(name_ + "_zero_point");
      const Index in_word = 32 / bits;
      require_shape(zeros, {(rows + in_word - 1) / in_word, matrix.groups}, "I32", zeros.dtype == DType::I32);
      read_zeros({zeros, bits, Packing::cols}, rows, matrix, 0);
    }
    if (checkpoint_.contains(name_ + "_g_idx")) read_order(tensor(name_ + "_g_idx"), matrix);
    keep(std::move(matrix));
  }

  // AutoGPTQ's: words along the columns of [cols, rows], zero points along the rows of [groups, rows], less
  // by one but in version 2. AutoAWQ's: both along the rows, in an order of their own.
  void read_gptq(const TensorView& scales, const TensorView& zeros) {
    require_matrix(DType::I32);
    if (scales.shape.size() != 2 || !is_float(scales))
      fail(description_of(scales), ": expected BF16, F16 or F32 [groups, rows]");
    const Index rows = scales.shape[1], groups = scales.shape[0];
    if (zeros.dtype != DType::I32 || zeros.shape.size() != 2 || zeros.shape[0] != groups)
      fail(description_of(zeros), ": expected I32 with ", groups, " rows for ", description_of(scales));
    check_bytes(zeros, where_);
    const Index words = zeros.shape[1];
    const int bits = rows % 8 == 0 && words == rows / 8 ? 4 : rows % 4 == 0 && words == rows / 4 ? 8 : 0;
    if (bits == 0 || rows == 0)
      fail(description_of(zeros), " has ", words, " words, expected ", rows, " numbers of 4 or 8 bits");
    require_configured("bits", std::to_string(bits));
    const Index across = found_.values.shape[1];
    const bool is_awq = across != rows && bits == 4 && across == words;
    if (!is_awq && across != rows)
      fail(description_of(found_.values), " has ", across, " columns, expected ", rows, " or ", words);
    if (is_awq) require_configured("version", "gemm");
    GroupedMatrix matrix = grouped({found_.values, bits, is_awq ? Packing::awq : Packing::cols},
                                   GroupedMatrix::Code::plain, scales);
    const auto at = checkpoint_.quantisation().find("checkpoint_format");
    const bool is_v2 = at != checkpoint_.quantisation().end() && at->second == "gptq_v2";
    read_zeros({zeros, bits, is_awq ? Packing::awq : Packing::rows}, rows, matrix, is_awq || is_v2 ? 0 : 1);
    if (checkpoint_.contains(module_ + "g_idx")) read_order(tensor(module_ + "g_idx"), matrix);
    keep(std::move(matrix));
  }

  // Throws where config.json has another value.
  void require_configured(const std::string& name, const std::string& expected) const {
    const auto at = checkpoint_.quantisation().find(name);
    if (at != checkpoint_.quantisation().end() && at->second != expected)
      fail(found_.values.name, ": config.json has ", name, " ", in_quotes(at->second), ", expected ",
           expected);
  }

  // ---- What they have in common -------------------------------------------------------------------------

  // Codes with their scales [rows, groups], [rows], [1] or [], of transposed ones [groups, rows]. Of a row of
  // codes the first `cols` count, or all.
  GroupedMatrix grouped(PackedIntegers codes, GroupedMatrix::Code code, const TensorView& scales,
                        Index cols = 0) const {
    const bool transposed = scales.name == module_ + "scales";
    GroupedMatrix matrix{.codes = codes, .code = code, .transposed = transposed, .zeros = {0}};
    matrix.rows = transposed ? codes.cols() : codes.rows();
    if (cols == 0) cols = transposed ? codes.rows() : codes.cols();
    const Shape& shape = scales.shape;
    const bool is_one = scales.size() == 1;
    const Index along = transposed ? 0 : 1;
    matrix.groups = shape.size() == 2 ? shape[std::size_t(along)] : 1;
    const bool fits = is_one || (shape.size() == 2 && shape[std::size_t(1 - along)] == matrix.rows) ||
                      (shape == Shape{matrix.rows} && !transposed);
    if (!fits || !(is_float(scales) || scales.dtype == DType::F8_E4M3))
      fail(description_of(scales), ": expected BF16, F16 or F32 of ", matrix.rows, " rows for ",
           description_of(found_.values));
    if (matrix.groups == 0 || cols == 0 || cols % matrix.groups != 0)
      fail(description_of(scales), " has ", matrix.groups, " scales for a row of ", cols,
           " numbers, expected a divisor");
    matrix.scales = read_scales(scales, matrix);
    matrix.group_of.resize(std::size_t(cols));
    for (Index i = 0; i < cols; ++i) matrix.group_of[std::size_t(i)] = i / (cols / matrix.groups);
    return matrix;
  }

  static std::vector<float> read_scales(const TensorView& scales, const GroupedMatrix& matrix) {
    std::vector<float> stored(std::size_t(scales.size())), all(std::size_t(matrix.rows * matrix.groups));
    read_tensor(scales, stored.data());
    for (Index i = 0; i < matrix.rows; ++i)
      for (Index g = 0; g < matrix.groups; ++g) {
        const Index at = matrix.transposed ? g * matrix.rows + i : i * matrix.groups + g;
        all[std::size_t(i * matrix.groups + g)] =
            stored.size() == 1 ? stored.front() : stored[std::size_t(at)];
      }
    return all;
  }

  // Of [rows, groups] or, transposed, [groups, rows].
  static void read_zeros(const PackedIntegers& stored, Index rows, GroupedMatrix& matrix, int more) {
    matrix.zeros.resize(std::size_t(rows * matrix.groups));
    for (Index i = 0; i < rows; ++i)
      for (Index g = 0; g < matrix.groups; ++g)
        matrix.zeros[std::size_t(i * matrix.groups + g)] =
            (matrix.transposed ? stored(g, i) : stored(i, g)) + more;
  }

  // The groups of columns in an order of activations; where all are -1, as they were.
  void read_order(const TensorView& order, GroupedMatrix& matrix) const {
    require_shape(order, {matrix.cols()}, "I32", order.dtype == DType::I32);
    std::vector<std::int64_t> groups(matrix.group_of.size());
    read_tensor(order, groups.data());
    if (std::all_of(groups.begin(), groups.end(), [](std::int64_t g) { return g == -1; })) return;
    for (std::size_t i = 0; i < groups.size(); ++i) {
      if (groups[i] < 0 || groups[i] >= matrix.groups)
        fail(description_of(order), " has group ", groups[i], ", expected 0 to ", matrix.groups - 1);
      matrix.group_of[i] = groups[i];
    }
  }

  void keep(GroupedMatrix matrix) {
    found_.format = Format::grouped;
    found_.shape = {matrix.rows, matrix.cols()};
    found_.group = std::make_shared<const GroupedMatrix>(std::move(matrix));
  }

  const Checkpoint& checkpoint_;
  const std::string& name_;
  std::string module_{};  // "a.b." of "a.b.weight"
  const char* where_;
  StoredMatrix found_{};
};

}  // namespace io

/// The matrix of this name, in whichever format the checkpoint has it; of "a.weight":
///
///   a.weight, a.weight_scale_inv or a.weight_scale or a.scale    FP8; int8; MXFP4 in bytes
///   a.weight, a.weight_scale, a.weight_scale_2                   NVFP4 of ModelOpt
///   a.weight_packed, a.weight_scale, ...                         compressed-tensors: integers, MXFP4, NVFP4
///   a.qweight, a.qzeros, a.scales, a.g_idx                       GPTQ, as AutoRound has it too; AWQ
///   a.weight_blocks, a.weight_scales                             MXFP4 of gpt-oss
///
/// Throws CheckpointError where it is missing, of a type that means something together with scales only but
/// without them, or where its scales or zero points do not fit; `where` begins the message. O(log(tensors) +
/// scales).
inline StoredMatrix find_matrix(const Checkpoint& checkpoint, const std::string& name, const char* where) {
  return io::MatrixFinder(checkpoint, name, where).find();
}

}  // namespace moe
