// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/output.hpp>
#include <moe/kernels/select.hpp>
#include <moe/layers/apply_experts.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/packed/bf16.hpp>
#include <moe/packed/expert_formats.hpp>
#include <moe/packed/float32.hpp>
#include <moe/packed/format.hpp>
#include <moe/packed/keep_experts.hpp>
#include <moe/packed/pack_options.hpp>
#include <moe/packed/packed_experts.hpp>
#include <moe/packed/packed_format.hpp>
#include <moe/packed/packed_output.hpp>

// A layer for inference: the router and the plan of a MoELayer, with the experts' weights laid out for
// kernels that are chosen for the processor while the program runs.
namespace moe {

/// What a packed layer has beside its experts, as MoELayer's members of these names.
template <Router R>
struct PackedParts {
  R router;                       ///< who chooses
  Index num_shared_experts = 0;   ///< the last ones of the experts
  Matrix<float> w_shared_gate{};  ///< [shared experts, d_model], empty unless they are gated
  Vector<float> b_output{};       ///< [d_model], empty without output bias
};

/// Buffers of a packed layer's forward. Reused, they allocate nothing.
struct PackedWorkspace : LayerWorkspace<float> {
  PackedExpertsWorkspace packed;  ///< what packed experts work in

  template <class F>
  void for_each_array(const F& f) const {
    LayerWorkspace<float>::for_each_array(f);
    f(packed);
  }
};

/// The inference form of a MoELayer<E, R>: same router, same plan, same semantics; each expert's weights in a
/// format (F32, BF16 or another). Made by pack(). Experts without a packed form run as they are. The output
/// of a token does not depend, by a bit, on the executor or, where nothing is dropped, on the tokens beside
/// it. Beside the layer it was made from it differs in rounding alone. Every call takes O(tokens *
/// num_experts * d_model + assignments * d_model * d_ff) operations and throws std::invalid_argument, before
/// anything is written, where shapes do not fit.
template <Expert E, Router R>
class PackedMoELayer {
 public:
  using Scalar = float;
  using Workspace = PackedWorkspace;
  static_assert(std::is_same_v<typename E::Scalar, float>, "only layers of float can be packed");

  /// Takes the experts, routed and then shared, from expert(0), expert(1), ... one at a time: each may be
  /// freed before the next is made. A source that wants to know the format F of an expert is called as
  /// expert(e, F()). Where E has a packed form, any other that has one will do, e.g. one whose weights are in
  /// blocks. Throws std::invalid_argument where the processor does not have what the options ask for, where
  /// shapes do not fit, and for an expert without a format, which is seen before the first one is asked for.
  template <Format... F, class Source>
  PackedMoELayer(const ExpertFormats<F...>& formats, PackedParts<R> parts, Source&& expert,
                 const PackOptions& options = {})
      : parts_(std::move(parts)), set_(choose_set(formats, options)), experts_(no_experts()) {
    check_parts();
    const std::vector<bool> kept = keep_experts(options, parts_.router, num_shared_experts());
    for (Index e = 0; e < count(); ++e)
      if (kept[std::size_t(e)])
        formats.visit(e, [&](auto format) { add(format, e, expert, options); });
      else if constexpr (kPackable)
        experts_.leave_out();
      else
        fail("pack: expert ", e, " is to be left out, but has no packed form, expected all to be kept");
  }
  /// The same with the experts of a layer.
  template <Format... F>
  PackedMoELayer(const ExpertFormats<F...>& formats, const MoELayer<E, R>& layer,
                 const PackOptions& options = {})
      : PackedMoELayer(
            formats, {layer.router(), layer.num_shared_experts(), layer.w_shared_gate, layer.b_output},
            [&layer](Index e) -> const E& {
              const Index routed = layer.num_experts();
              return e < routed ? layer.experts()[std::size_t(e)]
                                : layer.shared_experts()[std::size_t(e - routed)];
            },
            options) {}

  /// The same with experts that are packed already, e.g. in a mapped file. Throws as above, and for another
  /// number of experts.
  PackedMoELayer(PackedParts<R> parts, PackedExperts experts) requires PackableExpert<E>
      : parts_(std::move(parts)), set_(experts.instruction_set()), experts_(std::move(experts)) {
    check_parts();
    require(experts_.size() == count(), "PackedMoELayer: ", experts_.size(), " experts, expected ", count());
    require(experts_.d_model() == d_model(),
            "PackedMoELayer: the experts have d_model = ", experts_.d_model(), ", but the router has ",
            d_model());
  }

  Index d_model() const { return parts_.router.d_model(); }
  Index num_experts() const { return parts_.router.num_experts(); }
  Index num_shared_experts() const { return parts_.num_shared_experts; }
  const R& router() const { return parts_.router; }
  /// What it has beside its experts.
  const PackedParts<R>& parts() const { return parts_; }
  /// Its experts, routed and then shared.
  const PackedExperts& packed_experts() const requires PackableExpert<E> { return experts_; }
  /// Whose kernels it uses.
  InstructionSet instruction_set() const { return set_; }

  /// What the packed experts take.
  std::size_t memory_bytes() const requires PackableExpert<E> { return experts_.memory_bytes(); }

  /// The routing of x [tokens, d_model] for inference, by the router.
  template <Executor Ex = DefaultExecutor>
  Routing<float> route(const ConstMatrixRef<float>& x, const BatchInfo& info = {},
                       const Ex& executor = {}) const {
    check_input(x);
    Routing<float> routing;
    RouterWorkspace<float> workspace;
    route_with(parts_.router, x, info, routing, workspace, executor);
    return routing;
  }

  /// Output [tokens, d_model] for x [tokens, d_model].
  template <Executor Ex = DefaultExecutor>
  Matrix<float> forward(const ConstMatrixRef<float>& x, const BatchInfo& info = {},
                        const Ex& executor = {}) const {
    Workspace workspace;
    Matrix<float> y(x.rows(), x.cols());
    forward(x, y, workspace, info, executor);
    return y;
  }

  /// The same. y is a Matrix<float>, which is resized, or a view of the right shape: see Output. But for that
  /// nothing is allocated once the workspace has had such a call with as many tokens and groups. x, y and the
  /// workspace lie apart.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<float>& x, const Output<float>& y, Workspace& workspace,
               const BatchInfo& info = {}, const Ex& executor = {}) const {
    check_input(x);
    y.check(x.rows(), d_model(), "PackedMoELayer::forward", "y");
    check_apart(x, y, workspace);
    route_with(parts_.router, x, info, workspace.routing, workspace.router, executor);
    run(x, workspace.routing.plan, y, workspace, executor);
  }

  /// Makes room in a workspace for batches of up to so many tokens, in as many groups as `info` has: by a
  /// forward pass of that many zeros. A router of your own may still need more for other tokens.
  template <Executor Ex = DefaultExecutor>
  void reserve(Workspace& workspace, Index max_tokens, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    require(max_tokens >= 0, "reserve: max_tokens = ", max_tokens, ", expected 0 or more");
    Matrix<float> y;
    forward(Matrix<float>::Zero(max_tokens, d_model()), y, workspace, info, executor);
  }

  /// Output under a routing of these tokens that was made before.
  template <std::same_as<Routing<float>> Made, Executor Ex = DefaultExecutor>
  Matrix<float> forward(const ConstMatrixRef<float>& x, const Made& routing, const Ex& executor = {}) const {
    Workspace workspace;
    Matrix<float> y;
    forward(x, routing, y, workspace, executor);
    return y;
  }

  /// The same. The routing may be workspace.routing; y lies apart from all others.
  template <std::same_as<Routing<float>> Made, Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<float>& x, const Made& routing, const Output<float>& y,
               Workspace& workspace, const Ex& executor = {}) const {
    check_input(x);
    y.check(x.rows(), d_model(), "PackedMoELayer::forward", "y");
    check_apart(x, y, workspace);
    require_apart("PackedMoELayer::forward", "y", y, "routing", routing);
    run(x, routing.plan, y, workspace, executor);
  }

  // ---- What is none of these: one error of the compiler's in place of a list of all.

  /// Does not compile: x is not a matrix of the layer's scalar.
  template <NotAMatrixOf<float> X, class... Rest>
  Matrix<float> forward(X&&, Rest&&...) const {
    static_assert(kNever<X>, "PackedMoELayer::forward: x is not a matrix of the layer's scalar");
    return {};
  }
  /// Does not compile: these are not arguments of a forward pass.
  template <class Layer = PackedMoELayer>
  Matrix<float> forward(...) const {
    static_assert(kNever<Layer>,
                  "PackedMoELayer::forward takes (x), (x, y, workspace), each with info and executor behind "
                  "them, (x, routing), (x, routing, y, workspace), each with an executor");
    return {};
  }

 private:
  static constexpr bool kPackable = PackableExpert<E>;
  using Experts = std::conditional_t<kPackable, PackedExperts, GroupedExperts<E>>;  // routed, then shared

  Index count() const { return num_experts() + num_shared_experts(); }

  void check_parts() const {
    if (parts_.w_shared_gate.size() > 0)
      require_shape(parts_.w_shared_gate, parts_.num_shared_experts, d_model(), "pack", "w_shared_gate");
    check_shared_gates(parts_.w_shared_gate.rows(), gate_side_of(parts_.router).value_or(GateSide::output),
                       "pack");
    require(parts_.b_output.size() == 0 || parts_.b_output.size() == d_model(), "pack: b_output has ",
            parts_.b_output.size(), " entries, expected d_model = ", d_model());
  }

  // Whether asked(format) is true of the format of some expert.
  template <class Formats, class Ask>
  bool any(const Formats& formats, const Ask& asked) const {
    bool found = false;
    for (Index e = 0; e < count(); ++e) formats.visit(e, [&](auto format) { found |= asked(format); });
    return found && kPackable;
  }

  template <class Formats>
  InstructionSet choose_set(const Formats& formats, const PackOptions& options) const {
    require(parts_.num_shared_experts >= 0, "pack: num_shared_experts = ", parts_.num_shared_experts,
            ", expected at least 0");
    const bool any_dot_format = any(formats, []<Format F>(F) { return DotFormat<F>; });
    const bool any_int8_format = any(formats, []<Format F>(F) { return Int8Format<F>; });
    require(any_dot_format || !options.bf16_dot_product,
            "pack: bf16_dot_product = true, but the weights are not packed as BF16, expected false");
    require(
        any_int8_format || !options.int8_activations,
        "pack: int8_activations = true, but the weights are not packed as Int8, Int4, Int4Offset or MXFP4, "
        "expected false");
    require(options.importance.empty() || Index(options.importance.size()) == count(), "pack: importance of ",
            options.importance.size(), " experts, expected ", count());
    require(options.importance.empty() || any(formats, []<Format F>(F) { return WeightedFormat<F>; }),
            "pack: importance is given, but the weights are not packed as Int8 or Int4, expected none");
    const auto has_int8 = [&](InstructionSet set) {
      return any(formats, [set]<Format F>(F) { return int8_product_of<F>(set) != nullptr; });
    };
    InstructionSet set = options.instruction_set.value_or(best_instruction_set());
    if (!options.instruction_set) {
      // AMX is asked for only where it is used: leave to use its tiles changes what signal stacks Linux
      // accepts.
      if (any_dot_format && is_available(InstructionSet::amx)) set = InstructionSet::amx;
      // AVX-512 without VNNI.
      if (options.int8_activations && !has_int8(set)) set = InstructionSet::avx2;
    }
    require(is_available(set), "pack: this processor does not have ", name_of(set),
            ", the best that it has is ", name_of(best_instruction_set()));
    const auto has_dot = [set]<Format F>(F) { return dot_product_of<F>(set, true) != nullptr; };
    require(!options.bf16_dot_product || any(formats, has_dot),
            "pack: bf16_dot_product = true, but this processor has none for ", name_of(set),
            ", expected false");
    require(!options.int8_activations || has_int8(set),
            "pack: int8_activations = true, but this processor has no such product for ", name_of(set),
            ", expected false");
    return set;
  }

  Experts no_experts() const {
    if constexpr (kPackable)
      return Experts(set_, d_model());
    else
      return {};
  }

  template <Format F, class Source>
  static decltype(auto) made(Source& source, Index e, F format) {
    if constexpr (std::invocable<Source&, Index, F>)
      return source(e, format);
    else
      return source(e);
  }

  // Activations are rounded where the format has a product for that.
  template <Format F, class Source>
  void add(F format, Index e, Source& source, const PackOptions& options) {
    const auto& expert = made(source, e, format);
    require(expert.d_model() == d_model(), "pack: expert ", e, " has d_model = ", expert.d_model(),
            ", but the router has ", d_model());
    if constexpr (kPackable)
      experts_.add(format, expert,
                   {.to_bfloat16 = options.bf16_dot_product && dot_product_of<F>(set_, true),
                    .to_int8 = options.int8_activations && int8_product_of<F>(set_)},
                   options.importance.empty() ? ExpertImportance{} : options.importance[std::size_t(e)]);
    else
      experts_.insert(e, expert);
  }

  void check_input(const ConstMatrixRef<float>& x) const {
    require(x.cols() == d_model(), "PackedMoELayer::forward: x has ", x.cols(),
            " columns, expected d_model = ", d_model(), "; tokens are rows");
  }

  // Throws unless what a forward pass writes, y and the workspace, lies apart from the rest.
  static void check_apart(const ConstMatrixRef<float>& x, const Output<float>& y,
                          const Workspace& workspace) {
    require_apart("PackedMoELayer::forward", "y", y, "x", x, "the workspace", workspace);
    require_apart("PackedMoELayer::forward", "the workspace", workspace, "x", x);
  }

  // Every forward pass comes here, and checks its plan here.
  template <class Ex>
  void run(const ConstMatrixRef<float>& x, const DispatchPlan<float>& routed, const Output<float>& result,
           Workspace& workspace, const Ex& executor) const {
    const CheckedPlan<float> checked(routed, x.rows(), num_experts(), "PackedMoELayer::forward");
    const DispatchPlan<float>& plan =
        add_shared_experts(x, *checked, num_shared_experts(), parts_.w_shared_gate, workspace.all_experts,
                           workspace.shared_gate, executor);
    MatrixRef<float> y = result.of_shape(x.rows(), d_model(), "PackedMoELayer::forward", "y");
    const PackedOutput output{x, plan, parts_.b_output, y};
    if constexpr (kPackable) {
      ActivationRows rows{x.data(), x.outerStride(), plan.token.data()};
      if (plan.gate_side == GateSide::input) {
        dispatch(x, CheckedPlan<float>::trusted(plan), workspace.x_rows, executor);
        rows = {workspace.x_rows.row(0), d_model()};
      }
      experts_.forward(rows, CheckedPlan<float>::trusted(plan), y, output, workspace.packed, executor);
    } else {  // experts without a packed form, as they are
      apply_experts(x, CheckedPlan<float>::trusted(plan), experts_, y, workspace, workspace.expert_workspace,
                    executor);
      output.end({0, y.rows(), 0, y.cols()});
    }
  }

  PackedParts<R> parts_;
  InstructionSet set_;
  Experts experts_;
};

/// The inference form of a layer. O(parameters). Throws std::invalid_argument where the processor does
/// not have the instruction set that the options name.
/// @code
/// moe::Rng rng(1);
/// moe::MoELayer layer(moe::make_experts<moe::FeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng),
///                     moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng));
/// const auto fast = moe::pack<moe::F32>(layer);
/// const moe::Matrix<float> x = moe::Matrix<float>::Ones(3, 8);
/// assert((fast.forward(x) - layer.forward(x)).norm() < 1e-4f);
/// @endcode
template <Format F, Expert E, Router R>
PackedMoELayer<E, R> pack(const MoELayer<E, R>& layer, const PackOptions& options = {}) {
  return {ExpertFormats<F>{}, layer, options};
}

/// The same with experts in several formats: format_of(e) is the position in the list, from 0, of expert e's,
/// routed experts first and then shared ones. It may be asked several times. Throws std::invalid_argument for
/// a position that is none, too.
/// @code
/// moe::Rng rng(1);
/// const auto experts = moe::make_experts<moe::FeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng);
/// const moe::TopKRouter<float> router({.d_model = 8, .num_experts = 4, .top_k = 2}, rng);
/// const moe::MoELayer layer(experts, router, {experts});
/// const auto fast = moe::pack<moe::Int4, moe::Int8>(layer, [](moe::Index e) { return e < 4 ? 0 : 1; });
/// assert(fast.memory_bytes() < moe::pack<moe::Int8>(layer).memory_bytes());
/// @endcode
template <Format... F, Expert E, Router R, std::invocable<Index> FormatOf>
PackedMoELayer<E, R> pack(const MoELayer<E, R>& layer, FormatOf&& format_of,
                          const PackOptions& options = {}) {
  return {ExpertFormats<F...>{std::forward<FormatOf>(format_of)}, layer, options};
}

/// The same from experts that are made one at a time: expert(0), ..., routed and then shared. At any
/// time there is one of them beside the packed ones.
/// Example: `pack<BF16>(PackedParts{router}, [&](Index e) { return read_expert(file, e); })`
template <Format F, Router R, std::invocable<Index> Source>
auto pack(PackedParts<R> parts, Source&& expert, const PackOptions& options = {}) {
  using E = std::remove_cvref_t<std::invoke_result_t<Source, Index>>;
  return PackedMoELayer<E, R>(ExpertFormats<F>{}, std::move(parts), std::forward<Source>(expert), options);
}

/// The same with experts in several formats.
/// Example: `pack<Int4, Int8>(PackedParts{router}, read, [](Index e) { return e < 8 ? 0 : 1; })`
template <Format... F, Router R, std::invocable<Index> Source, std::invocable<Index> FormatOf>
auto pack(PackedParts<R> parts, Source&& expert, FormatOf&& format_of, const PackOptions& options = {}) {
  using E = std::remove_cvref_t<std::invoke_result_t<Source, Index>>;
  return PackedMoELayer<E, R>(ExpertFormats<F...>{std::forward<FormatOf>(format_of)}, std::move(parts),
                              std::forward<Source>(expert), options);
}

}  // namespace moe

#if defined(MOE_COMPILED) && MOE_COMPILED == EIGEN_MAX_ALIGN_BYTES && !defined(_GLIBCXX_DEBUG)
#include <moe/packed/compiled.inc>
#endif
