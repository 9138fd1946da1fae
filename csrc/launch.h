// What the CUDA files share: launching a kernel on the current stream of a device.
#pragma once
#include <cuda_runtime.h>

#include "fused.h"

namespace optimzoo {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) fail("CUDA: ", cudaGetErrorString(error));
}

template <typename... Params, typename... Args>
void launch(unsigned blocks, unsigned threads, cudaStream_t stream, void (*kernel)(Params...), const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...));
}

// Makes a device the current one for as long as it lives; its current stream.
class OnDevice {
 public:
  explicit OnDevice(int32_t index) {
    CUDAGuardHandle guard;
    aoti_torch_create_cuda_guard(index, &guard);
    guard_.reset(guard);
    void* stream = nullptr;
    aoti_torch_get_current_cuda_stream(index, &stream);
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  struct Delete {
    void operator()(CUDAGuardOpaque* guard) const { aoti_torch_delete_cuda_guard(guard); }
  };
  std::unique_ptr<CUDAGuardOpaque, Delete> guard_;
  cudaStream_t stream_;
};

}  // namespace optimzoo
