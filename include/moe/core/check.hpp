// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>

// How the library refuses bad input: std::invalid_argument with every number that matters.
namespace moe {

namespace detail {

// How an argument of a message is written. What writes is compiled once a type, and what throws once at all:
// a check leaves little code where it stands.
using WritePart = void (*)(std::ostream& out, const void* value);

template <class T>
void write_part(std::ostream& out, const void* value) {
  out << *static_cast<const T*>(value);
}

[[noreturn, gnu::cold, gnu::noinline]] inline void fail_with(std::size_t count, const WritePart* write,
                                                             const void* const* values) {
  std::ostringstream message;
  for (std::size_t i = 0; i < count; ++i) write[i](message, values[i]);
  throw std::invalid_argument(message.str());
}

}  // namespace detail

/// Throws std::invalid_argument whose message is all arguments written one after the other. By value, because
/// compilers optimise variables worse once their address is taken.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(Parts... parts) {
  static constexpr detail::WritePart kWrite[] = {&detail::write_part<Parts>...};
  const void* const values[] = {static_cast<const void*>(&parts)...};
  detail::fail_with(sizeof...(Parts), kWrite, values);
}

/// Throws unless `ok`. The message is built only then.
template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(parts...);
}

namespace detail {

template <class What>
[[noreturn, gnu::cold, gnu::noinline]] void fail_shape(const char* where, const What& what,
                                                       std::ptrdiff_t has_rows, std::ptrdiff_t has_cols,
                                                       std::ptrdiff_t rows, std::ptrdiff_t cols) {
  fail(where, ": ", what, " has shape [", has_rows, ", ", has_cols, "], expected [", rows, ", ", cols, "]");
}

// A text without its length, which would make a type of its own of each.
inline const char* as_part(const char* text) { return text; }
template <class T>
const T& as_part(const T& value) {
  return value;
}

}  // namespace detail

/// Throws unless a matrix has the expected shape: "where: what has shape [3, 5], expected [4, 5]".
template <class M, class What>
void require_shape(const M& m, std::ptrdiff_t rows, std::ptrdiff_t cols, const char* where,
                   const What& what) {
  if (m.rows() != rows || m.cols() != cols) [[unlikely]]
    detail::fail_shape(where, detail::as_part(what), m.rows(), m.cols(), rows, cols);
}

namespace detail {

// Where an array lies: `rows` runs of `width` bytes, each `stride` bytes behind the one before it.
struct Extent {
  std::uintptr_t begin;
  std::ptrdiff_t rows, width, stride;

  bool empty() const { return rows <= 0 || width <= 0; }
  std::uintptr_t end() const { return begin + std::uintptr_t((rows - 1) * stride + width); }
  friend std::ostream& operator<<(std::ostream& out, const Extent& e) {
    return out << e.rows << " x " << e.width << " bytes";
  }
};

// Of a matrix or vector whose runs are contiguous, or of a Buffer: what it may grow into counts too.
template <class A>
Extent extent_of(const A& a) {
  const auto begin = reinterpret_cast<std::uintptr_t>(a.data());
  constexpr auto kSize = std::ptrdiff_t(sizeof(*a.data()));
  if constexpr (requires { a.capacity(); }) {
    return {begin, 1, a.capacity() * kSize, 0};
  } else {
    const std::ptrdiff_t rows = A::IsRowMajor ? a.rows() : a.cols();
    const std::ptrdiff_t stride = a.outerStride() * kSize;
    const std::ptrdiff_t before = stride < 0 && rows > 1 ? (rows - 1) * -stride : 0;  // backwards
    return {begin - std::uintptr_t(before), rows, (A::IsRowMajor ? a.cols() : a.rows()) * kSize,
            stride < 0 ? -stride : stride};
  }
}

// Whether two arrays of which none is empty and whose bytes from the first to the last intertwine share a
// byte. Exact but for runs that follow each other at different distances: there arrays that interleave count
// as one.
inline bool runs_meet(const Extent& a, const Extent& b) {
  if (b.begin < a.begin) return runs_meet(b, a);
  const auto offset = std::ptrdiff_t(b.begin - a.begin);
  if (offset < a.width || (b.rows > 1 && b.stride != a.stride)) return true;
  const std::ptrdiff_t column = offset % a.stride;  // of b's first byte; another run of a follows
  return column < a.width || column + b.width > a.stride;
}

// Whether two arrays share a byte. Most lie far apart: two comparisons.
inline bool overlap(const Extent& a, const Extent& b) {
  if (a.end() <= b.begin || b.end() <= a.begin) [[likely]]
    return false;
  return !a.empty() && !b.empty() && runs_meet(a, b);
}

// The bytes from the first to the last of an array, or all of them.
struct Span {
  std::uintptr_t begin = 0, end = UINTPTR_MAX;

  bool far_from(const Span& other) const { return end <= other.begin || other.end <= begin; }
};

// Calls f(extent) for every array of a thing that is not far from some bytes.
class EachExtent {
 public:
  template <class F>
  EachExtent(const Span& bytes, F& f)
      : bytes_(bytes),
        f_(&f),
        call_([](void* to, const Extent& extent) { (*static_cast<F*>(to))(extent); }) {}

  template <class A>
  void operator()(const A& a) const {
    if constexpr (requires { a.for_each_array(*this); }) {
      a.for_each_array(*this);
    } else {
      const Extent extent = extent_of(a);
      if (!bytes_.far_from({extent.begin, extent.end()})) [[unlikely]]
        call_(f_, extent);
    }
  }

 private:
  Span bytes_;
  void* f_;
  void (*call_)(void* to, const Extent& extent);
};

// One array, or a thing that consists of some, without its type: what compares them is compiled once.
class Arrays {
 public:
  template <class A>
  explicit Arrays(const A& a)
      : thing_(&a),
        walk_([](const void* thing, const EachExtent& each) { each(*static_cast<const A*>(thing)); }) {
    constexpr bool kSeveral = requires(const EachExtent& each) { a.for_each_array(each); };
    if constexpr (!kSeveral) {
      const Extent extent = extent_of(a);
      span_ = {extent.begin, extent.end()};
    }
  }

  const Span& span() const { return span_; }
  template <class F>
  void for_each(const Span& bytes, F&& f) const {
    walk_(thing_, EachExtent(bytes, f));
  }

 private:
  const void* thing_;
  void (*walk_)(const void* thing, const EachExtent& each);
  Span span_;  // of one array; of several all bytes
};

// Of b's arrays some at a time are compared with all of a's.
[[gnu::noinline]] inline void require_apart(const char* where, const char* what_a, const Arrays& a,
                                            const char* what_b, const Arrays& b) {
  constexpr int kMost = 16;
  Extent some[kMost];
  int count = 0;
  const auto compare = [&] {
    a.for_each(b.span(), [&](const Extent& of_a) {
      for (int i = 0; i < count; ++i)
        require(!overlap(of_a, some[i]), where, ": ", what_a, " and ", what_b, " overlap: ", of_a, " and ",
                some[i], ", expected memory of their own");
    });
    count = 0;
  };
  b.for_each(a.span(), [&](const Extent& of_b) {
    some[count++] = of_b;
    if (count == kMost) compare();
  });
  if (count > 0) compare();
}

}  // namespace detail

/// Throws unless `a`, which a call writes, shares no memory with each of the others, which stand behind their
/// names: require_apart("linear", "y", y, "x", x, "w", w). All are matrices whose rows are contiguous,
/// vectors, Buffers, or what consists of such and lists them by for_each_array: a workspace, a cache, a
/// routing.
template <class A, class B, class... Rest>
void require_apart(const char* where, const char* what_a, const A& a, const char* what_b, const B& b,
                   const Rest&... rest) {
  const detail::Arrays of_a(a), of_b(b);
  if (!of_a.span().far_from(of_b.span())) [[unlikely]]
    detail::require_apart(where, what_a, of_a, what_b, of_b);
  if constexpr (sizeof...(Rest) > 0) require_apart(where, what_a, a, rest...);
}

}  // namespace moe
