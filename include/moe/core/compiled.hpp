// SPDX-License-Identifier: MIT
#pragma once

// The two forms of the library. moe::moe is header-only: a unit compiles all that it uses. moe::compiled is
// the same headers and a static library; it defines MOE_COMPILED, under which the kernels and the functions
// of compiled.inc are declared in the headers and defined in the library. The value of MOE_COMPILED is the
// alignment that Eigen had there, in bytes: a unit for which it differs (-mavx) shares the kernels alone, and
// so does one with _GLIBCXX_DEBUG, whose containers are others. MOE_COMPILED_OPENMP says that the library has
// those functions for the executor OpenMP too.
namespace moe {

// All units of a program have one form. In each form this name is a variable of another kind, which is what
// the linker says of a program that mixes them.
#ifdef MOE_COMPILED
[[gnu::used, gnu::visibility("hidden")]] inline thread_local char this_program_mixes_moe_and_moe_compiled = 0;
#else
[[gnu::used, gnu::visibility("hidden")]] inline char this_program_mixes_moe_and_moe_compiled = 0;
#endif

namespace compiled {

// An executor for which the library compiles what it declares for Ex.
template <class Ex>
struct InLibrary : Ex {
  explicit InLibrary(const Ex& executor) : Ex(executor) {}
};

}  // namespace compiled

}  // namespace moe
