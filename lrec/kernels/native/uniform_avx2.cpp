// Uniform weights in AVX2.
//
// One 256-bit load takes 8 lanes of consecutive codes: 16 codes a lane at 2 bits, 8 at 3 and 4 bits, 4 at 8 bits. Field s
// of all lanes is cut out by one AND, *where it stands*, and made a float by one conversion, so it arrives multiplied
// by 2^(bits * s); x is laid out once per call in the same order (field by field, 8 lanes each) and divided by that
// power, which is exact. Eight weights so cost an AND, a conversion and an FMA: no shift, no table, and three
// instructions that spread over all four vector ports of a Zen core. A lane never crosses a group, so scale and zero
// enter once per lane and block:
//   y += scale * (sum q x - zero * sum x).
#include "uniform.h"

#ifdef LREC_X86
#include <immintrin.h>

#include <cstring>

// Only what follows may use AVX2: an inline function of the headers above must not be compiled with it, since the linker
// could keep that copy for machines without. For the same reason nothing below uses the standard library's templates.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

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

int per_lane(int bits) { return bits == 2 ? 16 : bits == 8 ? 4 : 8; }

int64_t num_blocks(const LrecUniform& w) { return ceil_div(w.K, 8 * per_lane(w.bits)); }

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

inline float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// x as `prepare` lays it out: for each block and row of x PER_LANE * 8 values, then 8 sums; then the group of each lane.
struct Prepared {
    const float* x;
    const float* sums;
    const int32_t* lanes;  // group of each lane, less the block's first group
    const int32_t* first;  // the block's first group
};

Prepared parts(const LrecUniform& w, const float* prepared, int64_t T) {
    const int64_t blocks = num_blocks(w);
    Prepared p;
    p.x = prepared;
    p.sums = p.x + blocks * T * 8 * per_lane(w.bits);
    p.lanes = reinterpret_cast<const int32_t*>(p.sums + blocks * T * 8);
    p.first = p.lanes + blocks * 8;
    return p;
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

// Scales and zeros of rows n .. n + R - 1, `stride` floats apart.
template <int R>
void load_grid(const LrecUniform& w, int64_t n, int64_t stride, float* scale, float* zero) {
    const int64_t G = num_groups(w);
    for (int r = 0; r < R; r++) {
        load_floats(w.scale, w.scale_kind, (n + r) * G, G, scale + r * stride);
        if (w.zero_kind == LREC_NONE)
            for (int64_t g = 0; g < G; g++) zero[r * stride + g] = float(1 << (w.bits - 1));
        else if (w.zero_kind != LREC_CODES) load_floats(w.zero, w.zero_kind, (n + r) * G, G, zero + r * stride);
    }
    if (w.zero_kind != LREC_CODES) return;
    const int64_t words = ceil_div(w.N, 32) * w.bits;
    const uint32_t* codes = static_cast<const uint32_t*>(w.zero) + (n * w.bits >> 5);
    const int shift = n * w.bits & 31;
    const __m128i fields = _mm_setr_epi32(0, w.bits, 2 * w.bits, 3 * w.bits);
    const __m128i mask = _mm_set1_epi32((1 << w.bits) - 1);
    for (int64_t g = 0; g < G; g++, codes += words) {
        uint64_t pair = codes[0];
        if (shift + R * w.bits > 32) pair |= uint64_t(codes[1]) << 32;
        const __m128i four = _mm_and_si128(_mm_srlv_epi32(_mm_set1_epi32(int32_t(pair >> shift)), fields), mask);
        alignas(16) float value[4];
        _mm_store_ps(value, _mm_cvtepi32_ps(four));
        for (int r = 0; r < R; r++) zero[r * stride + g] = value[r];
    }
}

// Rows n .. n + R - 1 of W against T rows of x.
template <int BITS, int R, int T>
void gemv_block(const LrecUniform& w, const Prepared& p, int64_t n, float* scratch, float* y, int64_t ldy) {
    using L = Layout<BITS>;
    constexpr int P = R * T <= 4 ? 2 : 1;  // partial sums each: enough chains to hide the latency of an FMA
    const int64_t words = row_words(w), blocks = num_blocks(w), stride = num_groups(w) + 8;
    const bool whole = w.group_size % L::BLOCK == 0 || w.group_size >= w.K;
    const int64_t per_group = w.group_size >= w.K ? blocks : w.group_size / L::BLOCK;
    float* scale = scratch;
    float* zero = scratch + R * stride;
    load_grid<R>(w, n, stride, scale, zero);

    __m256 total[R][T];
    for (auto& row : total)
        for (auto& t : row) t = _mm256_setzero_ps();
    const uint32_t* codes = row_codes(w, n);
    const float* x = p.x;
    int64_t group = 0, left = per_group;
    for (int64_t b = 0; b < blocks; b++, x += T * L::BLOCK) {
        __m256i code[R];
        if ((b + 1) * L::WORDS <= words) {
            for (int r = 0; r < R; r++) code[r] = load_block<BITS>(codes + r * words + b * L::WORDS);
        } else {
            uint32_t last[8] = {};
            for (int r = 0; r < R; r++) {
                std::memcpy(last, codes + r * words + b * L::WORDS, (words - b * L::WORDS) * sizeof(uint32_t));
                code[r] = load_block<BITS>(last);
            }
        }
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
        const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.lanes + b * 8));
        for (int r = 0; r < R; r++) {
            __m256 sc, ze;
            if (whole) {
                sc = _mm256_broadcast_ss(scale + r * stride + group);
                ze = _mm256_broadcast_ss(zero + r * stride + group);
            } else {
                sc = _mm256_permutevar8x32_ps(_mm256_loadu_ps(scale + r * stride + p.first[b]), lanes);
                ze = _mm256_permutevar8x32_ps(_mm256_loadu_ps(zero + r * stride + p.first[b]), lanes);
            }
            for (int t = 0; t < T; t++) {
                __m256 sum = part[0][r][t];
                if constexpr (P == 2) sum = _mm256_add_ps(sum, part[1][r][t]);
                sum = _mm256_fnmadd_ps(ze, _mm256_loadu_ps(p.sums + (b * T + t) * 8), sum);
                total[r][t] = _mm256_fmadd_ps(sc, sum, total[r][t]);
            }
        }
        if (whole && --left == 0) group++, left = per_group;
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[t * ldy + n + r] = sum_lanes(total[r][t]);
}

template <int BITS, int T>
void gemv(const LrecUniform& w, const Prepared& p, int64_t first, int64_t last, float* scratch, float* y, int64_t ldy) {
    constexpr int R = T <= 2 ? 4 : 2;
    int64_t n = first;
    for (; n + R <= last; n += R) gemv_block<BITS, R, T>(w, p, n, scratch, y, ldy);
    for (; n < last; n++) gemv_block<BITS, 1, T>(w, p, n, scratch, y, ldy);
}

template <int BITS>
void gemv_any(const LrecUniform& w, const Prepared& p, int64_t T, int64_t first, int64_t last, float* scratch, float* y, int64_t ldy) {
    if (T == 1) gemv<BITS, 1>(w, p, first, last, scratch, y, ldy);
    else if (T == 2) gemv<BITS, 2>(w, p, first, last, scratch, y, ldy);
    else if (T == 3) gemv<BITS, 3>(w, p, first, last, scratch, y, ldy);
    else gemv<BITS, 4>(w, p, first, last, scratch, y, ldy);
}

// Columns first .. first + 15 of one group: q as floats, less the zero, times the scale, in this order as in `unpack`.
template <int BITS>
inline void decode16(const uint32_t* codes, int64_t k, __m256 scale, __m256 zero, float* out) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes) + k / 8 * BITS;
    __m256i q[2];
    if constexpr (BITS == 8) {
        for (int i = 0; i < 2; i++) q[i] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * i)));
    } else {
        const __m256i shifts = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS);
        const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
        for (int i = 0; i < 2; i++) {
            uint32_t eight;  // the 8 codes in its lowest bits; at 3 bits the second load ends with the 16 codes, not after
            std::memcpy(&eight, bytes + (BITS == 4 ? 4 * i : BITS == 3 ? 2 * i : 0), sizeof eight);
            eight >>= i == 0 ? 0 : BITS == 2 ? 16 : BITS == 3 ? 8 : 0;
            q[i] = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(int32_t(eight)), shifts), mask);
        }
    }
    for (int i = 0; i < 2; i++) _mm256_storeu_ps(out + 8 * i, _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(q[i]), zero), scale));
}

template <int BITS>
int64_t decode_whole(const LrecUniform& w, int64_t n, const float* scale, const float* zero, float* out) {
    const uint32_t* codes = row_codes(w, n);
    int64_t k = 0;
    for (int64_t g = 0; k + 16 <= w.K; g++) {
        const __m256 s = _mm256_broadcast_ss(scale + g), z = _mm256_broadcast_ss(zero + g);
        const int64_t end = k + w.group_size < w.K ? k + w.group_size : w.K;
        for (; k + 16 <= end; k += 16) decode16<BITS>(codes, k, s, z, out + k);
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

int64_t prepared_size(const LrecUniform& w, int64_t T) { return num_blocks(w) * (T * 8 * (per_lane(w.bits) + 1) + 9); }

int64_t scratch_size(const LrecUniform& w) { return 2 * 4 * (num_groups(w) + 8); }

void prepare(const LrecUniform& w, const float* x, int64_t T, int64_t ldx, float* prepared) {
    const Prepared p = parts(w, prepared, T);
    const int64_t blocks = num_blocks(w), groups = num_groups(w);
    const int lane_codes = per_lane(w.bits), half = w.bits == 3 ? lane_codes : lane_codes / 2;
    float* to = const_cast<float*>(p.x);
    float* sums = const_cast<float*>(p.sums);
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t t = 0; t < T; t++, to += 8 * lane_codes, sums += 8)
            for (int lane = 0; lane < 8; lane++) {
                double sum = 0;  // it is multiplied by the zero: its rounding would be the largest error of all
                for (int s = 0; s < lane_codes; s++) {
                    const int64_t k = (b * 8 + lane) * lane_codes + s;
                    const float value = k < w.K ? x[t * ldx + k] : 0.0f;
                    sum += value;
                    to[s * 8 + lane] = value / float(1 << (w.bits * (s % half)));
                }
                sums[lane] = float(sum);
            }
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = b * 8 * lane_codes / w.group_size;
        const_cast<int32_t*>(p.first)[b] = int32_t(first);
        for (int lane = 0; lane < 8; lane++) {
            const int64_t group = (b * 8 + lane) * lane_codes / w.group_size;
            const_cast<int32_t*>(p.lanes)[b * 8 + lane] = int32_t((group < groups ? group : groups - 1) - first);
        }
    }
}

void gemv_rows(const LrecUniform& w, const float* prepared, int64_t T, int64_t first, int64_t last, float* scratch, float* y, int64_t ldy) {
    const Prepared p = parts(w, prepared, T);
    if (w.bits == 2) gemv_any<2>(w, p, T, first, last, scratch, y, ldy);
    else if (w.bits == 3) gemv_any<3>(w, p, T, first, last, scratch, y, ldy);
    else if (w.bits == 4) gemv_any<4>(w, p, T, first, last, scratch, y, ldy);
    else gemv_any<8>(w, p, T, first, last, scratch, y, ldy);
}

}  // namespace avx2
}  // namespace lrec

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
