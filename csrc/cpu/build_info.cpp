// What `python -m mirage_kernels` asks of this machine, as plain C functions that it calls through ctypes. Everything else
// about the build stands in mirage_kernels/_build_info.py, which setup.py writes: that can be read where no module loads.
#include <thread>

#define MIRAGE_EXPORT extern "C" __attribute__((visibility("default")))

// The widest instruction set that the kernels' clones can use on this machine.
MIRAGE_EXPORT const char* mirage_simd() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
  return "sse2";
#elif defined(__aarch64__)
  return "neon";
#else
  return "scalar";
#endif
}

MIRAGE_EXPORT unsigned mirage_hardware_threads() { return std::thread::hardware_concurrency(); }
