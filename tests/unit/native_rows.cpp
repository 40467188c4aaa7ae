// The formats whose rows are codes and levels, for native_driver.cpp: each function against the format's equation.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "lrec_native.h"

namespace {

std::mt19937 generator(1);

std::vector<uint32_t> words(int64_t n) {
    std::vector<uint32_t> out(n);
    for (auto& word : out) word = generator();
    return out;
}

std::vector<float> floats(int64_t n) {
    std::vector<float> out(n);
    for (auto& value : out) value = std::normal_distribution<float>()(generator);
    return out;
}

LrecFloats stored(const std::vector<float>& v) { return {v.data(), LREC_FLOAT}; }

int64_t runs(int64_t n) { return (n + 31) / 32; }

int code(const std::vector<uint32_t>& words, int64_t from, int64_t k, int64_t bits) {
    int value = 0;
    for (int64_t i = 0, bit = from * 32 + k * bits; i < bits; i++, bit++) value |= int(words[bit / 32] >> (bit % 32) & 1u) << i;
    return value;
}

// Decodes all rows, and all but the first, and multiplies 0 to 11 rows of x; `value(n, k)` is the equation. A product that
// adds more than that, and takes it back, says by `passing(n, k)` what: sums are as exact as all that enters them allows.
template <class Weight, class Decode, class Gemv, class Value, class Passing>
void check(const char* name, const Weight& w, Decode decode, Gemv gemv, const Value& value, const Passing& passing) {
    const auto fail = [&](const char* what, int64_t n, double actual, double expected) {
        std::printf("%s %s: row %ld: %g, expected %g; N=%ld K=%ld\n", name, what, long(n), actual, expected, long(w.N), long(w.K));
        std::exit(1);
    };
    for (int64_t first : {int64_t(0), std::min<int64_t>(1, w.N)}) {
        std::vector<float> out((w.N - first) * w.K, NAN);
        decode(&w, first, w.N, out.data(), 2);
        for (int64_t n = first; n < w.N; n++)
            for (int64_t k = 0; k < w.K; k++) {
                const double actual = out[(n - first) * w.K + k], expected = value(n, k);
                if (!(std::fabs(actual - expected) <= 1e-5)) fail("decode", n, actual, expected);
            }
    }
    for (int64_t T : {0, 1, 3, 11}) {
        const int64_t ldx = w.K + 3, ldy = w.N + 1;
        const std::vector<float> x = floats(T ? (T - 1) * ldx + w.K : 0);
        std::vector<float> y(T ? (T - 1) * ldy + w.N : 0, NAN);
        gemv(&w, x.data(), T, ldx, y.data(), ldy, 2);
        for (int64_t t = 0; t < T; t++)
            for (int64_t n = 0; n < w.N; n++) {
                double sum = 0, size = 1;
                for (int64_t k = 0; k < w.K; k++) {
                    sum += x[t * ldx + k] * value(n, k);
                    size += std::fabs(x[t * ldx + k]) * (std::fabs(value(n, k)) + 2 * std::fabs(passing(n, k)));
                }
                if (!(std::fabs(y[t * ldy + n] - sum) <= 2e-6 * size)) fail("gemv", n, y[t * ldy + n], sum);
            }
    }
}

template <class Weight, class Decode, class Gemv, class Value>
void check(const char* name, const Weight& w, Decode decode, Gemv gemv, const Value& value) {
    check(name, w, decode, gemv, value, [](int64_t, int64_t) { return 0.0; });
}

void codebook(int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t block_size, int tables, bool twice) {
    const int64_t L = 1 << bits, G = (K + group_size - 1) / group_size, B = block_size ? (N * K + block_size - 1) / block_size : 0;
    const auto codes = words(N * runs(K) * bits);
    const auto table = floats(tables == 0 ? L : tables == 1 ? N * L : N * G * L), scale = floats(B), levels = floats(256), offset = floats(1);
    const auto scale_scale = floats((B + 255) / 256);
    std::vector<uint8_t> scale_codes(B);
    for (auto& c : scale_codes) c = uint8_t(generator());
    const LrecFloats none = {nullptr, LREC_NONE};
    const int64_t row_step = tables == 0 ? 0 : tables == 1 ? L : G * L, group_step = tables == 2 ? L : 0;
    const LrecCodebook w = {N, K, group_size, block_size ? block_size : N * K, bits, row_step, group_step, codes.data(), levels.data(),
                            stored(table), B == 0 ? none : twice ? LrecFloats{scale_codes.data(), LREC_CODES} : stored(scale),
                            stored(scale_scale), stored(offset)};
    check("codebook", w, lrec_codebook_decode, lrec_codebook_gemv, [&](int64_t n, int64_t k) {
        const int64_t b = block_size ? (n * K + k) / block_size : 0;
        const double s = B == 0 ? 1 : twice ? double(levels[scale_codes[b]]) * scale_scale[b / 256] + offset[0] : scale[b];
        return s * table[n * row_step + k / group_size * group_step + code(codes, n * runs(K) * bits, k, bits)];
    });
}

void binary(int64_t N, int64_t K, int64_t planes, int64_t group_size) {
    const int64_t G = (K + group_size - 1) / group_size;
    const auto codes = words(N * planes * runs(K));
    const auto alpha = floats(N * G * planes), offset = floats(N * G);
    const LrecBinary w = {N, K, group_size, planes, codes.data(), stored(alpha), stored(offset)};
    check("binary", w, lrec_binary_decode, lrec_binary_gemv, [&](int64_t n, int64_t k) {
        const int64_t g = n * G + k / group_size;
        double value = offset[g];
        for (int64_t p = 0; p < planes; p++) value += alpha[g * planes + p] * (2 * code(codes, (n * planes + p) * runs(K), k, 1) - 1);
        return value;
    });
}

void ternary(int64_t N, int64_t K, int64_t group_size) {
    const int64_t G = (K + group_size - 1) / group_size, bytes = (K + 4) / 5;
    std::vector<uint8_t> codes(N * bytes);
    for (auto& c : codes) c = uint8_t(generator() % 243);
    const auto scale = floats(N * G);
    const LrecTernary w = {N, K, group_size, codes.data(), stored(scale)};
    const int place[5] = {1, 3, 9, 27, 81};
    check("ternary", w, lrec_ternary_decode, lrec_ternary_gemv, [&](int64_t n, int64_t k) {
        return double(scale[n * G + k / group_size]) * (codes[n * bytes + k / 5] / place[k % 5] % 3 - 1);
    });
}

void outlier(int64_t N, int64_t K, int64_t bits, int64_t index_bits, int64_t tile, double share, bool spanned) {
    const int64_t L = 1 << bits, jump = (1 << index_bits) - 1;
    int64_t stride = K * 618 / 1000 + 1;
    while (std::gcd(stride, K) != 1) stride++;
    std::vector<char> marked(N * K);  // by column
    std::vector<int> symbols;
    std::vector<int32_t> starts = {0};
    for (int64_t i = 0, gap = 0; i < N * K; i++) {
        if (i % tile == 0) gap = 0;
        gap++;
        if (std::uniform_real_distribution<double>()(generator) < share) {
            marked[i / K * K + i % K * stride % K] = 1;
            for (; gap > jump; gap -= jump) symbols.push_back(int(jump));
            symbols.push_back(int(gap - 1));
            gap = 0;
        }
        if ((i + 1) % tile == 0 || i + 1 == N * K) starts.push_back(int32_t(symbols.size()));
    }
    std::vector<uint32_t> index(runs(int64_t(symbols.size())) * index_bits);
    for (size_t s = 0; s < symbols.size(); s++)
        for (int64_t i = 0, bit = int64_t(s) * index_bits; i < index_bits; i++, bit++) index[bit / 32] |= uint32_t(symbols[s] >> i & 1) << (bit % 32);
    const auto codes = words(N * runs(K) * bits);
    const auto table = floats(N * 2 * L), scale = floats(N * 2), base = floats(N * 2);
    const LrecFloats none = {nullptr, LREC_NONE};
    const LrecOutlier w = {N, K, tile, stride, bits, index_bits, codes.data(), index.data(), starts.data(),
                           spanned ? none : stored(table), stored(scale), stored(base)};
    const auto level = [&](int64_t n, int64_t k, int o) {
        const int q = code(codes, n * runs(K) * bits, k, bits);
        if (!spanned) return double(table[(n * 2 + o) * L + q]);
        if (o == 0) return base[n * 2] + double(scale[n * 2]) * q;
        const double tail = base[n * 2 + 1] + double(scale[n * 2 + 1]) * (q % (L / 2));
        return q < L / 2 ? -tail : tail;
    };
    const auto value = [&](int64_t n, int64_t k) { return level(n, k, marked[n * K + k]); };
    check("outlier", w, lrec_outlier_decode, lrec_outlier_gemv, value,
          [&](int64_t n, int64_t k) { return marked[n * K + k] ? level(n, k, 0) : 0.0; });
}

void salient(int64_t N, int64_t K, double share) {
    std::vector<uint32_t> mask(runs(K));
    std::vector<int64_t> place(K);
    int64_t S = 0, M = 0;
    for (int64_t k = 0; k < K; k++) {
        const bool is = std::uniform_real_distribution<double>()(generator) < share;
        mask[k / 32] |= uint32_t(is) << (k % 32);
        place[k] = is ? S++ : M++;
    }
    const auto signs = words(N * runs(M)), codes = words(N * runs(S) * 4), zero = words(runs(N) * 4);
    const auto salient_scale = floats(N), scale = floats(N), offset = floats(N), column = floats(M);
    const LrecSalient w = {N, K, S, signs.data(), mask.data(), codes.data(), zero.data(),
                           stored(salient_scale), stored(scale), stored(offset), stored(column)};
    check("salient", w, lrec_salient_decode, lrec_salient_gemv, [&](int64_t n, int64_t k) {
        if (mask[k / 32] >> (k % 32) & 1) return double(salient_scale[n]) * (code(codes, n * runs(S) * 4, place[k], 4) - code(zero, 0, n, 4));
        return column[place[k]] * (double(scale[n]) * (2 * code(signs, n * runs(M), place[k], 1) - 1) + offset[n]);
    });
}

}  // namespace

void run_rows() {
    for (int64_t K : {1, 7, 17, 32, 41, 128, 401}) {
        const int64_t N = K == 401 ? 37 : 5;
        for (int64_t group_size : {7, 16, 48, 128}) {
            for (int64_t bits : {2, 3, 4})
                for (int tables : {0, 1, 2})
                    for (int64_t block_size : {0, 16, 48, 1000}) codebook(N, K, bits, group_size, block_size, tables, K % 2);
            for (int64_t planes : {1, 2, 3, 4}) binary(N, K, planes, group_size);
            ternary(N, K, group_size);
        }
        for (double share : {0.0, 0.002, 0.05, 0.7, 1.0}) {
            for (int64_t bits : {2, 3, 4})
                for (int64_t tile : {10, 100, 16384}) outlier(N, K, bits, bits + 2, tile, share, K % 2);
            salient(N, K, share);
        }
    }
}
