// Salient weights: two rows of codes, four bits for the salient columns and one bit for the others, side by side.
#include "rows.h"

namespace lrec {
namespace {

constexpr int SALIENT_BITS = 4;

// Where the columns stand: first the K - S of one bit, then the S salient ones.
struct Columns {
    std::vector<int64_t> rest, salient;
    std::vector<float> factor;  // of the former

    explicit Columns(const LrecSalient& w) : factor(w.K - w.num_salient) {
        for (int64_t k = 0; k < w.K; k++) (code_at(w.mask, k, 1) ? salient : rest).push_back(k);
        machine().floats(w.column, 0, int64_t(factor.size()), factor.data());
    }
};

class Reader {
public:
    Reader(const LrecSalient& w, int64_t) : w(w), S(w.num_salient), M(w.K - S) {}

    Row rest(int64_t n) {
        const float scale = stored_float(w.scale, n), offset = stored_float(w.offset, n);
        signs[0] = -scale + offset;
        signs[1] = scale + offset;
        prefetch_ahead(w.qweight + n * ceil_div(M, 32), 4 * ceil_div(M, 32));
        return {w.qweight + n * ceil_div(M, 32), &rest_run, M, 1};
    }

    Row salient(int64_t n) {
        const float zero = float(code_at(w.salient_zero, n, SALIENT_BITS));
        for (int q = 0; q < 16; q++) levels[q] = float(q) - zero;
        salient_run.scale = stored_float(w.salient_scale, n);
        return {w.salient + n * ceil_div(S, 32) * SALIENT_BITS, &salient_run, S, SALIENT_BITS};
    }

private:
    const LrecSalient& w;
    const int64_t S, M;
    float signs[4] = {}, levels[16] = {};
    Run rest_run{M, signs, 1.0f}, salient_run{S, levels, 0.0f};
};

}  // namespace
}  // namespace lrec

using namespace lrec;

extern "C" void lrec_salient_decode(const LrecSalient* w, int64_t first, int64_t last, float* out, int32_t threads) {
    const Columns columns(*w);
    const int64_t M = int64_t(columns.rest.size()), S = w->num_salient;
    share_rows(first, last, threads, [&](int64_t from, int64_t to) {
        Reader reader(*w, from);
        std::vector<float> rest(M), salient(S);
        for (int64_t n = from; n < to; n++) {
            float* row = out + (n - first) * w->K;
            machine().decode(reader.rest(n), rest.data());
            machine().decode(reader.salient(n), salient.data());
            for (int64_t j = 0; j < M; j++) row[columns.rest[j]] = columns.factor[j] * rest[j];
            for (int64_t i = 0; i < S; i++) row[columns.salient[i]] = salient[i];
        }
    });
}

extern "C" void lrec_salient_gemv(const LrecSalient* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
    const Columns columns(*w);
    const int64_t M = int64_t(columns.rest.size()), S = w->num_salient;
    const auto rest = padded(T, M, [&](int64_t t, int64_t j) { return x[t * ldx + columns.rest[j]] * columns.factor[j]; });
    const auto salient = padded(T, S, [&](int64_t t, int64_t i) { return x[t * ldx + columns.salient[i]]; });
    share_rows(0, w->N, threads, [&](int64_t from, int64_t to) {
        Reader reader(*w, from);
        float part[8];
        for (int64_t n = from; n < to; n++) {
            const Row one_bit = reader.rest(n), four_bits = reader.salient(n);
            share_inputs(rest, M, T, [&](const Inputs& in, int64_t t) { machine().product(one_bit, in, y + t * ldy + n, ldy); });
            share_inputs(salient, S, T, [&](const Inputs& in, int64_t t) {
                machine().product(four_bits, in, part, 1);
                for (int64_t i = 0; i < in.T; i++) y[(t + i) * ldy + n] += part[i];
            });
        }
    });
}
