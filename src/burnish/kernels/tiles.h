// Blocks of 32 x 32 by AMX: products, the packing of their operands, and what vectors of 16 are made of.

#pragma once

#include "common.h"

#ifdef BURNISH_AMX

namespace {

const int64_t BLOCK = 32;

inline int64_t whole_blocks(int64_t tokens) { return (tokens + BLOCK - 1) / BLOCK * BLOCK; }

// sums [32, 32] (+)= left [32, depth] right [depth, 32]; right lies in slabs of 32 rows as two tiles of 16 columns,
// with neighbouring rows side by side.
inline void multiply(
    const bf16* left, int64_t left_stride, const bf16* right, int64_t depth, float* sums, int64_t stride, bool add
) {
    // Compilers do not know that loading a tile reads memory: what was written must not be moved behind it.
    asm volatile("" ::: "memory");
    if (add) {
        _tile_loadd(0, sums, 4 * stride);
        _tile_loadd(1, sums + 16, 4 * stride);
        _tile_loadd(2, sums + 16 * stride, 4 * stride);
        _tile_loadd(3, sums + 16 * stride + 16, 4 * stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32, right += 2 * TILE) {
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + TILE, 64);
        _tile_loadd(4, left + k, 2 * left_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 16 * left_stride + k, 2 * left_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * stride);
    _tile_stored(1, sums + 16, 4 * stride);
    _tile_stored(2, sums + 16 * stride, 4 * stride);
    _tile_stored(3, sums + 16 * stride + 16, 4 * stride);
}

// Transpose 16 x 16 values of 32 bits.
inline void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // quarter q of r[4 n + i] is now column 4 q + i of rows 4 n to 4 n + 3
        const __m512i even_low = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        t[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        t[4 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Load 16 rows, of which the first `valid` exist, from 16 pairs of their columns on; transpose the pairs.
inline void load_transposed(Strided<bf16> x, int64_t first, int64_t valid, int64_t head, int64_t column, __m512i* r) {
    for (int64_t i = 0; i < 16; ++i)
        r[i] = i < valid ? _mm512_loadu_si512(x.at(first + i, head) + column) : _mm512_setzero_si512();
    transpose(r);
}

const __m512i& interleaving() {  // of two halves of 16 values
    alignas(64) static const int16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return *reinterpret_cast<const __m512i*>(order);
}

const __m512i& separating() {  // its inverse
    alignas(64) static const int16_t order[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                  1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    return *reinterpret_cast<const __m512i*>(order);
}

// The right operand [size, 32 tokens] of up to 32 tokens.
inline void pack_columns(Strided<bf16> x, int64_t first, int64_t valid, int64_t head, int64_t size, bf16* packed) {
    for (int64_t column = 0; column < size; column += 32)
        for (int64_t half = 0; half < 2; ++half, packed += TILE) {
            __m512i r[16];
            load_transposed(x, first + 16 * half, valid - 16 * half, head, column, r);
            for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(packed + 32 * i, r[i]);
        }
}

// The right operands [32 tokens, 32 columns] of up to 32 tokens, one after the other.
inline void pack_rows(Strided<bf16> x, int64_t first, int64_t valid, int64_t head, int64_t size, bf16* packed) {
    const __m512i order = interleaving(), zero = _mm512_setzero_si512();
    for (int64_t column = 0; column < size; column += 32, packed += 2 * TILE)
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t t = 2 * i;
            const __m512i even = t < valid ? _mm512_loadu_si512(x.at(first + t, head) + column) : zero;
            const __m512i odd = t + 1 < valid ? _mm512_loadu_si512(x.at(first + t + 1, head) + column) : zero;
            const __m512i left = _mm512_shuffle_i64x2(even, odd, 0x44), right = _mm512_shuffle_i64x2(even, odd, 0xee);
            _mm512_storeu_si512(packed + 32 * i, _mm512_permutexvar_epi16(order, left));
            _mm512_storeu_si512(packed + TILE + 32 * i, _mm512_permutexvar_epi16(order, right));
        }
}

// 2^x, within a few units in the last place; 0 where that is less than fp32 can hold.
inline __m512 exp2_of(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    for (const float term : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 0.24022651f, 0.69314718f, 1.0f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(term));
    return _mm512_scalef_ps(y, n);
}

inline __m512i to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Store two neighbouring rows of 32 values, the first of an even number, in a right operand [rows, 32].
inline void store_pair(bf16* packed, int64_t row, const __m512 (&even)[2], const __m512 (&odd)[2]) {
    bf16* slab = packed + row / BLOCK * 2 * TILE + row % BLOCK / 2 * 32;
    for (int half = 0; half < 2; ++half)
        _mm512_storeu_si512(
            slab + half * TILE, _mm512_permutexvar_epi16(interleaving(), to_bf16(even[half], odd[half]))
        );
}

}  // namespace

#endif
