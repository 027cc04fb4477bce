// All that the kernels ask of a GPU. tests/kernels/cuda/emulator.h defines the same for a CPU, so that tests run their source.
#pragma once

#ifndef VJVCR_EMULATED

#include <cuda_runtime.h>

#include <cstdint>

#define VJVCR_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define VJVCR_DEVICE __device__ __forceinline__
#define VJVCR_CONSTANT __grid_constant__ const

namespace vjvcr::hardware {

VJVCR_DEVICE int thread() { return threadIdx.x; }
VJVCR_DEVICE int block() { return blockIdx.x; }
VJVCR_DEVICE int blocks() { return gridDim.x; }

VJVCR_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Barriers: of a block, of a warp, of a cluster (which is one block before sm_90). All order memory accesses; that of a
// cluster across the GPU, which takes its time.
VJVCR_DEVICE void barrier() { __syncthreads(); }
VJVCR_DEVICE bool barrier_any(bool mine) { return __syncthreads_or(mine); }
VJVCR_DEVICE void warp_barrier() { __syncwarp(); }
VJVCR_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// A mailbox in shared memory counts the bytes that arrive, from all blocks of the cluster. It is opened by one thread,
// before a barrier of the cluster; then there are rounds, 0, 1, ...: some send, each of a block's threads receives.
VJVCR_DEVICE void open_mailbox(uint64_t* box) {
#if __CUDA_ARCH__ >= 900
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(box));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(at) : "memory");
#endif
}

// The value goes to the same place in the shared memory of block `rank` of the cluster, 4 or 8 bytes.
template <typename T>
VJVCR_DEVICE void send(T* place, T value, uint64_t* box, int rank) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint32_t to, counter;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(to)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(place))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(counter)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(box))), "r"(rank));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                 "r"(*reinterpret_cast<uint32_t*>(&value)), "r"(counter)
                 : "memory");
  } else {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
                 "l"(*reinterpret_cast<uint64_t*>(&value)), "r"(counter)
                 : "memory");
  }
#else
  *place = value;
#endif
}

// Waits until all `bytes` of the round are here.
VJVCR_DEVICE void receive(uint64_t* box, int bytes, int round) {
#if __CUDA_ARCH__ >= 900
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(box));
  if (threadIdx.x == 0) {  // may come after the bytes: until it comes the round is open
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  }
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(at), "r"(round & 1)
                 : "memory");
  }
  __syncwarp();
#else
  __syncthreads();
#endif
}

VJVCR_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// Two numbers rounded to nearest, the first in the lower half.
VJVCR_DEVICE uint32_t pack_bf16(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

// sum (16 x 8) += a (16 x 16, bfloat16) b (16 x 8). Lane 4 g + t has: of a, columns 2t, 2t + 1 of rows g (x) and g + 8
// (z), then columns 2t + 8, 2t + 9 of both (y, w); of b, the same rows of column g; of sum, columns 2t, 2t + 1 of
// row g, then of row g + 8.
VJVCR_DEVICE void mma_bf16(float (&sum)[4], const uint4& a, const uint2& b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a.x), "r"(a.z), "r"(a.y), "r"(a.w), "r"(b.x), "r"(b.y));
}

// The same for a (16 x 8), b (8 x 8) of float32, of which the upper 19 bits count: columns t (x, z) and t + 4 (y, w).
VJVCR_DEVICE void mma_tf32(float (&sum)[4], const uint4& a, const uint2& b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a.x), "r"(a.z), "r"(a.y), "r"(a.w), "r"(b.x), "r"(b.y));
}

VJVCR_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
VJVCR_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

}  // namespace vjvcr::hardware

#endif
