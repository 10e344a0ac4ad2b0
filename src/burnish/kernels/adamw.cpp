// A step of AdamW over bf16 weights with fp32 masters, in one pass over the memory. adamw.py says how to call it.

#include "common.h"

namespace {

struct Options {
    float rate, beta1, beta2, epsilon, decay, correction1, correction2, scale;
};

// The master's bits are those of the weight, as the upper half, plus the rest.
template <typename T>
void step(bf16* weight, int16_t* rest, const T* gradient, float* mean, float* square, int64_t size, Options o) {
    const float keep = 1 - o.rate * o.decay, rate = o.rate / o.correction1, root = 1 / sqrtf(o.correction2);
#pragma omp parallel for simd schedule(static) if (size > 16384)
    for (int64_t i = 0; i < size; ++i) {
        const float g = o.scale * to_float(gradient[i]);
        const float m = mean[i] + (1 - o.beta1) * (g - mean[i]);
        const float v = o.beta2 * square[i] + (1 - o.beta2) * g * g;
        mean[i] = m;
        square[i] = v;
        uint32_t bits = (static_cast<uint32_t>(weight[i]) << 16) + static_cast<uint32_t>(static_cast<int32_t>(rest[i]));
        float master;
        memcpy(&master, &bits, sizeof master);
        master = keep * master - rate * m / (sqrtf(v) * root + o.epsilon);
        memcpy(&bits, &master, sizeof bits);
        bits = master == master ? bits : 0x7fc00000;  // rounding up the bits of another NaN could make it a number
        rest[i] = static_cast<int16_t>(bits);
        weight[i] = static_cast<bf16>((bits + 0x8000) >> 16);
    }
}

}  // namespace

extern "C" {

void adamw_bf16(
    bf16* weight, int16_t* rest, const bf16* gradient, float* mean, float* square, int64_t size, const Options* options
) {
    step(weight, rest, gradient, mean, square, size, *options);
}

void adamw_fp32(
    bf16* weight, int16_t* rest, const float* gradient, float* mean, float* square, int64_t size, const Options* options
) {
    step(weight, rest, gradient, mean, square, size, *options);
}
}
