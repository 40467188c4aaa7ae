// Uniform 2- and 4-bit weights times activations rounded to int8, in AVX2: thirty-two products an instruction.
//
// Field s of every byte is cut out by a shift and an AND and multiplied by the signed bytes of x laid out to match
// (vpmaddubsw). Sums of at most 8 products of 3 * 127, or 4 of 15 * 127, stay below 2^15, so nothing saturates before
// they are widened. Each block of x, the columns of one load, has a step of its own: x ~ step * round(x / step).
#include "avx2.h"

#ifdef LREC_X86
LREC_AVX2_BEGIN
namespace lrec {
namespace avx2 {
namespace {

#include "vector_avx2.h"

#include "gemv.h"

template <int BITS_>
struct Int8 {
    static constexpr int BITS = BITS_;
    static constexpr int FIELDS = 8 / BITS;
    using L = Layout<BITS>;
    static constexpr int64_t BYTES = L::BLOCK + 32;  // the rounded values, field by field, and the step eight times

    // Rows of W at once: at 2 bits one alone is fastest, being read in one stream (Zen 4, 2025-11).
    static constexpr int rows(int T) { return T > 2 ? 2 : BITS == 2 ? 1 : 4; }

    static inline void prepare_block(const float* from, char* to, float* sums) {
        const float step = int8_step(from, L::BLOCK);
        const __m256 inverse = _mm256_set1_ps(int8_inverse(step));
        alignas(32) int32_t pieces[L::BLOCK / 4];  // 4 or 8 bytes of one field, FIELDS of them from every 16 columns
        int32_t lane_sums[L::BLOCK / 4];
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the interleaving of the two packs
        const __m256i split = BITS == 2 ? _mm256_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0,
                                                          15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0)
                                        : _mm256_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0,
                                                          15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
        for (int i = 0; i < L::BLOCK; i += 32) {
            __m256i q[4];
            for (int j = 0; j < 4; j++) q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i + 8 * j), inverse));
            const __m256i bytes = _mm256_permutevar8x32_epi32(
                _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])), order);
            const __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane_sums + i / 4), sum);
            _mm256_store_si256(reinterpret_cast<__m256i*>(pieces + i / 4), _mm256_shuffle_epi8(bytes, split));
        }
        constexpr int WORDS = 4 / FIELDS;  // of one piece
        int32_t* out = reinterpret_cast<int32_t*>(to);
        for (int s = 0; s < FIELDS; s++)
            for (int i = 0; i < L::BLOCK / 16; i++)
                for (int j = 0; j < WORDS; j++) out[s * 8 + i * WORDS + j] = pieces[i * 4 + s * WORDS + j];
        _mm256_storeu_ps(reinterpret_cast<float*>(to + L::BLOCK), _mm256_set1_ps(step));
        for (int lane = 0; lane < 8; lane++) {
            int32_t sum = 0;
            for (int i = 0; i < L::PER_LANE / 4; i++) sum += lane_sums[lane * (L::PER_LANE / 4) + i];
            sums[lane] = step * float(sum);
        }
    }

    template <int R, int T>
    static inline __attribute__((always_inline)) void block_sums(const uint32_t* codes, int64_t words, const char* x, Vector sums[R][T]) {
        const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1), one = _mm256_set1_epi16(1);
        __m256i sum[R][T];
        for (int r = 0; r < R; r++) {
            const __m256i code = load_block<BITS>(codes + r * words).v;
#pragma GCC unroll 4
            for (int s = 0; s < FIELDS; s++) {
                const __m256i field = _mm256_and_si256(s == 0 ? code : _mm256_srli_epi16(code, BITS * s), mask);
                for (int t = 0; t < T; t++) {
                    const __m256i xs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + t * BYTES + 32 * s));
                    const __m256i product = _mm256_maddubs_epi16(field, xs);
                    sum[r][t] = s == 0 ? product : _mm256_add_epi16(sum[r][t], product);
                }
            }
            for (int t = 0; t < T; t++) {
                const __m256 step = _mm256_loadu_ps(reinterpret_cast<const float*>(x + t * BYTES + L::BLOCK));
                sums[r][t].v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(sum[r][t], one)), step);
            }
        }
    }
};

}  // namespace

Gemv int8(int bits) { return bits == 2 ? functions<Int8<2>>() : functions<Int8<4>>(); }

}  // namespace avx2
}  // namespace lrec
LREC_AVX2_END
#endif
