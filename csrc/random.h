// Random numbers that are functions of a counter: Philox4x32-10 (Salmon et al., 2011), and normal numbers from it by
// Box and Muller. The Python twin is optimzoo/random.py; tests/test_random.py has the generator's known answers.
#pragma once
#include "rule.h"

namespace optimzoo {

struct Words {
  uint32_t a, b, c, d;
};

OZ_FN Words philox(Words counter, uint32_t key0, uint32_t key1) {
#if defined(OZ_ON_DEVICE)
  using Word = uint32_t;
#else
  using Word = uint64_t;  // a lane of the product: GCC 12 would pack and unpack halves in each round
#endif
  Word a = counter.a, b = counter.b, c = counter.c, d = counter.d;
  OZ_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t one = uint64_t(a) * 0xD2511F53u, two = uint64_t(c) * 0xCD9E8D57u;
    a = Word(two >> 32) ^ b ^ key0;
    c = Word(one >> 32) ^ d ^ key1;
    b = Word(two & 0xFFFFFFFFu);
    d = Word(one & 0xFFFFFFFFu);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {uint32_t(a), uint32_t(b), uint32_t(c), uint32_t(d)};
}

// -2 log(u) for u in (0, 1]; nothing but multiply-adds and one division, which a compiler vectorises.
template <typename T>
OZ_FN T neg_two_log(T u) {
#if defined(OZ_ON_DEVICE)
  return -2 * log(u);
#else
  using Int = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr bool narrow = sizeof(T) == 4;
  constexpr int mantissa = narrow ? 23 : 52, terms = narrow ? 4 : 9;
  constexpr Int one = narrow ? Int(0x3F800000) : Int(0x3FF0000000000000);
  constexpr Int root_half = narrow ? Int(0x3F3504F3) : Int(0x3FE6A09E667F3BCD);
  // u = 2^n m with sqrt(1/2) <= m < sqrt(2).
  Int bits;
  std::memcpy(&bits, &u, sizeof(T));
  bits += one - root_half;
  T n;
  if constexpr (narrow) {
    n = static_cast<T>(static_cast<int32_t>(bits >> mantissa) - 127);
  } else {
    const Int as_double = (bits >> mantissa) | Int(0x4330000000000000);  // 2^52 + the biased exponent
    std::memcpy(&n, &as_double, sizeof(T));
    n -= T(4503599627370496.0 + 1023);
  }
  bits = (bits & ((Int(1) << mantissa) - 1)) + root_half;
  T m;
  std::memcpy(&m, &bits, sizeof(T));
  const T s = (m - 1) / (m + 1), z = s * s;  // log(m) = 2 artanh(s), |s| < 0.172
  T sum = T(1) / (2 * terms + 1);
  OZ_UNROLL
  for (int k = terms - 1; k >= 0; --k) sum = sum * z + T(1) / (2 * k + 1);
  return -2 * (n * T(0.6931471805599453) + 2 * s * sum);
#endif
}

template <typename T, int size>
struct InverseFactorials {
  T values[size] = {};
  constexpr InverseFactorials() {
    double value = 1;
    for (int n = 0; n < size; value /= ++n) values[n] = static_cast<T>(value);
  }
};

// Cosine and sine for |x| <= pi/2, by their Taylor series; on a device as well, whose own reduce large arguments in
// local memory.
template <typename T>
OZ_FN void cos_sin(T x, T& cosine, T& sine) {
  constexpr int terms = sizeof(T) == 4 ? 6 : 10;
  const T y = -x * x;
  constexpr InverseFactorials<T, 2 * terms + 2> inverse;
  cosine = inverse.values[2 * terms];
  sine = inverse.values[2 * terms + 1];
  OZ_UNROLL
  for (int k = terms - 1; k >= 0; --k) {
    cosine = cosine * y + inverse.values[2 * k];
    sine = sine * y + inverse.values[2 * k + 1];
  }
  sine *= x;
}

// Two normal numbers. Half the circle comes from the angle, the other half from a sign: -1 or 1.
template <typename T>
OZ_FN void box_muller(T u, T angle, T sign, T& one, T& two) {
  T cosine, sine;
  cos_sin(angle, cosine, sine);
  const T radius = sign * std::sqrt(neg_two_log(u));
  one = radius * cosine;
  two = radius * sine;
}

template <typename T>
constexpr int normals_per_block = sizeof(T) == 4 ? 4 : 2;

// From 32 bits each: u in (0, 1] and an angle within pi/2.
OZ_FN void normal_pair(uint32_t first, uint32_t second, float& one, float& two) {
  constexpr float scale = 1.f / 2147483648.f;
  const float u = (static_cast<float>(static_cast<int32_t>(first >> 1)) + 0.5f) * scale;
  const float turn = (static_cast<float>(static_cast<int32_t>(second >> 1) - 1073741824) + 0.5f) * scale;
  const float sign = 1.f - 2.f * static_cast<float>(static_cast<int32_t>(second & 1));
  box_muller(u, turn * 3.14159265f, sign, one, two);
}

// From 52 bits each, put into the mantissa of a number in [1, 2): AVX2 has no conversion from 64-bit integers.
OZ_FN double one_to_two(uint32_t low, uint32_t high) {
  const uint64_t bits = ((uint64_t(high) << 32 | low) >> 12) | 0x3FF0000000000000u;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

OZ_FN void normals(const Words& words, float* out) {
  normal_pair(words.a, words.b, out[0], out[1]);
  normal_pair(words.c, words.d, out[2], out[3]);
}

OZ_FN void normals(const Words& words, double* out) {
  constexpr double half_step = 1.0 / 9007199254740992.0;  // 2^-53
  const double u = (one_to_two(words.a, words.b) - 1) + half_step;
  const double turn = (one_to_two(words.c, words.d) - 1.5) + half_step;
  const double sign = 1. - 2. * static_cast<double>(static_cast<int32_t>(words.c & 1));
  box_muller(u, turn * 3.14159265358979323846, sign, out[0], out[1]);
}

}  // namespace optimzoo
