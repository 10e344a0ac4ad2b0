// What the kernels share: bf16 values, which are handled as 16-bit integers, strided tensors, and AMX.

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
