// What fista_mlp and newton_mlp share on the CPU: how samples are spread over threads. The energy itself is in
// mlp_block_cpu.h, for each instruction set.
//
// A thread keeps a block of samples, side by side in the lanes of its vectors. A sample comes in, makes all its steps,
// and leaves when it is frozen. Then the next one comes in. So lanes stay full, and nothing waits between two steps.
// No lane depends on another: a sample's result is the same, to the bit, in any lane and on any number of threads.
//
//   memory               | written by             | read by           | safe because
//   operands             | pack, part by part     | all blocks        | all threads have packed before one searches
//   a block              | its thread             | the same thread   | every thread has its own
//   next                 | a thread that takes    | the same thread   | the addition is atomic
//                        | a sample               |                   |
//   results, row i       | the thread that took   | the caller        | a sample is taken once
//                        | sample i               |                   |
#pragma once

#include <algorithm>
#include <cmath>

#include "memory_cpu.h"
#include "tensors.h"

namespace vjvcr {
namespace {

// One matrix of a product: its rows are those of the result. by_row, by_term: strides, so a matrix can be transposed.
template <typename T>
struct Operand {
  const T* from;
  int64_t by_row, by_term, rows, terms;
};
enum { kW1, kW1T, kW2, kW2T, kGram, kOperands };

template <typename T>
struct Problem {
  int64_t n, m, hidden, steps;
  T scale, weight;
  const T *z0, *p, *b2, *u0, *r, *start;
  T *z, *energy, *step;
  int64_t* taken;
  bool* lost;
  int64_t at_once;  // samples that a thread has at most
  int64_t* next;    // the first sample that no thread has taken
  const T* packed[kOperands];
};

// The search for one instruction set. panel: rows that are packed together. lanes, width: samples in a vector and in a
// block. rows(m, hidden): of a block's memory, `width` numbers each.
template <typename T, typename Options>
struct Kernels {
  int64_t panel, lanes, width;
  int64_t (*rows)(int64_t m, int64_t hidden);
  void (*pack)(const Operand<T>&, int64_t begin, int64_t end, T* to);
  void (*search)(const Problem<T>&, const Options&, T* memory);
};

// Searches for all samples. The tensors are those that check_mlp checks.
template <typename T, typename Options>
void solve(const Kernels<T, Options>& run, const Options& options, int64_t steps, double scale, double weight,
           const Tensor& z0, const Tensor& p, const Tensor& w1z, const Tensor& w2, const Tensor& b2, const Tensor& gram,
           const Tensor& u0, const Tensor& r, const Tensor& start, Result& result) {
  const int64_t n = z0.size(0), m = z0.size(1), hidden = p.size(1);
  if (n == 0) return;
  const Operand<T> operands[kOperands] = {{data<T>(w1z), m, 1, hidden, m},
                                          {data<T>(w1z), 1, m, m, hidden},
                                          {data<T>(w2), hidden, 1, hidden, hidden},
                                          {data<T>(w2), 1, hidden, hidden, hidden},
                                          {data<T>(gram), 1, hidden, hidden, hidden}};
  const double work = double(n) * double(steps + 1) * double(hidden) * double(3 * hidden + 2 * m);
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), blocks_of(n, run.lanes));
  const int64_t threads = std::max<int64_t>(1, std::min(most, int64_t(std::min(work / kWorthIt, 1e6))));
  int64_t next = 0;
  auto& [z, energy, step, taken, lost] = result;
  Problem<T> problem{.n = n,
                     .m = m,
                     .hidden = hidden,
                     .steps = steps,
                     .scale = T(scale),
                     .weight = T(weight),
                     .z0 = data<T>(z0),
                     .p = data<T>(p),
                     .b2 = data<T>(b2),
                     .u0 = data<T>(u0),
                     .r = data<T>(r),
                     .start = data<T>(start),
                     .z = mutable_data<T>(z),
                     .energy = mutable_data<T>(energy),
                     .step = mutable_data<T>(step),
                     .taken = mutable_data<int64_t>(taken),
                     .lost = mutable_data<bool>(lost),
                     .at_once = std::min(run.width, blocks_of(n, threads)),
                     .next = &next,
                     .packed = {}};
  int64_t offsets[kOperands + 1] = {};
  for (int i = 0; i < kOperands; ++i) {
    offsets[i + 1] = offsets[i] + round_up(round_up(operands[i].rows, run.panel) * operands[i].terms, kPad);
  }
  const int64_t block = round_up(run.rows(m, hidden) * run.width, kPad);
  const Buffer<T> memory(offsets[kOperands] + threads * block);
  for (int i = 0; i < kOperands; ++i) problem.packed[i] = memory.get() + offsets[i];
  side_by_side(threads, [&](int64_t thread) {
    for (int i = 0; i < kOperands; ++i) {
      const int64_t panels = blocks_of(operands[i].rows, run.panel);
      run.pack(operands[i], thread * panels / threads, (thread + 1) * panels / threads, memory.get() + offsets[i]);
    }
  });
  side_by_side(threads, [&](int64_t thread) {
    run.search(problem, options, memory.get() + offsets[kOperands] + thread * block);
  });
}

}  // namespace
}  // namespace vjvcr
