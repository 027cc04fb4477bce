// The inner loops of sigreg_cpu.cpp, for one instruction set.
//
// Matrices are in buffers of ours, with kBeyond readable rows beyond the last. Directions are in panels of kPad, padded
// with zeros: so columns of projections come in multiples of kPad, and no loop over them has a special last round.
#include "views_cpu_kernels.h"

namespace vjvcr::VJVCR_ISA::sigreg {

constexpr int kAtOnce = VJVCR_VECTOR == 64 ? 4 : 2;  // rows whose powers of exp(i x) are in registers together
constexpr int64_t kSummed = 64;                      // terms that are summed before they go to a larger sum, in float64
constexpr int64_t kTerms = 256;                      // terms of a product that are summed before they go to a larger sum

// -- Sine and cosine ------------------------------------------------------------------------------------------------
//
// With x = angle / pi in half-turns, q the nearest whole number and f = x - q, |f| <= 1/2:
//
//     sin(angle) = (-1)^q f P(f^2),   cos(angle) = (-1)^q Q(f^2)
//
// P and Q are minimax polynomials; their own errors are 1.4e-8 and 2.2e-10 for float32, 6.5e-19 and 6.4e-21 for float64.
// f is exact to one rounding, whatever the size of x: x * scale - q is one fused multiplication and addition, with the
// scale in two parts. Where q is too large for that (or there is none, and T is float) f is computed in float64. With
// the rounding of the polynomials, errors are below 2e-7 in float32 and 4e-16 in float64; without fused operations
// float64 adds 1.2e-16 |x|. Beyond 2^51 half-turns the angle counts as zero. Infinity gives NaN.

template <typename T>
struct Integer;
template <>
struct Integer<float> {
  typedef int32_t Number;
  typedef int32_t Register __attribute__((vector_size(VJVCR_VECTOR)));
};
template <>
struct Integer<double> {
  typedef int64_t Number;
  typedef int64_t Register __attribute__((vector_size(VJVCR_VECTOR)));
};

// Added to a number and subtracted, it rounds it to a whole number, which is then in the sum's last bits.
template <typename T>
constexpr T kRounder = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);
template <typename T>
constexpr T kFar = sizeof(T) == 4 ? T(0x1p21) : T(0x1p50);  // half-turns

template <typename T>
inline bool all_below(Register<T> x, T limit) {  // false if one is NaN
#if VJVCR_VECTOR == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(x, all(limit), _CMP_LT_OQ) == 0xffff;
  } else {
    return _mm512_cmp_pd_mask(x, all(limit), _CMP_LT_OQ) == 0xff;
  }
#elif VJVCR_VECTOR == 32
  if constexpr (sizeof(T) == 4) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x, all(limit), _CMP_LT_OQ)) == 0xff;
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd(x, all(limit), _CMP_LT_OQ)) == 0xf;
  }
#else
  bool below = true;
  for (int i = 0; i < kLanes<T>; ++i) below &= x[i] < limit;
  return below;
#endif
}

// f, and in the lowest bit of `odd` whether q is odd, in float64.
template <typename T>
inline void reduce_far(Register<T> x, double scale, Register<T>& f, typename Integer<T>::Register& odd) {
  for (int i = 0; i < kLanes<T>; ++i) {
    const double turns = double(x[i]) * scale;
    const bool near = turns < 0x1p51 && turns > -0x1p51;
    const double shifted = turns + kRounder<double>;
    int64_t bits;
    __builtin_memcpy(&bits, &shifted, 8);
    f[i] = near ? T(turns - (shifted - kRounder<double>)) : T(turns - turns);
    odd[i] = near ? typename Integer<T>::Number(bits & 1) : 0;
  }
}

template <typename T>
inline void sine_cosine(Register<T> x, const Scale<T>& scale, Register<T>& sine, Register<T>& cosine) {
  typedef typename Integer<T>::Register Bits;
  const Register<T> turns = x * all(scale.high), shifted = turns + all(kRounder<T>);
  Register<T> f = multiply_add<T>(x, all(scale.high), all(kRounder<T>) - shifted);
  f = multiply_add<T>(x, all(scale.low), f);
  Bits odd = (Bits)shifted;
  constexpr bool kFused = VJVCR_VECTOR > 16 || sizeof(T) == 8;
  if (!kFused || !all_below<T>(turns * turns, kFar<T> * kFar<T>)) [[unlikely]] reduce_far<T>(x, scale.whole, f, odd);
  const Bits sign = odd << (8 * int(sizeof(T)) - 1);
  const Register<T> u = f * f;
  Register<T> s, c;
  if constexpr (sizeof(T) == 4) {
    s = multiply_add<T>(all(0.077659408465195662f), u, all(-0.598292159585975455f));
    s = multiply_add<T>(s, u, all(2.55007765974673762f));
    s = multiply_add<T>(s, u, all(-5.16771009033306807f));
    s = multiply_add<T>(s, u, all(3.14159264018405142f));
    c = multiply_add<T>(all(-0.0243967165369615099f), u, all(0.234937558900749127f));
    c = multiply_add<T>(c, u, all(-1.33521225665375180f));
    c = multiply_add<T>(c, u, all(4.05870916434129545f));
    c = multiply_add<T>(c, u, all(-4.93480213722832232f));
    c = multiply_add<T>(c, u, all(0.999999999780652162f));
  } else {
    s = multiply_add<T>(all(7.6978678271849894131e-7), u, all(-2.1903501179792268335e-5));
    s = multiply_add<T>(s, u, all(4.6629981785722964e-4));
    s = multiply_add<T>(s, u, all(-7.3704305062695801501e-3));
    s = multiply_add<T>(s, u, all(0.082145886573144208702));
    s = multiply_add<T>(s, u, all(-0.59926452931894730955));
    s = multiply_add<T>(s, u, all(2.5501640398773005566));
    s = multiply_add<T>(s, u, all(-5.1677127800499696087));
    s = multiply_add<T>(s, u, all(3.1415926535897932378));
    c = multiply_add<T>(all(-1.3435271532313808683e-7), u, all(4.3007248318146787192e-6));
    c = multiply_add<T>(c, u, all(-1.0463741712648405534e-4));
    c = multiply_add<T>(c, u, all(1.9295741873593386058e-3));
    c = multiply_add<T>(c, u, all(-0.025806891376604471109));
    c = multiply_add<T>(c, u, all(0.23533063035799601577));
    c = multiply_add<T>(c, u, all(-1.3352627688545550128));
    c = multiply_add<T>(c, u, all(4.0587121264167675451));
    c = multiply_add<T>(c, u, all(-4.9348022005446793043));
    c = multiply_add<T>(c, u, all(1.0));
  }
  sine = (Register<T>)((Bits)(s * f) ^ sign);
  cosine = (Register<T>)((Bits)c ^ sign);
}

// exp(i t_1 x), and exp(i (t_2 - t_1) x), which is its square if the knots are at half steps, for R rows of x.
template <typename T, int R>
inline void first_and_step(const T* x, int64_t pitch, const Scale<T>& scale, bool half, Register<T> (&c)[R],
                           Register<T> (&s)[R], Register<T> (&step_c)[R], Register<T> (&step_s)[R]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    sine_cosine<T>(load(x + r * pitch), scale, s[r], c[r]);
    step_c[r] = half ? multiply_add<T>(c[r], c[r], -s[r] * s[r]) : c[r];
    step_s[r] = half ? (c[r] + c[r]) * s[r] : s[r];
  }
}

// -- Projections ----------------------------------------------------------------------------------------------------

// z <- samples begin <= n < end at time step t, and zeros beyond them.
template <typename T>
void copy_samples(const View& h, int64_t t, int64_t begin, int64_t end, int64_t d, T* z, int64_t pitch) {
  for (int64_t n = begin; n < end; ++n) {
    T* __restrict row = z + (n - begin) * pitch;
    const T* __restrict x = read(h, t, n, 0, d, row);
    if (x != row) __builtin_memcpy(row, x, d * sizeof(T));
  }
  for (int64_t r = end - begin; r < end - begin + kBeyond; ++r) __builtin_memset(z + r * pitch, 0, d * sizeof(T));
}

// x (rows, panels * kPad) <- z (rows, d) times directions, panels of (d, kPad).
template <typename T>
void project(const T* z, int64_t z_pitch, int64_t rows, int64_t d, const T* directions, int64_t panels, T* x,
             int64_t pitch) {
  constexpr int64_t kColumns = kVectors * kLanes<T>;
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t start = 0; start < d; start += kTerms) {
      const int64_t terms = least(kTerms, d - start);
      for (int64_t j = 0; j < kPad; j += kColumns) {
        const T* right = directions + (p * d + start) * kPad + j;
        for (int64_t i = 0; i < rows; i += kRows) {
          Register<T> sum[kRows][kVectors] = {};
          multiply<T>(sum, z + i * z_pitch + start, z_pitch, 1, right, kPad, terms);
          for (int r = 0; r < kRows && i + r < rows; ++r) {
            T* to = x + (i + r) * pitch + p * kPad + j;
            for (int v = 0; v < kVectors; ++v) {
              store(to + v * kLanes<T>, start > 0 ? load(to + v * kLanes<T>) + sum[r][v] : sum[r][v]);
            }
          }
        }
      }
    }
  }
}

// out (rows, d) <- or += slopes (rows, terms) times directions, panels of kPad features that lie `by_panel` apart, each
// with a row a direction.
template <typename T>
void back_project(const T* slopes, int64_t pitch, int64_t rows, int64_t terms, const T* directions, int64_t by_panel,
                  T* out, int64_t by_row, int64_t d, bool adds) {
  constexpr int64_t kColumns = kVectors * kLanes<T>;
  for (int64_t k = 0; k < d; k += kColumns) {
    const T* right = directions + k / kPad * by_panel + k % kPad;
    const int64_t width = least(kColumns, d - k);
    for (int64_t i = 0; i < rows; i += kRows) {
      Register<T> sum[kRows][kVectors] = {};
      multiply<T>(sum, slopes + i * pitch, pitch, 1, right, kPad, terms);
      for (int r = 0; r < kRows && i + r < rows; ++r) {
        T* to = out + (i + r) * by_row + k;
        if (width == kColumns) {
          for (int v = 0; v < kVectors; ++v) {
            store(to + v * kLanes<T>, adds ? load(to + v * kLanes<T>) + sum[r][v] : sum[r][v]);
          }
        } else {
          T y[kColumns];
          for (int v = 0; v < kVectors; ++v) store(y + v * kLanes<T>, sum[r][v]);
          for (int64_t v = 0; v < width; ++v) to[v] = adds ? to[v] + y[v] : y[v];
        }
      }
    }
  }
}

// -- Sums and slopes ------------------------------------------------------------------------------------------------

// sums[2 j], sums[2 j + 1] += cos(t_j x), sin(t_j x) of R rows.
template <typename T, int R>
inline void add_rows(const T* x, int64_t pitch, const Scale<T>& scale, bool half, int64_t knots, T* sums) {
  Register<T> c[R], s[R], step_c[R], step_s[R];
  first_and_step<T, R>(x, pitch, scale, half, c, s, step_c, step_s);
  for (int64_t j = 0; j < knots; ++j) {
    T *of_c = sums + 2 * j * kLanes<T>, *of_s = of_c + kLanes<T>;
    Register<T> sum_c = load(of_c), sum_s = load(of_s);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum_c += c[r], sum_s += s[r];
    store(of_c, sum_c), store(of_s, sum_s);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Register<T> next = multiply_add<T>(c[r], step_c[r], -s[r] * step_s[r]);
      s[r] = multiply_add<T>(s[r], step_c[r], c[r] * step_s[r]);
      c[r] = next;
    }
  }
}

// out <- the sums over rows of cos(t_j x), then those of sin(t_j x): rows of `out_pitch` numbers, one a column.
// scratch: 2 knots kPad numbers.
template <typename T>
void add_up(const T* x, int64_t pitch, int64_t rows, int64_t columns, const Scale<T>& scale, bool half, int64_t knots,
            T* scratch, double* out, int64_t out_pitch) {
  constexpr int kWide = kLanes<T>;
  for (int64_t k = 0; k < columns; k += kWide) {
    for (int64_t j = 0; j < 2 * knots; ++j) {
      for (int l = 0; l < kWide; ++l) out[j * out_pitch + k + l] = 0;
    }
    for (int64_t start = 0; start < rows; start += kSummed) {
      for (int64_t i = 0; i < 2 * knots * kWide; ++i) scratch[i] = 0;
      const int64_t end = least(start + kSummed, rows);
      int64_t n = start;
      for (; n + kAtOnce <= end; n += kAtOnce) {
        add_rows<T, kAtOnce>(x + n * pitch + k, pitch, scale, half, knots, scratch);
      }
      for (; n < end; ++n) add_rows<T, 1>(x + n * pitch + k, pitch, scale, half, knots, scratch);
      for (int64_t j = 0; j < knots; ++j) {
        double *to_c = out + j * out_pitch + k, *to_s = out + (knots + j) * out_pitch + k;
        const T *of_c = scratch + 2 * j * kWide, *of_s = of_c + kWide;
        for (int l = 0; l < kWide; ++l) to_c[l] += double(of_c[l]), to_s[l] += double(of_s[l]);
      }
    }
  }
}

// x <- sum_j (a_j cos(t_j x) - b_j sin(t_j x)) = Re sum_j (a_j + i b_j) exp(i t_j x) for R rows, by Horner's rule.
template <typename T, int R>
inline void slope_rows(T* x, int64_t pitch, const Scale<T>& scale, bool half, int64_t knots, const T* a, const T* b,
                       int64_t by_knot) {
  Register<T> c[R], s[R], step_c[R], step_s[R], real[R], imaginary[R];
  first_and_step<T, R>(x, pitch, scale, half, c, s, step_c, step_s);
  for (int r = 0; r < R; ++r) {
    real[r] = load(a + (knots - 1) * by_knot), imaginary[r] = load(b + (knots - 1) * by_knot);
  }
  for (int64_t j = knots - 2; j >= 0; --j) {
    const Register<T> next_a = load(a + j * by_knot), next_b = load(b + j * by_knot);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Register<T> next =
          multiply_add<T>(real[r], step_c[r], multiply_add<T>(-imaginary[r], step_s[r], next_a));
      imaginary[r] = multiply_add<T>(real[r], step_s[r], multiply_add<T>(imaginary[r], step_c[r], next_b));
      real[r] = next;
    }
  }
  for (int r = 0; r < R; ++r) store(x + r * pitch, multiply_add<T>(real[r], c[r], -imaginary[r] * s[r]));
}

// The same for all rows and columns. a, b: rows of `by_knot` numbers, one a column.
template <typename T>
void slopes(T* x, int64_t pitch, int64_t rows, int64_t columns, const Scale<T>& scale, bool half, int64_t knots,
            const T* a, const T* b, int64_t by_knot) {
  for (int64_t k = 0; k < columns; k += kLanes<T>) {
    int64_t n = 0;
    for (; n + kAtOnce <= rows; n += kAtOnce) {
      slope_rows<T, kAtOnce>(x + n * pitch + k, pitch, scale, half, knots, a + k, b + k, by_knot);
    }
    for (; n < rows; ++n) slope_rows<T, 1>(x + n * pitch + k, pitch, scale, half, knots, a + k, b + k, by_knot);
  }
}

template <typename T>
void write_row(const View& out, int64_t t, int64_t n, int64_t d, const T* x) {
  write(out, t, n, 0, d, x);
}

// -- Directions -----------------------------------------------------------------------------------------------------

// cosines[i], sines[i]: two normal numbers from the hash of i (SplitMix64), begin <= i < end, by Box and Muller.
// vjvcr_fast/losses/projections.py has the same.
inline void normals(uint64_t key, int64_t begin, int64_t end, float* cosines, float* sines, int64_t sines_end) {
  constexpr int64_t kBlock = 64;
  const Scale<float> scale = {0x1p-23f, 0, 0x1p-23};
  for (int64_t start = begin; start < end; start += kBlock) {
    float radius[kBlock], angle[kBlock], c[kBlock], s[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      uint64_t z = key + uint64_t(start + i) * 0x9E3779B97F4A7C15u;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
      z ^= z >> 31;
      radius[i] = float(int32_t(z >> 41)) + 0.5f;
      angle[i] = float(int32_t(z >> 17 & 0xffffff));
    }
    // -2 log(radius / 2^23): radius = m 2^e with m between sqrt(1/2) and sqrt(2), log m = 2 atanh((m - 1) / (m + 1)).
    for (int64_t i = 0; i < kBlock; ++i) {
      constexpr int32_t kRootOfHalf = 0x3f3504f3;
      int32_t bits;
      __builtin_memcpy(&bits, &radius[i], 4);
      bits -= kRootOfHalf;
      const float exponent = float((bits >> 23) - 23);
      bits = (bits & 0x7fffff) + kRootOfHalf;
      float m;
      __builtin_memcpy(&m, &bits, 4);
      const float y = (m - 1) / (m + 1), u = y * y;
      const float log = y * (((0.29927122f * u + 0.39974734f) * u + 0.66666817f) * u + 2.0f) + exponent * 0.69314718f;
      radius[i] = __builtin_sqrtf(-2 * log);
    }
    for (int64_t i = 0; i < kBlock; i += kLanes<float>) {
      Register<float> sine, cosine;
      sine_cosine<float>(load(angle + i), scale, sine, cosine);
      store(c + i, load(radius + i) * cosine), store(s + i, load(radius + i) * sine);
    }
    const int64_t count = least(kBlock, end - start), here = least(count, sines_end - start);
    for (int64_t i = 0; i < count; ++i) cosines[start + i] = c[i];
    for (int64_t i = 0; i < here; ++i) sines[start + i] = s[i];
  }
}

template <typename T>
constexpr Kernels<T> kKernels = {copy_samples<T>, project<T>, back_project<T>, add_up<T>, slopes<T>, write_row<T>};

}  // namespace vjvcr::VJVCR_ISA::sigreg
