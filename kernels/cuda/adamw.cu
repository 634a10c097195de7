// AdamW (arXiv 1711.05101) in one pass over memory: f32 master values, states in f32 or bf16, a copy out in f32, bf16 or
// f16. The order of operations is the CPU's, bit for bit, so the state may be split between card and host anywhere.
#include "prelude.cuh"

#define THREADS 256

struct AdamW {
    float keep;             // 1 − ηλ
    float one_minus_beta1;  // 1 − β₁
    float beta2;
    float one_minus_beta2;  // 1 − β₂
    float step_size;        // η/c₁
    float root_correction2; // √c₂
    float eps;
    float gradient_scale;
};

struct Nothing {};

template <typename C>
__device__ __forceinline__ void copy_out(C* copy, i64 first, i64 n, const float (&p)[4]) { write_row(copy, first, n, p); }
template <>
__device__ __forceinline__ void copy_out<Nothing>(Nothing*, i64, i64, const float (&)[4]) {}

// All slices hold n elements. grid: n / 4 / THREADS rounded up; block: THREADS.
template <typename M, typename V, typename C>
__device__ void adamw(AdamW rule, float* master, M* m, V* v, const float* gradient, C* copy, i64 n) {
    i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (first >= n) return;
    float p[4], mean[4], square[4], g[4];
    read_row(master, first, n, p);
    read_row(m, first, n, mean);
    read_row(v, first, n, square);
    read_row(gradient, first, n, g);
    UNROLL for (int i = 0; i < 4; i++) {
        float slope = g[i] * rule.gradient_scale;
        float decayed = p[i] * rule.keep;
        mean[i] = mean[i] + (slope - mean[i]) * rule.one_minus_beta1;
        square[i] = square[i] * rule.beta2 + (rule.one_minus_beta2 * slope) * slope;
        float denominator = __fdiv_rn(__fsqrt_rn(square[i]), rule.root_correction2) + rule.eps;
        p[i] = decayed - rule.step_size * __fdiv_rn(mean[i], denominator);
    }
    write_row(master, first, n, p);
    write_row(m, first, n, mean);
    write_row(v, first, n, square);
    copy_out(copy, first, n, p);
}

#define KERNEL(M, V, C, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) adamw_##name(                                            \
        AdamW rule, float* master, M* m, V* v, const float* gradient, C* copy, i64 n) {                            \
        adamw(rule, master, m, v, gradient, copy, n);                                                              \
    }
#define COPIES(M, V, states)              \
    KERNEL(M, V, Nothing, states)         \
    KERNEL(M, V, float, states##_to_f32)  \
    KERNEL(M, V, bf16, states##_to_bf16)  \
    KERNEL(M, V, f16, states##_to_f16)
COPIES(float, float, f32_f32)
COPIES(float, bf16, f32_bf16)
COPIES(bf16, float, bf16_f32)
COPIES(bf16, bf16, bf16_bf16)
