// Casts between float types, and unscaling with a flag for what overflowed.
#include "prelude.cuh"

#define THREADS 256

// grid: n / 8 / THREADS rounded up; block: THREADS.
template <typename From, typename To>
__device__ void cast(const From* x, i64 n, To* y) {
    constexpr int N = Width<From>::value < Width<To>::value ? Width<From>::value : Width<To>::value;
    i64 block = (i64)blockIdx.x * THREADS * 8;
    for (int i = threadIdx.x * N; i < THREADS * 8 && block + i < n; i += THREADS * N) {
        float v[N];
        read_row(x, block + i, n, v);
        write_row(y, block + i, n, v);
    }
}

// y = x·factor in f32; sets *overflowed to 1 if any product is infinite or not a number, else leaves it. x may be y.
// grid: n / 8 / THREADS rounded up; block: THREADS.
template <typename T>
__device__ void unscale(const T* x, float factor, i64 n, float* y, u32* overflowed) {
    i64 block = (i64)blockIdx.x * THREADS * 8;
    bool bad = false;
    for (int i = threadIdx.x * 4; i < THREADS * 8 && block + i < n; i += THREADS * 4) {
        float v[4];
        read_row(x, block + i, n, v);
        UNROLL for (int j = 0; j < 4; j++) {
            v[j] = v[j] * factor;
            bad |= (__float_as_uint(v[j]) & 0x7f800000u) == 0x7f800000u;
        }
        write_row(y, block + i, n, v);
    }
    if (__syncthreads_or(bad) && threadIdx.x == 0) atomicOr(overflowed, 1u);
}

#define CAST(From, To, name)                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                      \
    cast_##name(const From* x, i64 n, To* y) { cast(x, n, y); }
CAST(float, bf16, f32_bf16)
CAST(float, f16, f32_f16)
CAST(bf16, float, bf16_f32)
CAST(f16, float, f16_f32)

#define UNSCALE(T, name)                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) unscale_##name(               \
        const T* x, float factor, i64 n, float* y, u32* overflowed) { unscale(x, factor, n, y, overflowed); }
UNSCALE(float, f32)
UNSCALE(bf16, bf16)
UNSCALE(f16, f16)
