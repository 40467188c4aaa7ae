// Sixteen floats, for the files that are compiled once for each width; included between LREC_AVX512_BEGIN and its end.

struct Vector {
    static constexpr int WIDTH = 16;
    __m512 v;
    static inline Vector zero() { return {_mm512_setzero_ps()}; }
    static inline Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static inline Vector load_half(const uint16_t* from) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
    }
    inline void store(float* to) const { _mm512_storeu_ps(to, v); }
    inline void fma(Vector a, Vector b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
    inline void add(Vector a) { v = _mm512_add_ps(v, a.v); }
    inline float sum() const {
        const __m512 h = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
        __m128 s = _mm512_castps512_ps128(_mm512_add_ps(h, _mm512_shuffle_f32x4(h, h, 0xb1)));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    inline void fnma(Vector a, Vector b) { v = _mm512_fnmadd_ps(a.v, b.v, v); }
    static inline Vector broadcast(const float* from) { return {_mm512_set1_ps(*from)}; }
    inline Vector times(float factor) const { return {_mm512_mul_ps(v, _mm512_set1_ps(factor))}; }
    // Lane i is from[lanes[i]], with lanes below 16.
    static inline Vector pick(const float* from, const int32_t* lanes) {
        return {_mm512_permutexvar_ps(_mm512_loadu_si512(lanes), _mm512_loadu_ps(from))};
    }
};

// As many words of codes.
struct Codes {
    __m512i v;
    inline Codes lowered() const { return {_mm512_srli_epi32(v, 16)}; }
    // The bits of `mask`, where they stand, as floats.
    inline Vector field(int32_t mask) const { return {_mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(mask)))}; }
};

// One block of codes; for 3 bits each lane gets the 3 bytes of its 8 codes (and a byte too many, which no mask reads).
template <int BITS>
inline Codes load_block(const uint32_t* p) {
    if constexpr (BITS != 3) return {_mm512_loadu_si512(p)};
    // Each quarter is four words that hold its three: the first one's own, and for the others those that end with them.
    const __m512i words = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 8, 9, 10, 11),
                                                   _mm512_maskz_loadu_epi32(0x0fff, p));
    const __m128i low = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    const __m128i high = _mm_setr_epi8(4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    const __m512i spread = _mm512_inserti32x4(_mm512_broadcast_i32x4(low), high, 3);
    return {_mm512_shuffle_epi8(words, spread)};
}
