// Outlier weights: a row is taken as if it had none, then the stream of gaps says which weights to look up again. To
// decode, those are written over; in a product, what each gave is taken back and what it gives is added.
#include <cstdint>

#include "rows.h"

namespace lrec {
namespace {

// Follows the walk through the flattened weight, symbol by symbol.
class Walk {
public:
    Walk(const LrecOutlier& w, int64_t row)
        : w(w), bits(int(w.index_bits)), jump((1 << bits) - 1), tiles(ceil_div(w.N * w.K, w.tile)), tile(row * w.K / w.tile),
          symbol(w.starts[tile]), gaps(jump + 1), steps(jump + 1) {
        for (int64_t value = 0; value <= jump; value++) {
            gaps[value] = value < jump ? value + 1 : value;
            steps[value] = gaps[value] * w.stride % w.K;
        }
        go_to(tile * w.tile - 1);
        do next();
        while (place < row * w.K);
    }

    // Writes the columns of row n's outliers, at most K, and returns how many; rows come in order.
    int64_t columns_of(int64_t n, int32_t* columns) {
        int64_t count = 0;
        for (const int64_t end = (n + 1) * w.K; place < end; next()) {
            columns[count] = int32_t(column);
            count += found;
            count = run_to(end, columns, count);
        }
        return count;
    }

private:
    // The next symbol, of this tile or a later one.
    void next() {
        found = false;
        while (symbol == w.starts[tile + 1]) {
            if (tile + 1 == tiles) {
                place = INT64_MAX;
                return;
            }
            go_to(++tile * w.tile - 1);
        }
        const int64_t value = code_at(w.index, symbol++, bits);
        found = value < jump;
        place += gaps[value];
        column = moved(column, steps[value]);
        if (place >= row_end) go_to(place);
    }

    // As `next`, many at a time, as long as they surely stay in the row and eight bytes in the tile: no branch depends on them.
    int64_t run_to(int64_t end, int32_t* columns, int64_t count) {
        constexpr int MANY = 8, IN_EIGHT_BYTES = 16;  // at most 16 symbols of 4 bits are; 8 of 7 bits wherever they begin
        const int64_t last = w.starts[tile + 1] - IN_EIGHT_BYTES, safe = end - MANY * jump;
        int64_t at = place, to = column, from = symbol;
        for (; from <= last && at < safe; from += MANY) {
            uint64_t symbols;
            std::memcpy(&symbols, reinterpret_cast<const char*>(w.index) + from * bits / 8, sizeof symbols);
            symbols >>= from * bits % 8;
#pragma GCC unroll 8
            for (int i = 0; i < MANY; i++, symbols >>= bits) {
                const int64_t value = symbols & jump;
                at += gaps[value];
                to = moved(to, steps[value]);
                columns[count] = int32_t(to);
                count += value < jump;
            }
        }
        place = at, column = to, symbol = from;
        return count;
    }

    // Column k and `step` more, round the end of the row. Both candidates are made at once: what comes next waits for this.
    int64_t moved(int64_t k, int64_t step) const {
        const int64_t on = k + step, back = k + (step - w.K);
        return back < 0 ? on : back;
    }

    void go_to(int64_t new_place) {
        place = new_place;
        const int64_t row = place < 0 ? -1 : place / w.K;  // before the first row one step leads to column 0 too
        row_end = (row + 1) * w.K;
        column = (place - row * w.K) * w.stride % w.K;
    }

    const LrecOutlier& w;
    const int bits;
    const int64_t jump, tiles;
    int64_t place, column;  // where the walk has come to, in all and in its row; at the end INT64_MAX
    int64_t tile, symbol, row_end;
    bool found = false;                // whether an outlier is here that has not been told
    std::vector<int64_t> gaps, steps;  // by symbol: places on in the walk, and columns
};

template <int BITS>
inline uint32_t code_in_word(const uint32_t* words, int64_t k) {
    if constexpr (BITS == 3) return code_at(words, k, BITS);
    constexpr int PER_WORD = 32 / BITS;
    return words[k / PER_WORD] >> (k % PER_WORD * BITS) & ((1u << BITS) - 1);
}

class Reader {
public:
    Reader(const LrecOutlier& w, int64_t from)
        : w(w), walk(w, from), L(int64_t(1) << w.bits), words(ceil_div(w.K, 32) * w.bits), levels(2 * L), columns(w.K + 1) {}

    // Rows are asked for in order; each has to be before it is decoded or multiplied.
    void go_to(int64_t n) {
        codes = w.qweight + n * words;
        prefetch_ahead(codes, 4 * words);
        load_levels(n);
        count = walk.columns_of(n, columns.data());
    }

    void decode(float* out) const {
        inliers([&](const Row& row) { machine().decode(row, out); });
        for (int64_t i = 0; i < count; i++) out[columns[i]] = levels[L + code_at(codes, columns[i], int(w.bits))];
    }

    // y[t * ldy] for the rows t of x; x_KT is the same x, its rows side by side.
    void multiply(const Inputs& in, const float* x_KT, float* y, int64_t ldy) const {
        inliers([&](const Row& row) { machine().product(row, in, y, ldy); });
        if (w.bits == 2) add_inputs<2>(in.T, x_KT, y, ldy);
        else if (w.bits == 3) add_inputs<3>(in.T, x_KT, y, ldy);
        else add_inputs<4>(in.T, x_KT, y, ldy);
    }

private:
    template <class Use>
    void inliers(const Use& use) const {
        const Run run = {w.K, levels.data(), 1.0f};
        use(Row{codes, &run, w.K, int(w.bits)});
    }

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

    template <int BITS>
    void add_inputs(int64_t T, const float* x_KT, float* y, int64_t ldy) const {
        if (T == 1) add<BITS, 1>(x_KT, y, ldy);
        else if (T == 2) add<BITS, 2>(x_KT, y, ldy);
        else if (T == 4) add<BITS, 4>(x_KT, y, ldy);
        else add<BITS, 8>(x_KT, y, ldy);
    }

    template <int BITS, int T>
    void add(const float* x_KT, float* y, int64_t ldy) const {
        float taken[T] = {}, given[T] = {};  // apart, so that a single x gives the outlier bit for bit
        for (int64_t i = 0; i < count; i++) {
            const float* level = levels.data() + code_in_word<BITS>(codes, columns[i]);
            for (int t = 0; t < T; t++) {
                const float x = x_KT[int64_t(columns[i]) * T + t];
                taken[t] += level[0] * x;
                given[t] += level[int64_t(1) << BITS] * x;
            }
        }
        for (int t = 0; t < T; t++) y[t * ldy] = (y[t * ldy] - taken[t]) + given[t];
    }

    const LrecOutlier& w;
    Walk walk;
    const int64_t L, words;
    std::vector<float> levels;     // of inliers, then of outliers
    std::vector<int32_t> columns;  // where the row's outliers are
    const uint32_t* codes = nullptr;
    int64_t count = 0;
};

// The rows of x in the parts of `share_inputs`, those of a part side by side: x_KT of the part from row t on is at t * K.
std::vector<float> side_by_side(const std::vector<float>& x, int64_t K, int64_t T) {
    std::vector<float> found(T * K);
    share_inputs(x, K, T, [&](const Inputs& in, int64_t first) {
        for (int64_t k = 0; k < K; k++)
            for (int64_t t = 0; t < in.T; t++) found[first * K + k * in.T + t] = in.x[t * in.ldx + k];
    });
    return found;
}

}  // namespace
}  // namespace lrec

using namespace lrec;

extern "C" void lrec_outlier_decode(const LrecOutlier* w, int64_t first, int64_t last, float* out, int32_t threads) {
    share_rows(first, last, threads, [&](int64_t from, int64_t to) {
        Reader reader(*w, from);
        for (int64_t n = from; n < to; n++) {
            reader.go_to(n);
            reader.decode(out + (n - first) * w->K);
        }
    });
}

extern "C" void lrec_outlier_gemv(const LrecOutlier* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
    const std::vector<float> copy = padded(T, w->K, [&](int64_t t, int64_t k) { return x[t * ldx + k]; });
    const std::vector<float> x_KT = side_by_side(copy, w->K, T);
    share_rows(0, w->N, threads, [&](int64_t from, int64_t to) {
        Reader reader(*w, from);
        for (int64_t n = from; n < to; n++) {
            reader.go_to(n);
            share_inputs(copy, w->K, T, [&](const Inputs& in, int64_t t) { reader.multiply(in, x_KT.data() + t * w->K, y + t * ldy + n, ldy); });
        }
    });
}
