// CUDA as the operators use it, on the CPU: what the rewritten .cu files are compiled against (see build.py).
//
// Every CUDA thread of a block is a fiber; blocks run one after the other. The files are compiled with the compiler's
// thread-sanitizer instrumentation, whose calls land in emulator.cpp: each access a kernel makes is checked for bounds,
// alignment, uninitialised memory, and for a second thread that touches the same bytes without a barrier between.
// What the emulator does not declare (cudaDeviceSynchronize, partial warp masks, dynamic shared memory, float atomics)
// the operators do not use: a kernel that needs it fails to compile or stops with a message.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __host__
#define __device__
#define __global__
// Always: the compiler does not instrument what a function that stays one returns through its hidden pointer.
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t stream);

namespace emulator {

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

enum class Access { kRead, kWrite, kConstant, kRelaxed, kAtomic };

// Checks an access of the running thread; outside a kernel it does nothing.
void check_access(const void* memory, size_t bytes, size_t alignment, Access access);
// Copies without instrumentation, so that a checked access is not checked twice.
void copy_unchecked(void* to, const void* from, size_t bytes);
// Lets another thread run, when the order is random: called where threads may meet without a barrier.
void maybe_yield();

void* shared_variable(size_t bytes, size_t alignment, const char* name, int line);
void run_kernel(const char* name, unsigned grid, unsigned block, size_t dynamic_shared, cudaStream_t stream,
                void (*call)(const void*), const void* closure, size_t closure_bytes);

void block_barrier(int line);
unsigned warp_ballot(unsigned mask, bool predicate, const char* what, int line);
int warp_reduce(unsigned mask, int value, const char* what, int line, int (*combine)(int, int));
uint64_t warp_shuffle(unsigned mask, uint64_t bits, int source_lane, const char* what, int line);
int lane();

// Kernel arguments are converted and copied once, at the launch, as on the device.
template <typename Kernel, typename... Arguments>
void launch(const char* name, int64_t grid, int64_t block, size_t dynamic_shared, cudaStream_t stream,
            const Kernel& kernel, const Arguments&... arguments) {
  struct Closure {
    Kernel kernel;
    std::tuple<Arguments...> arguments;
  };
  const Closure closure{kernel, {arguments...}};
  const auto call = [](const void* pointer) {
    const Closure& c = *static_cast<const Closure*>(pointer);
    std::apply(c.kernel, c.arguments);
  };
  run_kernel(name, static_cast<unsigned>(grid), static_cast<unsigned>(block), dynamic_shared, stream, call, &closure,
             sizeof(closure));
}

template <typename T>
T& shared(const char* name, int line = __builtin_LINE()) {
  return *static_cast<T*>(shared_variable(sizeof(T), alignof(T), name, line));
}

template <typename T>
T load(const T* from, Access access) {
  check_access(from, sizeof(T), alignof(T), access);
  T value;
  copy_unchecked(&value, from, sizeof(T));
  return value;
}

template <typename T, typename Update>
T atomic(T* at, const Update& update) {
  maybe_yield();
  const T old = load(at, Access::kAtomic);
  const T now = update(old);
  copy_unchecked(at, &now, sizeof(T));
  return old;
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  copy_unchecked(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  copy_unchecked(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define __syncthreads() ::emulator::block_barrier(__LINE__)

inline unsigned __ballot_sync(unsigned mask, bool predicate, int line = __builtin_LINE()) {
  return emulator::warp_ballot(mask, predicate, "__ballot_sync", line);
}
inline int __all_sync(unsigned mask, bool predicate, int line = __builtin_LINE()) {
  return emulator::warp_ballot(mask, predicate, "__all_sync", line) == 0xffffffffu;
}
inline int __reduce_add_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return emulator::warp_reduce(mask, value, "__reduce_add_sync", line, [](int a, int b) {
    return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  });
}
inline int __reduce_min_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return emulator::warp_reduce(mask, value, "__reduce_min_sync", line, [](int a, int b) { return a < b ? a : b; });
}
inline int __reduce_max_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return emulator::warp_reduce(mask, value, "__reduce_max_sync", line, [](int a, int b) { return a > b ? a : b; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const int source = emulator::lane() - static_cast<int>(delta);
  return emulator::from_bits<T>(emulator::warp_shuffle(mask, emulator::to_bits(value),
                                                       source < 0 ? emulator::lane() : source, "__shfl_up_sync", line));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return emulator::from_bits<T>(
      emulator::warp_shuffle(mask, emulator::to_bits(value), source, "__shfl_sync", line));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return emulator::from_bits<T>(
      emulator::warp_shuffle(mask, emulator::to_bits(value), emulator::lane() ^ lanes, "__shfl_xor_sync", line));
}

// __ldg may read a cache that stores of the same launch do not reach; __ldcg reads past it, so it may race with atomics.
template <typename T>
T __ldg(const T* from) {
  return emulator::load(from, emulator::Access::kConstant);
}
template <typename T>
T __ldcg(const T* from) {
  emulator::maybe_yield();
  return emulator::load(from, emulator::Access::kRelaxed);
}

inline int atomicAdd(int* at, int value) {
  return emulator::atomic(at, [=](int old) { return old + value; });
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return emulator::atomic(at, [=](unsigned long long old) { return old + value; });
}
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return emulator::atomic(at, [=](unsigned old) { return old + value; });
}
inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long compare, unsigned long long value) {
  return emulator::atomic(at, [=](unsigned long long old) { return old == compare ? value : old; });
}
inline unsigned long long atomicMin(unsigned long long* at, unsigned long long value) {
  return emulator::atomic(at, [=](unsigned long long old) { return value < old ? value : old; });
}
inline unsigned atomicMin(unsigned* at, unsigned value) {
  return emulator::atomic(at, [=](unsigned old) { return value < old ? value : old; });
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  return emulator::atomic(at, [=](unsigned old) { return old | value; });
}

inline float __fsqrt_rn(float value) { return __builtin_sqrtf(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }

#define EMULATOR_MIN_MAX(T)                           \
  inline T min(T a, T b) { return b < a ? b : a; }    \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(long long)
#undef EMULATOR_MIN_MAX

struct __half {
  unsigned short bits;
};
struct __nv_bfloat16 {
  unsigned short bits;
};
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 0x1fu, fraction = value.bits & 0x3ffu;
  if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | (fraction << 13) | (fraction != 0 ? 0x400000u : 0u));
  if (exponent != 0) return __uint_as_float(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  const unsigned short sign = static_cast<unsigned short>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<unsigned short>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Adding 1/2 leaves the subnormal's bits, rounded to nearest even, at the bottom of the sum.
    const unsigned rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<unsigned short>(sign | rounded)};
  }
  const unsigned rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<unsigned short>(sign | (rounded >> 13))};
}
