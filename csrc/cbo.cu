// Consensus-based optimization on a CUDA device. A thread owns the coordinates of one block of random numbers of one
// run: it sums its part of the consensus over the particles and then moves them, neighbours reading neighbours.
#include "cbo.h"
#include "launch.h"

namespace optimzoo {

constexpr int cbo_threads = 128;

struct CboParams {
  void *x, *consensus;
  const double *weights, *drift_gate, *noise_gate;
  double* norms;
  int64_t particles, coordinates, begin, end;  // of one group
  double drift, diffusion, clip;
  Source source;
  unsigned blocks_per_run;
  bool moves, isotropic;
};

template <typename T>
__global__ void __launch_bounds__(cbo_threads) cbo_kernel(const CboParams p) {
  constexpr int width = normals_per_block<T>;
  const int64_t run = blockIdx.x / p.blocks_per_run;
  const int64_t block =
      p.begin / width + int64_t(blockIdx.x % p.blocks_per_run) * cbo_threads + threadIdx.x;  // of random numbers
  const int64_t from = block * width;
  if (from >= p.end) return;
  T* x = static_cast<T*>(p.x) + run * p.particles * p.coordinates + from;
  T* consensus = static_cast<T*>(p.consensus) + run * p.coordinates + from;
  bool own[width];  // the first and the last block of a group may not be all its own
  T c[width];
  OZ_UNROLL
  for (int k = 0; k < width; ++k) {
    own[k] = from + k >= p.begin && from + k < p.end;
    c[k] = own[k] && p.weights == nullptr ? consensus[k] : T(0);
  }
  if (p.weights != nullptr) {
    for (int64_t i = 0; i < p.particles; ++i) {
      const double weight = p.weights[run * p.particles + i];
      if (!(weight > 0)) continue;  // where there is no weight there may be no number either
      OZ_UNROLL
      for (int k = 0; k < width; ++k)
        if (own[k]) c[k] += static_cast<T>(weight) * x[i * p.coordinates + k];
    }
    OZ_UNROLL
    for (int k = 0; k < width; ++k)
      if (own[k]) consensus[k] = c[k];
  }
  if (!p.moves) return;
  for (int64_t i = 0; i < p.particles; ++i) {
    const int64_t row = run * p.particles + i;
    double drift = p.drift, diffusion = p.diffusion;
    if (p.drift_gate != nullptr) {
      if (p.drift_gate[row] == 0 && p.noise_gate[row] == 0) continue;
      drift *= p.drift_gate[row];
      diffusion *= p.noise_gate[row];
    }
    T z[width];
    normals(p.source.words(uint32_t(block), uint32_t(i), uint32_t(run)), z);
    const T size = p.isotropic ? T(p.norms[row] < p.clip ? p.norms[row] : p.clip) : T(0);
    OZ_UNROLL
    for (int k = 0; k < width; ++k) {
      if (!own[k]) continue;
      T& value = x[i * p.coordinates + k];
      value = p.isotropic ? moved<true>(value, c[k], z[k], T(drift), T(diffusion), size, T(p.clip))
                          : moved<false>(value, c[k], z[k], T(drift), T(diffusion), size, T(p.clip));
    }
  }
}

// The distance of each particle from the consensus, a block for each; summed in a fixed order.
template <typename T>
__global__ void __launch_bounds__(cbo_threads) norm_kernel(const CboParams p) {
  __shared__ double parts[cbo_threads];
  const int64_t row = blockIdx.x, run = row / p.particles;
  const T* x = static_cast<const T*>(p.x) + row * p.coordinates;
  const T* consensus = static_cast<const T*>(p.consensus) + run * p.coordinates;
  double sum = 0;
  for (int64_t j = threadIdx.x; j < p.coordinates; j += cbo_threads) {
    const double distance = x[j] - consensus[j];
    sum += distance * distance;
  }
  parts[threadIdx.x] = sum;
  for (unsigned half = cbo_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) p.norms[row] = sqrt(parts[0]);
}

template <typename T>
__global__ void __launch_bounds__(cbo_threads)
    normal_kernel(T* out, int64_t rows, int64_t particles, int64_t coordinates, Source source) {
  constexpr int width = normals_per_block<T>;
  const int64_t blocks = (coordinates + width - 1) / width;
  const int64_t index = int64_t(blockIdx.x) * cbo_threads + threadIdx.x, row = index / blocks, block = index % blocks;
  if (row >= rows) return;
  T z[width];
  normals(source.words(uint32_t(block), uint32_t(row % particles), uint32_t(row / particles)), z);
  for (int k = 0; k < width && block * width + k < coordinates; ++k) out[row * coordinates + block * width + k] = z[k];
}

template <typename T>
void run_cbo(const CboCall& call, cudaStream_t stream) {
  const Cube& cube = call.particles;
  CboParams p = {cube.data,
                 call.consensus,
                 call.weights,
                 call.drift_gate,
                 call.noise_gate,
                 call.norms,
                 cube.particles,
                 cube.coordinates,
                 0,
                 0,
                 0,
                 0,
                 call.clip,
                 call.source,
                 0,
                 true,
                 call.norms != nullptr};
  if (cube.runs * cube.particles * cube.coordinates == 0) return;
  const auto sweep = [&](bool weighs, bool moves) {
    p.weights = weighs ? call.weights : nullptr;
    p.moves = moves;
    for (int64_t group = 0, begin = 0; group < call.groups; begin = call.ends[group++]) {
      if (begin == call.ends[group]) continue;
      constexpr int width = normals_per_block<T>;
      p.begin = begin;
      p.end = call.ends[group];
      p.drift = call.drift[group];
      p.diffusion = call.diffusion[group];
      const int64_t blocks = (p.end + width - 1) / width - begin / width;
      p.blocks_per_run = static_cast<unsigned>((blocks + cbo_threads - 1) / cbo_threads);
      launch(static_cast<unsigned>(cube.runs) * p.blocks_per_run, cbo_threads, stream, cbo_kernel<T>, p);
    }
  };
  if (!p.isotropic) return sweep(true, true);
  if (call.weights) sweep(true, false);
  launch(static_cast<unsigned>(cube.runs * cube.particles), cbo_threads, stream, norm_kernel<T>, p);
  sweep(false, true);
}

void cbo(StableIValue* stack, uint64_t, uint64_t) {
  const CboCall call(stack, aoti_torch_device_type_cuda());
  const OnDevice device(call.particles.device_index);
  if (call.particles.dtype == Dtype::f64)
    run_cbo<double>(call, device.stream());
  else
    run_cbo<float>(call, device.stream());
}

template <typename T>
void fill_cube(const Cube& cube, const Source& source, cudaStream_t stream) {
  constexpr int64_t width = normals_per_block<T>;
  const int64_t rows = cube.runs * cube.particles, blocks = rows * ((cube.coordinates + width - 1) / width);
  if (blocks == 0) return;
  launch(static_cast<unsigned>((blocks + cbo_threads - 1) / cbo_threads), cbo_threads, stream, normal_kernel<T>,
         static_cast<T*>(cube.data), rows, cube.particles, cube.coordinates, source);
}

void normal(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const Handle out(to<AtenTensorHandle>(stack[0]));
  const Source source(to<int64_t>(stack[1]), to<int64_t>(stack[2]), to<int64_t>(stack[3]));
  const Cube cube("out", out, aoti_torch_device_type_cuda());
  const OnDevice device(cube.device_index);
  if (cube.dtype == Dtype::f64)
    fill_cube<double>(cube, source, device.stream());
  else
    fill_cube<float>(cube, source, device.stream());
}

}  // namespace optimzoo

STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, OZ_CUDA, m) {
  m.impl("cbo_", &optimzoo::cbo);
  m.impl("normal_", &optimzoo::normal);
}
