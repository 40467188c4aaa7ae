// Uniform weights times few rows of x in AVX2.
#include "avx2.h"

#ifdef LREC_X86
LREC_AVX2_BEGIN
namespace lrec {
namespace avx2 {
namespace {

#include "vector_avx2.h"

#include "gemv.h"

#include "exact.h"

}  // namespace

Gemv exact(int bits) { return exact_functions(bits); }

}  // namespace avx2
}  // namespace lrec
LREC_AVX2_END
#endif
