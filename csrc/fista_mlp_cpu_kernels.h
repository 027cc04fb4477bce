// Monotone FISTA for the samples of one thread, for one instruction set. See latent_math.h for the step.
#include "mlp_block_cpu.h"

namespace vjvcr::VJVCR_ISA {
namespace {

template <typename T>
class Fista {
 public:
  static int64_t rows(int64_t m, int64_t hidden) { return Block<T>::rows_of(hidden) + 6 * m + 8; }

  Fista(const Problem<T>& problem, const Rule<T>& rule, T* memory)
      : problem_(problem), rule_(rule), block_(problem, memory) {
    for (T** array : {&z_, &x_, &v_, &previous_, &gradient_, &gradient_v_}) *array = block_.rows(problem.m);
    for (T** array : {&bent_, &changed2_, &moved2_, &x2_, &z2_, &taken_, &step_, &momentum_}) *array = block_.rows(1);
  }

  void search() {
    for (;;) {
      // A sample's first trial is its start, which it takes.
      while (block_.take({z_, x_, v_})) begun_[block_.size() - 1] = false;
      if (block_.size() == 0) return;
      block_.evaluate(v_, gradient_v_);
      sums();
      for (int i = 0; i < block_.size(); ++i) taken_[i] = learn(i);
      accept(z_, v_), accept(previous_, x_), accept(gradient_, gradient_v_);
      for (int i = block_.size() - 1; i >= 0; --i) {
        if (!samples_[i].active || samples_[i].steps >= problem_.steps) leave(i);
      }
      for (int i = 0; i < block_.size(); ++i) {
        step_[i] = samples_[i].step;
        momentum_[i] = momentum_of(rule_, samples_[i]);
      }
      propose(z_, gradient_, previous_, step_, momentum_, x_, v_);
    }
  }

 private:
  // Whether the sample takes its trial.
  bool learn(int i) {
    const T value = block_.values()[i];
    if (begun_[i]) {
      return advance(rule_, samples_[i], momentum_[i], value, bent_[i], changed2_[i], moved2_[i], x2_[i], z2_[i]);
    }
    samples_[i] = begin(rule_, value);
    return begun_[i] = true;
  }

  void leave(int i) {
    block_.leave(i, samples_[i], z_, {z_, previous_, gradient_});
    samples_[i] = samples_[block_.size()];
  }

  // What `advance` needs of each sample's trial.
  void sums() {
    for (int64_t first = 0; first < kWidth<T>; first += kLanes<T>) {
      Register<T> bent = {}, changed2 = {}, moved2 = {}, x2 = {}, z2 = {};
      for (int64_t k = first; k < problem_.m * kWidth<T>; k += kWidth<T>) {
        const Register<T> z = load(z_ + k), x = load(x_ + k), change = load(v_ + k) - z, move = x - z;
        bent += (load(gradient_v_ + k) - load(gradient_ + k)) * change;
        changed2 += change * change, moved2 += move * move, x2 += x * x, z2 += z * z;
      }
      store(bent_ + first, bent), store(changed2_ + first, changed2), store(moved2_ + first, moved2);
      store(x2_ + first, x2), store(z2_ + first, z2);
    }
  }

  // to <- from where the trial is taken.
  void accept(T* to, const T* from) const {
    for (int64_t k = 0; k < problem_.m * kWidth<T>; k += kLanes<T>) {
      store(to + k, load(taken_ + k % kWidth<T>) > Register<T>{} ? load(from + k) : load(to + k));
    }
  }

  // The proximal point x and the trial v.
  void propose(const T* __restrict z, const T* __restrict gradient, const T* __restrict previous,
               const T* __restrict step, const T* __restrict momentum, T* __restrict x, T* __restrict v) const {
    const T weight = rule_.weight, lower = rule_.lower, upper = rule_.upper;
    for (int64_t row = 0; row < problem_.m * kWidth<T>; row += kWidth<T>) {
      for (int64_t i = 0; i < kWidth<T>; ++i) {
        const T at_x = proximal(z[row + i], gradient[row + i], step[i], weight, lower, upper);
        x[row + i] = at_x;
        v[row + i] = extrapolate_in_sign(at_x, previous[row + i], momentum[i], weight, lower, upper);
      }
    }
  }

  const Problem<T>& problem_;
  const Rule<T> rule_;
  Block<T> block_;
  T *z_, *x_, *v_, *previous_, *gradient_, *gradient_v_;
  T *bent_, *changed2_, *moved2_, *x2_, *z2_, *taken_, *step_, *momentum_;
  Sample<T> samples_[kWidth<T>];
  bool begun_[kWidth<T>];
};

template <typename T>
void search(const Problem<T>& problem, const Rule<T>& rule, T* memory) {
  Fista<T>(problem, rule, memory).search();
}

template <typename T>
constexpr Kernels<T, Rule<T>> kKernels = {kRows, kLanes<T>, kWidth<T>, Fista<T>::rows, pack<T>, search<T>};

}  // namespace
}  // namespace vjvcr::VJVCR_ISA
