// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

// Random numbers that are the same with every standard library. (The standard's engines are portable,
// its distributions are not.)
namespace moe {

/// The generator xoshiro256++ (Blackman and Vigna 2018), seeded through splitmix64. A value: copying
/// it copies the stream. Satisfies std::uniform_random_bit_generator.
/// @code
/// moe::Rng rng(42);
/// const moe::Rng::State saved = rng.state();
/// const double drawn = rng.normal();
/// rng.set_state(saved);
/// assert(rng.normal() == drawn && rng.index(6) < 6);
/// @endcode
class Rng {
 public:
  /// What a step gives.
  using result_type = std::uint64_t;

  /// Equal seeds give equal streams.
  explicit Rng(std::uint64_t seed = 0) {
    for (auto& word : state_) {
      seed += 0x9e3779b97f4a7c15u;
      std::uint64_t z = seed;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      word = z ^ (z >> 31);
    }
  }

  /// The least that a step gives.
  static constexpr result_type(min)() { return 0; }
  /// The most that a step gives.
  static constexpr result_type(max)() { return ~result_type(0); }

  /// One step: 64 random bits.
  result_type operator()() {
    const std::uint64_t result = std::rotl(state_[0] + state_[3], 23) + state_[0];
    const std::uint64_t shifted = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = std::rotl(state_[3], 45);
    return result;
  }

  /// Uniform in [0, 1), a multiple of 2^-53. One step of the generator.
  double uniform() { return double((*this)() >> 11) * 0x1p-53; }

  /// Uniform in [low, high).
  double uniform(double low, double high) { return low + (high - low) * uniform(); }

  /// Uniform integer in [0, n) by the upper bits of a product (bias below n / 2^53). Throws
  /// std::invalid_argument unless n is positive.
  Index index(Index n) {
    require(n > 0, "Rng::index: n = ", n, ", expected at least 1");
    return Index(uniform() * double(n));
  }

  /// Normal with mean 0 and standard deviation 1 (Box and Muller 1958). Two steps of the generator.
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }

  /// What the stream goes on from: saved and set again, it goes on as if nothing had been.
  using State = std::array<std::uint64_t, 4>;
  /// The state, to be saved.
  const State& state() const { return state_; }
  /// Throws std::invalid_argument for four zeros, which only zeros follow.
  void set_state(const State& state) {
    require(state != State{}, "Rng::set_state: 4 words of 0, expected one of another value");
    state_ = state;
  }

  friend bool operator==(const Rng&, const Rng&) = default;

 private:
  State state_;
};

}  // namespace moe
