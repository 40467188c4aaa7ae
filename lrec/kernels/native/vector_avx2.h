// Eight floats, for the files that are compiled once for each width; included between LREC_AVX2_BEGIN and its end.

struct Vector {
    static constexpr int WIDTH = 8;
    __m256 v;
    static inline Vector zero() { return {_mm256_setzero_ps()}; }
    static inline Vector load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static inline Vector load_half(const uint16_t* from) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
    }
    inline void store(float* to) const { _mm256_storeu_ps(to, v); }
    inline void fma(Vector a, Vector b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
    inline void add(Vector a) { v = _mm256_add_ps(v, a.v); }
    inline float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    inline void fnma(Vector a, Vector b) { v = _mm256_fnmadd_ps(a.v, b.v, v); }
    static inline Vector broadcast(const float* from) { return {_mm256_broadcast_ss(from)}; }
    inline Vector times(float factor) const { return {_mm256_mul_ps(v, _mm256_set1_ps(factor))}; }
    // Lane i is from[lanes[i]], with lanes below 8.
    static inline Vector pick(const float* from, const int32_t* lanes) {
        return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)))};
    }
};

// As many words of codes.
struct Codes {
    __m256i v;
    inline Codes lowered() const { return {_mm256_srli_epi32(v, 16)}; }
    // The bits of `mask`, where they stand, as floats.
    inline Vector field(int32_t mask) const { return {_mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(mask)))}; }
};

// One block of codes; for 3 bits each lane gets the 3 bytes of its 8 codes (and a byte too many, which no mask reads).
template <int BITS>
inline Codes load_block(const uint32_t* p) {
    if constexpr (BITS != 3) return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
    const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                            4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    // Words 0..3 hold the lower half, words 2..5 the upper half in their last 12 bytes: nothing is read beyond the block.
    const __m256i words = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                                                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2)), 1);
    return {_mm256_shuffle_epi8(words, spread)};
}
