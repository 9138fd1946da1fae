#pragma once
#include "../rule.h"

namespace optimzoo {

// Dubey et al., diffGrad, 2019.
template <typename T>
struct DiffGrad {
  static constexpr const char* name = "diffgrad";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq", "previous_grad"};
  static constexpr const char* hyper[] = {"beta1", "beta2", "eps", "variant"};
  T weight1, beta2, weight2, eps, step_size, root_correction, slope, plain, curved;
  T sign_below;                  // differences less than this keep their sign
  T far = -largest_exponent<T>;  // not a constant, for GCC would take the exponential of one out of the choice

  OZ_FN DiffGrad(double lr, const double* h, double step)
      : weight1(1 - h[0]),
        beta2(h[1]),
        weight2(1 - h[1]),
        eps(h[2]),
        step_size(lr / (1 - power(h[0], step))),
        root_correction(1 / sqrt(1 - power(h[1], step))),
        slope(h[3] == 2 ? -0.5 : -1),
        plain(h[3] == 2 ? 5 : 1),
        curved(h[3] == 2 ? -4 : 0),
        sign_below(h[3] == 1 ? 0 : -T(INFINITY)) {}

  OZ_FN void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& previous_grad) const {
    exp_avg = lerp(grad, exp_avg, weight1);
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad;
    const T difference = previous_grad - grad;
    // sigmoid(x) from exp(-|x|), which never overflows; its denominator joins the step's, for one division
    const T exponent = slope * std::abs(difference);
    const T tail = exponential(far > exponent ? far : exponent);
    const T friction = difference < sign_below ? tail : plain + curved * tail;
    param -= step_size * friction * exp_avg / ((1 + tail) * (std::sqrt(exp_avg_sq) * root_correction + eps));
    previous_grad = grad;
  }
};
OZ_RULE(DiffGrad)

}  // namespace optimzoo
