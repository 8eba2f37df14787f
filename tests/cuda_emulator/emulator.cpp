// The machine: fibers, barriers, warp collectives, and the checks of every memory access. Compiled without
// instrumentation. One kernel runs at a time, on the thread that launched it.
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 48 << 10;  // static shared memory of a block, on every architecture
constexpr unsigned kFullWarp = 0xffffffffu;
const std::string kShared = "__shared__ ", kGlobal = "global memory";
void* const kStream = reinterpret_cast<void*>(0x5717ea3);  // the current stream: any other is a mistake

// What happened last to a few bytes. An interval is the time between two barriers of one block; their numbers ascend
// from block to block and launch to launch.
struct Record {
  uint32_t interval = 0;
  uint16_t thread = 0;
  bool many_threads = false;  // of this block, in this interval
  bool many_blocks = false;   // of this launch
  bool plain = false;         // not all of them atomic
};

struct Shadow {
  Record written, read;
};

struct Region {
  uintptr_t begin, end;
  size_t granule;
  bool writable;
  std::vector<Shadow> shadow;
  std::vector<bool> initialised;
};

struct SharedVariable {
  int line;
  std::string described;
  size_t offset, bytes;
};

enum class State { kReady, kBarrier, kCollective, kDone };

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  State state = State::kDone;
  const char* waits_at = "";
  int line = 0;
};

struct Warp {
  unsigned arrived = 0;
  unsigned generation = 0;
  const char* what = "";
  int line = 0;
  uint64_t values[2][32];  // by parity of the generation: a lane may arrive anew before the last one has read
};

struct Settings {
  int order = 0;  // 0 ascending, 1 descending and the last released first, 2 random
  int processors = 1;
  uint8_t poison = 0xcd;
  std::mt19937 random{1};
} settings;

struct Launch {
  const char* name = "";
  unsigned grid = 0, block = 0, block_index = 0, thread = 0;
  void (*call)(const void*) = nullptr;
  const void* closure = nullptr;
  bool running = false;
  unsigned live = 0, at_barrier = 0;
  int barrier_line = 0;
  std::string failure;
  uint32_t first_interval = 1, block_interval = 1, interval = 1;
} now;

std::vector<Fiber> fibers(kMaxThreads);
Warp warps[kMaxThreads / 32];
std::deque<unsigned> ready;
std::vector<Region> regions;  // disjoint, by address
std::vector<torch::stable::Tensor> kept;
std::vector<SharedVariable> shared_variables;
alignas(128) char shared_memory[kSharedBytes];
size_t shared_used = 0;
std::vector<Shadow> shared_shadow(kSharedBytes);
bool unchecked_launch = false;
uint32_t intervals = 1;  // the latest number given out

#if defined(__x86_64__)
// Saves the registers a call keeps, and goes on where the other stack left off.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
void* scheduler_stack;
#else
ucontext_t scheduler_context;
#endif

void to_scheduler() {
  Fiber& fiber = fibers[now.thread];
#if defined(__x86_64__)
  emulator_switch(&fiber.stack_pointer, scheduler_stack);
#else
  swapcontext(&fiber.context, &scheduler_context);
#endif
}

void to_fiber(Fiber& fiber) {
#if defined(__x86_64__)
  emulator_switch(&scheduler_stack, fiber.stack_pointer);
#else
  swapcontext(&scheduler_context, &fiber.context);
#endif
}

std::string where() {
  std::ostringstream text;
  text << "emulated CUDA: " << now.name << "<<<" << now.grid << ", " << now.block << ">>>";
  if (now.running) text << ", block " << now.block_index << ", thread " << now.thread;
  return text.str() + ": ";
}

// Stops the kernel. On a fiber it does not return: the launch throws on the host's stack.
void fail(const std::string& message) {
  const std::string full = where() + message;
  if (!now.running) throw std::runtime_error(full);
  now.failure = full;
  for (;;) to_scheduler();
}

void make_ready(unsigned thread) {
  fibers[thread].state = State::kReady;
  if (settings.order == 1) {
    ready.push_front(thread);
  } else {
    ready.push_back(thread);
  }
}

void release_barrier() {
  now.at_barrier = 0;
  now.interval = ++intervals;
  for (unsigned thread = 0; thread < now.block; ++thread)
    if (fibers[thread].state == State::kBarrier) make_ready(thread);
}

void finish_thread() {
  Fiber& fiber = fibers[now.thread];
  const Warp& warp = warps[now.thread / 32];
  if (warp.arrived != 0) {
    std::ostringstream text;
    text << "exits while other lanes of its warp wait at " << warp.what << " (line " << warp.line << ")";
    fail(text.str());
  }
  fiber.state = State::kDone;
  --now.live;
  if (now.live > 0 && now.at_barrier == now.live) release_barrier();
}

extern "C" void emulator_enter() {
  now.call(now.closure);
  finish_thread();
  to_scheduler();
  __builtin_trap();
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("emulated CUDA: no memory for the stacks of a block");
    fiber.stack = static_cast<char*>(stack);
  }
#if defined(__x86_64__)
  // As after a call: the entry's address under the six saved registers, the stack off by eight from sixteen.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(&emulator_enter);
  fiber.stack_pointer = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(&emulator_enter), 0);
#endif
}

std::string deadlock() {
  std::ostringstream text;
  text << "no thread can go on:";
  for (unsigned thread = 0; thread < now.block; ++thread) {
    const Fiber& fiber = fibers[thread];
    if (fiber.state == State::kDone) continue;
    const bool same = thread > 0 && fibers[thread - 1].state == fiber.state && fibers[thread - 1].line == fiber.line;
    if (!same) text << " from thread " << thread << " on they wait at " << fiber.waits_at << " (line " << fiber.line << ");";
  }
  return text.str();
}

void run_block(unsigned block_index) {
  now.block_index = block_index;
  now.live = now.block;
  now.at_barrier = 0;
  now.interval = now.block_interval = ++intervals;
  std::memset(shared_memory, settings.poison, kSharedBytes);
  for (unsigned w = 0; w < (now.block + 31) / 32; ++w) warps[w] = Warp{};
  ready.clear();
  for (unsigned thread = 0; thread < now.block; ++thread) {
    prepare(fibers[thread]);
    make_ready(thread);
  }
  while (now.live > 0) {
    if (ready.empty()) {
      const std::string message = where() + deadlock();
      throw std::runtime_error(message);
    }
    if (settings.order == 2) std::swap(ready.front(), ready[settings.random() % ready.size()]);
    now.thread = ready.front();
    ready.pop_front();
    now.running = true;
    to_fiber(fibers[now.thread]);
    now.running = false;
    if (!now.failure.empty()) throw std::runtime_error(now.failure);
  }
}

// Whether the recorded accesses are not ordered before one of the running thread. `since` is when the memory's life, or
// the launch, began.
bool unordered(const Record& record, uint32_t since) {
  if (record.interval < since) return false;
  if (record.many_blocks || record.interval < now.block_interval) return true;
  return record.interval == now.interval && (record.many_threads || record.thread != now.thread);
}

void add(Record& record, bool plain, uint32_t since) {
  if (record.interval < since) {
    record = Record{};
  } else if (record.interval < now.block_interval) {
    record.many_blocks = true;
    record.many_threads = false;
  } else if (record.interval < now.interval) {
    record.many_threads = false;
    record.plain = record.plain && record.many_blocks;
  } else {
    record.many_threads |= record.thread != now.thread;
  }
  record.interval = now.interval;
  record.thread = static_cast<uint16_t>(now.thread);
  record.plain |= plain;
}

void check_order(Shadow& shadow, Access access, uint32_t since, const std::string& memory, size_t offset) {
  const bool atomic = access == Access::kAtomic || access == Access::kRelaxed;
  const bool writes = access == Access::kWrite || access == Access::kAtomic;
  const auto race = [&](const char* earlier, const Record& record) {
    std::ostringstream text;
    text << "a race in " << memory << ", byte " << offset << ": " << (writes ? "written" : "read") << " here, " << earlier;
    if (record.many_blocks || record.interval < now.block_interval) {
      text << " in another block";
    } else if (record.many_threads) {
      text << " by several threads";
    } else {
      text << " by thread " << record.thread;
    }
    fail(text.str() + ", no barrier between");
  };
  if (unordered(shadow.written, since) && (!atomic || shadow.written.plain)) race("written", shadow.written);
  if (writes && unordered(shadow.read, since) && (!atomic || shadow.read.plain)) race("read", shadow.read);
  if (access == Access::kConstant && shadow.written.interval >= since)
    fail("__ldg of memory that the same launch writes: it may read a stale cache");
  if (writes) add(shadow.written, !atomic, since);
  if (access != Access::kWrite) add(shadow.read, !atomic, since);
}

Region* find_region(uintptr_t address) {
  const auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                      [](uintptr_t value, const Region& region) { return value < region.begin; });
  if (after == regions.begin()) return nullptr;
  Region& region = *(after - 1);
  return address < region.end ? &region : nullptr;
}

void check_shared(uintptr_t offset, size_t bytes, Access access) {
  const SharedVariable* variable = nullptr;
  for (const SharedVariable& candidate : shared_variables)
    if (offset >= candidate.offset && offset + bytes <= candidate.offset + candidate.bytes) variable = &candidate;
  if (variable == nullptr) fail("an access past the end of a __shared__ variable");
  for (size_t k = offset; k < offset + bytes; ++k) {
    Shadow& shadow = shared_shadow[k];
    if (access != Access::kWrite && shadow.written.interval < now.block_interval) {
      std::ostringstream text;
      text << "reads " << variable->described << " at byte " << k - variable->offset << ", which nothing has written";
      fail(text.str());
    }
    check_order(shadow, access, now.block_interval, variable->described, k - variable->offset);
  }
}

void check_global(uintptr_t address, size_t bytes, Access access) {
  Region* region = find_region(address);
  if (region == nullptr) fail("an access outside of all tensors it was handed");
  const size_t offset = address - region->begin;
  const auto describe = [&](const char* what) {
    std::ostringstream text;
    text << what << " " << bytes << " bytes at byte " << offset << " of a tensor of " << region->end - region->begin;
    return text.str();
  };
  const bool writes = access == Access::kWrite || access == Access::kAtomic;
  if (address + bytes > region->end) fail(describe(writes ? "writes past the end," : "reads past the end,"));
  if (writes && !region->writable) fail(describe("writes to an input,"));
  if (region->shadow.empty()) return;  // arguments of the kernel
  for (size_t k = offset / region->granule; k <= (offset + bytes - 1) / region->granule; ++k) {
    if (access == Access::kWrite) {
      region->initialised[k] = true;
    } else if (!region->initialised[k]) {
      fail(describe("reads memory that nothing has written,"));
    }
    check_order(region->shadow[k], access, now.first_interval, kGlobal, k * region->granule);
  }
}

uint64_t* arrive(unsigned mask, uint64_t value, const char* what, int line) {
  Warp& warp = warps[now.thread / 32];
  const unsigned lane = now.thread % 32, first = now.thread - lane;
  const auto complain = [&](const std::string& message) {
    std::ostringstream text;
    text << what << " (line " << line << ") " << message;
    fail(text.str());
  };
  if (mask != kFullWarp) complain("with a partial mask, which the emulator does not know");
  if (first + 32 > now.block) complain("names lanes that the block does not have");
  for (unsigned other = first; other < first + 32; ++other)
    if (fibers[other].state == State::kDone) complain("names lane " + std::to_string(other % 32) + ", which has exited");
  if (warp.arrived == 0) {
    warp.what = what;
    warp.line = line;
  } else if (std::strcmp(warp.what, what) != 0 || warp.line != line) {
    complain("while other lanes of the warp wait at " + std::string(warp.what) + " (line " + std::to_string(warp.line) + ")");
  }
  Fiber& fiber = fibers[now.thread];
  uint64_t* values = warp.values[warp.generation % 2];
  values[lane] = value;
  warp.arrived |= 1u << lane;
  fiber.state = State::kCollective;
  fiber.waits_at = what;
  fiber.line = line;
  if (warp.arrived == kFullWarp) {
    warp.arrived = 0;
    ++warp.generation;
    for (unsigned other = first; other < first + 32; ++other) make_ready(other);
  }
  to_scheduler();
  return values;
}

}  // namespace

dim3 thread_index() { return {now.thread, 0, 0}; }
dim3 block_index() { return {now.block_index, 0, 0}; }
dim3 block_size() { return {now.block, 1, 1}; }
dim3 grid_size() { return {now.grid, 1, 1}; }
int lane() { return static_cast<int>(now.thread % 32); }

void copy_unchecked(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

void check_access(const void* memory, size_t bytes, size_t alignment, Access access) {
  if (!now.running) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  if (address - reinterpret_cast<uintptr_t>(fibers[now.thread].stack) < kStackBytes) return;
  if (address % alignment != 0) fail("an access of " + std::to_string(bytes) + " bytes at an address not aligned to it");
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(shared_memory);
  if (offset < kSharedBytes) {
    check_shared(offset, bytes, access);
  } else {
    check_global(address, bytes, access);
  }
}

void maybe_yield() {
  if (!now.running || settings.order != 2 || settings.random() % 8 != 0) return;
  make_ready(now.thread);
  to_scheduler();
}

void* shared_variable(size_t bytes, size_t alignment, const char* name, int line) {
  for (const SharedVariable& variable : shared_variables)
    if (variable.line == line && variable.described.compare(kShared.size(), std::string::npos, name) == 0) return shared_memory + variable.offset;
  const size_t offset = (shared_used + alignment - 1) / alignment * alignment;
  if (offset + bytes > kSharedBytes) fail("more than 48 KB of __shared__ variables");
  // A gap, so that running off one variable's end does not land in the next.
  shared_used = offset + bytes + 32;
  shared_variables.push_back({line, kShared + name, offset, bytes});
  return shared_memory + offset;
}

void block_barrier(int line) {
  Fiber& fiber = fibers[now.thread];
  if (now.at_barrier > 0 && now.barrier_line != line) {
    std::ostringstream text;
    text << "waits at the __syncthreads of line " << line << ", other threads of the block at that of line " << now.barrier_line;
    fail(text.str());
  }
  now.barrier_line = line;
  fiber.state = State::kBarrier;
  fiber.waits_at = "__syncthreads";
  fiber.line = line;
  if (++now.at_barrier == now.live) release_barrier();
  to_scheduler();
}

unsigned warp_ballot(unsigned mask, bool predicate, const char* what, int line) {
  const uint64_t* values = arrive(mask, predicate, what, line);
  unsigned ballot = 0;
  for (int l = 0; l < 32; ++l) ballot |= static_cast<unsigned>(values[l]) << l;
  return ballot;
}

int warp_reduce(unsigned mask, int value, const char* what, int line, int (*combine)(int, int)) {
  const uint64_t* values = arrive(mask, static_cast<uint32_t>(value), what, line);
  int result = static_cast<int>(values[0]);
  for (int l = 1; l < 32; ++l) result = combine(result, static_cast<int>(values[l]));
  return result;
}

uint64_t warp_shuffle(unsigned mask, uint64_t bits, int source_lane, const char* what, int line) {
  return arrive(mask, bits, what, line)[source_lane];
}

void run_kernel(const char* name, unsigned grid, unsigned block, size_t dynamic_shared, cudaStream_t stream,
                void (*call)(const void*), const void* closure, size_t closure_bytes) {
  now = Launch{};
  now.name = name;
  now.grid = grid;
  now.block = block;
  if (unchecked_launch) fail("the launch before it was not checked");
  if (stream != kStream) fail("not launched on the current stream");
  if (dynamic_shared != 0) fail("dynamic shared memory, which the emulator does not know");
  if (grid == 0 || grid >= 1u << 31 || block == 0 || block > kMaxThreads) fail("an invalid launch configuration");
  unchecked_launch = true;
  now.call = call;
  now.closure = closure;
  now.first_interval = intervals + 1;
  shared_variables.clear();
  shared_used = 0;
  const Region arguments{reinterpret_cast<uintptr_t>(closure), reinterpret_cast<uintptr_t>(closure) + closure_bytes, 1,
                         false, {}, {}};
  const auto place = std::upper_bound(regions.begin(), regions.end(), arguments.begin,
                                      [](uintptr_t value, const Region& region) { return value < region.begin; });
  regions.insert(place, arguments);
  std::vector<unsigned> blocks(grid);
  for (unsigned b = 0; b < grid; ++b) blocks[b] = settings.order == 1 ? grid - 1 - b : b;
  if (settings.order == 2) std::shuffle(blocks.begin(), blocks.end(), settings.random);
  for (const unsigned b : blocks) run_block(b);
  std::erase_if(regions, [&](const Region& region) { return region.begin == arguments.begin && region.shadow.empty(); });
}

void begin_operator() {
  end_operator();
  now = Launch{};
}

void end_operator() {
  regions.clear();
  kept.clear();
  unchecked_launch = false;
}

void keep(torch::stable::Tensor tensor) { kept.push_back(std::move(tensor)); }

void know_memory(const void* memory, size_t bytes, size_t element_bytes, bool writable, bool fresh) {
  if (bytes == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  Region* known = find_region(begin);
  if (known != nullptr && known->begin == begin && known->end == begin + bytes && !fresh) {
    known->writable |= writable;
    return;
  }
  std::erase_if(regions, [&](const Region& region) { return region.begin < begin + bytes && begin < region.end; });
  const size_t granule = std::min<size_t>(element_bytes, 4), granules = bytes / granule;
  Region region{begin, begin + bytes, granule, writable, std::vector<Shadow>(granules),
                std::vector<bool>(granules, !fresh)};
  if (fresh) std::memset(const_cast<void*>(memory), settings.poison, bytes);
  const auto place = std::upper_bound(regions.begin(), regions.end(), begin,
                                      [](uintptr_t value, const Region& other) { return value < other.begin; });
  regions.insert(place, std::move(region));
}

}  // namespace emulator

using emulator::Access;

cudaError_t cudaGetLastError() {
  emulator::unchecked_launch = false;
  return 0;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::settings.processors;
  return 0;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t stream) {
  using namespace emulator;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  Region* region = find_region(begin);
  if (stream != kStream) fail("cudaMemsetAsync not on the current stream");
  if (region == nullptr || begin + bytes > region->end) fail("cudaMemsetAsync past the end of a tensor");
  std::memset(memory, byte, bytes);
  const size_t first = (begin - region->begin) / region->granule;
  std::fill_n(region->initialised.begin() + static_cast<long>(first), bytes / region->granule, true);
  return 0;
}

// What torch offers only where it has CUDA.
extern "C" {

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = emulator::kStream;
  return 0;
}
int32_t torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}

__attribute__((visibility("default"))) void emulator_configure(int order, unsigned seed, int processors, int poison) {
  emulator::settings.order = order;
  emulator::settings.random.seed(seed);
  emulator::settings.processors = processors;
  emulator::settings.poison = static_cast<uint8_t>(poison);
}

// The compiler's calls before each access. Locals of a thread never get here, or are told by their stack.
#define EMULATOR_ACCESS(bytes)                                                                                 \
  void __tsan_read##bytes(void* at) { emulator::check_access(at, bytes, bytes, Access::kRead); }               \
  void __tsan_write##bytes(void* at) { emulator::check_access(at, bytes, bytes, Access::kWrite); }             \
  void __tsan_unaligned_read##bytes(void* at) { emulator::check_access(at, bytes, 1, Access::kRead); }         \
  void __tsan_unaligned_write##bytes(void* at) { emulator::check_access(at, bytes, 1, Access::kWrite); }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
void __tsan_read_range(void* at, size_t bytes) { emulator::check_access(at, bytes, 1, Access::kRead); }
void __tsan_write_range(void* at, size_t bytes) { emulator::check_access(at, bytes, 1, Access::kWrite); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
// Reference counts of the host code: theirs are the only atomics that are not the emulator's own.
int __tsan_atomic32_fetch_add(volatile int* at, int value, int) { return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL); }
int __tsan_atomic32_fetch_sub(volatile int* at, int value, int) { return __atomic_fetch_sub(at, value, __ATOMIC_ACQ_REL); }
int __tsan_atomic32_load(const volatile int* at, int) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

}
