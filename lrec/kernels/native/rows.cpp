// Rows of codes in plain loops, and the choice between these and the vector code.
#include "rows.h"

#include <cstdlib>
#include <cstring>

namespace lrec {
namespace {

void decode(const Row& row, float* out) {
    const Run* run = row.runs;
    for (int64_t k = 0; k < row.K; k++) {
        while (run->last <= k) run++;
        out[k] = run->weight(code_at(row.codes, k, row.bits), row.bits);
    }
}

void dense(const float* row, int64_t K, const Inputs& in, float* y, int64_t ldy) {
    for (int64_t t = 0; t < in.T; t++) {
        const float* x = in.x + t * in.ldx;
        float sums[8] = {};
        for (int64_t k = 0; k < K; k += 8)
            for (int i = 0; i < 8; i++) sums[i] += x[k + i] * row[k + i];
        y[t * ldy] = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    }
}

void product(const Row& row, const Inputs& in, float* y, int64_t ldy) {
    static thread_local std::vector<float> decoded;
    decoded.assign(round_up(row.K, PAD), 0.0f);
    decode(row, decoded.data());
    dense(decoded.data(), row.K, in, y, ldy);
}

Cpu widest() {
#ifdef LREC_X86
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return Cpu::PORTABLE;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") ? Cpu::AVX512 : Cpu::AVX2;
#else
    return Cpu::PORTABLE;
#endif
}

Cpu allowed() {
    const char* named = std::getenv("LREC_CPU");
    if (named && std::strcmp(named, "portable") == 0) return Cpu::PORTABLE;
    return named && std::strcmp(named, "avx2") == 0 ? Cpu::AVX2 : Cpu::AVX512;
}

}  // namespace

const Machine PORTABLE = {load_floats, decode, product, dense};

Cpu cpu() {
    static const Cpu chosen = std::min(widest(), allowed());
    return chosen;
}

const Machine& machine() {
#ifdef LREC_X86
    if (cpu() != Cpu::PORTABLE) return cpu() == Cpu::AVX512 ? AVX512 : AVX2;
#endif
    return PORTABLE;
}

}  // namespace lrec

using namespace lrec;

extern "C" int32_t lrec_abi(void) { return LREC_ABI; }

extern "C" const char* lrec_cpu_path(void) {
    return cpu() == Cpu::AVX512 ? "avx512" : cpu() == Cpu::AVX2 ? "avx2" : "portable";
}

extern "C" int32_t lrec_multiplies_bfloat16(void) {
#ifdef LREC_X86
    return cpu() == Cpu::AVX512 && __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}
