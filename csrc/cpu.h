// What the CPU's files share: plain loops that the compiler vectorises for three levels of x86-64.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
// "arch=haswell" would ask for that CPU's model; the levels ask for its features.
#define OZ_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define OZ_IVDEP _Pragma("GCC ivdep")
#elif defined(__clang__)
#define OZ_CLONES
#define OZ_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define OZ_CLONES
#define OZ_IVDEP
#endif
