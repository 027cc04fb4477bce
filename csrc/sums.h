// Sums on the CPU, in a fixed order that the compiler can keep in vector registers.
#pragma once

#include <cstdint>

namespace vjvcr {

constexpr int kLanes = 16;  // as many partial sums

// The sum of term(k), k < count, in a fixed order.
template <typename T, typename Term>
T sum(int64_t count, const Term& term) {
  T lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += term(k + i);
  }
  for (; k < count; ++k) lanes[k % kLanes] += term(k);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

}  // namespace vjvcr
