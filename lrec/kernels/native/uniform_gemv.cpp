// Uniform weights times few rows of x, in AVX2.
//
// One 256-bit load takes 8 lanes of consecutive codes: 16 codes a lane at 2 bits, 8 at 3 and 4 bits, 4 at 8 bits. Field s
// of all lanes is cut out by one AND, *where it stands*, and made a float by one conversion, so it arrives multiplied
// by 2^(bits * s); x is laid out once per call in the same order (field by field, 8 lanes each) and divided by that
// power, which is exact. Eight weights so cost an AND, a conversion and an FMA: no shift, no table, and three
// instructions that spread over all four vector ports of a Zen core. A lane never crosses a group, so scale and zero
// enter once per lane and block:
//   y += scale * (sum q x - zero * sum x).
#include "gemv.h"

#ifdef LREC_X86
LREC_AVX2_BEGIN
namespace lrec {
namespace avx2 {
namespace {

template <int BITS_>
struct Exact {
    static constexpr int BITS = BITS_;
    using L = Layout<BITS>;
    static constexpr int64_t BYTES = L::BLOCK * sizeof(float);

    // An 8 by PER_LANE transpose, each field divided by its power of two, and the lanes' sums.
    // Rows of W at once, so that a value of x is loaded for several and the sums still stay in registers.
    static constexpr int rows(int T) { return T <= 2 ? 4 : 2; }

    static inline void prepare_block(const float* from, char* laid_out, float* sums) {
        float* to = reinterpret_cast<float*>(laid_out);
        constexpr int W = L::PER_LANE < 8 ? 4 : 8;  // fields transposed at once
        __m256d low = _mm256_setzero_pd(), high = low;  // a sum is multiplied by the zero: its rounding would weigh most
        for (int s = 0; s < L::PER_LANE; s += W) {
            alignas(32) float tile[W][8];
            for (int lane = 0; lane < 8; lane++)
                for (int i = 0; i < W; i++) tile[i][lane] = from[lane * L::PER_LANE + s + i];
            for (int i = 0; i < W; i++) {
                const __m256 v = _mm256_load_ps(tile[i]);
                low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
                high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
                _mm256_storeu_ps(to + (s + i) * 8, _mm256_mul_ps(v, _mm256_set1_ps(1.0f / float(1 << (BITS * ((s + i) % L::HALF))))));
            }
        }
        _mm_storeu_ps(sums, _mm256_cvtpd_ps(low));
        _mm_storeu_ps(sums + 4, _mm256_cvtpd_ps(high));
    }

    // sum q x of R rows and T rows of x over one block, lane by lane; `codes` are R rows of `words` words.
    template <int R, int T>
    static inline __attribute__((always_inline)) void block_sums(const uint32_t* codes, int64_t words, const char* from, __m256 sums[R][T]) {
        const float* x = reinterpret_cast<const float*>(from);
        constexpr int P = R * T <= 4 ? 2 : 1;  // partial sums each: enough chains to hide the latency of an FMA
        __m256i code[R];
        for (int r = 0; r < R; r++) code[r] = load_block<BITS>(codes + r * words);
        __m256 part[P][R][T];
        for (auto& set : part)
            for (auto& row : set)
                for (auto& t : row) t = _mm256_setzero_ps();
#pragma GCC unroll 16
        for (int s = 0; s < L::PER_LANE; s++) {
            if (s == L::HALF)
                for (auto& c : code) c = _mm256_srli_epi32(c, 16);
            const __m256i mask = _mm256_set1_epi32(((1 << BITS) - 1) << (BITS * (s % L::HALF)));
            __m256 xs[T];
            for (int t = 0; t < T; t++) xs[t] = _mm256_loadu_ps(x + (t * L::PER_LANE + s) * 8);
            for (int r = 0; r < R; r++) {
                const __m256 q = _mm256_cvtepi32_ps(_mm256_and_si256(code[r], mask));
                for (int t = 0; t < T; t++) part[s % P][r][t] = _mm256_fmadd_ps(q, xs[t], part[s % P][r][t]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) sums[r][t] = P == 1 ? part[0][r][t] : _mm256_add_ps(part[0][r][t], part[P - 1][r][t]);
    }
};

}  // namespace

Gemv exact(int bits) {
    return bits == 2 ? functions<Exact<2>>() : bits == 3 ? functions<Exact<3>>() : bits == 4 ? functions<Exact<4>>() : functions<Exact<8>>();
}

}  // namespace avx2
}  // namespace lrec
LREC_AVX2_END
#endif
