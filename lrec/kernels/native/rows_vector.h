// Rows of codes by vectors: included once for each width, between LREC_TARGET_BEGIN and its end, after the definitions of
// Vector (WIDTH floats: zero, load, store, fma, sum) and Levels<BITS>, whose at(words, i) are weights i * WIDTH .. of the
// 32 whose codes begin at `words`.

// sink.whole<i>(k, v) for all vectors that lie in a whole run of 32 columns, sink.part(k, v) for the others.
template <int BITS, class Sink>
inline __attribute__((always_inline)) void each_vector(const Row& row, Sink& sink) {
    constexpr int W = Vector::WIDTH;
    const int64_t K = row.K, end = (K + W - 1) / W * W;
    const Run* run = row.runs;
    int64_t k = 0;
    while (k < K) {
        while (run->last <= k) run++;
        const Levels<BITS> levels(run->levels, run->scale, run->shift);
        const int64_t last = run->last < K ? run->last : end;
        const auto part = [&]() __attribute__((always_inline)) {
            sink.part(k, levels.at(row.codes + k / 32 * BITS, int(k % 32) / W));
            k += W;
        };
        while (k % 32 && k + W <= last) part();
        for (; k + 32 <= run->last; k += 32) {
            const uint32_t* words = row.codes + k / 32 * BITS;
            sink.template whole<0>(k, levels.at(words, 0));
            sink.template whole<1>(k + W, levels.at(words, 1));
            if constexpr (W == 8) {
                sink.template whole<2>(k + 16, levels.at(words, 2));
                sink.template whole<3>(k + 24, levels.at(words, 3));
            }
        }
        while (k + W <= last) part();
        if (k < last) {  // a vector that belongs to several runs
            float mixed[W];
            for (int i = 0; i < W; i++) {
                while (run->last <= k + i && run->last < K) run++;
                mixed[i] = k + i < K ? run->weight(code_at(row.codes, k + i, BITS), BITS) : 0.0f;
            }
            sink.part(k, Vector::load(mixed));
            k += W;
        }
    }
}

struct Store {
    float* out;
    int64_t K;
    template <int I>
    inline void whole(int64_t k, Vector v) { v.store(out + k); }
    inline void part(int64_t k, Vector v) {
        if (k + Vector::WIDTH <= K) return v.store(out + k);
        float last[Vector::WIDTH];
        v.store(last);
        std::memcpy(out + k, last, (K - k) * sizeof(float));
    }
};

// T rows of x; several sums each, so that enough additions are under way at once.
template <int T>
struct Multiply {
    static constexpr int SUMS = T >= 4 ? 1 : T == 2 ? 2 : 4;
    const float* x;
    int64_t ldx;
    Vector sums[T][SUMS];
    Multiply(const Inputs& in) : x(in.x), ldx(in.ldx) {
        for (auto& row : sums)
            for (auto& sum : row) sum = Vector::zero();
    }
    template <int I>
    inline void whole(int64_t k, Vector v) {
        for (int t = 0; t < T; t++) sums[t][I % SUMS].fma(v, Vector::load(x + t * ldx + k));
    }
    inline void part(int64_t k, Vector v) { whole<0>(k, v); }
    inline void finish(float* y, int64_t ldy) {
        for (int t = 0; t < T; t++) {
            for (int i = 1; i < SUMS; i++) sums[t][0].add(sums[t][i]);
            y[t * ldy] = sums[t][0].sum();
        }
    }
};

template <int BITS>
void decode_codes(const Row& row, float* out) {
    Store sink{out, row.K};
    each_vector<BITS>(row, sink);
}

template <int BITS, int T>
void product_codes(const Row& row, const Inputs& in, float* y, int64_t ldy) {
    Multiply<T> sink(in);
    each_vector<BITS>(row, sink);
    sink.finish(y, ldy);
}

template <int BITS>
void product_inputs(const Row& row, const Inputs& in, float* y, int64_t ldy) {
    if (in.T == 1) product_codes<BITS, 1>(row, in, y, ldy);
    else if (in.T == 2) product_codes<BITS, 2>(row, in, y, ldy);
    else if (in.T == 4) product_codes<BITS, 4>(row, in, y, ldy);
    else product_codes<BITS, 8>(row, in, y, ldy);
}

template <int T>
void dense_inputs(const float* row, int64_t K, const Inputs& in, float* y, int64_t ldy) {
    Multiply<T> sink(in);
    for (int64_t k = 0; k < K; k += 32) {
        sink.template whole<0>(k, Vector::load(row + k));
        if constexpr (Vector::WIDTH == 8) {
            sink.template whole<1>(k + 8, Vector::load(row + k + 8));
            sink.template whole<2>(k + 16, Vector::load(row + k + 16));
            sink.template whole<3>(k + 24, Vector::load(row + k + 24));
        } else {
            sink.template whole<1>(k + 16, Vector::load(row + k + 16));
        }
    }
    sink.finish(y, ldy);
}

// float16, the usual case, by vectors.
void floats(const LrecFloats& f, int64_t start, int64_t n, float* out) {
    int64_t i = 0;
    if (f.kind == LREC_HALF)
        for (const uint16_t* half = static_cast<const uint16_t*>(f.data) + start; i + Vector::WIDTH <= n; i += Vector::WIDTH)
            Vector::load_half(half + i).store(out + i);
    load_floats(f, start + i, n - i, out + i);
}

void decode(const Row& row, float* out) {
    if (row.bits == 1) decode_codes<1>(row, out);
    else if (row.bits == 2) decode_codes<2>(row, out);
    else if (row.bits == 3) decode_codes<3>(row, out);
    else if (row.bits == 4) decode_codes<4>(row, out);
    else decode_codes<8>(row, out);
}

void product(const Row& row, const Inputs& in, float* y, int64_t ldy) {
    if (row.bits == 1) product_inputs<1>(row, in, y, ldy);
    else if (row.bits == 2) product_inputs<2>(row, in, y, ldy);
    else if (row.bits == 3) product_inputs<3>(row, in, y, ldy);
    else if (row.bits == 4) product_inputs<4>(row, in, y, ldy);
    else product_inputs<8>(row, in, y, ldy);
}

void dense(const float* row, int64_t K, const Inputs& in, float* y, int64_t ldy) {
    if (in.T == 1) dense_inputs<1>(row, K, in, y, ldy);
    else if (in.T == 2) dense_inputs<2>(row, K, in, y, ldy);
    else if (in.T == 4) dense_inputs<4>(row, K, in, y, ldy);
    else dense_inputs<8>(row, K, in, y, ldy);
}
