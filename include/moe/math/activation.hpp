// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include <moe/core/types.hpp>
#include <moe/math/numbers.hpp>

// Activations as small value types. A unary one has forward(x) and derivative(x); a gated unit has
// forward(g, u) and derivative(g, u), which returns a GluDerivative. A type of your own needs only
// the scalar form.
// One that says `static constexpr bool takes_packs = true;`, as those here do, is also called with packs
// of 16 values, and so runs in vector registers.
namespace moe {

/// 16 values at a time. Every element of a matrix goes through the same pack code wherever it
/// stands, the last ones included: a value's result does not depend on its place.
template <class S>
using Pack = Eigen::Array<S, 16, 1>;

/// An activation or gated unit whose functions take packs as well as scalars.
template <class Activation>
concept TakesPacks = requires {
  requires Activation::takes_packs;
};

/// The derivatives of a gated unit by the gate and by the linear branch.
template <class T>
struct GluDerivative {
  /// By the gate, and by the linear branch.
  T by_gate, by_up;
};

namespace detail {

// `value`, but x where that is NaN: comparisons, and under -ffast-math more, would make a number of one.
template <class S>
S or_nan(S value, S x) {
  return is_nan(x) ? x : value;
}
template <class S>
Pack<S> or_nan(const Pack<S>& value, const Pack<S>& x) {
  return value.binaryExpr(x, [](S v, S from) { return or_nan(v, from); });
}

template <class S>
S exponential(S x) {
  return std::exp(x);
}
template <class S>
Pack<S> exponential(const Pack<S>& x) {
  return x.exp();
}

template <class S>
S hyperbolic_tangent(S x) {
  return std::tanh(x);
}
template <class S>
Pack<S> hyperbolic_tangent(const Pack<S>& x) {
  return x.tanh();
}

template <class S>
S error_function(S x) {
  return std::erf(x);
}
template <class S>
Pack<S> error_function(const Pack<S>& x) {
  return x.unaryExpr([](S v) { return std::erf(v); });
}

template <class S>
S positive_part(S x) {
  if constexpr (kHasBits<S>)  // positive, or a NaN of either sign: above minus infinity as integers are
    return bits_of(x) > bits_of(-std::numeric_limits<S>::infinity()) ? x : S(0);
  else
    return x < S(0) ? S(0) : x;
}
template <class S>
Pack<S> positive_part(const Pack<S>& x) {
  return x.unaryExpr([](S v) { return positive_part(v); });
}

template <class S>
S step(S x) {
  return or_nan(x > S(0) ? S(1) : S(0), x);
}
template <class S>
Pack<S> step(const Pack<S>& x) {
  return x.unaryExpr([](S v) { return step(v); });
}

template <class S>
S clamp(S x, S low, S high) {
  return or_nan((std::min)((std::max)(x, low), high), x);
}
template <class S>
Pack<S> clamp(const Pack<S>& x, S low, S high) {
  return x.unaryExpr([low, high](S v) { return clamp(v, low, high); });
}

// 1 inside [low, high], 0 outside: the derivative of clamp, as torch.clamp takes it at its ends.
template <class S>
S inside(S x, S low, S high) {
  return or_nan(x >= low && x <= high ? S(1) : S(0), x);
}
template <class S>
Pack<S> inside(const Pack<S>& x, S low, S high) {
  return x.unaryExpr([low, high](S v) { return inside(v, low, high); });
}

template <class T>
struct ScalarOf {
  using Type = T;
};
template <class S>
struct ScalarOf<Pack<S>> {
  using Type = S;
};
template <class T>
using Scalar = typename ScalarOf<T>::Type;

// Where the slope of a GELU has reached its limits, 0 and 1, and squares do not overflow. Not for a NaN.
template <class S>
S within_100(S x) {
  return (std::min)((std::max)(x, S(-100)), S(100));
}
template <class S>
Pack<S> within_100(const Pack<S>& x) {
  return ((x.max)(S(-100)).min)(S(100));
}

// 1 / (1 + exp(-x)).
template <class T>
T logistic(const T& x) {
  using S = Scalar<T>;
  return T(S(1) / (S(1) + exponential(T(-x))));
}

}  // namespace detail

/// max(x, 0); the derivative at 0 is 0. NaN stays NaN, as in every activation here.
struct ReLU {
  static constexpr bool takes_packs = true;
  template <class T>
  T forward(const T& x) const {
    return detail::positive_part(x);
  }
  template <class T>
  T derivative(const T& x) const {
    return detail::step(x);
  }
};

/// x Phi(x) with the exact normal distribution function (PyTorch's default).
struct GELU {
  static constexpr bool takes_packs = true;
  template <class T>
  T forward(const T& x) const {
    using S = detail::Scalar<T>;
    return S(0.5) * x * (S(1) + detail::error_function(T(x * S(1 / std::numbers::sqrt2))));
  }
  template <class T>
  T derivative(const T& any) const {
    using S = detail::Scalar<T>;
    const T x = detail::within_100(any);
    constexpr S kDensity = S(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
    const T slope = S(0.5) * (S(1) + detail::error_function(T(x * S(1 / std::numbers::sqrt2)))) +
                    x * kDensity * detail::exponential(T(x * x * S(-0.5)));
    return detail::or_nan(slope, any);
  }
};

/// The tanh approximation of GELU (the default of jax.nn.gelu; Grok-1, V-MoE):
/// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
struct GELUTanh {
  static constexpr bool takes_packs = true;
  template <class T>
  T forward(const T& x) const {
    using S = detail::Scalar<T>;
    return S(0.5) * x * (S(1) + detail::hyperbolic_tangent(inner(x)));
  }
  template <class T>
  T derivative(const T& any) const {
    using S = detail::Scalar<T>;
    const T x = detail::within_100(any);
    const T t = detail::hyperbolic_tangent(inner(x));
    const T slope =
        S(0.5) * (S(1) + t) + S(0.5) * x * (S(1) - t * t) * (scale<S> * (S(1) + S(3 * 0.044715) * x * x));
    return detail::or_nan(slope, any);
  }

 private:
  template <class S>
  static constexpr S scale = S(std::numbers::sqrt2* std::numbers::inv_sqrtpi);
  template <class T>
  static T inner(const T& x) {
    using S = detail::Scalar<T>;
    return scale<S> * (x + S(0.044715) * x * x * x);
  }
};

/// x / (1 + exp(-x)), also called swish.
struct SiLU {
  static constexpr bool takes_packs = true;
  template <class T>
  T forward(const T& x) const {
    return x * detail::logistic(x);
  }
  template <class T>
  T derivative(const T& x) const {
    using S = detail::Scalar<T>;
    const T s = detail::logistic(x);
    return s * (S(1) + x * (S(1) - s));
  }
};

/// act(g) * u for any unary activation: Shazeer 2020, "GLU Variants Improve Transformer", eq. 5 and 6.
template <class Activation>
struct Glu {
  static constexpr bool takes_packs = TakesPacks<Activation>;
  Activation activation{};
  template <class T>
  T forward(const T& g, const T& u) const {
    return activation.forward(g) * u;
  }
  template <class T>
  GluDerivative<T> derivative(const T& g, const T& u) const {
    return {T(activation.derivative(g) * u), T(activation.forward(g))};
  }
};

using SwiGLU = Glu<SiLU>;         ///< silu(g) * u
using GEGLU = Glu<GELU>;          ///< gelu(g) * u, the exact GELU
using GEGLUTanh = Glu<GELUTanh>;  ///< gelu(g) * u, the tanh approximation
using ReGLU = Glu<ReLU>;          ///< relu(g) * u

/// gpt-oss's gated unit: g' = min(g, limit), u' = clamp(u, -limit, limit), and
/// (u' + offset) * g' / (1 + exp(-alpha g')). The derivative is zero beyond a clamp.
struct ClampedSwiGLU {
  static constexpr bool takes_packs = true;
  double alpha = 1.702;  ///< of the sigmoid
  double limit = 7.0;    ///< of the clamps
  double offset = 1.0;   ///< added to u'

  template <class T>
  T forward(const T& g, const T& u) const {
    using S = detail::Scalar<T>;
    const T gate = detail::clamp(g, std::numeric_limits<S>::lowest(), S(limit));
    const T up = detail::clamp(u, S(-limit), S(limit));
    return (up + S(offset)) * (gate * detail::logistic(T(gate * S(alpha))));
  }
  template <class T>
  GluDerivative<T> derivative(const T& g, const T& u) const {
    using S = detail::Scalar<T>;
    const T gate = detail::clamp(g, std::numeric_limits<S>::lowest(), S(limit));
    const T up = detail::clamp(u, S(-limit), S(limit));
    const T s = detail::logistic(T(gate * S(alpha)));
    return {T((up + S(offset)) * (s + S(alpha) * (gate * s) * (S(1) - s)) *
              detail::inside(g, std::numeric_limits<S>::lowest(), S(limit))),
            T(gate * s * detail::inside(u, S(-limit), S(limit)))};
  }
};

namespace detail {

// Reads or writes `count` of a pack's 16 values.
template <class S>
Pack<S> load_pack(const S* from, Index count) {
  if (count == Pack<S>::SizeAtCompileTime) return Eigen::Map<const Pack<S>>(from);
  Pack<S> pack = Pack<S>::Zero();
  std::copy_n(from, count, pack.data());
  return pack;
}
template <class S>
void store_pack(const Pack<S>& pack, Index count, S* to) {
  std::copy_n(pack.data(), count, to);
}

// Calls f(first, count) for every pack of n elements.
template <class S, class F>
void for_each_pack(Index n, const F& f) {
  constexpr Index kSize = Pack<S>::SizeAtCompileTime;
  Index i = 0;
  for (; i + kSize <= n; i += kSize) f(i, kSize);
  if (i < n) f(i, n - i);
}

}  // namespace detail

/// out[i] = activation.forward(x[i]). O(n). In place is allowed.
template <class Activation, class S>
void activate(const Activation& activation, Index n, const S* x, S* out) {
  detail::for_each_pack<S>(n, [&](Index i, Index count) {
    const Pack<S> in = detail::load_pack(x + i, count);
    Pack<S> result;
    if constexpr (TakesPacks<Activation>) {
      result = activation.forward(in);
    } else {
      result = in.unaryExpr([&](S v) { return S(activation.forward(v)); });
    }
    detail::store_pack(result, count, out + i);
  });
}

/// d[i] *= activation.derivative(x[i]): turns the gradient by the output into that by x. O(n).
template <class Activation, class S>
void activate_backward(const Activation& activation, Index n, const S* x, S* d) {
  detail::for_each_pack<S>(n, [&](Index i, Index count) {
    const Pack<S> in = detail::load_pack(x + i, count);
    Pack<S> slope;
    if constexpr (TakesPacks<Activation>) {
      slope = activation.derivative(in);
    } else {
      slope = in.unaryExpr([&](S v) { return S(activation.derivative(v)); });
    }
    detail::store_pack(Pack<S>(detail::load_pack(d + i, count) * slope), count, d + i);
  });
}

/// out[i] = glu.forward(g[i], u[i]). O(n).
template <class Unit, class S>
void activate_gated(const Unit& glu, Index n, const S* g, const S* u, S* out) {
  detail::for_each_pack<S>(n, [&](Index i, Index count) {
    const Pack<S> gate = detail::load_pack(g + i, count), up = detail::load_pack(u + i, count);
    Pack<S> result;
    if constexpr (TakesPacks<Unit>) {
      result = glu.forward(gate, up);
    } else {
      for (Index j = 0; j < count; ++j) result[j] = S(glu.forward(gate[j], up[j]));
    }
    detail::store_pack(result, count, out + i);
  });
}

/// d_g[i] and d_u[i] from d_out[i]; d_g may be d_out itself. O(n).
template <class Unit, class S>
void activate_gated_backward(const Unit& glu, Index n, const S* g, const S* u, const S* d_out, S* d_g,
                             S* d_u) {
  detail::for_each_pack<S>(n, [&](Index i, Index count) {
    const Pack<S> gate = detail::load_pack(g + i, count), up = detail::load_pack(u + i, count);
    const Pack<S> d = detail::load_pack(d_out + i, count);
    Pack<S> by_gate, by_up;
    if constexpr (TakesPacks<Unit>) {
      const auto slope = glu.derivative(gate, up);
      by_gate = d * slope.by_gate;
      by_up = d * slope.by_up;
    } else {
      for (Index j = 0; j < count; ++j) {
        const auto slope = glu.derivative(gate[j], up[j]);
        by_gate[j] = d[j] * S(slope.by_gate);
        by_up[j] = d[j] * S(slope.by_up);
      }
    }
    detail::store_pack(by_gate, count, d_g + i);
    detail::store_pack(by_up, count, d_u + i);
  });
}

}  // namespace moe
