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
          steps(jump + 1) {
        for (int64_t value = 0; value <= jump; value++) steps[value] = (value < jump ? value + 1 : value) * w.stride % w.K;
        go_to(tile * w.tile - 1);
        do next();
        while (place < row * w.K);
    }

    // Where the outlier is, in the walk and in its row; at the end INT64_MAX.
    int64_t place, column;

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
            place += value < jump ? value + 1 : value;
            column += steps[value];
            if (column >= w.K) column -= w.K;
            if (place >= row_end) go_to(place);
            if (value < jump) return;
        }
    }

private:
    void go_to(int64_t new_place) {
        place = new_place;
        const int64_t row = place < 0 ? -1 : place / w.K;  // before the first row one step leads to column 0 too
        row_end = (row + 1) * w.K;
        column = (place - row * w.K) * w.stride % w.K;
    }

    const LrecOutlier& w;
    const int64_t jump, tiles;
    int64_t tile, symbol, row_end;
    std::vector<int64_t> steps;  // columns on, by symbol
};

class Reader {
public:
    Reader(const LrecOutlier& w, int64_t from) : w(w), walk(w, from), L(int64_t(1) << w.bits), words(ceil_div(w.K, 32) * w.bits), levels(2 * L) {}

    void decode(int64_t n, float* out) {
        load_levels(n);
        const Run run = {w.K, levels.data(), 1.0f};
        const Row row = {w.qweight + n * words, &run, w.K, int(w.bits)};
        machine().decode(row, out);
        const float* outlier = levels.data() + L;
        for (; walk.place < (n + 1) * w.K; walk.next()) out[walk.column] = outlier[code_at(row.codes, walk.column, row.bits)];
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
