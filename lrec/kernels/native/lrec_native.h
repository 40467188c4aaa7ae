// The C ABI of lrec's native CPU kernels: no torch headers, so one build serves every torch and every Python.
//
// A weight is (N out, K in); its tensors are those of lrec/formats, contiguous, and w[n, k] is what is defined there.
// Nothing here allocates what it returns.
#pragma once
#include <cstdint>

#define LREC_ABI 3

// How numbers are stored: as integers, float16, bfloat16 or float32, or not at all.
enum LrecKind : int32_t { LREC_NONE = 0, LREC_CODES = 1, LREC_HALF = 16, LREC_BFLOAT = 17, LREC_FLOAT = 32 };

struct LrecFloats {
    const void* data;
    int64_t kind;
};

// scale[n, g] * (q[n, k] - zero[n, g]) with g = k / group_size.
struct LrecUniform {
    int64_t N, K, group_size;
    int64_t bits;                       // 2, 3, 4 or 8
    const uint32_t* qweight;            // (N, ceil(K/32) * bits)
    LrecFloats scale, zero;             // (N, G); or zero (G, ceil(N/32) * bits), codes; or none, then it is 2^(bits-1)
};

// scale[(n K + k) / block_size] * table[n, g, q[n, k]]; scale is absent, float, or codes (bytes) of `levels`, scaled by
// scale_scale in blocks of 256 and moved by scale_offset.
struct LrecCodebook {
    int64_t N, K, group_size, block_size;
    int64_t bits;                       // 2, 3 or 4
    int64_t row_step, group_step;       // floats from one row's table to the next, and one group's: 0 where one serves all
    const uint32_t* qweight;            // (N, ceil(K/32) * bits)
    const float* levels;
    LrecFloats table, scale, scale_scale, scale_offset;
};

// offset[n, g] + sum_p alpha[n, g, p] * (2 b[n, p, k] - 1).
struct LrecBinary {
    int64_t N, K, group_size;
    int64_t planes;                     // 1 to 4
    const uint32_t* qweight;            // (N, planes, ceil(K/32))
    LrecFloats alpha, offset;           // (N, G, planes), (N, G)
};

// scale[n, g] * t[n, k].
struct LrecTernary {
    int64_t N, K, group_size;
    const uint8_t* qweight;             // (N, ceil(K/5)), five trits to a byte
    LrecFloats scale;                   // (N, G)
};

// table[n, o, q[n, k]] with o = 1 for outliers; or, without a table, the levels that scale and base span.
struct LrecOutlier {
    int64_t N, K, tile, stride;
    int64_t bits, index_bits;           // 2, 3 or 4; 4 to 7
    const uint32_t *qweight, *index;    // (N, ceil(K/32) * bits); symbols of index_bits bits
    const int32_t* starts;              // (ceil(N K / tile) + 1,)
    LrecFloats table, scale, base;      // (N, 2, 2^bits), (N, 2), (N, 2)
};

// salient_scale[n] * (q[n, i] - salient_zero[n]) in the salient columns, the i-th of S, where `mask` is 1; elsewhere, the
// j-th of K - S, column[j] * (scale[n] * (2 b[n, j] - 1) + offset[n]).
struct LrecSalient {
    int64_t N, K, num_salient;
    const uint32_t *qweight, *mask;     // (N, ceil((K - S)/32)), (ceil(K/32),)
    const uint32_t *salient, *salient_zero;  // (N, ceil(S/32) * 4), (ceil(N/32) * 4,)
    LrecFloats salient_scale, scale, offset, column;
};

extern "C" {
// The version of this file; the loader refuses a library with another one.
int32_t lrec_abi(void);

// "avx512", "avx2" or "portable": which implementation runs on this machine. LREC_CPU=portable or LREC_CPU=avx2 in the
// environment asks for no more than that.
const char* lrec_cpu_path(void);

// Whether it may use the CPU's own instructions for bfloat16 products.
int32_t lrec_multiplies_bfloat16(void);

// decode: out[n - first, k] = w[n, k] for first <= n < last, float32, row-major with K columns.
// gemv: y[t, n] = sum_k x[t, k] w[n, k] for T rows of x with leading dimension ldx, y with leading dimension ldy; meant for
// T <= 8.
#define LREC_FORMAT(name, Weight)                                                                                      \
    void lrec_##name##_decode(const Weight* w, int64_t first, int64_t last, float* out, int32_t threads);              \
    void lrec_##name##_gemv(const Weight* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads);
LREC_FORMAT(uniform, LrecUniform)
LREC_FORMAT(codebook, LrecCodebook)
LREC_FORMAT(binary, LrecBinary)
LREC_FORMAT(ternary, LrecTernary)
LREC_FORMAT(outlier, LrecOutlier)
LREC_FORMAT(salient, LrecSalient)

// The product of uniform weights of 2 and 4 bits with x rounded to int8: each run of 256 / bits columns of x to step * round(x / step) with
// step = max |x| / 127.
void lrec_uniform_gemv_int8(const LrecUniform* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads);
}
