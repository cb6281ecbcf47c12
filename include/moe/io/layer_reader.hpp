// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <moe/core/storage.hpp>
#include <moe/core/types.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/io/find_matrix.hpp>
#include <moe/io/gguf_names.hpp>
#include <moe/io/layer_names.hpp>
#include <moe/io/stored_matrix.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/models/model.hpp>
#include <moe/packed/block_matrix.hpp>

// The parameters of a model's layer out of the tensors of its checkpoint.
namespace moe {

/// A tensor of a checkpoint as load_mapped_layer took it.
struct LoadedTensor {
  std::string name{};    ///< of the tensor
  Index values = 0;      ///< how many numbers
  std::string copied{};  ///< why they were copied, e.g. "transposed"; empty where they are mapped
};

/// A layer that load_mapped_layer made, and where its parameters are.
template <class Layer>
struct LoadedLayer {
  Layer layer;                          ///< for inference
  std::vector<LoadedTensor> tensors{};  ///< all of the layer, by name
};

namespace io {

// The rows that a part leaves; nothing is left by `all`.
constexpr std::optional<TensorPart> rest_of(TensorPart part) {
  switch (part) {
    case TensorPart::all:
      break;
    case TensorPart::first_half:
      return TensorPart::second_half;
    case TensorPart::second_half:
      return TensorPart::first_half;
    case TensorPart::even_rows:
      return TensorPart::odd_rows;
    case TensorPart::odd_rows:
      return TensorPart::even_rows;
  }
  return {};
}

// Reads the parameters of one layer, each value once, and counts what it read of every tensor.
template <class S>
class LayerReader {
 public:
  // `where` begins messages.
  LayerReader(const Checkpoint& checkpoint, LayerNames names, const char* where)
      : checkpoint_(checkpoint), names_(std::move(names)), where_(where) {}

  // Reads a parameter of an expert, or of the layer where num_experts is 0. One without values needs no
  // source. A `shape` is that of the tensor, where it is another than the parameter's.
  template <class M>
  void read(const TensorSource& source, Index expert, Index num_experts, M& out,
            const std::optional<std::vector<Index>>& shape = {}) {
    if (out.size() == 0 && source.empty()) return;
    const Part part =
        find(source, expert, num_experts, out.rows(), out.cols(), M::ColsAtCompileTime == 1, shape);
    copy(part, out);
    note(part, out.size(), "not an expert's matrix");
  }

  // A matrix [rows, cols] of an expert, where it lies if the tensor lets it, else as a copy.
  MappedMatrix<S> map(const TensorSource& source, Index expert, Index num_experts, Index rows, Index cols) {
    const Part part = find(source, expert, num_experts, rows, cols, false, {});
    const std::string obstacle = why_copied(part);
    note(part, rows * cols, obstacle);
    if (obstacle.empty()) {
      const auto* const values =
          reinterpret_cast<const S*>(part.matrix.values.bytes.data()) + row_of(part.rows, rows, 0) * cols;
      return {{checkpoint_.owner(), values}, rows, cols};
    }
    Matrix<S> copied(rows, cols);
    copy(part, copied);
    return MappedMatrix<S>(std::move(copied));
  }

  // A matrix [rows, cols] of an expert in the blocks of a format: those of the tensor, if it is stored so;
  // else its numbers rounded.
  template <InBlocks F>
  BlockMatrix<F> quantised(const TensorSource& source, Index expert, Index num_experts, Index rows,
                           Index cols) {
    const Part part = find(source, expert, num_experts, rows, cols, false, {});
    BlockMatrix<F> out(rows, cols);
    const bool kept =
        !part.transposed && part.matrix.template in_blocks_of<F>(where_, [&](const auto& stored) {
          for (Index i = 0; i < rows; ++i)
            for (Index nth = 0; nth < F::blocks(cols); ++nth)
              out.row(i)[nth] = stored.block(row_of(part.rows, rows, i), nth);
        });
    if (!kept) {
      Matrix<float> numbers(rows, cols);
      copy(part, numbers);
      out = BlockMatrix<F>::of(numbers);
    }
    note(part, rows * cols, "packed");
    return out;
  }

  // A matrix [rows, cols] of an expert as its storage wants it.
  template <class Weight>
  Weight weight(const TensorSource& source, Index expert, Index num_experts, Index rows, Index cols) {
    if constexpr (std::same_as<Weight, MappedMatrix<S>>) {
      return map(source, expert, num_experts, rows, cols);
    } else if constexpr (requires { typename Weight::Format; }) {
      return quantised<typename Weight::Format>(source, expert, num_experts, rows, cols);
    } else {
      Weight matrix(rows, cols);
      read(source, expert, num_experts, matrix);
      return matrix;
    }
  }

  // Throws unless every value of every tensor whose name begins with `prefix` was read.
  void check_all_read(std::string_view prefix) const {
    const std::string begin = names_(prefix, 0);
    for (const std::string& name : checkpoint_.names()) {
      if (!name.starts_with(begin) || beside_.contains(name)) continue;
      const auto used = used_.find(name);
      const Index read = used == used_.end() ? 0 : used->second.tensor.values;
      const Index size = used == used_.end() ? checkpoint_.at(name).size() : used->second.size;
      if (read != size)
        throw CheckpointError(std::string(where_) + ": " + std::to_string(read) + " of the " +
                              std::to_string(size) + " values of " + name + " belong to layer " +
                              std::to_string(names_.layer()) + " of this model, expected all");
    }
  }

  // What was read, by name.
  std::vector<LoadedTensor> tensors() const {
    std::vector<LoadedTensor> list;
    for (const auto& [name, used] : used_) list.push_back(used.tensor);
    return list;
  }

 private:
  // Where a parameter is: in some rows of a matrix, or of its transpose.
  struct Part {
    StoredMatrix matrix;  // of one expert [outer, inner]
    TensorPart rows;
    bool transposed;
    Index expert;  // whose slice of a tensor of all experts it is, else 0
    Index whole;   // values of the tensor
  };
  struct Used {
    LoadedTensor tensor{};
    Index size = 0;  // values that it has
  };

  Part find(const TensorSource& source, Index expert, Index num_experts, Index rows, Index cols, bool vector,
            const std::optional<std::vector<Index>>& shape) {
    using Format = StoredMatrix::Format;
    const StoredMatrix all = find_matrix(checkpoint_, names_(source.name, expert), where_);
    const bool transposed = source.transposed && all.format != Format::mxfp4 &&
                            all.format != Format::grouped;  // of [out, in], whose rows have the blocks
    const Index all_rows = rows * (source.part == TensorPart::all ? 1 : 2);
    const Index outer = transposed ? cols : all_rows, inner = transposed ? all_rows : cols;
    const bool stacked = num_experts > 0 && source.name.find("{expert}") == std::string_view::npos;
    check_shape(all, outer, inner, vector, stacked ? num_experts : 0, shape);
    beside_.insert(all.beside.begin(), all.beside.end());
    const Index index = stacked ? expert : 0;
    return {all.slice(index, stacked ? num_experts : 1, outer, inner, where_), source.part, transposed, index,
            all.size()};
  }

  void check_shape(const StoredMatrix& matrix, Index outer, Index inner, bool vector, Index stacked,
                   const std::optional<std::vector<Index>>& given) const {
    std::vector<std::vector<Index>> expected;
    if (given)
      expected = {*given};
    else if (stacked == 0 && vector)
      expected = {{outer}, {1, outer}};
    else if (stacked == 0 && outer == 1)
      expected = {{1, inner}, {inner}};
    else if (stacked == 0)
      expected = {{outer, inner}};
    else if (vector)
      expected = {{stacked, outer}};
    else
      expected = {{stacked, outer, inner}, {stacked * outer, inner}};
    if (std::find(expected.begin(), expected.end(), matrix.shape) != expected.end()) return;
    const bool packed = matrix.shape != matrix.values.shape;
    const bool mxfp4 = matrix.format == StoredMatrix::Format::mxfp4;
    throw CheckpointError(
        std::string(where_) + ": " + matrix.values.name + " has shape " + text_of(matrix.values.shape) +
        (packed ? (mxfp4 ? ", of 4-bit values " : ", of values ") + text_of(matrix.shape) : "") +
        ", expected " + text_of(expected.front()));
  }

  // Where row i of a parameter of so many rows is in a tensor of which it is a part.
  static Index row_of(TensorPart part, Index rows, Index i) {
    switch (part) {
      case TensorPart::all:
      case TensorPart::first_half:
        return i;
      case TensorPart::second_half:
        return rows + i;
      case TensorPart::even_rows:
        return 2 * i;
      case TensorPart::odd_rows:
        return 2 * i + 1;
    }
    return i;
  }

  template <class M>
  void copy(const Part& part, M& out) {
    const Index inner = part.matrix.shape[1];
    values_.resize(std::size_t(part.matrix.size()));
    part.matrix.read(values_.data());
    for (Index i = 0; i < out.rows(); ++i) {
      const Index row = row_of(part.rows, out.rows(), i);
      for (Index j = 0; j < out.cols(); ++j)
        out(i, j) = values_[std::size_t(part.transposed ? j * inner + row : row * inner + j)];
    }
  }

  // Why a matrix can not be read where it lies; empty where it can.
  static std::string why_copied(const Part& part) {
    const std::string obstacle = part.matrix.template why_not_in_place<S>();
    if (!obstacle.empty() && obstacle != "misaligned") return obstacle;
    if (part.transposed) return "transposed";
    if (part.rows == TensorPart::even_rows || part.rows == TensorPart::odd_rows)
      return "its rows alternate with those of another";
    return obstacle;
  }

  // Throws where some of these rows were read before.
  void note(const Part& part, Index values, const std::string& copied) {
    const std::string& name = part.matrix.values.name;
    std::set<TensorPart>& parts = parts_[{name, part.expert}];
    for (const TensorPart before : parts)
      if (rest_of(before) != part.rows)
        throw CheckpointError(std::string(where_) + ": two parameters of this model take the same rows of " +
                              name + ", expected one");
    parts.insert(part.rows);
    Used& used = used_[name];
    used = {{name, used.tensor.values + values, copied}, part.whole};
  }

  const Checkpoint& checkpoint_;
  LayerNames names_;
  const char* where_;
  std::map<std::string, Used, std::less<>> used_;
  std::map<std::pair<std::string, Index>, std::set<TensorPart>> parts_;  // read, by tensor and expert
  std::set<std::string, std::less<>> beside_;                            // read with their tensors
  std::vector<S> values_;
};

// Expert `e` of a layer, of width d_ff. A tensor whose name does not say which expert's it is holds
// `stacked`, or one where that is 0.
template <class Storage, class S, class M>
auto read_expert(LayerReader<S>& reader, const M& model, const ExpertTensors& from, Index e, Index d_ff,
                 Index stacked) {
  using Expert = typename M::template Expert<S, Storage>;
  const auto options = expert_options<Expert>(model, d_ff);
  const Index d_model = model.d_model();
  Expert expert = [&] {
    const auto matrix = [&](const TensorSource& source, Index rows, Index cols) {
      return reader.template weight<typename Expert::Weight>(source, e, stacked, rows, cols);
    };
    constexpr Index kGateWidths = ExpertOf<decltype(model.unit)>::kUpWidths - 1;
    if constexpr (kGateWidths > 0) {
      auto gate = matrix(from.w_gate, kGateWidths * d_ff, d_model);
      auto up = matrix(from.w_up, d_ff, d_model);
      return Expert(options, std::move(gate), std::move(up), matrix(from.w_down, d_model, d_ff));
    } else {
      auto up = matrix(from.w_up, d_ff, d_model);
      return Expert(options, std::move(up), matrix(from.w_down, d_model, d_ff));
    }
  }();
  if constexpr (requires { expert.b_gate; }) reader.read(from.b_gate, e, stacked, expert.b_gate);
  if constexpr (requires { expert.b_up; }) {
    reader.read(from.b_up, e, stacked, expert.b_up);
    reader.read(from.b_down, e, stacked, expert.b_down);
  }
  return expert;
}

// The first `count` experts.
template <class Storage, class S, class M>
auto read_experts(LayerReader<S>& reader, const M& model, const ExpertTensors& from, Index count, Index d_ff,
                  Index stacked) {
  std::vector<typename M::template Expert<S, Storage>> experts;
  experts.reserve(std::size_t(count));
  for (Index e = 0; e < count; ++e)
    experts.push_back(read_expert<Storage>(reader, model, from, e, d_ff, stacked));
  return experts;
}

// The router of a layer.
template <class S, class Unit, template <class> class R>
R<S> read_router(LayerReader<S>& reader, const Model<Unit, R>& model, const LayerTensors& tensors) {
  R<S> router(model.router);
  reader.read(tensors.w_router, 0, 0, router.w_router);
  if constexpr (requires { router.b_router; }) reader.read(tensors.b_router, 0, 0, router.b_router);
  if constexpr (requires { router.selection_bias; })
    reader.read(tensors.selection_bias, 0, 0, router.selection_bias);
  return router;
}

// Throws unless everything that the layer has was read.
template <class S>
void check_all_read(const LayerReader<S>& reader, const LayerTensors& tensors) {
  reader.check_all_read(tensors.prefix);
  for (const std::string_view prefix : tensors.more_prefixes)
    if (!prefix.empty()) reader.check_all_read(prefix);
}

// A layer and what it was read from; see load_layer and load_mapped_layer.
template <class S, class Storage, class Unit, template <class> class R>
LoadedLayer<typename Model<Unit, R>::template Layer<S, Storage>> read_layer(const Model<Unit, R>& model,
                                                                            const Checkpoint& checkpoint,
                                                                            Index layer) {
  using Expert = typename Model<Unit, R>::template Expert<S, Storage>;
  const LayerTensors tensors = tensors_in(checkpoint, model, layer, "load_layer");
  LayerReader<S> reader(checkpoint, find_names(model, tensors.w_router, checkpoint, layer, "load_layer"),
                        "load_layer");
  R<S> router = read_router(reader, model, tensors);
  auto routed = read_experts<Storage>(reader, model, tensors.experts, model.num_experts(), model.d_ff,
                                      model.num_experts());
  auto shared =
      read_experts<Storage>(reader, model, tensors.shared_expert, model.shared_experts, model.shared_d_ff, 0);
  MoELayer<Expert, R<S>> loaded(std::move(routed), std::move(router),
                                SharedExperts<Expert>{std::move(shared), model.gated_shared_experts},
                                model.output_bias);
  reader.read(tensors.w_shared_gate, 0, 0, loaded.w_shared_gate);
  reader.read(tensors.b_output, 0, 0, loaded.b_output);
  check_all_read(reader, tensors);
  return {std::move(loaded), reader.tensors()};
}

}  // namespace io

}  // namespace moe
