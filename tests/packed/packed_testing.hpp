// SPDX-License-Identifier: MIT
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

// What tests of packed layers have in common.
namespace moe::packed_testing {

/// The sets of kernels that this processor has. For blocks AMX is AVX-512 again, and may be left out.
inline std::vector<InstructionSet> available_sets(bool with_amx = true) {
  std::vector<InstructionSet> sets;
  for (const auto set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512})
    if (is_available(set)) sets.push_back(set);
  if (with_amx && is_available(InstructionSet::amx)) sets.push_back(InstructionSet::amx);
  return sets;
}

inline bool same_bits(const Matrix<float>& a, const Matrix<float>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(float)) == 0);
}

/// What std::invalid_argument says that a call throws.
template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

/// Runs tasks backwards, and says that it has more workers than it has.
struct Backwards {
  Index workers;
  Index concurrency() const { return workers; }
  template <class F>
  void for_each(Index n, F&& f) const {
    for (Index i = n; i-- > 0;) f(i, i % workers);
  }
};

}  // namespace moe::packed_testing
