// The energy of an MLP predictor about a start and its gradient, for the samples of one thread and one instruction set.
// Included by what searches with it.
//
// Every array is (rows, kWidth): sample i is column i. Products are of packed matrices (panels of kRows rows, term by
// term), and what follows a product is done with each tile while it is in registers.
namespace vjvcr::VJVCR_ISA {
namespace {

template <typename T>
constexpr int kWidth = kVectors * kLanes<T>;
constexpr int kParts = 16;  // partial sums of an energy: the more, the less it rounds

template <typename T>
inline Register<T> relu(Register<T> x) {
  return x < Register<T>{} ? Register<T>{} : x;  // NaN stays NaN
}

template <typename T>
inline Register<T> magnitude(Register<T> x) {
  return x < Register<T>{} ? -x : x;
}

// Panels begin <= i < end of an operand. Rows beyond its last are 0.
template <typename T>
void pack(const Operand<T>& operand, int64_t begin, int64_t end, T* to) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kRows, count = least(kRows, operand.rows - first);
    const T* from = operand.from + first * operand.by_row;
    T* at = to + first * operand.terms;
    for (int64_t k = 0; k < operand.terms; ++k) {
      for (int64_t i = 0; i < kRows; ++i) {
        *at++ = i < count ? from[i * operand.by_row + k * operand.by_term] : T(0);
      }
    }
  }
}

// x y, where y has V vectors of columns: body(row, vector, numbers) for each part of the result.
template <typename T, int V, typename Body>
inline void product(const T* x, int64_t rows, int64_t terms, const T* y, const Body& body) {
  for (int64_t i = 0; i < rows; i += kRows) {
    Register<T> sum[kRows][V] = {};
    multiply<T>(sum, x + i * terms, 1, kRows, y, kWidth<T>, terms);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
      if (i + r == rows) break;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) body(i + r, v, sum[r][v]);
    }
  }
}

template <typename T>
class Block {
 public:
  Block(const Problem<T>& problem, T* memory) : problem_(problem), memory_(memory) {
    for (T** array : {&p_, &u0_, &r_, &a_, &u_, &change_}) *array = rows(problem.hidden);  // as rows_of says
    for (T** array : {&start_, &value_}) *array = rows(1);
  }

  static constexpr int64_t rows_of(int64_t hidden) { return 6 * hidden + 2; }

  // So many rows of the block's memory, which are 0.
  T* rows(int64_t count) {
    T* const at = memory_;
    memory_ += count * kWidth<T>;
    __builtin_memset(at, 0, count * kWidth<T> * sizeof(T));
    return at;
  }

  // How many samples there are, in the first columns.
  int size() const { return size_; }
  int vectors() const { return (size_ + kLanes<T> - 1) / kLanes<T>; }
  const T* values() const { return value_; }

  // Takes the next sample into column size(), and its start into that of these arrays. Returns whether there was one,
  // and room for it.
  bool take(std::initializer_list<T*> arrays) {
    if (size_ == problem_.at_once) return false;
    const int64_t i = __atomic_fetch_add(problem_.next, 1, __ATOMIC_RELAXED);
    if (i >= problem_.n) return false;
    const auto fill = [&](T* array, const T* from, int64_t count) {
      for (int64_t k = 0; k < count; ++k) array[k * kWidth<T> + size_] = from[i * count + k];
    };
    fill(p_, problem_.p, problem_.hidden), fill(u0_, problem_.u0, problem_.hidden);
    fill(r_, problem_.r, problem_.hidden), fill(start_, problem_.start, 1);
    for (T* array : arrays) fill(array, problem_.z0, problem_.m);
    sample_[size_++] = i;
    return true;
  }

  // Writes out a sample, z (m, kWidth) and state, and puts the last one in its place, in these arrays (m, kWidth) too.
  template <typename State>
  void leave(int column, const State& state, const T* z, std::initializer_list<T*> arrays) {
    const int64_t i = sample_[column];
    for (int64_t k = 0; k < problem_.m; ++k) problem_.z[i * problem_.m + k] = z[k * kWidth<T> + column];
    problem_.energy[i] = state.energy, problem_.step[i] = state.step;
    problem_.taken[i] = state.steps, problem_.lost[i] = state.lost;
    --size_;
    const auto move = [&](T* array, int64_t count) {
      for (int64_t k = 0; k < count; ++k) array[k * kWidth<T> + column] = array[k * kWidth<T> + size_];
    };
    for (T* array : {p_, u0_, r_}) move(array, problem_.hidden);
    for (T* array : arrays) move(array, problem_.m);
    move(start_, 1), sample_[column] = sample_[size_];
  }

  // Energies at z (m, kWidth), penalty included, for `values`; gradients without it.
  void evaluate(const T* z, T* gradient) {
    vectors() == 1 ? evaluate_vectors<1>(z, gradient) : evaluate_vectors<kVectors>(z, gradient);
  }

 private:
  template <int V>
  void evaluate_vectors(const T* z, T* gradient) {
    constexpr Register<T> zero = {};
    const int64_t m = problem_.m, hidden = problem_.hidden;
    const auto at = [](int64_t row, int v) { return row * kWidth<T> + v * kLanes<T>; };
    product<T, V>(problem_.packed[kW1], hidden, m, z, [&](int64_t row, int v, Register<T> sum) {
      store(a_ + at(row, v), relu<T>(sum + load(p_ + at(row, v))));
    });
    product<T, V>(problem_.packed[kW2], hidden, hidden, a_, [&](int64_t row, int v, Register<T> sum) {
      const Register<T> u = relu<T>(sum + all(problem_.b2[row]));
      store(u_ + at(row, v), u);
      store(change_ + at(row, v), u - load(u0_ + at(row, v)));
    });
    Register<T> energy[kParts][V] = {};
    product<T, V>(problem_.packed[kGram], hidden, hidden, change_, [&](int64_t row, int v, Register<T> sum) {
      const Register<T> r = load(r_ + at(row, v));
      energy[row % kParts][v] += (sum - all(T(2)) * r) * load(change_ + at(row, v));
      store(u_ + at(row, v), load(u_ + at(row, v)) > zero ? sum - r : zero);
    });
    product<T, V>(problem_.packed[kW2T], hidden, hidden, u_, [&](int64_t row, int v, Register<T> sum) {
      store(a_ + at(row, v), load(a_ + at(row, v)) > zero ? sum : zero);
    });
    product<T, V>(problem_.packed[kW1T], m, hidden, a_, [&](int64_t row, int v, Register<T> sum) {
      store(gradient + at(row, v), all(T(2) * problem_.scale) * sum);
    });
    for (int v = 0; v < V; ++v) {
      for (int width = kParts / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) energy[i][v] += energy[i + width][v];
      }
      Register<T> norm = {};
      for (int64_t k = 0; k < m; ++k) norm += magnitude<T>(load(z + at(k, v)));
      const Register<T> change = all(problem_.scale) * energy[0][v];
      store(value_ + at(0, v), load(start_ + at(0, v)) + change + all(problem_.weight) * norm);
    }
  }

  const Problem<T>& problem_;
  T* memory_;
  T *p_, *u0_, *r_, *a_, *u_, *change_, *start_, *value_;
  int size_ = 0;
  int64_t sample_[kWidth<T>];  // their numbers among the operator's
};

}  // namespace
}  // namespace vjvcr::VJVCR_ISA
