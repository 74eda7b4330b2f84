// Which instruction sets this CPU has, and the choice among kernels that are compiled once for each of them.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// PC3D_CLONES before a function compiles it for plain x86-64, AVX2 and AVX-512 and picks one when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PC3D_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PC3D_CLONES
#endif

namespace pc3d {

// Every extension that the flags of the files of an instruction set name (see CMakeLists.txt).
#if defined(__x86_64__) || defined(__i386__)
inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#if defined(PC3D_EMULATE_AVX512)
inline bool has_avx512() { return has_avx2(); }
inline bool has_avx512bf16() { return has_avx2(); }
inline bool fast_avx512bf16() { return true; }
inline bool has_amx() { return false; }
#else
inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq");
}
inline bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Intel's CPUs after Cooper Lake have it for compatibility, at half the rate: they are not faster than with float32.
inline bool fast_avx512bf16() { return __builtin_cpu_is("amd") || __builtin_cpu_is("cooperlake"); }
// Matrix tiles for bfloat16. Linux gives a process their registers when it asks for them.
inline bool has_amx() {
#if defined(__linux__) && defined(__x86_64__) && __GNUC__ >= 11 && !defined(__clang__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512() && __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif
#else
inline bool has_avx2() { return false; }
inline bool has_amx() { return false; }
inline bool has_avx512() { return false; }
inline bool has_avx512bf16() { return false; }
inline bool fast_avx512bf16() { return false; }
#endif

// The kernels that this CPU runs, fastest first; null stands for kernels that were not compiled.
template <class Kernels>
std::vector<const Kernels *> usable_kernels(const Kernels *avx512, const Kernels *avx2, const Kernels *generic) {
  std::vector<const Kernels *> usable;
  if (avx512 && has_avx512()) usable.push_back(avx512);
  if (avx2 && has_avx2()) usable.push_back(avx2);
  usable.push_back(generic);
  return usable;
}

// An empty name means the fastest.
template <class Kernels>
const Kernels &find_kernels(const std::vector<const Kernels *> &usable, const std::string &isa) {
  for (const Kernels *kernels : usable)
    if (isa.empty() || isa == kernels->name) return *kernels;
  throw std::invalid_argument("this CPU or build has no '" + isa + "' kernels");
}

template <class Kernels>
std::vector<std::string> names_of(const std::vector<const Kernels *> &usable) {
  std::vector<std::string> names;
  for (const Kernels *kernels : usable) names.emplace_back(kernels->name);
  return names;
}

}  // namespace pc3d
