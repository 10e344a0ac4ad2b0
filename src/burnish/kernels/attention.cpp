// Attention of packed rows on a CPU with AMX, forward and backward, in bf16 with sums in fp32: what
// burnish.model.prefix defines; and of the tokens of a decode forward to their prompts. attention.py says how to call it.
//
// Everything is computed transposed, keys by queries: a vector then holds one key's scores for 16 queries, so that
// maxima and sums over keys need no reduction inside a vector. Sequences are padded to blocks of 32 tokens in packed
// copies of their keys and values. Sums are added in an order that depends on sizes alone, not on threads or on the
// rest of the row.

#include "tiles.h"

#ifdef BURNISH_AMX

namespace {

const int64_t CHUNK = 128;  // keys whose scores are held at a time
const float LOG2E = 1.44269504f, LN2 = 0.693147181f, FLOOR = -1e30f;

// Rows of the table of sequences. A completion sees its whole prompt; a prompt's own prompt_length is 0. A prompt whose
// first tokens have keys but no queries starts before the row, and its queries begin with token first_query.
struct Sequence {
    int64_t start, length, first_query, place, prompt_length, prompt_place;  // places are in packed copies
};

struct Work {
    const Sequence* sequences;
    int64_t num_sequences, heads, repeats, size, value_size, padded, window;
    float scale;
    int64_t kv_heads() const { return heads / repeats; }
};

// Copy a sequence's tokens of one head to rows [padded, size] and columns [size, padded], from its place on, with zeros
// up to a whole block; either may be null.
void pack_sequence(
    Strided<bf16> x, const Sequence& s, int64_t head, int64_t size, int64_t padded, bf16* rows, bf16* columns
) {
    const int64_t tokens = whole_blocks(s.length);
    for (int64_t t = 0; rows && t < tokens; ++t) {
        bf16* row = rows + (s.place + t) * size;
        if (t < s.length)
            memcpy(row, x.at(s.start + t, head), sizeof(bf16) * size);
        else
            memset(row, 0, sizeof(bf16) * size);
    }
    const __m512i order = separating();
    for (int64_t t = 0; columns && t < tokens; t += 16)
        for (int64_t column = 0; column < size; column += 32) {
            __m512i r[16];
            load_transposed(x, s.start + t, s.length - t, head, column, r);
            bf16* out = columns + column * padded + s.place + t;
            for (int64_t i = 0; i < 16; ++i, out += 2 * padded) {
                const __m512i pair = _mm512_permutexvar_epi16(order, r[i]);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(pair));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + padded), _mm512_extracti64x4_epi64(pair, 1));
            }
        }
}

// Call visit(head, sequence) for all heads of keys; all threads of a team call this, and each visits some.
template <typename Visit>
void for_sequences(const Work& work, Visit visit) {
#pragma omp for schedule(dynamic)
    for (int64_t pair = 0; pair < work.kv_heads() * work.num_sequences; ++pair)
        visit(pair / work.num_sequences, work.sequences[pair % work.num_sequences]);
}

// A block of queries of one sequence, which see its tokens up to their own, or its prompt alone.
struct Queries {
    const Sequence& sequence;
    int64_t first;
    bool see_sequence = true;
    int64_t valid() const { return std::min(BLOCK, sequence.length - first); }
    int64_t row() const { return sequence.start + first; }
    int64_t position() const { return sequence.prompt_length + first; }
};

// Up to CHUNK keys at `place` of the packed copies, of which `valid` exist, padded to whole blocks.
struct Keys {
    int64_t place, position, valid;
    int64_t padded() const { return whole_blocks(valid); }
};

// Call visit(keys) for all keys that a block of queries may see, in chunks.
template <typename Visit>
void for_keys(const Work& work, const Queries& queries, Visit visit) {
    const Sequence& s = queries.sequence;
    const int64_t seen = queries.position() - work.window + 1;  // by the first query, from this position on
    const int64_t places[2] = {s.prompt_place, s.place}, positions[2] = {0, s.prompt_length};
    const int64_t counts[2] = {s.prompt_length, queries.see_sequence ? queries.first + queries.valid() : 0};
    for (int part = 0; part < 2; ++part) {
        const int64_t skipped = std::max<int64_t>(0, seen - positions[part]) / BLOCK * BLOCK;
        for (int64_t key = skipped; key < counts[part]; key += CHUNK)
            visit(Keys{places[part] + key, positions[part] + key, std::min(CHUNK, counts[part] - key)});
    }
}

// Which of 16 queries see a key.
struct Visibility {
    bool whole;
    __m512i positions[2];
    const Keys& keys;
    int64_t window;

    Visibility(const Work& work, const Queries& queries, const Keys& keys) : keys(keys), window(work.window) {
        const int64_t first = queries.position(), last = first + BLOCK - 1;
        whole = keys.valid % BLOCK == 0 && keys.position + keys.valid - 1 <= first && last - keys.position < window;
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int half = 0; half < 2; ++half)
            positions[half] = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(first + 16 * half)));
    }

    __mmask16 of(int64_t key, int half) const {
        if (whole) return 0xffff;
        if (key >= keys.valid) return 0;
        const int64_t position = keys.position + key, last = std::min<int64_t>(position + window, INT32_MAX);
        return _mm512_cmpge_epi32_mask(positions[half], _mm512_set1_epi32(static_cast<int>(position))) &
               _mm512_cmplt_epi32_mask(positions[half], _mm512_set1_epi32(static_cast<int>(last)));
    }
};

// Memory of one thread; its tiles are configured while it lives.
struct Scratch {
    char* memory;
    float *scores, *pulls, *sums;
    bf16 *weights, *slopes, *slopes_packed, *query_columns, *query_rows, *grad_columns, *grad_rows;

    explicit Scratch(const Work& work) {
        const int64_t widest = std::max(work.size, work.value_size), block = sizeof(float) * CHUNK * BLOCK;
        const int64_t operand = sizeof(bf16) * widest * BLOCK;
        memory = static_cast<char*>(aligned_alloc(64, 2 * block + 2 * operand + 3 * block / 2 + 4 * operand));
        char* next = memory;
        const auto take = [&next](int64_t bytes) { return next += bytes, next - bytes; };
        scores = reinterpret_cast<float*>(take(block));
        pulls = reinterpret_cast<float*>(take(block));
        sums = reinterpret_cast<float*>(take(2 * operand));
        for (bf16** part : {&weights, &slopes, &slopes_packed}) *part = reinterpret_cast<bf16*>(take(block / 2));
        for (bf16** part : {&query_columns, &query_rows, &grad_columns, &grad_rows})
            *part = reinterpret_cast<bf16*>(take(operand));
        configure(16, 16);
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        free(memory);
        _tile_release();
    }

    // Write sums [size, 32], times a factor for each of the 32 tokens, to the rows of the first `valid` tokens.
    void write(const __m512* factors, int64_t size, int64_t valid, bf16* out, int64_t stride) const {
        for (int64_t half = 0; half < 2; ++half)
            for (int64_t column = 0; column < size; column += 32) {
                __m512i low[16], high[16];
                for (int64_t i = 0; i < 16; ++i) {
                    const float* from = sums + (column + i) * BLOCK + 16 * half;
                    low[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(from), factors[half]));
                    high[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(from + 16 * BLOCK), factors[half]));
                }
                transpose(low);
                transpose(high);
                for (int64_t i = 0; i < std::min<int64_t>(16, valid - 16 * half); ++i) {
                    const __m512i row = to_bf16(_mm512_castsi512_ps(low[i]), _mm512_castsi512_ps(high[i]));
                    _mm512_storeu_si512(out + (16 * half + i) * stride + column, row);
                }
            }
    }
};

// One head's output for a block of queries, by an online softmax over chunks of keys; scores are in base 2.
void attend_block(
    const Work& work, const Queries& queries, Scratch& scratch, const bf16* keys, const bf16* values, bf16* out,
    float* norms
) {
    const __m512 scale = _mm512_set1_ps(work.scale * LOG2E);
    __m512 most[2] = {_mm512_set1_ps(FLOOR), _mm512_set1_ps(FLOOR)};
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    bool is_first = true;
    for_keys(work, queries, [&](const Keys& chunk) {
        const Visibility visible(work, queries, chunk);
        const int64_t count = chunk.padded();
        for (int64_t key = 0; key < count; key += BLOCK)
            multiply(keys + (chunk.place + key) * work.size, work.size, scratch.query_columns, work.size,
                     scratch.scores + key * BLOCK, BLOCK, false);
        __m512 decay[2];
        for (int half = 0; half < 2; ++half) {
            __m512 highest = most[half];
            for (int64_t key = 0; key < count; ++key) {
                float* at = scratch.scores + key * BLOCK + 16 * half;
                const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(at), scale);
                const __m512 kept = _mm512_mask_blend_ps(visible.of(key, half), _mm512_set1_ps(FLOOR), score);
                _mm512_storeu_ps(at, kept);
                highest = _mm512_max_ps(kept, highest);
            }
            // What queries without a visible key so far have gathered is multiplied by 0 once they see one.
            decay[half] = exp2_of(_mm512_sub_ps(most[half], highest));
            most[half] = highest;
            total[half] = _mm512_mul_ps(total[half], decay[half]);
        }
        for (int64_t key = 0; key < count; key += 2) {
            __m512 weight[2][2];
            for (int odd = 0; odd < 2; ++odd)
                for (int half = 0; half < 2; ++half) {
                    const __m512 score = _mm512_loadu_ps(scratch.scores + (key + odd) * BLOCK + 16 * half);
                    weight[odd][half] = exp2_of(_mm512_sub_ps(score, most[half]));
                    total[half] = _mm512_add_ps(total[half], weight[odd][half]);
                }
            store_pair(scratch.weights, key, weight[0], weight[1]);
        }
        for (int64_t i = 0; !is_first && i < 2 * work.value_size; ++i) {
            float* at = scratch.sums + 16 * i;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), decay[i % 2]));
        }
        for (int64_t row = 0; row < work.value_size; row += BLOCK)
            multiply(values + row * work.padded + chunk.place, work.padded, scratch.weights, count,
                     scratch.sums + row * BLOCK, BLOCK, !is_first);
        is_first = false;
    });
    alignas(64) float base[BLOCK], sum[BLOCK];
    __m512 factors[2];
    for (int half = 0; half < 2; ++half) {
        factors[half] = _mm512_div_ps(_mm512_set1_ps(1), total[half]);
        _mm512_store_ps(base + 16 * half, most[half]);
        _mm512_store_ps(sum + 16 * half, total[half]);
    }
    scratch.write(factors, work.value_size, queries.valid(), out, work.heads * work.value_size);
    for (int64_t i = 0; i < queries.valid(); ++i) norms[i] = LN2 * base[i] + logf(sum[i]);
}

// What a block of queries adds to the gradients of one head's keys and values, in fp32, and its queries' gradient.
struct Gradients {
    const bf16 *key_rows, *key_columns, *value_rows;
    float *key, *value;
};

void attend_block_backward(
    const Work& work, const Queries& queries, Scratch& scratch, const Gradients& g, const float* norms,
    const float* deltas, bf16* grad_query
) {
    const __m512 scale = _mm512_set1_ps(work.scale * LOG2E);
    const int64_t size = work.size, value_size = work.value_size;
    bool is_first = true;
    for_keys(work, queries, [&](const Keys& chunk) {
        const Visibility visible(work, queries, chunk);
        const int64_t count = chunk.padded();
        for (int64_t key = 0; key < count; key += BLOCK) {
            multiply(g.key_rows + (chunk.place + key) * size, size, scratch.query_columns, size,
                     scratch.scores + key * BLOCK, BLOCK, false);
            multiply(g.value_rows + (chunk.place + key) * value_size, value_size, scratch.grad_columns, value_size,
                     scratch.pulls + key * BLOCK, BLOCK, false);
        }
        for (int64_t key = 0; key < count; key += 2) {
            __m512 slope[2][2];
            for (int odd = 0; odd < 2; ++odd) {
                __m512 weight[2];
                for (int half = 0; half < 2; ++half) {
                    const int64_t at = (key + odd) * BLOCK + 16 * half;
                    const __m512 norm = _mm512_loadu_ps(norms + 16 * half), delta = _mm512_loadu_ps(deltas + 16 * half);
                    const __m512 power = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scratch.scores + at), scale, norm));
                    weight[half] = _mm512_maskz_mov_ps(visible.of(key + odd, half), power);
                    const __m512 pull = _mm512_sub_ps(_mm512_loadu_ps(scratch.pulls + at), delta);
                    slope[odd][half] = _mm512_mul_ps(weight[half], pull);
                }
                const int64_t row = (key + odd) * BLOCK;
                _mm512_storeu_si512(scratch.weights + row, to_bf16(weight[0], weight[1]));
                _mm512_storeu_si512(scratch.slopes + row, to_bf16(slope[odd][0], slope[odd][1]));
            }
            store_pair(scratch.slopes_packed, key, slope[0], slope[1]);
        }
        for (int64_t key = 0; key < count; key += BLOCK) {
            for (int64_t column = 0; column < value_size; column += BLOCK)
                multiply(scratch.weights + key * BLOCK, BLOCK, scratch.grad_rows + column * BLOCK, BLOCK,
                         g.value + (chunk.place + key) * value_size + column, value_size, true);
            for (int64_t column = 0; column < size; column += BLOCK)
                multiply(scratch.slopes + key * BLOCK, BLOCK, scratch.query_rows + column * BLOCK, BLOCK,
                         g.key + (chunk.place + key) * size + column, size, true);
        }
        for (int64_t row = 0; row < size; row += BLOCK)
            multiply(g.key_columns + row * work.padded + chunk.place, work.padded, scratch.slopes_packed, count,
                     scratch.sums + row * BLOCK, BLOCK, !is_first);
        is_first = false;
    });
    const __m512 factors[2] = {_mm512_set1_ps(work.scale), _mm512_set1_ps(work.scale)};
    scratch.write(factors, size, queries.valid(), grad_query, work.heads * size);
}

// out . grad_out of a block of queries, which is the sum of their weights times the gradients of these.
void find_deltas(
    const Queries& queries, Strided<bf16> out, Strided<bf16> grad_out, int64_t head, int64_t size, float* deltas
) {
    for (int64_t i = 0; i < BLOCK; ++i) {
        float sum = 0;
        if (i < queries.valid()) {
            const bf16 *a = out.at(queries.row() + i, head), *b = grad_out.at(queries.row() + i, head);
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < size; ++d) sum += to_float(a[d]) * to_float(b[d]);
        }
        deltas[i] = sum;
    }
}

// out = factor times the sum of `parts` rows.
void add_parts(const float* sums, int64_t stride, int64_t parts, float factor, bf16* out, int64_t size) {
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) {
        float total = 0;
        for (int64_t part = 0; part < parts; ++part) total += sums[part * stride + d];
        out[d] = round_bf16(factor * total);
    }
}

// Prompts in a cache [prompts, room, kv_heads, size], and the tokens that continue each: those of prompt p are
// tokens[first[p]] up to tokens[first[p + 1]].
struct Prompts {
    const bf16 *keys, *values;
    const int64_t *lengths, *first, *tokens;
    int64_t num_prompts, room;
};

// Packed copies of one head of one prompt, and what a block of queries is gathered from and written to.
struct PromptScratch {
    char* memory;
    bf16 *key_rows, *value_columns, *queries, *out;

    explicit PromptScratch(const Work& work) {
        const int64_t rows = sizeof(bf16) * work.size, columns = sizeof(bf16) * work.value_size;
        memory = static_cast<char*>(aligned_alloc(64, (work.padded + BLOCK) * (rows + columns)));
        key_rows = reinterpret_cast<bf16*>(memory);
        value_columns = key_rows + work.padded * work.size;
        queries = value_columns + work.padded * work.value_size;
        out = queries + BLOCK * work.size;
    }
    PromptScratch(const PromptScratch&) = delete;
    ~PromptScratch() { free(memory); }
};

// Add b, whose weights sum to e^b_norm, to the average a of weights that sum to e^a_norm.
void merge(bf16* a, float a_norm, const bf16* b, float b_norm, int64_t size) {
    const float share = 1 / (1 + expf(a_norm - b_norm));
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) {
        const float own = to_float(a[d]);
        a[d] = round_bf16(own + share * (to_float(b[d]) - own));
    }
}

}  // namespace

extern "C" {

// Attention of tokens to their prompts, merged into that to their own rows: out [T, heads, value_size] with its log
// normalisers norms [T, heads]. The heads of all tokens of a prompt that share a head of keys are one list of queries.
void attend_prompts(
    const Work* given, const Prompts* given_prompts, const Strided<bf16>* query, const float* norms, bf16* out
) {
    const Prompts& prompts = *given_prompts;
    const int64_t kv_heads = given->kv_heads(), heads = given->heads;
    Work work = *given;
    work.heads = 1;  // the rows of a block's output follow one another
#pragma omp parallel
    {
        Scratch scratch(work);
        PromptScratch own(work);
#pragma omp for schedule(dynamic)
        for (int64_t pair = 0; pair < kv_heads * prompts.num_prompts; ++pair) {
            const int64_t prompt = pair / kv_heads, kv_head = pair % kv_heads, length = prompts.lengths[prompt];
            const int64_t* tokens = prompts.tokens + prompts.first[prompt];
            const int64_t count = (prompts.first[prompt + 1] - prompts.first[prompt]) * work.repeats;
            if (!count) continue;
            const int64_t start = prompt * prompts.room * kv_heads;
            const Strided<bf16> keys = {prompts.keys + start * work.size, kv_heads * work.size, work.size};
            const Strided<bf16> values = {
                prompts.values + start * work.value_size, kv_heads * work.value_size, work.value_size
            };
            const Sequence cached = {0, length, 0, 0, 0, 0}, asking = {0, count, 0, 0, length, 0};
            pack_sequence(keys, cached, kv_head, work.size, work.padded, own.key_rows, nullptr);
            pack_sequence(values, cached, kv_head, work.value_size, work.padded, nullptr, own.value_columns);
            for (int64_t first = 0; first < count; first += BLOCK) {
                const Queries queries{asking, first, false};
                const auto place = [&](int64_t i) {
                    return tokens[(first + i) / work.repeats] * heads + kv_head * work.repeats + (first + i) % work.repeats;
                };
                for (int64_t i = 0; i < queries.valid(); ++i)
                    memcpy(own.queries + i * work.size, query->at(place(i) / heads, place(i) % heads),
                           sizeof(bf16) * work.size);
                const Strided<bf16> gathered = {own.queries, work.size, 0};
                pack_columns(gathered, 0, queries.valid(), 0, work.size, scratch.query_columns);
                float block_norms[BLOCK];
                attend_block(work, queries, scratch, own.key_rows, own.value_columns, own.out, block_norms);
                for (int64_t i = 0; i < queries.valid(); ++i)
                    merge(out + place(i) * work.value_size, norms[place(i)], own.out + i * work.value_size,
                          block_norms[i], work.value_size);
            }
        }
    }
}

// out [T, heads, value_size] and the natural log of the sum of exponentials, norms [heads, T], of all sequences.
// blocks [num_blocks, 2] are (sequence, first query); key_rows [kv_heads, padded, size] and value_columns
// [kv_heads, value_size, padded] are scratch.
void attend_rows(
    const Work* given, const int64_t* blocks, int64_t num_blocks, const Strided<bf16>* query, const Strided<bf16>* key,
    const Strided<bf16>* value, bf16* key_rows, bf16* value_columns, bf16* out, float* norms, int64_t T
) {
    const Work& work = *given;
#pragma omp parallel
    {
        Scratch scratch(work);
        for_sequences(work, [&](int64_t head, const Sequence& s) {
            pack_sequence(*key, s, head, work.size, work.padded, key_rows + head * work.padded * work.size, nullptr);
            pack_sequence(*value, s, head, work.value_size, work.padded, nullptr,
                          value_columns + head * work.padded * work.value_size);
        });
#pragma omp for schedule(dynamic)
        for (int64_t pair = 0; pair < work.heads * num_blocks; ++pair) {
            const int64_t head = pair / num_blocks, *block = blocks + 2 * (pair % num_blocks);
            const int64_t kv_head = head / work.repeats;
            const Queries queries{work.sequences[block[0]], block[1]};
            pack_columns(*query, queries.row(), queries.valid(), head, work.size, scratch.query_columns);
            attend_block(
                work, queries, scratch, key_rows + kv_head * work.padded * work.size,
                value_columns + kv_head * work.padded * work.value_size,
                out + (queries.row() * work.heads + head) * work.value_size, norms + head * T + queries.row()
            );
        }
    }
}

// Gradients of `attend_rows`: grad_query [T, heads, size], grad_key [T, kv_heads, size] and grad_value
// [T, kv_heads, value_size]. Sequences first[n] to first[n + 1] share keys. A group of `together` heads of queries of
// one head of keys adds to sums of its own, key_sums [heads / together, padded, size] and value_sums, given as zeros;
// key_rows, key_columns and value_rows are scratch.
void attend_rows_backward(
    const Work* given, const int64_t* first, int64_t num_groups, const Strided<bf16>* query, const Strided<bf16>* key,
    const Strided<bf16>* value, const Strided<bf16>* out, const Strided<bf16>* grad_out, const float* norms,
    bf16* key_rows, bf16* key_columns, bf16* value_rows, float* key_sums, float* value_sums, int64_t together,
    bf16* grad_query, bf16* grad_key, bf16* grad_value, int64_t T
) {
    const Work& work = *given;
    const int64_t keys_size = work.padded * work.size, values_size = work.padded * work.value_size;
    const int64_t parts = work.repeats / together;
#pragma omp parallel
    {
        Scratch scratch(work);
        for_sequences(work, [&](int64_t head, const Sequence& s) {
            bf16 *own_keys = key_rows + head * keys_size, *own_columns = key_columns + head * keys_size;
            pack_sequence(*key, s, head, work.size, work.padded, own_keys, own_columns);
            pack_sequence(*value, s, head, work.value_size, work.padded, value_rows + head * values_size, nullptr);
        });
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < work.heads / together * num_groups; ++task) {
            const int64_t part = task / num_groups, group = task % num_groups, kv_head = part / parts;
            const Gradients gradients = {
                key_rows + kv_head * keys_size, key_columns + kv_head * keys_size, value_rows + kv_head * values_size,
                key_sums + part * keys_size, value_sums + part * values_size,
            };
            for (int64_t number = first[group]; number < first[group + 1]; ++number) {
                const Sequence& s = work.sequences[number];
                for (int64_t head = part * together; head < (part + 1) * together; ++head)
                    for (int64_t token = s.first_query; token < s.length; token += BLOCK) {
                        const Queries queries{s, token};
                        const int64_t row = queries.row(), valid = queries.valid();
                        pack_columns(*query, row, valid, head, work.size, scratch.query_columns);
                        pack_rows(*query, row, valid, head, work.size, scratch.query_rows);
                        pack_columns(*grad_out, row, valid, head, work.value_size, scratch.grad_columns);
                        pack_rows(*grad_out, row, valid, head, work.value_size, scratch.grad_rows);
                        alignas(64) float own_norms[BLOCK], deltas[BLOCK];
                        for (int64_t i = 0; i < BLOCK; ++i)
                            own_norms[i] = i < valid ? LOG2E * norms[head * T + row + i] : 0;
                        find_deltas(queries, *out, *grad_out, head, work.value_size, deltas);
                        bf16* result = grad_query + (row * work.heads + head) * work.size;
                        attend_block_backward(work, queries, scratch, gradients, own_norms, deltas, result);
                    }
            }
        }
        for_sequences(work, [&](int64_t head, const Sequence& s) {
            for (int64_t t = 0; t < s.length; ++t) {
                const int64_t row = (s.start + t) * work.kv_heads() + head;
                const float* key_sum = key_sums + head * parts * keys_size + (s.place + t) * work.size;
                const float* value_sum = value_sums + head * parts * values_size + (s.place + t) * work.value_size;
                add_parts(key_sum, keys_size, parts, work.scale, grad_key + row * work.size, work.size);
                add_parts(value_sum, values_size, parts, 1, grad_value + row * work.value_size, work.value_size);
            }
        });
    }
}
}

#endif

extern "C" int has_attention() { return may_use_amx(); }
