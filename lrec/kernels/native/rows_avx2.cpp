// Rows of codes in AVX2: eight weights at a time. Their codes are shifted to the bottom of eight lanes; vpermilps reads
// the lowest two bits of a lane as an index and vpermps the lowest three, whatever stands above, so no mask is needed.
#include "rows.h"
#include "target.h"

#ifdef LREC_X86
LREC_AVX2_BEGIN
namespace lrec {
namespace {

#include "vector_avx2.h"

// Eight lanes with codes 8 i .. 8 i + 7 of a run of 32 at their bottom; reads nothing outside the run's BITS words.
template <int BITS>
inline __m256i codes_at(const uint32_t* words, int i) {
    const int bit = 8 * BITS * i, from = BITS == 3 ? bit / 8 - (i & 1) : bit / 32 * 4;  // 3 bits: four bytes that hold the three
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(words) + from, sizeof word);
    const __m256i fields = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS);
    const __m256i shifts = _mm256_add_epi32(fields, _mm256_set1_epi32(bit - 8 * from));  // known where i is
    return _mm256_srlv_epi32(_mm256_set1_epi32(int32_t(word)), shifts);
}

inline __m256 scaled(__m256 levels, float scale, float shift) {
    return _mm256_mul_ps(_mm256_add_ps(levels, _mm256_set1_ps(shift)), _mm256_set1_ps(scale));
}

template <int BITS>
struct Levels;

template <>
struct Levels<1> {
    __m256 low, high;
    Levels(const float* l, float scale, float shift)
        : low(_mm256_set1_ps((l[0] + shift) * scale)), high(_mm256_set1_ps((l[1] + shift) * scale)) {}
    inline Vector at(const uint32_t* words, int i) const {
        const __m256i top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
        const __m256i signs = _mm256_sllv_epi32(_mm256_set1_epi32(int32_t(*words >> (8 * i))), top);
        return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(signs))};
    }
};

template <>
struct Levels<2> {
    __m256 levels;
    Levels(const float* l, float scale, float shift)
        : levels(scaled(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(l)), scale, shift)) {}
    inline Vector at(const uint32_t* words, int i) const { return {_mm256_permutevar_ps(levels, codes_at<2>(words, i))}; }
};

template <>
struct Levels<3> {
    __m256 levels;
    Levels(const float* l, float scale, float shift) : levels(scaled(_mm256_loadu_ps(l), scale, shift)) {}
    inline Vector at(const uint32_t* words, int i) const { return {_mm256_permutevar8x32_ps(levels, codes_at<3>(words, i))}; }
};

template <>
struct Levels<4> {
    __m256 low, high;
    Levels(const float* l, float scale, float shift)
        : low(scaled(_mm256_loadu_ps(l), scale, shift)), high(scaled(_mm256_loadu_ps(l + 8), scale, shift)) {}
    inline Vector at(const uint32_t* words, int i) const {
        const __m256i codes = codes_at<4>(words, i);
        const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));  // bit 3 as the sign
        return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), top)};
    }
};

template <>
struct Levels<8> {
    float scale, shift;
    Levels(const float*, float scale, float shift) : scale(scale), shift(shift) {}
    inline Vector at(const uint32_t* words, int i) const {
        const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(words + 2 * i)));
        return {scaled(_mm256_cvtepi32_ps(codes), scale, shift)};
    }
};

#include "rows_vector.h"

}  // namespace

extern const Machine AVX2 = {floats, decode, product, dense};

}  // namespace lrec
LREC_AVX2_END
#endif
