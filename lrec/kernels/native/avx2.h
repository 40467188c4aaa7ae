// What the AVX2 files of the uniform format share.
#pragma once
#include <cstring>

#include "target.h"
#include "uniform.h"

#ifdef LREC_X86
LREC_AVX2_BEGIN
namespace lrec {
namespace avx2 {
namespace {

// n floats of a grid from the `start`th on; float16, the usual case, eight at a time.
[[maybe_unused]] void load_grid_floats(const LrecFloats& f, int64_t start, int64_t n, float* out) {
    int64_t i = 0;
    if (f.kind == LREC_HALF)
        for (const uint16_t* half = static_cast<const uint16_t*>(f.data) + start; i + 8 <= n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
    load_floats(f, start + i, n - i, out + i);
}

// Codes 8 j .. 8 j + 7 of a run of 32, j = 0 .. 3; reads nothing outside the run's BITS words.
template <int BITS>
[[maybe_unused]] inline __m256i eight_codes(const uint32_t* run, int j) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(run);
    if constexpr (BITS == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * j)));
    const int bit = 8 * BITS * j, from = BITS == 3 ? bit / 8 - (j & 1) : bit / 32 * 4;  // 3 bits: four bytes that hold the three
    uint32_t word;
    std::memcpy(&word, bytes + from, sizeof word);
    const __m256i fields = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS);
    const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(int32_t(word >> (bit - 8 * from))), fields);
    return _mm256_and_si256(shifted, _mm256_set1_epi32((1 << BITS) - 1));
}

[[maybe_unused]] inline void transpose(__m256 v[8]) {
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
    const uint32_t* run = static_cast<const uint32_t*>(w.zero.data) + first / 32 * BITS;
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
    for (int64_t r = 0; r < rows; r++) load_grid_floats(w.scale, (first + r) * G, G, scale + r * stride);
    if (w.zero.kind == LREC_CODES) {
        if (w.bits == 2) load_codes<2>(w, first, stride, zero);
        else if (w.bits == 3) load_codes<3>(w, first, stride, zero);
        else if (w.bits == 4) load_codes<4>(w, first, stride, zero);
        else load_codes<8>(w, first, stride, zero);
        return;
    }
    for (int64_t r = 0; r < rows; r++) {
        if (w.zero.kind != LREC_NONE) load_grid_floats(w.zero, (first + r) * G, G, zero + r * stride);
        else
            for (int64_t g = 0; g < G; g++) zero[r * stride + g] = float(1 << (w.bits - 1));
    }
}

}  // namespace
}  // namespace avx2
}  // namespace lrec
LREC_AVX2_END
#endif
