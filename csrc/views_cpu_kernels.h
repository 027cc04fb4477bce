// Reading and writing rows of a View, for one instruction set.
namespace vjvcr::VJVCR_ISA {

template <typename T, typename From>
inline void converted(const From* from, int64_t stride, int64_t count, T* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = T(from[k * stride]);
}

// Features from <= k < to of sample n at time step t: in place if they can be used as they are, else in `buffer`.
template <typename T>
inline const T* read(const View& h, int64_t t, int64_t n, int64_t from, int64_t to, T* buffer) {
  const int64_t at = n * h.by_n + t * h.by_t + from * h.by_d;
  switch (h.dtype) {
    case ScalarType::Float: {
      const float* x = static_cast<const float*>(h.data) + at;
      if constexpr (sizeof(T) == 4) {
        if (h.by_d == 1) return x;
      }
      converted(x, h.by_d, to - from, buffer);
      return buffer;
    }
    case ScalarType::Double: {
      const double* x = static_cast<const double*>(h.data) + at;
      if constexpr (sizeof(T) == 8) {
        if (h.by_d == 1) return x;
      }
      converted(x, h.by_d, to - from, buffer);
      return buffer;
    }
    case ScalarType::BFloat16:
      for (int64_t k = 0; k < to - from; ++k) {
        const uint32_t bits = uint32_t(static_cast<const uint16_t*>(h.data)[at + k * h.by_d]) << 16;
        float x;
        __builtin_memcpy(&x, &bits, 4);
        buffer[k] = T(x);
      }
      return buffer;
    default:
      for (int64_t k = 0; k < to - from; ++k) {
        buffer[k] = T(float_of_half(static_cast<const uint16_t*>(h.data)[at + k * h.by_d]));
      }
      return buffer;
  }
}

// Writes `count` numbers as features from `from` on of sample n at time step t.
template <typename T>
inline void write(const View& out, int64_t t, int64_t n, int64_t from, int64_t count, const T* x) {
  const int64_t at = n * out.by_n + t * out.by_t + from * out.by_d;
  if (out.dtype == ScalarType::Float) {
    for (int64_t k = 0; k < count; ++k) static_cast<float*>(out.data)[at + k * out.by_d] = float(x[k]);
  } else if (out.dtype == ScalarType::Double) {
    for (int64_t k = 0; k < count; ++k) static_cast<double*>(out.data)[at + k * out.by_d] = double(x[k]);
  } else if (out.dtype == ScalarType::BFloat16) {
    for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(out.data)[at + k * out.by_d] = bfloat16_of(float(x[k]));
  } else {
    for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(out.data)[at + k * out.by_d] = half_of(float(x[k]));
  }
}

}  // namespace vjvcr::VJVCR_ISA
