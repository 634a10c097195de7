// Rows of a table by id, and the gradient of that.
#include "prelude.cuh"

#define THREADS 256

// y[i] = w[ids[i]]. w: [vocab, d]; y: [ids, d]. grid: (ids, vectors of a row / THREADS rounded up); block: THREADS.
template <typename T>
__device__ void gather_rows(const T* w, const u32* ids, int d, T* y) {
    constexpr int N = Width<T>::value;
    int first = (blockIdx.y * THREADS + threadIdx.x) * N;
    if (first >= d) return;
    float v[N];
    read_row(w + (i64)ids[blockIdx.x] * d, first, d, v);
    write_row(y + (i64)blockIdx.x * d, first, d, v);
}

// Row id of dw += Σ of the rows of dy with that id, in their order. `rows` lists the rows of dy grouped by id, ascending
// within a group; group g is rows[starts[g]..starts[g + 1]] and has id ids[g]. Rows of dw without a group stay as they are.
// grid: (groups, columns / THREADS rounded up); block: THREADS.
template <typename T>
__device__ void scatter_rows(const T* dy, const u32* rows, const u32* starts, const u32* ids, int d, float* dw) {
    int column = blockIdx.y * THREADS + threadIdx.x;
    if (column >= d) return;
    float sum = 0.0f;
    for (u32 i = starts[blockIdx.x]; i < starts[blockIdx.x + 1]; i++) sum += widen(dy[(i64)rows[i] * d + column]);
    dw[(i64)ids[blockIdx.x] * d + column] += sum;
}

#define KERNELS(T, name)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
    gather_rows_##name(const T* w, const u32* ids, int d, T* y) { gather_rows(w, ids, d, y); }                        \
    extern "C" __global__ void __launch_bounds__(THREADS) scatter_rows_##name(                                        \
        const T* dy, const u32* rows, const u32* starts, const u32* ids, int d, float* dw) {                          \
        scatter_rows(dy, rows, starts, ids, d, dw);                                                                   \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
