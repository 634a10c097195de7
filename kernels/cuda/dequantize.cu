// A quantized matrix as floats: f32 exactly as the reference, or rounded to 16 bits for products on tensor cores.
#include "formats.cuh"

#define THREADS 256

// w: rows of whole blocks, one after another; y: their values. grid: values / 8 / THREADS rounded up; block: THREADS.
template <typename F, typename T>
__device__ void dequantize(const u8* w, i64 values, T* y) {
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x, first = at / 4 * 32;
    if (first >= values) return;
    int j = (int)(at % 4), piece = (int)(first % F::VALUES) / 32;
    const u8* block = w + first / F::VALUES * F::BYTES;
    u32 low, high;
    F::codes(block, piece, j, low, high);
    Scales s = F::scales(block, piece);
    Vector<T, 4> a, b;
    UNROLL for (int i = 0; i < 4; i++) {
        float x = s.d0 * (float)((i8)(low >> 8 * i) - F::ZERO), z = (F::HALVES ? s.d1 : s.d0) * (float)((i8)(high >> 8 * i) - F::ZERO);
        a.at[i] = narrow<T>(F::MINIMUM ? x + s.m : x);
        b.at[i] = narrow<T>(F::MINIMUM ? z + s.m : z);
    }
    store<4>(y + first + 4 * j, a);
    store<4>(y + first + 16 + 4 * j, b);
}

#define KERNEL(F, name, T, type)                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)             \
    dequantize_##name##_##type(const u8* w, i64 values, T* y) { dequantize<F>(w, values, y); }
#define KERNELS(F, name) KERNEL(F, name, float, f32) KERNEL(F, name, bf16, bf16) KERNEL(F, name, f16, f16)
EVERY_FORMAT(KERNELS)
