// csrc/hardware.cuh for a CPU. With it the kernels' own source runs here: every CUDA thread is a fiber, and clusters
// run one after another.
//
// Between two points where threads wait for each other (barriers, shuffles, products) the fibers run one by one, in an
// order drawn from a seed. What is sent to a mailbox arrives at any later time and in any order. So if a barrier is
// missing, the result depends on the seed. Shared memory is filled with NaN at first and ends at a page that must not
// be touched; so do global arrays made by `Array`. Products have the layouts of PTX's mma.sync, round their operands as
// it does, and truncate sums.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <utility>
#include <vector>

#define VJVCR_EMULATED
#define VJVCR_KERNEL(threads) void
#define VJVCR_DEVICE inline
#define VJVCR_CONSTANT const
#define VJVCR_CLUSTERS

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using std::max;
using std::min;

namespace vjvcr::hardware {

inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

// Memory that is filled with NaN at first. Touching one byte more is a fault.
class Pages {
 public:
  explicit Pages(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    bytes = (bytes + 15) / 16 * 16;
    size_ = (bytes + page - 1) / page * page + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) fail("no memory");
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + size_ - page, page, PROT_NONE);
    begin_ = base_ + size_ - page - bytes;
    std::memset(base_ + page, 0xff, size_ - 2 * page);
  }
  Pages(const Pages&) = delete;
  Pages(Pages&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), begin_(other.begin_), size_(other.size_) {}
  ~Pages() {
    if (base_ != nullptr) munmap(base_, size_);
  }
  char* begin() const { return begin_; }

 private:
  char *base_, *begin_;
  size_t size_;
};

template <typename T>
struct Array {
  Pages pages;
  explicit Array(size_t n) : pages(n * sizeof(T)) {}
  T* data() const { return reinterpret_cast<T*>(pages.begin()); }
};

struct Fiber;

// Threads that wait for each other. The last one to arrive does the work of all, if there is any, and wakes the others.
struct Meeting {
  size_t expected = 0;
  const char* reason = nullptr;
  std::vector<Fiber*> here;
  bool any = false, result = false;
};

// An mbarrier with one arrival a round. The round ends after that arrival, when all announced bytes have come.
struct Mailbox {
  int round = 0;
  int64_t missing = 0;
  bool arrived = false;
  std::vector<Fiber*> waiting;
};

struct Mail {
  char *place, bytes[8];
  size_t size;
  uint64_t* box;
};

struct Block {
  Pages memory;
  int index, rank;
  Meeting meeting;
  std::vector<Meeting> warps;
};

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  Block* block;
  int thread;
  bool started = false;
  int barriers = 0;          // how many it has reached
  void* argument = nullptr;  // of the operation in which it waits
};

struct Machine {
  int threads, blocks;
  std::vector<Block> cluster;
  Meeting meeting;  // of the cluster
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  std::map<uint64_t*, Mailbox> mailboxes;
  std::vector<Mail> underway;
  const char* error = nullptr;
  std::function<void()> kernel;
  std::function<bool(int)> skip;  // whether to leave out a thread's i-th barrier
  size_t finished = 0;
  jmp_buf scheduler;
  std::mt19937 random;
  Fiber* running = nullptr;
};
inline Machine* machine = nullptr;

[[noreturn]] inline void give_up(const char* error) {
  machine->error = error;
  _longjmp(machine->scheduler, 1);
}

// The running fiber waits for the others. Returns true in the last one to arrive; it finds all in meeting.here, in the
// order of their threads.
inline bool meet(Meeting& meeting, const char* reason, void* argument = nullptr) {
  Fiber* self = machine->running;
  if (meeting.here.empty()) meeting.reason = reason;
  if (meeting.reason != reason) give_up("threads wait for each other in different places");
  self->argument = argument;
  meeting.here.push_back(self);
  if (meeting.here.size() == meeting.expected) {
    std::sort(meeting.here.begin(), meeting.here.end(), [](Fiber* a, Fiber* b) {
      return a->block != b->block ? a->block->rank < b->block->rank : a->thread < b->thread;
    });
    return true;
  }
  if (_setjmp(self->jump) == 0) _longjmp(machine->scheduler, 1);
  return false;
}

inline void part(Meeting& meeting) {
  for (Fiber* fiber : meeting.here) {
    if (fiber != machine->running) machine->ready.push_back(fiber);
  }
  meeting.here.clear();
}

inline int thread() { return machine->running->thread; }
inline int block() { return machine->running->block->index; }
inline int blocks() { return machine->blocks; }
inline char* shared_memory() { return machine->running->block->memory.begin(); }
inline Meeting& warp() { return machine->running->block->warps[thread() / 32]; }

inline bool skipped() {
  const int i = machine->running->barriers++;
  return machine->skip && machine->skip(i);
}

inline void barrier() {
  Meeting& meeting = machine->running->block->meeting;
  if (!skipped() && meet(meeting, "barrier")) part(meeting);
}
inline bool barrier_any(bool mine) {
  Meeting& meeting = machine->running->block->meeting;
  ++machine->running->barriers;
  meeting.any |= mine;
  if (meet(meeting, "barrier_any")) meeting.result = meeting.any, meeting.any = false, part(meeting);
  return meeting.result;
}
inline void warp_barrier() {
  if (meet(warp(), "warp_barrier")) part(warp());
}
inline void cluster_barrier() {
  if (!skipped() && meet(machine->meeting, "cluster_barrier")) part(machine->meeting);
}

template <typename T>
T* at_rank(T* place, int rank) {
  const auto offset = reinterpret_cast<char*>(place) - shared_memory();
  return reinterpret_cast<T*>(machine->cluster[rank].memory.begin() + offset);
}

inline void open_mailbox(uint64_t* box) {
  *box = 0;
  machine->mailboxes[box] = {};
}

inline void end_round(Mailbox& mailbox) {
  if (!mailbox.arrived || mailbox.missing != 0) return;
  ++mailbox.round, mailbox.arrived = false;
  machine->ready.insert(machine->ready.end(), mailbox.waiting.begin(), mailbox.waiting.end());
  mailbox.waiting.clear();
}

template <typename T>
void send(T* place, T value, uint64_t* box, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Mail mail{reinterpret_cast<char*>(at_rank(place, rank)), {}, sizeof(T), at_rank(box, rank)};
  if (machine->mailboxes.count(mail.box) == 0) give_up("there is no such mailbox");
  std::memcpy(mail.bytes, &value, sizeof(T));
  machine->underway.push_back(mail);
}

inline void deliver(size_t i) {
  std::swap(machine->underway[i], machine->underway.back());
  const Mail mail = machine->underway.back();
  machine->underway.pop_back();
  std::memcpy(mail.place, mail.bytes, mail.size);
  Mailbox& mailbox = machine->mailboxes.at(mail.box);
  mailbox.missing -= int64_t(mail.size);
  end_round(mailbox);
}

// A thread passes if the round is over. As on the GPU, only the parity tells this round from the one before or after.
inline void receive(uint64_t* box, int bytes, int round) {
  Mailbox& mailbox = machine->mailboxes.at(box);
  if (thread() == 0) {
    mailbox.missing += bytes;
    mailbox.arrived = true;
    end_round(mailbox);
  }
  if (skipped() || mailbox.round % 2 != round % 2) return;
  mailbox.waiting.push_back(machine->running);
  if (_setjmp(machine->running->jump) == 0) _longjmp(machine->scheduler, 1);
}

inline float shuffle_xor(float x, int mask) {
  float both[2] = {x, 0};
  Meeting& meeting = warp();
  if (meet(meeting, "shuffle", both)) {
    const auto of = [&](int lane) { return static_cast<float*>(meeting.here[lane]->argument); };
    for (int lane = 0; lane < 32; ++lane) of(lane)[1] = of(lane ^ mask)[0];
    part(meeting);
  }
  return both[1];
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline uint32_t pack_bf16(float first, float second) {
  const auto rounded = [](float x) -> uint32_t {
    const uint32_t bits = as_bits(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(first) | rounded(second) << 16;
}

inline float truncated(double x) {
  const float nearest = static_cast<float>(x);
  return std::abs(static_cast<double>(nearest)) > std::abs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}

struct Operands {
  float* sum;
  uint32_t a[4], b[2];  // in PTX's order
};

// A register holds kPerRegister numbers of k; `element` picks one.
template <int kPerRegister, typename Element>
void mma(const char* name, float (&sum)[4], const uint4& a, const uint2& b, const Element& element) {
  Operands mine{sum, {a.x, a.y, a.z, a.w}, {b.x, b.y}};
  Meeting& meeting = warp();
  if (!meet(meeting, name, &mine)) return;
  constexpr int kDepth = 8 * kPerRegister;
  double of_a[16][kDepth], of_b[kDepth][8];
  const auto of = [&](int lane) { return static_cast<Operands*>(meeting.here[lane]->argument); };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < kPerRegister; ++e) {
        of_a[g + i % 2 * 8][(t + i / 2 * 4) * kPerRegister + e] = element(of(lane)->a[i], e);
        if (i < 2) of_b[(t + i * 4) * kPerRegister + e][g] = element(of(lane)->b[i], e);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      double total = of(lane)->sum[i];
      for (int k = 0; k < kDepth; ++k) total += of_a[lane / 4 + i / 2 * 8][k] * of_b[k][lane % 4 * 2 + i % 2];
      of(lane)->sum[i] = truncated(total);
    }
  }
  part(meeting);
}

inline void mma_bf16(float (&sum)[4], const uint4& a, const uint2& b) {
  mma<2>("mma_bf16", sum, a, b,
         [](uint32_t bits, int e) -> double { return as_float(e == 0 ? bits << 16 : bits & 0xffff0000u); });
}
inline void mma_tf32(float (&sum)[4], const uint4& a, const uint2& b) {
  mma<1>("mma_tf32", sum, a, b, [](uint32_t bits, int) -> double { return as_float(bits & 0xffffe000u); });
}

inline void start_fiber() {
  machine->kernel();
  ++machine->finished;
  _longjmp(machine->scheduler, 1);
}

// Runs kernel() on every thread of `blocks` blocks, in clusters of `cluster` blocks. Returns what went wrong, or null.
inline const char* launch(const std::function<void()>& kernel, int blocks, int threads, int cluster, int shared_bytes,
                   unsigned seed, const std::function<bool(int)>& skip = {}) {
  constexpr size_t kStack = 64 * 1024;
  const Pages stacks(kStack * cluster * threads);
  static ucontext_t returning;
  for (int first = 0; first < blocks; first += cluster) {
    Machine here{};
    here.threads = threads, here.blocks = blocks, here.kernel = kernel, here.skip = skip;
    here.random.seed(seed + first);
    machine = &here;
    for (int rank = 0; rank < cluster; ++rank) {
      here.cluster.push_back({Pages(shared_bytes), first + rank, rank, {}, std::vector<Meeting>(threads / 32)});
      here.cluster.back().meeting.expected = threads;
      for (Meeting& warp : here.cluster.back().warps) warp.expected = 32;
    }
    here.meeting.expected = size_t(cluster) * threads;
    here.fibers.resize(here.meeting.expected);
    for (size_t i = 0; i < here.fibers.size(); ++i) {
      Fiber& fiber = here.fibers[i];
      fiber.block = &here.cluster[i / threads];
      fiber.thread = int(i % threads);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks.begin() + i * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &returning;
      makecontext(&fiber.context, start_fiber, 0);
      here.ready.push_back(&fiber);
    }
    _setjmp(here.scheduler);  // fibers come back here
    Machine& m = *machine;
    const size_t choices = m.ready.size() + m.underway.size();
    if (m.error == nullptr && choices > 0) {
      const size_t choice = m.random() % choices;
      if (choice >= m.ready.size()) {
        deliver(choice - m.ready.size());
        _longjmp(m.scheduler, 1);
      }
      std::swap(m.ready[choice], m.ready.back());
      m.running = m.ready.back();
      m.ready.pop_back();
      if (!m.running->started) {
        m.running->started = true;
        setcontext(&m.running->context);
      }
      _longjmp(m.running->jump, 1);
    }
    if (m.error != nullptr) return m.error;
    if (m.finished != m.fibers.size()) return "threads wait for what never comes";
  }
  return nullptr;
}

}  // namespace vjvcr::hardware
