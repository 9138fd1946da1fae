// The step on a CUDA device. One launch serves many tensors: their table is the kernel's argument, and every block
// finds its tensor there. Nothing is allocated and nothing is read back, so that a CUDA graph can hold the step.
#include "fused.h"
#include "launch.h"

namespace optimzoo {

constexpr int threads = 256;
constexpr int64_t chunk = 16 * 1024;  // elements of one block

// Kernel arguments end at 4 KB where older drivers are to be served; the scalars below need less than 256 bytes.
constexpr size_t table_bytes = 3840;

template <int N>
struct Table {
  struct Entry {
    Item<N> item;
    unsigned end;  // the first block that is not this tensor's
    bool aligned;  // all of its arrays start at a multiple of 16 bytes
  };
  static constexpr int capacity = (table_bytes - sizeof(int)) / sizeof(Entry);
  Entry entries[capacity];
  int size;
};

template <int H>
struct Scalars {
  double lr, hyper[H > 0 ? H : 1], weight_decay, coupled;
  const void* device_lr;  // instead of lr, where it lives on the device
  Dtype lr_dtype;
  bool decoupled_weight_decay, fixed_decay, maximize, stochastic;
  uint64_t seed;
  const float *grad_scale, *found_inf;
};

// Rules count from one, and a step that must not happen does not count.
template <int N>
__global__ void __launch_bounds__(threads) advance(const Table<N> table, const float* found_inf) {
  if (found_inf != nullptr && *found_inf != 0) return;
  const int i = blockIdx.x * threads + threadIdx.x;
  if (i < table.size) *table.entries[i].item.step += 1;
}

// Neighbouring elements, moved by accesses of 16 bytes. Loads become that by themselves; stores of values that were
// just computed one by one do not, so that __stwb spells them out.
template <typename E, int size>
struct Pack {
  static constexpr int per_piece = size * sizeof(E) > 16 ? 16 / sizeof(E) : size;
  struct alignas(per_piece * sizeof(E)) Piece {
    E values[per_piece];
  };
  Piece pieces[size / per_piece];

  OZ_FN E& operator[](int i) { return pieces[i / per_piece].values[i % per_piece]; }

  OZ_FN static Pack load(const void* array, int64_t index) {
    Pack pack;
    const auto* from = reinterpret_cast<const Piece*>(static_cast<const E*>(array) + index);
    OZ_UNROLL
    for (int i = 0; i < size / per_piece; ++i) pack.pieces[i] = from[i];
    return pack;
  }

  OZ_FN void store(void* array, int64_t index) const {
    auto* to = reinterpret_cast<Piece*>(static_cast<E*>(array) + index);
    OZ_UNROLL
    for (int i = 0; i < size / per_piece; ++i) {
      if constexpr (sizeof(Piece) == 16) {
        uint4 word;
        memcpy(&word, pieces + i, 16);
        __stwb(reinterpret_cast<uint4*>(to) + i, word);
      } else {
        to[i] = pieces[i];
      }
    }
  }
};

// What one block needs to know of its tensor; the bias corrections in it cost two powers in double, so that one thread
// works them out for all.
template <template <typename> class Rule, typename T>
struct Shared {
  Rule<T> rule;
  Prologue<T> prologue;
  bool stochastic;
  uint32_t key;  // of random bits
};

template <size_t place, typename E, typename T>
OZ_FN void narrow(E& to, T value, uint32_t) {
  to = static_cast<E>(value);
}
template <size_t place>
OZ_FN void narrow(BFloat16& to, float value, uint32_t random) {
  to.x = round_randomly<place>(value, random);
}

template <int size, template <typename> class Rule, typename P, typename S, typename T, size_t... I>
OZ_FN void update(const Shared<Rule, T>& shared, const Item<sizeof...(I)>& item, int64_t index,
                  std::index_sequence<I...>) {
  constexpr int N = sizeof...(I);
  auto param = Pack<P, size>::load(item.param, index);
  auto grad = Pack<P, size>::load(item.grad, index);
  Pack<S, size> states[N > 0 ? N : 1] = {Pack<S, size>::load(item.states[I], index)...};
  Pack<float, size> master;
  const bool has_master = !std::is_same_v<P, T> && item.master != nullptr;
  if (has_master) master = Pack<float, size>::load(item.master, index);
  OZ_UNROLL
  for (int i = 0; i < size; ++i) {
    T p = static_cast<T>(param[i]), g = static_cast<T>(grad[i]);
    // Where a master is not what the parameter was rounded from, somebody has changed the parameter.
    if (has_master && static_cast<T>(static_cast<P>(master[i])) == p) p = master[i];
    T s[N > 0 ? N : 1] = {static_cast<T>(states[I][i])...};
    shared.prologue.apply(shared.rule, p, g);
    shared.rule(p, g, s[I]...);
    const uint32_t random = scatter(shared.key + stride * static_cast<uint32_t>(index + i));
    (narrow<I>(states[I][i], s[I], random), ...);
    if (std::is_same_v<P, BFloat16> && shared.stochastic)
      narrow<N>(param[i], p, random);
    else
      param[i] = static_cast<P>(p);
    if (has_master) master[i] = p;
  }
  param.store(item.param, index);
  (states[I].store(item.states[I], index), ...);
  if (has_master) master.store(item.master, index);
}

template <template <typename> class Rule, typename P, typename S>
__global__ void __launch_bounds__(threads, 2)  // left alone, the compiler spills to fit three blocks
    step_kernel(const Table<num_states<Rule>> table, const Scalars<num_hyper<Rule>> scalars) {
  using T = Wide<P>;
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
  int i = 0;
  while (blockIdx.x >= table.entries[i].end) ++i;
  const auto& entry = table.entries[i];

  alignas(Shared<Rule, T>) __shared__ unsigned char storage[sizeof(Shared<Rule, T>)];
  auto& shared = *reinterpret_cast<Shared<Rule, T>*>(storage);
  if (threadIdx.x == 0) {
    double lr = scalars.lr;
    if (scalars.device_lr != nullptr)
      lr = scalars.lr_dtype == Dtype::f64 ? *static_cast<const double*>(scalars.device_lr)
                                          : *static_cast<const float*>(scalars.device_lr);
    const double factor =
        (scalars.maximize ? -1. : 1.) / (scalars.grad_scale != nullptr ? double(*scalars.grad_scale) : 1.);
    const double keep = Call<Rule>::keep(lr, scalars.weight_decay, scalars.decoupled_weight_decay, scalars.fixed_decay);
    const double step = *entry.item.step;
    new (storage) Shared<Rule, T>{Rule<T>(lr, scalars.hyper, step),
                                  {T(factor), T(scalars.coupled), T(keep)},
                                  scalars.stochastic,
                                  random_key(scalars.seed, step, entry.item.index)};
  }
  __syncthreads();

  constexpr auto states = std::make_index_sequence<num_states<Rule>>();
  constexpr int width = 16 / (sizeof(S) < sizeof(P) ? sizeof(S) : sizeof(P));
  const int64_t begin = (blockIdx.x - (i == 0 ? 0 : table.entries[i - 1].end)) * chunk;
  const int64_t end = begin + chunk < entry.item.numel ? begin + chunk : entry.item.numel;
  const int64_t packed = entry.aligned ? begin + (end - begin) / width * width : begin;
  for (int64_t index = begin + threadIdx.x * width; index < packed; index += threads * width)
    update<width, Rule, P, S, T>(shared, entry.item, index, states);
  for (int64_t index = packed + threadIdx.x; index < end; index += threads)
    update<1, Rule, P, S, T>(shared, entry.item, index, states);
}

// Launches over as many tensors of the same dtypes as fit into a table.
template <template <typename> class Rule>
class Launcher {
 public:
  static constexpr int N = num_states<Rule>, H = num_hyper<Rule>;

  Launcher(const Scalars<H>& scalars, cudaStream_t stream) : scalars_(scalars), stream_(stream) {}

  void add(const Item<N>& item) {
    if (item.numel == 0) return empty(item);
    uintptr_t bits = reinterpret_cast<uintptr_t>(item.param) | reinterpret_cast<uintptr_t>(item.grad) |
                     reinterpret_cast<uintptr_t>(item.master);
    for (const void* state : item.states) bits |= reinterpret_cast<uintptr_t>(state);
    blocks_ += static_cast<unsigned>((item.numel + chunk - 1) / chunk);
    table_.entries[table_.size++] = {item, blocks_, bits % 16 == 0};
    if (table_.size == Table<N>::capacity) flush();
  }

  void flush() {
    if (table_.size == 0) return;
    launch((table_.size + threads - 1) / threads, threads, stream_, advance<N>, table_, scalars_.found_inf);
    if (blocks_ > 0)
      with_types(table_.entries[0].item, [&](auto p, auto s) {
        launch(blocks_, threads, stream_, step_kernel<Rule, decltype(p), decltype(s)>, table_, scalars_);
      });
    table_.size = 0;
    blocks_ = 0;
  }

 private:
  // Its step counts all the same; it owns no block.
  void empty(const Item<N>& item) {
    table_.entries[table_.size++] = {item, blocks_, false};
    if (table_.size == Table<N>::capacity) flush();
  }

  Table<N> table_ = {};
  unsigned blocks_ = 0;
  Scalars<H> scalars_;
  cudaStream_t stream_;
};

inline const float* device_scalar(const char* name, const Handle& tensor, int32_t device_type) {
  if (!tensor) return nullptr;
  const Facts facts(tensor.get());
  if (facts.device_type != device_type || facts.dtype != Dtype::f32)
    fail(name, " must be a float32 tensor on the device of the parameters");
  return static_cast<const float*>(facts.data);
}

template <template <typename> class Rule>
void fused(StableIValue* stack, uint64_t, uint64_t) {
  static const int32_t cuda = aoti_torch_device_type_cuda();
  const Call<Rule> call(stack, cuda);
  if (call.items.empty()) return;

  const OnDevice device(call.device_index);
  Scalars<num_hyper<Rule>> scalars = {};
  const Facts lr(call.lr.get());
  if (lr.device_type == cuda) {
    if (lr.dtype != Dtype::f32 && lr.dtype != Dtype::f64) fail("lr on the device must be float32 or float64");
    scalars.device_lr = lr.data;
    scalars.lr_dtype = lr.dtype;
  } else {
    with_dtype(lr.dtype, [&](auto p) { scalars.lr = *static_cast<const decltype(p)*>(lr.data); });
  }
  std::copy(call.hyper, call.hyper + num_hyper<Rule>, scalars.hyper);
  scalars.weight_decay = call.weight_decay;
  scalars.coupled = call.coupled();
  scalars.decoupled_weight_decay = call.decoupled_weight_decay;
  scalars.fixed_decay = call.fixed_decay;
  scalars.maximize = call.maximize;
  scalars.stochastic = call.stochastic;
  scalars.seed = call.seed;
  scalars.grad_scale = device_scalar("grad_scale", call.grad_scale, cuda);
  scalars.found_inf = device_scalar("found_inf", call.found_inf, cuda);

  for (const bool compressed : {false, true})
    for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16}) {
      Launcher<Rule> launcher(scalars, device.stream());
      for (const auto& item : call.items)
        if (item.dtype == dtype && item.compressed == compressed) launcher.add(item);
      launcher.flush();
    }
}

}  // namespace optimzoo

#define OZ_RULE(Rule) \
  STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, OZ_CUDA, m) { m.impl(op_name<Rule>().c_str(), &fused<Rule>); }
#include "rules.h"
