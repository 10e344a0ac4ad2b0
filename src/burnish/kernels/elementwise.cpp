// RMS norms and gates of SiLU in bf16, forward and backward, each in one pass over its rows. elementwise.py says how to
// call it. Values are rounded where transformers rounds them in the forward pass; gradients are computed in fp32.

#include "common.h"

namespace {

const int64_t CHUNK = 256;  // rows whose gradients by a norm's weight are summed by one thread

// Gradients of norm_row: `grad_input` [K], and those by the weight, which are added to `sums` [K] if it is not null.
void norm_row_backward(
    const bf16* from, const bf16* weight, const bf16* grad, bf16* grad_input, float* sums, int64_t K, float epsilon
) {
    float squares = 0, dot = 0;
#pragma omp simd reduction(+ : squares, dot)
    for (int64_t k = 0; k < K; ++k) {
        const float x = to_float(from[k]);
        squares += x * x;
        dot += to_float(grad[k]) * to_float(weight[k]) * x;
    }
    const float factor = 1 / sqrtf(squares / K + epsilon), pull = factor * factor * dot / K;
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) {
        const float x = to_float(from[k]);
        grad_input[k] = round_bf16(factor * (to_float(grad[k]) * to_float(weight[k]) - pull * x));
    }
    if (!sums) return;
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) sums[k] += to_float(grad[k]) * to_float(round_bf16(factor * to_float(from[k])));
}

}  // namespace

extern "C" {

// out [M, K]: `norm_row` of each row.
void rms_norm(const bf16* input, const bf16* weight, bf16* out, int64_t M, int64_t K, float epsilon) {
#pragma omp parallel for schedule(static) if (M * K > 16384)
    for (int64_t row = 0; row < M; ++row) norm_row(input + row * K, weight, out + row * K, K, epsilon);
}

// grad_input [M, K], and unless it is null grad_weight [K], by way of sums [ceil(M / 256), K], given as zeros.
void rms_norm_backward(
    const bf16* input, const bf16* weight, const bf16* grad, bf16* grad_input, bf16* grad_weight, float* sums,
    int64_t M, int64_t K, float epsilon
) {
    const int64_t chunks = (M + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t at = chunk * CHUNK * K; at < std::min(M, (chunk + 1) * CHUNK) * K; at += K)
            norm_row_backward(
                input + at, weight, grad + at, grad_input + at, grad_weight ? sums + chunk * K : nullptr, K, epsilon
            );
    for (int64_t k = 0; grad_weight && k < K; ++k) {
        float total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * K + k];
        grad_weight[k] = round_bf16(total);
    }
}

// out = silu(gate) up, of `size` values.
void gated_silu(const bf16* gate, const bf16* up, bf16* out, int64_t size) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < size; ++i)
        out[i] = round_bf16(to_float(round_bf16(silu(to_float(gate[i])))) * to_float(up[i]));
}

void gated_silu_backward(
    const bf16* gate, const bf16* up, const bf16* grad, bf16* grad_gate, bf16* grad_up, int64_t size
) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < size; ++i) {
        const float x = to_float(gate[i]), pulled = to_float(grad[i]), decayed = exp_of(-fabsf(x));
        const float sigmoid = (x < 0 ? decayed : 1.0f) / (1 + decayed);
        grad_gate[i] = round_bf16(pulled * to_float(up[i]) * sigmoid * (1 + x * (1 - sigmoid)));
        grad_up[i] = round_bf16(pulled * to_float(round_bf16(x * sigmoid)));
    }
}
}
