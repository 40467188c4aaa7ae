// The frame of a product with few rows of x, by vectors: y += scale * (sum q x - zero * sum x), block by block. Included
// once for each width, after the definitions of Vector and Codes.
//
// A `Product` says how a block of x is laid out and how its products with a block of codes are summed: BITS; BYTES, the
// size of one laid-out block; prepare_block(from, to, sums); and block_sums<R, T>(codes, words, x, sums).
constexpr int LANES = Vector::WIDTH;
constexpr int64_t PAGE_WORDS = 1024;  // codes are asked for so far ahead: hardware prefetching ends with each page

// How `BITS`-bit codes stand in one load: PER_LANE codes in each lane, BLOCK in all. Fields at and above HALF are
// reached after one shift by 16, which keeps the sign bit clear and the powers of two small.
template <int BITS>
struct Layout {
    static constexpr int PER_LANE = BITS == 2 ? 16 : BITS == 8 ? 4 : 8;
    static constexpr int BLOCK = LANES * PER_LANE;
    static constexpr int WORDS = BLOCK * BITS / 32;
    static constexpr int HALF = BITS == 3 ? PER_LANE : PER_LANE / 2;
};

// x laid out: for each block and row of x BYTES bytes, then LANES sums; then the groups of the lanes.
struct Prepared {
    char* x;
    float* sums;
    int32_t* lanes;  // group of each lane, less the block's first group
    int32_t* first;  // the block's first group
};

template <class Product>
int64_t num_blocks(const LrecUniform& w) {
    return ceil_div(w.K, Layout<Product::BITS>::BLOCK);
}

template <class Product>
int64_t prepared_bytes(const LrecUniform& w, int64_t T) {
    return num_blocks<Product>(w) * (T * (Product::BYTES + 4 * LANES) + 4 * LANES + 4);
}

template <class Product>
Prepared parts(const LrecUniform& w, char* prepared, int64_t T) {
    const int64_t blocks = num_blocks<Product>(w);
    Prepared p;
    p.x = prepared;
    p.sums = reinterpret_cast<float*>(p.x + blocks * T * Product::BYTES);
    p.lanes = reinterpret_cast<int32_t*>(p.sums + blocks * T * LANES);
    p.first = p.lanes + blocks * LANES;
    return p;
}

template <class Product>
void prepare(const LrecUniform& w, const float* x, int64_t T, int64_t ldx, char* prepared) {
    using L = Layout<Product::BITS>;
    const Prepared p = parts<Product>(w, prepared, T);
    const int64_t blocks = num_blocks<Product>(w), groups = num_groups(w);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t left = w.K - b * L::BLOCK;
        for (int64_t t = 0; t < T; t++) {
            const float* from = x + t * ldx + b * L::BLOCK;
            float last[L::BLOCK];
            if (left < L::BLOCK) {
                for (int i = 0; i < L::BLOCK; i++) last[i] = i < left ? from[i] : 0.0f;
                from = last;
            }
            Product::prepare_block(from, p.x + (b * T + t) * Product::BYTES, p.sums + (b * T + t) * LANES);
        }
        const int64_t first = b * L::BLOCK / w.group_size;
        p.first[b] = int32_t(first);
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t group = (b * L::BLOCK + lane * L::PER_LANE) / w.group_size;
            p.lanes[b * LANES + lane] = int32_t((group < groups ? group : groups - 1) - first);
        }
    }
}

// Rows n .. n + R - 1 of W, with their scales and zeros, against T rows of x. `WHOLE`: all lanes of a block are of one group.
template <class Product, int R, int T, bool WHOLE>
void gemv_block(const LrecUniform& w, const Prepared& p, int64_t n, const float* scale, const float* zero, float* y, int64_t ldy) {
    using L = Layout<Product::BITS>;
    const int64_t words = row_words(w), blocks = num_blocks<Product>(w), stride = grid_stride(w);
    const int64_t per_group = w.group_size >= w.K ? blocks : w.group_size / L::BLOCK;
    Vector total[R][T];
    for (auto& row : total)
        for (auto& t : row) t = Vector::zero();
    const auto finish = [&](int64_t b, int64_t group, Vector sums[R][T]) __attribute__((always_inline)) {
        for (int r = 0; r < R; r++) {
            const float *s = scale + r * stride, *z = zero + r * stride;
            const int32_t* lanes = p.lanes + b * LANES;
            const Vector by = WHOLE ? Vector::broadcast(s + group) : Vector::pick(s + p.first[b], lanes);
            const Vector less = WHOLE ? Vector::broadcast(z + group) : Vector::pick(z + p.first[b], lanes);
            for (int t = 0; t < T; t++) {
                sums[r][t].fnma(less, Vector::load(p.sums + (b * T + t) * LANES));
                total[r][t].fma(by, sums[r][t]);
            }
        }
    };
    const uint32_t* codes = row_codes(w, n);
    const int64_t ahead = round_up(PAGE_WORDS, R * words);
    const int64_t full = words / L::WORDS;
    int64_t group = 0, left = per_group;
    Vector sums[R][T];
    for (int64_t b = 0; b < full; b++) {
        for (int r = 0; r < R; r++) _mm_prefetch(reinterpret_cast<const char*>(codes + ahead + r * words + b * L::WORDS), _MM_HINT_T1);
        Product::template block_sums<R, T>(codes + b * L::WORDS, words, p.x + b * T * Product::BYTES, sums);
        finish(b, group, sums);
        if (--left == 0) group++, left = per_group;
    }
    if (full < blocks) {
        uint32_t last[R * L::WORDS] = {};
        for (int r = 0; r < R; r++) std::memcpy(last + r * L::WORDS, codes + r * words + full * L::WORDS, (words - full * L::WORDS) * sizeof(uint32_t));
        Product::template block_sums<R, T>(last, L::WORDS, p.x + full * T * Product::BYTES, sums);
        finish(full, group, sums);
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[t * ldy + n + r] = total[r][t].sum();
}

template <class Product, int T, bool WHOLE>
void gemv_grid(const LrecUniform& w, const Prepared& p, int64_t first, int64_t last, float* scratch, float* y, int64_t ldy) {
    constexpr int R = Product::rows(T);
    const int64_t stride = grid_stride(w);
    float* scale = scratch;
    float* zero = scratch + CHUNK * stride;
    avx2::load_grid(w, first, last - first, stride, scale, zero);
    int64_t n = first;
    for (; n + R <= last; n += R, scale += R * stride, zero += R * stride) gemv_block<Product, R, T, WHOLE>(w, p, n, scale, zero, y, ldy);
    for (; n < last; n++, scale += stride, zero += stride) gemv_block<Product, 1, T, WHOLE>(w, p, n, scale, zero, y, ldy);
}

template <class Product, int T>
void gemv(const LrecUniform& w, char* prepared, int64_t first, int64_t last, float* scratch, float* y, int64_t ldy) {
    const Prepared p = parts<Product>(w, prepared, T);
    const bool whole = w.group_size % Layout<Product::BITS>::BLOCK == 0 || w.group_size >= w.K;
    if (whole) gemv_grid<Product, T, true>(w, p, first, last, scratch, y, ldy);
    else gemv_grid<Product, T, false>(w, p, first, last, scratch, y, ldy);
}

template <class Product>
void gemv_rows(const LrecUniform& w, char* prepared, int64_t T, int64_t first, int64_t last, float* scratch, float* y, int64_t ldy) {
    if (T == 1) gemv<Product, 1>(w, prepared, first, last, scratch, y, ldy);
    else if (T == 2) gemv<Product, 2>(w, prepared, first, last, scratch, y, ldy);
    else gemv<Product, 4>(w, prepared, first, last, scratch, y, ldy);
}

template <class Product>
constexpr Gemv functions() {
    return {prepared_bytes<Product>, prepare<Product>, gemv_rows<Product>};
}
