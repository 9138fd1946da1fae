#pragma once
#include "../rule.h"

namespace optimzoo {

// Ward et al., AdaGrad-Norm, 2019: what is particular about it is in the learning rate, which comes divided.
template <typename T>
struct AdaGradNorm {
  static constexpr const char* name = "adagradnorm";
  static constexpr std::array<const char*, 0> states = {}, hyper = {};
  T lr;

  OZ_FN AdaGradNorm(double rate, const double*, double) : lr(rate) {}

  OZ_FN void operator()(T& param, T grad) const { param -= lr * grad; }
};
OZ_RULE(AdaGradNorm)

}  // namespace optimzoo
