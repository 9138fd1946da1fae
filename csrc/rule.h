// The contract between a rule and the code that runs it.
//
// A rule is a class template over its arithmetic type T (float or double) with
//   name      what the op is called: optimzoo::fused_NAME_
//   states    the names of its state tensors, in the order of operator()
//   hyper     the names of its hyper-parameters, in the order of the constructor's array
//   Rule(double lr, const double* hyper, double step)
//             run once per tensor, in double: bias corrections belong here
//   void operator()(T& param, T grad, T&... state) const
//             the arithmetic of one coordinate; writes param and the states, never the gradient; choices are made on T,
//             not on bool members, for GCC vectorises those only where all is equally wide
// and OZ_RULE(Rule) behind it. A rule of two forms tells them apart by a member T form, 0 or 1; a rule whose coupled
// weight decay adds something else than the parameter to the gradient says so in T pull(T param) const. It sees neither
// dtypes, chunks and threads nor weight decay, maximize and loss scales: those come before it, in Prologue. The Python
// twin of rules/NAME.h is optimzoo/NAME.py, same lines, same order.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

#if defined(__CUDACC__)
#define OZ_FN __host__ __device__ __forceinline__
#define OZ_UNROLL _Pragma("unroll")
#else
#define OZ_FN inline __attribute__((always_inline))
#define OZ_UNROLL _Pragma("GCC unroll 16")
#endif

// Code for the device; the tests compile it for the host as well.
#if defined(__CUDA_ARCH__) || defined(OZ_EMULATED)
#define OZ_ON_DEVICE
#endif

namespace optimzoo {

template <template <typename> class Rule>
constexpr int num_states = std::size(Rule<float>::states);
template <template <typename> class Rule>
constexpr int num_hyper = std::size(Rule<float>::hyper);

// Moves `average` by `weight` of the way to `value`; from the end that is nearer, as torch.lerp does, so that nothing
// of a small value is lost beside a large average that is to be forgotten. Where the weight is 1 - beta, take that
// difference in double: in float, 1 - 0.999 has lost four of its seven digits.
template <typename T>
OZ_FN T lerp(T value, T average, T weight) {
  const T distance = value - average;
  return weight < T(0.5) ? average + distance * weight : value - distance * (1 - weight);
}

template <typename T>
OZ_FN T sign(T x) {
  return static_cast<T>((x > 0) - (x < 0));
}

// The larger one; NaN if either is.
template <typename T>
OZ_FN T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

template <typename T>
OZ_FN bool finite(T x) {
  return x - x == 0;
}

// base to the power of a whole number of steps.
OZ_FN double power(double base, double steps) {
#if defined(OZ_ON_DEVICE)
  // The library's pow is a call, across which registers are spilled to local memory.
  double result = 1;
  for (int64_t n = static_cast<int64_t>(steps); n > 0; n >>= 1, base *= base)
    if (n & 1) result *= base;
  return result;
#else
  return std::pow(base, steps);
#endif
}

// exp(x) where it is a normal number and its inverse too: |x| <= largest_exponent; NaN stays NaN. The library's exp is
// a call per element, which no compiler vectorises without -ffast-math; this one is a dozen multiply-adds. Exact to 1.5
// ulp in float, 2 in double (tests/test_native.py).
template <typename T>
constexpr T largest_exponent = sizeof(T) == 4 ? T(87) : T(708);
template <typename T>
OZ_FN T exponential(T x) {
#if defined(OZ_ON_DEVICE)
  return exp(x);
#else
  constexpr bool narrow = sizeof(T) == 4;
  constexpr int mantissa = narrow ? 23 : 52, terms = narrow ? 7 : 13;
  // x = n log(2) + r, |r| <= log(2)/2. Adding 1.5 * 2^mantissa + bias leaves n, rounded, in the low bits of the sum, as
  // the exponent of 2^n. log(2) comes in two pieces so that n times the first is exact.
  constexpr T shift = narrow ? T(12582912 + 127) : T(6755399441055744 + 1023);
  constexpr T log2_high = narrow ? T(0.693359375) : T(0.693145751953125);
  constexpr T log2_low = narrow ? T(-2.12194440e-4) : T(1.42860682030941723212e-6);
  const T shifted = x * T(1.4426950408889634) + shift;
  const T n = shifted - shift;
  const T r = (x - n * log2_high) - n * log2_low, square = r * r;
  // The Taylor series, its odd and its even terms side by side: half as long to wait for.
  T factorial = 1, odd = 0, even = 0;
  OZ_UNROLL
  for (int k = 2; k <= terms; ++k) factorial *= k;
  OZ_UNROLL
  for (int k = terms; k > 0; k -= 2) {
    odd = odd * square + 1 / factorial;
    factorial /= k;
    even = even * square + 1 / factorial;
    factorial /= k > 1 ? k - 1 : 1;
  }
  std::conditional_t<narrow, uint32_t, uint64_t> bits;
  std::memcpy(&bits, &shifted, sizeof(T));
  bits <<= mantissa;
  T scale;  // 2^n
  std::memcpy(&scale, &bits, sizeof(T));
  return (odd * r + even) * scale;
#endif
}

// What weight decay that is coupled adds to the gradient, before it is weighted: the parameter, if the rule says
// nothing.
template <typename Rule, typename T>
OZ_FN auto pull(const Rule& rule, T param, int) -> decltype(rule.pull(param)) {
  return rule.pull(param);
}
template <typename Rule, typename T>
OZ_FN T pull(const Rule&, T param, long) {
  return param;
}

// What comes before every rule, in torch.optim's order: loss scale and sign, then weight decay.
template <typename T>
struct Prologue {
  T grad_factor;   // 1 / loss scale, negative to maximize
  T weight_decay;  // coupled: what is added to the gradient; zero where it is decoupled
  T keep;          // decoupled: what is left of the parameter

  template <typename Rule>
  OZ_FN void apply(const Rule& rule, T& param, T& grad) const {
    grad *= grad_factor;
    // Not with a zero weight decay: 0 * param would carry an infinite parameter into the gradient as NaN.
    grad = weight_decay != 0 ? grad + weight_decay * pull(rule, param, 0) : grad;
    param *= keep;
  }
};

// Random bits for rounding: a function of the seed, the step, the tensor and the coordinate alone, so that they depend
// neither on threads nor on the device. The twin in Python is optimzoo/rounding.py.
OZ_FN uint64_t mix(uint64_t x) {  // Steele et al., SplitMix, 2014
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

OZ_FN uint32_t random_key(uint64_t seed, double step, uint64_t tensor) {
  return static_cast<uint32_t>(mix(mix(mix(seed) ^ static_cast<uint64_t>(step)) ^ tensor) >> 32);
}

// A coordinate's bits come from the key plus its index times this.
constexpr uint32_t stride = 0x9e3779b9;
// The key is as good as random; what this adds is that neighbours do not round alike. Shift and factor were searched
// for: numbers less than 70 apart are not correlated by more than chance (tests/test_store.py).
OZ_FN uint32_t scatter(uint32_t x) { return (x ^ (x >> 14)) * 0xdd973235; }

// The upper half of a float's bits, up or down by chance so that its mean is the float: adding a random lower half
// carries as often as what is cut off is large. That of an infinity is zero and does not carry; a NaN must not.
// Two arrays share what `bits` scattered, half of it each; the next two what another product makes of it.
template <size_t place>
OZ_FN uint16_t round_randomly(float value, uint32_t bits) {
  OZ_UNROLL
  for (size_t pair = 0; pair < place / 2; ++pair) bits *= 0x2c1b3c6d;
  const uint32_t random = place % 2 == 0 ? bits >> 16 : (bits ^ bits >> 16) & 0xffff;
  uint32_t number;
  memcpy(&number, &value, sizeof number);
  return static_cast<uint16_t>((number + (value == value ? random : 0)) >> 16);
}

}  // namespace optimzoo
