// As much of the CUDA runtime as csrc/step_kto_cuda.cu uses, on the host: test_cuda.py compiles that
// file against this one (as cuda_runtime.h) to run its kernels where there is no GPU.
//
// Blocks run one after another, in a random order. The threads of a block are fibers of one host
// thread: they take turns, in a random order, at the collective operations only. So results are
// those of a GPU, races within a block are not seen, and a collective that some thread of its mask
// never reaches ends the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(threads)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the test"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : 101; }

struct dim3 {
  unsigned x;
  explicit dim3(unsigned x = 1) : x(x) {}
};

namespace on_host {

struct Collective {  // of the lanes in one mask
  unsigned arrived = 0, left = 0;
  uint64_t value[32];
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 15);
  bool done = false;
};

inline dim3 grid, block, block_index, thread_index;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::map<unsigned, Collective> collectives[32];  // of a warp, by mask
inline unsigned waiting, generation;                    // at __syncthreads
inline std::mt19937 random(0);

inline void yield() {
  const dim3 me = thread_index;
  swapcontext(&fibers[me.x].context, &scheduler);
  thread_index = me;
}

// The values of all lanes in `mask`.
inline Collective exchange(unsigned mask, uint64_t mine) {
  const unsigned lane = thread_index.x % 32, bit = 1u << lane;
  Collective& shared = collectives[thread_index.x / 32][mask];
  while (shared.left) yield();  // the call before is being left
  if (!(mask & bit) || (shared.arrived & bit)) std::abort();
  shared.value[lane] = mine;
  shared.arrived |= bit;
  while (shared.arrived != mask) yield();
  const Collective out = shared;
  shared.left |= bit;
  if (shared.left == mask) shared.arrived = shared.left = 0;
  return out;
}

template <typename T, typename F>
T reduce(unsigned mask, T mine, F combine) {
  const Collective all = exchange(mask, static_cast<uint64_t>(mine));
  T out = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) out = combine(out, static_cast<T>(all.value[lane]));
  return out;
}

inline void (*body)(void*);
inline void* body_argument;

inline void run_fiber() {
  body(body_argument);
  fibers[thread_index.x].done = true;
  swapcontext(&fibers[thread_index.x].context, &scheduler);
}

inline void run_block() {
  fibers = std::vector<Fiber>(block.x);
  for (auto& warp : collectives) warp.clear();
  waiting = 0;
  std::vector<unsigned> order(block.x);
  for (unsigned i = 0; i < block.x; ++i) {
    order[i] = i;
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = fibers[i].stack.data();
    fibers[i].context.uc_stack.ss_size = fibers[i].stack.size();
    makecontext(&fibers[i].context, run_fiber, 0);
  }
  for (int round = 0; !order.empty(); ++round) {
    if (round > 1000000) {
      std::fputs("a collective operation waits for a thread that never comes\n", stderr);
      std::abort();
    }
    if (round % 8 == 0) std::shuffle(order.begin(), order.end(), random);
    std::vector<unsigned> running;
    for (unsigned i : order) {
      thread_index.x = i;
      swapcontext(&scheduler, &fibers[i].context);
      if (!fibers[i].done) running.push_back(i);
    }
    order = running;
  }
}

}  // namespace on_host

#define gridDim on_host::grid
#define blockDim on_host::block
#define blockIdx on_host::block_index
#define threadIdx on_host::thread_index

template <typename Argument>
cudaError_t cudaLaunchKernel(
    void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t stream) {
  if (stream != nullptr) return 101;  // there is the default stream only
  static void (*current)(Argument);
  current = kernel;
  on_host::grid = grid;
  on_host::block = block;
  on_host::body = [](void* argument) { current(*static_cast<Argument*>(argument)); };
  on_host::body_argument = arguments[0];
  std::vector<unsigned> order(grid.x);
  for (unsigned i = 0; i < grid.x; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), on_host::random);
  for (unsigned i : order) {
    on_host::block_index.x = i;
    on_host::run_block();
  }
  return cudaSuccess;
}

inline void __syncthreads() {
  const unsigned mine = on_host::generation;
  if (++on_host::waiting == on_host::block.x) {
    on_host::waiting = 0;
    ++on_host::generation;
  }
  while (mine == on_host::generation) on_host::yield();
}

inline void __threadfence() {}

template <typename T>
T __ldcg(const T* x) {
  return *x;
}

template <typename T>
T atomicAdd(T* x, T y) {
  const T before = *x;
  *x += y;
  return before;
}

template <typename T>
T atomicOr(T* x, T y) {
  const T before = *x;
  *x |= y;
  return before;
}

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline unsigned __match_any_sync(unsigned mask, unsigned x) {
  const on_host::Collective all = on_host::exchange(mask, x);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && all.value[lane] == x) same |= 1u << lane;
  return same;
}

template <typename T>
T __reduce_add_sync(unsigned mask, T x) {
  return on_host::reduce(mask, x, [](T a, T b) { return a + b; });
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned x) {
  return on_host::reduce(mask, x, [](unsigned a, unsigned b) { return a | b; });
}

inline double __shfl_xor_sync(unsigned mask, double x, int lanes) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const on_host::Collective all = on_host::exchange(mask, bits);
  std::memcpy(&x, &all.value[(on_host::thread_index.x % 32) ^ lanes], sizeof x);
  return x;
}
