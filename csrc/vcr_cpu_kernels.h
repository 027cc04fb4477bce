// The inner loops of vcr_cpu.cpp, for one instruction set.
//
// All matrices are in buffers of ours: rows begin at multiples of kPad + kSkew numbers, what is beyond the last column up
// to a multiple of kPad is zero, and there are kBeyond readable rows beyond the last. So no loop has a special last round.
#include "views_cpu_kernels.h"

namespace vjvcr::VJVCR_ISA {

constexpr int kDots = kRegisters == 32 ? 4 : 3;       // rows and columns of a tile of dot products
constexpr int64_t kAtOnce = 12;                       // rows that stay in the L1 cache, a multiple of both kDots
constexpr int64_t kSummed = 64;                       // terms that are summed before they go to a larger sum

// -- Centring -------------------------------------------------------------------------------------------------------

// sums[k] += h - first over samples begin <= n < end and features from <= k < to.
template <typename T>
void add_samples(const View& h, int64_t t, int64_t begin, int64_t end, int64_t from, int64_t to, const T* first,
                 T* sums, T* scratch) {
  const int64_t width = to - from;
  T *buffer = scratch, *part = scratch + round_up(width, kPad);
  for (int64_t start = begin; start < end; start += kSummed) {
    for (int64_t k = 0; k < width; ++k) part[k] = 0;
    for (int64_t n = start; n < least(start + kSummed, end); ++n) {
      const T* __restrict x = read(h, t, n, from, to, buffer);
      for (int64_t k = 0; k < width; ++k) part[k] += x[k] - first[k];
    }
    for (int64_t k = 0; k < width; ++k) sums[k] += part[k];
  }
}

// z <- h - first - mean for samples begin <= n < end and features from <= k < to, and squares[k] += z^2.
template <typename T>
void centre(const View& h, int64_t t, int64_t begin, int64_t end, int64_t from, int64_t to, const T* first,
            const T* mean, T* z, int64_t pitch, T* squares, T* scratch) {
  const int64_t width = to - from, padded = round_up(width, kPad);
  T *buffer = scratch, *part = scratch + padded;
  for (int64_t start = begin; start < end; start += kSummed) {
    for (int64_t k = 0; k < width; ++k) part[k] = 0;
    for (int64_t n = start; n < least(start + kSummed, end); ++n) {
      const T* __restrict x = read(h, t, n, from, to, buffer);
      T* __restrict row = z + (n - begin) * pitch;
      for (int64_t k = 0; k < width; ++k) {
        const T centred = x[k] - first[k] - mean[k];
        row[k] = centred;
        part[k] += centred * centred;
      }
      for (int64_t k = width; k < padded; ++k) row[k] = 0;
    }
    for (int64_t k = 0; k < width; ++k) squares[k] += part[k];
  }
}

// -- Products -------------------------------------------------------------------------------------------------------

// The tiles of ZZ' on and above the diagonal, over `width` features of z (n, width): product is set, or added to.
// begin, end: which pairs of blocks of rows.
template <typename T>
void gram(const T* z, int64_t pitch, int64_t n, int64_t width, T* product, int64_t product_pitch, bool adds,
          int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair) {
    const Pair at = pair_of(pair);
    const int64_t last_i = least(n, (at.i + 1) * kGramBlock), last_j = least(n, (at.j + 1) * kGramBlock);
    for (int64_t start = at.j * kGramBlock; start < last_j; start += kAtOnce) {
      for (int64_t i = at.i * kGramBlock; i < last_i && i < start + kAtOnce; i += kDots) {
        for (int64_t j = start; j < least(start + kAtOnce, last_j); j += kDots) {
          if (j + kDots <= i) continue;
          Register<T> sum[kDots][kDots] = {};
          const T *left = z + i * pitch, *right = z + j * pitch;
          for (int64_t k = 0; k < width; k += kLanes<T>) {
            Register<T> y[kDots];
#pragma GCC unroll 8
            for (int b = 0; b < kDots; ++b) y[b] = load(right + b * pitch + k);
#pragma GCC unroll 8
            for (int a = 0; a < kDots; ++a) {
              const Register<T> x = load(left + a * pitch + k);
#pragma GCC unroll 8
              for (int b = 0; b < kDots; ++b) sum[a][b] = multiply_add<T>(x, y[b], sum[a][b]);
            }
          }
#pragma GCC unroll 8
          for (int a = 0; a < kDots; ++a) {
#pragma GCC unroll 8
            for (int b = 0; b < kDots; ++b) {
              T& to = product[(i + a) * product_pitch + j + b];
              to = total<T>(sum[a][b]) + (adds ? to : T(0));
            }
          }
        }
      }
    }
  }
}

// The tiles of Z'Z on and above the diagonal, over `rows` samples of z (rows, d): product is set, or added to.
template <typename T>
void covariance(const T* z, int64_t pitch, int64_t rows, int64_t d, T* product, int64_t product_pitch, bool adds,
                int64_t begin, int64_t end) {
  constexpr int64_t kColumns = kVectors * kLanes<T>;
  for (int64_t pair = begin; pair < end; ++pair) {
    const Pair at = pair_of(pair);
    const int64_t last_i = least(d, (at.i + 1) * kCovarianceBlock), last_j = least(d, (at.j + 1) * kCovarianceBlock);
    for (int64_t j = at.j * kCovarianceBlock; j < last_j; j += kColumns) {
      for (int64_t i = at.i * kCovarianceBlock; i < last_i && i < j + kColumns; i += kRows) {
        Register<T> sum[kRows][kVectors] = {};
        multiply<T>(sum, z + i, 1, pitch, z + j, pitch, rows);
        for (int r = 0; r < kRows && i + r < last_i; ++r) {
          T* to = product + (i + r) * product_pitch + j;
          for (int v = 0; v < kVectors; ++v) {
            store(to + v * kLanes<T>, adds ? load(to + v * kLanes<T>) + sum[r][v] : sum[r][v]);
          }
        }
      }
    }
  }
}

// The sum of squares of row i of a symmetric matrix whose upper part is there, as far as column i, twice what is off the
// diagonal. (Of all rows that is the squared norm.) With `zero`, the diagonal is set to zero first.
template <typename T>
double norm_of_row(T* product, int64_t pitch, int64_t size, int64_t i, bool zero) {
  T* __restrict row = product + i * pitch;
  if (zero) row[i] *= 0;  // NaN stays NaN
  double sum = 0;
  for (int64_t start = i + 1; start < size; start += kSummed) {
    T lanes[16] = {}, part = 0;
    const int64_t end = least(start + kSummed, size);
    int64_t j = start;
    for (; j + 16 <= end; j += 16) {
      for (int k = 0; k < 16; ++k) lanes[k] += row[j + k] * row[j + k];
    }
    for (; j < end; ++j) part += row[j] * row[j];
    for (int k = 0; k < 16; ++k) part += lanes[k];
    sum += double(part);
  }
  return 2 * sum + double(row[i]) * double(row[i]);
}

// product <- scale * product, with the lower part as the mirror image of the upper; rows begin <= i < end.
// Only entries whose row is in the range are written, so rows can be done side by side once `scaled_rows` are.
template <typename T>
void scale_rows(T* product, int64_t pitch, int64_t size, T scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* __restrict row = product + i * pitch;
    for (int64_t j = i; j < size; ++j) row[j] *= scale;
  }
}

template <typename T>
void mirror_rows(T* product, int64_t pitch, int64_t begin, int64_t end) {
  constexpr int64_t kSide = 16;
  for (int64_t i0 = begin; i0 < end; i0 += kSide) {
    for (int64_t j0 = 0; j0 < i0 + kSide; j0 += kSide) {
      for (int64_t i = i0; i < least(i0 + kSide, end); ++i) {
        T* row = product + i * pitch;
        for (int64_t j = j0; j < least(j0 + kSide, i); ++j) row[j] = product[j * pitch + i];
      }
    }
  }
}

// out <- left right - z diag(diagonal), for `rows` samples from `sample` on and `columns` features from `feature` on.
// left: (rows, terms). right: (terms, columns). z: (rows, columns). terms may be 0.
template <typename T>
void gradient(const T* left, int64_t left_pitch, const T* right, int64_t right_pitch, int64_t terms, const T* z,
              int64_t z_pitch, const T* diagonal, int64_t rows, int64_t columns, const View& out, int64_t t,
              int64_t sample, int64_t feature) {
  constexpr int64_t kColumns = kVectors * kLanes<T>;
  const bool direct = out.by_d == 1 && out.dtype == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double);
  for (int64_t j = 0; j < columns; j += kColumns) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Register<T> sum[kRows][kVectors];
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t k = j + v * kLanes<T>;
          sum[r][v] = -load(diagonal + k) * load(z + (i + r) * z_pitch + k);
        }
      }
      multiply<T>(sum, left + i * left_pitch, left_pitch, 1, right + j, right_pitch, terms);
      for (int r = 0; r < kRows && i + r < rows; ++r) {
        if (direct && j + kColumns <= columns) {
          T* to = static_cast<T*>(out.data) + (sample + i + r) * out.by_n + t * out.by_t + feature + j;
          for (int v = 0; v < kVectors; ++v) store(to + v * kLanes<T>, sum[r][v]);
        } else {
          T x[kColumns];
          for (int v = 0; v < kVectors; ++v) store(x + v * kLanes<T>, sum[r][v]);
          write(out, t, sample + i + r, feature + j, least(kColumns, columns - j), x);
        }
      }
    }
  }
}

template <typename T>
constexpr Kernels<T> kKernels = {add_samples<T>, centre<T>,     gram<T>,     covariance<T>,
                                 norm_of_row<T>, scale_rows<T>, mirror_rows<T>, gradient<T>};

}  // namespace vjvcr::VJVCR_ISA
