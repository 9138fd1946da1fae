// The step on the CPU: all tensors of a call are one index space, split over the threads once, so that a thousand small
// tensors cost one parallel region. Inner loops are plain; the compiler vectorises them for three levels of x86-64.
#include "cpu.h"

#include <torch/csrc/stable/ops.h>

#include <mutex>
#include <unordered_map>

#include "fused.h"

namespace optimzoo {

// Elements [0, n) of one tensor. No two of the arrays overlap.
template <bool coupled, typename Rule, typename T, typename... State>
OZ_FN void sweep(const Rule& rule, const Prologue<T>& prologue, int64_t n, T* param, const T* grad, State*... state) {
  OZ_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    T g = grad[i];
    prologue.template apply<coupled>(param[i], g);
    rule(param[i], g, state[i]...);
  }
}

// A narrow parameter and its gradient are widened block by block, so that the loop above sees float alone.
template <bool coupled, typename Rule, typename P, typename T, typename... State>
OZ_CLONES void run(Rule rule, Prologue<T> prologue, int64_t n, P* param, const P* grad, State*... state) {
  if constexpr (std::is_same_v<P, T>) {
    sweep<coupled>(rule, prologue, n, param, grad, state...);
  } else {
    constexpr int64_t block = 512;
    T wide_param[block], wide_grad[block];
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t size = std::min(block, n - begin);
      for (int64_t i = 0; i < size; ++i) wide_param[i] = param[begin + i];
      for (int64_t i = 0; i < size; ++i) wide_grad[i] = grad[begin + i];
      sweep<coupled>(rule, prologue, size, wide_param, wide_grad, state + begin...);
      for (int64_t i = 0; i < size; ++i) param[begin + i] = wide_param[i];
    }
  }
}

template <bool coupled, typename Rule, typename P, typename T, int N, size_t... S>
void run_part(const Rule& rule, const Prologue<T>& prologue, const Item<N>& item, int64_t begin, int64_t end,
              std::index_sequence<S...>) {
  run<coupled>(rule, prologue, end - begin, static_cast<P*>(item.param) + begin,
               static_cast<const P*>(item.grad) + begin, static_cast<T*>(item.states[S]) + begin...);
}

inline double number(const Handle& tensor) {
  const Facts facts(tensor.get());
  double value = 0;
  with_dtype(facts.dtype, [&](auto p, auto) { value = *static_cast<const decltype(p)*>(facts.data); });
  return value;
}

// Lists that a caller passes again and again stay unpacked here, under a number: to bring a thousand small tensors over
// from Python takes longer than their step. What is kept are references; shapes, dtypes and addresses are read anew.
struct Held {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const List>> lists;
  int64_t last = 0;
};

inline Held& all_held() {
  static Held* held = new Held;  // never destroyed: tensors must not be released while the process ends
  return *held;
}

void hold(StableIValue* stack, uint64_t, uint64_t) {
  auto list = std::make_shared<const List>(take_list(stack[0]));
  const std::lock_guard lock(all_held().mutex);
  all_held().lists[++all_held().last] = std::move(list);
  stack[0] = torch::stable::detail::from(all_held().last);
}

void release(StableIValue* stack, uint64_t, uint64_t) {
  const std::lock_guard lock(all_held().mutex);
  all_held().lists.erase(torch::stable::detail::to<int64_t>(stack[0]));
}

std::shared_ptr<const List> find_held(int64_t number) {
  const std::lock_guard lock(all_held().mutex);
  const auto found = all_held().lists.find(number);
  return found == all_held().lists.end() ? nullptr : found->second;
}

template <template <typename> class Rule>
void fused(StableIValue* stack, uint64_t, uint64_t) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  const Call<Rule> call(stack, cpu, find_held);
  if (call.found_inf && number(call.found_inf) != 0) return;

  const double lr = number(call.lr);
  const double factor = (call.maximize ? -1 : 1) / (call.grad_scale ? number(call.grad_scale) : 1);
  const double keep = call.keep(lr, call.weight_decay, call.decoupled_weight_decay, call.fixed_decay);

  // Rules of equal steps are equal, and steps differ only where parameters joined late.
  std::vector<Rule<float>> narrow;
  std::vector<Rule<double>> wide;
  std::vector<size_t> rule_of(call.items.size());
  std::vector<int64_t> ends(call.items.size());
  double last_step = -1;
  int64_t total = 0;
  for (size_t i = 0; i < call.items.size(); ++i) {
    const double step = *call.items[i].step += 1;
    if (step != last_step) {
      narrow.emplace_back(lr, call.hyper, step);
      wide.emplace_back(lr, call.hyper, step);
      last_step = step;
    }
    rule_of[i] = narrow.size() - 1;
    ends[i] = total += call.items[i].numel;
  }

  const auto work = [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++i) {
      const auto& item = call.items[i];
      const int64_t start = ends[i] - item.numel, stop = std::min(end, ends[i]);
      with_dtype(item.dtype, [&](auto p, auto t) {
        using P = decltype(p);
        using T = decltype(t);
        const Rule<T>* rule;
        if constexpr (std::is_same_v<T, float>)
          rule = &narrow[rule_of[i]];
        else
          rule = &wide[rule_of[i]];
        const Prologue<T> prologue{T(factor), T(call.weight_decay), T(keep)};
        constexpr auto states = std::make_index_sequence<num_states<Rule>>();
        if (call.coupled())
          run_part<true, Rule<T>, P, T>(*rule, prologue, item, begin - start, stop - start, states);
        else
          run_part<false, Rule<T>, P, T>(*rule, prologue, item, begin - start, stop - start, states);
      });
      begin = stop;
    }
  };
  constexpr int64_t grain = 16384;  // below it, waking a thread costs more than the elements
  torch::stable::parallel_for(0, total, grain, work);
}

}  // namespace optimzoo

STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("hold", &optimzoo::hold);
  m.impl("release", &optimzoo::release);
}

#define OZ_RULE(Rule) \
  STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, CPU, m) { m.impl(op_name<Rule>().c_str(), &fused<Rule>); }
#include "rules.h"
