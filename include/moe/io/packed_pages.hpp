// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#if __has_include(<unistd.h>) && __has_include(<sys/mman.h>)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/packed/packed_experts.hpp>
#include <moe/packed/packed_moe_layer.hpp>

// Which experts of a mapped layer are in memory, and bringing some there.
namespace moe {

namespace io {

// The pages that hold some bytes, and how long one is.
struct Pages {
  std::byte* begin = nullptr;
  std::size_t bytes = 0, page = 1;
};

#if __has_include(<unistd.h>) && __has_include(<sys/mman.h>)
inline Pages pages_of(std::span<const std::byte> bytes) {
  static const auto page = std::size_t(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes.data());
  const std::size_t before = begin % page, size = before + bytes.size();
  return {const_cast<std::byte*>(bytes.data()) - before, (size + page - 1) / page * page, page};
}

// Hints: what the system refuses changes nothing but time.
inline void populate(const Pages& pages) {
  constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ, which Linux has since 5.14
  if (::madvise(pages.begin, pages.bytes, kPopulateRead) != 0)
    (void)::madvise(pages.begin, pages.bytes, MADV_WILLNEED);
}

inline double resident_share(const Pages& pages) {
  std::vector<unsigned char> resident(pages.bytes / pages.page);
#ifdef __APPLE__
  auto* const to = reinterpret_cast<char*>(resident.data());
#else
  unsigned char* const to = resident.data();
#endif
  if (::mincore(pages.begin, pages.bytes, to) != 0) return 1;
  const auto count = std::count_if(resident.begin(), resident.end(), [](unsigned char r) { return r & 1; });
  return double(count) / double(resident.size());
}
#else
inline Pages pages_of(std::span<const std::byte>) { return {}; }
inline void populate(const Pages&) {}
inline double resident_share(const Pages&) { return 1; }
#endif

}  // namespace io

/// Brings experts of a mapped layer, routed and then shared, into memory, each with one call of the system in
/// place of one for some pages: MADV_POPULATE_READ, which waits until they are there, or MADV_WILLNEED where
/// Linux is older than 5.14. Those that are there cost little, and those that were left out nothing. It is a
/// hint: an expert that cannot be brought is read when a token needs it. It pays where the device reads ahead
/// less than an expert at each fault (see bench/README.md). Throws std::invalid_argument for an
/// expert that does not exist.
/// Example: prefetch(mapped, std::vector<Index>{0, 7}).
template <PackableExpert E, Router R>
void prefetch(const PackedMoELayer<E, R>& layer, std::span<const Index> experts) {
  const PackedExperts& all = layer.packed_experts();
  for (const Index e : experts) require(e >= 0 && e < all.size(), "prefetch: expert ", e, " of ", all.size());
  for (const Index e : experts)
    if (all.has(e)) io::populate(io::pages_of(all[e].bytes()));
}

/// The share of each expert's pages that is in memory, from 0 to 1, routed experts and then shared ones; 0
/// for one that was left out, 1 where the system does not say. On Linux it says so of files that the process
/// may write, or owns. O(bytes / 4096). Example: residency(mapped)[7]
template <PackableExpert E, Router R>
std::vector<double> residency(const PackedMoELayer<E, R>& layer) {
  const PackedExperts& all = layer.packed_experts();
  std::vector<double> shares;
  for (Index e = 0; e < all.size(); ++e)
    shares.push_back(all.has(e) ? io::resident_share(io::pages_of(all[e].bytes())) : 0);
  return shares;
}

}  // namespace moe
