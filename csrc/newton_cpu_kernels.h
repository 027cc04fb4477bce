// The proximal quasi-Newton method for the samples of one thread, for one instruction set. The method is
// `proximal_newton` in vjvcr_fast/reference.py; the names here are those there.
#include "mlp_block_cpu.h"

namespace vjvcr::VJVCR_ISA {
namespace {

// A number of each sample in a vector.
template <typename T>
using Lanes = T[kLanes<T>];

template <typename T>
class Newton {
 public:
  static int64_t rows(int64_t m, int64_t hidden) { return Block<T>::rows_of(hidden) + 8 * m + m * m; }

  Newton(const Problem<T>& problem, const Options<T>& options, T* memory)
      : m_(problem.m), problem_(problem), options_(options), block_(problem, memory) {
    for (T** array : {&z_, &v_, &gradient_, &gradient_v_, &slope_, &s_, &y_, &Bs_}) *array = block_.rows(m_);
    B_ = block_.rows(m_ * m_);
  }

  void search() {
    for (;;) {
      // A sample's first trial is its start, which it takes.
      while (block_.take({z_, v_})) begin(block_.size() - 1);
      if (block_.size() == 0) return;
      block_.evaluate(v_, gradient_v_);
      for (int first = 0; first < block_.size(); first += kLanes<T>) learn(first);
      for (int i = block_.size() - 1; i >= 0; --i) {
        if (!samples_[i].active || samples_[i].steps >= problem_.steps) leave(i);
      }
      for (int first = 0; first < block_.size(); first += kLanes<T>) descend(first);
    }
  }

 private:
  // Element e of a sample's B is kLanes numbers after the one before.
  T* B_of(int i) const { return B_ + i / kLanes<T> * kLanes<T> * m_ * m_ + i % kLanes<T>; }

  void begin(int i) {
    for (int64_t e = 0; e < m_ * m_; ++e) B_of(i)[e * kLanes<T>] = options_.B[e];
    samples_[i] = {T(0), T(1), -1, true, false};
  }

  void leave(int i) {
    block_.leave(i, samples_[i], z_, {z_, gradient_});
    T *B = B_of(i), *last = B_of(block_.size());
    for (int64_t e = 0; e < m_ * m_; ++e) B[e * kLanes<T>] = last[e * kLanes<T>];
    samples_[i] = samples_[block_.size()];
  }

  // Coordinate descent on the models of a vector of samples, side by side.
  void descend(int first) {
    const Register<T> zero = {}, low = all(options_.low), weight = all(options_.weight);
    const T* B = B_of(first);
    Lanes<T> dampings = {}, searches = {};
    for (int i = 0; i < kLanes<T>; ++i) {
      dampings[i] = T(1) / samples_[first + i].step;
      searches[i] = first + i < block_.size();
    }
    const Register<T> damping = load(dampings);
    Register<T> runs = load(searches);
    for (int64_t k = 0; k < m_; ++k) {
      store(v_ + k * kWidth<T> + first, load(z_ + k * kWidth<T> + first));
      store(slope_ + k * kLanes<T>, load(gradient_ + k * kWidth<T> + first));
    }
    for (int64_t sweep = 0; sweep < options_.sweeps; ++sweep) {
      Register<T> moved = {}, largest = {};
      for (int64_t k = 0; k < m_; ++k) {
        const T* row = B + k * m_ * kLanes<T>;
        T* at = v_ + k * kWidth<T> + first;
        const Register<T> diagonal = damping * load(row + k * kLanes<T>), v = load(at);
        const Register<T> target = v - load(slope_ + k * kLanes<T>) / diagonal;
        const Register<T> left = magnitude<T>(target) - weight / diagonal;
        const Register<T> shrunk = left <= zero ? zero : target < zero ? -left : left;
        const Register<T> next = shrunk < low ? low : shrunk;
        const Register<T> change = runs > zero ? next - v : zero, scaled = damping * change;
        store(at, runs > zero ? next : v);
        for (int64_t j = 0; j < m_; ++j) {
          T* slope = slope_ + j * kLanes<T>;
          // B may be infinite, so 0 B is left out.
          store(slope, change != zero ? multiply_add<T>(scaled, load(row + j * kLanes<T>), load(slope)) : load(slope));
        }
        const Register<T> size = magnitude<T>(change), of_next = magnitude<T>(next);
        moved = moved < size ? size : moved;
        largest = largest < of_next ? of_next : largest;
      }
      runs = moved <= all(options_.settled) * largest ? zero : runs;
      if (total<T>(runs) == T(0)) break;
    }
  }

  // What a vector of samples learns from its trials: each updates B, and takes its trial if the energy has not risen.
  void learn(int first) {
    const auto at = [&](T* array, int64_t k) { return array + k * kWidth<T> + first; };
    const Register<T> zero = {};
    Register<T> bents = {}, expecteds = {}, linears = {}, stays = zero;
    for (int64_t k = 0; k < m_; ++k) {
      const Register<T> z = load(at(z_, k)), v = load(at(v_, k)), gradient = load(at(gradient_, k)), s = v - z;
      const Register<T> y = load(at(gradient_v_, k)) - gradient;
      store(at(s_, k), s), store(at(y_, k), y);
      bents += s * y;
      linears += gradient * s + all(options_.weight) * (magnitude<T>(v) - magnitude<T>(z));
      stays += v == z ? zero : all(T(1));
    }
    T* const B = B_of(first);
    for (int64_t k = 0; k < m_; ++k) {
      Register<T> sum = {};
      for (int64_t j = 0; j < m_; ++j) sum += load(B + (k * m_ + j) * kLanes<T>) * load(at(s_, j));
      store(at(Bs_, k), sum);
      expecteds += load(at(s_, k)) * sum;
    }
    Lanes<T> bent, expected, linear, moves, scale, share, taken, updates = {};
    store(bent, bents), store(expected, expecteds), store(linear, linears), store(moves, stays);
    for (int i = 0; i < kLanes<T>; ++i) {
      Search<T>& sample = samples_[first + i];
      scale[i] = share[i] = T(1), taken[i] = T(0);
      if (first + i >= block_.size()) continue;
      const T value = block_.values()[first + i];
      if (sample.steps < 0) {
        sample = {value, T(1), 0, true, false};
        taken[i] = T(1);
        continue;
      }
      const bool finite = is_finite(value) && is_finite(bent[i]), accepted = finite && value <= sample.energy;
      const T promised = -linear[i] - expected[i] / sample.step / T(2);
      // Before the first trial has scaled B, the model's promise means little.
      const bool calibrated = sample.steps > 0 || moves[i] == T(0);
      sample.active = !(calibrated && promised <= options_.tolerance * std::abs(sample.energy));
      if (sample.steps == 0 && bent[i] > T(0) && expected[i] > T(0)) {
        const T ratio = bent[i] / expected[i];
        scale[i] = ratio < options_.least ? options_.least : ratio > options_.most ? options_.most : ratio;
        expected[i] *= scale[i];
      }
      updates[i] = finite && expected[i] > T(0);
      if (updates[i] > T(0) && !(bent[i] >= options_.damped * expected[i])) {
        share[i] = (T(1) - options_.damped) * expected[i] / (expected[i] - bent[i]);
      }
      taken[i] = accepted;
      if (accepted) sample.energy = value;
      sample.step = !accepted ? sample.step / T(2) : sample.step < T(0.5) ? T(2) * sample.step : T(1);
      sample.lost = !finite;
      sample.steps += 1;
    }
    for (int64_t k = 0; k < m_; ++k) {
      const Register<T> takes = load(taken);
      store(at(z_, k), takes > zero ? load(at(v_, k)) : load(at(z_, k)));
      store(at(gradient_, k), takes > zero ? load(at(gradient_v_, k)) : load(at(gradient_, k)));
    }
    update(first, load(scale), load(expected), load(share), load(updates));
  }

  // B <- scale B - Bs Bs' / expected + y y' / s'y, with Bs scaled and y damped.
  void update(int first, Register<T> scale, Register<T> expected, Register<T> share, Register<T> updates) {
    const auto at = [&](T* array, int64_t k) { return array + k * kWidth<T> + first; };
    const Register<T> zero = {};
    Register<T> met = {}, most_y = {}, most_Bs = {};
    for (int64_t k = 0; k < m_; ++k) {
      const Register<T> Bs = scale * load(at(Bs_, k));
      const Register<T> y = share * load(at(y_, k)) + (all(T(1)) - share) * Bs;
      store(at(Bs_, k), Bs), store(at(y_, k), y);
      met += load(at(s_, k)) * y;
      const Register<T> of_y = magnitude<T>(y), of_Bs = magnitude<T>(Bs);
      most_y = most_y < of_y ? of_y : most_y;
      most_Bs = most_Bs < of_Bs ? of_Bs : most_Bs;
    }
    // B stays as it is if the update would overflow.
    const Register<T> y_times = most_y * (most_y / met), Bs_times = most_Bs * (most_Bs / expected);
    updates = met > zero && y_times - y_times == zero && Bs_times - Bs_times == zero ? updates : zero;
    if (total<T>(updates) == T(0)) return;
    T* const B = B_of(first);
    for (int64_t k = 0; k < m_; ++k) {
      const Register<T> of_B = load(at(Bs_, k)) / expected, of_y = load(at(y_, k)) / met;
      for (int64_t j = 0; j < m_; ++j) {
        T* to = B + (k * m_ + j) * kLanes<T>;
        const Register<T> updated = scale * load(to) - of_B * load(at(Bs_, j)) + of_y * load(at(y_, j));
        store(to, updates > zero ? updated : load(to));
      }
    }
  }

  int64_t m_;
  const Problem<T>& problem_;
  const Options<T>& options_;
  Block<T> block_;
  T *z_, *v_, *gradient_, *gradient_v_, *slope_, *s_, *y_, *Bs_, *B_;
  Search<T> samples_[kWidth<T>] = {};
};

template <typename T>
void search(const Problem<T>& problem, const Options<T>& options, T* memory) {
  Newton<T>(problem, options, memory).search();
}

template <typename T>
constexpr Kernels<T, Options<T>> kKernels = {kRows, kLanes<T>, kWidth<T>, Newton<T>::rows, pack<T>, search<T>};

}  // namespace
}  // namespace vjvcr::VJVCR_ISA
