// The C ABI of lrec's native CPU kernels: no torch headers, so one build serves every torch and every Python.
//
// A weight is (N out, K in); codes, scales and zeros are the tensors of lrec/formats/uniform.py, contiguous, and
// w[n, k] = scale[n, g] * (q[n, k] - zero[n, g]) with g = k / group_size. Nothing here allocates what it returns.
#pragma once
#include <cstdint>

#define LREC_ABI 1

// How scales and zeros are stored. A scale is LREC_HALF or LREC_FLOAT.
enum LrecKind : int32_t { LREC_NONE = 0, LREC_CODES = 1, LREC_HALF = 16, LREC_FLOAT = 32 };

struct LrecUniform {
    int64_t N, K, group_size;
    int32_t bits;                    // 2, 3, 4 or 8
    int32_t scale_kind, zero_kind;   // zero: none (then 2^(bits-1)), codes packed along N, half or float
    const uint32_t* qweight;         // (N, ceil(K/32) * bits)
    const void* scale;               // (N, G)
    const void* zero;                // (N, G), or (G, ceil(N/32) * bits) if packed
};

extern "C" {
// The layout version of LrecUniform; the loader refuses a library with another one.
int32_t lrec_abi(void);

// "avx2" or "portable": which implementation runs on this machine. LREC_CPU=portable in the environment forces the latter.
const char* lrec_cpu_path(void);

// out[n - first, k] = w[n, k] for first <= n < last, float32, row-major with K columns.
void lrec_uniform_decode(const LrecUniform* w, int64_t first, int64_t last, float* out, int32_t threads);

// y[t, n] = sum_k x[t, k] w[n, k] for T rows of x with leading dimension ldx, y with leading dimension ldy; meant for T <= 8.
void lrec_uniform_gemv(const LrecUniform* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads);

// The same for 2 and 4 bits with x rounded to int8: each run of 256 / bits columns of x to step * round(x / step) with
// step = max |x| / 127.
void lrec_uniform_gemv_int8(const LrecUniform* w, const float* x, int64_t T, int64_t ldx, float* y, int64_t ldy, int32_t threads);
}
