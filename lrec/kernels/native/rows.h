// A row of weights as codes looked up in levels: what every format but the uniform one comes down to.
//
// A format's file says, in plain C++, which codes and levels a row has (its `Reader`); the files rows_*.cpp decode and
// multiply such rows, once for each kind of machine, so that no format needs vector code of its own.
#pragma once
#include <algorithm>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "numbers.h"

namespace lrec {

// Up to column `last` weights are scale * (levels[code] + shift); the last run of a row ends at K.
struct Run {
    int64_t last;
    const float* levels;  // 2^bits, or for one bit 4, of which 2 count; for 8 bits none, there the code is its own level
    float scale, shift = 0.0f;

    float weight(uint32_t code, int bits) const { return scale * ((bits == 8 ? float(code) : levels[code]) + shift); }
};

// Codes of 1 to 4 bits or of 8 in the order of `pack_codes`, readable up to a multiple of 32.
struct Row {
    const uint32_t* codes;
    const Run* runs;
    int64_t K;
    int bits;
};

// T = 1, 2, 4 or 8 rows of x, zero from column K up to a multiple of 32.
struct Inputs {
    const float* x;
    int64_t ldx, T;
};

constexpr int64_t PAD = 32;
constexpr int64_t PAGE = 4096;

// Asks for as many stored bytes as a row has, a page ahead of it: hardware prefetching ends with each page.
inline void prefetch_ahead(const void* row, int64_t bytes) {
    const char* ahead = static_cast<const char*>(row) + PAGE;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
}

// What is compiled for each kind of machine. `product` and `dense` set y[t * ldy] = sum_k x[t, k] w[k] for a row in codes
// and for a decoded one, which is zero from K up to a multiple of 32.
struct Machine {
    void (*floats)(const LrecFloats& f, int64_t start, int64_t n, float* out);  // what `load_floats` does
    void (*decode)(const Row& row, float* out);
    void (*product)(const Row& row, const Inputs& in, float* y, int64_t ldy);
    void (*dense)(const float* row, int64_t K, const Inputs& in, float* y, int64_t ldy);
};
extern const Machine PORTABLE;
#ifdef LREC_X86
extern const Machine AVX2, AVX512;
#endif
const Machine& machine();

// Rows first <= n < last in even shares, each as work(from, to) on a thread of its own.
template <class Work>
void share_rows(int64_t first, int64_t last, int32_t threads, const Work& work) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t id = 0, count = 1;
#if defined(_OPENMP)
        id = omp_get_thread_num(), count = omp_get_num_threads();
#endif
        const int64_t from = first + (last - first) * id / count, to = first + (last - first) * (id + 1) / count;
        if (from < to) work(from, to);
    }
}

// Copies of T rows of x, each filled up with zeros: `gather(t, k)` is what stands in column k.
template <class Gather>
std::vector<float> padded(int64_t T, int64_t K, const Gather& gather) {
    const int64_t ldx = round_up(K, PAD);
    std::vector<float> x(T * ldx);
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < K; k++) x[t * ldx + k] = gather(t, k);
    return x;
}

// T in parts of 8, 4, 2 and 1 rows, for each of which the products are compiled.
template <class Work>
void share_inputs(const std::vector<float>& x, int64_t K, int64_t T, const Work& work) {
    const int64_t ldx = round_up(K, PAD);
    for (int64_t t = 0, part; t < T; t += part) {
        part = T - t >= 8 ? 8 : T - t >= 4 ? 4 : T - t >= 2 ? 2 : 1;
        work(Inputs{x.data() + t * ldx, ldx, part}, t);
    }
}

// A Reader is made for rows first <= n < last and then asked for each of them in order: row(n) is its codes and levels.
template <class Reader, class Weight>
void decode_rows(const Weight& w, int64_t first, int64_t last, float* out, int32_t threads) {
    share_rows(first, last, threads, [&](int64_t from, int64_t to) {
        Reader reader(w, from);
        for (int64_t n = from; n < to; n++) machine().decode(reader.row(n), out + (n - first) * w.K);
    });
}

template <class Reader, class Weight>
void multiply_rows(const Weight& w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads) {
    const std::vector<float> copy = padded(T, w.K, [&](int64_t t, int64_t k) { return x[t * ldx + k]; });
    share_inputs(copy, w.K, T, [&](const Inputs& in, int64_t t) {
        share_rows(0, w.N, threads, [&](int64_t from, int64_t to) {
            Reader reader(w, from);
            for (int64_t n = from; n < to; n++) machine().product(reader.row(n), in, y + t * ldy + n, ldy);
        });
    });
}

}  // namespace lrec
