#pragma once

// PC3D_CLONES before a function compiles it for plain x86-64, AVX2 and AVX-512 and picks one when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PC3D_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PC3D_CLONES
#endif
