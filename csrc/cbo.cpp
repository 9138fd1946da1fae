// Consensus-based optimization on the CPU. Work is cut into runs and chunks of coordinates, whatever the number of
// threads, so that no sum and no random number depends on it. A chunk of all particles of a run fits into a cache: it
// is read once for the consensus and is still there to be moved.
#include "cbo.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "cpu.h"

namespace optimzoo {

constexpr int64_t chunk = 512;       // coordinates
constexpr int64_t max_blocks = 528;  // of random numbers that are made at once; more than a chunk needs
constexpr int64_t lanes = 48;        // several vectors, whose operations overlap
static_assert(max_blocks % lanes == 0 && max_blocks > chunk / 2 + 1);

// Normal numbers for `count` counters, one behind the other. All are made by whole vectors: what a compiler makes of
// the rest of a loop rounds in another way, and a number would depend on its neighbours.
template <typename T>
OZ_CLONES void fill(Source source, uint32_t run, int64_t count, const uint32_t* block, const uint32_t* particle,
                    T* out) {
  for (int64_t begin = 0; begin < count; begin += lanes) {
    uint32_t a[lanes], b[lanes], c[lanes], d[lanes];
    OZ_IVDEP
    for (int64_t i = 0; i < lanes; ++i) {
      const Words words = source.words(block[begin + i], particle[begin + i], run);
      a[i] = words.a, b[i] = words.b, c[i] = words.c, d[i] = words.d;
    }
    OZ_IVDEP
    for (int64_t i = 0; i < lanes; ++i)
      normals(Words{a[i], b[i], c[i], d[i]}, out + normals_per_block<T> * (begin + i));
  }
}

// The random numbers of coordinates [begin, end) for some particles; a row of them for each.
template <typename T>
struct Noise {
  static constexpr int64_t per_block = normals_per_block<T>;
  int64_t first_block, blocks, rows_at_once;
  alignas(64) uint32_t block[max_blocks] = {}, particle[max_blocks] = {};
  alignas(64) T values[max_blocks * per_block];

  Noise(int64_t begin, int64_t end)
      : first_block(begin / per_block),
        blocks((end + per_block - 1) / per_block - first_block),
        rows_at_once(std::max<int64_t>(1, max_blocks / std::max<int64_t>(1, blocks))) {}

  void make(const Source& source, int64_t run, const int64_t* rows, int64_t count) {
    int64_t i = 0;
    for (int64_t row = 0; row < count; ++row)
      for (int64_t j = 0; j < blocks; ++j, ++i) {
        block[i] = static_cast<uint32_t>(first_block + j);
        particle[i] = static_cast<uint32_t>(rows[row]);
      }
    fill(source, static_cast<uint32_t>(run), i, block, particle, values);
  }

  // Of coordinates from `begin` on, which is in the first block.
  const T* row(int64_t index, int64_t begin) const {
    return values + index * blocks * per_block + (begin - first_block * per_block);
  }
};

template <typename T>
OZ_CLONES void add_weighted(int64_t n, T weight, const T* x, T* sum) {
  OZ_IVDEP
  for (int64_t j = 0; j < n; ++j) sum[j] += weight * x[j];
}

template <typename T>
OZ_CLONES double squared_distance(int64_t n, const T* x, const T* consensus) {
  double lanes[8] = {};  // a fixed order of summation that still vectorises
  int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    for (int64_t k = 0; k < 8; ++k) {
      const double distance = x[j + k] - consensus[j + k];
      lanes[k] += distance * distance;
    }
  for (; j < n; ++j) lanes[j % 8] += double(x[j] - consensus[j]) * double(x[j] - consensus[j]);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <bool isotropic, typename T>
OZ_CLONES void move_row(int64_t n, T* x, const T* consensus, const T* z, T drift, T diffusion, T size, T clip) {
  OZ_IVDEP
  for (int64_t j = 0; j < n; ++j) x[j] = moved<isotropic>(x[j], consensus[j], z[j], drift, diffusion, size, clip);
}

struct Chunk {
  int64_t begin, end, group;
};

template <typename T>
class Step {
 public:
  explicit Step(const CboCall& call) : call_(call) {
    for (int64_t group = 0, begin = 0; group < call.groups; ++group)
      for (; begin < call.ends[group];) {
        const int64_t end = std::min(call.ends[group], (begin / chunk + 1) * chunk);
        chunks_.push_back({begin, end, group});
        begin = end;
      }
  }

  void run() {
    const auto& cube = call_.particles;
    const int64_t count = static_cast<int64_t>(chunks_.size()), tasks = cube.runs * count;
    const auto each = [&](auto work) {
      // Below so many elements a task, waking a thread costs more than it brings.
      const int64_t grain = std::max<int64_t>(1, 16384 * tasks / std::max<int64_t>(1, numel()));
      torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) work(task / count, task % count);
      });
    };
    if (!call_.norms) {
      each([&](int64_t run, int64_t part) {
        if (call_.weights) mean(run, chunks_[part]);
        move<false>(run, chunks_[part]);
      });
      return;
    }
    std::vector<double> parts(tasks * cube.particles);
    each([&](int64_t run, int64_t part) {
      const auto& [begin, end, group] = chunks_[part];
      if (call_.weights) mean(run, chunks_[part]);
      for (int64_t i = 0; i < cube.particles; ++i)
        parts[(run * count + part) * cube.particles + i] =
            squared_distance(end - begin, x(run, i) + begin, consensus(run) + begin);
    });
    for (int64_t run = 0; run < cube.runs; ++run)
      for (int64_t i = 0; i < cube.particles; ++i) {
        double sum = 0;
        for (int64_t part = 0; part < count; ++part) sum += parts[(run * count + part) * cube.particles + i];
        call_.norms[run * cube.particles + i] = std::sqrt(sum);
      }
    each([&](int64_t run, int64_t part) { move<true>(run, chunks_[part]); });
  }

 private:
  int64_t numel() const { return call_.particles.runs * call_.particles.particles * call_.particles.coordinates; }
  T* x(int64_t run, int64_t i) const {
    return static_cast<T*>(call_.particles.data) + (run * call_.particles.particles + i) * call_.particles.coordinates;
  }
  T* consensus(int64_t run) const { return static_cast<T*>(call_.consensus) + run * call_.particles.coordinates; }

  void mean(int64_t run, const Chunk& part) {
    T sum[chunk] = {};
    for (int64_t i = 0; i < call_.particles.particles; ++i) {
      const double weight = call_.weights[run * call_.particles.particles + i];
      // Where there is no weight there may be no number either.
      if (weight > 0) add_weighted(part.end - part.begin, static_cast<T>(weight), x(run, i) + part.begin, sum);
    }
    std::copy(sum, sum + (part.end - part.begin), consensus(run) + part.begin);
  }

  template <bool isotropic>
  void move(int64_t run, const Chunk& part) {
    const auto& [begin, end, group] = part;
    const int64_t particles = call_.particles.particles, offset = run * particles;
    Noise<T> noise(begin, end);
    int64_t rows[max_blocks], waiting = 0;
    for (int64_t i = 0; i <= particles; ++i) {
      const bool moves = i < particles &&
                         (!call_.drift_gate || call_.drift_gate[offset + i] != 0 || call_.noise_gate[offset + i] != 0);
      if (moves) rows[waiting++] = i;
      if (waiting == 0 || (i < particles && waiting < noise.rows_at_once)) continue;
      noise.make(call_.source, run, rows, waiting);
      for (int64_t k = 0; k < waiting; ++k) {
        const int64_t row = rows[k];
        double drift = call_.drift[group], diffusion = call_.diffusion[group];
        if (call_.drift_gate) drift *= call_.drift_gate[offset + row], diffusion *= call_.noise_gate[offset + row];
        const double size = isotropic ? std::min(call_.norms[offset + row], call_.clip) : 0;
        move_row<isotropic>(end - begin, x(run, row) + begin, consensus(run) + begin, noise.row(k, begin), T(drift),
                            T(diffusion), T(size), T(call_.clip));
      }
      waiting = 0;
    }
  }

  const CboCall& call_;
  std::vector<Chunk> chunks_;
};

void cbo(StableIValue* stack, uint64_t, uint64_t) {
  const CboCall call(stack, aoti_torch_device_type_cpu());
  if (call.particles.dtype == Dtype::f64)
    Step<double>(call).run();
  else
    Step<float>(call).run();
}

template <typename T>
void fill_cube(const Cube& cube, const Source& source) {
  const int64_t parts = (cube.coordinates + chunk - 1) / chunk, tasks = cube.runs * parts;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t run = task / parts, begin = task % parts * chunk;
      const int64_t end = std::min(cube.coordinates, begin + chunk);
      Noise<T> noise(begin, end);
      int64_t rows[max_blocks];
      for (int64_t i = 0; i < cube.particles; i += noise.rows_at_once) {
        const int64_t count = std::min(noise.rows_at_once, cube.particles - i);
        for (int64_t k = 0; k < count; ++k) rows[k] = i + k;
        noise.make(source, run, rows, count);
        for (int64_t k = 0; k < count; ++k)
          std::copy(noise.row(k, begin), noise.row(k, begin) + (end - begin),
                    static_cast<T*>(cube.data) + (run * cube.particles + i + k) * cube.coordinates + begin);
      }
    }
  });
}

void normal(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const Handle out(to<AtenTensorHandle>(stack[0]));
  const Source source(to<int64_t>(stack[1]), to<int64_t>(stack[2]), to<int64_t>(stack[3]));
  const Cube cube("out", out, aoti_torch_device_type_cpu());
  if (cube.dtype == Dtype::f64)
    fill_cube<double>(cube, source);
  else
    fill_cube<float>(cube, source);
}

}  // namespace optimzoo

STABLE_TORCH_LIBRARY_IMPL(OZ_NAMESPACE, CPU, m) {
  m.impl("cbo_", &optimzoo::cbo);
  m.impl("normal_", &optimzoo::normal);
}
