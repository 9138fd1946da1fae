// Reductions over lists of tensors on the CPU: cut into pieces that do not depend on the threads, and neither does the
// order in which their results are added.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu.h"
#include "fused.h"

namespace optimzoo {

constexpr int64_t piece_size = 16384;  // below it, waking a thread costs more than the elements

inline int64_t width(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

inline const char* at(const Facts& facts, int64_t index) {
  return static_cast<const char*>(facts.data) + index * width(facts.dtype);
}

// Calls `run` with [0, count) in parts, for which `total` elements are read, two pieces' worth to a thread at least.
template <typename F>
void in_parallel(int64_t count, int64_t total, const F& run) {
  const int64_t grain = total == 0 ? 1 : std::max<int64_t>(1, 2 * piece_size * count / total);
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) run(i);
  });
}

// The inner product of two arrays. Sixteen sums side by side, for the compiler keeps the order of one.
template <typename P>
OZ_CLONES inline double inner_product(const P* left, const P* right, int64_t n) {
  constexpr int lanes = 16;
  double sums[lanes] = {};
  Wide<P> a[lanes], b[lanes];
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) a[lane] = left[i + lane];
    for (int lane = 0; lane < lanes; ++lane) b[lane] = right[i + lane];
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += static_cast<double>(a[lane]) * static_cast<double>(b[lane]);
  }
  double total = 0;
  for (; i < n; ++i) total += static_cast<double>(left[i]) * static_cast<double>(right[i]);
  for (const double sum : sums) total += sum;
  return total;
}

// A part of two tensors, and what is summed of it.
struct Pair {
  const char *left, *right;
  int64_t count;
  Dtype dtype;
  double sums[2];
};

inline void cut(const Facts& left, const Facts& right, std::vector<Pair>& pieces) {
  for (int64_t begin = 0; begin < left.numel; begin += piece_size)
    pieces.push_back({at(left, begin), at(right, begin), std::min(piece_size, left.numel - begin), left.dtype, {0, 0}});
}

// Calls `run` with each piece and a value of its type; out = the sums of all pieces.
template <int N, typename F>
void sum_pieces(std::vector<Pair>& pieces, double* out, const F& run) {
  int64_t total = 0;
  for (const Pair& piece : pieces) total += piece.count;
  in_parallel(static_cast<int64_t>(pieces.size()), total,
              [&](int64_t i) { with_dtype(pieces[i].dtype, [&](auto value) { run(pieces[i], value); }); });
  for (int k = 0; k < N; ++k) {
    out[k] = 0;
    for (const Pair& piece : pieces) out[k] += piece.sums[k];
  }
}

}  // namespace optimzoo
