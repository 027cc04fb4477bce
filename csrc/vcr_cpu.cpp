// vcr_cpu and vcr_cpu_backward: the loss of vjvcr_fast/losses/analytic.py and its gradient, in one call.
//
// For each time step, with Z (N, d) centred over the batch and s_k = sum_n Z_nk^2:
//
//     Gram form         K = ZZ',                 penalty ||K||^2 - sum_k s_k^2
//                       dZ = b K Z - Z diag(b s + a slope)
//     covariance form   A = Z'Z, diagonal 0,     penalty ||A||^2
//                       dZ = b Z A - Z diag(a slope)
//
//     a = alpha / (T d (N-1)),   b = 4 beta / (T d (N-1)^2),   slope_k = [sigma_k < threshold] / sigma_k
//
// A time step is worked on in pieces that stay in the cache: some features of all samples in Gram form, some samples
// with all features in covariance form. First each piece is centred and its part of the product added; then each piece
// is centred again and its gradient written. So h is read twice, mostly from the cache the second time, and the gradient
// is written once. Only the upper half of a product is computed.
//
// Where d is small, several time steps are worked on as one with their features side by side, and several samples as one.
// Of the product the blocks on the diagonal are theirs; the rest is set to zero.
//
// Threads take whole time steps, each with buffers of its own. What is left over, fewer steps than threads, is shared
// out within a step: each `share` there ends before the next begins. What threads have in common within a step:
//
//     buffer                   written by                             read by               safe because
//     piece of thread 0        centred: each some features            product, gradients    the share has ended
//     pieces of the others     groups, gradients: its thread          its thread            no other has it
//     scratch                  its thread                             its thread            no other has it
//     product                  product: each some blocks              norm_of_row, mirror   the share has ended
//     product, lower half      mirror_rows: each some rows            gradients             mirror reads the upper half
//     products of groups       groups: each its own                   the calling thread    the share has ended
//     norms                    norm_of_row: each some rows            the calling thread    the share has ended
//     mean, squares            Gram form, centred: some features      its thread, finish    no other has these features
//     the same                 covariance form: the calling thread    all                   written between two shares
//     partial sums             means, centred: a row for each piece   added_up              no other has this piece
//     first, diagonal          the calling thread                     all                   written between two shares
//     gradient (`out`)         gradients: each some rows or pieces    nobody
//
// The calling thread also unpacks and scales the product, between two shares. One thread and all of them add
// in the same order, so results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "memory_cpu.h"
#include "views_cpu.h"

namespace vjvcr {
namespace {

constexpr int64_t kStrip = 64;  // features that a thread centres at once, at least
// Rows and columns of a block of a product, which one thread computes: multiples of all tiles.
constexpr int64_t kGramBlock = 48, kCovarianceBlock = 96;
constexpr int64_t kBlock = 48;  // rows of a gradient, or of a product that is mirrored
constexpr int64_t kPiece = 384 << 10;          // bytes of a piece, about
constexpr int64_t kLeast = 512, kMost = 4096;  // terms of a sum in a piece
constexpr int64_t kGroups = 16;                // parts of a product that are computed side by side, at most
constexpr int64_t kPacked = 32;                // features of steps and samples that are side by side, at most, ...
constexpr int64_t kPackedAlone = 256;          // ... and without a product
constexpr int64_t kLeastRows = 64;             // samples that are not side by side, at least

struct Pair {
  int64_t i, j;
};
// The p-th pair of blocks i <= j, column by column.
inline Pair pair_of(int64_t p) {
  int64_t j = 0;
  while ((j + 1) * (j + 2) / 2 <= p) ++j;
  return {p - j * (j + 1) / 2, j};
}

// The functions of vcr_cpu_kernels.h, for one instruction set.
template <typename T>
struct Kernels {
  void (*add_samples)(const View&, int64_t, int64_t, int64_t, int64_t, int64_t, const T*, T*, T*);
  void (*centre)(const View&, int64_t, int64_t, int64_t, int64_t, int64_t, const T*, const T*, T*, int64_t, T*, T*);
  void (*gram)(const T*, int64_t, int64_t, int64_t, T*, int64_t, bool, int64_t, int64_t);
  void (*covariance)(const T*, int64_t, int64_t, int64_t, T*, int64_t, bool, int64_t, int64_t);
  double (*norm_of_row)(T*, int64_t, int64_t, int64_t, bool);
  void (*scale_rows)(T*, int64_t, int64_t, T, int64_t, int64_t);
  void (*mirror_rows)(T*, int64_t, int64_t, int64_t);
  void (*gradient)(const T*, int64_t, const T*, int64_t, int64_t, const T*, int64_t, const T*, int64_t, int64_t,
                   const View&, int64_t, int64_t, int64_t);
};

}  // namespace
}  // namespace vjvcr

#define VJVCR_KERNELS "vcr_cpu_kernels.h"
#include "instruction_sets.h"

namespace vjvcr {
namespace {

// What is asked for. a, b: the coefficients above; `variance` and `covariance` say which terms there are.
struct Wish {
  double threshold, eps, a, b;
  bool gram, variance, covariance, gradient;
};

// The sums that make up the two terms.
struct Sums {
  double hinge = 0, penalty = 0;
};

// How many time steps and samples are worked on as one: their features, side by side, have one stride.
struct Pack {
  int64_t steps = 1, samples = 1;
};

// The loss of one tensor (N, T, d), and its gradient, which goes to `out`. `pack` divides T.
template <typename T>
class Loss {
 public:
  Loss(const View& h, const View& out, int64_t n, int64_t steps, int64_t d, const Wish& wish, const Pack& pack)
      : h_(packed(h, pack)), out_(packed(out, pack)), all_(n), block_(d), own_(pack.steps * d), wish_(wish),
        run_(VJVCR_OF_THIS_CPU(kKernels<T>)), by_features_(wish.covariance ? wish.gram : n < d) {
    n_ = blocks_of(n, pack.samples), steps_ = steps / pack.steps, d_ = own_ * pack.samples;
    last_ = own_ * (n - (n_ - 1) * pack.samples);
    n = n_, d = d_;
    size_ = by_features_ ? n : d, length_ = by_features_ ? d : n;
    const int64_t fits = kPiece / (int64_t(sizeof(T)) * size_), most = std::min(std::max(fits, kLeast), kMost);
    pieces_ = (length_ + most - 1) / most;
    piece_ = round_up((length_ + pieces_ - 1) / pieces_, kPad);
    pieces_ = (length_ + piece_ - 1) / piece_;
    groups_ = std::max<int64_t>(1, std::min({length_ / (8 * size_), kGroups, pieces_}));
    rows_ = by_features_ ? n : std::min(piece_, n), width_ = by_features_ ? std::min(piece_, d) : d;
    pitch_ = round_up(width_, kPad) + kSkew, product_pitch_ = round_up(size_, kPad) + kSkew;
    padded_ = round_up(d, kPad);
  }

  std::vector<Sums> all_steps() {
    std::vector<Sums> sums(steps_);
    const double work = double(n_) * double(d_) * double(wish_.covariance ? size_ : 8);
    const int64_t most = int64_t(std::min(work * double(steps_) / kWorthIt, 1e6));
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), most));
    const int64_t whole = steps_ / threads * threads;
    if (whole > 0) {
      side_by_side(threads, [&](int64_t worker) {
        State state(*this, 1);
        for (int64_t t = worker * whole / threads; t < (worker + 1) * whole / threads; ++t) {
          sums[t] = step(state, t, 1);
        }
      });
    }
    if (whole < steps_) {
      State state(*this, threads);
      for (int64_t t = whole; t < steps_; ++t) sums[t] = step(state, t, threads);
    }
    return sums;
  }

 private:
  // The buffers for a time step on which so many threads work.
  struct State {
    State(const Loss& loss, int64_t threads)
        : piece_size((loss.rows_ + kBeyond) * loss.pitch_), scratch_size(3 * loss.padded_),
          product_size(loss.wish_.covariance ? (loss.size_ + kBeyond) * loss.product_pitch_ : 0),
          pieces(threads * piece_size), scratch(threads * scratch_size),
          products((loss.groups_ == 1 ? 1 : threads == 1 ? 2 : 1 + loss.groups_) * product_size),
          features(4 * loss.padded_), partial(loss.by_features_ ? 0 : loss.pieces_ * loss.padded_), norms(loss.size_) {
      // Rows beyond the last are read, though what comes of them is not used. Some numbers would make that slow.
      for (int64_t i = 0; i < threads; ++i) clear(piece(i) + loss.rows_ * loss.pitch_, kBeyond * loss.pitch_);
      if (product_size > 0) clear(product(0) + loss.size_ * loss.product_pitch_, kBeyond * loss.product_pitch_);
      first = features.get(), mean = first + loss.padded_, squares = mean + loss.padded_;
      diagonal = squares + loss.padded_;
      clear(diagonal, loss.padded_);
    }
    static void clear(T* data, int64_t count) { std::memset(data, 0, count * sizeof(T)); }
    T* piece(int64_t thread) const { return pieces.get() + thread * piece_size; }
    T* scratch_of(int64_t thread) const { return scratch.get() + thread * scratch_size; }
    T* product(int64_t i) const { return products.get() + i * product_size; }

    int64_t piece_size, scratch_size, product_size;
    Buffer<T> pieces, scratch, products, features, partial;
    Buffer<double> norms;
    T *first, *mean, *squares, *diagonal;
  };

  static View packed(View view, const Pack& pack) {
    view.by_t *= pack.steps, view.by_n *= pack.samples;
    return view;
  }

  int64_t begin_of(int64_t p) const { return p * piece_; }
  int64_t end_of(int64_t p) const { return std::min((p + 1) * piece_, length_); }

  // Calls body(begin, end, width) for the samples that have d_ features, and for the last one if it has fewer.
  template <typename Body>
  void by_width(int64_t begin, int64_t end, const Body& body) const {
    const int64_t whole = last_ < d_ ? std::min(end, n_ - 1) : end;
    if (begin < whole) body(begin, whole, d_);
    if (whole < end) body(whole, end, last_);
  }

  Sums step(State& state, int64_t t, int64_t threads) {
    State::clear(state.first, 3 * padded_);
    run_.add_samples(h_, t, 0, 1, 0, d_, state.mean, state.first, state.scratch_of(0));
    for (int64_t k = own_; k < d_; ++k) state.first[k] = state.first[k - own_];
    if (!by_features_) means(state, t, threads);
    bool last_is_there = false;  // in the buffer of thread 0
    if (groups_ == 1) {
      for (int64_t p = 0; p < pieces_; ++p) {
        centred(state, t, p, threads, 0, false);
        product(state, p, state.piece(0), state.product(0), p > 0, threads);
      }
      last_is_there = true;
    } else {
      groups(state, t, threads);
    }
    const Sums sums = finish(state, threads);
    if (wish_.gradient) gradients(state, t, threads, last_is_there);
    return sums;
  }

  // The means of all features over all samples, relative to the first. Pieces are samples.
  void means(State& state, int64_t t, int64_t threads) {
    share(threads, 0, pieces_, [&](int64_t p, int64_t thread) {
      T* sums = state.partial.get() + p * padded_;
      State::clear(sums, padded_);
      by_width(begin_of(p), end_of(p), [&](int64_t first, int64_t last, int64_t width) {
        run_.add_samples(h_, t, first, last, 0, width, state.first, sums, state.scratch_of(thread));
      });
    });
    added_up(state, state.mean, double(all_));
  }

  // to <- the sum of what `partial` has for the pieces, and for all samples of a pack, over `divisor`.
  void added_up(State& state, T* to, double divisor) {
    for (int64_t k = 0; k < own_; ++k) {
      double sum = 0;
      for (int64_t p = 0; p < pieces_; ++p) {
        for (int64_t at = k; at < d_; at += own_) sum += double(state.partial.get()[p * padded_ + at]);
      }
      for (int64_t at = k; at < d_; at += own_) to[at] = T(sum / divisor);
    }
  }

  // Leaves of the product of a pack the blocks on the diagonal, each the sum over the samples.
  void unpack(T* product) {
    for (int64_t i = 0; i < d_; ++i) {
      T* row = product + i * product_pitch_;
      const int64_t end = (i / block_ + 1) * block_;
      for (int64_t j = i; j < end && i < own_; ++j) {
        for (int64_t at = own_; at < d_; at += own_) row[j] += product[(i + at) * product_pitch_ + j + at];
      }
      for (int64_t j = i; j < end && i >= own_; ++j) row[j] = product[(i - own_) * product_pitch_ + j - own_];
      for (int64_t j = end; j < d_; ++j) row[j] = 0;
    }
  }

  // Centres piece p, into the buffer of `thread`, by so many threads. `again`: its mean is known, its squares are not
  // wanted.
  void centred(State& state, int64_t t, int64_t p, int64_t threads, int64_t thread, bool again) {
    const int64_t from = by_features_ ? begin_of(p) : 0, to = by_features_ ? end_of(p) : d_;
    const int64_t strips = (to - from + kStrip - 1) / kStrip, each = (strips + threads - 1) / threads * kStrip;
    share(threads, 0, (to - from + each - 1) / each, [&](int64_t i, int64_t worker) {
      const int64_t begin = from + i * each, end = std::min(begin + each, to);
      T *scratch = state.scratch_of(thread + worker), *z = state.piece(thread) + (begin - from);
      T* squares = scratch + 2 * round_up(end - begin, kPad);
      if (by_features_) {
        if (!again) {
          squares = state.squares + begin;
          run_.add_samples(h_, t, 0, n_, begin, end, state.first + begin, state.mean + begin, scratch);
          for (int64_t k = begin; k < end; ++k) state.mean[k] /= T(n_);
        } else {
          State::clear(squares, end - begin);
        }
        run_.centre(h_, t, 0, n_, begin, end, state.first + begin, state.mean + begin, z, pitch_, squares, scratch);
      } else {
        if (!again) squares = state.partial.get() + p * padded_ + begin;
        State::clear(squares, end - begin);
        by_width(begin_of(p), end_of(p), [&](int64_t first, int64_t last, int64_t width) {
          T* row = z + (first - begin_of(p)) * pitch_;
          if (width < end) State::clear(row, round_up(end - begin, kPad));
          if (width <= begin) return;
          run_.centre(h_, t, first, last, begin, std::min(end, width), state.first + begin, state.mean + begin, row,
                      pitch_, squares, scratch);
        });
      }
    });
  }

  // The part that piece p, centred in z, has in the product.
  void product(State&, int64_t p, const T* z, T* product, bool adds, int64_t threads) {
    if (!wish_.covariance) return;
    const int64_t count = end_of(p) - begin_of(p);
    const int64_t blocks = blocks_of(size_, by_features_ ? kGramBlock : kCovarianceBlock);
    share(threads, 0, blocks * (blocks + 1) / 2, [&](int64_t pair, int64_t) {
      if (by_features_) {
        run_.gram(z, pitch_, n_, round_up(count, kPad), product, product_pitch_, adds, pair, pair + 1);
      } else {
        run_.covariance(z, pitch_, count, d_, product, product_pitch_, adds, pair, pair + 1);
      }
    });
  }

  // The product as a sum of `groups_` products, each over some pieces, side by side.
  void groups(State& state, int64_t t, int64_t threads) {
    const auto add = [&](int64_t from, int64_t group) {
      if (!wish_.covariance) return;
      for (int64_t i = 0; i < size_; ++i) {
        T* to = state.product(0) + i * product_pitch_;
        const T* part = state.product(from) + i * product_pitch_;
        for (int64_t j = i; j < size_; ++j) to[j] = group == 0 ? part[j] : to[j] + part[j];
      }
    };
    share(threads, 0, groups_, [&](int64_t group, int64_t thread) {
      const int64_t begin = group * pieces_ / groups_, end = (group + 1) * pieces_ / groups_;
      T* to = state.product(threads == 1 ? 1 : 1 + group);
      for (int64_t p = begin; p < end; ++p) {
        centred(state, t, p, 1, thread, false);
        product(state, p, state.piece(thread), to, p > begin, 1);
      }
      if (threads == 1) add(1, group);
    });
    for (int64_t group = 0; threads > 1 && group < groups_; ++group) add(1 + group, group);
  }

  // The two sums. Makes of the product what the gradient is multiplied with, and the diagonal.
  Sums finish(State& state, int64_t threads) {
    Sums sums;
    if (!by_features_) added_up(state, state.squares, 1);
    for (int64_t k = 0; k < own_; ++k) {
      const T square = state.squares[k];
      double diagonal = 0;
      if (wish_.variance) {
        const double sigma = std::sqrt(double(square) / double(all_ - 1) + wish_.eps), left = wish_.threshold - sigma;
        sums.hinge += left < 0 ? 0 : left;  // NaN stays NaN
        diagonal = wish_.a * ((sigma < wish_.threshold ? 1.0 : 0.0) / sigma);
      }
      if (block_ == 1) sums.penalty += 0 * double(square);  // NaN stays NaN
      if (wish_.covariance && wish_.gram) {
        sums.penalty -= double(square) * double(square);
        diagonal += wish_.b * double(square);
      }
      for (int64_t at = k; at < d_; at += own_) state.diagonal[at] = T(diagonal);
    }
    if (!wish_.covariance) return sums;
    T* product = state.product(0);
    if (block_ < d_) unpack(product);
    share(size_ < kBlock ? 1 : threads, 0, size_, [&](int64_t i, int64_t) {
      state.norms.get()[i] = run_.norm_of_row(product, product_pitch_, size_, i, !wish_.gram);
    });
    for (int64_t i = 0; i < (wish_.gram ? n_ : own_); ++i) sums.penalty += state.norms.get()[i];
    if (wish_.gradient) {
      run_.scale_rows(product, product_pitch_, size_, T(wish_.b), 0, size_);
      share(threads, 0, blocks_of(size_, kBlock), [&](int64_t block, int64_t) {
        run_.mirror_rows(product, product_pitch_, block * kBlock, std::min((block + 1) * kBlock, size_));
      });
    }
    return sums;
  }

  // Pieces in descending order, since the last ones may still be in the cache.
  void gradients(State& state, int64_t t, int64_t threads, bool last_is_there) {
    const bool within = pieces_ < 2 * threads;  // threads share each piece
    share(within ? 1 : threads, 0, pieces_, [&](int64_t i, int64_t thread) {
      const int64_t p = pieces_ - 1 - i;
      if (!(last_is_there && i == 0 && (within || threads == 1))) {
        centred(state, t, p, within ? threads : 1, thread, true);
      }
      const T *z = state.piece(thread), *product = state.product(0);
      const int64_t rows = by_features_ ? n_ : end_of(p) - begin_of(p);
      const int64_t from = by_features_ ? begin_of(p) : 0, to = by_features_ ? end_of(p) : d_;
      share(within ? threads : 1, 0, within && threads > 1 ? blocks_of(rows, kBlock) : 1, [&](int64_t block, int64_t) {
        const int64_t at = block * kBlock, count = within && threads > 1 ? std::min(kBlock, rows - at) : rows;
        const bool left = wish_.gram;
        const int64_t sample = by_features_ ? 0 : begin_of(p);
        by_width(sample + at, sample + at + count, [&](int64_t first, int64_t last, int64_t width) {
          const T* rows = z + (first - sample) * pitch_;
          run_.gradient(left ? product + first * product_pitch_ : rows, left ? product_pitch_ : pitch_,
                        left ? z : product, left ? pitch_ : product_pitch_, wish_.covariance ? size_ : 0, rows, pitch_,
                        state.diagonal + from, last - first, std::min(to, width) - from, out_, t, first, from);
        });
      });
    });
  }

  View h_, out_;
  int64_t all_, block_, own_;     // N; d; features of a sample in a pack
  int64_t n_, steps_, d_, last_;  // N, T and d as if packs were samples and time steps; d of the last sample
  Wish wish_;
  const Kernels<T>& run_;
  bool by_features_;              // pieces are features, in Gram form; else they are samples
  int64_t size_, length_;         // of the product; of its sums
  int64_t piece_, pieces_, groups_;
  int64_t rows_, width_, pitch_;  // of a piece's buffer
  int64_t product_pitch_, padded_;
};

// -- The operators --------------------------------------------------------------------------------------------------

struct Options {
  double alpha, beta, threshold, eps;
  bool gram, variance, covariance;
};

int64_t features_of_all(const std::vector<Tensor>& hs) {
  int64_t steps = 0;
  for (const Tensor& h : hs) steps += h.size(1);
  return steps * hs[0].size(2);
}

void check(const std::vector<Tensor>& hs, const std::vector<int64_t>& made) {
  STD_TORCH_CHECK(!hs.empty() && made.size() == hs.size(), "vcr: at least one tensor, and for each whether it needs a "
                  "gradient");
  for (const Tensor& h : hs) {
    STD_TORCH_CHECK(h.dim() == 3 && h.size(0) == hs[0].size(0) && h.size(2) == hs[0].size(2) && h.numel() > 0 &&
                        h.size(0) >= 2,
                    "vcr: tensors must be (N, T, d), N at least 2, with the same N and d");
    const auto dtype = h.scalar_type();
    STD_TORCH_CHECK(dtype == hs[0].scalar_type() &&
                        (dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                         dtype == ScalarType::BFloat16),
                    "vcr: tensors must be all float16, bfloat16, float32 or float64");
  }
}

// How the tensor is packed, if both views allow it. A dimension of size 1 has no stride of its own.
Pack pack_of(View& h, View& out, int64_t n, int64_t steps, int64_t d, const Wish& wish) {
  const int64_t most = (wish.covariance ? kPacked : kPackedAlone) / d;
  if (wish.gram || n < d || most < 2) return {};
  bool as_one_step = true, as_one_sample = true;
  for (View* view : {&h, &out}) {
    if (view->data == nullptr) continue;
    if (steps == 1) view->by_t = d == 1 ? view->by_n : d * view->by_d;
    if (d == 1) view->by_d = view->by_t;
    as_one_step = as_one_step && view->by_t == d * view->by_d;
    as_one_sample = as_one_sample && view->by_n == steps * view->by_t;
  }
  Pack pack;
  if (!as_one_step) return pack;
  pack.steps = std::min(steps, most);
  if (as_one_sample && pack.steps == steps) {
    pack.samples = std::max<int64_t>(1, std::min(most / steps, n / kLeastRows));
  }
  return pack;
}

View at_step(View view, int64_t t) {
  const int64_t bytes = view.dtype == ScalarType::Double ? 8 : view.dtype == ScalarType::Float ? 4 : 2;
  if (view.data != nullptr) view.data = static_cast<char*>(view.data) + t * view.by_t * bytes;
  return view;
}

// The terms' sums of one tensor, and its gradient.
template <typename T>
Sums run(View h, View out, int64_t n, int64_t steps, int64_t d, Wish wish) {
  wish.covariance = wish.covariance && (wish.gram || d > 1);  // one feature has no covariances
  const Pack pack = pack_of(h, out, n, steps, d, wish);
  const auto sum_of = [&](int64_t begin, int64_t end, const Pack& pack) {
    Sums total;
    Loss<T> loss(at_step(h, begin), at_step(out, begin), n, end - begin, d, wish, pack);
    for (const Sums& one : loss.all_steps()) total.hinge += one.hinge, total.penalty += one.penalty;
    return total;
  };
  const int64_t rest = steps % pack.steps;
  Sums total = sum_of(0, steps - rest, pack);
  if (rest > 0) {
    const Sums last = sum_of(steps - rest, steps, {rest, 1});
    total.hinge += last.hinge, total.penalty += last.penalty;
  }
  // NaN of one step stays out of the gradients of the others.
  if (pack.steps > 1 && !std::isfinite(total.hinge + total.penalty)) total = sum_of(0, steps, {});
  return total;
}

// The terms' sums of all tensors, and the gradients of those that are `made`. a, b: as in Wish.
template <typename T>
Sums run(const std::vector<Tensor>& hs, const Options& options, double a, double b, const std::vector<int64_t>& made,
         std::vector<Tensor>& gradients) {
  Sums total;
  for (size_t i = 0; i < hs.size(); ++i) {
    const Tensor& h = hs[i];
    const Wish wish{options.threshold, options.eps, a, b, options.gram && options.covariance, options.variance,
                    options.covariance, made[i] != 0};
    const Sums one =
        run<T>(view_of(h), made[i] ? view_of(gradients[i]) : View{}, h.size(0), h.size(1), h.size(2), wish);
    total.hinge += one.hinge, total.penalty += one.penalty;
  }
  return total;
}

// For the gradient of h: h's strides if it is dense, else the features side by side; without elements if not wanted.
std::vector<Tensor> empty_gradients(const std::vector<Tensor>& hs, const std::vector<int64_t>& made) {
  std::vector<Tensor> found;
  for (size_t i = 0; i < hs.size(); ++i) {
    found.push_back(made[i] ? torch::stable::empty_like(hs[i]) : torch::stable::new_empty(hs[i], {0}));
    if (made[i]) in_large_pages(found.back());
  }
  return found;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> vcr_cpu(std::vector<Tensor> hs, double alpha, double beta,
                                                                double threshold, double eps, bool gram,
                                                                bool variance, bool covariance,
                                                                std::vector<int64_t> made) {
  check(hs, made);
  const double n = double(hs[0].size(0)), count = double(features_of_all(hs));
  const Options options{alpha, beta, threshold, eps, gram, variance, covariance};
  std::vector<Tensor> gradients = empty_gradients(hs, made);
  const double a = alpha / (count * (n - 1)), b = 4 * beta / (count * (n - 1) * (n - 1));
  const Sums sums = in_float64(hs[0]) ? run<double>(hs, options, a, b, made, gradients)
                                      : run<float>(hs, options, a, b, made, gradients);
  const double terms[] = {sums.hinge / count, sums.penalty / (count * (n - 1) * (n - 1))};
  const auto dtype = in_float64(hs[0]) ? ScalarType::Double : ScalarType::Float;
  const auto scalar = [&](double x) {
    Tensor to = torch::stable::new_empty(hs[0], {}, dtype);
    if (dtype == ScalarType::Double) {
      *mutable_data<double>(to) = x;
    } else {
      *mutable_data<float>(to) = float(x);
    }
    return to;
  };
  return {scalar(alpha * terms[0] + beta * terms[1]), scalar(terms[0]), scalar(terms[1]), gradients};
}

// The number in a scalar tensor.
double number(const Tensor& x) {
  STD_TORCH_CHECK(x.numel() == 1 && (x.scalar_type() == ScalarType::Float || in_float64(x)),
                  "vcr_cpu_backward: gradients must be float32 or float64 scalars");
  return in_float64(x) ? *data<double>(x) : double(*data<float>(x));
}

std::string instruction_set() { return kIsaNames[int(isa())]; }

std::vector<Tensor> vcr_cpu_backward(std::vector<Tensor> hs, std::optional<Tensor> g_loss,
                                     std::optional<Tensor> g_variance, std::optional<Tensor> g_covariance,
                                     double alpha, double beta, double threshold, double eps, bool gram, bool variance,
                                     bool covariance, std::vector<int64_t> made) {
  check(hs, made);
  const double n = double(hs[0].size(0)), count = double(features_of_all(hs));
  // A term that nobody used has no part in the gradient, not even 0 * NaN.
  const Options options{alpha, beta, threshold, eps, gram, variance && (g_loss || g_variance),
                        covariance && (g_loss || g_covariance)};
  const double of_loss = g_loss ? number(*g_loss) : 0;
  const double of_variance = of_loss * alpha + (g_variance ? number(*g_variance) : 0);
  const double of_covariance = of_loss * beta + (g_covariance ? number(*g_covariance) : 0);
  const double a = of_variance / (count * (n - 1)), b = 4 * of_covariance / (count * (n - 1) * (n - 1));
  std::vector<Tensor> gradients = empty_gradients(hs, made);
  if (in_float64(hs[0])) {
    run<double>(hs, options, a, b, made, gradients);
  } else {
    run<float>(hs, options, a, b, made, gradients);
  }
  return gradients;
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&vjvcr::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) {
  m.impl("vcr_cpu", TORCH_BOX(&vjvcr::vcr_cpu));
  m.impl("vcr_cpu_backward", TORCH_BOX(&vjvcr::vcr_cpu_backward));
}
