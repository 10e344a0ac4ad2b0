// What decoding on a CPU spends most of its time in: products of a few rows with a whole weight, and attention of one
// token to the cache of its row; and all that a decoder layer computes before and after its attention, in one call each.
// decoding.py says how to call it.
//
// Sums are fp32. The order of additions depends on sizes alone, never on the number of rows or threads, so that a
// completion does not depend on what it is sampled beside.

#include "common.h"

namespace {

#ifdef BURNISH_AMX

// A weight [N, K] is held as [N / 32][K / 32][2][16][16][2]: tiles of 16 columns and 32 values of K, in the order in
// which they are read, with neighbours in K side by side.
const int64_t COLUMNS = 32, DEPTH = 32;
const int64_t AHEAD = 4096;  // bytes: the hardware's own prefetching keeps a core at half of the memory's rate

void store(const float* left, const float* right, const bf16* bias, bf16* out, int64_t stride, int64_t rows) {
    __m512 add_left = _mm512_setzero_ps(), add_right = _mm512_setzero_ps();
    if (bias) {
        alignas(64) float wide[COLUMNS];
        for (int64_t i = 0; i < COLUMNS; ++i) wide[i] = to_float(bias[i]);
        add_left = _mm512_load_ps(wide), add_right = _mm512_load_ps(wide + 16);
    }
    for (int64_t row = 0; row < rows; ++row) {
        const __m512 low = _mm512_add_ps(_mm512_load_ps(left + 16 * row), add_left);
        const __m512 high = _mm512_add_ps(_mm512_load_ps(right + 16 * row), add_right);
        _mm512_storeu_si512(out + stride * row, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

// Up to 32 rows times 32 columns.
void multiply_block(
    const bf16* input, const bf16* weight, const bf16* bias, bf16* out, int64_t N, int64_t K, int64_t upper, int64_t lower
) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < K; k += DEPTH, weight += 2 * TILE) {
        for (int64_t line = 0; line < 4 * TILE; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(weight) + AHEAD + line, _MM_HINT_T1);
        _tile_loadd(6, weight, 64);
        _tile_loadd(7, weight + TILE, 64);
        _tile_loadd(4, input + k, 2 * K);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (lower) {
            _tile_loadd(5, input + 16 * K + k, 2 * K);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float left[256], right[256];
    _tile_stored(0, left, 64);
    _tile_stored(1, right, 64);
    store(left, right, bias, out, N, upper);
    if (lower) {
        _tile_stored(2, left, 64);
        _tile_stored(3, right, 64);
        store(left, right, bias, out + 16 * N, N, lower);
    }
}

// out [M, N] = input [M, K] weight^T + bias, of which each thread of a team computes some columns; all threads call it.
struct Multiplier {
    int64_t configured = 0;

    void operator()(
        const bf16* input, const bf16* packed, const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K
    ) {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < N / COLUMNS; ++block) {
            for (int64_t row = 0; row < M; row += 32) {
                const int64_t rows = std::min<int64_t>(32, M - row);
                const int64_t upper = std::min<int64_t>(16, rows), lower = rows - upper;
                if (rows != configured) configure(upper, lower), configured = rows;
                const int64_t column = block * COLUMNS;
                multiply_block(
                    input + row * K, packed + column * K, bias ? bias + column : nullptr, out + row * N + column,
                    N, K, upper, lower
                );
            }
        }
    }

    ~Multiplier() {
        if (configured) _tile_release();
    }
};

#endif

void add_row(const bf16* a, const bf16* b, bf16* to, int64_t K) {
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) to[k] = round_bf16(to_float(a[k]) + to_float(b[k]));
}

// x cos + (-second half, first half) sin, in place, with each product rounded as transformers rounds it.
void rotate(bf16* x, const bf16* cos, const bf16* sin, int64_t size) {
    const int64_t half = size / 2;
#pragma omp simd
    for (int64_t d = 0; d < half; ++d) {
        const float a = to_float(x[d]), b = to_float(x[d + half]);
        const float straight = to_float(round_bf16(a * to_float(cos[d])));
        const float turned = to_float(round_bf16(b * to_float(cos[d + half])));
        x[d] = round_bf16(straight - to_float(round_bf16(b * to_float(sin[d]))));
        x[d + half] = round_bf16(turned + to_float(round_bf16(a * to_float(sin[d + half]))));
    }
}

// Weights of a decoder layer, packed where they are multiplied by, and its sizes; biases and norms of heads may be null.
struct Layer {
    const bf16 *input_norm, *query_key_value, *query_key_value_bias, *query_norm, *key_norm, *output, *output_bias;
    const bf16 *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    int64_t hidden, query_heads, kv_heads, head, intermediate;
    float input_epsilon, head_epsilon, mlp_epsilon;
};

// Keys and values of one head in one row's cache; one token's next to another's by `stride`.
template <typename T>
struct Cached {
    T* first;
    int64_t stride;
    T* at(int64_t token) const { return first + token * stride; }
};

// Return keys or values as sums read them: those in 8 bits widened once for all queries, into `wide`.
template <typename T>
inline const T* readable(const T* from, float*, int64_t) {
    return from;
}

inline const float* readable(const int8_t* from, float* wide, int64_t size) {
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) wide[d] = from[d];
    return wide;
}

// scores[r, j] = queries[r] . keys[j]; SIZE is the head size, or 0 for one that is known only now.
template <int SIZE, typename T>
void score(
    const float* queries, Cached<T> keys, float* scores, float* wide, int64_t length, int64_t repeats, int64_t any_size
) {
    const int64_t size = SIZE ? SIZE : any_size;
    for (int64_t j = 0; j < length; ++j) {
        const auto* key = readable(keys.at(j), wide, size);
        for (int64_t r = 0; r < repeats; ++r) {
            const float* query = queries + r * size;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < size; ++d) sum += query[d] * to_float(key[d]);
            scores[r * length + j] = sum;
        }
    }
}

// Store a token's keys or values of a head as they are.
template <typename T>
void keep(const T* from, Cached<T> to, Cached<bf16>, int64_t place, int64_t size) {
    memcpy(to.at(place), from, sizeof(T) * size);
}

// Store them in 8 bits, x = scale * round(x / scale) with scale = max |x| / 127; one that is no number makes all so.
template <typename T>
void keep(const T* from, Cached<int8_t> to, Cached<bf16> scales, int64_t place, int64_t size) {
    float most = 0, poison = 0;
#pragma omp simd reduction(max : most)
    for (int64_t d = 0; d < size; ++d) most = std::max(most, fabsf(to_float(from[d])));
#pragma omp simd reduction(+ : poison)
    for (int64_t d = 0; d < size; ++d) poison += 0 * to_float(from[d]);
    const bf16 scale = round_bf16(most / 127 + poison);
    const float divisor = poison == 0 && scale ? to_float(scale) : 1, bound = poison == 0 ? 127 : 0;
    *scales.at(place) = scale;
    int8_t* out = to.at(place);
    for (int64_t d = 0; d < size; ++d)
        out[d] = static_cast<int8_t>(std::max(-bound, std::min(rintf(to_float(from[d]) / divisor), bound)));
}

// Multiply scores or weights by the scales of their tokens, if there are any; `wide` holds `length` values.
void rescale(float* scores, Cached<bf16> scales, float* wide, int64_t length, int64_t repeats) {
    if (!scales.first) return;
    for (int64_t j = 0; j < length; ++j) wide[j] = to_float(*scales.at(j));
    for (int64_t r = 0; r < repeats; ++r) {
#pragma omp simd
        for (int64_t j = 0; j < length; ++j) scores[r * length + j] *= wide[j];
    }
}

// Turn scores into weights that sum to 1; return the log of what they were divided by.
float normalise(float* scores, int64_t length) {
    float most = scores[0], total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < length; ++j) most = std::max(most, scores[j]);
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < length; ++j) total += scores[j] = exp_of(scores[j] - most);
    const float factor = 1 / total;
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) scores[j] *= factor;
    return most + logf(total);
}

// sums[r] = sum of weights[r, j] values[j], four tokens at a time: each time reads and writes all sums.
template <int SIZE, typename T>
void combine(
    const float* weights, Cached<T> values, float* sums, float* wide, int64_t length, int64_t repeats, int64_t any_size
) {
    const int64_t size = SIZE ? SIZE : any_size;
    for (int64_t i = 0; i < repeats * size; ++i) sums[i] = 0;
    int64_t j = 0;
    for (; j + 4 <= length; j += 4) {
        const auto *a = readable(values.at(j), wide, size), *b = readable(values.at(j + 1), wide + size, size);
        const auto *c = readable(values.at(j + 2), wide + 2 * size, size);
        const auto *e = readable(values.at(j + 3), wide + 3 * size, size);
        for (int64_t r = 0; r < repeats; ++r) {
            const float* w = weights + r * length + j;
            float* sum = sums + r * size;
#pragma omp simd
            for (int64_t d = 0; d < size; ++d)
                sum[d] += w[0] * to_float(a[d]) + w[1] * to_float(b[d]) + w[2] * to_float(c[d]) + w[3] * to_float(e[d]);
        }
    }
    for (; j < length; ++j) {
        const auto* value = readable(values.at(j), wide, size);
        for (int64_t r = 0; r < repeats; ++r) {
            const float weight = weights[r * length + j];
            float* sum = sums + r * size;
#pragma omp simd
            for (int64_t d = 0; d < size; ++d) sum[d] += weight * to_float(value[d]);
        }
    }
}

struct Sizes {
    int64_t rows, width, kv_heads, repeats, size, value_size, room;
};

// out[t, h] = softmax(scale q[t, h] . keys) values, over the keys of t's row up to t's own, which is stored first.
// The cache is of type C: T without scales, or 8 bits with one per token and head.
template <typename T, typename C>
void attend(
    Strided<T> query, Strided<T> key, Strided<T> value, C* all_keys, C* all_values, bf16* key_scales,
    bf16* value_scales, const int64_t* places, T* out, float* norms, Sizes n, float scale
) {
    const auto scores_of = n.size == 64 ? score<64, C> : n.size == 128 ? score<128, C> : score<0, C>;
    const auto sums_of = n.value_size == 64 ? combine<64, C> : n.value_size == 128 ? combine<128, C> : combine<0, C>;
#pragma omp parallel
    {
        const int64_t widest = std::max(n.room, 4 * std::max(n.size, n.value_size));
        const int64_t scratch = n.repeats * (n.size + n.value_size + n.room) + widest;
        float* queries = static_cast<float*>(malloc(sizeof(float) * scratch));
        float* sums = queries + n.repeats * n.size;
        float* scores = sums + n.repeats * n.value_size;
        float* wide = scores + n.repeats * n.room;
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < n.rows * n.kv_heads; ++pair) {
            const int64_t row = pair / n.kv_heads, head = pair % n.kv_heads;
            const int64_t first = row * n.room * n.kv_heads + head;
            const Cached<C> keys = {all_keys + first * n.size, n.kv_heads * n.size};
            const Cached<C> values = {all_values + first * n.value_size, n.kv_heads * n.value_size};
            const Cached<bf16> of_keys = {key_scales ? key_scales + first : nullptr, n.kv_heads};
            const Cached<bf16> of_values = {value_scales ? value_scales + first : nullptr, n.kv_heads};
            for (int64_t token = row * n.width; token < (row + 1) * n.width; ++token) {
                const int64_t place = places[token] - row * n.room, length = place + 1;
                keep(key.at(token, head), keys, of_keys, place, n.size);
                keep(value.at(token, head), values, of_values, place, n.value_size);
                for (int64_t r = 0; r < n.repeats; ++r) {
                    const T* from = query.at(token, head * n.repeats + r);
                    for (int64_t d = 0; d < n.size; ++d) queries[r * n.size + d] = scale * to_float(from[d]);
                }
                scores_of(queries, keys, scores, wide, length, n.repeats, n.size);
                rescale(scores, of_keys, wide, length, n.repeats);
                const int64_t result = token * n.kv_heads * n.repeats + head * n.repeats;
                for (int64_t r = 0; r < n.repeats; ++r) norms[result + r] = normalise(scores + r * length, length);
                rescale(scores, of_values, wide, length, n.repeats);
                sums_of(scores, values, sums, wide, length, n.repeats, n.value_size);
                T* to = out + result * n.value_size;
                for (int64_t i = 0; i < n.repeats * n.value_size; ++i) from_float(sums[i], to + i);
            }
        }
        free(queries);
    }
}

}  // namespace

extern "C" {

// Return whether this process may use AMX.
int has_product() { return may_use_amx(); }

#ifdef BURNISH_AMX

// Lay out a weight [N, K] for `product`; N and K are multiples of 32.
void pack(const bf16* weight, bf16* packed, int64_t N, int64_t K) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(weight);
    uint32_t* out = reinterpret_cast<uint32_t*>(packed);
#pragma omp parallel for schedule(static)
    for (int64_t tiles = 0; tiles < N / 16; ++tiles) {
        uint32_t* block = out + tiles / 2 * COLUMNS * K / 2 + tiles % 2 * TILE / 2;
        for (int64_t column = 0; column < 16; ++column) {
            const uint32_t* from = pairs + (tiles * 16 + column) * K / 2;
            for (int64_t k = 0; k < K / 2; ++k) block[k / 16 * TILE + k % 16 * 16 + column] = from[k];
        }
    }
}

// out [M, N] = input [M, K] weight^T + bias; bias may be null.
void product(const bf16* input, const bf16* packed, const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K) {
#pragma omp parallel
    {
        Multiplier multiply;
        multiply(input, packed, bias, out, M, N, K);
    }
}

// Queries, keys and values of a layer: out [T, (query_heads + 2 kv_heads) head] = rotated(norm(hidden) weight^T + bias),
// where the queries and keys of each head may be normalised before they are rotated; normed [T, hidden] is scratch.
void project(
    const Layer* layer, const bf16* hidden, const bf16* cos, const bf16* sin, bf16* normed, bf16* out, int64_t T
) {
    const Layer& n = *layer;
    const int64_t size = n.head, rotated = n.query_heads + n.kv_heads, width = (rotated + n.kv_heads) * size;
#pragma omp parallel
    {
        Multiplier multiply;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; ++t)
            norm_row(hidden + t * n.hidden, n.input_norm, normed + t * n.hidden, n.hidden, n.input_epsilon);
        multiply(normed, n.query_key_value, n.query_key_value_bias, out, T, width, n.hidden);
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < T * rotated; ++pair) {
            const int64_t t = pair / rotated, head = pair % rotated;
            bf16* x = out + t * width + head * size;
            const bf16* norm = head < n.query_heads ? n.query_norm : n.key_norm;
            if (norm) norm_row(x, norm, x, size, n.head_epsilon);
            rotate(x, cos + t * size, sin + t * size, size);
        }
    }
}

// The rest of a layer: out = h + down(silu(gate(x)) up(x)) with h = hidden + output(attended) and x = norm(h);
// scratch holds T (hidden + 3 intermediate) values.
void transform(const Layer* layer, const bf16* hidden, const bf16* attended, bf16* scratch, bf16* out, int64_t T) {
    const Layer& n = *layer;
    const int64_t H = n.hidden, I = n.intermediate;
    bf16 *normed = scratch, *gate_up = normed + T * H, *product = gate_up + 2 * T * I;
#pragma omp parallel
    {
        Multiplier multiply;
        multiply(attended, n.output, n.output_bias, out, T, H, n.query_heads * n.head);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; ++t) {
            add_row(hidden + t * H, out + t * H, out + t * H, H);
            norm_row(out + t * H, n.mlp_norm, normed + t * H, H, n.mlp_epsilon);
        }
        multiply(normed, n.gate_up, n.gate_up_bias, gate_up, T, 2 * I, H);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < T * I / COLUMNS; ++block) {
            const int64_t t = block * COLUMNS / I, first = block * COLUMNS % I;
            const bf16 *gate = gate_up + t * 2 * I + first, *up = gate + I;
#pragma omp simd
            for (int64_t i = 0; i < COLUMNS; ++i)
                product[t * I + first + i] = round_bf16(to_float(round_bf16(silu(to_float(gate[i])))) * to_float(up[i]));
        }
        multiply(product, n.down, n.down_bias, normed, T, H, I);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; ++t) add_row(out + t * H, normed + t * H, out + t * H, H);
    }
}

#endif

#define BURNISH_ATTEND(NAME, T, C)                                                                                     \
    void NAME(                                                                                                         \
        const T* query, int64_t query_token, int64_t query_head, const T* key, int64_t key_token, int64_t key_head,    \
        const T* value, int64_t value_token, int64_t value_head, C* keys, C* values, bf16* key_scales,                 \
        bf16* value_scales, const int64_t* places, T* out, float* norms, int64_t rows, int64_t width,                  \
        int64_t kv_heads, int64_t repeats, int64_t size, int64_t value_size, int64_t room, float scale                 \
    ) {                                                                                                                \
        attend<T, C>(                                                                                                  \
            {query, query_token, query_head}, {key, key_token, key_head}, {value, value_token, value_head}, keys,      \
            values, key_scales, value_scales, places, out, norms,                                                      \
            {rows, width, kv_heads, repeats, size, value_size, room}, scale                                            \
        );                                                                                                             \
    }

BURNISH_ATTEND(attend_bf16, bf16, bf16)
BURNISH_ATTEND(attend_fp32, float, float)
BURNISH_ATTEND(attend_bf16_int8, bf16, int8_t)
BURNISH_ATTEND(attend_fp32_int8, float, int8_t)
}
