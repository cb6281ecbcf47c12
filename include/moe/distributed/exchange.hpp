// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/types.hpp>
#include <moe/distributed/communicator.hpp>
#include <moe/routing/routing.hpp>

// Rows of tokens travel to the processes that hold their experts, and back.
namespace moe {

/// The first of the things [0, count) that process `rank` of `size` holds; the next process's is the end: a
/// contiguous block, as large as others' or larger or smaller by one.
inline Index first_of_process(Index count, Index rank, Index size) { return count * rank / size; }

/// Who sends what, for one plan: what prepare() makes of it stays until the next, and serves any number of
/// dispatch() and collect(), forward and backward. All of them are collective and throw DistributedError on
/// every process where they throw on one.
///
/// A process sends a token's row once to each process that holds experts of it, which makes the rows of its
/// experts of it. There they lie by expert, then by the process they came from, then by token: where
/// processes hold contiguous parts of a batch one after the other, in the order of the whole batch. Rows that
/// come back are those of the plan's assignments, in its order. Buffers only grow.
template <class S>
class Exchange {
 public:
  /// Sends every process what it is to know. `width` is that of a row. Two agreements, three messages to each
  /// process. O(tokens + assignments).
  void prepare(const DispatchPlan<S>& plan, Index width, const Communicator& comm) {
    const Index processes = comm.size(), experts = plan.num_experts();
    const Step step{"Exchange::prepare", {width, experts, Index(sizeof(S))}, "width, experts, bytes"};
    num_experts_ = -1;
    const Index most = (experts + processes - 1) / processes;  // experts of one process
    comm.agree(step, [&] { count_what_is_sent(plan, processes, most); });
    width_ = width;
    const Index own = first_of_process(experts, comm.rank() + 1, processes) -
                      first_of_process(experts, comm.rank(), processes);
    comm.exchange(header_sent_.data(), most + 1, header_.data());
    comm.agree({"Exchange::prepare, counts"}, [&] { lay_out_what_is_received(processes, own, most); });
    comm.exchange(row_sent_.data(), assignments_sent_, sizeof(std::int32_t), row_.data(), assignments_);
    comm.exchange(plan.gate.data(), assignments_sent_, sizeof(S), gate_.data(), assignments_);
    place_what_is_received(own, most);
    num_experts_ = experts;
  }

  /// First row of an expert that this process holds, and the number of rows [own experts + 1].
  std::span<const Index> expert_begin() const {
    return {expert_begin_.data(), expert_begin_.data() + expert_begin_.size()};
  }
  /// Throws std::invalid_argument unless it was prepared for a plan of so many experts and assignments.
  void check(Index num_experts, Index assignments, const char* where) const {
    require(num_experts_ == num_experts && assignments_sent_.rows == assignments, where,
            ": the exchange was prepared for ", num_experts_, " experts and ", assignments_sent_.rows,
            " assignments, expected ", num_experts, " and ", assignments);
  }
  /// Rows that dispatch() sends to other processes, and that collect() sends them: of `width` scalars.
  Index rows_sent(const Communicator& comm) const {
    return tokens_sent_.rows - tokens_sent_.count[comm.rank()];
  }
  /// The same of collect().
  Index rows_returned(const Communicator& comm) const {
    return assignments_.rows - assignments_.count[comm.rank()];
  }

  /// rows [own experts' rows, width]: for each its token's row of x, times its gate where `gated`. One
  /// agreement, one message to each process. x is [the plan's tokens, width].
  template <class X, Executor Ex>
  void dispatch(const X& x, bool gated, RowBuffer<S>& rows, const Communicator& comm, const Ex& executor) {
    comm.agree({"Exchange::dispatch", {width_, Index(gated)}, "width, gated"}, [&] {
      require(x.cols() == width_, "Exchange::dispatch: x has ", x.cols(), " columns, expected ", width_);
      sent_.resize(tokens_sent_.rows, width_);
      received_.resize(tokens_.rows, width_);
      rows.resize(assignments_.rows, width_, rows.reserved_rows());
      if (width_ == 0) return;
      for_each_block(sent_.rows(), executor, [&](Index begin, Index end, Index) {
        for (Index i = begin; i < end; ++i) std::copy_n(&x.coeffRef(token_[i], 0), width_, sent_.row(i));
      });
    });
    comm.exchange(sent_.data(), tokens_sent_, row_bytes(), received_.data(), tokens_);
    for_each_block(rows.rows(), executor, [&](Index begin, Index end, Index) {
      for (Index i = begin; i < end; ++i) {
        const S* const from = received_.row(source_[i]);
        S* const to = rows.row(place_[i]);
        if (gated)
          for (Index j = 0; j < width_; ++j) to[j] = gate_[i] * from[j];
        else
          std::copy_n(from, width_, to);
      }
    });
  }

  /// Runs work(), which makes `rows` [own experts' rows, width], and sends them back: assigned [assignments
  /// of the plan, width]. One agreement, one message to each process.
  template <class F, Executor Ex>
  void collect(const F& work, const RowBuffer<S>& rows, RowBuffer<S>& assigned, const Communicator& comm,
               const Ex& executor) {
    comm.agree({"Exchange::collect", {width_}, "width"}, [&] {
      work();
      require_shape(rows, assignments_.rows, width_, "Exchange::collect", "rows");
      returned_.resize(rows.rows(), width_);
      assigned.resize(assignments_sent_.rows, width_, assigned.reserved_rows());
      for_each_block(rows.rows(), executor, [&](Index begin, Index end, Index) {
        for (Index i = begin; i < end; ++i) std::copy_n(rows.row(place_[i]), width_, returned_.row(i));
      });
    });
    comm.exchange(returned_.data(), assignments_, row_bytes(), assigned.data(), assignments_sent_);
  }

  template <class F>
  void for_each_array(const F& f) const {
    f(gate_);
    for (const RowBuffer<S>* rows : {&sent_, &received_, &returned_}) f(*rows);
  }

 private:
  Index row_bytes() const { return width_ * Index(sizeof(S)); }

  // Which tokens go to a process, and which of these rows each assignment is of.
  void count_what_is_sent(const DispatchPlan<S>& plan, Index processes, Index most) {
    const Index experts = plan.num_experts();
    tokens_sent_.resize(processes);
    assignments_sent_.resize(processes);
    header_sent_.assign(processes * (most + 1), 0);
    header_.assign(processes * (most + 1), 0);
    row_sent_.resize(plan.num_assignments());
    token_.clear();
    sent_as_.assign(plan.num_tokens, -1);
    for (Index p = 0; p < processes; ++p) {
      const Index first = first_of_process(experts, p, processes);
      const Index last = first_of_process(experts, p + 1, processes), rows_before = token_.size();
      for (Index a = plan.expert_begin[first]; a < plan.expert_begin[last]; ++a) {
        Index& row = sent_as_[plan.token[a]];
        if (row < rows_before) {
          row = token_.size();
          token_.push_back(plan.token[a]);
        }
        row_sent_[a] = std::int32_t(Communicator::as_int(row - rows_before, "Exchange::prepare"));
      }
      Index* const header = header_sent_.data() + p * (most + 1);
      header[0] = token_.size() - rows_before;
      for (Index e = first; e < last; ++e) header[1 + e - first] = plan.rows_of(e);
      tokens_sent_.count[p] = Communicator::as_int(header[0], "Exchange::prepare");
      assignments_sent_.count[p] =
          Communicator::as_int(plan.expert_begin[last] - plan.expert_begin[first], "Exchange::prepare");
    }
    tokens_sent_.lay_out();
    assignments_sent_.lay_out();
  }

  void lay_out_what_is_received(Index processes, Index own, Index most) {
    tokens_.resize(processes);
    assignments_.resize(processes);
    for (Index p = 0; p < processes; ++p) {
      const Index* const header = header_.data() + p * (most + 1);
      Index count = 0;
      for (Index e = 0; e < own; ++e) count += header[1 + e];
      tokens_.count[p] = Communicator::as_int(header[0], "Exchange::prepare");
      assignments_.count[p] = Communicator::as_int(count, "Exchange::prepare");
    }
    tokens_.lay_out();
    assignments_.lay_out();
    row_.resize(assignments_.rows);
    gate_.resize(assignments_.rows);
    place_.resize(assignments_.rows);
    source_.resize(assignments_.rows);
    expert_begin_.assign(own + 1, 0);
  }

  // Where what comes from a process goes: by expert, then by process.
  void place_what_is_received(Index own, Index most) {
    const Index processes = tokens_.count.size();
    for (Index e = 0, next = 0; e < own; ++e) {
      for (Index p = 0; p < processes; ++p) {
        Index& count = header_[p * (most + 1) + 1 + e];
        const Index rows = count;
        count = next;  // from now on, its first row
        next += rows;
      }
      expert_begin_[e + 1] = next;
    }
    for (Index p = 0; p < processes; ++p) {
      Index i = assignments_.begin[p];
      for (Index e = 0; e < own; ++e) {
        const Index first = header_[p * (most + 1) + 1 + e];
        const Index end = p + 1 < processes ? header_[(p + 1) * (most + 1) + 1 + e] : expert_begin_[e + 1];
        for (Index row = first; row < end; ++row, ++i) {
          place_[i] = row;
          source_[i] = tokens_.begin[p] + row_[i];
        }
      }
    }
  }

  Index num_experts_ = -1, width_ = 0;
  Communicator::Parts tokens_sent_, assignments_sent_, tokens_, assignments_;
  Buffer<Index> header_sent_, header_;   // tokens, then assignments by expert [processes, 1 + experts of one]
  Buffer<Index> token_;                  // of a row that is sent
  Buffer<Index> sent_as_;                // the last row that a token is sent as [tokens]
  Buffer<std::int32_t> row_sent_, row_;  // of its process, for an assignment
  Buffer<S> gate_;                       // of an assignment that was received
  Buffer<Index> place_, source_;         // its row here, and among those that were received
  Buffer<Index> expert_begin_;           // [own experts + 1]
  RowBuffer<S> sent_, received_, returned_;
};

}  // namespace moe
