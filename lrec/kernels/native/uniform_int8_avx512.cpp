// The product of uniform_int8.cpp in AVX-512 with VNNI: sixty-four products an instruction, summed in 32 bits.
#include "avx2.h"

#ifdef LREC_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds these in its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
LREC_TARGET_BEGIN("avx512f,avx512bw,avx512vnni,avx2,fma,f16c")
namespace lrec {
namespace avx512 {
namespace {

#include "vector_avx512.h"

#include "gemv.h"

template <int BITS_>
struct Int8 {
    static constexpr int BITS = BITS_;
    static constexpr int FIELDS = 8 / BITS;
    using L = Layout<BITS>;
    static constexpr int64_t BYTES = L::BLOCK + 64;  // the rounded values, field by field, and the lanes' steps
    static constexpr int HALF = L::BLOCK / 2;        // columns that share a step

    static constexpr int rows(int T) { return T > 2 ? 2 : BITS == 2 ? 1 : 4; }

    static inline void prepare_block(const float* from, char* to, float* sums) {
        alignas(64) int8_t rounded[L::BLOCK];
        float* steps = reinterpret_cast<float*>(to + L::BLOCK);
        for (int i = 0; i < L::BLOCK; i += 16) {
            if (i % HALF == 0)
                for (int lane = 0; lane < 8; lane++) steps[i / HALF * 8 + lane] = lane ? steps[i / HALF * 8] : int8_step(from + i, HALF);
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(int8_inverse(steps[i / HALF * 8])));
            _mm_store_si128(reinterpret_cast<__m128i*>(rounded + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(scaled)));
        }
        for (int byte = 0; byte < 64; byte++)
            for (int s = 0; s < FIELDS; s++) to[s * 64 + byte] = char(rounded[byte * FIELDS + s]);
        for (int lane = 0; lane < LANES; lane++) {
            int32_t sum = 0;
            for (int i = 0; i < L::PER_LANE; i++) sum += rounded[lane * L::PER_LANE + i];
            sums[lane] = steps[lane] * float(sum);
        }
    }

    template <int R, int T>
    static inline __attribute__((always_inline)) void block_sums(const uint32_t* codes, int64_t words, const char* x, Vector sums[R][T]) {
        const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
        __m512i sum[R][T];
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_si512();
        __m512i code[R];
        for (int r = 0; r < R; r++) code[r] = load_block<BITS>(codes + r * words).v;
#pragma GCC unroll 4
        for (int s = 0; s < FIELDS; s++)
            for (int r = 0; r < R; r++) {
                const __m512i field = _mm512_and_si512(s == 0 ? code[r] : _mm512_srli_epi16(code[r], unsigned(BITS * s)), mask);
                for (int t = 0; t < T; t++) sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], field, _mm512_loadu_si512(x + t * BYTES + 64 * s));
            }
        for (int t = 0; t < T; t++) {
            const __m512 step = _mm512_loadu_ps(x + t * BYTES + L::BLOCK);
            for (int r = 0; r < R; r++) sums[r][t].v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][t]), step);
        }
    }
};

}  // namespace

Gemv int8(int bits) { return bits == 2 ? functions<Int8<2>>() : functions<Int8<4>>(); }

}  // namespace avx512
}  // namespace lrec
LREC_TARGET_END
#endif
