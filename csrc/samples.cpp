// Passes over the gradients of single samples, as matrices with a row for each: what the tests of the gradient's noise
// read, and what clipping each sample needs. Sums are float64; everything is read once, where torch reads it twice or
// copies it. Pieces and their order do not depend on the threads.
#include "pieces.h"

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
      pieces.push_back({at(a, begin), means.empty() ? nullptr : static_cast<const double*>(m.data) + begin,
                        static_cast<double*>(s.data) + begin, a.sizes[0], s.numel, std::min(tile, s.numel - begin),
                        a.dtype, 0});
    }
    total += a.numel;
  }
  in_parallel(static_cast<int64_t>(pieces.size()), total, [&](int64_t i) {
    Piece& p = pieces[i];
    with_dtype(p.dtype, [&](auto value) {
      const auto* data = reinterpret_cast<const decltype(value)*>(p.data);
      p.squares = p.means ? add_rows<true>(data, p.rows, p.stride, p.columns, p.means, p.sums)
                          : add_rows<false>(data, p.rows, p.stride, p.columns, p.means, p.sums);
    });
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
  std::vector<Pair> pieces;
  for (size_t i = 0; i < after.size(); ++i) {
    const Facts a(after[i].get()), b(before[i].get());
    if (!readable(a, false) || !readable(b, false) || a.dtype != b.dtype || a.numel != b.numel)
      fail("after[", i, "] and before[", i, "] must be contiguous on the CPU, of one size and dtype");
    cut(a, b, pieces);
  }
  sum_pieces<2>(pieces, static_cast<double*>(result.data), [&](Pair& piece, auto value) {
    using P = decltype(value);
    // `before` is written; the schema says so.
    compare(reinterpret_cast<const P*>(piece.left), reinterpret_cast<P*>(const_cast<char*>(piece.right)), piece.count,
            keep, piece.sums);
  });
}

// products[r] = the inner product of row r of all tensors on the left with that on the right, or with itself where
// there is nothing on the right.
void sample_products(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const List left = take_list(stack[0]), other = take_list(stack[1]);
  const List& right = other.empty() ? left : other;
  const Handle out(to<AtenTensorHandle>(stack[2]));
  const Facts result(out.get());
  if (!readable(result, true)) fail("products must be float64 numbers on the CPU");
  if (left.size() != right.size()) fail("right holds ", right.size(), " tensors, left ", left.size());
  const int64_t rows = result.numel;
  struct Columns {
    const char *left, *right;
    int64_t stride, count;
    Dtype dtype;
  };
  std::vector<Columns> parts;
  int64_t total = 0;
  for (size_t i = 0; i < left.size(); ++i) {
    const Facts a(left[i].get()), b(right[i].get());
    if (!readable(a, false) || !readable(b, false) || a.dtype != b.dtype || a.dim < 1 || a.sizes[0] != rows ||
        !a.same_shape(b))
      fail("left[", i, "] and right[", i, "] must be contiguous on the CPU, of one dtype, with a row for each of the ",
           rows, " products");
    const int64_t columns = rows == 0 ? 0 : a.numel / rows;
    for (int64_t begin = 0; begin < columns; begin += piece_size)
      parts.push_back({at(a, begin), at(b, begin), columns, std::min(piece_size, columns - begin), a.dtype});
    total += a.numel;
  }
  std::vector<double> sums(parts.size() * rows);
  in_parallel(static_cast<int64_t>(sums.size()), total, [&](int64_t i) {
    const Columns& part = parts[i / rows];
    const int64_t skip = i % rows * part.stride;
    with_dtype(part.dtype, [&](auto value) {
      using P = decltype(value);
      sums[i] = inner_product(reinterpret_cast<const P*>(part.left) + skip,
                              reinterpret_cast<const P*>(part.right) + skip, part.count);
    });
  });
  double* products = static_cast<double*>(result.data);
  std::fill(products, products + rows, 0.0);
  for (size_t i = 0; i < sums.size(); ++i) products[i % rows] += sums[i];
}

// Adds to each of the K sums the rows with its weights, a few of them at once for the sums' sake.
template <int K, typename P>
OZ_CLONES void add_weighted(const P* data, int64_t stride, const std::vector<int64_t>& rows, const double* weights,
                            int64_t all_rows, int64_t n, double* sums, int64_t sums_stride) {
  constexpr int group = 4;
  double local[K][tile];
  for (int k = 0; k < K; ++k) std::fill(local[k], local[k] + n, 0.0);
  const auto add = [&](const int64_t* row, auto size) __attribute__((always_inline)) {
    constexpr int count = decltype(size)::value;
    const P* from[count];
    double weight[K][count];
    for (int r = 0; r < count; ++r) {
      from[r] = data + row[r] * stride;
      for (int k = 0; k < K; ++k) weight[k][r] = weights[k * all_rows + row[r]];
    }
    OZ_IVDEP
    for (int64_t c = 0; c < n; ++c) {
      double value[count];
      OZ_UNROLL
      for (int r = 0; r < count; ++r) value[r] = static_cast<double>(static_cast<Wide<P>>(from[r][c]));
      OZ_UNROLL
      for (int k = 0; k < K; ++k) {
        double sum = local[k][c];
        OZ_UNROLL
        for (int r = 0; r < count; ++r) sum += weight[k][r] * value[r];
        local[k][c] = sum;
      }
    }
  };
  const int64_t count = static_cast<int64_t>(rows.size());
  int64_t i = 0;
  for (; i + group <= count; i += group) add(&rows[i], std::integral_constant<int, group>());
  for (; i < count; ++i) add(&rows[i], std::integral_constant<int, 1>());
  for (int k = 0; k < K; ++k)
    for (int64_t c = 0; c < n; ++c) sums[k * sums_stride + c] += local[k][c];
}

// sums[i][k] += the rows of samples[i], each times its weight in row k of `weights`. A row without a weight is not
// read.
void weighted_sums(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const List samples = take_list(stack[0]);
  const Handle weights_handle(to<AtenTensorHandle>(stack[1]));
  const List sums = take_list(stack[2]);
  const Facts weights(weights_handle.get());
  if (!readable(weights, true) || weights.dim != 2 || weights.sizes[0] < 1 || weights.sizes[0] > 2)
    fail("weights must be a contiguous float64 matrix on the CPU, with one or two rows");
  if (samples.size() != sums.size()) fail("sums holds ", sums.size(), " tensors, samples ", samples.size());
  const int64_t kinds = weights.sizes[0], all_rows = weights.sizes[1];
  const double* weight = static_cast<const double*>(weights.data);
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < all_rows; ++r)
    if (weight[r] != 0 || (kinds == 2 && weight[all_rows + r] != 0)) rows.push_back(r);
  struct Columns {
    const char* data;
    double* sums;
    int64_t stride, count;
    Dtype dtype;
  };
  std::vector<Columns> parts;
  int64_t total = 0;
  for (size_t i = 0; i < samples.size(); ++i) {
    const Facts a(samples[i].get()), s(sums[i].get());
    const int64_t columns = s.numel / kinds;
    if (!readable(a, false) || !readable(s, true) || a.dim < 1 || s.dim < 1 || s.sizes[0] != kinds ||
        a.sizes[0] != all_rows || a.numel != all_rows * columns)
      fail("samples[", i, "] must be contiguous on the CPU, with a row for each weight as long as its float64 sums");
    for (int64_t begin = 0; begin < columns; begin += tile)
      parts.push_back(
          {at(a, begin), static_cast<double*>(s.data) + begin, columns, std::min(tile, columns - begin), a.dtype});
    total += a.numel;
  }
  in_parallel(static_cast<int64_t>(parts.size()), total, [&](int64_t i) {
    const Columns& part = parts[i];
    with_dtype(part.dtype, [&](auto value) {
      const auto* data = reinterpret_cast<const decltype(value)*>(part.data);
      const auto run = kinds == 1 ? add_weighted<1, decltype(value)> : add_weighted<2, decltype(value)>;
      run(data, part.stride, rows, weight, all_rows, part.count, part.sums, part.stride);
    });
  });
}

}  // namespace optimzoo

STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, CPU, m) {
  m.impl("compare_gradients", &optimzoo::compare_gradients);
  m.impl("sample_sums", &optimzoo::sample_sums);
  m.impl("sample_dots", &optimzoo::sample_dots);
  m.impl("sample_products", &optimzoo::sample_products);
  m.impl("weighted_sums", &optimzoo::weighted_sums);
}
