// Uniform weights, portable half: the definition in plain loops, and the entry points that choose vector code where it serves.
#include "uniform.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace lrec {
namespace {

void decode_row(const LrecUniform& w, int64_t n, float* grid, float* out) {
    const int64_t G = num_groups(w);
    row_grid(w, n, grid, grid + G);
#ifdef LREC_X86
    if (cpu() != Cpu::PORTABLE && avx2::serves(w)) return avx2::decode_row(w, n, grid, grid + G, out);
#endif
    decode_columns(w, n, grid, grid + G, 0, w.K, out);
}

#ifdef LREC_X86
bool use_vnni() { return cpu() == Cpu::AVX512 && __builtin_cpu_supports("avx512vnni"); }

// The product by vectors; false if that does not serve.
bool gemv_vectors(const LrecUniform& w, const Gemv& kernel, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
    if (cpu() == Cpu::PORTABLE || !avx2::serves(w)) return false;
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

void row_grid(const LrecUniform& w, int64_t n, float* scale, float* zero) {
    const int64_t G = num_groups(w);
    const int64_t zero_words = ceil_div(w.N, 32) * w.bits;
    for (int64_t g = 0; g < G; g++) scale[g] = stored_float(w.scale, n * G + g);
    for (int64_t g = 0; g < G; g++) {
        if (w.zero.kind == LREC_NONE) zero[g] = float(1 << (w.bits - 1));
        else if (w.zero.kind == LREC_CODES) zero[g] = float(code_at(static_cast<const uint32_t*>(w.zero.data) + g * zero_words, n, int(w.bits)));
        else zero[g] = stored_float(w.zero, n * G + g);
    }
}

void decode_columns(const LrecUniform& w, int64_t n, const float* scale, const float* zero, int64_t first, int64_t last, float* out) {
    const uint32_t* codes = row_codes(w, n);
    for (int64_t k = first; k < last;) {
        const int64_t g = k / w.group_size;
        const int64_t end = std::min(last, (g + 1) * w.group_size);
        for (; k < end; k++) out[k - first] = (float(code_at(codes, k, int(w.bits))) - zero[g]) * scale[g];
    }
}

float dot(const float* a, const float* b, int64_t K) {
    float sums[8] = {};
    int64_t k = 0;
    for (; k + 8 <= K; k += 8)
        for (int i = 0; i < 8; i++) sums[i] += a[k + i] * b[k + i];
    for (; k < K; k++) sums[k & 7] += a[k] * b[k];
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

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
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> grid(2 * num_groups(*w));
#pragma omp for schedule(static)
        for (int64_t n = first; n < last; n++) decode_row(*w, n, grid.data(), out + (n - first) * w->K);
    }
}

extern "C" void lrec_uniform_gemv(const LrecUniform* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
#ifdef LREC_X86
    if (gemv_vectors(*w, cpu() == Cpu::AVX512 ? avx512::exact(int(w->bits)) : avx2::exact(int(w->bits)), x, T, ldx, y, ldy, threads)) return;
#endif
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> grid(2 * num_groups(*w)), row(w->K);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < w->N; n++) {
            decode_row(*w, n, grid.data(), row.data());
            for (int64_t t = 0; t < T; t++) y[t * ldy + n] = dot(x + t * ldx, row.data(), w->K);
        }
    }
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
