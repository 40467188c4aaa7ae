// How numbers are stored, and which instructions this machine has.
#pragma once
#include <cstdint>
#include <cstring>

#include "lrec_native.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LREC_X86 1
#endif

namespace lrec {

// The widest instructions that may be used here: those the CPU has, at most those that LREC_CPU names.
enum class Cpu { PORTABLE, AVX2, AVX512 };
Cpu cpu();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Code k of a little-endian bit stream of `bits` bits each. A code that ends in its first word takes that word twice, which
// spares a branch and reads nothing beyond.
inline uint32_t code_at(const uint32_t* words, int64_t k, int bits) {
    const int64_t bit = k * bits;
    const uint64_t pair = words[bit >> 5] | uint64_t(words[(bit + bits - 1) >> 5]) << 32;
    return uint32_t(pair >> (bit & 31)) & ((1u << bits) - 1);
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Exponent and mantissa moved to their places are the value times 2^-112, subnormals too; a full exponent stays one.
inline float half_to_float(uint16_t h) {
    const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    const float magnitude = float_of(uint32_t(h & 0x7fff) << 13) * 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return float_of(bits | special | uint32_t(h & 0x8000) << 16);
}

inline float stored_float(const void* data, int32_t kind, int64_t i) {
    if (kind == LREC_FLOAT) return static_cast<const float*>(data)[i];
    const uint16_t word = static_cast<const uint16_t*>(data)[i];
    return kind == LREC_HALF ? half_to_float(word) : float_of(uint32_t(word) << 16);
}

inline float stored_float(const LrecFloats& f, int64_t i) { return stored_float(f.data, f.kind, i); }

inline void load_floats(const LrecFloats& f, int64_t start, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = stored_float(f, start + i);
}

}  // namespace lrec
