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
#include <moe/packed/packed_format.hpp>

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
  Buffer<float> products;                  ///< what a worker multiplies now
  Buffer<float> rows;                      ///< the rows for that, side by side
  Buffer<std::uint16_t> parts;             ///< the same, where they are in bfloat16
  Buffer<kernels::Int8Activations> bytes;  ///< the same, where they are in 8 bits
  Index workers = 1;                       ///< for how many there are parts
  Index kept_depth = 0;                    ///< of rows of which all blocks may be kept

  /// Leaves room for nothing; then each product that will be called makes room for itself. Of few rows all
  /// blocks are kept, up to `most_kept` numbers.
  void begin(Index num_workers, Index most_kept) {
    workers = num_workers;
    kept_depth = most_kept;
    products.clear();
    rows.clear();
    parts.clear();
    bytes.clear();
  }
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
class PackedProduct {
 public:
  static constexpr Index kMostPanels = 8;  ///< that are multiplied at a time

  /// By the kernels of a set. Throws std::invalid_argument where this processor or the format has no such
  /// product.
  template <Format F>
  PackedProduct(F, InstructionSet set, ActivationRounding rounding)
      : kernels_(kernels::find(set)), format_(packed_format<F>(set, rounding)) {
    require(kernels_ && format_.floats && (format_.dot || !rounding.to_bfloat16) &&
                (format_.int8 || !rounding.to_int8),
            "PackedProduct: there is no product for ", name_of(set),
            rounding.to_bfloat16 ? " with activations in bfloat16" : "",
            rounding.to_int8 ? " with activations in 8 bits" : "");
  }

  /// The kernels of the set.
  const kernels::Kernels& kernels() const { return *kernels_; }
  /// The format of the panels.
  const PackedFormat& format() const { return format_; }
  /// Whether rows are brought into bfloat16 or 8 bits.
  bool splits_rows() const { return format_.int8 || format_.dot; }
  /// Rows that are multiplied at a time.
  Index most_rows() const {
    return format_.int8 ? format_.int8->rows : format_.dot ? format_.dot->rows : format_.floats->rows;
  }
  /// How rows of `depth` numbers, filled up to `columns`, best lie: in blocks, from which a product of floats
  /// reads them; whole, where they are brought into other numbers.
  kernels::RowBlocks row_blocks(Index depth, Index columns) const {
    if (splits_rows()) return {columns, columns, columns};
    return {columns, kernels::block_depth(depth, kernels::kDepth), kernels::kRowStride<float>};
  }

  /// Makes room for products of so many rows and of at most `depth` numbers, beside what others have room
  /// for.
  void make_room(PackedProductWorkspace& w, Index rows, Index depth) const {
    grow(w.products, w.workers * kMostPanels * rows * kernels_->columns);
    with_product([&]<class X>(const kernels::Product<X>& product) {
      auto& buffer = rows_of<X>(w);
      const Index kept_blocks = (w.kept_depth + product.depth - 1) / product.depth;
      grow(buffer, w.workers * (std::max)(rows, kFewRows * kept_blocks) * row_stride(product, depth));
    });
  }

  /// Calls use(i, c) with the product c [rows, columns] of the rows and panel i, for every panel. The
  /// workspace has room for it. O(rows * depth * columns * panels.count).
  template <class Use>
  void multiply(Index rows, const ActivationRows& x, const PackedPanels& panels, Index worker,
                PackedProductWorkspace& w, const Use& use) const {
    const Index columns = kernels_->columns, wide = columns / kernels_->streams, depth = panels.depth;
    const Index column_bytes = format_.bytes(depth);
    const bool kept = x.block == 0 && kernels_->streams > 1 && rows <= kFewRows && depth <= w.kept_depth;
    const Index at_once = panels_at_once(rows, kept || x.block > 0);
    float* const c = w.part(w.products, worker);
    with_product([&]<class X>(const kernels::Product<X>& product) {
      X* const own = w.part(rows_of<X>(w), worker);
      const Index block = kernels::block_depth(depth, product.depth);
      const Index block_bytes = format_.bytes(block) * wide;
      const bool cached = panels.cached && rows == 1 && std::is_same_v<X, float>;
      for (Index i = 0; i < panels.count; i += at_once) {
        const Index count = (std::min)(at_once, panels.count - i);
        const std::byte* const first = panels.data + i * column_bytes * columns;
        const std::byte* const next =
            i + count < panels.count ? first + count * column_bytes * columns : panels.next;
        for (Index nth = 0; nth * block < depth; ++nth) {
          const Index p = nth * block, deep = (std::min)(block, depth - p);
          const std::byte* const from = first + nth * block_bytes;
          X* const to = own + (kept ? nth * rows * row_stride(product, block) : 0);
          product.multiply(rows, deep, bring(product, kept && i > 0 ? 0 : rows, x, p, deep, nth, to), from,
                           column_bytes * wide, count, c, p > 0,
                           cached             ? nullptr
                           : p + deep < depth ? from + block_bytes
                                              : next);
        }
        for (Index j = 0; j < count; ++j) use(i + j, c + j * rows * columns);
      }
    });
  }

  friend bool operator==(const PackedProduct&, const PackedProduct&) = default;

 private:
  static constexpr Index kFewRows = 3;  // for which, with streams, all of the depth is brought at once

  // Calls f with the product that multiplies.
  template <class Call>
  void with_product(const Call& f) const {
    if (format_.int8) return f(*format_.int8);
    if (format_.dot) return f(*format_.dot);
    return f(*format_.floats);
  }
  // The buffer for its rows.
  template <class X>
  static Buffer<X>& rows_of(PackedProductWorkspace& w) {
    if constexpr (std::is_same_v<X, float>)
      return w.rows;
    else if constexpr (std::is_same_v<X, std::uint16_t>)
      return w.parts;
    else
      return w.bytes;
  }

  template <class T>
  static void grow(Buffer<T>& buffer, Index size) {
    buffer.resize((std::max)(size, buffer.size()));
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
  PackedFormat format_;
};

}  // namespace moe
