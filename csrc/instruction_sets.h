// Compiles the file VJVCR_KERNELS once for each instruction set, in namespaces vjvcr::baseline, avx2 and avx512, and says
// which of them this CPU has. A .cpp file includes this after everything else.
#pragma once

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#define VJVCR_ISA baseline
#define VJVCR_VECTOR 16
#include "vectors.h"
#include VJVCR_KERNELS
#undef VJVCR_ISA
#undef VJVCR_VECTOR

#ifdef __x86_64__
#include <immintrin.h>

// What is between the two is compiled for these instructions.
#define VJVCR_TEXT(words) #words
#ifdef __clang__
#define VJVCR_FOR(names) _Pragma(VJVCR_TEXT(clang attribute push(__attribute__((target(names))), apply_to = function)))
#define VJVCR_END _Pragma("clang attribute pop")
#else
#define VJVCR_FOR(names) _Pragma("GCC push_options") _Pragma(VJVCR_TEXT(GCC target(names)))
#define VJVCR_END _Pragma("GCC pop_options")
#endif

VJVCR_FOR("avx2,fma")
#define VJVCR_ISA avx2
#define VJVCR_VECTOR 32
#include "vectors.h"
#include VJVCR_KERNELS
#undef VJVCR_ISA
#undef VJVCR_VECTOR
VJVCR_END

VJVCR_FOR("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#define VJVCR_ISA avx512
#define VJVCR_VECTOR 64
#include "vectors.h"
#include VJVCR_KERNELS
#undef VJVCR_ISA
#undef VJVCR_VECTOR
VJVCR_END
#endif

#include <cstdlib>
#include <cstring>

namespace vjvcr {

enum class Isa { baseline, avx2, avx512 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

// The best that this CPU has; VJVCR_CPU=baseline, avx2 or avx512 asks for less.
inline Isa isa() {
  static const Isa best = [] {
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      return Isa::avx512;
    }
    if (avx2) return Isa::avx2;
#endif
    return Isa::baseline;
  }();
  const char* wish = std::getenv("VJVCR_CPU");
  if (wish == nullptr || *wish == 0) return best;
  for (int i = 0; i <= int(best); ++i) {
    if (std::strcmp(wish, kIsaNames[i]) == 0) return Isa(i);
  }
  STD_TORCH_CHECK(false, "VJVCR_CPU=", wish, ": this CPU has baseline", best >= Isa::avx2 ? ", avx2" : "",
                  best == Isa::avx512 ? ", avx512" : "");
  return best;
}

}  // namespace vjvcr

// The variable of that name in the namespace of the instruction set to be used.
#ifdef __x86_64__
#define VJVCR_OF_THIS_CPU(name) \
  (isa() == Isa::avx512 ? avx512::name : isa() == Isa::avx2 ? avx2::name : baseline::name)
#else
#define VJVCR_OF_THIS_CPU(name) baseline::name
#endif
