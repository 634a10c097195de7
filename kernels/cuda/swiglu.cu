// silu(gate) · up, elementwise, and its gradients. Bit-equal to the CPU's in f32.
#include "prelude.cuh"

#define THREADS 256

// grid: vectors / THREADS rounded up; block: THREADS.
template <typename T>
__device__ void swiglu(const T* gate, const T* up, i64 n, T* y) {
    constexpr int N = Width<T>::value;
    i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * N;
    if (first >= n) return;
    float g[N], u[N];
    read_row(gate, first, n, g);
    read_row(up, first, n, u);
    UNROLL for (int i = 0; i < N; i++) g[i] = g[i] * sigmoid(g[i]) * u[i];
    write_row(y, first, n, g);
}

template <typename T>
__device__ void swiglu_backward(const T* gate, const T* up, const T* dy, i64 n, T* dgate, T* dup) {
    constexpr int N = Width<T>::value;
    i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * N;
    if (first >= n) return;
    float g[N], u[N], d[N];
    read_row(gate, first, n, g);
    read_row(up, first, n, u);
    read_row(dy, first, n, d);
    UNROLL for (int i = 0; i < N; i++) {
        float s = sigmoid(g[i]);
        float to_gate = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
        u[i] = d[i] * g[i] * s;
        g[i] = to_gate;
    }
    write_row(dgate, first, n, g);
    write_row(dup, first, n, u);
}

#define KERNELS(T, name)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
    swiglu_##name(const T* gate, const T* up, i64 n, T* y) { swiglu(gate, up, n, y); }                                \
    extern "C" __global__ void __launch_bounds__(THREADS) swiglu_backward_##name(                                     \
        const T* gate, const T* up, const T* dy, i64 n, T* dgate, T* dup) { swiglu_backward(gate, up, dy, n, dgate, dup); }
KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
