// Rows of uniform weights as floats, in AVX2: eight codes at a time, in natural order.
#include "avx2.h"

#ifdef LREC_X86
LREC_AVX2_BEGIN
namespace lrec {
namespace avx2 {
namespace {

// q as floats, less the zero, times the scale: in this order, as in `unpack`, so that the bits agree.
template <int BITS>
inline void decode8(const uint32_t* codes, int64_t k, __m256 scale, __m256 zero, float* out) {
    const __m256 q = _mm256_cvtepi32_ps(eight_codes<BITS>(codes + k / 32 * BITS, k / 8 & 3));
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_sub_ps(q, zero), scale));
}

template <int BITS>
int64_t decode_whole(const LrecUniform& w, int64_t n, const float* scale, const float* zero, float* out) {
    const uint32_t* codes = row_codes(w, n);
    int64_t k = 0;
    for (int64_t g = 0; k + 8 <= w.K; g++) {
        const __m256 s = _mm256_broadcast_ss(scale + g), z = _mm256_broadcast_ss(zero + g);
        const int64_t end = k + w.group_size < w.K ? k + w.group_size : w.K;
        for (; k + 8 <= end; k += 8) decode8<BITS>(codes, k, s, z, out + k);
    }
    return k;
}

}  // namespace

bool serves(const LrecUniform& w) { return w.group_size % 16 == 0 || w.group_size >= w.K; }

void decode_row(const LrecUniform& w, int64_t n, const float* scale, const float* zero, float* out) {
    int64_t k;
    if (w.bits == 2) k = decode_whole<2>(w, n, scale, zero, out);
    else if (w.bits == 3) k = decode_whole<3>(w, n, scale, zero, out);
    else if (w.bits == 4) k = decode_whole<4>(w, n, scale, zero, out);
    else k = decode_whole<8>(w, n, scale, zero, out);
    decode_columns(w, n, scale, zero, k, w.K, out + k);
}

}  // namespace avx2
}  // namespace lrec
LREC_AVX2_END
#endif
