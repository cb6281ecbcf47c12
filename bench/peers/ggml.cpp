// SPDX-License-Identifier: MIT
#include "peers/ggml.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <utility>

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include "peers/peers.hpp"

namespace moe::bench {
namespace {

struct FreePool {
  void operator()(ggml_threadpool* pool) const { ggml_threadpool_free(pool); }
};

// What ggml says below a warning is dropped: a line for each tensor that it repacks.
void log(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

// Of tensors whose memory is elsewhere.
ggml_context_ptr make_context(std::size_t tensors) {
  ggml_context_ptr context(ggml_init({.mem_size = tensors * ggml_tensor_overhead() + ggml_graph_overhead(),
                                      .mem_buffer = nullptr,
                                      .no_alloc = true}));
  if (!context) throw std::bad_alloc();
  return context;
}

// A graph like llama.cpp's: all experts of a matrix in one tensor, three products by ids, gates, a sum.
class Experts : public GgmlLayer {
 public:
  Experts(const Shape& shape, ggml_type type)
      : top_k_(shape.top_k), backend_(ggml_backend_cpu_init()), weights_(make_context(3)) {
    if (!backend_) throw std::bad_alloc();
    const Index d_model = shape.d_model, d_ff = shape.d_ff, experts = shape.num_experts;
    gate_ = ggml_new_tensor_3d(weights_.get(), type, d_model, d_ff, experts);
    up_ = ggml_new_tensor_3d(weights_.get(), type, d_model, d_ff, experts);
    down_ = ggml_new_tensor_3d(weights_.get(), type, d_ff, d_model, experts);
    const ggml_backend_buffer_type_t buffer_type = best_buffer_type();
    memory_.reset(ggml_backend_alloc_ctx_tensors_from_buft(weights_.get(), buffer_type));
    if (!memory_) throw std::bad_alloc();
    buffer_type_ = ggml_backend_buft_name(buffer_type);
    ggml_backend_buffer_set_usage(memory_.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    quantise(shape, gate_, &Filled::gate);
    quantise(shape, up_, &Filled::up);
    quantise(shape, down_, &Filled::down);
    activations_.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
  }

  std::string buffer_type() const override { return buffer_type_; }

  double forward(const Matrix<float>& x, const Choices<float>& chosen, int threads) override {
    if (chosen.size() != x.rows() * top_k_) throw std::invalid_argument("ggml: every token has k experts");
    if (threads != threads_) make_threads(threads);
    if (!graph_ || x_->ne[2] != x.rows()) make_graph(x.rows());
    std::vector<std::int32_t> ids(std::size_t(chosen.size()));
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = std::int32_t(chosen.expert[Index(i)]);
    ggml_backend_tensor_set(x_, x.data(), 0, ggml_nbytes(x_));
    ggml_backend_tensor_set(ids_, ids.data(), 0, ggml_nbytes(ids_));
    ggml_backend_tensor_set(gates_, chosen.gate.data(), 0, ggml_nbytes(gates_));
    ggml_status status = GGML_STATUS_SUCCESS;
    ggml_threadpool_resume(pool_.get());
    const double seconds = seconds_of([&] { status = ggml_backend_graph_compute(backend_.get(), graph_); });
    ggml_threadpool_pause(pool_.get());  // else its threads wait actively while ours run
    if (status != GGML_STATUS_SUCCESS) throw std::runtime_error("ggml: the graph was not computed");
    y.resize(x.rows(), x.cols());
    ggml_backend_tensor_get(y_, y.data(), 0, ggml_nbytes(y_));
    return seconds;
  }

 private:
  // The first of the CPU's special buffer types that multiplies with all three by ids; else the plain one.
  ggml_backend_buffer_type_t best_buffer_type() const {
    ggml_backend_dev_t device = ggml_backend_get_device(backend_.get());
    const auto special =
        reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    for (auto type = special ? special(device) : nullptr; type && *type; ++type)
      if (multiplies(device, *type, gate_) && multiplies(device, *type, down_)) return *type;
    return ggml_backend_dev_buffer_type(device);
  }

  bool multiplies(ggml_backend_dev_t device, ggml_backend_buffer_type_t type, ggml_tensor* weight) const {
    const ggml_context_ptr context = make_context(3);
    ggml_context* const c = context.get();
    ggml_tensor* const rows = ggml_new_tensor_3d(c, GGML_TYPE_F32, weight->ne[0], top_k_, 1);
    ggml_tensor* const ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, top_k_, 1);
    ggml_tensor* const product = ggml_mul_mat_id(c, weight, rows, ids);
    const ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(type, 0));
    weight->buffer = empty.get();
    const bool supported = ggml_backend_dev_supports_op(device, product);
    weight->buffer = nullptr;
    return supported;
  }

  // A repacked tensor is set as a whole.
  static void quantise(const Shape& shape, ggml_tensor* to, Matrix<float> Filled::*matrix) {
    std::vector<std::byte> bytes(ggml_nbytes(to));
    ggml_quantize_init(to->type);
    run_on(kMaxThreads, to->ne[2], [&](Index e, Index) {
      const Filled w = make_weights(shape, e);
      ggml_quantize_chunk(to->type, (w.*matrix).data(), bytes.data() + std::size_t(e) * to->nb[2], 0,
                          to->ne[1], to->ne[0], nullptr);
    });
    ggml_backend_tensor_set(to, bytes.data(), 0, bytes.size());
  }

  void make_threads(int threads) {
    ggml_threadpool_params wanted = ggml_threadpool_params_default(threads);
    std::unique_ptr<ggml_threadpool, FreePool> pool(ggml_threadpool_new(&wanted));
    if (!pool) throw std::bad_alloc();
    ggml_backend_cpu_set_n_threads(backend_.get(), threads);
    ggml_backend_cpu_set_threadpool(backend_.get(), pool.get());
    pool_ = std::move(pool);
    threads_ = threads;
  }

  void make_graph(Index tokens) {
    const auto k = std::size_t(top_k_);
    graph_ = nullptr;
    context_ = make_context(2 * k + 16);
    ggml_context* const c = context_.get();
    x_ = ggml_new_tensor_3d(c, GGML_TYPE_F32, gate_->ne[0], 1, tokens);
    ids_ = ggml_new_tensor_2d(c, GGML_TYPE_I32, top_k_, tokens);
    gates_ = ggml_new_tensor_3d(c, GGML_TYPE_F32, 1, top_k_, tokens);
    for (ggml_tensor* input : {x_, ids_, gates_}) ggml_set_input(input);
    ggml_tensor* const up = ggml_mul_mat_id(c, up_, x_, ids_);
    ggml_tensor* const hidden = ggml_swiglu_split(c, ggml_mul_mat_id(c, gate_, x_, ids_), up);
    ggml_tensor* const rows = ggml_mul(c, ggml_mul_mat_id(c, down_, hidden, ids_), gates_);
    for (std::size_t i = 0; i < k; ++i) {
      ggml_tensor* const row = ggml_view_2d(c, rows, rows->ne[0], tokens, rows->nb[2], i * rows->nb[1]);
      y_ = i == 0 ? row : ggml_add(c, y_, row);
    }
    ggml_set_output(y_);
    ggml_cgraph* const graph = ggml_new_graph(c);
    ggml_build_forward_expand(graph, y_);
    if (!ggml_gallocr_alloc_graph(activations_.get(), graph)) throw std::bad_alloc();
    graph_ = graph;
  }

  Index top_k_;
  std::string buffer_type_;
  ggml_backend_ptr backend_;
  ggml_context_ptr weights_, context_;
  ggml_backend_buffer_ptr memory_;
  ggml_gallocr_ptr activations_;
  std::unique_ptr<ggml_threadpool, FreePool> pool_;
  int threads_ = 0;
  ggml_tensor *gate_, *up_, *down_;
  ggml_tensor *x_ = nullptr, *ids_ = nullptr, *gates_ = nullptr, *y_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
};

struct Pair {
  const char* format;
  ggml_type type;
  double largest_error;
};
constexpr Pair kPairs[] = {
    {"f32", GGML_TYPE_F32, 1e-4},         {"bf16", GGML_TYPE_BF16, 0.02},
    {"int8", GGML_TYPE_Q8_0, 0.03},       {"int4_offset", GGML_TYPE_Q4_1, 0.2},
    {"int4_offset", GGML_TYPE_Q4_K, 0.2}, {"int4", GGML_TYPE_Q4_0, 0.2},
    {"mxfp4", GGML_TYPE_MXFP4, 0.3},
};

}  // namespace

std::vector<GgmlForm> ggml_forms(const Shape& shape, const std::string& format) {
  ggml_log_set(log, nullptr);
  std::vector<GgmlForm> forms;
  for (const Pair& pair : kPairs) {
    const Index block = ggml_blck_size(pair.type);
    if (format != pair.format || shape.d_model % block != 0 || shape.d_ff % block != 0) continue;
    const std::string type = ggml_type_name(pair.type);
    forms.push_back({.type = type,
                     .counter = forms.empty() ? "ggml" : "ggml_" + type,
                     .largest_error = pair.largest_error,
                     .layer = std::make_unique<Experts>(shape, pair.type)});
  }
  return forms;
}

}  // namespace moe::bench
