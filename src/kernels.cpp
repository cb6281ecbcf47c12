// SPDX-License-Identifier: MIT
// The kernels of every instruction set, for programs that link moe::compiled.
#include <moe/kernels/select.hpp>
#include <moe/kernels/tables.hpp>

namespace moe::kernels {

const Kernels* find(InstructionSet set) { return tables::find(set); }
const DenseKernels* find_dense(InstructionSet set) { return tables::find_dense(set); }
const DotProduct* find_dot(InstructionSet set, bool rounded) { return tables::find_dot(set, rounded); }

}  // namespace moe::kernels
