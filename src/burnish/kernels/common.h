// What the kernels share: bf16 values, which are handled as 16-bit integers, norms and SiLU of a row, strided tensors,
// and AMX.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define BURNISH_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

typedef uint16_t bf16;

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline bf16 round_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) { *out = round_bf16(x); }

// weight * x / sqrt(mean of squares + epsilon), rounded to bf16 before the weight as well as after.
inline void norm_row(const bf16* from, const bf16* weight, bf16* to, int64_t K, float epsilon) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < K; ++k) sum += to_float(from[k]) * to_float(from[k]);
    const float factor = 1 / sqrtf(sum / K + epsilon);
#pragma omp simd
    for (int64_t k = 0; k < K; ++k)
        to[k] = round_bf16(to_float(weight[k]) * to_float(round_bf16(factor * to_float(from[k]))));
}

// e^x for x <= 0, in a form that compilers vectorise: 2^n times a polynomial of degree 6, within 2 units in the last
// place; below -87 it is e^-87.
inline float exp_of(float x) {
    x = std::max(x, -87.0f);
    const float n = floorf(x * 1.44269504f + 0.5f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.0f / 720 * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return y * power;
}

inline float silu(float x) {
    const float decayed = exp_of(-fabsf(x));
    return x * (x < 0 ? decayed : 1.0f) / (1 + decayed);
}

// Strides are of a token and of a head, in elements; the last dimension is dense.
template <typename T>
struct Strided {
    const T* data;
    int64_t token, head;
    const T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

#ifdef BURNISH_AMX

const int64_t TILE = 512;  // bf16 values of a tile: 16 rows of 32

struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 up to 16 rows of the input each, 6 and 7 tiles of the weight.
void configure(int64_t upper, int64_t lower) {
    TileConfig config;
    const int64_t rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = static_cast<uint8_t>(std::max<int64_t>(rows[tile], 1));
        config.bytes[tile] = 64;
    }
    _tile_loadconfig(&config);
}

#endif

// Return whether this process may use AMX; asks the kernel for it.
inline int may_use_amx() {
#ifdef BURNISH_AMX
    const int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

}  // namespace
