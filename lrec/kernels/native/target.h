// LREC_TARGET_BEGIN(features) .. LREC_TARGET_END encloses code that may use those instructions. Standard headers stand
// before it, since the linker could keep an inline function compiled with them for machines without. For the same reason
// nothing between the two uses the standard library's templates, and all of it has internal linkage.
#pragma once
#include "numbers.h"

#ifdef LREC_X86
#include <immintrin.h>

#define LREC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LREC_TARGET_BEGIN(features) LREC_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LREC_TARGET_END _Pragma("clang attribute pop")
#else
#define LREC_TARGET_BEGIN(features) _Pragma("GCC push_options") LREC_PRAGMA(GCC target(features))
#define LREC_TARGET_END _Pragma("GCC pop_options")
#endif
#define LREC_AVX2_BEGIN LREC_TARGET_BEGIN("avx2,fma,f16c")
#define LREC_AVX2_END LREC_TARGET_END
#define LREC_AVX512_BEGIN LREC_TARGET_BEGIN("avx512f,avx512bw,avx2,fma,f16c")
#define LREC_AVX512_END LREC_TARGET_END
#endif
