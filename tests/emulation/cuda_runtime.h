// Runs CUDA kernels on the host: a thread per CUDA thread, one block after the other. It stands in for the header of
// the same name, so that the kernels' source is compiled as it is. It shows that they compute the right thing, not that
// they run on a GPU.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};

inline thread_local dim3 threadIdx, blockIdx;
inline pthread_barrier_t emulated_barrier;
inline void __syncthreads() { pthread_barrier_wait(&emulated_barrier); }

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline void __stwb(uint4* to, uint4 value) { *to = value; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "success"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  static_assert((sizeof(Params) + ...) <= 4096, "kernel arguments end at 4 KB");
  pthread_barrier_init(&emulated_barrier, nullptr, config->blockDim.x);
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < config->blockDim.x; ++thread)
    threads.emplace_back([&, thread] {
      threadIdx = dim3(thread);
      for (unsigned block = 0; block < config->gridDim.x; ++block) {
        blockIdx = dim3(block);
        kernel(args...);
        __syncthreads();  // the next block reuses the shared memory
      }
    });
  for (std::thread& thread : threads) thread.join();
  pthread_barrier_destroy(&emulated_barrier);
  return cudaSuccess;
}

// What cuda.cu calls of LibTorch's CUDA half.
struct CUDAGuardOpaque;
using CUDAGuardHandle = CUDAGuardOpaque*;
inline int32_t emulated_create_guard(int32_t, CUDAGuardHandle* guard) { return *guard = nullptr, 0; }
inline int32_t emulated_delete_guard(CUDAGuardHandle) { return 0; }
inline int32_t emulated_current_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
#define aoti_torch_create_cuda_guard emulated_create_guard
#define aoti_torch_delete_cuda_guard emulated_delete_guard
#define aoti_torch_get_current_cuda_stream emulated_current_stream
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
