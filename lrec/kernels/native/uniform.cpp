// Uniform weights: as rows of codes where they are decoded, and by the vector code of their own where few rows of x are
// multiplied and that code serves.
#include "uniform.h"

#include <cmath>

#include "rows.h"

namespace lrec {
namespace {

constexpr float CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Levels are the codes, moved by the zero and then scaled: in this order, as in `unpack`, so that the bits agree.
class Reader {
public:
    Reader(const LrecUniform& w, int64_t) : w(w), G(num_groups(w)), scale(G), zero(G), runs(G) {
        for (int64_t g = 0; g < G; g++) runs[g] = {std::min(w.K, (g + 1) * w.group_size), CODES, 0.0f};
    }

    Row row(int64_t n) {
        machine().floats(w.scale, n * G, G, scale.data());
        load_zeros(n);
        for (int64_t g = 0; g < G; g++) runs[g].scale = scale[g], runs[g].shift = -zero[g];
        prefetch_ahead(row_codes(w, n), 4 * row_words(w));
        return {row_codes(w, n), runs.data(), w.K, int(w.bits)};
    }

private:
    void load_zeros(int64_t n) {
        if (w.zero.kind == LREC_NONE) return std::fill(zero.begin(), zero.end(), float(1 << (w.bits - 1)));
        if (w.zero.kind != LREC_CODES) return machine().floats(w.zero, n * G, G, zero.data());
        const uint32_t* words = static_cast<const uint32_t*>(w.zero.data);
        for (int64_t g = 0, count = ceil_div(w.N, 32) * w.bits; g < G; g++) zero[g] = float(code_at(words + g * count, n, int(w.bits)));
    }

    const LrecUniform& w;
    const int64_t G;
    std::vector<float> scale, zero;
    std::vector<Run> runs;
};

#ifdef LREC_X86
// The lanes of a block are whole groups, or there is one group.
bool serves(const LrecUniform& w) { return w.group_size % 16 == 0 || w.group_size >= w.K; }

bool use_vnni() { return cpu() == Cpu::AVX512 && __builtin_cpu_supports("avx512vnni"); }

// The product by vectors; false if that does not serve.
bool gemv_vectors(const LrecUniform& w, const Gemv& kernel, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
    if (cpu() == Cpu::PORTABLE || !serves(w)) return false;
    for (int64_t t = 0, rows; t < T; t += rows) {
        rows = T - t >= 4 ? 4 : T - t >= 2 ? 2 : 1;
        std::vector<char> prepared(kernel.prepared_bytes(w, rows));
        kernel.prepare(w, x + t * ldx, rows, ldx, prepared.data());
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            std::vector<float> scratch(scratch_size(w));
#pragma omp for schedule(static)
            for (int64_t n = 0; n < w.N; n += CHUNK)
                kernel.rows(w, prepared.data(), rows, n, std::min(n + CHUNK, w.N), scratch.data(), y + t * ldy, ldy);
        }
    }
    return true;
}
#endif

}  // namespace

float int8_step(const float* x, int64_t size) {
    float most = 0;
    for (int64_t i = 0; i < size; i++) {
        if (!std::isfinite(x[i])) return NAN;
        most = std::max(most, std::fabs(x[i]));
    }
    return most / 127.0f;
}

}  // namespace lrec

using namespace lrec;

extern "C" void lrec_uniform_decode(const LrecUniform* w, int64_t first, int64_t last, float* out, int32_t threads) {
    decode_rows<Reader>(*w, first, last, out, threads);
}

extern "C" void lrec_uniform_gemv(const LrecUniform* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
#ifdef LREC_X86
    if (gemv_vectors(*w, cpu() == Cpu::AVX512 ? avx512::exact(int(w->bits)) : avx2::exact(int(w->bits)), x, T, ldx, y, ldy, threads)) return;
#endif
    multiply_rows<Reader>(*w, x, T, ldx, y, ldy, threads);
}

extern "C" void lrec_uniform_gemv_int8(const LrecUniform* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
#ifdef LREC_X86
    if (gemv_vectors(*w, use_vnni() ? avx512::int8(int(w->bits)) : avx2::int8(int(w->bits)), x, T, ldx, y, ldy, threads)) return;
#endif
    std::vector<float> rounded(T * w->K);
    const int64_t block = int8_block(int(w->bits));
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < w->K; k += block) {
            const int64_t size = std::min(block, w->K - k);
            const float step = int8_step(x + t * ldx + k, size), inverse = int8_inverse(step);
            for (int64_t i = k; i < k + size; i++) rounded[t * w->K + i] = step * std::nearbyint(x[t * ldx + i] * inverse);
        }
    lrec_uniform_gemv(w, rounded.data(), T, w->K, y, ldy, threads);
}
