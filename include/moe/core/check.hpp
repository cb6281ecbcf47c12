// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

// How the library refuses bad input: std::invalid_argument with every number that matters.
namespace moe {

namespace detail {

// Something that can be written to a stream, during a call. What writes a message is compiled once a type,
// not once a message.
class MessagePart {
 public:
  template <class T>
  MessagePart(const T& value) : value_(&value), write_(&write<T>) {}
  template <std::size_t N>
  MessagePart(const char (&text)[N]) : value_(text), write_(&write_text) {}
  void write_to(std::ostream& out) const { write_(out, value_); }

 private:
  template <class T>
  static void write(std::ostream& out, const void* value) {
    out << *static_cast<const T*>(value);
  }
  static void write_text(std::ostream& out, const void* text) { out << static_cast<const char*>(text); }

  const void* value_;
  void (*write_)(std::ostream&, const void*);
};

[[noreturn, gnu::cold, gnu::noinline]] inline void fail_with(std::initializer_list<MessagePart> parts) {
  std::ostringstream message;
  for (const MessagePart& part : parts) part.write_to(message);
  throw std::invalid_argument(message.str());
}

}  // namespace detail

/// Throws std::invalid_argument whose message is all arguments written one after the other.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  detail::fail_with({parts...});
}

/// Throws unless `ok`. The message is built only then.
template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(parts...);
}

/// Throws unless a matrix has the expected shape: "where: what has shape [3, 5], expected [4, 5]".
template <class M, class What>
void require_shape(const M& m, std::ptrdiff_t rows, std::ptrdiff_t cols, std::string_view where,
                   const What& what) {
  require(m.rows() == rows && m.cols() == cols, where, ": ", what, " has shape [", m.rows(), ", ", m.cols(),
          "], expected [", rows, ", ", cols, "]");
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

// Calls f(extent) for an array, or for every one of which a thing consists.
template <class A, class F>
void for_each_extent(const A& a, const F& f) {
  if constexpr (requires { a.for_each_array(f); })
    a.for_each_array([&](const auto& part) { for_each_extent(part, f); });
  else
    f(extent_of(a));
}

}  // namespace detail

/// Throws unless `a`, which a call writes, shares no memory with each of the others, which stand behind their
/// names: require_apart("linear", "y", y, "x", x, "w", w). All are matrices whose rows are contiguous,
/// vectors, Buffers, or what consists of such and lists them by for_each_array: a workspace, a cache, a
/// routing.
template <class A, class B, class... Rest>
void require_apart(std::string_view where, std::string_view what_a, const A& a, std::string_view what_b,
                   const B& b, const Rest&... rest) {
  detail::for_each_extent(b, [&](const detail::Extent& of_b) {
    detail::for_each_extent(a, [&](const detail::Extent& of_a) {
      require(!detail::overlap(of_a, of_b), where, ": ", what_a, " and ", what_b, " overlap: ", of_a, " and ",
              of_b, ", expected memory of their own");
    });
  });
  if constexpr (sizeof...(Rest) > 0) require_apart(where, what_a, a, rest...);
}

}  // namespace moe
