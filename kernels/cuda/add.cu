// y += x, where x repeats: the residual stream, and biases of rows.
#include "prelude.cuh"

#define THREADS 256

// x: [period], y: [n], n a multiple of the period. grid: vectors / THREADS rounded up; block: THREADS.
template <typename T>
__device__ void add(const T* x, i64 period, i64 n, T* y) {
    constexpr int N = Width<T>::value;
    i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * N;
    if (first >= n) return;
    float sum[N], more[N];
    read_row(y, first, n, sum);
    if (period % N == 0) {
        read_row(x, first % period, period, more);
    } else {
        UNROLL for (int i = 0; i < N; i++) more[i] = first + i < n ? widen(x[(first + i) % period]) : 0.0f;
    }
    UNROLL for (int i = 0; i < N; i++) sum[i] = sum[i] + more[i];
    write_row(y, first, n, sum);
}

#define KERNELS(T, name)                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) \
    add_##name(const T* x, i64 period, i64 n, T* y) { add(x, period, n, y); }
KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
