// What the AVX2 files share. LREC_AVX2_BEGIN .. LREC_AVX2_END encloses code that may use AVX2; standard headers stand
// before it, since the linker could keep an inline function compiled with AVX2 for machines without. For the same reason
// nothing between the two uses the standard library's templates.
#pragma once
#include "uniform.h"

#ifdef LREC_X86
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#define LREC_AVX2_BEGIN _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define LREC_AVX2_END _Pragma("clang attribute pop")
#else
#define LREC_AVX2_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define LREC_AVX2_END _Pragma("GCC pop_options")
#endif

LREC_AVX2_BEGIN
namespace lrec {
namespace avx2 {
namespace {

// How `BITS`-bit codes stand in one load: PER_LANE codes in each of 8 lanes, BLOCK in all. Fields at and above HALF are
// reached after one shift by 16, which keeps the sign bit clear and the powers of two small.
template <int BITS>
struct Layout {
    static constexpr int PER_LANE = BITS == 2 ? 16 : BITS == 8 ? 4 : 8;
    static constexpr int BLOCK = 8 * PER_LANE;
    static constexpr int WORDS = BLOCK * BITS / 32;
    static constexpr int HALF = BITS == 3 ? PER_LANE : PER_LANE / 2;
};

// One block of codes; for 3 bits each lane gets the 3 bytes of its 8 codes (and a byte too many, which no mask reads).
template <int BITS>
inline __m256i load_block(const uint32_t* p) {
    if constexpr (BITS != 3) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                            4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    // Words 0..3 hold the lower half, words 2..5 the upper half in their last 12 bytes: nothing is read beyond the block.
    const __m256i words = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                                                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2)), 1);
    return _mm256_shuffle_epi8(words, spread);
}

[[maybe_unused]] inline float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// n floats of a grid stored as half or float; writes up to 7 more.
void load_floats(const void* data, int32_t kind, int64_t start, int64_t n, float* out) {
    if (kind == LREC_FLOAT) {
        std::memcpy(out, static_cast<const float*>(data) + start, n * sizeof(float));
        return;
    }
    const uint16_t* half = static_cast<const uint16_t*>(data) + start;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
    for (; i < n; i++) out[i] = _cvtsh_ss(half[i]);
}

// Codes 8 j .. 8 j + 7 of a run of 32, j = 0 .. 3; reads nothing outside the run's BITS words.
template <int BITS>
inline __m256i eight_codes(const uint32_t* run, int j) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(run);
    if constexpr (BITS == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * j)));
    const int bit = 8 * BITS * j, from = BITS == 3 ? bit / 8 - (j & 1) : bit / 32 * 4;  // 3 bits: four bytes that hold the three
    uint32_t word;
    std::memcpy(&word, bytes + from, sizeof word);
    const __m256i fields = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS);
    const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(int32_t(word >> (bit - 8 * from))), fields);
    return _mm256_and_si256(shifted, _mm256_set1_epi32((1 << BITS) - 1));
}

inline void transpose(__m256 v[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

// Zeros packed along N, of rows first .. first + 31 (first a multiple of 32), as floats, a row every `stride`.
template <int BITS>
void load_codes(const LrecUniform& w, int64_t first, int64_t stride, float* zero) {
    const int64_t G = num_groups(w), words = ceil_div(w.N, 32) * BITS;
    const uint32_t* run = static_cast<const uint32_t*>(w.zero) + first / 32 * BITS;
    for (int64_t g = 0; g < G; g += 8)
        for (int j = 0; j < 4; j++) {
            __m256 tile[8];
            for (int i = 0; i < 8; i++) tile[i] = _mm256_cvtepi32_ps(eight_codes<BITS>(run + (g + i < G ? g + i : G - 1) * words, j));
            transpose(tile);
            for (int i = 0; i < 8; i++) _mm256_storeu_ps(zero + (8 * j + i) * stride + g, tile[i]);
        }
}

// Scales and zeros of `rows` <= 32 rows from a multiple of 32 on, as floats, a row every `stride` >= G + 7.
[[maybe_unused]] void load_grid(const LrecUniform& w, int64_t first, int64_t rows, int64_t stride, float* scale, float* zero) {
    const int64_t G = num_groups(w);
    for (int64_t r = 0; r < rows; r++) load_floats(w.scale, w.scale_kind, (first + r) * G, G, scale + r * stride);
    if (w.zero_kind == LREC_CODES) {
        if (w.bits == 2) load_codes<2>(w, first, stride, zero);
        else if (w.bits == 3) load_codes<3>(w, first, stride, zero);
        else if (w.bits == 4) load_codes<4>(w, first, stride, zero);
        else load_codes<8>(w, first, stride, zero);
        return;
    }
    for (int64_t r = 0; r < rows; r++) {
        if (w.zero_kind != LREC_NONE) load_floats(w.zero, w.zero_kind, (first + r) * G, G, zero + r * stride);
        else
            for (int64_t g = 0; g < G; g++) zero[r * stride + g] = float(1 << (w.bits - 1));
    }
}

}  // namespace
}  // namespace avx2
}  // namespace lrec
LREC_AVX2_END
#endif
