// Uniform weights times few rows of x, by vectors; included once for each width, after gemv.h.
//
// One load takes 8 or 16 lanes of consecutive codes: 16 codes a lane at 2 bits, 8 at 3 and 4 bits, 4 at 8 bits. Field s
// of all lanes is cut out by one AND, *where it stands*, and made a float by one conversion, so it arrives multiplied
// by 2^(bits * s); x is laid out once per call in the same order (field by field) and divided by that power, which is
// exact. A vector of weights so costs an AND, a conversion and an FMA: no shift, no table, and three instructions that
// spread over all four vector ports of a Zen core. A lane never crosses a group, so scale and zero enter once per lane
// and block:
//   y += scale * (sum q x - zero * sum x).

template <int BITS_>
struct Exact {
    static constexpr int BITS = BITS_;
    using L = Layout<BITS>;
    static constexpr int64_t BYTES = L::BLOCK * sizeof(float);

    // Rows of W at once, so that a value of x is loaded for several and the sums still stay in registers.
    static constexpr int rows(int T) { return T <= 2 ? 4 : 2; }

    // A LANES by PER_LANE transpose, each field divided by its power of two, and the lanes' sums.
    static inline void prepare_block(const float* from, char* laid_out, float* sums) {
        float* to = reinterpret_cast<float*>(laid_out);
        constexpr int W = L::PER_LANE < 8 ? 4 : 8;  // fields transposed at once
        double exact[LANES] = {};  // a sum is multiplied by the zero: its rounding would weigh most
        for (int s = 0; s < L::PER_LANE; s += W) {
            float tile[W][LANES];
            for (int lane = 0; lane < LANES; lane++)
                for (int i = 0; i < W; i++) tile[i][lane] = from[lane * L::PER_LANE + s + i], exact[lane] += tile[i][lane];
            for (int i = 0; i < W; i++)
                Vector::load(tile[i]).times(1.0f / float(1 << (BITS * ((s + i) % L::HALF)))).store(to + (s + i) * LANES);
        }
        for (int lane = 0; lane < LANES; lane++) sums[lane] = float(exact[lane]);
    }

    // sum q x of R rows and T rows of x over one block, lane by lane; `codes` are R rows of `words` words.
    template <int R, int T>
    static inline __attribute__((always_inline)) void block_sums(const uint32_t* codes, int64_t words, const char* from, Vector sums[R][T]) {
        const float* x = reinterpret_cast<const float*>(from);
        constexpr int P = R * T <= 4 ? 2 : 1;  // partial sums each: enough chains to hide the latency of an FMA
        Codes code[R];
        for (int r = 0; r < R; r++) code[r] = load_block<BITS>(codes + r * words);
        Vector part[P][R][T];
        for (auto& set : part)
            for (auto& row : set)
                for (auto& t : row) t = Vector::zero();
        Vector xs[T];  // out here, for in the loop GCC 12.2 at -O1 gives it the place on the stack that `code` has (GCC bug 113372)
#pragma GCC unroll 16
        for (int s = 0; s < L::PER_LANE; s++) {
            if (s == L::HALF)
                for (auto& c : code) c = c.lowered();
            const int32_t mask = ((1 << BITS) - 1) << (BITS * (s % L::HALF));
            for (int t = 0; t < T; t++) xs[t] = Vector::load(x + (t * L::PER_LANE + s) * LANES);
            for (int r = 0; r < R; r++) {
                const Vector q = code[r].field(mask);
                for (int t = 0; t < T; t++) part[s % P][r][t].fma(q, xs[t]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) {
                sums[r][t] = part[0][r][t];
                if (P > 1) sums[r][t].add(part[P - 1][r][t]);
            }
    }
};

Gemv exact_functions(int bits) {
    return bits == 2 ? functions<Exact<2>>() : bits == 3 ? functions<Exact<3>>() : bits == 4 ? functions<Exact<4>>() : functions<Exact<8>>();
}
