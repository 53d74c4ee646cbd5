// WKV-6 for the CPU, and the binding: the operators wkv6::forward and wkv6::backward.
//
// Per batch element and head, with decay d_t = exp(-exp(w_t)) per key channel i, value channel j, state S (N x N):
//
//     y_t[j] = sum_i r_t[i] S_{t-1}[i][j] + (sum_i r_t[i] u[i] k_t[i]) v_t[j]
//     S_t[i][j] = d_t[i] S_{t-1}[i][j] + k_t[i] v_t[j]
//
// What is clever here: nothing is divided by a decay and nothing is subtracted that nearly cancels, so results are exact
// for every decay. A token costs 3 vector operations per 16 (AVX-512) elements of the state, which stays in the L1 cache.
// The backward pass is three more walks of the same kind. S and its gradient G are walked transposed where the sum runs over
// j, so that every inner loop runs along contiguous memory and sums nothing across lanes:
//
//     forward in time:   gr_t[i] = sum_j gy_t[j] S_{t-1}[i][j]                       on S^T, kept at every CHUNK-th token
//     backward in time:  gk_t[i] = sum_j v_t[j] G_t[i][j]                            on G^T
//                        d(log d_t)[i] = d_t[i] sum_j G_t[i][j] S_{t-1}[i][j]        on G^T and S^T, walked again inside the chunk
//                        gv_t[j] = sum_i k_t[i] G_t[i][j]                            on G
//                        G_{t-1} = diag(d_t) G_t + r_t gy_t^T
//
// The u terms are added where they belong. Batch elements and heads run in parallel. T is a run-time argument.
// The CUDA kernels (wkv6_cuda.cu) will register themselves under the same two names for the CUDA dispatch key.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t CHUNK = 32;  // tokens between two kept states: 32 states of 64 x 64 are 512 KiB, an L2 cache's worth

// A row of N floats held in registers.
template <int N>
struct Row {
  static constexpr int V = N / Vec::size();
  Vec lanes[V];
  explicit Row(float x) { for (auto& lane : lanes) lane = Vec(x); }
  explicit Row(const float* p) { for (int c = 0; c < V; c++) lanes[c] = Vec::loadu(p + c * Vec::size()); }
  void store(float* p) const { for (int c = 0; c < V; c++) lanes[c].store(p + c * Vec::size()); }
};

// out[j] = sum_i p[i] M[i][j], then M[i][j] = d[i] M[i][j] + a[i] b[j]: the decay belongs to the rows of M.
template <int N>
void step(float* M, const float* p, const float* d, const float* a, const float* b, float* out) {
  Row<N> sum(0.f), b_row(b);
  for (int i = 0; i < N; i++) {
    const Vec p_i(p[i]), d_i(d[i]), a_i(a[i]);
    float* m = M + i * N;
    for (int c = 0; c < Row<N>::V; c++, m += Vec::size()) {
      const Vec x = Vec::loadu(m);
      sum.lanes[c] = at::vec::fmadd(p_i, x, sum.lanes[c]);
      at::vec::fmadd(d_i, x, a_i * b_row.lanes[c]).store(m);
    }
  }
  sum.store(out);
}

// The same with the decay along the columns: M[j][i] = d[i] M[j][i] + a[j] b[i]. With `other`, also dot[i] = sum_j M[j][i] other[j][i],
// and with `next`, the new M goes there and the old one stays.
template <int N, bool WITH_OTHER = false>
void step_transposed(const float* M, const float* p, const float* d, const float* a, const float* b, float* out, float* next,
                     const float* other = nullptr, float* dot = nullptr) {
  Row<N> sum(0.f), dots(0.f), d_row(d), b_row(b);
  for (int j = 0; j < N; j++) {
    const Vec p_j(p[j]), a_j(a[j]);
    for (int c = 0; c < Row<N>::V; c++) {
      const int at = j * N + c * Vec::size();
      const Vec x = Vec::loadu(M + at);
      sum.lanes[c] = at::vec::fmadd(p_j, x, sum.lanes[c]);
      if constexpr (WITH_OTHER) dots.lanes[c] = at::vec::fmadd(x, Vec::loadu(other + at), dots.lanes[c]);
      at::vec::fmadd(d_row.lanes[c], x, a_j * b_row.lanes[c]).store(next + at);
    }
  }
  sum.store(out);
  if constexpr (WITH_OTHER) dots.store(dot);
}

// sum_i a[i] b[i] c[i]
template <int N>
float dot(const float* a, const float* b, const float* c = nullptr) {
  Vec sum(0.f);
  for (int i = 0; i < N; i += Vec::size()) {
    const Vec b_i = Vec::loadu(b + i);
    sum = at::vec::fmadd(Vec::loadu(a + i), c ? b_i * Vec::loadu(c + i) : b_i, sum);
  }
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum);
}

template <int N>
void transpose(const float* from, float* to) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) to[j * N + i] = from[i * N + j];
}

// One head's (T, N) slice of a (B, T, H, N) tensor: reads a token as floats, writes floats as a token.
template <typename scalar, int N>
struct Slice {
  scalar* data;
  int64_t stride;
  Slice(const Tensor& x, int64_t b, int64_t h)
      : data(x.data_ptr<scalar>() + (b * x.size(1) * x.size(2) + h) * N), stride(x.size(2) * N) {}
  void read(int64_t t, float* to) const { for (int i = 0; i < N; i++) to[i] = static_cast<float>(data[t * stride + i]); }
  void write(int64_t t, const float* from) const { for (int i = 0; i < N; i++) data[t * stride + i] = static_cast<scalar>(from[i]); }
};

// log d = -exp(w) and d = exp(log d) of one head, (T, N) each. A float32 d near 1 is off by up to 3e-8, and thousands of them
// multiplied drift: so each d takes the rounding error of those before it along, and their product stays right to one rounding.
template <int N>
void decays(const Slice<float, N>& w, int64_t T, float* log_d, float* d) {
  using Vecd = at::vec::Vectorized<double>;
  double carry[N], exact[N];
  for (auto& c : carry) c = 1;
  for (int64_t t = 0; t < T; t++, log_d += N, d += N) {
    w.read(t, log_d);
    for (int i = 0; i < N; i += Vec::size()) Vec::loadu(log_d + i).exp().neg().store(log_d + i);
    for (int i = 0; i < N; i++) exact[i] = log_d[i];
    for (int i = 0; i < N; i += Vecd::size()) Vecd::loadu(exact + i).exp().store(exact + i);
    for (int i = 0; i < N; i++) {
      const double x = exact[i] * carry[i];
      d[i] = static_cast<float>(x);
      carry[i] = d[i] > 1e-30f ? x / d[i] : 1;
    }
  }
}

template <typename scalar, int N>
void forward_head(int64_t b, int64_t h, const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_,
                  const Tensor& y_, const Tensor& state_, float* scratch) {
  const Slice<scalar, N> r(r_, b, h), k(k_, b, h), v(v_, b, h), y(y_, b, h);
  const int64_t T = r_.size(1), H = r_.size(2);
  const float* u = u_.data_ptr<float>() + h * N;
  float* S = state_.data_ptr<float>() + (b * H + h) * N * N;
  float *log_d = scratch, *d = log_d + T * N;
  decays(Slice<float, N>(w_, b, h), T, log_d, d);
  float rt[N], kt[N], vt[N], yt[N];
  for (int64_t t = 0; t < T; t++) {
    r.read(t, rt), k.read(t, kt), v.read(t, vt);
    step<N>(S, rt, d + t * N, kt, vt, yt);
    const float ruk = dot<N>(rt, u, kt);
    for (int j = 0; j < N; j++) yt[j] += ruk * vt[j];
    y.write(t, yt);
  }
}

template <typename scalar, int N>
void backward_head(int64_t b, int64_t h, const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_,
                   const Tensor& state_, const Tensor& gy_, const Tensor& gr_, const Tensor& gk_, const Tensor& gv_,
                   const Tensor& gw_, const Tensor& gu_, const Tensor& gstate_, float* scratch) {
  const Slice<scalar, N> r(r_, b, h), k(k_, b, h), v(v_, b, h), gy(gy_, b, h), gr(gr_, b, h), gk(gk_, b, h), gv(gv_, b, h);
  const Slice<float, N> w(w_, b, h), gw(gw_, b, h);
  const int64_t T = r_.size(1), H = r_.size(2), NN = N * N;
  const float* u = u_.data_ptr<float>() + h * N;
  float* gu = gu_.data_ptr<float>() + (b * H + h) * N;
  float* G = gstate_.data_ptr<float>() + (b * H + h) * NN;  // dL/dS_t, from the last token to the first
  float *log_d = scratch, *d = log_d + T * N, *S_t = d + T * N, *G_t = S_t + NN, *history = G_t + NN, *kept = history + CHUNK * NN;
  decays(w, T, log_d, d);
  float rt[N], kt[N], vt[N], gyt[N], out[N], gs[N];

  transpose<N>(state_.data_ptr<float>() + (b * H + h) * NN, S_t);
  for (int64_t t = 0; t < T; t++) {
    if (t % CHUNK == 0) std::copy(S_t, S_t + NN, kept + t / CHUNK * NN);
    k.read(t, kt), v.read(t, vt), gy.read(t, gyt);
    step_transposed<N>(S_t, gyt, d + t * N, vt, kt, out, S_t);
    const float vgy = dot<N>(vt, gyt);
    for (int i = 0; i < N; i++) out[i] += u[i] * kt[i] * vgy;
    gr.write(t, out);
  }

  transpose<N>(G, G_t);
  for (int i = 0; i < N; i++) gu[i] = 0;
  for (int64_t start = (T - 1) / CHUNK * CHUNK; start >= 0; start -= CHUNK) {
    const int64_t end = std::min(start + CHUNK, T);
    std::copy(kept + start / CHUNK * NN, kept + (start / CHUNK + 1) * NN, history);
    for (int64_t t = start; t + 1 < end; t++) {
      k.read(t, kt), v.read(t, vt);
      float* S = history + (t - start) * NN;
      step_transposed<N>(S, vt, d + t * N, vt, kt, out, S + NN);
    }
    for (int64_t t = end - 1; t >= start; t--) {
      r.read(t, rt), k.read(t, kt), v.read(t, vt), gy.read(t, gyt);
      step_transposed<N, true>(G_t, vt, d + t * N, gyt, rt, out, G_t, history + (t - start) * NN, gs);
      const float vgy = dot<N>(vt, gyt), ruk = dot<N>(rt, u, kt);
      for (int i = 0; i < N; i++) {
        out[i] += u[i] * rt[i] * vgy;
        gu[i] += rt[i] * kt[i] * vgy;
        gs[i] *= d[t * N + i] * log_d[t * N + i];  // d log d / d w = log d
      }
      gk.write(t, out);
      gw.write(t, gs);
      step<N>(G, kt, d + t * N, rt, gyt, out);
      for (int j = 0; j < N; j++) out[j] += ruk * gyt[j];
      gv.write(t, out);
    }
  }
}

void check(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, const Tensor& state) {
  TORCH_CHECK(r.dim() == 4, "wkv6: r must be (B, T, H, N), not ", r.sizes());
  const auto B = r.size(0), H = r.size(2), N = r.size(3);
  TORCH_CHECK(k.sizes() == r.sizes() && v.sizes() == r.sizes() && w.sizes() == r.sizes(), "wkv6: r, k, v, w must have one shape");
  TORCH_CHECK(k.dtype() == r.dtype() && v.dtype() == r.dtype(), "wkv6: r, k, v must have one dtype");
  TORCH_CHECK(u.sizes() == at::IntArrayRef({H, N}), "wkv6: u must be (H, N), not ", u.sizes());
  TORCH_CHECK(state.sizes() == at::IntArrayRef({B, H, N, N}) && state.scalar_type() == at::kFloat, "wkv6: state must be float32 (B, H, N, N)");
}

// Calls body(b, h, scalar of r, N, scratch) for every batch element and head, in parallel; scalar and N are compile-time constants.
template <typename F>
void for_each_head(const Tensor& r, int64_t scratch_size, F body) {
  auto with_n = [&](auto scalar, auto n) {
    at::parallel_for(0, r.size(0) * r.size(2), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(scratch_size);
      for (int64_t bh = begin; bh < end; bh++) body(bh / r.size(2), bh % r.size(2), scalar, n, scratch.data());
    });
  };
  auto with_scalar = [&](auto scalar) {
    switch (r.size(3)) {
      case 32: return with_n(scalar, std::integral_constant<int, 32>());
      case 64: return with_n(scalar, std::integral_constant<int, 64>());
      case 128: return with_n(scalar, std::integral_constant<int, 128>());
      default: TORCH_CHECK(false, "wkv6: head size ", r.size(3), " is not compiled in: 32, 64, 128 are");
    }
  };
  if (r.scalar_type() == at::kFloat) return with_scalar(float());
  TORCH_CHECK(r.scalar_type() == at::kBFloat16, "wkv6: r must be float32 or bfloat16, not ", r.scalar_type());
  with_scalar(at::BFloat16());
}

std::tuple<Tensor, Tensor> forward(const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_, const Tensor& state_) {
  check(r_, k_, v_, w_, u_, state_);
  const auto r = r_.contiguous(), k = k_.contiguous(), v = v_.contiguous(), w = w_.to(at::kFloat).contiguous(), u = u_.to(at::kFloat).contiguous();
  const auto y = at::empty_like(r), state = state_.clone(at::MemoryFormat::Contiguous);
  for_each_head(r, 2 * r.size(1) * r.size(3), [&](int64_t b, int64_t h, auto scalar, auto n, float* scratch) {
    forward_head<decltype(scalar), decltype(n)::value>(b, h, r, k, v, w, u, y, state, scratch);
  });
  return {y, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_,
                                                                    const Tensor& state_, const Tensor& gy_, const Tensor& gstate_) {
  check(r_, k_, v_, w_, u_, state_);
  TORCH_CHECK(gy_.sizes() == r_.sizes() && gstate_.sizes() == state_.sizes(), "wkv6: a gradient's shape is not its tensor's");
  const auto r = r_.contiguous(), k = k_.contiguous(), v = v_.contiguous(), w = w_.to(at::kFloat).contiguous(), u = u_.to(at::kFloat).contiguous();
  const auto state = state_.contiguous(), gy = gy_.to(r.scalar_type()).contiguous(), gstate = gstate_.to(at::kFloat).clone(at::MemoryFormat::Contiguous);
  const auto gr = at::empty_like(r), gk = at::empty_like(k), gv = at::empty_like(v), gw = at::empty_like(w);
  const int64_t T = r.size(1), N = r.size(3);
  const auto gu = at::empty({r.size(0), r.size(2), N}, u.options());
  for_each_head(r, 2 * T * N + (2 + CHUNK + (T + CHUNK - 1) / CHUNK) * N * N, [&](int64_t b, int64_t h, auto scalar, auto n, float* scratch) {
    backward_head<decltype(scalar), decltype(n)::value>(b, h, r, k, v, w, u, state, gy, gr, gk, gv, gw, gu, gstate, scratch);
  });
  return {gr, gk, gv, gw.to(w_.scalar_type()), gu.sum(0).to(u_.scalar_type()), gstate};
}

}  // namespace

TORCH_LIBRARY(wkv6, m) {
  m.def("forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state) -> (Tensor, Tensor)");
  m.def("backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor gy, Tensor gstate)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(wkv6, CPU, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
}
