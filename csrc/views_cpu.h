// Tensors (N, T, d) of any dtype and strides, as the CPU operators of the losses read and write them.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstring>

#include "tensors.h"

namespace vjvcr {
namespace {

// A tensor (N, T, d) of any dtype and strides.
struct View {
  void* data;
  ScalarType dtype;
  int64_t by_n, by_t, by_d;
};

inline float float_of_half(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = x & 0x7fff;
  uint32_t bits = 0x3f000000 | rest;
  float value;
  // Of a subnormal number, the digits below 0.5. No float here is subnormal, since the caller may have these flushed.
  std::memcpy(&value, &bits, 4);
  value -= 0.5f;
  std::memcpy(&bits, &value, 4);
  if (rest >= 0x400) bits = (rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t half_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16) & 0x8000;
  float size;
  bits &= 0x7fffffff;
  std::memcpy(&size, &bits, 4);
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) {
    // Added to a number whose last digit is half's least, it is rounded to that digit.
    size += 0.5f;
    std::memcpy(&bits, &size, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
}

inline uint16_t bfloat16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline View view_of(const Tensor& h) {
  return {const_cast<void*>(h.const_data_ptr()), h.scalar_type(), h.stride(0), h.stride(1), h.stride(2)};
}

inline bool in_float64(const Tensor& h) { return h.scalar_type() == ScalarType::Double; }

// Memory that is new to the process costs more to get, page by page, than to write. Large pages are fewer.
inline void in_large_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLarge = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (begin + uintptr_t(tensor.numel()) * tensor.element_size()) / kLarge * kLarge;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a hint: it may fail
#endif
}

}  // namespace
}  // namespace vjvcr
