// Inverted dropout with the CPU's counter-based mask: element i is kept when the upper half of hash(key, i) reaches the
// threshold p·2³². Equal keys give equal masks on every device.
#include "prelude.cuh"

#define THREADS 256

// SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) of a key and a counter.
__device__ __forceinline__ u64 mix(u64 key, u64 counter) {
    u64 z = key + (counter + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// grid: vectors / THREADS rounded up; block: THREADS.
template <typename T>
__device__ void dropout(const T* x, u64 key, u64 threshold, float scale, i64 n, T* y) {
    constexpr int N = Width<T>::value;
    i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * N;
    if (first >= n) return;
    float v[N];
    read_row(x, first, n, v);
    UNROLL for (int i = 0; i < N; i++) v[i] = (mix(key, first + i) >> 32) >= threshold ? v[i] * scale : 0.0f;
    write_row(y, first, n, v);
}

#define KERNELS(T, name)                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                            \
    dropout_##name(const T* x, u64 key, u64 threshold, float scale, i64 n, T* y) { dropout(x, key, threshold, scale, n, y); }
KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
