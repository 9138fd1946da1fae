#pragma once
#include "../rule.h"

namespace optimzoo {

// Bernstein et al., signSGD, 2018.
template <typename T>
struct Signum {
  static constexpr const char* name = "signum";
  static constexpr const char* states[] = {"exp_avg"};
  static constexpr const char* hyper[] = {"momentum"};
  T lr, weight;

  OZ_FN Signum(double lr_, const double* h, double /*step*/) : lr(lr_), weight(1 - h[0]) {}

  OZ_FN void operator()(T& param, T grad, T& exp_avg) const {
    exp_avg = lerp(grad, exp_avg, weight);
    param -= lr * sign(exp_avg);
  }
};
OZ_RULE(Signum)

}  // namespace optimzoo
