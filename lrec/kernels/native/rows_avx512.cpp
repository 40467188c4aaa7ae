// Rows of codes in AVX-512: sixteen weights at a time; one bit a weight is a mask, four bits one vpermps.
#include "rows.h"
#include "target.h"

#ifdef LREC_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds these in its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
LREC_AVX512_BEGIN
namespace lrec {
namespace {

#include "vector_avx512.h"

// Fields of `bits` bits of one word in the lower eight lanes and of another in the upper ones.
inline __m512i split(uint32_t lower, uint32_t upper, int bits) {
    const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(int32_t(lower)), 0xff00, int32_t(upper));
    const __m512i field = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_srlv_epi32(words, _mm512_mullo_epi32(field, _mm512_set1_epi32(bits)));
}

inline __m512 scaled(__m512 levels, float scale, float shift) {
    return _mm512_mul_ps(_mm512_add_ps(levels, _mm512_set1_ps(shift)), _mm512_set1_ps(scale));
}

template <int BITS>
struct Levels;

template <>
struct Levels<1> {
    __m512 low, high;
    Levels(const float* l, float scale, float shift)
        : low(_mm512_set1_ps((l[0] + shift) * scale)), high(_mm512_set1_ps((l[1] + shift) * scale)) {}
    inline Vector at(const uint32_t* words, int i) const { return {_mm512_mask_blend_ps(__mmask16(*words >> (16 * i)), low, high)}; }
};

template <>
struct Levels<2> {
    __m512 levels;
    Levels(const float* l, float scale, float shift) : levels(scaled(_mm512_broadcast_f32x4(_mm_loadu_ps(l)), scale, shift)) {}
    inline Vector at(const uint32_t* words, int i) const {
        const __m512i fields = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        return {_mm512_permutevar_ps(levels, _mm512_srlv_epi32(_mm512_set1_epi32(int32_t(words[i])), fields))};
    }
};

template <>
struct Levels<3> {
    __m512 levels;  // the eight twice: vpermps reads four bits, of which the uppermost is the next code's
    Levels(const float* l, float scale, float shift) {
        const __m512 eight = _mm512_castps256_ps512(_mm256_loadu_ps(l));
        levels = scaled(_mm512_shuffle_f32x4(eight, eight, 0x44), scale, shift);
    }
    inline Vector at(const uint32_t* words, int i) const {
        uint32_t lower, upper;  // three bytes each, read as four that lie within the run
        std::memcpy(&lower, reinterpret_cast<const char*>(words) + 6 * i, sizeof lower);
        std::memcpy(&upper, reinterpret_cast<const char*>(words) + 6 * i + 2, sizeof upper);
        return {_mm512_permutexvar_ps(split(lower, upper >> 8, 3), levels)};
    }
};

template <>
struct Levels<4> {
    __m512 levels;
    Levels(const float* l, float scale, float shift) : levels(scaled(_mm512_loadu_ps(l), scale, shift)) {}
    inline Vector at(const uint32_t* words, int i) const {
        return {_mm512_permutexvar_ps(split(words[2 * i], words[2 * i + 1], 4), levels)};
    }
};

template <>
struct Levels<8> {
    float scale, shift;
    Levels(const float*, float scale, float shift) : scale(scale), shift(shift) {}
    inline Vector at(const uint32_t* words, int i) const {
        const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 4 * i)));
        return {scaled(_mm512_cvtepi32_ps(codes), scale, shift)};
    }
};

#include "rows_vector.h"

}  // namespace

extern const Machine AVX512 = {floats, decode, product, dense};

}  // namespace lrec
LREC_AVX512_END
#endif
