// SPDX-License-Identifier: MIT
// The headers after macros that other people's headers define in lower case or as plain words: those of
// windows.h and of X11. Compiled, not run. What stands between comes first: the standard library and
// nlohmann_json do not survive all of them, nor does Eigen (Success).
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cassert>
#include <cerrno>
#include <cmath>
#include <complex>
#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <limits>
#include <locale>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numbers>
#include <numeric>
#include <optional>
#include <ostream>
#include <random>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if __has_include(<immintrin.h>)
#include <immintrin.h>
#endif
#if __has_include(<sys/mman.h>)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include <Eigen/Core>
#include <nlohmann/json.hpp>

// windows.h
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define near
#define far
#define small char
#define hyper long
#define interface struct
#define IN
#define OUT
#define OPTIONAL
#define CONST const
#define VOID void
#define TRUE 1
#define FALSE 0
#define ERROR 0
#define STRICT 1
#define DELETE 0x00010000L
#define ABSOLUTE 1
#define RELATIVE 2
#define OPAQUE 2
#define TRANSPARENT 1
#define DIFFERENCE 11

// X.h and Xlib.h
#define None 0L
#define Bool int
#define Status int
#define True 1
#define False 0
#define Success 0
#define Always 2
#define Never 0
#define Complex 0
#define Convex 2
#define Nonconvex 1
#define Above 0
#define Below 1
#define Opposite 4
#define Unsorted 0
#define CursorShape 0
#define DestroyAll 0
#define GrayScale 1
#define Expose 12
#define FocusIn 9
#define FocusOut 10
#define KeyPress 2
#define KeyRelease 3

#include <moe/io.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/file.hpp>
#include <moe/io/read_tensor.hpp>
#include <moe/moe.hpp>
#include <moe/packed.hpp>
