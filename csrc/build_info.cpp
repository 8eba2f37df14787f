// Facts about this build, for `python -m mirage_kernels` and for error reports. Includes no torch header, so that it can
// be imported, and can explain itself, where a compiled operator module cannot be loaded.
#include <pybind11/pybind11.h>

#include <string>
#include <thread>

namespace {

// The widest instruction set that the kernels' clones can use on this machine.
std::string simd() {
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

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts about this build of mirage_kernels.";
  m.attr("torch_version") = MIRAGE_TORCH_VERSION;
  m.attr("cuda_version") = MIRAGE_CUDA_VERSION;
  m.attr("cuda_archs") = MIRAGE_CUDA_ARCHS;
  m.attr("compiler") = MIRAGE_COMPILER;
  m.attr("flags") = MIRAGE_FLAGS;
  m.def("simd", &simd, "Widest instruction set the CPU kernels use on this machine.");
  m.def("hardware_threads", &std::thread::hardware_concurrency, "Hardware threads of this machine.");
}
