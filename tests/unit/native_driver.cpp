// Runs every exported function of the native library on odd shapes and compares it with plain loops, for sanitizers.
//
// All tensors lie in heap blocks of exactly their size, so a read or write one byte outside is seen. Exits with 1 at the
// first value that is off.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "lrec_native.h"

void run_rows();  // native_rows.cpp

static std::mt19937 generator(0);

static uint32_t stream_code(const uint32_t* words, int64_t k, int bits) {
    uint32_t code = 0;
    for (int i = 0; i < bits; i++) {
        const int64_t bit = k * bits + i;
        code |= (words[bit / 32] >> (bit % 32) & 1u) << i;
    }
    return code;
}

static void check(const char* what, double actual, double expected, double size, const LrecUniform& w, int64_t T) {
    if (std::fabs(actual - expected) <= 2e-6 * size) return;
    std::printf("%s: %g, expected %g; N=%ld K=%ld group=%ld bits=%ld zero=%ld T=%ld\n", what, actual, expected, long(w.N), long(w.K),
                long(w.group_size), long(w.bits), long(w.zero.kind), long(T));
    std::exit(1);
}

static void run(int64_t N, int64_t K, int64_t group_size, int bits, int scale_kind, int zero_kind) {
    const int64_t G = (K + group_size - 1) / group_size, words = (K + 31) / 32 * bits, zero_words = (N + 31) / 32 * bits;
    std::vector<uint32_t> codes(N * words), zero_codes(zero_kind == LREC_CODES ? G * zero_words : 0);
    for (auto* v : {&codes, &zero_codes})
        for (auto& word : *v) word = generator();
    std::vector<float> scale(N * G), zero(N * G);
    std::vector<uint16_t> half_scale(N * G, 0x3800), half_zero(N * G, 0x3e00);  // 0.5 and 1.5
    for (auto& s : scale) s = 0.5f;
    for (auto& z : zero) z = 1.5f;
    const void* scales = scale_kind == LREC_HALF ? static_cast<const void*>(half_scale.data()) : scale.data();
    const void* zeros = zero_kind == LREC_CODES  ? static_cast<const void*>(zero_codes.data())
                        : zero_kind == LREC_HALF ? static_cast<const void*>(half_zero.data())
                                                 : zero.data();
    const LrecUniform w = {N, K, group_size, bits, codes.data(), {scales, scale_kind}, {zeros, zero_kind}};
    std::vector<double> weight(N * K);
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < K; k++) {
            const double z = zero_kind == LREC_NONE    ? 1 << (bits - 1)
                             : zero_kind == LREC_CODES ? stream_code(zero_codes.data() + k / group_size * zero_words, n, bits)
                                                       : 1.5;
            weight[n * K + k] = 0.5 * (stream_code(codes.data() + n * words, k, bits) - z);
        }
    const int64_t first = N > 2 ? 1 : 0;
    std::vector<float> decoded((N - first) * K, NAN);
    lrec_uniform_decode(&w, first, N, decoded.data(), 2);
    for (int64_t i = 0; i < (N - first) * K; i++) check("decode", decoded[i], weight[first * K + i], 0, w, 0);

    for (int64_t T : {0, 1, 2, 3, 4, 5, 8}) {
        const int64_t ldx = K + 3, ldy = N + 1, size = T ? (T - 1) * ldx + K : 0;
        std::vector<float> x(size), y(T ? (T - 1) * ldy + N : 0, NAN), y8 = y;
        for (auto& value : x) value = std::normal_distribution<float>()(generator);
        lrec_uniform_gemv(&w, x.data(), T, ldx, y.data(), ldy, 2);
        const bool int8 = bits == 2 || bits == 4;
        if (int8) lrec_uniform_gemv_int8(&w, x.data(), T, ldx, y8.data(), ldy, 2);
        for (int64_t t = 0; t < T; t++) {
            std::vector<double> rounded(x.begin() + t * ldx, x.begin() + t * ldx + K);
            for (int64_t k = 0; k < K; k += 256 / bits) {
                const int64_t end = std::min(K, k + 256 / bits);
                float most = 0;
                for (int64_t i = k; i < end; i++) most = std::max(most, std::fabs(x[t * ldx + i]));
                const float step = most / 127, inverse = step > 0 ? 1 / step : 0;
                for (int64_t i = k; i < end; i++) rounded[i] = double(step) * std::nearbyint(x[t * ldx + i] * inverse);
            }
            for (int64_t n = 0; n < N; n++) {
                double sum = 0, sum8 = 0, size = 0;
                for (int64_t k = 0; k < K; k++) {
                    sum += x[t * ldx + k] * weight[n * K + k];
                    sum8 += rounded[k] * weight[n * K + k];
                    size += std::fabs(x[t * ldx + k]) * (1 << bits);
                }
                check("gemv", y[t * ldy + n], sum, size, w, T);
                if (int8) check("gemv_int8", y8[t * ldy + n], sum8, size, w, T);
            }
        }
    }
}

int main() {
    if (lrec_abi() != LREC_ABI) return 2;
    std::printf("%s\n", lrec_cpu_path());
    for (int bits : {2, 3, 4, 8})
        for (int zero_kind : {LREC_NONE, LREC_CODES, LREC_HALF, LREC_FLOAT})
            for (int64_t K : {1, 17, 41, 128, 401})
                for (int64_t group_size : {16, 20, 48, 64, 128, 401})
                    if (group_size <= std::max<int64_t>(K, 16)) run(K == 401 ? 37 : 5, K, group_size, bits, K % 2 ? LREC_HALF : LREC_FLOAT, zero_kind);
    run_rows();
    return 0;
}
