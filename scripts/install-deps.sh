#!/usr/bin/env bash
# Installs the Debian packages that building moe needs and that are missing.
#   scripts/install-deps.sh         compiler, CMake, Eigen, GoogleTest, Google Benchmark, JSON, Open MPI
#   scripts/install-deps.sh --dev   also Clang 14 with its sanitizers and clang-format, for the presets clang,
#                                   asan, tsan and the test of the format, and Doxygen, for the reference
set -euo pipefail

packages=(g++ cmake ninja-build pkg-config libeigen3-dev libgtest-dev libgmock-dev libbenchmark-dev
  nlohmann-json3-dev libopenmpi-dev openmpi-bin)
dev_packages=(clang-14 clang-format-14 libclang-rt-14-dev libomp-14-dev llvm-14 doxygen)

case "${1-}" in
  "") ;;
  --dev) packages+=("${dev_packages[@]}") ;;
  *)
    echo "usage: $0 [--dev]" >&2
    exit 2
    ;;
esac

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  cat >&2 <<'END'
install-deps.sh: there is no apt-get here. Install with your own package manager:
  a C++20 compiler (GCC 12 or Clang 14, or later), CMake 3.25 or later, Ninja, pkg-config,
  Eigen 3.4 or later, GoogleTest with GoogleMock, Google Benchmark,
  nlohmann_json 3.11 or later, an MPI (3.1 or later)
  and, for --dev: Clang 14 with its sanitizer runtimes and clang-format, LLVM's libomp with libarcher.so,
  Doxygen 1.9.4
END
  exit 1
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) || true
  [[ $status == installed ]] || missing+=("$package")
done
if [[ ${#missing[@]} -eq 0 ]]; then
  echo "install-deps.sh: everything is installed"
  exit 0
fi
echo "install-deps.sh: installing ${missing[*]}"

as_root=()
if [[ $(id -u) -ne 0 ]]; then
  if ! command -v sudo >/dev/null; then
    echo "install-deps.sh: not root and no sudo. As root, run: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
"${as_root[@]}" apt-get update
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install --yes --no-install-recommends "${missing[@]}"
