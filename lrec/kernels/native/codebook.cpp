// Codebook weights: a run of columns ends where its table's group or its scale's block does.
#include "rows.h"

namespace lrec {
namespace {

constexpr int64_t SCALES_PER_SCALE = 256;

class Reader {
public:
    Reader(const LrecCodebook& w, int64_t)
        : w(w), L(int64_t(1) << w.bits), scaled(w.scale.kind != LREC_NONE), alike(!scaled || w.K % w.block_size == 0),
          tables((w.group_step ? ceil_div(w.K, w.group_size) : 1) * L) {
        if (w.row_step == 0) machine().floats(w.table, 0, L, tables.data());
        if (alike) cut(0);
    }

    Row row(int64_t n) {
        if (w.row_step != 0) machine().floats(w.table, n * w.row_step, int64_t(tables.size()), tables.data());
        if (!alike) cut(n);
        if (scaled) {
            const int64_t first = n * w.K / w.block_size;
            for (size_t i = 0; i < runs.size(); i++) runs[i].scale = block_scale(first + blocks[i]);
        }
        const int64_t words = ceil_div(w.K, 32) * w.bits;
        prefetch_ahead(w.qweight + n * words, 4 * words);
        return {w.qweight + n * words, runs.data(), w.K, int(w.bits)};
    }

private:
    // The runs of row n, and which block each is of, counted from the row's first.
    void cut(int64_t n) {
        runs.clear();
        blocks.clear();
        int64_t block = 0, block_end = scaled ? w.block_size - n * w.K % w.block_size : w.K;
        int64_t group_end = w.group_step ? w.group_size : w.K;
        const float* table = tables.data();
        for (int64_t last = 0; last < w.K;) {
            last = std::min({w.K, group_end, block_end});
            runs.push_back({last, table, 1.0f});
            blocks.push_back(block);
            if (last == group_end) table += L, group_end += w.group_size;
            if (last == block_end) block++, block_end += w.block_size;
        }
    }

    float block_scale(int64_t b) const {
        if (w.scale.kind != LREC_CODES) return stored_float(w.scale, b);
        const float level = w.levels[static_cast<const uint8_t*>(w.scale.data)[b]];
        return level * stored_float(w.scale_scale, b / SCALES_PER_SCALE) + stored_float(w.scale_offset, 0);
    }

    const LrecCodebook& w;
    const int64_t L;
    const bool scaled, alike;  // whether there are scales, and whether all rows are cut alike
    std::vector<float> tables;  // those of one row
    std::vector<Run> runs;
    std::vector<int64_t> blocks;
};

}  // namespace
}  // namespace lrec

extern "C" void lrec_codebook_decode(const LrecCodebook* w, int64_t first, int64_t last, float* out, int32_t threads) {
    lrec::decode_rows<lrec::Reader>(*w, first, last, out, threads);
}

extern "C" void lrec_codebook_gemv(const LrecCodebook* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
    lrec::multiply_rows<lrec::Reader>(*w, x, T, ldx, y, ldy, threads);
}
