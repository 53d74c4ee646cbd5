// WKV-6 for GPUs. What it computes stands in wkv6.py. wkv6_gpu.py checks the tensors, makes the
// others, and launches these kernels. nvcc compiles this file, or NVRTC, or (for tests) a C++
// compiler.
//
// What is clever here: the sequence is cut into chunks, and all chunks are walked at once.
//
// The state after a token needs the state before it. Walked token by token, a batch of one keeps
// one block per head busy: 32 blocks at 1.6B, on a card with room for hundreds. But what a chunk
// does to the state is known before the state is. Over a chunk, S becomes
//
//     (prod_t d_t) S + sum_t (k_t prod_{s>t} d_s) v_t^T
//
// So the forward pass takes three kernels:
//
//   1. chunk_states   makes that sum, and the log of that product.
//                     A block per chunk, head and batch element.
//   2. scan           makes S where each chunk begins, chunk after chunk.
//                     A thread per 4 numbers of a state.
//   3. along_values   makes y, walking each chunk token by token from there.
//                     A block per chunk, head and batch element.
//
// In the backward pass the gradient of the state walks the other way:
//
//     G_{t-1} = diag(d_t) G_t + r_t gy_t^T
//
// Kernels 1 and 2 run for S again. Then they run in reverse, with r, gy in place of k, v: that is
// G where each chunk ends. Kernel 3 runs in reverse, with k, r, gy, G in place of r, k, v, S: that
// is gv. The rest is
//
//   4. along_keys     gr_t = S_{t-1} gy_t + u k_t (v_t . gy_t)
//                     gk_t = G_t v_t + u r_t (v_t . gy_t)
//                     gu   = sum_t r_t k_t (v_t . gy_t)
//                     gw_t = log d_t * d_t sum_j G_t[.][j] S_{t-1}[.][j]
//
// gw needs S and G at the same token, but they come from two sides. So a chunk is taken in tiles of
// 16 tokens, from the last to the first. S is walked to the tile from where the chunk begins, again
// for each tile: that is cheaper than keeping it. G comes from the tile behind.
//
// Let gr' be what S, decayed up to a token, gives to gr. Let gk' be what G, decayed back to a
// token, gives to gk. Per key channel, gw gets log d_t times all that passes through d_t. That
// comes from a token s < t or from S, and goes to a token q > t or to G:
//
//     sum_{q>t} r_q gr'_q  +  sum_{s<t} k_s gk'_s  +  (prod d over the tile) sum_j G S
//         +  sum_{s<t<q} r_q (d_{s+1} ... d_{q-1}) k_s (v_s . gy_q)
//
// A double loop over s < q adds that last product to gr_q without its r_q, and to gk_s without its
// k_s. When the loop reaches s = t, gr_q is gr'_q and what came from s < t. So sum_{q>t} r_q gr_q
// is the first sum and the last.
//
// Numbers: nothing is divided. Decays are multiplied, or their logs added. So nothing overflows or
// cancels (below w = 88, where exp(w) ends). Sums have a fixed order, and there are no atomics:
// every run gives the same bits.
//
// Registers: a state lies in the registers of a block's N threads (N: head size). Four neighbours
// share four rows of it (in 3., four columns). Each holds a quarter, uses a number from shared
// memory four times, and three shuffles add the quarters.
//
// Costs, for bfloat16, B = 1, T = 1024, N = 64, chunks of 64. MB: what threads ask for, and caches
// serve much of it. Operations: multiply-adds and multiplications per token, head and N * N. The
// tests count the other columns.
//
//                  blocks of 1., 3., 4.   MB loaded   MB stored   operations
//   1.6B  forward           512              59.2        21.6     4.5: 1 in 1., 3.5 in 3.
//   1.6B  backward          512             179.4        56.0     11: 2 in 1., 3.5 in 3., 5.5 in 4.
//   7B    forward          1024             118.5        43.3
//   7B    backward         1024             358.9       111.9
//
// Arithmetic, not measurement: at 1.6B the operations take at least 15 and 36 us on a 4090 (16384
// lanes, 2.52 GHz), 18 and 44 us on an H100 (16896 lanes, 1.98 GHz). All those bytes from memory
// take 80 and 234 us (1008 GB/s), or 24 and 70 us (3350 GB/s).

#ifdef __CUDACC_RTC__
// NVRTC has no header files. Here is what the kernels need of them.
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

#ifndef EMULATED
// Tests read this file as C++, and put an emulator and a counter here.
#define ADDRESS(...) reinterpret_cast<const void*>(&__VA_ARGS__)
#define MOVED(direction, bytes)
#endif
#ifdef USE_ROCM
#define __shfl_xor_sync(mask, x, lane) __shfl_xor(x, lane)
#endif

// For loops over registers, which have no addresses.
#define UNROLL _Pragma("unroll")
// For loops over loads: 8 at a time.
#define UNROLL_8 _Pragma("unroll 8")
// Without the 8, ptxas saves registers that nobody needs, and spills.
#define BOUNDS __launch_bounds__(N, N < 64 ? 8 : 0)

namespace wkv6_gpu {

constexpr int TILE = 16;  // tokens in shared memory at a time
constexpr int SCAN_THREADS = 128;

// Four numbers that one instruction moves.
struct alignas(16) Four {
  float x[4];
};

__device__ Four operator*(float a, const Four& b) {
  return {a * b.x[0], a * b.x[1], a * b.x[2], a * b.x[3]};
}
__device__ Four operator+(const Four& a, const Four& b) {
  return {a.x[0] + b.x[0], a.x[1] + b.x[1], a.x[2] + b.x[2], a.x[3] + b.x[3]};
}
__device__ float add_dot(float sum, const Four& a, const Four& b) {
  return a.x[0] * b.x[0] + (a.x[1] * b.x[1] + (a.x[2] * b.x[2] + (a.x[3] * b.x[3] + sum)));
}
__device__ const Four& four(const float* p) { return *reinterpret_cast<const Four*>(p); }
__device__ Four& four(float* p) { return *reinterpret_cast<Four*>(p); }

// All that moves between the GPU's memory and a thread goes through `load` and `store`.
template <typename T>
__device__ T load(const T& x) {
  MOVED(loaded, sizeof(T));
  return x;
}
template <typename T>
__device__ void store(T& x, const T& value) {
  MOVED(stored, sizeof(T));
  x = value;
}

// The block's place in a (B, H, chunks, ...) tensor: the grid is (chunks, H, B).
__device__ int64_t chunk_index() {
  return (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
}

// Channel threadIdx.x of the tokens of the block's chunk, in (B, T, H, N) tensors.
// n counts the tokens in the order in which they are walked.
template <int N>
struct Tokens {
  int64_t first;
  int64_t step;
  int count;
  __device__ Tokens(int T, int chunk, bool reverse) {
    const int begin = blockIdx.x * chunk;
    count = min(chunk, T - begin);
    const int64_t token = int64_t(blockIdx.z) * T + begin + (reverse ? count - 1 : 0);
    first = (token * gridDim.y + blockIdx.y) * N + threadIdx.x;
    step = int64_t(gridDim.y) * (reverse ? -N : N);
  }
  // Beyond the last token there are zeros. The last token is loaded all the same: at a branch,
  // every load would wait for the one before it.
  template <typename T>
  __device__ float get(const T* x, int n) const {
    const float y = load(x[first + min(n, count - 1) * step]);
    return n < count ? y : 0.f;
  }
  __device__ float log_d(const float* w, int n) const {
    const float y = -expf(get(w, n));
    return n < count ? y : 0.f;
  }
  template <typename T>
  __device__ void put(T* x, int n, float value) const {
    if (n < count) store(x[first + n * step], T(value));
  }
};

template <int N>
struct Shared {
  // + 4: rows begin in different banks.
  float q[TILE][N + 4];
  float k[TILE][N + 4];
  float v[TILE][N + 4];
  float d[TILE][N + 4];
  float decay[N];
  float dots[TILE][TILE + 4];

  // Loads a tile's v, and its k decayed. It goes from token n on, by `step`, away from where the
  // state is wanted. passed: the sum of log d from there to token n. Returns that sum beyond the
  // tile.
  template <typename T>
  __device__ float load_decayed(const Tokens<N>& tokens, const T* k_, const T* v_, const float* w,
                                int n, int step, float passed) {
    UNROLL_8 for (int t = 0; t < TILE; t++) {
      k[t][threadIdx.x] = tokens.get(k_, n) * expf(passed);
      v[t][threadIdx.x] = tokens.get(v_, n);
      passed += tokens.log_d(w, n);
      n += step;
    }
    return passed;
  }
};
extern __shared__ Four shared_memory[];

// Four neighbouring threads hold parts of four sums. Returns the sum of this thread, that is, of
// channel threadIdx.x.
__device__ float sum_of_parts(const Four& part) {
  const auto& x = part.x;
  const bool odd = threadIdx.x & 1;
  const bool high = threadIdx.x & 2;
  const float a = (odd ? x[1] : x[0]) + __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
  const float b = (odd ? x[3] : x[2]) + __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  return (high ? b : a) + __shfl_xor_sync(~0u, high ? a : b, 2);
}

// What a thread holds of an N x N state, in four rows: every fourth group of four columns.
template <int N>
struct State {
  Four x[4][N / 16];
  static __device__ int row() { return threadIdx.x / 4 * 4; }
  static __device__ int column(int c) { return 16 * c + threadIdx.x % 4 * 4; }
  static __device__ int64_t place(int r, int c) {
    return (chunk_index() * N + row() + r) * N + column(c);
  }
  __device__ void load_from(const float* states) {
    UNROLL for (int r = 0; r < 4; r++) {
      UNROLL for (int c = 0; c < N / 16; c++) { x[r][c] = load(four(states + place(r, c))); }
    }
  }
  __device__ void store_to(float* states) const {
    UNROLL for (int r = 0; r < 4; r++) {
      UNROLL for (int c = 0; c < N / 16; c++) { store(four(states + place(r, c)), x[r][c]); }
    }
  }

  // Makes it diag(d) x + sum_t a_t b_t^T, with d, a and b in shared memory.
  __device__ void walk(const float* d, const float (*a)[N + 4], const float (*b)[N + 4]) {
    UNROLL for (int r = 0; r < 4; r++) {
      UNROLL for (int c = 0; c < N / 16; c++) { x[r][c] = d[row() + r] * x[r][c]; }
    }
    for (int t = 0; t < TILE; t++) {
      const Four a4 = four(&a[t][row()]);
      UNROLL for (int c = 0; c < N / 16; c++) {
        const Four b4 = four(&b[t][column(c)]);
        UNROLL for (int r = 0; r < 4; r++) { x[r][c] = x[r][c] + a4.x[r] * b4; }
      }
    }
  }

  // Returns row threadIdx.x of it times a vector. f(row, c): numbers column(c) .. column(c) + 3 of
  // that vector.
  template <typename F>
  __device__ float times(F f) const {
    Four sum = {};
    UNROLL for (int r = 0; r < 4; r++) {
      UNROLL for (int c = 0; c < N / 16; c++) { sum.x[r] = add_dot(sum.x[r], x[r][c], f(r, c)); }
    }
    return sum_of_parts(sum);
  }
};

// ---- kernels -----------------------------------------------------------------------------------

// states: what the k_t v_t^T of a chunk come to at its end. In reverse, with r, gy for k, v: at its
// beginning. log_decay: that of the whole chunk.
template <typename scalar, int N>
__global__ void BOUNDS chunk_states(const scalar* k, const scalar* v, const float* w, float* states,
                                    float* log_decay, int T, int chunk, int reverse) {
  auto& s = reinterpret_cast<Shared<N>&>(shared_memory);
  // Walk away from where the state is wanted, so that the decay up to there is known.
  const Tokens<N> tokens(T, chunk, !reverse);
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

// states: in, what each chunk adds; out, the state where each chunk begins (reverse: ends).
// last: the state after all chunks. The grid is (B * H, parts of a state).
template <int N>
__global__ void __launch_bounds__(SCAN_THREADS)
    scan(float* states, const float* log_decay, const float* first, float* last, int chunks,
         int reverse) {
  constexpr int AHEAD = 4;  // chunks that are loaded before they are needed
  const int at = 4 * (blockIdx.y * SCAN_THREADS + threadIdx.x);
  const int64_t head = blockIdx.x;
  Four S = load(four(first + head * N * N + at));
  Four added[AHEAD];
  float log_d[AHEAD];
  // What rounding took from the log of the decays so far. Thousands of decays near 1 would drift.
  float lost = 0;
  for (int n = 0; n < chunks; n += AHEAD) {
    const auto chunk = [&](int m) {
      const int place = reverse ? max(chunks - 1 - n - m, 0) : min(n + m, chunks - 1);
      return head * chunks + place;
    };
    UNROLL for (int m = 0; m < AHEAD; m++) {
      added[m] = load(four(states + chunk(m) * N * N + at));
      log_d[m] = load(log_decay[chunk(m) * N + at / N]);
    }
    UNROLL for (int m = 0; m < AHEAD; m++) {
      if (n + m >= chunks) break;
      store(four(states + chunk(m) * N * N + at), S);
      const float exact = log_d[m] + lost;
      const float d = expf(exact);
      lost = d > 1e-30f ? exact - logf(d) : 0.f;
      S = d * S + added[m];
    }
  }
  store(four(last + head * N * N + at), S);
}

// y_t = S^T q_t + (q_t . u k_t) v_t, then S = diag(d_t) S + k_t v_t^T.
// With r, k, v for q, k, v that is y; with k, r, gy, in reverse, it is gv.
// A thread holds four columns: of those, every fourth group of four rows.
template <typename scalar, int N>
__global__ void BOUNDS along_values(const scalar* q, const scalar* k, const scalar* v,
                                    const float* w, const float* u, const float* states, scalar* y,
                                    int T, int chunk, int reverse) {
  auto& s = reinterpret_cast<Shared<N>&>(shared_memory);
  const Tokens<N> tokens(T, chunk, reverse);
  const int i = threadIdx.x;
  const int column = i / 4 * 4;
  const int part = i % 4 * 4;
  Four S[N / 4];
  float bonus[N / 4];
  UNROLL for (int m = 0; m < N / 4; m++) {
    const int row = m / 4 * 16 + part + m % 4;
    S[m] = load(four(states + (chunk_index() * N + row) * N + column));
    bonus[m] = load(u[blockIdx.y * N + row]);
  }
  for (int n = 0; n < tokens.count; n += TILE) {
    __syncthreads();
    UNROLL_8 for (int t = 0; t < TILE; t++) {
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
        const Four q4 = four(&s.q[t][row]);
        const Four k4 = four(&s.k[t][row]);
        const Four d4 = four(&s.d[t][row]);
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

// gr, gk, gw, and gu of every chunk (names that end in _ are tensors). Thread i holds a part of S
// and G, and makes the outputs of key channel i.
template <typename scalar, int N>
__global__ void BOUNDS along_keys(const scalar* r_, const scalar* k_, const scalar* v_,
                                  const float* w_, const float* u_, const scalar* gy_,
                                  const float* states, const float* gstates, scalar* gr_,
                                  scalar* gk_, float* gw_, float* gu_, int T, int chunk) {
  auto& s = reinterpret_cast<Shared<N>&>(shared_memory);
  auto& gy = s.q;
  const Tokens<N> tokens(T, chunk, false);
  const int i = threadIdx.x;
  const float u = load(u_[blockIdx.y * N + i]);
  float gu = 0;
  State<N> S;
  State<N> G;
  G.load_from(gstates);
  for (int n = (tokens.count - 1) / TILE * TILE; n >= 0; n -= TILE) {
    // S before the tile, from where the chunk begins.
    S.load_from(states);
    for (int m = 0; m < n; m += TILE) {
      __syncthreads();
      s.decay[i] = expf(s.load_decayed(tokens, k_, v_, w_, m + TILE - 1, -1, 0));
      __syncthreads();
      S.walk(s.decay, s.k, s.v);
    }

    __syncthreads();
    UNROLL_8 for (int t = 0; t < TILE; t++) {
      s.v[t][i] = tokens.get(v_, n + t);
      gy[t][i] = tokens.get(gy_, n + t);
    }
    __syncthreads();

    // v_t . gy_q of every two tokens. A thread takes one t and SOME q.
    constexpr int SOME = TILE * TILE / N;
    float dots[SOME] = {};
    for (int j = 0; j < N; j += 4) {
      UNROLL for (int q = 0; q < SOME; q++) {
        dots[q] = add_dot(dots[q], four(&s.v[i % TILE][j]), four(&gy[i / TILE * SOME + q][j]));
      }
    }
    UNROLL for (int q = 0; q < SOME; q++) { s.dots[i % TILE][i / TILE * SOME + q] = dots[q]; }

    // What comes from S and G: gr' in s.d, where log d will be after it, and gk' in s.k.
    for (int t = 0; t < TILE; t++) {
      s.d[t][i] = S.times([&](int, int c) { return four(&gy[t][S.column(c)]); });
      s.k[t][i] = G.times([&](int, int c) { return four(&s.v[t][S.column(c)]); });
    }
    float through_all = S.times([&](int row, int c) { return G.x[row][c]; });
    float gr[TILE];
    float r[TILE];
    float d[TILE];
    float passed = 0;
    UNROLL for (int t = 0; t < TILE; t++) {
      r[t] = tokens.get(r_, n + t);
      gr[t] = s.d[t][i] * expf(passed);
      s.d[t][i] = tokens.log_d(w_, n + t);
      d[t] = expf(s.d[t][i]);
      passed += s.d[t][i];
    }
    const float decay = expf(passed);
    s.decay[i] = decay;
    through_all *= decay;
    float after = 0;
    for (int t = TILE - 1; t >= 0; t--) {
      s.k[t][i] *= expf(after);
      after += s.d[t][i];
    }
    __syncthreads();

    // k, all of it before the first store, which loads may not pass.
    UNROLL for (int t = 0; t < TILE; t++) { s.v[t][i] = tokens.get(k_, n + t); }

    // What comes from tokens of the tile. D: the decays of the tokens between t and q.
    passed = 0;
    UNROLL for (int t = 0; t < TILE; t++) {
      const float k = s.v[t][i];
      const float vgy = s.dots[t][t];
      float gk = s.k[t][i];
      float through = through_all;
      float D = 1;
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

    // G at the end of the tile before this one, which is next.
    if (n == 0) break;
    __syncthreads();
    G.walk(s.decay, s.k, gy);
  }
  store(gu_[chunk_index() * N + i], gu);
}

#ifndef __CUDACC_RTC__
// NVRTC compiles the kernels that it is asked for, by the same names.

// Returns the kernel that wkv6_gpu.py calls `name`, such as "along_values<bfloat16, 64>". If there
// is none, nullptr.
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

// The short names serve NVRTC, too.
using namespace wkv6_gpu;
