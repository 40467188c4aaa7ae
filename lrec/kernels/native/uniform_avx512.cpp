// Uniform weights times few rows of x in AVX-512.
#include "avx2.h"

#ifdef LREC_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds these in its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
LREC_AVX512_BEGIN
namespace lrec {
namespace avx512 {
namespace {

#include "vector_avx512.h"

#include "gemv.h"

#include "exact.h"

}  // namespace

Gemv exact(int bits) { return exact_functions(bits); }

}  // namespace avx512
}  // namespace lrec
LREC_AVX512_END
#endif
