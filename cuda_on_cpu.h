// CUDA on a CPU, as far as wkv6_cuda.cu, wkv6_cuda_op.cpp and nvrtc.py use it. With it, tests run
// them on machines without a GPU. Test code.
//
// Threads are fibers. Each runs until a barrier, a shuffle or its end, and the others follow.
// A warp runs until all of it waits at a barrier, then the next warp. Blocks run one after the
// other. Tests choose the order of all three: so they find out a thread that reads what another
// thread, warp or block has not written yet. Shared memory is NaN before each block. Beyond its
// size it must still be NaN afterwards.

#pragma once
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <cxxabi.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
#define __syncthreads() emulator::barrier(__LINE__)
#define __shfl_xor_sync(mask, x, lane) emulator::shuffle(x, lane)
#define MOVED(direction, bytes) emulator_##direction += bytes
#define ADDRESS(...) reinterpret_cast<const void*>(&emulator::Call<&__VA_ARGS__>::call)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;
using std::max, std::min;

// What the tests set and read.
extern "C" {
// Of threads, warps and blocks: 0 ascending, 1 descending, others: random, another each time.
inline int emulator_order = 0;
// The line of a __syncthreads() that is left out.
inline int emulator_skipped_barrier = 0;
inline int64_t emulator_loaded = 0;
inline int64_t emulator_stored = 0;
inline int64_t emulator_shared_bytes = 0;
inline int64_t emulator_launches = 0;
inline int64_t emulator_blocks[16];
}

namespace emulator {

constexpr int WARP = 32;
constexpr size_t SHARED_LIMIT = 48 << 10;
constexpr size_t STACK = 64 << 10;
inline char* shared;  // SHARED_LIMIT bytes
inline std::string error;

struct Fiber {
  enum { NEW, READY, BARRIER, DONE } state = NEW;
  int barrier = 0;
  int shuffles = 0;
  float slot[2];
  jmp_buf at;
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
};
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline const std::function<void()>* body;

inline Fiber& current() { return fibers[threadIdx.x]; }

inline void yield() {
  if (!_setjmp(current().at)) _longjmp(scheduler, 1);
}

inline void run() {
  (*body)();
  current().state = Fiber::DONE;
  _longjmp(scheduler, 1);
}

inline void resume(int thread) {
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (current().state == Fiber::READY) _longjmp(current().at, 1);
  current().state = Fiber::READY;
  getcontext(&current().context);
  current().context.uc_stack.ss_sp = current().stack.data();
  current().context.uc_stack.ss_size = STACK;
  makecontext(&current().context, run, 0);
  setcontext(&current().context);
}

inline void barrier(int line) {
  if (line == emulator_skipped_barrier) return;
  current().state = Fiber::BARRIER;
  current().barrier = line;
  yield();
}

// The lanes of a warp come here together. There are two slots, since one lane may be at its next
// shuffle before another has read this one.
inline float shuffle(float x, int lane) {
  Fiber& me = current();
  const int turn = me.shuffles++;
  me.slot[turn % 2] = x;
  yield();
  const Fiber& other = fibers[threadIdx.x ^ lane];
  if (other.shuffles != turn + 1 && other.shuffles != turn + 2) {
    error = "a shuffle that not all threads of the warp come to";
  }
  return other.slot[turn % 2];
}

inline std::vector<int> order(int n) {
  std::vector<int> all(n);
  std::iota(all.begin(), all.end(), 0);
  if (emulator_order == 1) std::reverse(all.begin(), all.end());
  static std::mt19937 random;
  if (emulator_order > 1) std::shuffle(all.begin(), all.end(), random);
  return all;
}

// Runs each lane of a warp that is not at a barrier, to its next shuffle or barrier. Returns
// whether there was one.
inline bool run_lanes(int warp, const std::vector<int>& lanes, int threads) {
  bool ran = false;
  for (const int lane : lanes) {
    const int thread = warp * WARP + lane;
    if (thread < threads && fibers[thread].state < Fiber::BARRIER) {
      resume(thread);
      ran = true;
    }
  }
  return ran;
}

inline void run_block(int threads) {
  std::memset(shared, 0xff, SHARED_LIMIT);
  for (auto& fiber : fibers) {
    fiber.state = Fiber::NEW;
    fiber.shuffles = 0;
  }
  const auto lanes = order(WARP);
  const auto warps = order((threads + WARP - 1) / WARP);
  const auto is_done = [](const Fiber& fiber) { return fiber.state == Fiber::DONE; };
  int done = 0;
  while (done < threads && error.empty()) {
    for (const int warp : warps) {
      // Until all of it waits.
      while (run_lanes(warp, lanes, threads)) continue;
    }
    done = std::count_if(fibers.begin(), fibers.end(), is_done);
    if (done && done < threads) error = "a barrier that not all threads come to";
    for (auto& fiber : fibers) {
      if (!done && fiber.barrier != fibers[0].barrier) error = "threads at different barriers";
      if (!done) fiber.state = Fiber::READY;
    }
  }
}

inline bool launch(dim3 grid, int threads, size_t shared_bytes,
                   const std::function<void()>& kernel) {
  const bool possible = grid.x && grid.y && grid.z && grid.y < 65536 && grid.z < 65536;
  error = "";
  if (shared_bytes > SHARED_LIMIT) error = "more shared memory than there is";
  if (!possible) error = "no such grid";
  if (!error.empty()) return false;

  fibers.resize(threads);
  body = &kernel;
  gridDim = grid;
  blockDim = dim3(threads);
  emulator_blocks[emulator_launches % 16] = int64_t(grid.x) * grid.y * grid.z;
  emulator_launches++;
  emulator_shared_bytes = std::max<int64_t>(emulator_shared_bytes, shared_bytes);

  const auto was_written = [](char c) { return c != char(0xff); };
  for (const unsigned block : order(grid.x * grid.y * grid.z)) {
    blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    run_block(threads);
    if (std::any_of(shared + shared_bytes, shared + SHARED_LIMIT, was_written)) {
      error = "shared memory beyond its size was written";
    }
    if (!error.empty()) break;
  }
  return error.empty();
}

// What the address of a kernel is here: a function that is told where the kernel's arguments are.
using Kernel = void (*)(void** arguments);
template <auto kernel>
struct Call;
template <typename... Parameters, void (*kernel)(Parameters...)>
struct Call<kernel> {
  static void call(void** arguments) {
    unpack(arguments, std::index_sequence_for<Parameters...>());
  }
  template <size_t... i>
  static void unpack(void** arguments, std::index_sequence<i...>) {
    kernel(*static_cast<Parameters*>(arguments[i])...);
  }
};

}  // namespace emulator

// ---- the runtime, which wkv6_cuda_op.cpp calls -------------------------------

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
using cudaStream_t = void*;
#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == cudaSuccess, "emulator: ", emulator::error)
namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda

inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 threads, void** arguments,
                                    size_t shared_bytes, cudaStream_t) {
  const auto body = [&] { reinterpret_cast<emulator::Kernel>(kernel)(arguments); };
  const bool done = emulator::launch(grid, threads.x, shared_bytes, body);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

// ---- the driver, which nvrtc.py calls ---------------------------------------

namespace wkv6_gpu {
const void* wkv6_kernel(const std::string& name);
}

#define EXPORTED [[gnu::used]] inline
extern "C" {
// How many contexts the thread has entered and not left.
inline int emulator_contexts = 0;
EXPORTED int cuInit(unsigned) { return 0; }
EXPORTED int cuDeviceGet(int* device, int) { return *device = 0; }
EXPORTED int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &emulator_contexts;
  return 0;
}
EXPORTED int cuCtxPushCurrent_v2(void* context) {
  emulator_contexts++;
  return context == &emulator_contexts ? 0 : 1;
}
EXPORTED int cuCtxPopCurrent_v2(void**) {
  emulator_contexts--;
  return 0;
}
// A module is nothing here. Its kernels are those of wkv6_cuda.cu, by the names that NVRTC gave.
EXPORTED int cuModuleLoadData(void**, const void*) { return emulator_contexts == 1 ? 0 : 1; }
EXPORTED int cuModuleGetFunction(const void** function, void*, const char* symbol) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  const std::string text = demangled ? demangled : "";
  std::free(demangled);
  const std::string before = "void wkv6_gpu::";
  if (text.rfind(before, 0) != 0) return 1;
  const auto name = text.substr(before.size(), text.find('(') - before.size());
  *function = wkv6_gpu::wkv6_kernel(name);
  return *function ? 0 : 1;
}
EXPORTED int cuLaunchKernel(const void* function, unsigned x, unsigned y, unsigned z,
                            unsigned threads, unsigned, unsigned, unsigned shared_bytes, void*,
                            void** arguments, void**) {
  if (emulator_contexts != 1) return 1;
  return cudaLaunchKernel(function, dim3(x, y, z), dim3(threads), arguments, shared_bytes, nullptr);
}
EXPORTED int cuGetErrorString(int, const char** words) {
  *words = emulator::error.c_str();
  return 0;
}
}
