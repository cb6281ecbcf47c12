// SPDX-License-Identifier: MIT
#include "peers.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include <omp.h>
#include <dnnl.hpp>

namespace moe::bench {
namespace {

using dnnl::memory;

// Weights lie in oneDNN's own format; the activation is part of the products, which are made once for
// every number of rows. In bfloat16: weights and what is multiplied by them.
template <class T>
class OneDnnPeer : public Peer {
 public:
  OneDnnPeer(const PeerWeights& weights, int max_threads)
      : d_model_(weights.d_model),
        d_ff_(weights.d_ff),
        gated_(weights.gated),
        workers_(std::size_t(max_threads)) {
    // The format that oneDNN prefers for many rows does for few rows, too.
    const memory::desc up = preferred(kManyRows, d_model_, d_ff_, kType);
    const memory::desc down = preferred(kManyRows, d_ff_, d_model_, memory::data_type::f32);
    for (std::size_t e = 0; e < weights.up.size(); ++e) {
      if (gated_) gate_.push_back(reordered(weights.gate[e], up));
      up_.push_back(reordered(weights.up[e], up));
      down_.push_back(reordered(weights.down[e], down));
    }
  }

  void prepare(const DispatchPlan<float>& plan, int threads, Spread spread) override {
    const int inside = spread == Spread::products ? threads : 1;
    omp_set_num_threads(inside);
    for (Index e = 0; e < plan.num_experts(); ++e)
      if (const Index rows = plan.rows_of(e); rows > 0 && !made_.contains({rows, inside}))
        made_.emplace(std::pair(rows, inside), make(rows));
    omp_set_num_threads(int(workers_.size()));
  }

 protected:
  void begin(int threads, Spread spread) override {
    inside_ = spread == Spread::products ? threads : 1;
    omp_set_num_threads(inside_);
  }
  void end() override { omp_set_num_threads(int(workers_.size())); }

  void expert(Index e, const Matrix<float>& x, Index rows, const Index* token, float* out,
              Index worker) override {
    const Products& p = made_.at({rows, inside_});
    Worker& w = workers_[std::size_t(worker)];
    w.x.resize(rows, d_model_);
    w.gate.resize(rows, d_ff_);
    w.up.resize(rows, d_ff_);
    w.scratch.resize(p.scratch);
    for (Index i = 0; i < rows; ++i) convert(d_model_, &x(token[i], 0), w.x.row(i));
    const std::size_t i = std::size_t(e) % up_.size();
    memory in(p.in, engine_, w.x.data()), gate(p.hidden, engine_, w.gate.data()),
        up(p.hidden, engine_, w.up.data()), y(p.out, engine_, out);
    const auto run = [&](const dnnl::matmul& product, memory& from, memory& weight, memory& to) {
      std::unordered_map<int, memory> arguments{
          {DNNL_ARG_SRC, from},
          {DNNL_ARG_WEIGHTS, weight},
          {DNNL_ARG_DST, to},
          {DNNL_ARG_SCRATCHPAD, memory(p.scratch_of(product), engine_, w.scratch.data())}};
      if (&product == &p.up && gated_)
        arguments.insert({DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1, gate});
      product.execute(w.stream, arguments);
    };
    if (gated_) run(p.gate, in, gate_[i], gate);
    run(p.up, in, up_[i], up);
    run(p.down, up, down_[i], y);
    w.stream.wait();
  }

 private:
  static constexpr Index kManyRows = 64;
  static constexpr memory::data_type kType =
      sizeof(T) == 2 ? memory::data_type::bf16 : memory::data_type::f32;

  struct Products {
    dnnl::matmul gate, up, down;
    memory::desc in, hidden, out, gate_scratch, up_scratch, down_scratch;
    Index scratch;
    const memory::desc& scratch_of(const dnnl::matmul& product) const {
      return &product == &gate ? gate_scratch : &product == &up ? up_scratch : down_scratch;
    }
  };
  struct Worker {
    RowBuffer<T> x, gate, up;
    Buffer<char> scratch;
    dnnl::stream stream{engine()};
  };

  static dnnl::engine& engine() {
    static dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
    return cpu;
  }
  static memory::desc plain(Index rows, Index columns, memory::data_type type) {
    return {{rows, columns}, type, memory::format_tag::ab};
  }
  static dnnl::matmul::primitive_desc describe(Index rows, const memory::desc& weight, memory::data_type to,
                                               dnnl::post_ops after = {}) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    attributes.set_post_ops(after);
    const auto sizes = weight.dims();
    return {{plain(rows, sizes[0], kType), weight, plain(rows, sizes[1], to)}, attributes, engine()};
  }
  static memory::desc preferred(Index rows, Index in, Index out, memory::data_type to) {
    return describe(rows, {{in, out}, kType, memory::format_tag::any}, to).weights_desc();
  }
  static memory reordered(const Matrix<float>& w, const memory::desc& format) {
    memory from({{w.cols(), w.rows()}, memory::data_type::f32, memory::format_tag::ba}, engine(),
                const_cast<float*>(w.data()));
    memory to(format, engine());
    dnnl::stream stream(engine());
    dnnl::reorder(from, to).execute(stream, from, to);
    stream.wait();
    return to;
  }

  Products make(Index rows) const {
    dnnl::post_ops activation, multiply;
    const memory::desc hidden = plain(rows, d_ff_, kType);
    if (gated_) {
      activation.append_eltwise(1, dnnl::algorithm::eltwise_swish, 1, 0);
      multiply.append_binary(dnnl::algorithm::binary_mul, hidden);
    } else {
      multiply.append_eltwise(1, dnnl::algorithm::eltwise_relu, 0, 0);
    }
    const auto gate = describe(rows, up_[0].get_desc(), kType, gated_ ? activation : multiply);
    const auto up = describe(rows, up_[0].get_desc(), kType, multiply);
    const auto down = describe(rows, down_[0].get_desc(), memory::data_type::f32);
    const std::size_t scratch = std::max({gate.scratchpad_desc().get_size(), up.scratchpad_desc().get_size(),
                                          down.scratchpad_desc().get_size()});
    return {dnnl::matmul(gate),
            dnnl::matmul(up),
            dnnl::matmul(down),
            plain(rows, d_model_, kType),
            hidden,
            plain(rows, d_model_, memory::data_type::f32),
            gate.scratchpad_desc(),
            up.scratchpad_desc(),
            down.scratchpad_desc(),
            Index(scratch)};
  }

  static void convert(Index n, const float* from, float* to) { std::copy_n(from, n, to); }
  static void convert(Index n, const float* from, std::uint16_t* to) {
    for (Index i = 0; i < n; ++i) {  // there are no NaN here
      const auto bits = std::bit_cast<std::uint32_t>(from[i]);
      to[i] = std::uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
  }

  dnnl::engine& engine_ = engine();
  Index d_model_, d_ff_;
  bool gated_;
  int inside_ = 1;
  std::vector<memory> gate_, up_, down_;
  std::map<std::pair<Index, int>, Products> made_;  // by rows and threads
  std::vector<Worker> workers_;
};

}  // namespace

std::unique_ptr<Peer> onednn_peer(const PeerWeights& weights, int max_threads, bool bf16) {
  if (bf16) return std::make_unique<OneDnnPeer<std::uint16_t>>(weights, max_threads);
  return std::make_unique<OneDnnPeer<float>>(weights, max_threads);
}

}  // namespace moe::bench
