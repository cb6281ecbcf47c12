#!/usr/bin/env bash
# What including moe costs a translation unit: median seconds of the compiler's own time (user and
# system) over some runs, as a table in Markdown.
#   scripts/compile-time.sh [runs]      5 runs where the number is not given
set -euo pipefail

runs=${1-5}
root=$(cd "$(dirname "$0")/.." && pwd)
eigen=$(pkg-config --cflags eigen3 2>/dev/null || echo -I/usr/include/eigen3)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat >"$work/eigen.cpp" <<'END'
#include <Eigen/Core>
int main() {}
END
cat >"$work/include.cpp" <<'END'
#include <moe/moe.hpp>
int main() {}
END
cat >"$work/layer.cpp" <<'END'
#include <moe/moe.hpp>
using Expert = moe::GatedFeedForward<float>;
moe::Matrix<float> run(const moe::MoELayer<Expert, moe::TopKRouter<float>>& layer,
                       const moe::Matrix<float>& x) {
  return layer.forward(x);
}
END
cat >"$work/packed.cpp" <<'END'
#include <moe/moe.hpp>
#include <moe/packed/packed_moe_layer.hpp>
using Expert = moe::GatedFeedForward<float>;
moe::Matrix<float> run(const moe::MoELayer<Expert, moe::TopKRouter<float>>& layer,
                       const moe::Matrix<float>& x) {
  return moe::pack<moe::BF16>(layer).forward(x);
}
END

# seconds <command>...: of the processor, for one run
seconds() {
  local TIMEFORMAT='%U %S'
  { time "$@" 2>"$work/errors"; } 2>&1 | awk '{ printf "%.2f\n", $1 + $2 }'
}

echo "| | -O0 | -O2 |"
echo "|---|---|---|"
for compiler in g++ clang++-14; do
  command -v "$compiler" >/dev/null || continue
  while IFS='|' read -r unit what; do
    row="| $compiler, $what |"
    for level in -O0 -O2; do
      # shellcheck disable=SC2086  # flags are several words
      compile=("$compiler" -std=c++20 $level -I"$root/include" $eigen -c "$work/$unit.cpp" -o "$work/unit.o")
      "${compile[@]}"  # a failure ends the script
      median=$(for ((i = 0; i < runs; ++i)); do seconds "${compile[@]}"; done |
        sort -n | sed -n "$(((runs + 1) / 2))p")
      row+=" $median |"
    done
    echo "$row"
  done <<'END'
eigen|`<Eigen/Core>` alone
include|`<moe/moe.hpp>`
layer|with a layer's forward
packed|with a packed layer's forward
END
done
