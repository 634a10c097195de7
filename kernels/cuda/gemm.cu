// Dense products, f32 sums: y = x·wᵀ (nt), dy·w (nn), dyᵀ·x (tn). In f32 every element is one chain over ascending k, the
// CPU's bits. cuBLASLt is faster for large 16-bit products; this needs nothing but the driver.
#include "tile.cuh"

#define THREADS 128
#define WARPS 4
// Rows and columns of a block's result, and how much of k it holds at once.
#define M_TILE 128
#define N_TILE 64
#define K_TILE 32

// Elements of a stage's tile of an operand with `rows` rows.
template <typename T>
__device__ __host__ constexpr int stage_size(Orientation o, int rows) {
    return o == Rows ? rows * Pitch<T>::of(K_TILE) : K_TILE * Pitch<T>::of(rows);
}

template <Orientation O, int ROWS, typename T>
__device__ __forceinline__ void fetch(T* tile, const T* x, int ld, int first, int rows, int from, int k) {
    if (O == Rows) fetch_tile<ROWS, K_TILE, THREADS>(tile, x + (i64)first * ld + from, ld, rows - first, k - from);
    else fetch_tile<K_TILE, ROWS, THREADS>(tile, x + (i64)from * ld + first, ld, k - from, rows - first);
}

// y: [m, n] (+)= left·rightᵀ. Orientation Rows: the operand is [m or n, k]; Columns: [k, m or n]. grid: (n / N_TILE, m /
// M_TILE) rounded up; block: THREADS; dynamic shared memory: 2 · (stage_size(A, M_TILE) + stage_size(B, N_TILE)) elements.
template <Orientation A, Orientation B, typename T, typename Y>
__device__ void gemm(const T* a, const T* b, int m, int n, int k, int accumulate, Y* y) {
    constexpr int A_SIZE = stage_size<T>(A, M_TILE), B_SIZE = stage_size<T>(B, N_TILE);
    constexpr int A_PITCH = Pitch<T>::of(A == Rows ? K_TILE : M_TILE), B_PITCH = Pitch<T>::of(B == Rows ? K_TILE : N_TILE);
    DYNAMIC_SHARED(memory);
    T* tiles = reinterpret_cast<T*>(memory);
    int first_m = blockIdx.y * M_TILE, first_n = blockIdx.x * N_TILE, warp = threadIdx.x / 32;
    int lda = A == Rows ? k : m, ldb = B == Rows ? k : n;
    // Two groups of 16 rows per warp.
    float sum[2][N_TILE / 8][4];
    UNROLL for (int part = 0; part < 2; part++)
        UNROLL for (int tile = 0; tile < N_TILE / 8; tile++)
            UNROLL for (int i = 0; i < 4; i++) {
                int row = first_m + (warp * 2 + part) * 16 + row_of(i), column = first_n + column_of(tile, i);
                sum[part][tile][i] = accumulate && row < m && column < n ? widen(y[(i64)row * n + column]) : 0.0f;
            }
    fetch<A, M_TILE>(tiles, a, lda, first_m, m, 0, k);
    fetch<B, N_TILE>(tiles + A_SIZE, b, ldb, first_n, n, 0, k);
    copy_commit();
    for (int from = 0, half = 0; from < k; from += K_TILE, half ^= 1) {
        T* next = tiles + (half ^ 1) * (A_SIZE + B_SIZE);
        if (from + K_TILE < k) {
            fetch<A, M_TILE>(next, a, lda, first_m, m, from + K_TILE, k);
            fetch<B, N_TILE>(next + A_SIZE, b, ldb, first_n, n, from + K_TILE, k);
        }
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const T *left = tiles + half * (A_SIZE + B_SIZE), *right = left + A_SIZE;
        UNROLL for (int part = 0; part < 2; part++) {
            int row = (warp * 2 + part) * 16;
            multiply<A, B>(sum[part], left + (A == Rows ? row * A_PITCH : row), A_PITCH, right, B_PITCH, K_TILE);
        }
        __syncthreads();
    }
    UNROLL for (int part = 0; part < 2; part++)
        UNROLL for (int tile = 0; tile < N_TILE / 8; tile++)
            UNROLL for (int i = 0; i < 4; i++) {
                int row = first_m + (warp * 2 + part) * 16 + row_of(i), column = first_n + column_of(tile, i);
                if (row < m && column < n) y[(i64)row * n + column] = narrow<Y>(sum[part][tile][i]);
            }
}

#define KERNEL(A, B, T, Y, name)                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                       \
    gemm_##name(const T* a, const T* b, int m, int n, int k, int accumulate, Y* y) {            \
        gemm<A, B>(a, b, m, n, k, accumulate, y);                                               \
    }
// Gradients of weights (tn) are f32 always: they are added up over many products.
#define PRODUCTS(T, Y, name) KERNEL(Rows, Rows, T, Y, nt_##name) KERNEL(Rows, Columns, T, Y, nn_##name)
PRODUCTS(float, float, f32)
KERNEL(Columns, Columns, float, float, tn_f32)
PRODUCTS(bf16, bf16, bf16)
PRODUCTS(bf16, float, bf16_to_f32)
KERNEL(Columns, Columns, bf16, float, tn_bf16_to_f32)
PRODUCTS(f16, f16, f16)
PRODUCTS(f16, float, f16_to_f32)
KERNEL(Columns, Columns, f16, float, tn_f16_to_f32)
