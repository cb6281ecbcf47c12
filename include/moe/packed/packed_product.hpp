// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/kernels/kernels.hpp>
#include <moe/kernels/select.hpp>
#include <moe/packed/format.hpp>

// Rows of activations times packed panels: rows are brought to where a product reads them, the depth is cut
// into blocks, and what is read next is fetched meanwhile.
namespace moe {

/// Rows of activations: row i begins at data + stride * (index ? index[i] : i).
struct ActivationRows {
  const float* data;             ///< of all rows
  Index stride;                  ///< numbers from a row to the next
  const Index* index = nullptr;  ///< which rows, or null for the first ones
  /// Not 0 where the rows lie as a product of floats reads them, in blocks of their columns: numbers from a
  /// block to the next. They are not brought anywhere then.
  Index block = 0;

  /// Where row i begins.
  const float* row(Index i) const { return data + stride * (index ? index[i] : i); }
  /// The same rows from row i on.
  ActivationRows from(Index i) const {
    return index ? ActivationRows{data, stride, index + i, block}
                 : ActivationRows{row(i), stride, nullptr, block};
  }
};

/// Panels of weights that lie one behind the other.
struct PackedPanels {
  const std::byte* data;  ///< the first one
  /// How many, and the numbers of a column.
  Index count, depth;
  const std::byte* next;  ///< the panel that the same worker will read after these, probably
  bool cached = false;    ///< whether they are in the caches, probably, so that fetching ahead is of no use
};

/// Buffers of a product, a part for each worker. Reused, they allocate nothing.
struct PackedProductWorkspace {
  Buffer<float> products;       ///< what a worker multiplies now
  Buffer<float> rows;           ///< the rows for that, side by side
  Buffer<std::uint16_t> parts;  ///< the same, where they are in bfloat16
  Index workers = 1;            ///< for how many there are parts
  Index kept_depth = 0;         ///< of rows of which all blocks may be kept

  /// A worker's part.
  template <class T>
  T* part(Buffer<T>& buffer, Index worker) const {
    return buffer.data() + worker * (buffer.size() / workers);
  }
  template <class F>
  void for_each_array(const F& f) const {
    f(products);
    f(rows);
  }
};

/// The product of rows and panels of a format, by the kernels of an instruction set.
template <Format F>
class PackedProduct {
 public:
  static constexpr Index kMostPanels = 8;  ///< that are multiplied at a time
  /// Bytes of weights that may stay in the caches from one call to the next.
  static constexpr std::size_t kCachedBytes = std::size_t(1) << 24;

  /// By the kernels of a set; `rounded`: with activations rounded to bfloat16. Throws std::invalid_argument
  /// where this processor or the format has no such product.
  PackedProduct(InstructionSet set, bool rounded)
      : kernels_(kernels::find(set)), floats_(F::find_product(set)) {
    if constexpr (DotFormat<F>) dot_ = F::find_dot(set, rounded);
    require(kernels_ && floats_ && (dot_ || !rounded), "PackedProduct: there is no product for ",
            name_of(set), rounded ? " with activations in bfloat16" : "");
  }

  /// The kernels of the set.
  const kernels::Kernels& kernels() const { return *kernels_; }
  /// Whether rows are brought into bfloat16.
  bool splits_rows() const { return dot_ != nullptr; }
  /// Rows that are multiplied at a time.
  Index most_rows() const { return dot_ ? dot_->rows : floats_->rows; }
  /// Panels of a task, for that many tasks or fewer: even where there are enough, for one row takes two at
  /// once, and with work for about a microsecond, if there is so much. `work` is the multiply-adds of a
  /// column.
  Index panels_of_task(Index panels, Index tasks, Index work) const {
    constexpr Index kLeast = Index(1) << 15;  // multiply-adds
    const Index least = kLeast / std::max<Index>(1, work * kernels_->columns);
    const Index share = (std::max)(panels / tasks, least);
    const bool even = share > 1 || kernels_->streams > 1;
    return std::clamp<Index>(even ? share + share % 2 : share, 1, kMostPanels);
  }
  /// How rows of `depth` numbers, filled up to `columns`, best lie: in blocks, from which a product of floats
  /// reads them; whole, where they are brought into bfloat16.
  kernels::RowBlocks row_blocks(Index depth, Index columns) const {
    if (dot_) return {columns, columns, columns};
    return {columns, kernels::block_depth(depth, kernels::kDepth), kernels::kRowStride<float>};
  }

  /// Makes room for products of so many rows. Of few rows all blocks are kept, up to `kept_depth` numbers; of
  /// others one of a product of at most `depth`.
  void resize(PackedProductWorkspace& w, Index rows, Index kept_depth, Index depth, Index workers) const {
    w.workers = workers;
    w.kept_depth = kept_depth;
    w.products.resize(workers * kMostPanels * rows * kernels_->columns);
    with_product(w, [&](const auto& product, auto& buffer) {
      const Index blocks = (kept_depth + product.depth - 1) / product.depth;
      buffer.resize(workers * (std::max)(rows, kFewRows * blocks) * row_stride(product, depth));
    });
  }

  /// Calls use(i, c) with the product c [rows, columns] of the rows and panel i, for every panel. The
  /// workspace has room for it. O(rows * depth * columns * panels.count).
  template <class Use>
  void multiply(Index rows, const ActivationRows& x, const PackedPanels& panels, Index worker,
                PackedProductWorkspace& w, const Use& use) const {
    const Index columns = kernels_->columns, depth = panels.depth, panel_bytes = F::bytes(depth) * columns;
    const Index wide = columns / kernels_->streams, stream_bytes = F::bytes(depth) * wide;
    const bool kept = x.block == 0 && kernels_->streams > 1 && rows <= kFewRows && depth <= w.kept_depth;
    const Index at_once = panels_at_once(rows, kept || x.block > 0);
    float* const c = w.part(w.products, worker);
    with_product(w, [&]<class X>(const kernels::Product<X>& product, Buffer<X>& buffer) {
      X* const own = w.part(buffer, worker);
      const Index block = kernels::block_depth(depth, product.depth);
      const bool cached = panels.cached && rows == 1 && std::is_same_v<X, float>;
      for (Index i = 0; i < panels.count; i += at_once) {
        const Index count = (std::min)(at_once, panels.count - i);
        const std::byte* const first = panels.data + i * panel_bytes;
        const std::byte* const next = i + count < panels.count ? first + count * panel_bytes : panels.next;
        for (Index p = 0; p < depth; p += block) {
          const Index deep = (std::min)(block, depth - p), after = p + deep;
          X* const to = own + (kept ? p / block * rows * row_stride(product, block) : 0);
          product.multiply(rows, deep, bring(product, kept && i > 0 ? 0 : rows, x, p, deep, p / block, to),
                           first + F::bytes(p) * wide, stream_bytes, count, c, p > 0,
                           cached          ? nullptr
                           : after < depth ? first + F::bytes(after) * wide
                                           : next);
        }
        for (Index j = 0; j < count; ++j) use(i + j, c + j * rows * columns);
      }
    });
  }

 private:
  static constexpr Index kFewRows = 3;  // for which, with streams, all of the depth is brought at once

  // Calls f with the product that multiplies and the buffer for its rows.
  template <class Call>
  void with_product(PackedProductWorkspace& w, const Call& f) const {
    if constexpr (DotFormat<F>)
      if (dot_) return f(*dot_, w.parts);
    f(*floats_, w.rows);
  }

  // Panels that are taken together: all, where their rows must be brought; else as many as a product takes.
  Index panels_at_once(Index rows, bool there) const { return !there ? kMostPanels : rows == 1 ? 2 : 1; }

  // From one row of a product to the next.
  template <class X>
  static Index row_stride(const kernels::Product<X>& product, Index depth) {
    if (product.parts == 1) return kernels::kRowStride<X>;
    constexpr Index kLine = 64 / sizeof(X);
    const Index lines = product.parts * part_width((std::min)(depth, product.depth)) / kLine;
    return kLine * (lines + 1 - lines % 2);
  }
  static Index part_width(Index depth) { return (depth + 31) / 32 * 32; }

  // Columns [p, p + deep) of rows, which are block `nth`: side by side at `to`, or where they are.
  template <class X>
  static kernels::Parts<X> bring(const kernels::Product<X>& product, Index rows, const ActivationRows& x,
                                 Index p, Index deep, Index nth, X* to) {
    if constexpr (std::is_same_v<X, float>)
      if (x.block > 0) return {x.data + nth * x.block, kernels::kRowStride<X>, deep};
    const kernels::Parts<X> parts{to, row_stride(product, deep), part_width(deep)};
    for (Index i = 0; i < rows; ++i) product.split(deep, x.row(i) + p, to + i * parts.stride, parts.width);
    return parts;
  }

  const kernels::Kernels* kernels_;
  const kernels::Product<float>* floats_;
  const kernels::DotProduct* dot_ = nullptr;  // multiplies, where it is there, in place of floats_
};

}  // namespace moe
