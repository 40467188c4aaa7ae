// Outlier weights: a row is decoded as if it had none, then the stream of gaps says which weights to look up again.
#include <cstdint>

#include "rows.h"

namespace lrec {
namespace {

// Follows the walk through the flattened weight from one outlier to the next.
class Walk {
public:
    Walk(const LrecOutlier& w, int64_t row)
        : w(w), jump((1 << w.index_bits) - 1), tiles(ceil_div(w.N * w.K, w.tile)), tile(row * w.K / w.tile), symbol(w.starts[tile]),
          gaps(jump + 1), steps(jump + 1) {
        for (int64_t value = 0; value <= jump; value++) {
            gaps[value] = value < jump ? value + 1 : value;
            steps[value] = gaps[value] * w.stride % w.K;
        }
        go_to(tile * w.tile - 1);
        do next();
        while (place < row * w.K);
    }

    // visit(column) for each outlier of row n; rows come in order.
    template <class Visit>
    void visit_row(int64_t n, const Visit& visit) {
        const int64_t end = (n + 1) * w.K, K = w.K;
        const int bits = int(w.index_bits);
        while (place < end) {
            // As `next`, within the row and the tile, where all stays in registers.
            const int64_t last = w.starts[tile + 1];
            int64_t at = place, to = column, from = symbol, value = 0;
            visit(to);
            while (at < end && from < last) {
                value = code_at(w.index, from++, bits);
                at += gaps[value];
                to += steps[value];
                to -= to < K ? 0 : K;
                if (value < jump && at < end) visit(to);
            }
            place = at, column = to, symbol = from;
            if (at >= end) go_to(at);
            if (at < end || value == jump) next();
        }
    }

private:
    void next() {
        while (true) {
            while (symbol == w.starts[tile + 1]) {
                if (tile + 1 == tiles) {
                    place = INT64_MAX;
                    return;
                }
                go_to(++tile * w.tile - 1);
            }
            const int64_t value = code_at(w.index, symbol++, int(w.index_bits));
            place += gaps[value];
            column += steps[value];
            if (column >= w.K) column -= w.K;
            if (place >= row_end) go_to(place);
            if (value < jump) return;
        }
    }

    void go_to(int64_t new_place) {
        place = new_place;
        const int64_t row = place < 0 ? -1 : place / w.K;  // before the first row one step leads to column 0 too
        row_end = (row + 1) * w.K;
        column = (place - row * w.K) * w.stride % w.K;
    }

    const LrecOutlier& w;
    const int64_t jump, tiles;
    int64_t place, column;  // where the next outlier is, in the walk and in its row; at the end INT64_MAX
    int64_t tile, symbol, row_end;
    std::vector<int64_t> gaps, steps;  // by symbol: places on in the walk, and columns
};

class Reader {
public:
    Reader(const LrecOutlier& w, int64_t from) : w(w), walk(w, from), L(int64_t(1) << w.bits), words(ceil_div(w.K, 32) * w.bits), levels(2 * L) {}

    void decode(int64_t n, float* out) {
        load_levels(n);
        const Run run = {w.K, levels.data(), 1.0f};
        const Row row = {w.qweight + n * words, &run, w.K, int(w.bits)};
        prefetch_ahead(row.codes, 4 * words);
        machine().decode(row, out);
        const float* outlier = levels.data() + L;
        walk.visit_row(n, [&](int64_t column) { out[column] = outlier[code_at(row.codes, column, row.bits)]; });
    }

private:
    void load_levels(int64_t n) {
        if (w.table.kind != LREC_NONE) return machine().floats(w.table, n * 2 * L, 2 * L, levels.data());
        float scale[2], base[2];
        machine().floats(w.scale, n * 2, 2, scale);
        machine().floats(w.base, n * 2, 2, base);
        for (int64_t q = 0; q < L; q++) {
            const float tail = base[1] + scale[1] * float(q % (L / 2));
            levels[q] = base[0] + scale[0] * float(q);
            levels[L + q] = q < L / 2 ? -tail : tail;
        }
    }

    const LrecOutlier& w;
    Walk walk;
    const int64_t L, words;
    std::vector<float> levels;  // of inliers, then of outliers
};

}  // namespace
}  // namespace lrec

using namespace lrec;

extern "C" void lrec_outlier_decode(const LrecOutlier* w, int64_t first, int64_t last, float* out, int32_t threads) {
    share_rows(first, last, threads, [&](int64_t from, int64_t to) {
        Reader reader(*w, from);
        for (int64_t n = from; n < to; n++) reader.decode(n, out + (n - first) * w->K);
    });
}

extern "C" void lrec_outlier_gemv(const LrecOutlier* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
    const std::vector<float> copy = padded(T, w->K, [&](int64_t t, int64_t k) { return x[t * ldx + k]; });
    share_rows(0, w->N, threads, [&](int64_t from, int64_t to) {
        Reader reader(*w, from);
        std::vector<float> row(round_up(w->K, PAD));
        for (int64_t n = from; n < to; n++) {
            reader.decode(n, row.data());
            share_inputs(copy, w->K, T, [&](const Inputs& in, int64_t t) { machine().dense(row.data(), w->K, in, y + t * ldy + n, ldy); });
        }
    });
}
