// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cassert>
#include <span>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

// The memory in which experts work.
namespace moe {

/// Some rows of one expert, `begin` counted from its first.
struct ExpertRows {
  /// The expert in the layer, the first of the rows, and how many.
  Index expert, begin, count;
};

/// Buffers of GroupedExperts::forward. Grow-only.
template <class S>
struct ExpertWorkspace {
  Buffer<ExpertRows> tasks;  ///< of the call
  Buffer<S> rows;            ///< what a worker's expert keeps now

  template <class F>
  void for_each_array(const F& f) const {
    f(rows);
  }
};

/// Memory in which experts keep what their backward pass needs: for each expert a block
/// [its rows, its cache_cols()], one after the other. Grow-only.
template <class S>
class ExpertCache {
 public:
  /// Lays blocks out for experts with the rows [begin[e], begin[e + 1]). Room is made for `reserve_rows` rows
  /// of the widest expert, so that another batch of the same shape fits.
  template <class E>
  void resize(std::span<const E> experts, std::span<const Index> begin, Index reserve_rows) {
    const Index count = Index(experts.size());
    require(Index(begin.size()) == count + 1, "ExpertCache::resize: ", count, " experts, expected those of ",
            Index(begin.size()) - 1, " blocks of rows");
    begin_.resize(count);
    rows_.resize(count);
    cols_.resize(count);
    Index size = 0, widest = 0;
    for (Index e = 0; e < count; ++e) {
      rows_[e] = begin[std::size_t(e) + 1] - begin[std::size_t(e)];
      cols_[e] = experts[std::size_t(e)].cache_cols();
      begin_[e] = size;
      size += rows_[e] * cols_[e];
      widest = (std::max)(widest, cols_[e]);
    }
    storage_.reserve((std::max)(size, reserve_rows * widest));
    storage_.resize(size);
  }
  /// Throws std::invalid_argument unless the blocks are those of such experts with such rows.
  /// O(num_experts).
  template <class E>
  void check(std::span<const E> experts, std::span<const Index> begin, const char* where) const {
    require(rows_.size() == Index(experts.size()), where, ": the cache is of ", rows_.size(),
            " experts, expected ", experts.size());
    for (Index e = 0; e < rows_.size(); ++e) {
      const Index rows = begin[std::size_t(e) + 1] - begin[std::size_t(e)];
      require(rows_[e] == rows, where, ": the cache has ", rows_[e], " rows of expert ", e, ", expected ",
              rows);
      const Index cols = experts[std::size_t(e)].cache_cols();
      require(cols_[e] == cols, where, ": the cache has ", cols_[e], " columns for expert ", e, ", expected ",
              cols);
    }
  }
  /// Rows [begin, begin + count) of an expert's block, counted from its first row.
  Eigen::Map<Matrix<S>> block(Index expert, Index begin, Index count) {
    assert(begin >= 0 && count >= 0 && begin + count <= rows_[expert]);
    return {storage_.data() + begin_[expert] + begin * cols_[expert], count, cols_[expert]};
  }
  template <class F>
  void for_each_array(const F& f) const {
    f(storage_);
  }

  Buffer<ExpertRows> tasks;  ///< of the forward pass

 private:
  Buffer<S> storage_;
  Buffer<Index> begin_, rows_, cols_;
};

}  // namespace moe
