// Vectors of one instruction set, and a tile of a matrix product. A .cpp file includes this file once for each, by way of
// instruction_sets.h, in a namespace of its own and with the compiler set to that instruction set.
//   VJVCR_ISA      the namespace
//   VJVCR_VECTOR   bytes in a vector register: 64, 32 or 16
// Nothing from the standard library is used: the linker would keep one copy of it for all instruction sets.
namespace vjvcr::VJVCR_ISA {

template <typename T>
struct Vector {
  typedef T Register __attribute__((vector_size(VJVCR_VECTOR)));
  typedef T Memory __attribute__((vector_size(VJVCR_VECTOR), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Register = typename Vector<T>::Register;
template <typename T>
constexpr int kLanes = VJVCR_VECTOR / int(sizeof(T));

#if defined(__aarch64__) || VJVCR_VECTOR == 64
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kVectors = 2;                                                // of a tile's columns
constexpr int kRows = kRegisters == 32 ? 8 : VJVCR_VECTOR == 32 ? 6 : 4;  // of a tile

template <typename T>
inline Register<T> load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::Memory*>(from);
}
template <typename T>
inline void store(T* to, Register<T> x) {
  *reinterpret_cast<typename Vector<T>::Memory*>(to) = x;
}
template <typename T>
inline Register<T> all(T x) {
  return x - Register<T>{};
}

// a * b + c, rounded once where the instruction set can.
template <typename T>
inline Register<T> multiply_add(Register<T> a, Register<T> b, Register<T> c) {
#if VJVCR_VECTOR == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_fmadd_ps(a, b, c);
  } else {
    return _mm512_fmadd_pd(a, b, c);
  }
#elif VJVCR_VECTOR == 32
  if constexpr (sizeof(T) == 4) {
    return _mm256_fmadd_ps(a, b, c);
  } else {
    return _mm256_fmadd_pd(a, b, c);
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4) {
    return vfmaq_f32(c, a, b);
  } else {
    return vfmaq_f64(c, a, b);
  }
#else
  return a * b + c;
#endif
}

template <typename T>
inline T total(Register<T> x) {
#if VJVCR_VECTOR == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_reduce_add_ps(x);
  } else {
    return _mm512_reduce_add_pd(x);
  }
#else
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += x[i];
  return sum;
#endif
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A tile of kRows rows and V vectors: sum += x y, where x is (kRows, count) with strides and y (count, ...) rows.
template <typename T, int V>
inline void multiply(Register<T> (&sum)[kRows][V], const T* x, int64_t by_row, int64_t by_term, const T* y,
                     int64_t pitch, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    Register<T> right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(y + k * pitch + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Register<T> left = all(x[r * by_row + k * by_term]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add<T>(left, right[v], sum[r][v]);
    }
  }
}

}  // namespace vjvcr::VJVCR_ISA
