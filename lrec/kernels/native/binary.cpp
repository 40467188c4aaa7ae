// Binary weights: the bits of a column's planes are brought together to a code, the sums of signed scales are its levels.
#include "rows.h"
#include "target.h"

namespace lrec {
namespace {

// How half bytes of planes become bytes of codes, as tables of byte shuffles.
struct Shuffles {
    alignas(16) uint8_t spread[4][4][2][16] = {};  // plane, byte of codes, half: what a half byte adds to that byte
    alignas(16) uint8_t order[4][4][16];           // output, byte of codes: which of sixteen comes where, above 127 none

    explicit Shuffles(int planes) {
        for (int plane = 0; plane < planes; plane++)
            for (int column = 0; column < 8; column++)
                for (int value = 0; value < 16; value++) {
                    const int bit = column * planes + plane;
                    spread[plane][bit / 8][column / 4][value] |= (value >> column % 4 & 1) << bit % 8;
                }
        for (int output = 0; output < planes; output++)
            for (int byte = 0; byte < planes; byte++)
                for (int i = 0; i < 16; i++) {
                    const int place = 16 * output + i;
                    order[output][byte][i] = uint8_t(place % planes == byte ? place / planes : 255);
                }
    }
};

}  // namespace
}  // namespace lrec

#ifdef LREC_X86
LREC_AVX2_BEGIN
namespace lrec {
namespace {

// 128 columns a step; returns how many of a plane's bytes it took.
template <int PLANES>
int64_t interleave_vectors(const Shuffles& by, const uint8_t* planes, int64_t bytes, uint8_t* out) {
    const auto table = [](const uint8_t* from) { return _mm_load_si128(reinterpret_cast<const __m128i*>(from)); };
    const __m128i low = _mm_set1_epi8(15);
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16, out += 16 * PLANES) {
        __m128i made[PLANES] = {};
#pragma GCC unroll 4
        for (int p = 0; p < PLANES; p++) {
            const __m128i plane = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes + p * bytes + i));
            const __m128i half[2] = {_mm_and_si128(plane, low), _mm_and_si128(_mm_srli_epi16(plane, 4), low)};
#pragma GCC unroll 4
            for (int j = 0; j < PLANES; j++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++)
                    if (8 * j < 4 * PLANES * (h + 1) && 8 * (j + 1) > 4 * PLANES * h)
                        made[j] = _mm_or_si128(made[j], _mm_shuffle_epi8(table(by.spread[p][j][h]), half[h]));
        }
#pragma GCC unroll 4
        for (int o = 0; o < PLANES; o++) {
            __m128i codes = _mm_setzero_si128();
#pragma GCC unroll 4
            for (int j = 0; j < PLANES; j++) codes = _mm_or_si128(codes, _mm_shuffle_epi8(made[j], table(by.order[o][j])));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * o), codes);
        }
    }
    return i;
}

}  // namespace
}  // namespace lrec
LREC_AVX2_END
#endif

namespace lrec {
namespace {

class Reader {
public:
    Reader(const LrecBinary& w, int64_t)
        : w(w), G(ceil_div(w.K, w.group_size)), words(ceil_div(w.K, 32)), alpha(G * w.planes), offset(G),
          levels(G * LEVELS), codes(words * w.planes), shuffles(int(w.planes)) {
        for (uint32_t byte = 0; byte < 256; byte++)
            for (int i = 0; i < 8; i++) spread[byte] |= (byte >> i & 1) << (i * w.planes);
        for (int p = 0; p < 4; p++)
            for (int c = 0; c < LEVELS; c++) signs[p][c] = c >> p & 1 ? 1.0f : -1.0f;
        for (int64_t g = 0; g < G; g++) runs.push_back({std::min(w.K, (g + 1) * w.group_size), levels.data() + g * LEVELS, 1.0f});
    }

    Row row(int64_t n) {
        machine().floats(w.alpha, n * G * w.planes, G * w.planes, alpha.data());
        machine().floats(w.offset, n * G, G, offset.data());
        const uint32_t* planes = w.qweight + n * w.planes * words;
        prefetch_ahead(planes, 4 * w.planes * words);
        if (w.planes == 1) load_levels<1>();
        else if (w.planes == 2) load<2>(planes);
        else if (w.planes == 3) load<3>(planes);
        else load<4>(planes);
        return {w.planes > 1 ? codes.data() : planes, runs.data(), w.K, int(w.planes)};
    }

private:
    static constexpr int LEVELS = 16;
    template <int PLANES>
    static constexpr int COUNT = PLANES == 1 ? 4 : 1 << PLANES;  // of which 2 count for one plane

    template <int PLANES>
    void load(const uint32_t* planes) {
        load_levels<PLANES>();
        interleave<PLANES>(reinterpret_cast<const uint8_t*>(planes));
    }

    // Of all groups, all levels of one side by side.
    template <int PLANES>
    void load_levels() {
        for (int64_t g = 0; g < G; g++) {
            float sum[COUNT<PLANES>];
            for (float& s : sum) s = offset[g];
            for (int p = 0; p < PLANES; p++)
                for (int c = 0; c < COUNT<PLANES>; c++) sum[c] += alpha[g * PLANES + p] * signs[p][c];
            for (int c = 0; c < COUNT<PLANES>; c++) levels[g * LEVELS + c] = sum[c];
        }
    }

    // One byte of each plane, eight columns, becomes as many bytes of codes.
    template <int PLANES>
    void interleave(const uint8_t* planes) {
        const int64_t bytes = words * 4;
        uint8_t* out = reinterpret_cast<uint8_t*>(codes.data());
        int64_t i = 0;
#ifdef LREC_X86
        if (cpu() != Cpu::PORTABLE) i = interleave_vectors<PLANES>(shuffles, planes, bytes, out);
#endif
        for (out += i * PLANES; i < bytes; i++, out += PLANES) {
            uint32_t code = 0;
            for (int p = 0; p < PLANES; p++) code |= spread[planes[p * bytes + i]] << p;
            std::memcpy(out, &code, PLANES);
        }
    }

    const LrecBinary& w;
    const int64_t G, words;
    std::vector<float> alpha, offset, levels;
    std::vector<uint32_t> codes;
    std::vector<Run> runs;
    const Shuffles shuffles;
    float signs[4][LEVELS];     // of plane p in code c
    uint32_t spread[256] = {};  // bit i of a byte moved to bit i * planes
};

}  // namespace
}  // namespace lrec

extern "C" void lrec_binary_decode(const LrecBinary* w, int64_t first, int64_t last, float* out, int32_t threads) {
    lrec::decode_rows<lrec::Reader>(*w, first, last, out, threads);
}

extern "C" void lrec_binary_gemv(const LrecBinary* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
    lrec::multiply_rows<lrec::Reader>(*w, x, T, ldx, y, ldy, threads);
}
