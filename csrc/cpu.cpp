// The step on the CPU: all tensors of a call are one index space, split over the threads once, so that a thousand small
// tensors cost one parallel region. Inner loops are plain; the compiler vectorises them for three levels of x86-64.
#include "cpu.h"

#include <torch/csrc/stable/ops.h>

#include <mutex>
#include <unordered_map>

#include "fused.h"
#include "pieces.h"

namespace optimzoo {

// What becomes of the bits that a narrow parameter cannot hold.
enum class Rest { nearest, stochastic, master };

template <typename T, typename E>
OZ_FN T widen(E value) {
  return static_cast<T>(value);
}
template <typename T>
OZ_FN T
widen(uint16_t value) {  // of bfloat16, in integers: GCC vectorises those with what surrounds them, and no struct
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  memcpy(&result, &bits, sizeof bits);
  return result;
}

template <typename E, typename T>
OZ_FN E nearest(T value) {
  return static_cast<E>(value);
}
template <>
OZ_FN uint16_t nearest<uint16_t, float>(float value) {  // ties to even
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits += value == value ? 0x7fff + (bits >> 16 & 1) : 0;
  return static_cast<uint16_t>(bits >> 16);
}

template <size_t place>
OZ_FN void round_to(uint16_t& to, float value, uint32_t random) {
  to = round_randomly<place>(value, random);
}
template <size_t place, typename E, typename T>
OZ_FN void round_to(E& to, T value, uint32_t) {
  to = value;
}

// The rule on one coordinate. Each state in a variable of its own: an array would not be taken apart into registers.
template <typename Rule, typename T, size_t... I, typename... State>
OZ_FN void apply(const Rule& rule, uint32_t random, T& param, T grad, std::index_sequence<I...>, State&... state) {
  [&](auto... values) __attribute__((always_inline)) {
    rule(param, grad, values...);
    (round_to<I>(state, values, random), ...);
  }(widen<T>(state)...);
}

// Elements [0, n) of one tensor. No two of the arrays overlap.
template <Rest rest, typename Rule, typename P, typename T, typename Index, typename... State>
OZ_FN void sweep(const Rule& rule, const Prologue<T>& prologue, uint32_t counter, int64_t n, P* param, const P* grad,
                 float* master, Index index, State*... state) {
  OZ_IVDEP
  for (int64_t i = 0; i < n; ++i, counter += stride) {
    const uint32_t random = scatter(counter);
    T p = widen<T>(param[i]), g = widen<T>(grad[i]);
    if constexpr (rest == Rest::master)  // where it is not what was rounded, somebody has changed the parameter
      p = widen<T>(nearest<P>(master[i])) == p ? master[i] : p;
    prologue.apply(rule, p, g);
    apply(rule, random, p, g, index, state[i]...);
    if constexpr (rest == Rest::stochastic)
      round_to<sizeof...(State)>(param[i], p, random);
    else
      param[i] = nearest<P>(p);
    if constexpr (rest == Rest::master) master[i] = p;
  }
}

// Calls `call` with the rule; of one with two forms with a copy whose form the compiler knows: it does not vectorise a
// choice between them within the loop.
template <typename Rule, typename F>
OZ_FN auto in_one_form(Rule rule, int, const F& call) -> decltype(rule.form, void()) {
  if (rule.form != 0) {
    rule.form = 1;
    call(rule);
  } else {
    rule.form = 0;
    call(rule);
  }
}
template <typename Rule, typename F>
OZ_FN void in_one_form(const Rule& rule, long, const F& call) {
  call(rule);
}

template <Rest rest, typename Rule, typename P, typename T, typename Index, typename... State>
OZ_CLONES void run(Rule rule, Prologue<T> prologue, uint32_t counter, int64_t n, P* param, const P* grad, float* master,
                   Index index, State*... state) {
  if constexpr (std::is_same_v<P, Half>) {
    // Whose conversions are calls or tables on most machines: block by block, so that the loop sees float alone.
    constexpr int64_t block = 512;
    float wide_param[block], wide_grad[block];
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t size = std::min(block, n - begin);
      for (int64_t i = 0; i < size; ++i) wide_param[i] = param[begin + i];
      for (int64_t i = 0; i < size; ++i) wide_grad[i] = grad[begin + i];
      if constexpr (rest == Rest::master)
        for (int64_t i = 0; i < size; ++i)
          if (static_cast<float>(static_cast<P>(master[begin + i])) == wide_param[i]) wide_param[i] = master[begin + i];
      in_one_form(rule, 0, [&](const Rule& fixed) __attribute__((always_inline)) {
        sweep<Rest::nearest>(fixed, prologue, counter, size, wide_param, wide_grad, nullptr, index, state + begin...);
      });
      counter += stride * static_cast<uint32_t>(size);
      for (int64_t i = 0; i < size; ++i) param[begin + i] = static_cast<P>(wide_param[i]);
      if constexpr (rest == Rest::master) std::copy(wide_param, wide_param + size, master + begin);
    }
  } else {
    in_one_form(rule, 0, [&](const Rule& fixed) __attribute__((always_inline)) {
      // A block's worth of what comes next is asked for before each block: the machine's own guess stops at every page.
      constexpr int64_t block = 64, distance = 512;
      const auto fetch = [&](const auto* array) __attribute__((always_inline)) {
        for (int64_t i = 0; i < block; i += 64 / sizeof(*array)) __builtin_prefetch(array + i);
      };
      int64_t begin = 0;
      const auto part = [&](int64_t size) __attribute__((always_inline)) {
        float* const at = rest == Rest::master ? master + begin : nullptr;
        sweep<rest>(fixed, prologue, counter, size, param + begin, grad + begin, at, index, state + begin...);
        counter += stride * static_cast<uint32_t>(size);
      };
      for (; begin + block <= n; begin += block) {
        if (const int64_t ahead = begin + distance; ahead + block <= n)
          fetch(param + ahead), fetch(grad + ahead), (fetch(state + ahead), ...);
        part(block);
      }
      part(n - begin);
    });
  }
}

template <typename E>
using Bits = std::conditional_t<std::is_same_v<E, BFloat16>, uint16_t, E>;

template <typename P, typename S, typename Rule, typename T, int N, size_t... I>
void run_part(const Rule& rule, const Prologue<T>& prologue, uint32_t key, bool stochastic, const Item<N>& item,
              int64_t begin, int64_t end, std::index_sequence<I...> index) {
  const uint32_t counter = key + stride * static_cast<uint32_t>(begin);
  const auto with = [&](auto rest, float* master) {
    run<decltype(rest)::value>(rule, prologue, counter, end - begin, static_cast<Bits<P>*>(item.param) + begin,
                               static_cast<const Bits<P>*>(item.grad) + begin, master, index,
                               static_cast<Bits<S>*>(item.states[I]) + begin...);
  };
  if constexpr (!std::is_same_v<P, T>)
    if (item.master) return with(std::integral_constant<Rest, Rest::master>(), item.master + begin);
  if constexpr (std::is_same_v<P, BFloat16>)
    if (stochastic) return with(std::integral_constant<Rest, Rest::stochastic>(), nullptr);
  with(std::integral_constant<Rest, Rest::nearest>(), nullptr);
}

inline double number(const Handle& tensor) {
  const Facts facts(tensor.get());
  double value = 0;
  with_dtype(facts.dtype, [&](auto p) { value = *static_cast<const decltype(p)*>(facts.data); });
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
  double last_step = 0;
  int64_t total = 0;
  for (size_t i = 0; i < call.items.size(); ++i) {
    const double step = *call.items[i].step += 1;
    if (narrow.empty() || step != last_step) {
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
      with_types(item, [&](auto p, auto s) {
        using P = decltype(p);
        using S = decltype(s);
        using T = Wide<P>;
        const Rule<T>* rule;
        if constexpr (std::is_same_v<T, float>)
          rule = &narrow[rule_of[i]];
        else
          rule = &wide[rule_of[i]];
        const Prologue<T> prologue{T(factor), T(call.coupled()), T(keep)};
        const bool random = item.compressed || call.stochastic;
        const uint32_t key = random ? random_key(call.seed, *item.step, item.index) : 0;
        run_part<P, S>(*rule, prologue, key, call.stochastic, item, begin - start, stop - start,
                       std::make_index_sequence<num_states<Rule>>());
      });
      begin = stop;
    }
  };
  constexpr int64_t grain = 16384;  // below it, waking a thread costs more than the elements
  torch::stable::parallel_for(0, total, grain, work);
}

// The inner product of two lists of tensors, or of one with itself where the second is empty. It is summed piece by
// piece in a fixed order, whatever the threads.
void dot(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  static const int32_t cpu = aoti_torch_device_type_cpu();
  const List left = take_list(stack[0]), other = take_list(stack[1]);
  const List& right = other.empty() ? left : other;
  const Handle out(to<AtenTensorHandle>(stack[2]));
  const Facts result(out.get());
  if (result.device_type != cpu || result.dtype != Dtype::f64 || result.numel != 1 || !result.has_memory())
    fail("out must be one float64 number on the CPU");
  if (left.size() != right.size()) fail("right holds ", right.size(), " tensors, left ", left.size());

  std::vector<Pair> pieces;
  for (size_t i = 0; i < left.size(); ++i) {
    const Facts a(left[i].get()), b(right[i].get());
    if (a.device_type != cpu || b.device_type != cpu || a.dtype == Dtype::other || a.dtype != b.dtype || !a.strided() ||
        !b.strided() || !a.same_shape(b) || !a.same_strides(b) || !a.dense())
      fail("left[", i, "] and right[", i, "] must be dense floating-point CPU tensors of one shape, dtype and strides");
    if (!a.has_memory() || !b.has_memory()) fail("left[", i, "] or right[", i, "] has no memory");
    cut(a, b, pieces);
  }
  sum_pieces<1>(pieces, static_cast<double*>(result.data), [](Pair& piece, auto value) {
    using P = decltype(value);
    piece.sums[0] =
        inner_product(reinterpret_cast<const P*>(piece.left), reinterpret_cast<const P*>(piece.right), piece.count);
  });
}

}  // namespace optimzoo

STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("hold", &optimzoo::hold);
  m.impl("release", &optimzoo::release);
}

STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, CPU, m) { m.impl("dot", &optimzoo::dot); }

#define OZ_RULE(Rule) \
  STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, CPU, m) { m.impl(op_name<Rule>().c_str(), &fused<Rule>); }
#include "rules.h"
