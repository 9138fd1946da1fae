#pragma once
#include "../rule.h"

namespace optimzoo {

// Zhuang et al., AdaBelief, 2020; rectified as in Liu et al., RAdam, 2019.
template <typename T>
struct AdaBelief {
  static constexpr const char* name = "adabelief";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_var"};
  static constexpr const char* hyper[] = {"beta1", "beta2", "eps", "rectify", "degenerated_to_sgd"};
  T weight1, beta2, weight2, eps, step_size, root_correction;
  T moves = 1, adaptive = 1;  // not bool: a choice is vectorised if it is made on what is as wide as the rest

  OZ_FN AdaBelief(double lr, const double* h, double step)
      : AdaBelief(lr, h[0], h[1], h[2], h[3] != 0, h[4] != 0, step) {}

  OZ_FN AdaBelief(double lr, double b1, double b2, double epsilon, bool rectify, bool degenerated_to_sgd, double step)
      : weight1(1 - b1), beta2(b2), weight2(1 - b2), eps(epsilon) {
    const double correction2 = 1 - power(b2, step);
    double size = lr / (1 - power(b1, step));
    root_correction = 1 / sqrt(correction2);
    if (rectify) {
      const double rho_inf = 2 / (1 - b2) - 1;
      const double rho = rho_inf - 2 * step * power(b2, step) / correction2;
      adaptive = rho >= 5;
      moves = adaptive != 0 || degenerated_to_sgd;
      if (adaptive != 0) {
        size *= sqrt(correction2 * (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho));
        root_correction = 1;
      }
    }
    step_size = size;
  }

  OZ_FN void average(T grad, T& exp_avg, T& exp_avg_var) const {
    exp_avg = lerp(grad, exp_avg, weight1);
    const T residual = grad - exp_avg;
    exp_avg_var = beta2 * exp_avg_var + weight2 * residual * residual + eps;  // eps stays in the state
  }

  OZ_FN void operator()(T& param, T grad, T& exp_avg, T& exp_avg_var) const {
    average(grad, exp_avg, exp_avg_var);
    const T denominator = adaptive != 0 ? std::sqrt(exp_avg_var) * root_correction + eps : T(1);
    param -= moves != 0 ? step_size * exp_avg / denominator : T(0);
  }
};
OZ_RULE(AdaBelief)

// The same with the running maximum of the variance (Reddi et al., AMSGrad, 2018).
template <typename T>
struct AdaBeliefAMSGrad : AdaBelief<T> {
  static constexpr const char* name = "adabelief_amsgrad";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_var", "max_exp_avg_var"};
  static constexpr const char* hyper[] = {"beta1", "beta2", "eps"};

  OZ_FN AdaBeliefAMSGrad(double lr, const double* h, double step)
      : AdaBelief<T>(lr, h[0], h[1], h[2], false, false, step) {}

  OZ_FN void operator()(T& param, T grad, T& exp_avg, T& exp_avg_var, T& max_exp_avg_var) const {
    this->average(grad, exp_avg, exp_avg_var);
    max_exp_avg_var = maximum(max_exp_avg_var, exp_avg_var);
    param -= this->step_size * exp_avg / (std::sqrt(max_exp_avg_var) * this->root_correction + this->eps);
  }
};
OZ_RULE(AdaBeliefAMSGrad)

}  // namespace optimzoo
