// What the CPU and the CUDA library share of consensus-based optimization: schemas, arguments, one coordinate's move.
#pragma once
#include "fused.h"
#include "random.h"

namespace optimzoo {

// Fills a tensor (runs, particles, coordinates) with normal numbers; `first` is the number of its first particle.
constexpr const char* normal_schema = "normal_(Tensor(a!) out, int seed, int draw, int first) -> ()";

// One step of all runs. If `weights` (runs, particles) are given, `consensus` becomes the weighted mean; then each
// particle moves. Groups of coordinates end at `ends` and have a `drift` (lamda dt) and a `diffusion` (sigma sqrt(dt))
// each; the gates (runs, particles) multiply them, and a particle whose gates are both zero is left alone. `norms` is
// memory for isotropic noise.
constexpr const char* cbo_schema =
    "cbo_(Tensor(a!) particles, Tensor(b!) consensus, Tensor? weights, Tensor ends, Tensor drift, Tensor diffusion, "
    "Tensor? drift_gate, Tensor? noise_gate, Tensor(c!)? norms, float clip, int seed, int draw, int first) -> ()";

template <typename T>
OZ_FN T truncated(T distance, T clip) {
  return distance > clip ? clip : distance < -clip ? -clip : distance;
}

// `size` is the norm for isotropic noise.
template <bool isotropic, typename T>
OZ_FN T moved(T x, T consensus, T z, T drift, T diffusion, T size, T clip) {
  const T distance = x - consensus;
  return x - drift * distance + diffusion * (isotropic ? size : truncated(distance, clip)) * z;
}

// Where the random numbers of a step come from.
struct Source {
  uint32_t key0, key1, draw, first;

  Source(int64_t seed, int64_t draw, int64_t first)
      : key0(static_cast<uint32_t>(seed)),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        draw(static_cast<uint32_t>(draw)),
        first(static_cast<uint32_t>(first)) {}

  OZ_FN Words words(uint32_t block, uint32_t particle, uint32_t run) const {
    return philox({block, first + particle, run, draw}, key0, key1);
  }
};

// A contiguous tensor of runs x particles x coordinates.
struct Cube {
  void* data;
  Dtype dtype;
  int64_t runs, particles, coordinates;
  int32_t device_index;

  Cube(const char* name, const Handle& tensor, int32_t device_type) {
    const Facts facts(tensor.get());
    if (!facts.strided() || facts.dim != 3 || (facts.dtype != Dtype::f32 && facts.dtype != Dtype::f64))
      fail(name, " must be float32 or float64, of shape (runs, particles, coordinates)");
    if (facts.device_type != device_type) fail(name, " is on another device");
    if (!facts.has_memory()) fail(name, " has no memory");
    data = facts.data;
    dtype = facts.dtype;
    device_index = facts.device_index;
    runs = facts.sizes[0], particles = facts.sizes[1], coordinates = facts.sizes[2];
    int64_t expected = 1;
    for (int i = 2; i >= 0; --i) {
      if (facts.sizes[i] != 1 && facts.strides[i] != expected && facts.numel > 0) fail(name, " must be contiguous");
      expected *= facts.sizes[i];
    }
  }
};

// A contiguous tensor with as many elements and the dtype that are asked for; null where there is none.
inline void* array_of(const char* name, const Handle& tensor, int64_t numel, int32_t dtype, int32_t device_type) {
  if (!tensor) return nullptr;
  const Facts facts(tensor.get());
  int32_t type = 0;
  bool contiguous = false;
  aoti_torch_get_dtype(tensor.get(), &type);
  if (facts.strided()) aoti_torch_is_contiguous(tensor.get(), &contiguous);
  if (!facts.has_memory() || facts.device_type != device_type || facts.numel != numel || type != dtype || !contiguous)
    fail(name, " must be contiguous, have ", numel, " elements, the right dtype and the right device");
  return facts.data;
}

// The arguments of cbo_, checked before anything is written.
struct CboCall {
  Handle held[9];
  Cube particles;
  void* consensus;
  const double *weights, *drift_gate, *noise_gate;
  double* norms;
  const int64_t* ends;
  const double *drift, *diffusion;
  int64_t groups;
  double clip;
  Source source;

  // The stack's values are taken over one by one, in the schema's order.
  CboCall(StableIValue* stack, int32_t device_type)
      : held{take(stack[0]), take(stack[1]),          take_optional(stack[2]), take(stack[3]),         take(stack[4]),
             take(stack[5]), take_optional(stack[6]), take_optional(stack[7]), take_optional(stack[8])},
        particles("particles", held[0], device_type),
        clip(torch::stable::detail::to<double>(stack[9])),
        source(torch::stable::detail::to<int64_t>(stack[10]), torch::stable::detail::to<int64_t>(stack[11]),
               torch::stable::detail::to<int64_t>(stack[12])) {
    const int32_t f64 = aoti_torch_dtype_float64(), f32 = aoti_torch_dtype_float32();
    const int32_t cpu = aoti_torch_device_type_cpu();
    const int64_t rows = particles.runs * particles.particles;
    consensus = array_of("consensus", held[1], particles.runs * particles.coordinates,
                         particles.dtype == Dtype::f64 ? f64 : f32, device_type);
    weights = static_cast<const double*>(array_of("weights", held[2], rows, f64, device_type));
    drift_gate = static_cast<const double*>(array_of("drift_gate", held[6], rows, f64, device_type));
    noise_gate = static_cast<const double*>(array_of("noise_gate", held[7], rows, f64, device_type));
    norms = static_cast<double*>(array_of("norms", held[8], rows, f64, device_type));
    groups = Facts(held[3].get()).numel;
    ends = static_cast<const int64_t*>(array_of("ends", held[3], groups, aoti_torch_dtype_int64(), cpu));
    drift = static_cast<const double*>(array_of("drift", held[4], groups, f64, cpu));
    diffusion = static_cast<const double*>(array_of("diffusion", held[5], groups, f64, cpu));
    if (groups == 0 && particles.coordinates > 0) fail("ends must have a number for each group");
    for (int64_t group = 0, begin = 0; group < groups; begin = ends[group++])
      if (ends[group] < begin || (group == groups - 1 && ends[group] != particles.coordinates))
        fail("ends must rise to the number of coordinates, ", particles.coordinates);
    if ((drift_gate == nullptr) != (noise_gate == nullptr)) fail("drift_gate and noise_gate come together");
  }

 private:
  static Handle take(StableIValue value) { return Handle(torch::stable::detail::to<AtenTensorHandle>(value)); }
};

}  // namespace optimzoo
