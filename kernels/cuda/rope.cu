// Rotary position embedding: dimension i of a head is paired with i + head_dim/2. Bit-equal to the CPU's in f32.
#include "prelude.cuh"

#define THREADS 256

// x, y: [rows, heads, 2·half], the same memory if wished; cos, sin: [rows, half]. sign = −1 rotates the other way: the
// backward pass. grid: vectors of pairs / THREADS rounded up; block: THREADS.
template <typename T>
__device__ void rope(const T* x, const float* cos, const float* sin, float sign, int rows, int heads, int half, T* y) {
    constexpr int N = Width<T>::value;
    int vectors = (half + N - 1) / N;
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= (i64)rows * heads * vectors) return;
    int first = (int)(at % vectors) * N;
    i64 head = at / vectors, line = head / heads * half;
    x += head * 2 * half, y += head * 2 * half;
    float a[N], b[N], c[N], s[N];
    read_row(x, first, half, a);
    read_row(x + half, first, half, b);
    UNROLL for (int i = 0; i < N; i++) {
        bool inside = first + i < half;
        c[i] = inside ? cos[line + first + i] : 0.0f;
        s[i] = inside ? sign * sin[line + first + i] : 0.0f;
    }
    UNROLL for (int i = 0; i < N; i++) {
        float rotated = a[i] * c[i] - b[i] * s[i];
        b[i] = b[i] * c[i] + a[i] * s[i];
        a[i] = rotated;
    }
    write_row(y, first, half, a);
    write_row(y + half, first, half, b);
}

#define KERNELS(T, name)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) rope_##name(const T* x, const float* cos, const float* sin, \
        float sign, int rows, int heads, int half, T* y) { rope(x, cos, sin, sign, rows, heads, half, y); }
KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
