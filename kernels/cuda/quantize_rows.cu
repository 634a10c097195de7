// Rows of activations as pieces of 32 signed bytes, each scaled by its own largest magnitude: the CPU's, bit for bit.
#include "prelude.cuh"

#define THREADS 256

// x: [rows, columns] as n = rows·columns values, columns a multiple of 32. quants: [n]; scales: [n / 32]; sums: [n / 32],
// the sums of a piece's halves in 16 bits each. A piece with an infinity or a NaN becomes zeros with that scale: every
// product with it is a NaN. grid: n / 4 / THREADS rounded up; block: THREADS.
template <typename T>
__device__ void quantize_rows(const T* x, i64 n, i8* quants, float* scales, u32* sums) {
    i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4;
    bool inside = first < n;
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (inside) {
        Vector<T, 4> read = load<4>(x + first);
        UNROLL for (int i = 0; i < 4; i++) v[i] = widen(read.at[i]);
    }
    // As integers, magnitudes order like the floats, and what is not a number is the largest of all.
    u32 most = 0;
    UNROLL for (int i = 0; i < 4; i++) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
    UNROLL for (int with = 4; with > 0; with /= 2) most = max(most, __shfl_xor_sync(WHOLE_WARP, most, with));
    float largest = __uint_as_float(most);
    float inverse = most > 0 && most < 0x7f800000u ? __fdiv_rn(127.0f, largest) : 0.0f;
    if (__float_as_uint(inverse) >= 0x7f800000u) inverse = 0.0f;
    u32 packed = 0;
    int sum = 0;
    UNROLL for (int i = 0; i < 4; i++) {
        float scaled = rintf(v[i] * inverse);
        int q = scaled == scaled ? (int)scaled : 0;
        packed |= (u32)(q & 255) << 8 * i;
        sum += q;
    }
    // Lanes 0–3 of a piece hold its first half.
    sum += __shfl_xor_sync(WHOLE_WARP, sum, 1);
    sum += __shfl_xor_sync(WHOLE_WARP, sum, 2);
    int other = __shfl_xor_sync(WHOLE_WARP, sum, 4);
    if (!inside) return;
    *reinterpret_cast<u32*>(quants + first) = packed;
    if (threadIdx.x % 8 == 0) {
        scales[first / 32] = __fdiv_rn(largest, 127.0f);
        sums[first / 32] = (u32)(sum & 0xffff) | (u32)other << 16;
    }
}

#define KERNELS(T, name)                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) quantize_rows_##name( \
        const T* x, i64 n, i8* quants, float* scales, u32* sums) { quantize_rows(x, n, quants, scales, sums); }
KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
