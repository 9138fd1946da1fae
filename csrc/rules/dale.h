#pragma once
#include "../rule.h"

namespace optimzoo {

// What the rules below share: the parameter is multiplied by exp(exponent), which keeps its sign; in the other form the
// exponent's counterpart is added instead.
template <typename T>
struct Multiplicative {
  T form, clip, min_abs, max_abs;  // form 1 multiplies, 0 adds

  OZ_FN explicit Multiplicative(const double* h)
      : form(h[0]), clip(h[1] < largest_exponent<T> ? h[1] : largest_exponent<T>), min_abs(h[2]), max_abs(h[3]) {}

  OZ_FN T pull(T param) const { return form != 0 ? param != 0 ? std::copysign(T(1), param) : T(0) : param; }

  // The parameter after `move`, the step that a plain rule would add.
  OZ_FN T moved(T param, T move) const {
    const T exponent = std::copysign(T(1), param) * move;
    const T low = exponent < clip ? exponent : clip;
    T size = std::abs(param) * exponential(low > -clip ? low : -clip);
    size = size > min_abs ? size : min_abs;
    size = size < max_abs ? size : max_abs;
    const T result = param != 0 ? std::copysign(size, param) : param;
    return form != 0 ? result : param + move;
  }

  // Whether a coordinate takes part in the step: what is not finite is not written.
  OZ_FN bool steps(T move) const { return form == 0 || finite(move); }
};

// Exponentiated gradient (Kivinen and Warmuth, 1997; Cornford et al., 2024).
template <typename T>
struct DaleSGD : Multiplicative<T> {
  static constexpr const char* name = "dalesgd";
  static constexpr std::array<const char*, 0> states = {};
  static constexpr const char* hyper[] = {"dale", "exponent_clip", "min_abs", "max_abs"};
  T lr;

  OZ_FN DaleSGD(double rate, const double* h, double) : Multiplicative<T>(h), lr(rate) {}

  OZ_FN void operator()(T& param, T grad) const {
    const T move = -lr * grad;
    const T moved = this->moved(param, move);  // whether it steps or not: so it stays out of the choice
    param = this->steps(move) ? moved : param;
  }
};
OZ_RULE(DaleSGD)

// The same with momentum.
template <typename T>
struct DaleSGDMomentum : Multiplicative<T> {
  static constexpr const char* name = "dalesgd_momentum";
  static constexpr const char* states[] = {"momentum_buffer"};
  static constexpr const char* hyper[] = {"dale",     "exponent_clip", "min_abs", "max_abs",
                                          "momentum", "dampening",     "nesterov"};
  T lr, momentum, weight, ahead;

  OZ_FN DaleSGDMomentum(double rate, const double* h, double step)
      : Multiplicative<T>(h), lr(rate), momentum(h[4]), weight(step == 1 ? 1 : 1 - h[5]), ahead(h[6]) {}

  OZ_FN void operator()(T& param, T grad, T& momentum_buffer) const {
    const T average = momentum * momentum_buffer + weight * grad;
    const T direction = ahead != 0 ? grad + momentum * average : average;
    const T move = -lr * direction;
    const T moved = this->moved(param, move);
    const bool steps = this->steps(move);
    momentum_buffer = steps ? average : momentum_buffer;
    param = steps ? moved : param;
  }
};
OZ_RULE(DaleSGDMomentum)

// Adam's direction (Kingma and Ba, 2015; Loshchilov and Hutter, 2019) in the exponent.
template <typename T>
struct DaleAdamW : Multiplicative<T> {
  static constexpr const char* name = "daleadamw";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* hyper[] = {"dale", "exponent_clip", "min_abs", "max_abs", "beta1", "beta2", "eps"};
  T weight1, beta2, weight2, eps, step_size, root_correction;

  OZ_FN DaleAdamW(double lr, const double* h, double step)
      : Multiplicative<T>(h),
        weight1(1 - h[4]),
        beta2(h[5]),
        weight2(1 - h[5]),
        eps(h[6]),
        step_size(lr / (1 - power(h[4], step))),
        root_correction(1 / sqrt(1 - power(h[5], step))) {}

  OZ_FN void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq) const {
    const T average = lerp(grad, exp_avg, weight1);
    const T square = beta2 * exp_avg_sq + weight2 * grad * grad;
    const T move = -step_size * average / (std::sqrt(square) * root_correction + eps);
    const T moved = this->moved(param, move);
    const bool steps = this->steps(move);
    exp_avg = steps ? average : exp_avg;
    exp_avg_sq = steps ? square : exp_avg_sq;
    param = steps ? moved : param;
  }
};
OZ_RULE(DaleAdamW)

// Langevin dynamics that keep the sign; `noise` is standard normal.
template <typename T>
struct DaleLangevin : Multiplicative<T> {
  static constexpr const char* name = "dalelangevin";
  static constexpr const char* states[] = {"noise"};
  static constexpr const char* hyper[] = {"dale", "exponent_clip", "min_abs", "max_abs", "temperature",
                                          "s",    "ito",           "kind"};
  T lr, drift, spread, kind;

  // kind 0 is geometric Brownian motion, 1 mirrored, 2 has the Hessian's metric.
  OZ_FN DaleLangevin(double rate, const double* h, double)
      : Multiplicative<T>(h),
        lr(rate),
        drift(h[0] == 0   ? 0
              : h[7] == 0 ? -h[6] * h[5] * h[5] * rate / 2
              : h[7] == 1 ? rate * h[4]
                          : 0),
        spread(h[0] != 0 && h[7] == 0 ? h[5] * sqrt(rate) : sqrt(2 * rate * h[4])),
        kind(h[7]) {}

  OZ_FN void operator()(T& param, T grad, T& noise) const {
    const T direction = sign(param), size = std::abs(param);
    const T rate = kind == 1 ? lr * size : lr;
    const T bound = size < this->min_abs ? this->min_abs : size;
    const T shake = kind == 2 ? spread / std::sqrt(bound) : spread;
    // moved() multiplies by the sign, which is its own inverse.
    const T move = -rate * grad + direction * (drift + shake * noise);
    const T step = this->form != 0 ? move : -lr * grad + spread * noise;
    param = this->steps(step) ? this->moved(param, step) : param;
  }
};
OZ_RULE(DaleLangevin)

}  // namespace optimzoo
