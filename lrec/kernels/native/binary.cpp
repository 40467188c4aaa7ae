// Binary weights: the bits of a column's planes are brought together to a code, the sums of signed scales are its levels.
#include "rows.h"

namespace lrec {
namespace {

class Reader {
public:
    Reader(const LrecBinary& w, int64_t)
        : w(w), G(ceil_div(w.K, w.group_size)), words(ceil_div(w.K, 32)), alpha(G * w.planes), offset(G),
          levels(G * LEVELS), codes(words * w.planes) {
        for (uint32_t byte = 0; byte < 256; byte++)
            for (int i = 0; i < 8; i++) spread[byte] |= (byte >> i & 1) << (i * w.planes);
        for (int64_t g = 0; g < G; g++) runs.push_back({std::min(w.K, (g + 1) * w.group_size), levels.data() + g * LEVELS, 1.0f});
    }

    Row row(int64_t n) {
        machine().floats(w.alpha, n * G * w.planes, G * w.planes, alpha.data());
        machine().floats(w.offset, n * G, G, offset.data());
        for (int64_t g = 0; g < G; g++) {
            float* level = levels.data() + g * LEVELS;
            level[0] = offset[g];
            for (int64_t p = 0; p < w.planes; p++) {
                const float a = alpha[g * w.planes + p];
                for (int64_t c = 0; c < 1 << p; c++) level[c | 1 << p] = level[c] + a, level[c] -= a;
            }
        }
        const uint32_t* planes = w.qweight + n * w.planes * words;
        prefetch_ahead(planes, 4 * w.planes * words);
        if (w.planes == 2) interleave<2>(reinterpret_cast<const uint8_t*>(planes));
        else if (w.planes == 3) interleave<3>(reinterpret_cast<const uint8_t*>(planes));
        else if (w.planes == 4) interleave<4>(reinterpret_cast<const uint8_t*>(planes));
        return {w.planes > 1 ? codes.data() : planes, runs.data(), w.K, int(w.planes)};
    }

private:
    static constexpr int64_t LEVELS = 16;

    // Eight columns a step: one byte of each plane becomes as many bytes of codes.
    template <int PLANES>
    void interleave(const uint8_t* planes) {
        const int64_t bytes = words * 4;
        uint8_t* out = reinterpret_cast<uint8_t*>(codes.data());
        for (int64_t i = 0; i < bytes; i++, out += PLANES) {
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
