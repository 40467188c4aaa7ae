// Ternary weights: each byte of five trits becomes five codes of two bits, whose levels are -1, 0 and 1.
#include "rows.h"

namespace lrec {
namespace {

constexpr int TRITS = 5;
constexpr float LEVELS[4] = {-1.0f, 0.0f, 1.0f, 0.0f};

class Reader {
public:
    Reader(const LrecTernary& w, int64_t)
        : w(w), G(ceil_div(w.K, w.group_size)), bytes(ceil_div(w.K, TRITS)), scale(G), runs(G), codes(ceil_div(w.K, 32) * 2 + 2) {
        for (int byte = 0; byte < 256; byte++)
            for (int i = 0, digits = byte; i < TRITS; i++, digits /= 3) pairs[byte] |= digits % 3 << (2 * i);
        for (int64_t g = 0; g < G; g++) runs[g] = {std::min(w.K, (g + 1) * w.group_size), LEVELS, 0.0f};
    }

    Row row(int64_t n) {
        machine().floats(w.scale, n * G, G, scale.data());
        for (int64_t g = 0; g < G; g++) runs[g].scale = scale[g];
        prefetch_ahead(w.qweight + n * bytes, bytes);
        uint64_t ready = 0;
        int count = 0;
        uint32_t* out = codes.data();
        for (const uint8_t *p = w.qweight + n * bytes, *end = p + bytes; p < end; p++) {
            ready |= uint64_t(pairs[*p]) << count;
            count += 2 * TRITS;
            if (count >= 32) *out++ = uint32_t(ready), ready >>= 32, count -= 32;
        }
        *out = uint32_t(ready);
        return {codes.data(), runs.data(), w.K, 2};
    }

private:
    const LrecTernary& w;
    const int64_t G, bytes;
    std::vector<float> scale;
    std::vector<Run> runs;
    std::vector<uint32_t> codes;
    uint16_t pairs[256] = {};  // digits to base 3, two bits each
};

}  // namespace
}  // namespace lrec

extern "C" void lrec_ternary_decode(const LrecTernary* w, int64_t first, int64_t last, float* out, int32_t threads) {
    lrec::decode_rows<lrec::Reader>(*w, first, last, out, threads);
}

extern "C" void lrec_ternary_gemv(const LrecTernary* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
    lrec::multiply_rows<lrec::Reader>(*w, x, T, ldx, y, ldy, threads);
}
