// SIGReg on the CPU: the loss of vjvcr_fast/losses/projections.py and its gradient.
//
// For one time step, samples Z (N, d) and directions A (d, K), with X = ZA and the knots t_j:
//
//     D_jk = sum_n (cos(t_j x_nk) - phi_j),   S_jk = sum_n sin(t_j x_nk)
//     loss = scale sum_jk w_j (D_jk^2 + S_jk^2)
//     dX   = sum_j (a_jk cos(t_j X) - b_jk sin(t_j X)),   a = 2 scale w_j t_j S_jk,   b = 2 scale w_j t_j D_jk
//     dZ   = dX A'
//
// A time step is worked on in groups of directions. A group's part of X is (N, 256) at most and stays in the cache or
// near it: its sums are made, it is replaced by dX, and that is multiplied back onto the gradient. So one call makes
// the loss and its gradient with two products. If the factors a and b are known beforehand (sums of several processes,
// or a gradient that waited for backward), samples are worked on in blocks instead, and X is made again.
//
// Threads take whole time steps. What is left over, fewer steps than threads, is shared out within a step, and so are
// blocks of samples. All ways add in the same order, so results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "memory_cpu.h"
#include "views_cpu.h"

namespace vjvcr {
namespace {

constexpr int64_t kGroup = 256;  // directions that are worked on together, at most
constexpr int64_t kRowsAtOnce = 48;  // samples that are copied and projected together: a multiple of all tiles

// What x is multiplied with to get half-turns: in float64, and as a sum of two T.
template <typename T>
struct Scale {
  T high, low;
  double whole;
};

// The functions of sigreg_cpu_kernels.h, for one instruction set.
template <typename T>
struct Kernels {
  void (*copy_samples)(const View&, int64_t, int64_t, int64_t, int64_t, T*, int64_t);
  void (*project)(const T*, int64_t, int64_t, int64_t, const T*, int64_t, T*, int64_t);
  void (*back_project)(const T*, int64_t, int64_t, int64_t, const T*, int64_t, T*, int64_t, int64_t, bool);
  void (*add_up)(const T*, int64_t, int64_t, int64_t, const Scale<T>&, bool, int64_t, T*, double*, int64_t);
  void (*slopes)(T*, int64_t, int64_t, int64_t, const Scale<T>&, bool, int64_t, const T*, const T*, int64_t);
  void (*write_row)(const View&, int64_t, int64_t, int64_t, const T*);
};

}  // namespace
}  // namespace vjvcr

#define VJVCR_KERNELS "sigreg_cpu_kernels.h"
#include "instruction_sets.h"

namespace vjvcr {
namespace {

// t, phi and w of the knots, and whether they are at half steps.
struct Knots {
  std::vector<double> t, phi, weights;
  bool half;

  Knots(const Tensor& grid, bool half) : half(half) {
    STD_TORCH_CHECK(grid.dim() == 2 && grid.size(0) == 3 && grid.size(1) >= 1 && in_float64(grid) && !grid.is_cuda(),
                    "sigreg: grid must be (3, J) in float64 on the CPU");
    for (int64_t j = 0; j < grid.size(1); ++j) {
      const double* at = data<double>(grid) + j * grid.stride(1);
      t.push_back(at[0]), phi.push_back(at[grid.stride(0)]), weights.push_back(at[2 * grid.stride(0)]);
    }
  }
  int64_t count() const { return int64_t(t.size()); }
};

// One tensor (N, T, d) and the directions it is projected on.
template <typename T>
class Slices {
 public:
  Slices(const Tensor& h, const Tensor& directions, const Knots& knots)
      : h_(view_of(h)), n_(h.size(0)), steps_(h.size(1)), d_(h.size(2)), k_(directions.size(1)), knots_(knots),
        run_(VJVCR_OF_THIS_CPU(sigreg::kKernels<T>)) {
    padded_ = round_up(k_, kPad);
    group_ = std::min({kGroup, round_up(d_, kPad), padded_});
    z_pitch_ = round_up(d_, kPad) + kSkew, x_pitch_ = group_ + kSkew;
    rows_ = std::min(kRowsAtOnce, n_);
    const double turns = knots.t[0] / M_PI;
    scale_ = {T(turns), T(turns - double(T(turns))), turns};
    const double work = double(n_) * double(steps_) * double(k_) * double(d_ + 8 * knots.count());
    threads_ = std::min<int64_t>(torch::stable::get_num_threads(), int64_t(std::min(work / kWorthIt, 1e6)));
    threads_ = std::max<int64_t>(1, threads_);
    pack(directions);
  }

  // The loss, with this scale. Writes the sums, (T, 2, J, K), if they are wanted, and the gradient, whose features must
  // be adjacent numbers of type T.
  double loss(double scale, T* sums, const View* gradient) {
    std::vector<double> losses(steps_);
    const int64_t whole = steps_ / threads_ * threads_;
    if (whole > 0) {
      side_by_side(threads_, [&](int64_t worker) {
        State state(*this, 1);
        for (int64_t t = worker * whole / threads_; t < (worker + 1) * whole / threads_; ++t) {
          losses[t] = step(state, t, 1, scale, sums, gradient);
        }
      });
    }
    if (whole < steps_) {
      State state(*this, threads_);
      for (int64_t t = whole; t < steps_; ++t) losses[t] = step(state, t, threads_, scale, sums, gradient);
    }
    double total = 0;
    for (const double one : losses) total += one;
    return total;
  }

  // The gradient, from a and b: factors is (T, 2, J, K).
  void gradient(const T* factors, const View& out) {
    const int64_t blocks = blocks_of(n_, kRowsAtOnce), units = steps_ * blocks, workers = std::min(threads_, units);
    const int64_t knots = knots_.count();
    side_by_side(workers, [&](int64_t worker) {
      Buffer<T> z((rows_ + kBeyond) * z_pitch_), x((rows_ + kBeyond) * x_pitch_), made(rows_ * z_pitch_);
      Buffer<T> own(2 * knots * group_);
      clear(x.get() + rows_ * x_pitch_, kBeyond * x_pitch_);
      for (int64_t unit = worker * units / workers; unit < (worker + 1) * units / workers; ++unit) {
        const int64_t t = unit / blocks, begin = unit % blocks * kRowsAtOnce, end = std::min(begin + kRowsAtOnce, n_);
        const int64_t rows = end - begin;
        run_.copy_samples(h_, t, begin, end, d_, z.get(), z_pitch_);
        for (int64_t first = 0; first < padded_; first += group_) {
          const int64_t columns = std::min(group_, padded_ - first), here = std::min(columns, k_ - first);
          for (int64_t j = 0; j < 2 * knots; ++j) {
            T* to = own.get() + j * group_;
            std::copy_n(factors + (t * 2 * knots + j) * k_ + first, here, to);
            std::fill(to + here, to + columns, T(0));
          }
          run_.project(z.get(), z_pitch_, rows, d_, by_direction_.get() + first * d_, columns / kPad, x.get(), x_pitch_);
          run_.slopes(x.get(), x_pitch_, rows, columns, scale_, knots_.half, knots, own.get(),
                      own.get() + knots * group_, group_);
          run_.back_project(x.get(), x_pitch_, rows, columns, by_feature_.get() + first * kPad, padded_ * kPad,
                            made.get(), z_pitch_, d_, first > 0);
        }
        for (int64_t n = begin; n < end; ++n) run_.write_row(out, t, n, d_, made.get() + (n - begin) * z_pitch_);
      }
    });
  }

 private:
  // The buffers for a time step on which so many threads work.
  struct State {
    State(const Slices& of, int64_t threads)
        : z_size((of.rows_ + kBeyond) * of.z_pitch_), scratch_size(2 * of.knots_.count() * kPad), z(threads * z_size),
          x((of.n_ + kBeyond) * of.x_pitch_), scratch(threads * scratch_size),
          factors(2 * of.knots_.count() * of.group_), sums(2 * of.knots_.count() * of.group_), losses(of.padded_) {
      clear(x.get() + of.n_ * of.x_pitch_, kBeyond * of.x_pitch_);
    }
    int64_t z_size, scratch_size;
    Buffer<T> z, x, scratch, factors;
    Buffer<double> sums, losses;
  };

  static void clear(T* to, int64_t count) { std::fill_n(to, count, T(0)); }

  // The directions in panels of kPad, twice: (d, kPad) each; and for kPad features each, a row a direction.
  void pack(const Tensor& directions) {
    const T* a = data<T>(directions);
    const int64_t by_d = directions.stride(0), by_k = directions.stride(1), panels = blocks_of(d_, kPad);
    by_direction_ = Buffer<T>(padded_ * d_), by_feature_ = Buffer<T>(panels * kPad * padded_);
    share(threads_, 0, padded_ / kPad, [&](int64_t p, int64_t) {
      for (int64_t r = 0; r < d_; ++r) {
        T* to = by_direction_.get() + (p * d_ + r) * kPad;
        const int64_t count = std::min(kPad, k_ - p * kPad);
        const T* from = a + r * by_d + p * kPad * by_k;
        for (int64_t k = 0; k < count; ++k) to[k] = from[k * by_k];
        std::fill(to + count, to + kPad, T(0));
      }
    });
    share(threads_, 0, panels, [&](int64_t q, int64_t) {
      T* panel = by_feature_.get() + q * padded_ * kPad;
      const int64_t count = std::min(kPad, d_ - q * kPad);
      for (int64_t p = 0; p < padded_ / kPad; ++p) {
        const T* from = by_direction_.get() + (p * d_ + q * kPad) * kPad;
        T* to = panel + p * kPad * kPad;
        for (int64_t k = 0; k < kPad; ++k) {
          for (int64_t r = 0; r < count; ++r) to[k * kPad + r] = from[r * kPad + k];
          std::fill(to + k * kPad + count, to + (k + 1) * kPad, T(0));
        }
      }
    });
  }

  double step(State& state, int64_t t, int64_t threads, double scale, T* sums, const View* gradient) {
    for (int64_t first = 0; first < padded_; first += group_) {
      const int64_t columns = std::min(group_, padded_ - first), panels = columns / kPad;
      const int64_t workers = std::min(threads, panels);
      side_by_side(workers, [&](int64_t worker) {
        const int64_t from = worker * panels / workers, to = (worker + 1) * panels / workers;
        T *x = state.x.get() + from * kPad, *z = state.z.get() + worker * state.z_size;
        for (int64_t begin = 0; begin < n_; begin += kRowsAtOnce) {
          const int64_t end = std::min(begin + kRowsAtOnce, n_);
          run_.copy_samples(h_, t, begin, end, d_, z, z_pitch_);
          run_.project(z, z_pitch_, end - begin, d_, by_direction_.get() + (first + from * kPad) * d_, to - from,
                       x + begin * x_pitch_, x_pitch_);
        }
        run_.add_up(x, x_pitch_, n_, (to - from) * kPad, scale_, knots_.half, knots_.count(),
                    state.scratch.get() + worker * state.scratch_size, state.sums.get() + from * kPad, group_);
        for (int64_t k = from * kPad; k < to * kPad; ++k) finish(state, t, first, k, scale, sums);
        if (gradient == nullptr) return;
        T* factors = state.factors.get() + from * kPad;
        run_.slopes(x, x_pitch_, n_, (to - from) * kPad, scale_, knots_.half, knots_.count(), factors,
                    factors + knots_.count() * group_, group_);
      });
      if (gradient == nullptr) continue;
      share(threads, 0, threads == 1 ? 1 : blocks_of(n_, kRowsAtOnce), [&](int64_t block, int64_t) {
        const int64_t begin = block * kRowsAtOnce, rows = threads == 1 ? n_ : std::min(kRowsAtOnce, n_ - begin);
        run_.back_project(state.x.get() + begin * x_pitch_, x_pitch_, rows, columns, by_feature_.get() + first * kPad,
                          padded_ * kPad, static_cast<T*>(gradient->data) + begin * gradient->by_n + t * gradient->by_t,
                          gradient->by_n, d_, first > 0);
      });
    }
    double total = 0;
    for (int64_t k = 0; k < k_; ++k) total += state.losses.get()[k];
    return total;
  }

  // Of column k of a group: D and S, its part of the loss, and the factors of its slopes.
  void finish(State& state, int64_t t, int64_t first, int64_t k, double scale, T* sums) {
    const int64_t knots = knots_.count();
    double loss = 0;
    for (int64_t j = 0; j < knots; ++j) {
      const double d = state.sums.get()[j * group_ + k] - double(n_) * knots_.phi[j];
      const double s = state.sums.get()[(knots + j) * group_ + k], weight = scale * knots_.weights[j];
      loss += weight * (d * d + s * s);
      state.factors.get()[j * group_ + k] = T(2 * weight * knots_.t[j] * s);
      state.factors.get()[(knots + j) * group_ + k] = T(2 * weight * knots_.t[j] * d);
      if (sums != nullptr && first + k < k_) {
        sums[(t * 2 * knots + j) * k_ + first + k] = T(d);
        sums[((t * 2 + 1) * knots + j) * k_ + first + k] = T(s);
      }
    }
    state.losses.get()[first + k] = loss;
  }

  View h_;
  int64_t n_, steps_, d_, k_;
  const Knots& knots_;
  const Kernels<T>& run_;
  int64_t padded_, group_;  // K, and the directions of a group, as multiples of kPad
  int64_t rows_, z_pitch_, x_pitch_, threads_;
  Scale<T> scale_;
  Buffer<T> by_direction_, by_feature_;
};

// -- The operators --------------------------------------------------------------------------------------------------

void check(const Tensor& h, const Tensor& directions) {
  const auto dtype = h.scalar_type();
  STD_TORCH_CHECK(h.dim() == 3 && h.numel() > 0, "sigreg: h must be (N, T, d) and not empty");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  "sigreg: h must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(directions.dim() == 2 && directions.size(0) == h.size(2) && directions.size(1) >= 1 &&
                      directions.scalar_type() == (in_float64(h) ? ScalarType::Double : ScalarType::Float),
                  "sigreg: directions must be (d, K), float64 for float64 and else float32");
}

// For the gradient of h: h's strides if it is dense and its features are adjacent, else contiguous.
Tensor empty_gradient(const Tensor& h) {
  Tensor found = torch::stable::empty_like(h);
  if (h.size(2) > 1 && found.stride(2) != 1) found = torch::stable::new_empty(h, {h.size(0), h.size(1), h.size(2)});
  in_large_pages(found);
  return found;
}

template <typename Body>
void by_compute_type(const Tensor& h, const Body& body) {
  in_float64(h) ? body(double()) : body(float());
}

std::tuple<Tensor, Tensor> sigreg_cpu(Tensor h, Tensor directions, Tensor grid, bool half, double scale) {
  check(h, directions);
  STD_TORCH_CHECK(h.scalar_type() == directions.scalar_type(), "sigreg_cpu: h must be float32 or float64");
  const Knots knots(grid, half);
  Tensor gradient = empty_gradient(h), loss = torch::stable::new_empty(h, {}, ScalarType::Double);
  const View out = view_of(gradient);
  by_compute_type(h, [&](auto type) {
    *mutable_data<double>(loss) = Slices<decltype(type)>(h, directions, knots).loss(scale, nullptr, &out);
  });
  return {loss, gradient};
}

Tensor sigreg_sums_cpu(Tensor h, Tensor directions, Tensor grid, bool half) {
  check(h, directions);
  const Knots knots(grid, half);
  Tensor sums = torch::stable::new_empty(h, {h.size(1), 2, knots.count(), directions.size(1)}, directions.scalar_type());
  by_compute_type(h, [&](auto type) {
    using T = decltype(type);
    Slices<T>(h, directions, knots).loss(0, mutable_data<T>(sums), nullptr);
  });
  return sums;
}

Tensor sigreg_gradient_cpu(Tensor h, Tensor directions, Tensor grid, bool half, Tensor factors) {
  check(h, directions);
  const Knots knots(grid, half);
  STD_TORCH_CHECK(is_shaped(factors, {h.size(1), 2, knots.count(), directions.size(1)}) && factors.is_contiguous() &&
                      factors.scalar_type() == directions.scalar_type(),
                  "sigreg_gradient_cpu: factors must be (T, 2, J, K), contiguous, of the directions' dtype");
  Tensor gradient = empty_gradient(h);
  by_compute_type(h, [&](auto type) {
    using T = decltype(type);
    Slices<T>(h, directions, knots).gradient(data<T>(factors), view_of(gradient));
  });
  return gradient;
}

Tensor sigreg_directions_cpu(Tensor key, int64_t d, int64_t count) {
  STD_TORCH_CHECK(key.numel() == 1 && key.scalar_type() == ScalarType::Long && d >= 1 && count >= 1,
                  "sigreg_directions_cpu: key must be one int64, d and count at least 1");
  Tensor directions = torch::stable::new_empty(key, {d, count}, ScalarType::Float);
  float* a = mutable_data<float>(directions);
  const int64_t pairs = (d * count + 1) / 2, threads = torch::stable::get_num_threads();
  const auto normals = VJVCR_OF_THIS_CPU(sigreg::normals);
  constexpr int64_t kPart = 1 << 15;
  share(threads, 0, blocks_of(pairs, kPart), [&](int64_t part, int64_t) {
    normals(uint64_t(*data<int64_t>(key)), part * kPart, std::min((part + 1) * kPart, pairs), a, a + pairs,
            d * count - pairs);
  });
  share(d * count < kPart ? 1 : threads, 0, blocks_of(count, kGroup), [&](int64_t block, int64_t) {
    const int64_t begin = block * kGroup, width = std::min(kGroup, count - begin);
    double squares[kGroup] = {};
    float inverse[kGroup];
    for (int64_t r = 0; r < d; ++r) {
      const float* row = a + r * count + begin;
      for (int64_t k = 0; k < width; ++k) squares[k] += double(row[k]) * double(row[k]);
    }
    for (int64_t k = 0; k < width; ++k) inverse[k] = float(1 / std::sqrt(squares[k]));
    for (int64_t r = 0; r < d; ++r) {
      float* row = a + r * count + begin;
      for (int64_t k = 0; k < width; ++k) row[k] *= inverse[k];
    }
  });
  return directions;
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) {
  m.impl("sigreg_cpu", TORCH_BOX(&vjvcr::sigreg_cpu));
  m.impl("sigreg_sums_cpu", TORCH_BOX(&vjvcr::sigreg_sums_cpu));
  m.impl("sigreg_gradient_cpu", TORCH_BOX(&vjvcr::sigreg_gradient_cpu));
  m.impl("sigreg_directions_cpu", TORCH_BOX(&vjvcr::sigreg_directions_cpu));
}
