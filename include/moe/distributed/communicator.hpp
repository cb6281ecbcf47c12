// SPDX-License-Identifier: MIT
#pragma once

#include <mpi.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

// Processes that work together, and how they fail together. Calls of MPI 3.1 only, from one thread a process:
// MPI_THREAD_FUNNELED is enough.
namespace moe {

/// What every process of a communicator throws where one of them failed: the message names it and says why.
class DistributedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A point that all processes reach together: its name, and numbers that must be the same on all of them.
struct Step {
  const char* name;          ///< where
  Index numbers[4] = {};     ///< what must agree
  const char* meaning = "";  ///< of the numbers, for the message

  /// A number for each step and its numbers, 0 or more.
  std::int64_t hash() const {
    std::uint64_t h = 14695981039346656037u;  // FNV-1a
    const auto add = [&](std::uint64_t value) { h = (h ^ value) * 1099511628211u; };
    for (const char* c = name; *c != 0; ++c) add(std::uint64_t(static_cast<unsigned char>(*c)));
    for (const Index number : numbers) add(std::uint64_t(number));
    return std::int64_t(h >> 1);
  }
  /// For a message.
  std::string str() const {
    std::ostringstream text;
    text << name;
    if (*meaning != 0) {
      text << " (" << meaning << " =";
      for (const Index number : numbers) text << ' ' << number;
      text << ')';
    }
    return text.str();
  }
};

/// A duplicate of a communicator, so that no message meets another's; copies are the same one. Made, and
/// used, by all its processes together, one call at a time. Throws DistributedError where MPI reports an
/// error.
class Communicator {
 public:
  /// Collective.
  explicit Communicator(MPI_Comm comm) : state_(std::make_shared<State>()) {
    check(MPI_Comm_dup(comm, &state_->comm), "MPI_Comm_dup");
    check(MPI_Comm_set_errhandler(state_->comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(state_->comm, &state_->rank), "MPI_Comm_rank");
    check(MPI_Comm_size(state_->comm, &state_->size), "MPI_Comm_size");
  }

  /// Number of this process, from 0 on.
  Index rank() const { return state_->rank; }
  /// Number of processes.
  Index size() const { return state_->size; }
  /// What MPI calls it.
  MPI_Comm get() const { return state_->comm; }

  /// Runs f, which does not communicate, on every process. Where it throws on one, or steps differ, all throw
  /// a DistributedError; else all go on. One reduction of three integers. Before every other call here that
  /// communicates stands one of these; so a process that fails elsewhere meets the others at the next: see
  /// together().
  template <class F>
  void agree(const Step& step, const F& f) const {
    std::string failure;
    bool failed = true;
    try {
      f();
      failed = false;
    } catch (const std::exception& e) {
      failure = e.what();
    } catch (...) {
      failure = "an exception that is no std::exception";
    }
    settle(step, failed, failure);
  }

  /// Takes part in the next agreement, as one that failed or not. Throws DistributedError where one failed.
  void settle(const Step& step, bool failed, const std::string& failure) const {
    const std::int64_t form = step.hash();
    std::int64_t least[3] = {failed ? rank() : size(), form, -form};
    reduce_min(least, 3);
    if (least[0] < size()) {
      const auto who = Index(least[0]);
      throw DistributedError(of_process(who) + broadcast(failure, who));
    }
    if (least[1] != -least[2]) throw_that_steps_differ(step);
  }

  /// all [begin.back(), row_bytes] from the rows [begin[p], begin[p + 1]) of each process p.
  void gather_rows(const void* own, Index row_bytes, std::span<const Index> begin, void* all) const {
    State& s = *state_;
    s.count.resize(size());
    s.begin.resize(size());
    for (Index p = 0; p < size(); ++p) {
      s.begin[p] = as_int(begin[std::size_t(p)], "gather_rows");
      s.count[p] = as_int(begin[std::size_t(p) + 1] - begin[std::size_t(p)], "gather_rows");
    }
    const RowType row(row_bytes);
    check(MPI_Allgatherv(own, s.count[rank()], row.get(), all, s.count.data(), s.begin.data(), row.get(),
                         get()),
          "MPI_Allgatherv");
  }
  /// all [size, count] from the `count` numbers of each process.
  void gather(const Index* own, Index count, Index* all) const {
    const RowType row(count * Index(sizeof(Index)));
    check(MPI_Allgather(own, 1, row.get(), all, 1, row.get(), get()), "MPI_Allgather");
  }

  /// Some rows for each process, one process after the other.
  struct Parts {
    Buffer<int> count, begin;  ///< [processes]
    Index rows = 0;            ///< of all

    /// No rows for any of so many processes.
    void resize(Index processes) {
      count.assign(processes, 0);
      begin.assign(processes, 0);
    }
    /// Sets `begin` and `rows` by `count`. Throws std::invalid_argument beyond 2^31 - 1 rows.
    void lay_out() {
      rows = 0;
      for (Index p = 0; p < count.size(); ++p) {
        begin[p] = as_int(rows, "Exchange");
        rows += count[p];
      }
      as_int(rows, "Exchange");
    }
  };
  /// Sends each process its part of `from`, and receives what others send into `to`.
  void exchange(const void* from, const Parts& sent, Index row_bytes, void* to, const Parts& received) const {
    const RowType row(row_bytes);
    check(MPI_Alltoallv(from, sent.count.data(), sent.begin.data(), row.get(), to, received.count.data(),
                        received.begin.data(), row.get(), get()),
          "MPI_Alltoallv");
  }
  /// The same of `count` numbers for each process.
  void exchange(const Index* from, Index count, Index* to) const {
    const RowType row(count * Index(sizeof(Index)));
    check(MPI_Alltoall(from, 1, row.get(), to, 1, row.get(), get()), "MPI_Alltoall");
  }

  /// A count as MPI takes it. Throws std::invalid_argument where it does not fit.
  static int as_int(Index count, const char* where) {
    require(count >= 0 && count <= INT_MAX, where, ": ", count, " rows in one message, expected at most ",
            INT_MAX);
    return int(count);
  }

 private:
  struct State {
    MPI_Comm comm = MPI_COMM_NULL;
    int rank = 0, size = 1;
    Buffer<int> count, begin;  // of the call

    State() = default;
    State(const State&) = delete;
    State& operator=(const State&) = delete;
    ~State() {
      int finalized = 0;
      MPI_Finalized(&finalized);
      if (finalized == 0 && comm != MPI_COMM_NULL) MPI_Comm_free(&comm);
    }
  };

  // Bytes as one element, so that an int counts rows.
  class RowType {
   public:
    explicit RowType(Index bytes) {
      check(MPI_Type_contiguous(as_int(bytes, "RowType"), MPI_BYTE, &type_), "MPI_Type_contiguous");
      check(MPI_Type_commit(&type_), "MPI_Type_commit");
    }
    RowType(const RowType&) = delete;
    RowType& operator=(const RowType&) = delete;
    ~RowType() { MPI_Type_free(&type_); }
    MPI_Datatype get() const { return type_; }

   private:
    MPI_Datatype type_ = MPI_DATATYPE_NULL;
  };

  static void check(int code, const char* call) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw DistributedError(std::string(call) + ": " + text);
  }
  // At most three values.
  void reduce_min(std::int64_t* values, int count) const {
    std::int64_t own[3] = {};
    std::copy_n(values, count, own);
    check(MPI_Allreduce(own, values, count, MPI_INT64_T, MPI_MIN, get()), "MPI_Allreduce");
  }
  std::string of_process(Index p) const {
    return "process " + std::to_string(p) + " of " + std::to_string(size()) + ": ";
  }
  // The text of one process.
  std::string broadcast(std::string text, Index from) const {
    auto length = std::int64_t(text.size());
    check(MPI_Bcast(&length, 1, MPI_INT64_T, int(from), get()), "MPI_Bcast");
    text.resize(std::size_t(length));
    check(MPI_Bcast(text.data(), int(length), MPI_CHAR, int(from), get()), "MPI_Bcast");
    return text;
  }
  [[noreturn]] void throw_that_steps_differ(const Step& step) const {
    std::int64_t of_first = step.hash();
    check(MPI_Bcast(&of_first, 1, MPI_INT64_T, 0, get()), "MPI_Bcast");
    std::int64_t who = step.hash() != of_first ? rank() : size();
    reduce_min(&who, 1);
    const std::string first = broadcast(step.str(), 0), other = broadcast(step.str(), Index(who));
    throw DistributedError(of_process(Index(who)) + "it is at " + other + ", but process 0 is at " + first);
  }

  std::shared_ptr<State> state_;
};

/// What f returns. Where f throws on one process - an argument was wrong, memory ran out, an expert threw -
/// all throw a DistributedError that names the process, and none waits for it. f calls layers over `comm`
/// alone. Collective. One agreement beside those of f.
template <class F>
auto together(const Communicator& comm, F&& f) -> std::invoke_result_t<F&> {
  constexpr Step kEnd{.name = "the end of together"};
  const auto run = [&]() -> std::invoke_result_t<F&> {
    try {
      return f();
    } catch (const DistributedError&) {
      throw;  // all have it
    } catch (const std::exception& e) {
      comm.settle(kEnd, true, e.what());
    } catch (...) {
      comm.settle(kEnd, true, "an exception that is no std::exception");
    }
    throw DistributedError("together: a failure that nobody heard of");
  };
  if constexpr (std::is_void_v<std::invoke_result_t<F&>>) {
    run();
    comm.settle(kEnd, false, {});
  } else {
    auto result = run();
    comm.settle(kEnd, false, {});
    return result;
  }
}

}  // namespace moe
