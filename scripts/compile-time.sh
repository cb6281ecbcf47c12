#!/usr/bin/env bash
# What using moe costs a translation unit: median seconds of the compiler's own time (user and system) over
# some runs, and how many times what a unit costs that includes <Eigen/Core> and multiplies two matrices. A
# table in Markdown; the header-only form and moe::compiled.
#   scripts/compile-time.sh [runs [compiler...]]      5 runs, g++ and clang++-14, where not given
set -euo pipefail

runs=${1-5}
compilers=("${@:2}")
[ ${#compilers[@]} -gt 0 ] || compilers=(g++ clang++-14)
root=$(cd "$(dirname "$0")/.." && pwd)
eigen=$(pkg-config --cflags eigen3 2>/dev/null || echo -I/usr/include/eigen3)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat >"$work/product.cpp" <<'END'
#include <Eigen/Core>
Eigen::MatrixXf product(const Eigen::MatrixXf& a, const Eigen::MatrixXf& b) { return a * b; }
END
cat >"$work/include.cpp" <<'END'
#include <moe/moe.hpp>
END
cat >"$work/forward.cpp" <<'END'
#include <moe/moe.hpp>
using Layer = moe::MoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>>;
moe::Matrix<float> run(const Layer& layer, const moe::Matrix<float>& x) { return layer.forward(x); }
END
cat >"$work/train.cpp" <<'END'
#include <moe/moe.hpp>
using Layer = moe::MoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>>;
moe::Matrix<float> step(const Layer& layer, const moe::Matrix<float>& x, const moe::Matrix<float>& target,
                        moe::Rng& rng, Layer::Cache& cache, Layer& grad) {
  const moe::Matrix<float> y = layer.forward(x, rng, cache);
  return layer.backward(y - target, cache, grad, moe::load_balancing_loss(cache.routing).gradient);
}
END
cat >"$work/packed.cpp" <<'END'
#include <moe/packed.hpp>
using Layer = moe::MoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>>;
moe::Matrix<float> run(const Layer& layer, const moe::Matrix<float>& x) {
  return moe::pack<moe::BF16>(layer).forward(x);
}
END
cat >"$work/load.cpp" <<'END'
#include <moe/io.hpp>
auto load(const moe::Checkpoint& checkpoint) {
  return moe::load_layer<float>(moe::mixtral_8x7b, checkpoint, 0);
}
END

# seconds <command>...: of the processor, for one run; a failure ends the script
seconds() {
  local TIMEFORMAT='%U %S'
  if ! { time "$@" 2>"$work/errors"; } 2>"$work/time"; then
    cat "$work/errors" >&2
    exit 1
  fi
  awk '{ printf "%.2f\n", $1 + $2 }' "$work/time"
}

# median <command>...: of some runs
median() {
  for ((i = 0; i < runs; ++i)); do seconds "$@" || exit 1; done | sort -n | sed -n "$(((runs + 1) / 2))p"
}

echo "| | -O0 | multiple | -O2 | multiple |"
echo "|---|---|---|---|---|"
for compiler in "${compilers[@]}"; do
  command -v "$compiler" >/dev/null || continue
  declare -A base=()
  while IFS='|' read -r unit flags what; do
    row="| $compiler, $what |"
    for level in -O0 -O2; do
      # shellcheck disable=SC2086  # flags are several words
      time=$(median "$compiler" -std=c++20 $level $flags -I"$root/include" $eigen -c "$work/$unit.cpp" \
        -o "$work/unit.o")
      base[$level]=${base[$level]-$time}
      row+=" $time | $(awk -v t="$time" -v base="${base[$level]}" 'BEGIN { printf "%.1f", t / base }') |"
    done
    echo "$row"
  done <<'END'
product||a product of two matrices of Eigen
include||`<moe/moe.hpp>`
forward||a layer's forward
train||a training step
packed||a packed layer's forward
load||a layer of a checkpoint, loaded
include|-DMOE_COMPILED=16|compiled form, `<moe/moe.hpp>`
forward|-DMOE_COMPILED=16|compiled form, a layer's forward
train|-DMOE_COMPILED=16|compiled form, a training step
packed|-DMOE_COMPILED=16|compiled form, a packed layer's forward
load|-DMOE_COMPILED=16|compiled form, a layer of a checkpoint, loaded
END
done
