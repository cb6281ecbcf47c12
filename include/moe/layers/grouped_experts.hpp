// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <span>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/types.hpp>
#include <moe/experts/expert.hpp>
#include <moe/layers/expert_cache.hpp>

// The experts of a layer as one thing: rows in, rows out, forward and backward. It knows which rows are
// whose, not why: routers, gates and tokens are elsewhere (dispatch.hpp).
namespace moe {

/// The experts of one layer. x_rows and y_rows are [rows, width], the rows of expert e stand from
/// expert_begin[e] to expert_begin[e + 1]; an output row depends on its input row alone. Experts and blocks
/// of their rows are tasks of the executor; results are bitwise the same for every executor. The width may be
/// another than that of the layer around them.
///
/// Every call throws std::invalid_argument unless its arguments fit each other and what it writes lies apart
/// from what it reads. A call costs what its experts cost on their rows; it allocates only when shapes grow.
template <Expert E>
class GroupedExperts {
 public:
  using Scalar = typename E::Scalar;
  using S = Scalar;
  using Workspace = ExpertWorkspace<S>;
  using Cache = ExpertCache<S>;

  GroupedExperts() = default;
  /// Throws std::invalid_argument unless all experts have one width.
  explicit GroupedExperts(std::vector<E> experts) : experts_(std::move(experts)) {
    check_widths(width(), "GroupedExperts");
  }
  /// Throws std::invalid_argument unless all experts have this width.
  GroupedExperts(std::vector<E> experts, Index width, const char* where) : experts_(std::move(experts)) {
    check_widths(width, where);
  }

  Index size() const { return Index(experts_.size()); }
  bool empty() const { return experts_.empty(); }
  /// d_model of each expert; 0 where there is none.
  Index width() const { return empty() ? 0 : Index(experts_[0].d_model()); }
  /// Expert e.
  E& operator[](Index e) { return experts_[std::size_t(e)]; }
  /// The same, read-only.
  const E& operator[](Index e) const { return experts_[std::size_t(e)]; }
  /// All of them.
  std::span<E> all() { return experts_; }
  /// The same, read-only.
  std::span<const E> all() const { return experts_; }
  /// The experts [begin, end).
  std::span<E> part(Index begin, Index end) {
    return all().subspan(std::size_t(begin), std::size_t(end - begin));
  }
  /// The same, read-only.
  std::span<const E> part(Index begin, Index end) const {
    return all().subspan(std::size_t(begin), std::size_t(end - begin));
  }
  /// Throws std::invalid_argument unless the cache is of a forward pass of these experts with such rows.
  void check_cache(const Cache& cache, std::span<const Index> expert_begin, const char* where) const {
    cache.check(all(), expert_begin, where);
  }

  /// Puts an expert before the one at `at`, or behind the last. O(experts). Throws std::invalid_argument, and
  /// changes nothing, for another place or width.
  void insert(Index at, E expert) {
    require(at >= 0 && at <= size(), "GroupedExperts::insert: place ", at, " among ", size(), " experts");
    require(empty() || expert.d_model() == width(), "GroupedExperts::insert: the expert at ", at,
            " has d_model = ", expert.d_model(), ", expected ", width());
    experts_.insert(experts_.begin() + at, std::move(expert));
  }
  /// Keeps the experts of these numbers, in this order, each named once at most. O(experts). Throws
  /// std::invalid_argument, and changes nothing, for the number of none.
  void keep(std::span<const Index> numbers) {
    for (const Index e : numbers)
      require(e >= 0 && e < size(), "GroupedExperts::keep: expert ", e, " of ", size());
    std::vector<E> kept;
    kept.reserve(numbers.size());
    for (const Index e : numbers) kept.push_back(std::move_if_noexcept((*this)[e]));
    experts_ = std::move(kept);
  }

  /// y_rows from x_rows, for inference.
  template <Executor Ex = DefaultExecutor>
  void forward(const RowBuffer<S>& x_rows, std::span<const Index> expert_begin, RowBuffer<S>& y_rows,
               Workspace& workspace, const Ex& executor = {}) const {
    begin_forward(x_rows, expert_begin, y_rows, workspace.tasks);
    Index widest = 0;
    if constexpr (BufferedExpert<E>) {
      for (const E& expert : experts_) widest = std::max<Index>(widest, expert.cache_cols());
      workspace.rows.resize(executor.concurrency() * kTaskRows * widest);
    }
    for_each_shared(workspace.tasks.size(), work_of(x_rows.rows()), executor, [&](Index task, Index worker) {
      const auto [e, begin, count] = workspace.tasks[task];
      const Index row = expert_begin[std::size_t(e)] + begin;
      const auto x = x_rows.block(row, count);
      auto y = y_rows.block(row, count);
      if constexpr (BufferedExpert<E>) {
        S* const kept = workspace.rows.data() + worker * kTaskRows * widest;
        (*this)[e].forward(x, y, Eigen::Map<Matrix<S>>(kept, count, (*this)[e].cache_cols()));
      } else {
        (*this)[e].forward(x, y);
      }
    });
  }

  /// The same values, keeping in `cache` what backward needs.
  template <Executor Ex = DefaultExecutor>
  void forward(const RowBuffer<S>& x_rows, std::span<const Index> expert_begin, RowBuffer<S>& y_rows,
               Cache& cache, const Ex& executor = {}) const requires TrainableExpert<E> {
    begin_forward(x_rows, expert_begin, y_rows, cache.tasks);
    cache.resize(all(), expert_begin, x_rows.reserved_rows());
    executor.for_each(cache.tasks.size(), [&](Index task, Index) {
      const auto [e, begin, count] = cache.tasks[task];
      const Index row = expert_begin[std::size_t(e)] + begin;
      (*this)[e].forward(x_rows.block(row, count), y_rows.block(row, count), cache.block(e, begin, count));
    });
  }

  /// Writes d_x_rows [rows, width] and adds to the parameters of `grad`, one task an expert. An expert
  /// without rows costs nothing.
  template <Executor Ex = DefaultExecutor>
  void backward(const RowBuffer<S>& x_rows, std::span<const Index> expert_begin, const RowBuffer<S>& d_y_rows,
                Cache& cache, RowBuffer<S>& d_x_rows, GroupedExperts& grad,
                const Ex& executor = {}) const requires TrainableExpert<E> {
    constexpr const char* kWhere = "GroupedExperts::backward";
    check_rows(x_rows, expert_begin, kWhere);
    require(grad.size() == size(), kWhere, ": ", size(), " experts, but ", grad.size(), " gradients");
    require_shape(d_y_rows, x_rows.rows(), x_rows.cols(), kWhere, "d_y_rows");
    require_apart(kWhere, "d_x_rows", d_x_rows, "x_rows", x_rows, "d_y_rows", d_y_rows);
    require(&grad != this, kWhere, ": grad is the ", size(), " experts themselves, expected others");
    cache.check(all(), expert_begin, kWhere);
    d_x_rows.resize(x_rows.rows(), x_rows.cols(), x_rows.reserved_rows());
    executor.for_each(size(), [&](Index task, Index) {
      const Index e = size() - 1 - task;  // the last are dealt first: shared experts are the largest
      const Index begin = expert_begin[std::size_t(e)], rows = expert_begin[std::size_t(e) + 1] - begin;
      if (rows == 0) return;
      (*this)[e].backward(x_rows.block(begin, rows), d_y_rows.block(begin, rows), cache.block(e, 0, rows),
                          d_x_rows.block(begin, rows), grad[e]);
    });
  }

  /// Visits the experts' parameters, as "experts.3.w_up".
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_range("experts", 0, std::get<0>(std::tie(self...)).size(), f, self...);
  }
  /// Visits those of the experts [begin, end), as "part.0.w_up" and so on. Throws std::invalid_argument
  /// unless all have as many experts as the first.
  template <class F, class... Self>
  static void visit_range(std::string_view part, Index begin, Index end, F&& f, Self&... self) {
    const Index count = std::get<0>(std::tie(self...)).size();
    (require(self.size() == count, "GroupedExperts::visit: ", self.size(), " experts beside ", count), ...);
    if constexpr (requires(E & expert) { E::visit(f, expert); })
      for (Index e = begin; e < end; ++e) visit_part({part, e - begin}, f, self[e]...);
  }

 private:
  // Rows of one expert that one task takes. A multiple of every register tile's height.
  static constexpr Index kTaskRows = 192;

  // Multiply-adds for so many rows, at most; of experts that do not say it, enough to wake threads for.
  Index work_of(Index rows) const {
    Index most = 0;
    if constexpr (requires(const E& expert) { expert.multiply_adds_per_row(); })
      for (const E& expert : experts_) most = std::max<Index>(most, expert.multiply_adds_per_row());
    else
      return kLeastShared;
    return rows * most;
  }

  void check_widths(Index width, const char* where) const {
    for (Index e = 0; e < size(); ++e)
      require((*this)[e].d_model() == width, where, ": expert ", e, " has d_model = ", (*this)[e].d_model(),
              ", expected ", width);
  }

  void check_rows(const RowBuffer<S>& x_rows, std::span<const Index> begin, const char* where) const {
    require(begin.size() == experts_.size() + 1, where, ": rows of ", Index(begin.size()) - 1,
            " experts, expected ", size());
    require(begin.front() == 0 && begin.back() == x_rows.rows(), where, ": expert_begin goes from ",
            begin.front(), " to ", begin.back(), ", but x_rows has ", x_rows.rows(),
            " rows, expected from 0 to that");
    for (std::size_t e = 0; e + 1 < begin.size(); ++e)
      require(begin[e] <= begin[e + 1], where, ": expert_begin[", e + 1, "] = ", begin[e + 1],
              " is less than the entry before it, ", begin[e]);
    require(empty() || x_rows.cols() == width(), where, ": x_rows has ", x_rows.cols(),
            " columns, expected d_model = ", width());
  }

  void begin_forward(const RowBuffer<S>& x_rows, std::span<const Index> begin, RowBuffer<S>& y_rows,
                     Buffer<ExpertRows>& tasks) const {
    check_rows(x_rows, begin, "GroupedExperts::forward");
    require_apart("GroupedExperts::forward", "y_rows", y_rows, "x_rows", x_rows);
    y_rows.resize(x_rows.rows(), x_rows.cols(), x_rows.reserved_rows());
    tasks.reserve(size() + x_rows.reserved_rows() / kTaskRows);
    tasks.clear();
    for (Index e = size(); e-- > 0;) {
      const Index rows = begin[std::size_t(e) + 1] - begin[std::size_t(e)];
      for (Index first = 0; first < rows; first += kTaskRows)
        tasks.push_back({e, first, (std::min)(kTaskRows, rows - first)});
    }
  }

  std::vector<E> experts_;
};

}  // namespace moe
