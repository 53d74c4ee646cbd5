// The operators wkv6::forward and wkv6::backward on the CPU.
//
// Per batch element and head, with decay d_t = exp(-exp(w_t)) per key channel i, value channel j,
// and state S (N x N):
//
//     y_t[j] = sum_i r_t[i] S_{t-1}[i][j] + (sum_i r_t[i] u[i] k_t[i]) v_t[j]
//     S_t[i][j] = d_t[i] S_{t-1}[i][j] + k_t[i] v_t[j]
//
// What is clever here: nothing is divided by a decay, and no numbers are subtracted that nearly
// cancel. So results are exact for every decay. A token costs 3 vector operations per 16 (AVX-512)
// elements of the state, which stays in the L1 cache.
//
// The backward pass is three more walks of the same kind. S and its gradient G are walked
// transposed where the sum runs over j. So every inner loop runs along contiguous memory, and sums
// nothing across lanes:
//
//     forward in time:
//       gr_t[i] = sum_j gy_t[j] S_{t-1}[i][j]                  on S^T, kept every CHUNK tokens
//     backward in time:
//       gk_t[i] = sum_j v_t[j] G_t[i][j]                       on G^T
//       d(log d_t)[i] = d_t[i] sum_j G_t[i][j] S_{t-1}[i][j]   on G^T, and on S^T, walked again
//       gv_t[j] = sum_i k_t[i] G_t[i][j]                       on G
//       G_{t-1} = diag(d_t) G_t + r_t gy_t^T
//
// The u terms are added where they belong. Batch elements and heads run in parallel. T is a
// run-time argument. The operators take contiguous tensors, and w, u and states in float32.
// wkv6.py sees to that, and declares the operators.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;

void check(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
           const Tensor& state) {
  TORCH_CHECK(r.dim() == 4, "wkv6: r must be (B, T, H, N), not ", r.sizes());
  const auto B = r.size(0);
  const auto H = r.size(2);
  const auto N = r.size(3);
  const bool same_shape =
      k.sizes() == r.sizes() && v.sizes() == r.sizes() && w.sizes() == r.sizes();
  TORCH_CHECK(same_shape, "wkv6: r, k, v, w must have one shape");
  const bool same_dtype = k.dtype() == r.dtype() && v.dtype() == r.dtype();
  TORCH_CHECK(same_dtype, "wkv6: r, k, v must have one dtype");
  const std::array<int64_t, 2> u_shape = {H, N};
  TORCH_CHECK(u.sizes() == u_shape, "wkv6: u must be (H, N), not ", u.sizes());
  const std::array<int64_t, 4> state_shape = {B, H, N, N};
  TORCH_CHECK(state.sizes() == state_shape, "wkv6: state must be (B, H, N, N), not ",
              state.sizes());
  for (const auto& x : {w, u, state}) {
    TORCH_CHECK(x.dtype() == at::kFloat, "wkv6: w, u, state must be float32, not ", x.dtype());
  }
  for (const auto& x : {r, k, v, w, u, state}) {
    TORCH_CHECK(x.is_contiguous(), "wkv6: every tensor must be contiguous");
    TORCH_CHECK(x.device() == r.device(), "wkv6: every tensor must be on ", r.device(),
                ", as r is; one is on ", x.device());
  }
}

// Calls body(scalar of r, N), both compile-time constants.
template <typename F>
void with_type_and_head_size(const Tensor& r, F body) {
  const auto with_type = [&](auto scalar) {
    switch (r.size(3)) {
      case 32:
        return body(scalar, std::integral_constant<int, 32>());
      case 64:
        return body(scalar, std::integral_constant<int, 64>());
      case 128:
        return body(scalar, std::integral_constant<int, 128>());
      default:
        TORCH_CHECK(false, "wkv6: head size ", r.size(3), " is not compiled in");
    }
  };
  switch (r.scalar_type()) {
    case at::kFloat:
      return with_type(float());
    case at::kBFloat16:
      return with_type(at::BFloat16());
    default:
      TORCH_CHECK(false, "wkv6: ", r.dtype(), " is not compiled in");
  }
}

using Vec = at::vec::Vectorized<float>;
// Tokens between two kept states: 32 states of 64 x 64 are 512 KiB, an L2 cache's worth.
constexpr int64_t CHUNK = 32;

// N numbers in memory, and in registers.
template <size_t N>
using Floats = std::array<float, N>;
template <size_t N>
using Row = at::vec::VectorizedN<float, N / Vec::size()>;

template <size_t N>
Row<N> row(const Floats<N>& x) {
  return Row<N>::loadu(x.data());
}

// The sum over the lanes, in every lane.
template <typename R>
R total(const R& x) {
  return R(at::vec::vec_reduce_all([](auto a, auto b) { return a + b; }, x));
}

// One head of a (B, T, H, N) tensor: token t is read as floats, and written from registers.
template <typename scalar, size_t N>
struct Head {
  scalar* data;
  int64_t stride;
  Head(const Tensor& x, int64_t b, int64_t h)
      : data(x.data_ptr<scalar>() + b * x.stride(0) + h * N), stride(x.stride(1)) {}
  Floats<N> operator[](int64_t t) const {
    Floats<N> floats;
    at::vec::convert(data + t * stride, floats.data(), N);
    return floats;
  }
  void write(int64_t t, const Row<N>& row) const {
    Floats<N> floats;
    row.store(floats.data());
    at::vec::convert(floats.data(), data + t * stride, N);
  }
};

// Returns sum_i p[i] M[i] + bonus b, with M[i] the rows of M.
// Makes the rows of `next`, which may be M: d[i] M[i] + a[i] b or, where M is a TRANSPOSED state,
// d M[i] + a[i] b. With `other`, also makes dot = sum_i M[i] other[i].
// Inlined: otherwise what it returns would live in memory, a fifth slower.
template <bool TRANSPOSED = false, bool WITH_OTHER = false, size_t N>
C10_ALWAYS_INLINE Row<N> step(const float* M, float* next, const Floats<N>& p, const Floats<N>& d,
                              const Floats<N>& a, const Floats<N>& b,
                              const Row<N>& bonus = Row<N>(0.f), const float* other = nullptr,
                              Floats<N>* dot = nullptr) {
  const auto d_row = row(d);
  const auto b_row = row(b);
  Row<N> sum(0.f);
  Row<N> dots(0.f);
  for (size_t i = 0; i < N; i++) {
    const Vec p_i(p[i]);
    const Vec d_i(d[i]);
    const Vec a_i(a[i]);
    for (size_t c = 0; c < N / Vec::size(); c++) {
      const size_t at = i * N + c * Vec::size();
      const auto m = Vec::loadu(M + at);
      sum[c] = fmadd(p_i, m, sum[c]);
      if constexpr (WITH_OTHER) dots[c] = fmadd(m, Vec::loadu(other + at), dots[c]);
      fmadd(TRANSPOSED ? d_row[c] : d_i, m, a_i * b_row[c]).store(next + at);
    }
  }
  if constexpr (WITH_OTHER) dots.store(dot->data());
  return fmadd(bonus, b_row, sum);
}

// log d = -exp(w) and d = exp(log d) of one head. A float32 d near 1 is off by up to 3e-8, and the
// product of thousands of them drifts. So each d takes along the rounding error of those before it,
// and their product stays right to one rounding.
template <size_t N>
std::pair<std::vector<Floats<N>>, std::vector<Floats<N>>> decays(const Head<float, N>& w,
                                                                 int64_t T) {
  using DoubleRow = at::vec::VectorizedN<double, N / at::vec::Vectorized<double>::size()>;
  std::vector<Floats<N>> log_d(T), d(T);
  std::array<double, N> exact;
  std::array<double, N> carry;
  carry.fill(1);
  for (int64_t t = 0; t < T; t++) {
    row(w[t]).exp().neg().store(log_d[t].data());
    at::vec::convert(log_d[t].data(), exact.data(), N);
    DoubleRow::loadu(exact.data()).exp().store(exact.data());
    for (size_t i = 0; i < N; i++) {
      const double x = exact[i] * carry[i];
      d[t][i] = static_cast<float>(x);
      carry[i] = d[t][i] > 1e-30f ? x / d[t][i] : 1;
    }
  }
  return {std::move(log_d), std::move(d)};
}

// Calls body(b, h, scalar of r, N) for every batch element and head, in parallel.
template <typename F>
void for_each_head(const Tensor& r, F body) {
  with_type_and_head_size(r, [&](auto scalar, auto n) {
    at::parallel_for(0, r.size(0) * r.size(2), 1, [&](int64_t begin, int64_t end) {
      for (int64_t bh = begin; bh < end; bh++) body(bh / r.size(2), bh % r.size(2), scalar, n);
    });
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& r_, const Tensor& k_, const Tensor& v_,
                                   const Tensor& w_, const Tensor& u_, const Tensor& state_) {
  check(r_, k_, v_, w_, u_, state_);
  const auto y_ = at::empty_like(r_);
  const auto last = state_.clone();
  for_each_head(r_, [&](int64_t b, int64_t h, auto scalar, auto n) {
    constexpr size_t N = n;
    using ScalarHead = Head<decltype(scalar), N>;
    const ScalarHead R(r_, b, h);
    const ScalarHead K(k_, b, h);
    const ScalarHead V(v_, b, h);
    const ScalarHead Y(y_, b, h);
    const auto T = r_.size(1);
    const auto d = decays<N>({w_, b, h}, T).second;
    const auto u = Row<N>::loadu(u_.data_ptr<float>() + h * N);
    float* S = last.data_ptr<float>() + (b * r_.size(2) + h) * N * N;
    for (int64_t t = 0; t < T; t++) {
      const auto r = R[t];
      const auto k = K[t];
      const auto v = V[t];
      Y.write(t, step(S, S, r, d[t], k, v, total(row(r) * u * row(k))));
    }
  });
  return {y_, last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_,
    const Tensor& state_, const Tensor& gy_, const Tensor& gstate_) {
  check(r_, k_, v_, w_, u_, state_);
  check(r_, k_, gy_, w_, u_, gstate_);  // gy is like v, and gstate like state
  const auto gr_ = at::empty_like(r_);
  const auto gk_ = at::empty_like(k_);
  const auto gv_ = at::empty_like(v_);
  const auto gw_ = at::empty_like(w_);
  const auto gu_ = at::empty({r_.size(0), r_.size(2), r_.size(3)}, u_.options());
  const auto state_t = state_.mT().contiguous();
  const auto first = gstate_.clone();
  const auto first_t = first.mT().contiguous();
  for_each_head(r_, [&](int64_t b, int64_t h, auto scalar, auto n) {
    constexpr size_t N = n;
    constexpr size_t NN = N * N;
    using ScalarHead = Head<decltype(scalar), N>;
    const ScalarHead R(r_, b, h);
    const ScalarHead K(k_, b, h);
    const ScalarHead V(v_, b, h);
    const ScalarHead GY(gy_, b, h);
    const ScalarHead GR(gr_, b, h);
    const ScalarHead GK(gk_, b, h);
    const ScalarHead GV(gv_, b, h);
    const Head<float, N> GW(gw_, b, h);
    const auto T = r_.size(1);
    const auto bh = b * r_.size(2) + h;
    const auto chunks = (T + CHUNK - 1) / CHUNK;
    const auto [log_d, d] = decays<N>({w_, b, h}, T);
    const auto u = Row<N>::loadu(u_.data_ptr<float>() + h * N);

    // Forward in time, on S^T. What chunk c starts from is kept at place c. It walks through the
    // chunk at place c + 1, where the next chunk finds it.
    const std::unique_ptr<float[]> states(new float[(chunks + CHUNK) * NN]);
    std::copy_n(state_t.data_ptr<float>() + bh * NN, NN, states.get());
    for (int64_t t = 0; t < T; t++) {
      const auto k = K[t];
      const auto v = V[t];
      const auto gy = GY[t];
      float* S = &states[(t / CHUNK + 1) * NN];
      const float* before = t % CHUNK ? S : S - NN;
      GR.write(t, step<true>(before, S, gy, d[t], v, k, u * total(row(v) * row(gy))));
    }

    // Backward in time, on G, G^T and S^T.
    float* G = first.data_ptr<float>() + bh * NN;
    float* G_t = first_t.data_ptr<float>() + bh * NN;
    Row<N> gu(0.f);
    Floats<N> GS;
    for (int64_t start = (chunks - 1) * CHUNK; start >= 0; start -= CHUNK) {
      const int64_t end = std::min(start + CHUNK, T);
      // Every S_{t-1} of the chunk, from where it starts on. What later chunks kept there is no
      // longer needed.
      const auto S = [&](int64_t t) { return &states[(start / CHUNK + t - start) * NN]; };
      for (int64_t t = start; t + 1 < end; t++) {
        const auto k = K[t];
        const auto v = V[t];
        step<true>(S(t), S(t + 1), v, d[t], v, k);
      }
      for (int64_t t = end - 1; t >= start; t--) {
        const auto r = R[t];
        const auto k = K[t];
        const auto v = V[t];
        const auto gy = GY[t];
        const auto vgy = total(row(v) * row(gy));
        GK.write(t, step<true, true>(G_t, G_t, v, d[t], gy, r, u * vgy, S(t), &GS));
        GV.write(t, step(G, G, k, d[t], r, gy, total(row(r) * u * row(k))));
        GW.write(t, row(GS) * row(d[t]) * row(log_d[t]));  // d log d / d w = log d
        gu = fmadd(row(r) * row(k), vgy, gu);
      }
    }
    gu.store(gu_.data_ptr<float>() + bh * N);
  });
  return {gr_, gk_, gv_, gw_, gu_.sum(0), first};
}

}  // namespace

TORCH_LIBRARY_IMPL(wkv6, CPU, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
}
