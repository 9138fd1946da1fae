// What the tests of the gradient's noise read: gradients of single samples, as matrices with a row for each, and those
// after one micro-batch and the next. Sums are float64; everything is read once, where torch reads it twice or copies
// it. Pieces and their order do not depend on the threads.
#include <torch/csrc/stable/ops.h>

#include "cpu.h"
#include "fused.h"

namespace optimzoo {

constexpr int64_t tile = 1024;  // columns whose sums stay in the first cache

// Adds every row to `sums`, or with `means` the square of what it differs from them by, and returns the sum of all
// squares. `rows` rows of `n` columns, one `stride` behind the other.
template <bool centred, typename P>
OZ_CLONES double add_rows(const P* data, int64_t rows, int64_t stride, int64_t n, const double* means, double* sums) {
  constexpr int lanes = 16;
  double squares[lanes] = {};
  double rest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const P* row = data + r * stride;
    int64_t c = 0;
    for (; c + lanes <= n; c += lanes) {
      Wide<P> wide[lanes];
      for (int lane = 0; lane < lanes; ++lane) wide[lane] = row[c + lane];
      for (int lane = 0; lane < lanes; ++lane) {
        const double value = static_cast<double>(wide[lane]) - (centred ? means[c + lane] : 0.0);
        sums[c + lane] += centred ? value * value : value;
        squares[lane] += value * value;
      }
    }
    for (; c < n; ++c) {
      const double value = static_cast<double>(row[c]) - (centred ? means[c] : 0.0);
      sums[c] += centred ? value * value : value;
      rest += value * value;
    }
  }
  for (const double square : squares) rest += square;
  return rest;
}

template <typename P>
OZ_CLONES double project(const P* row, const double* vector, int64_t n) {
  constexpr int lanes = 16;
  double sums[lanes] = {};
  Wide<P> wide[lanes];
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes) {
    for (int lane = 0; lane < lanes; ++lane) wide[lane] = row[c + lane];
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += static_cast<double>(wide[lane]) * vector[c + lane];
  }
  double total = 0;
  for (; c < n; ++c) total += static_cast<double>(row[c]) * vector[c];
  for (const double sum : sums) total += sum;
  return total;
}

// The squared norm of `after` and its inner product with `before`, which becomes `after` where it is to be kept.
template <typename P>
OZ_CLONES void compare(const P* after, P* before, int64_t n, bool keep, double* out) {
  constexpr int lanes = 16;
  double squares[lanes] = {}, products[lanes] = {};
  Wide<P> a[lanes], b[lanes];
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) a[lane] = after[i + lane];
    for (int lane = 0; lane < lanes; ++lane) b[lane] = before[i + lane];
    for (int lane = 0; lane < lanes; ++lane)
      squares[lane] += static_cast<double>(a[lane]) * static_cast<double>(a[lane]);
    for (int lane = 0; lane < lanes; ++lane)
      products[lane] += static_cast<double>(a[lane]) * static_cast<double>(b[lane]);
    if (keep)
      for (int lane = 0; lane < lanes; ++lane) before[i + lane] = after[i + lane];
  }
  out[0] = out[1] = 0;
  for (; i < n; ++i) {
    out[0] += static_cast<double>(after[i]) * static_cast<double>(after[i]);
    out[1] += static_cast<double>(after[i]) * static_cast<double>(before[i]);
    if (keep) before[i] = after[i];
  }
  for (int lane = 0; lane < lanes; ++lane) out[0] += squares[lane], out[1] += products[lane];
}

// Contiguous, on the CPU, of a dtype that can be read; a vector is float64.
inline bool readable(const Facts& facts, bool vector) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  if (facts.device_type != cpu || !facts.strided() || facts.dtype == Dtype::other || !facts.has_memory()) return false;
  int64_t expected = 1;
  for (int64_t i = facts.dim - 1; i >= 0; --i) {
    if (facts.sizes[i] != 1 && facts.strides[i] != expected) return facts.numel == 0;
    expected *= facts.sizes[i];
  }
  return !vector || facts.dtype == Dtype::f64;
}

// sums[i] += the rows of samples[i]; out = the sum of all squares. With means both are of the differences from them.
void sample_sums(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const List samples = take_list(stack[0]), means = take_list(stack[1]), sums = take_list(stack[2]);
  const Handle out(to<AtenTensorHandle>(stack[3]));
  const Facts result(out.get());
  if (!readable(result, true) || result.numel != 1) fail("squares must be one float64 number on the CPU");
  if (samples.size() != sums.size() || (!means.empty() && means.size() != sums.size()))
    fail("samples, means and sums hold ", samples.size(), ", ", means.size(), " and ", sums.size(), " tensors");

  struct Piece {
    const char* data;
    const double* means;
    double* sums;
    int64_t rows, stride, columns;
    Dtype dtype;
    double squares;
  };
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (size_t i = 0; i < samples.size(); ++i) {
    const Facts a(samples[i].get()), s(sums[i].get());
    const Facts m(means.empty() ? sums[i].get() : means[i].get());
    if (!readable(a, false) || !readable(s, true) || !readable(m, true) || a.dim < 1 || m.numel != s.numel ||
        a.numel != a.sizes[0] * s.numel)
      fail("samples[", i, "] must be contiguous on the CPU, with a row for each sample as long as its float64 sums");
    for (int64_t begin = 0; begin < s.numel; begin += tile) {
      const int64_t width = a.dtype == Dtype::f64 ? 8 : a.dtype == Dtype::f32 ? 4 : 2;
      pieces.push_back({static_cast<const char*>(a.data) + begin * width,
                        means.empty() ? nullptr : static_cast<const double*>(m.data) + begin,
                        static_cast<double*>(s.data) + begin, a.sizes[0], s.numel, std::min(tile, s.numel - begin),
                        a.dtype, 0});
    }
    total += a.numel;
  }
  const int64_t count = static_cast<int64_t>(pieces.size());
  const int64_t grain = total == 0 ? 1 : std::max<int64_t>(1, 32768 * count / total);
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Piece& p = pieces[i];
      with_dtype(p.dtype, [&](auto value) {
        const auto* data = reinterpret_cast<const decltype(value)*>(p.data);
        p.squares = p.means ? add_rows<true>(data, p.rows, p.stride, p.columns, p.means, p.sums)
                            : add_rows<false>(data, p.rows, p.stride, p.columns, p.means, p.sums);
      });
    }
  });
  double squares = 0;
  for (const Piece& piece : pieces) squares += piece.squares;
  *static_cast<double*>(result.data) = squares;
}

// products[r] = the inner product of row r of all samples with the vectors.
void sample_dots(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const List samples = take_list(stack[0]), vectors = take_list(stack[1]);
  const Handle out(to<AtenTensorHandle>(stack[2]));
  const Facts result(out.get());
  if (!readable(result, true)) fail("products must be float64 numbers on the CPU");
  if (samples.size() != vectors.size()) fail("vectors holds ", vectors.size(), " tensors, samples ", samples.size());
  std::vector<Facts> left, right;
  int64_t width = 0;
  for (size_t i = 0; i < samples.size(); ++i) {
    left.emplace_back(samples[i].get());
    right.emplace_back(vectors[i].get());
    if (!readable(left[i], false) || !readable(right[i], true) || left[i].numel != result.numel * right[i].numel)
      fail("samples[", i, "] must be contiguous on the CPU, with a row for each product as long as its float64 vector");
    width += right[i].numel;
  }
  double* products = static_cast<double*>(result.data);
  const int64_t grain = std::max<int64_t>(1, width == 0 ? 1 : 32768 / width);
  torch::stable::parallel_for(0, result.numel, grain, [&](int64_t first, int64_t last) {
    std::fill(products + first, products + last, 0.0);
    for (size_t i = 0; i < left.size(); ++i)
      with_dtype(left[i].dtype, [&](auto value) {
        const auto* data = static_cast<const decltype(value)*>(left[i].data);
        const int64_t n = right[i].numel;
        for (int64_t r = first; r < last; ++r)
          products[r] += project(data + r * n, static_cast<const double*>(right[i].data), n);
      });
  });
}

// out = the squared norm of `after`, all tensors as one vector, and its inner product with `before`.
void compare_gradients(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const List after = take_list(stack[0]), before = take_list(stack[1]);
  const bool keep = to<bool>(stack[2]);
  const Handle out(to<AtenTensorHandle>(stack[3]));
  const Facts result(out.get());
  if (!readable(result, true) || result.numel != 2) fail("out must be two float64 numbers on the CPU");
  if (after.size() != before.size()) fail("before holds ", before.size(), " tensors, after ", after.size());
  struct Piece {
    char *after, *before;
    int64_t count;
    Dtype dtype;
    double sums[2];
  };
  constexpr int64_t piece = 16384;
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (size_t i = 0; i < after.size(); ++i) {
    const Facts a(after[i].get()), b(before[i].get());
    if (!readable(a, false) || !readable(b, false) || a.dtype != b.dtype || a.numel != b.numel)
      fail("after[", i, "] and before[", i, "] must be contiguous on the CPU, of one size and dtype");
    const int64_t width = a.dtype == Dtype::f64 ? 8 : a.dtype == Dtype::f32 ? 4 : 2;
    for (int64_t begin = 0; begin < a.numel; begin += piece)
      pieces.push_back({static_cast<char*>(a.data) + begin * width,
                        static_cast<char*>(b.data) + begin * width,
                        std::min(piece, a.numel - begin),
                        a.dtype,
                        {0, 0}});
    total += a.numel;
  }
  const int64_t count = static_cast<int64_t>(pieces.size());
  const int64_t grain = total == 0 ? 1 : std::max<int64_t>(1, 2 * piece * count / total);
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Piece& p = pieces[i];
      with_dtype(p.dtype, [&](auto value) {
        using P = decltype(value);
        compare(reinterpret_cast<const P*>(p.after), reinterpret_cast<P*>(p.before), p.count, keep, p.sums);
      });
    }
  });
  double* sums = static_cast<double*>(result.data);
  sums[0] = sums[1] = 0;
  for (const Piece& p : pieces) sums[0] += p.sums[0], sums[1] += p.sums[1];
}

}  // namespace optimzoo

STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, CPU, m) {
  m.impl("compare_gradients", &optimzoo::compare_gradients);
  m.impl("sample_sums", &optimzoo::sample_sums);
  m.impl("sample_dots", &optimzoo::sample_dots);
}
