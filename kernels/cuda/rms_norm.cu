// RMSNorm over the last axis: y = x · r · w with r = 1/sqrt(mean(x²) + eps).
#include "prelude.cuh"

#define THREADS 256

// Σ a·b over a row: thread t chains over vectors t, t + THREADS, …, then the block's tree.
template <typename T>
__device__ __forceinline__ float row_inverse_rms(const T* x, int d, float eps, float* scratch) {
    constexpr int N = Width<T>::value;
    float sum = 0.0f;
    for (int first = threadIdx.x * N; first < d; first += THREADS * N) {
        float v[N];
        read_row(x, first, d, v);
        UNROLL for (int i = 0; i < N; i++) sum = fmaf(v[i], v[i], sum);
    }
    sum = block_sum(sum, scratch);
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, (float)d) + eps));
}

// grid: rows; block: THREADS. x, y: [rows, d]; w: [d].
template <typename T>
__device__ void rms_norm(const T* x, const T* w, float eps, int d, T* y) {
    constexpr int N = Width<T>::value;
    SHARED(float, scratch, [THREADS / 32]);
    x += (i64)blockIdx.x * d, y += (i64)blockIdx.x * d;
    float r = row_inverse_rms(x, d, eps, scratch);
    for (int first = threadIdx.x * N; first < d; first += THREADS * N) {
        float v[N], weight[N];
        read_row(x, first, d, v);
        read_row(w, first, d, weight);
        UNROLL for (int i = 0; i < N; i++) v[i] = v[i] * r * weight[i];
        write_row(y, first, d, v);
    }
}

// dx = dy·w·r − x·k with k = r³·mean(dy·w·x); keeps r for the gradient of w. grid: rows; block: THREADS.
template <typename T>
__device__ void rms_norm_backward_x(const T* x, const T* w, float eps, const T* dy, int d, T* dx, float* inverse) {
    constexpr int N = Width<T>::value;
    SHARED(float, scratch, [THREADS / 32]);
    i64 row = (i64)blockIdx.x * d;
    x += row, dy += row, dx += row;
    float r = row_inverse_rms(x, d, eps, scratch), sum = 0.0f;
    for (int first = threadIdx.x * N; first < d; first += THREADS * N) {
        float v[N], g[N], weight[N];
        read_row(x, first, d, v);
        read_row(dy, first, d, g);
        read_row(w, first, d, weight);
        UNROLL for (int i = 0; i < N; i++) sum = fmaf(g[i] * weight[i], v[i], sum);
    }
    float k = __fdiv_rn(block_sum(sum, scratch) * r * r * r, (float)d);
    for (int first = threadIdx.x * N; first < d; first += THREADS * N) {
        float v[N], g[N], weight[N];
        read_row(x, first, d, v);
        read_row(dy, first, d, g);
        read_row(w, first, d, weight);
        UNROLL for (int i = 0; i < N; i++) v[i] = g[i] * weight[i] * r - v[i] * k;
        write_row(dx, first, d, v);
    }
    if (threadIdx.x == 0) inverse[blockIdx.x] = r;
}

// Rows that one partial sum of dw covers: part of the order of arithmetic.
#define ROWS_PER_PART 64

// A chain over the rows of a part for each column. grid: (columns / THREADS, parts) rounded up; block: THREADS.
// parts: [⌈rows / ROWS_PER_PART⌉, d].
template <typename T>
__device__ void rms_norm_backward_w(const T* x, const T* dy, const float* inverse, int rows, int d, float* parts) {
    int column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= d) return;
    int first = blockIdx.y * ROWS_PER_PART, end = min(first + ROWS_PER_PART, rows);
    float sum = 0.0f;
    for (int row = first; row < end; row++) {
        i64 at = (i64)row * d + column;
        sum = fmaf(widen(dy[at]) * widen(x[at]), inverse[row], sum);
    }
    parts[(i64)blockIdx.y * d + column] = sum;
}

// dw += Σ of the parts in order. grid: columns / THREADS rounded up; block: THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_backward_w_sum(const float* parts, int count, int d, float* dw) {
    int column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= d) return;
    float sum = 0.0f;
    for (int part = 0; part < count; part++) sum += parts[(i64)part * d + column];
    dw[column] += sum;
}

#define KERNELS(T, name)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
    rms_norm_##name(const T* x, const T* w, float eps, int d, T* y) { rms_norm(x, w, eps, d, y); }                    \
    extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_backward_x_##name(                                 \
        const T* x, const T* w, float eps, const T* dy, int d, T* dx, float* inverse) {                               \
        rms_norm_backward_x(x, w, eps, dy, d, dx, inverse);                                                           \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_backward_w_##name(                                 \
        const T* x, const T* dy, const float* inverse, int rows, int d, float* parts) {                               \
        rms_norm_backward_w(x, dy, inverse, rows, d, parts);                                                          \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
