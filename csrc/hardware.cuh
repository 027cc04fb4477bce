// Everything that fista_mlp asks of the GPU, in one place: tests/kernels/cuda/emulator.h defines the same functions for
// a CPU, so that tests can run the kernels' source without a GPU.
#pragma once

#ifndef VJVCR_EMULATED

#include <cuda_runtime.h>

#include <cstdint>

#define VJVCR_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define VJVCR_DEVICE __device__ __forceinline__
#define VJVCR_CONSTANT __grid_constant__ const
// Clusters need sm_90. The library is also compiled for sm_80 (proximal_step), where fista_mlp's body is left out.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define VJVCR_CLUSTERS
#endif

namespace vjvcr::hardware {

VJVCR_DEVICE int thread() { return threadIdx.x; }
VJVCR_DEVICE int block() { return blockIdx.x; }
VJVCR_DEVICE int blocks() { return gridDim.x; }

VJVCR_DEVICE char* shared_memory() {
  extern __shared__ __align__(32) char memory[];
  return memory;
}

// Barriers of a block, a warp and a cluster. Each also orders memory accesses among its threads.
VJVCR_DEVICE void barrier() { __syncthreads(); }
VJVCR_DEVICE bool barrier_any(bool mine) { return __syncthreads_or(mine); }
VJVCR_DEVICE void warp_barrier() { __syncwarp(); }
VJVCR_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

VJVCR_DEVICE uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// A mailbox is an mbarrier in shared memory: it counts the bytes that arrive from the blocks of the cluster. One thread
// opens it, before a cluster barrier. Then there are rounds 0, 1, ...: in each, blocks send, and every thread of the
// block receives.
VJVCR_DEVICE void open_mailbox(uint64_t* box) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                   shared_address(box))
               : "memory");
}

// The address in the shared memory of block `rank` that `place` has in this block's.
VJVCR_DEVICE uint32_t address_at(const void* place, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(rank));
  return address;
}

// Writes a value of 4 or 8 bytes to the same place in the shared memory of block `rank`, and counts it in its mailbox.
template <typename T>
VJVCR_DEVICE void send(T* place, T value, uint64_t* box, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const uint32_t to = address_at(place, rank), counter = address_at(box, rank);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                 "r"(*reinterpret_cast<uint32_t*>(&value)), "r"(counter)
                 : "memory");
  } else {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
                 "l"(*reinterpret_cast<uint64_t*>(&value)), "r"(counter)
                 : "memory");
  }
}

// Waits until all `bytes` of the round have arrived. st.async counts them with release semantics at the scope of the
// cluster, so the wait must acquire at the same scope; its default is the block.
VJVCR_DEVICE void receive(uint64_t* box, int bytes, int round) {
  const uint32_t at = shared_address(box);
  if (threadIdx.x == 0) {  // bytes may arrive before this: the round stays open until it is announced
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  }
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(at), "r"(round & 1)
                 : "memory");
  }
  __syncwarp();
}

VJVCR_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// Two numbers, rounded to nearest; the first is in the lower half.
VJVCR_DEVICE uint32_t pack_bf16(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

// sum (16 x 8) += a (16 x 16) b (16 x 8), bfloat16. Lane 4 g + t holds
//   of a: columns 2t, 2t + 1 of rows g (x) and g + 8 (y); columns 2t + 8, 2t + 9 of the same rows (z, w);
//   of b: rows 2t, 2t + 1 (x) and 2t + 8, 2t + 9 (y) of column g;
//   of sum: columns 2t, 2t + 1 of row g, then of row g + 8.
VJVCR_DEVICE void mma_bf16(float (&sum)[4], const uint4& a, const uint2& b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// The same for a (16 x 8), b (8 x 8) in TF32, the upper 19 bits of a float32. Of a, the lane holds columns t (x, y) and
// t + 4 (z, w); of b, rows t and t + 4.
VJVCR_DEVICE void mma_tf32(float (&sum)[4], const uint4& a, const uint2& b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

VJVCR_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
VJVCR_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

}  // namespace vjvcr::hardware

#endif
