// What the CPU and the CUDA library share: an op's schema, and reading and checking its arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "rule.h"

// The tests build the CUDA kernels for the host (tests/emulation), under another name.
#if defined(OZ_EMULATED)
#define OZ_NAMESPACE optimzoo_emulated
#define OZ_CUDA CPU
#else
#define OZ_NAMESPACE optimzoo
#define OZ_CUDA CUDA
#endif

namespace optimzoo {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

template <template <typename> class Rule>
std::string op_name() {
  return std::string("fused_") + Rule<float>::name + "_";
}

template <template <typename> class Rule>
std::string schema() {
  std::ostringstream out;
  out << op_name<Rule>() << "(Tensor(a!)[] param, Tensor[] grad";
  char alias = 'b';
  for (const char* state : Rule<float>::states) out << ", Tensor(" << alias++ << "!)[] " << state;
  out << ", *, Tensor lr";
  for (const char* hyper : Rule<float>::hyper) out << ", float " << hyper;
  out << ", Tensor(" << alias << "!)[] step, Tensor(" << char(alias + 1) << "!)[] master, float weight_decay, "
      << "bool decoupled_weight_decay, bool fixed_decay, bool maximize, bool stochastic=False, int seed=0, "
      << "Tensor? grad_scale=None, Tensor? found_inf=None, int held=0) -> ()";
  return out.str();
}

// A tensor of the caller's, for the length of one call. Not torch::stable::Tensor: a step handles thousands of them,
// and a reference count apiece is what a small tensor's step would cost.
struct Release {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using Handle = std::unique_ptr<AtenTensorOpaque, Release>;
using List = std::vector<Handle>;

inline List take_list(StableIValue value) {
  const auto list = torch::stable::detail::to<StableListHandle>(value);
  size_t size = 0;
  List tensors;
  torch_list_size(list, &size);
  tensors.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    torch_list_get_item(list, i, &item);
    tensors.emplace_back(torch::stable::detail::to<AtenTensorHandle>(item));
  }
  torch_delete_list(list);
  return tensors;
}

inline Handle take_optional(StableIValue value) {
  auto tensor = torch::stable::detail::to<std::optional<torch::stable::Tensor>>(value);
  AtenTensorHandle handle = nullptr;
  if (tensor) aoti_torch_new_tensor_handle(tensor->get(), &handle);
  return Handle(handle);
}

enum class Dtype { f32, f64, bf16, f16, other };

// The C shim's getters fail only for an undefined tensor, which a list from Python cannot hold.
struct Facts {
  int32_t device_type = 0, device_index = 0, layout = 0;
  Dtype dtype = Dtype::other;
  int64_t numel = 0, dim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  void* data = nullptr;

  explicit Facts(AtenTensorHandle tensor) {
    int32_t type = 0;
    aoti_torch_get_layout(tensor, &layout);
    aoti_torch_get_device_type(tensor, &device_type);
    aoti_torch_get_device_index(tensor, &device_index);
    aoti_torch_get_dtype(tensor, &type);
    static const int32_t types[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                                    aoti_torch_dtype_float16()};
    dtype = static_cast<Dtype>(std::find(types, types + 4, type) - types);
    if (!strided()) return;  // a sparse tensor has neither strides nor data
    aoti_torch_get_numel(tensor, &numel);
    aoti_torch_get_dim(tensor, &dim);
    aoti_torch_get_sizes(tensor, &sizes);
    aoti_torch_get_strides(tensor, &strides);
    aoti_torch_get_data_ptr(tensor, &data);
  }

  bool strided() const {
    static const int32_t value = aoti_torch_layout_strided();
    return layout == value;
  }

  // False where the memory has been given back (torch.UntypedStorage.resize_).
  bool has_memory() const { return data != nullptr || numel == 0; }

  bool same_shape(const Facts& other) const { return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes); }

  // Of tensors that share a shape. The stride of a dimension of size one means nothing, nor do those of no elements.
  bool same_strides(const Facts& other) const {
    for (int64_t i = 0; i < dim; ++i)
      if (numel > 0 && sizes[i] > 1 && strides[i] != other.strides[i]) return false;
    return true;
  }

  // Fills a block of memory without gaps or overlap, in whatever order of dimensions.
  bool dense() const {
    int64_t expected = 1;
    bool contiguous = true;
    for (int64_t i = dim - 1; i >= 0 && contiguous; --i) {
      contiguous = sizes[i] == 1 || strides[i] == expected;
      expected *= sizes[i];
    }
    if (contiguous || numel == 0) return true;
    std::vector<std::pair<int64_t, int64_t>> order;
    for (int64_t i = 0; i < dim; ++i)
      if (sizes[i] > 1) order.emplace_back(strides[i], sizes[i]);
    std::sort(order.begin(), order.end());
    expected = 1;
    for (const auto& [stride, size] : order) {
      if (stride != expected) return false;
      expected *= size;
    }
    return true;
  }
};

// One parameter with all that its step reads and writes.
template <int N>
struct Item {
  void* param;
  const void* grad;
  void* states[N > 0 ? N : 1];
  float* master;  // what a narrow parameter was before it was rounded, if that is kept
  float* step;
  int64_t numel;
  Dtype dtype;
  bool compressed;  // the states are bfloat16
  uint32_t index;   // in the call
};

// Finds the lists that hold() kept under a number (cpu.cpp).
using FindHeld = std::shared_ptr<const List>(int64_t held);

// The arguments of one call. Whatever is wrong with them is said before anything is written.
template <template <typename> class Rule>
struct Call {
  static constexpr int N = num_states<Rule>, H = num_hyper<Rule>;
  std::vector<List> taken;           // param, grad, the states, step, master
  std::shared_ptr<const List> held;  // or the states, step and master, one after the other
  Handle lr, grad_scale, found_inf;
  double hyper[H > 0 ? H : 1];
  double weight_decay;
  bool decoupled_weight_decay, fixed_decay, maximize, stochastic;
  uint64_t seed;
  std::vector<Item<N>> items;
  int32_t device_index = 0;

  // The stack's values are taken over one by one, in the schema's order.
  Call(StableIValue* stack, int32_t device_type, FindHeld* find_held = nullptr) {
    using torch::stable::detail::to;
    for (int i = 0; i < N + 2; ++i) taken.push_back(take_list(*stack++));
    lr = Handle(to<AtenTensorHandle>(*stack++));
    for (int i = 0; i < H; ++i) hyper[i] = to<double>(*stack++);
    for (int i = 0; i < 2; ++i) taken.push_back(take_list(*stack++));
    weight_decay = to<double>(*stack++);
    decoupled_weight_decay = to<bool>(*stack++);
    fixed_decay = to<bool>(*stack++);
    maximize = to<bool>(*stack++);
    stochastic = to<bool>(*stack++);
    seed = static_cast<uint64_t>(to<int64_t>(*stack++));
    grad_scale = take_optional(*stack++);
    found_inf = take_optional(*stack++);
    const int64_t number = to<int64_t>(*stack++);
    if (number != 0) {
      if (!find_held) fail("held lists are for the CPU");
      held = find_held(number);
      if (!held) fail("nothing is held under ", number);
    }
    read_items(device_type);
    check_scalar("lr", lr, device_type);
    check_scalar("grad_scale", grad_scale, device_type);
    check_scalar("found_inf", found_inf, device_type);
  }

  // The weight decay that enters the gradient.
  double coupled() const { return decoupled_weight_decay ? 0 : weight_decay; }

  // What multiplies the parameter, given the learning rate.
  OZ_FN static double keep(double lr, double weight_decay, bool decoupled_weight_decay, bool fixed_decay) {
    return !decoupled_weight_decay ? 1 : fixed_decay ? 1 - weight_decay : 1 - lr * weight_decay;
  }

 private:
  static constexpr int step = N + 2, master = N + 3;  // where they are among the lists

  static const char* list_name(int list) {
    if (list < 2) return list == 0 ? "param" : "grad";
    return list < step ? std::begin(Rule<float>::states)[list - 2] : list == step ? "step" : "master";
  }

  static const char* dtype_name(Dtype dtype) {
    static const char* names[] = {"float32", "float64", "bfloat16", "float16", "of another kind"};
    return names[static_cast<int>(dtype)];
  }

  void check_scalar(const char* name, const Handle& tensor, int32_t device_type) const {
    if (!tensor) return;
    const Facts facts(tensor.get());
    if (facts.numel != 1 || facts.dtype == Dtype::other || !facts.has_memory())
      fail(name, " must be one floating-point number");
    if (facts.device_type != aoti_torch_device_type_cpu() &&
        (facts.device_type != device_type || facts.device_index != device_index))
      fail(name, " is on another device than the first parameter");
  }

  void read_items(int32_t device_type) {
    const size_t count = taken[0].size();
    const Handle* lists[master + 1];
    for (int list = 0; list <= master; ++list) {
      const bool is_held = held && list > 1;
      const size_t begin = (list - 2) * count, end = is_held ? std::min(begin + count, held->size()) : 0;
      const size_t size = !is_held ? taken[list].size() : end > begin ? end - begin : 0;
      if (size != count && !(list == master && size == 0))
        fail(list_name(list), " holds ", size, " tensors, param ", count);
      lists[list] = size == 0 ? nullptr : is_held ? held->data() + begin : taken[list].data();
    }
    items.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const Facts param(lists[0][i].get());
      if (i == 0) device_index = param.device_index;
      if (!param.strided() || param.dtype == Dtype::other)
        fail("param[", i, "] must be a strided float32, float64, bfloat16 or float16 tensor");
      if (!param.dense()) fail("param[", i, "] must fill its memory without gaps or overlap");
      Item<N> item = {};
      item.param = param.data;
      item.numel = param.numel;
      item.dtype = param.dtype;
      item.index = static_cast<uint32_t>(i);
      // The averages of narrow parameters are kept in float32, or those of any but double ones in bfloat16.
      const bool narrow = param.dtype != Dtype::f64 && param.dtype != Dtype::f32;
      Dtype wide = param.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
      for (int list = 0; list <= master; ++list) {
        if (list == master && !(lists[master] && narrow)) continue;
        const Facts facts = list == 0 ? param : Facts(lists[list][i].get());
        if (list == 2 && list < step && wide == Dtype::f32 && facts.dtype == Dtype::bf16) {
          item.compressed = true;
          wide = Dtype::bf16;
        }
        const Dtype expected = list < 2 ? param.dtype : list < step ? wide : Dtype::f32;
        if (facts.device_type != device_type || facts.device_index != device_index)
          fail(list_name(list), "[", i, "] is on another device than the first parameter");
        if (!facts.strided()) fail(list_name(list), "[", i, "] must be a strided tensor");
        if (facts.dtype != expected)
          fail(list_name(list), "[", i, "] is ", dtype_name(facts.dtype), ", must be ", dtype_name(expected));
        if (list == step ? facts.numel != 1 : !facts.same_shape(param))
          fail(list_name(list), "[", i, "] has another shape than its parameter");
        if (list != step && !facts.same_strides(param))
          fail(list_name(list), "[", i, "] has other strides than its parameter");
        if (!facts.has_memory()) fail(list_name(list), "[", i, "] has no memory");
        if (list == 1)
          item.grad = facts.data;
        else if (list >= 2 && list < step)
          item.states[list - 2] = facts.data;
        else if (list == step)
          item.step = static_cast<float*>(facts.data);
        else if (list == master)
          item.master = static_cast<float*>(facts.data);
      }
      items.push_back(item);
    }
  }
};

// Calls `run` with a value of the type that `dtype` names.
template <typename F>
void with_dtype(Dtype dtype, const F& run) {
  switch (dtype) {
    case Dtype::f32:
      return run(float());
    case Dtype::f64:
      return run(double());
    case Dtype::bf16:
      return run(BFloat16());
    default:
      return run(Half());
  }
}

// Arithmetic on a dtype is done in double for double and in float for all others.
template <typename P>
using Wide = std::conditional_t<std::is_same_v<P, double>, double, float>;

// Calls `run` with a value of an item's type of parameter and one of its type of state.
template <int N, typename F>
void with_types(const Item<N>& item, const F& run) {
  with_dtype(item.dtype, [&](auto p) {
    using T = Wide<decltype(p)>;
    if constexpr (N > 0 && std::is_same_v<T, float>)
      if (item.compressed) return run(p, BFloat16());
    run(p, T());
  });
}

}  // namespace optimzoo
