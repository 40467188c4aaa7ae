// What the files of the uniform kernels share.
#pragma once
#include "numbers.h"

namespace lrec {

inline int64_t num_groups(const LrecUniform& w) { return ceil_div(w.K, w.group_size); }
inline int64_t row_words(const LrecUniform& w) { return ceil_div(w.K, 32) * w.bits; }
inline const uint32_t* row_codes(const LrecUniform& w, int64_t n) { return w.qweight + n * row_words(w); }

// Activations rounded to int8 in blocks: x ~ step * round(x / step), step = max |x| / 127, NaN if x is not finite.
inline int64_t int8_block(int bits) { return 32 * 8 / bits; }  // 32 bytes of codes
float int8_step(const float* x, int64_t size);
inline float int8_inverse(float step) { return step > 0 ? 1.0f / step : 0.0f; }

#ifdef LREC_X86
// A product with T = 1, 2 or 4 rows of x: lay x out in `prepared` once, then take rows first <= n < last of W against it,
// CHUNK of them at a time, `first` a multiple of that: so many zeros packed along N fill whole words.
constexpr int64_t CHUNK = 32;
struct Gemv {
    int64_t (*prepared_bytes)(const LrecUniform& w, int64_t T);
    void (*prepare)(const LrecUniform& w, const float* x, int64_t T, int64_t ldx, char* prepared);
    void (*rows)(const LrecUniform& w, char* prepared, int64_t T, int64_t first, int64_t last, float* scratch, float* y, int64_t ldy);
};

// Floats from one row's scales to the next in a scratch of `scratch_size` floats, which every thread needs for `rows`.
inline int64_t grid_stride(const LrecUniform& w) { return num_groups(w) + 16; }
inline int64_t scratch_size(const LrecUniform& w) { return 2 * CHUNK * grid_stride(w); }

namespace avx2 {

Gemv exact(int bits);
Gemv int8(int bits);  // 2 and 4 bits

}  // namespace avx2

namespace avx512 {
Gemv exact(int bits);
Gemv int8(int bits);  // needs VNNI
}  // namespace avx512
#endif

}  // namespace lrec
