// WKV-6 for GPUs. What is computed stands in wkv6.py; wkv6_gpu.py checks the tensors, makes the
// others, and launches these kernels. nvcc compiles this file, or NVRTC, or (for tests) a C++ compiler.
//
// A state needs that of the token before it: walked token by token, a batch of one keeps a block per head busy, 32 of them at 1.6B, on a card
// with room for hundreds. What is clever here: the sequence is cut into chunks, which are all walked at once, since what a chunk does to
// the state is known before the state is. Over a chunk, S becomes (prod_t d_t) S + sum_t (k_t prod_{s>t} d_s) v_t^T, and so
//
//   1. chunk_states   makes that sum, and the log of the product             a block per chunk, head and batch element
//   2. scan           S where each chunk begins, chunk after chunk           a thread per 4 numbers of a state
//   3. along_values   y, walking each chunk token by token from there        a block per chunk, head and batch element
//
// Backward, the gradient of the state walks the other way: G_{t-1} = diag(d_t) G_t + r_t gy_t^T. So 1. and 2. are run for S again, and in reverse
// with r, gy for k, v: that is G where each chunk ends; and 3. in reverse with k, r, gy, G for r, k, v, S: that is gv. What is left is
//
//   4. along_keys     gr_t = S_{t-1} gy_t + u k_t (v_t . gy_t)      gk_t = G_t v_t + u r_t (v_t . gy_t)      gu = sum_t r_t k_t (v_t . gy_t)
//                     gw_t = log d_t * d_t sum_j G_t[.][j] S_{t-1}[.][j]
//
// gw needs S and G at the same token, though they come from two sides. So a chunk is taken in tiles of 16 tokens, from the last to the first: S is
// walked to the tile from where the chunk begins (anew for each: cheaper than keeping it), G comes from the tile behind. Let gr' and gk' be what S,
// decayed up to a token, and G, decayed back to it, give to gr and gk. Per key channel, gw gets log d_t times all that passes through d_t, from a
// token s < t or S to a token q > t or G:
//
//     sum_{q>t} r_q gr'_q + sum_{s<t} k_s gk'_s + (prod d over the tile) sum_j G S + sum_{s<t<q} r_q (d_{s+1} ... d_{q-1}) k_s (v_s . gy_q)
//
// A double loop over s < q adds that last product to gr_q without its r_q, and to gk_s without its k_s. When the loop reaches s = t, gr_q is gr'_q
// and what came from s < t: so sum_{q>t} r_q gr_q is the first sum and the last.
//
// Nothing is divided; decays are multiplied, or their logs added: nothing overflows or cancels (below w = 88, where exp(w) ends). Sums have a fixed
// order and no atomics: the same bits in every run. A state lies in the registers of a block's N threads (N: head size). Four neighbours share
// four rows of it (in 3., columns); each holds a quarter, uses a number from shared memory four times, and three shuffles add the quarters.
//
// bfloat16, B = 1, T = 1024, N = 64, chunks of 64 (MB: what threads ask for; caches serve much of it; the tests count the first three columns):
//
//                       blocks of 1., 3., 4.    MB loaded    MB stored    multiply-adds and multiplications per token, head and N * N
//     1.6B  forward             512                59.2         21.6       4.5: 1 in 1., 3.5 in 3.
//     1.6B  backward            512               179.4         56.0      11: 2 in 1., 3.5 in 3., 5.5 in 4.
//     7B    forward            1024               118.5         43.3
//     7B    backward           1024               358.9        111.9
//
// Arithmetic, not measurement (this has not run on a GPU yet): at 1.6B the operations take at least 15 and 36 us on a 4090 (16384 lanes, 2.52 GHz),
// 18 and 44 us on an H100 (16896, 1.98 GHz); all those bytes from memory 80 and 234 us (1008 GB/s), 24 and 70 us (3350 GB/s).

#ifdef __CUDACC_RTC__  // NVRTC has no header files: here is what the kernels need of them
using int64_t = long long;
struct bfloat16 {
  unsigned short bits;
  __device__ explicit bfloat16(float x) {
    const unsigned all = __float_as_uint(x);
    const unsigned nearest_even = (all + 0x7fff + (all >> 16 & 1)) >> 16;
    const bool is_nan = x != x;
    bits = is_nan ? 0x7fc0 : nearest_even;
  }
  __device__ operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
struct float16 {
  unsigned short bits;
  __device__ explicit float16(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
#else
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <string>
#include <unordered_map>
using bfloat16 = c10::BFloat16;
using float16 = c10::Half;
#endif

#ifndef EMULATED  // tests read this file as C++, and put an emulator and a counter here
#define ADDRESS(...) reinterpret_cast<const void*>(&__VA_ARGS__)
#define MOVED(direction, bytes)
#endif
#ifdef USE_ROCM
#define __shfl_xor_sync(mask, x, lane) __shfl_xor(x, lane)
#endif
#define UNROLL _Pragma("unroll")  // where registers are counted through: they have no addresses
#define BOUNDS __launch_bounds__(N, N < 64 ? 8 : 0)  // without the 8 ptxas saves registers that nobody needs, and spills

namespace wkv6_gpu {

constexpr int TILE = 16, SCAN_THREADS = 128;  // TILE: tokens in shared memory at a time

struct alignas(16) Four { float x[4]; };  // numbers that are moved by one instruction

__device__ Four operator*(float a, const Four& b) { return {a * b.x[0], a * b.x[1], a * b.x[2], a * b.x[3]}; }
__device__ Four operator+(const Four& a, const Four& b) { return {a.x[0] + b.x[0], a.x[1] + b.x[1], a.x[2] + b.x[2], a.x[3] + b.x[3]}; }
__device__ float add_dot(float sum, const Four& a, const Four& b) {
  return a.x[0] * b.x[0] + (a.x[1] * b.x[1] + (a.x[2] * b.x[2] + (a.x[3] * b.x[3] + sum)));
}
__device__ const Four& four(const float* p) { return *reinterpret_cast<const Four*>(p); }
__device__ Four& four(float* p) { return *reinterpret_cast<Four*>(p); }

// All that moves between the GPU's memory and a thread goes through these two.
template <typename T> __device__ T load(const T& x) { MOVED(loaded, sizeof(T)); return x; }
template <typename T> __device__ void store(T& x, const T& value) { MOVED(stored, sizeof(T)); x = value; }

// The block's place in a (B, H, chunks, ...) tensor: the grid is (chunks, H, B).
__device__ int64_t chunk_index() { return (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x; }

// Channel threadIdx.x of the tokens of the block's chunk, in (B, T, H, N) tensors. n counts them in the order in which they are walked.
template <int N> struct Tokens {
  int64_t first, step;
  int count;
  __device__ Tokens(int T, int chunk, bool reverse) {
    const int begin = blockIdx.x * chunk;
    count = min(chunk, T - begin);
    first = ((int64_t(blockIdx.z) * T + begin + (reverse ? count - 1 : 0)) * gridDim.y + blockIdx.y) * N + threadIdx.x;
    step = int64_t(gridDim.y) * (reverse ? -N : N);
  }
  // Beyond the last token there are zeros. The last is loaded all the same: at a branch, every load would wait for the one before it.
  template <typename T>
  __device__ float get(const T* x, int n) const { const float y = load(x[first + min(n, count - 1) * step]); return n < count ? y : 0.f; }
  __device__ float log_d(const float* w, int n) const { const float y = -expf(get(w, n)); return n < count ? y : 0.f; }
  template <typename T> __device__ void put(T* x, int n, float value) const { if (n < count) store(x[first + n * step], T(value)); }
};

template <int N> struct Shared {
  float q[TILE][N + 4], k[TILE][N + 4], v[TILE][N + 4], d[TILE][N + 4], decay[N], dots[TILE][TILE + 4];  // + 4: rows begin in different banks
  // Loads a tile's v, and k decayed: from token n on, by `step`, away from where the state is wanted. passed: the sum of log d from there.
  template <typename T>
  __device__ float load_decayed(const Tokens<N>& tokens, const T* k_, const T* v_, const float* w, int n, int step, float passed) {
    _Pragma("unroll 8") for (int t = 0; t < TILE; t++, n += step) {
      k[t][threadIdx.x] = tokens.get(k_, n) * expf(passed);
      v[t][threadIdx.x] = tokens.get(v_, n);
      passed += tokens.log_d(w, n);
    }
    return passed;
  }
};
extern __shared__ Four shared_memory[];

// Four neighbouring threads hold parts of four sums. Returns the one of this thread: that of channel threadIdx.x.
__device__ float sum_of_parts(const Four& part) {
  const auto& x = part.x;
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const float a = (odd ? x[1] : x[0]) + __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
  const float b = (odd ? x[3] : x[2]) + __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  return (high ? b : a) + __shfl_xor_sync(~0u, high ? a : b, 2);
}

// What a thread holds of an N x N state, in four rows: every fourth group of four columns.
template <int N> struct State {
  Four x[4][N / 16];
  static __device__ int row() { return threadIdx.x / 4 * 4; }
  static __device__ int column(int c) { return 16 * c + threadIdx.x % 4 * 4; }
  static __device__ int64_t place(int r, int c) { return (chunk_index() * N + row() + r) * N + column(c); }
  __device__ void load_from(const float* states) {
    UNROLL for (int r = 0; r < 4; r++)
      UNROLL for (int c = 0; c < N / 16; c++) x[r][c] = load(four(states + place(r, c)));
  }
  __device__ void store_to(float* states) const {
    UNROLL for (int r = 0; r < 4; r++)
      UNROLL for (int c = 0; c < N / 16; c++) store(four(states + place(r, c)), x[r][c]);
  }
  // Makes it diag(d) x + sum_t a_t b_t^T, with d, a and b in shared memory.
  __device__ void walk(const float* d, const float (*a)[N + 4], const float (*b)[N + 4]) {
    UNROLL for (int r = 0; r < 4; r++)
      UNROLL for (int c = 0; c < N / 16; c++) x[r][c] = d[row() + r] * x[r][c];
    for (int t = 0; t < TILE; t++) {
      const Four a4 = four(&a[t][row()]);
      UNROLL for (int c = 0; c < N / 16; c++) {
        const Four b4 = four(&b[t][column(c)]);
        UNROLL for (int r = 0; r < 4; r++) x[r][c] = x[r][c] + a4.x[r] * b4;
      }
    }
  }
  // Row threadIdx.x of it times a vector: f(row, c) are the numbers column(c) .. column(c) + 3 of that.
  template <typename F> __device__ float times(F f) const {
    Four sum = {};
    UNROLL for (int r = 0; r < 4; r++)
      UNROLL for (int c = 0; c < N / 16; c++) sum.x[r] = add_dot(sum.x[r], x[r][c], f(r, c));
    return sum_of_parts(sum);
  }
};

// states: what k_t v_t^T come to at the chunk's end; or reverse, with r, gy for k, v, at its beginning. log_decay: the whole chunk's.
template <typename scalar, int N>
__global__ void BOUNDS chunk_states(const scalar* k, const scalar* v, const float* w, float* states, float* log_decay, int T, int chunk,
                                    int reverse) {
  auto& s = reinterpret_cast<Shared<N>&>(shared_memory);
  const Tokens<N> tokens(T, chunk, !reverse);  // away from where the state is wanted, so that the decay up to there is known
  const int i = threadIdx.x;
  State<N> state = {};
  float passed = 0;
  s.decay[i] = 1;
  for (int n = 0; n < tokens.count; n += TILE) {
    __syncthreads();
    passed = s.load_decayed(tokens, k, v, w, n, 1, passed);
    __syncthreads();
    state.walk(s.decay, s.k, s.v);
  }
  state.store_to(states);
  store(log_decay[chunk_index() * N + i], passed);
}

// states: from what each chunk adds to where each chunk begins (reverse: ends). last: what remains. The grid is (B * H, parts of a state).
template <int N>
__global__ void __launch_bounds__(SCAN_THREADS) scan(float* states, const float* log_decay, const float* first, float* last, int chunks,
                                                     int reverse) {
  constexpr int AHEAD = 4;  // chunks that are loaded before they are needed
  const int at = 4 * (blockIdx.y * SCAN_THREADS + threadIdx.x);
  const int64_t head = blockIdx.x;
  Four S = load(four(first + head * N * N + at)), added[AHEAD];
  float log_d[AHEAD], lost = 0;  // lost: to rounding, of the log of the decays so far: thousands of decays near 1 would drift
  for (int n = 0; n < chunks; n += AHEAD) {
    const auto chunk = [&](int m) { return head * chunks + (reverse ? max(chunks - 1 - n - m, 0) : min(n + m, chunks - 1)); };
    UNROLL for (int m = 0; m < AHEAD; m++) added[m] = load(four(states + chunk(m) * N * N + at)), log_d[m] = load(log_decay[chunk(m) * N + at / N]);
    UNROLL for (int m = 0; m < AHEAD; m++) {
      if (n + m >= chunks) break;
      store(four(states + chunk(m) * N * N + at), S);
      const float exact = log_d[m] + lost, d = expf(exact);
      lost = d > 1e-30f ? exact - logf(d) : 0.f;
      S = d * S + added[m];
    }
  }
  store(four(last + head * N * N + at), S);
}

// y_t = S^T q_t + (q_t . u k_t) v_t, then S = diag(d_t) S + k_t v_t^T. With r, k, v that is y; with k, r, gy, in reverse, gv.
// A thread holds four columns: every fourth group of four rows.
template <typename scalar, int N>
__global__ void BOUNDS along_values(const scalar* q, const scalar* k, const scalar* v, const float* w, const float* u, const float* states,
                                    scalar* y, int T, int chunk, int reverse) {
  auto& s = reinterpret_cast<Shared<N>&>(shared_memory);
  const Tokens<N> tokens(T, chunk, reverse);
  const int i = threadIdx.x, column = i / 4 * 4, part = i % 4 * 4;
  Four S[N / 4];
  float bonus[N / 4];
  UNROLL for (int m = 0; m < N / 4; m++) {
    const int row = m / 4 * 16 + part + m % 4;
    S[m] = load(four(states + (chunk_index() * N + row) * N + column));
    bonus[m] = load(u[blockIdx.y * N + row]);
  }
  for (int n = 0; n < tokens.count; n += TILE) {
    __syncthreads();
    _Pragma("unroll 8") for (int t = 0; t < TILE; t++) {
      s.q[t][i] = tokens.get(q, n + t);
      s.k[t][i] = tokens.get(k, n + t);
      s.v[t][i] = tokens.get(v, n + t);
      s.d[t][i] = expf(tokens.log_d(w, n + t));
    }
    __syncthreads();
    for (int t = 0; t < TILE && n + t < tokens.count; t++) {
      const Four v4 = four(&s.v[t][column]);
      Four sum = {};
      float quk = 0;
      UNROLL for (int m = 0; m < N / 4; m += 4) {
        const int row = 4 * m + part;
        const Four q4 = four(&s.q[t][row]), k4 = four(&s.k[t][row]), d4 = four(&s.d[t][row]);
        UNROLL for (int r = 0; r < 4; r++) {
          quk += q4.x[r] * bonus[m + r] * k4.x[r];
          sum = sum + q4.x[r] * S[m + r];
          S[m + r] = d4.x[r] * S[m + r] + k4.x[r] * v4;
        }
      }
      tokens.put(y, n + t, sum_of_parts(sum + quk * v4));
    }
  }
}

// gr, gk, gw (_: tensors), and gu of every chunk. Thread i has part in S and G, and the outputs of key channel i for its own.
template <typename scalar, int N>
__global__ void BOUNDS along_keys(const scalar* r_, const scalar* k_, const scalar* v_, const float* w_, const float* u_, const scalar* gy_,
                                  const float* states, const float* gstates, scalar* gr_, scalar* gk_, float* gw_, float* gu_, int T, int chunk) {
  auto& s = reinterpret_cast<Shared<N>&>(shared_memory);
  auto& gy = s.q;
  const Tokens<N> tokens(T, chunk, false);
  const int i = threadIdx.x;
  const float u = load(u_[blockIdx.y * N + i]);
  float gu = 0;
  State<N> S, G;
  G.load_from(gstates);
  for (int n = (tokens.count - 1) / TILE * TILE; n >= 0; n -= TILE) {
    S.load_from(states);
    for (int m = 0; m < n; m += TILE) {
      __syncthreads();
      s.decay[i] = expf(s.load_decayed(tokens, k_, v_, w_, m + TILE - 1, -1, 0));
      __syncthreads();
      S.walk(s.decay, s.k, s.v);
    }
    __syncthreads();
    _Pragma("unroll 8") for (int t = 0; t < TILE; t++) {
      s.v[t][i] = tokens.get(v_, n + t);
      gy[t][i] = tokens.get(gy_, n + t);
    }
    __syncthreads();
    constexpr int SOME = TILE * TILE / N;  // v_t . gy_q of every two tokens: a thread takes one t and so many q
    float dots[SOME] = {};
    for (int j = 0; j < N; j += 4)
      UNROLL for (int q = 0; q < SOME; q++) dots[q] = add_dot(dots[q], four(&s.v[i % TILE][j]), four(&gy[i / TILE * SOME + q][j]));
    UNROLL for (int q = 0; q < SOME; q++) s.dots[i % TILE][i / TILE * SOME + q] = dots[q];
    // What comes from S and G: gr' first in s.d, where log d comes after it, and gk' in s.k.
    for (int t = 0; t < TILE; t++) {
      s.d[t][i] = S.times([&](int, int c) { return four(&gy[t][S.column(c)]); });
      s.k[t][i] = G.times([&](int, int c) { return four(&s.v[t][S.column(c)]); });
    }
    float through_all = S.times([&](int row, int c) { return G.x[row][c]; });
    float gr[TILE], r[TILE], d[TILE], passed = 0;
    UNROLL for (int t = 0; t < TILE; t++) {
      r[t] = tokens.get(r_, n + t);
      gr[t] = s.d[t][i] * expf(passed);
      s.d[t][i] = tokens.log_d(w_, n + t);
      d[t] = expf(s.d[t][i]);
      passed += s.d[t][i];
    }
    through_all *= s.decay[i] = expf(passed);
    float after = 0;
    for (int t = TILE - 1; t >= 0; t--) {
      s.k[t][i] *= expf(after);
      after += s.d[t][i];
    }
    __syncthreads();
    UNROLL for (int t = 0; t < TILE; t++) s.v[t][i] = tokens.get(k_, n + t);  // all before the first store, which loads may not pass
    passed = 0;  // And what comes from tokens of the tile. D: of those between t and q.
    UNROLL for (int t = 0; t < TILE; t++) {
      const float k = s.v[t][i], vgy = s.dots[t][t];
      float gk = s.k[t][i], through = through_all, D = 1;
      through_all += k * gk;
      UNROLL for (int q = t + 1; q < TILE; q++) {
        const float Da = D * s.dots[t][q];
        through += r[q] * gr[q];
        gr[q] += Da * k;
        gk += Da * r[q];
        D *= d[q];
      }
      tokens.put(gr_, n + t, gr[t] + u * k * vgy);
      tokens.put(gk_, n + t, gk + u * r[t] * vgy);
      tokens.put(gw_, n + t, through * s.d[t][i]);  // d log d / d w = log d
      gu += r[t] * k * vgy;
      s.k[t][i] = r[t] * expf(passed);
      passed += s.d[t][i];
    }
    if (n == 0) break;
    __syncthreads();
    G.walk(s.decay, s.k, gy);
  }
  store(gu_[chunk_index() * N + i], gu);
}

#ifndef __CUDACC_RTC__  // NVRTC compiles what it is asked for, by the same names
// The kernel that is called `name` in wkv6_gpu.py, such as "along_values<bfloat16, 64>"; or nullptr.
const void* wkv6_kernel(const std::string& name) {
#define ENTRY(...) {#__VA_ARGS__, ADDRESS(__VA_ARGS__)}
#define ENTRIES(scalar, N) \
  ENTRY(chunk_states<scalar, N>), ENTRY(along_values<scalar, N>), ENTRY(along_keys<scalar, N>)
  static const std::unordered_map<std::string, const void*> kernels = {
      ENTRY(scan<32>), ENTRIES(float, 32), ENTRIES(bfloat16, 32), ENTRIES(float16, 32),
      ENTRY(scan<64>), ENTRIES(float, 64), ENTRIES(bfloat16, 64), ENTRIES(float16, 64),
  };
  const auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : found->second;
}
#endif

}  // namespace wkv6_gpu

using namespace wkv6_gpu;  // so that the short names serve NVRTC, too
