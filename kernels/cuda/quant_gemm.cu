// y = x·wᵀ for a quantized w and many rows of 8-bit activations, on the integer tensor cores: prefill and batches.
//
// A warp takes 16 rows of w and up to 64 rows of activations. One product of 16×8×32 is one piece of 32 weights: its exact
// integers enter the chain over ascending pieces that quant_gemv.cu and the CPU know, so all three give the same bits.
#include "formats.cuh"
#include "tensor.cuh"

#define THREADS 128
// Rows of w, rows of activations and pieces per stage of a block.
#define N_TILE 64
#define M_TILE 64
#define STAGE 4
// Bytes of a row of a stage's activations; the padding spreads rows over banks.
#define PITCH (32 * STAGE + 16)

struct Stage {
    __align__(16) i8 quants[M_TILE][PITCH];
    float scales[M_TILE][STAGE];
    u32 sums[M_TILE][STAGE];
};

// Sends for the activations of pieces `from..from + STAGE`; zeros beyond the matrix.
__device__ __forceinline__ void fetch(Stage& stage, const i8* quants, const float* scales, const u32* sums, int first, int m, int from, int pieces) {
    for (int i = threadIdx.x; i < M_TILE * 2 * STAGE; i += THREADS) {
        int row = i / (2 * STAGE), part = i % (2 * STAGE), piece = from + part / 2;
        bool there = first + row < m && piece < pieces;
        const i8* q = quants + ((i64)(first + row) * pieces + piece) * 32 + part % 2 * 16;
        copy_async<16>(&stage.quants[row][16 * part], there ? q : quants, there ? 16 : 0);
    }
    for (int i = threadIdx.x; i < M_TILE * STAGE; i += THREADS) {
        int row = i / STAGE, piece = from + i % STAGE;
        bool there = first + row < m && piece < pieces;
        i64 at = there ? (i64)(first + row) * pieces + piece : 0;
        copy_async<4>(&stage.scales[row][i % STAGE], scales + at, there ? 4 : 0);
        copy_async<4>(&stage.sums[row][i % STAGE], sums + at, there ? 4 : 0);
    }
    copy_commit();
}

// One piece: the tile's sums after it. `a` are the codes of rows g, g + 8 of the warp, in both halves of the piece.
template <typename F>
__device__ __forceinline__ void multiply_piece(float (&sum)[M_TILE / 8][4], const Stage& stage, int piece, const u32 (&a)[4],
                                               const Scales& upper, const Scales& lower, int rows) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL for (int tile = 0; tile < M_TILE / 8; tile++) {
        if (8 * tile >= rows) break;
        const i8* q = &stage.quants[8 * tile + g][32 * piece + 4 * t];
        u32 low = *reinterpret_cast<const u32*>(q), high = *reinterpret_cast<const u32*>(q + 16);
        int dots[4] = {0, 0, 0, 0}, more[4] = {0, 0, 0, 0};
        if (F::HALVES) {
            u32 first[2] = {a[0], a[1]}, second[2] = {a[2], a[3]}, left[1] = {low}, right[1] = {high};
            multiply_s8_k16(dots, first, left);
            multiply_s8_k16(more, second, right);
        } else {
            u32 b[2] = {low, high};
            multiply_s8_k32(dots, a, b);
        }
        UNROLL for (int i = 0; i < 4; i++) {
            int column = 8 * tile + 2 * t + i % 2;
            u32 sums = stage.sums[column][piece];
            sum[tile][i] = add_piece<F>(sum[tile][i], i < 2 ? upper : lower, dots[i], more[i], stage.scales[column][piece],
                                        first_sum(sums), second_sum(sums));
        }
    }
}

// w: [n, 32·pieces]; quants: [m, 32·pieces] with scales and sums [m, pieces] as of quantize_rows; y: [m, n].
// grid: (n / N_TILE, m / M_TILE) rounded up; block: THREADS.
template <typename F>
__device__ void quant_gemm(const u8* w, const i8* quants, const float* scales, const u32* sums, int n, int pieces, int m, float* y) {
    SHARED(Stage, stages, [2]);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int first_m = blockIdx.y * M_TILE, row = blockIdx.x * N_TILE + warp * 16 + g, rows = min(M_TILE, m - first_m);
    const u8* upper = w + row_bytes<F>(pieces) * min(row, n - 1);
    const u8* lower = w + row_bytes<F>(pieces) * min(row + 8, n - 1);
    float sum[M_TILE / 8][4];
    UNROLL for (int tile = 0; tile < M_TILE / 8; tile++)
        UNROLL for (int i = 0; i < 4; i++) sum[tile][i] = 0.0f;
    fetch(stages[0], quants, scales, sums, first_m, m, 0, pieces);
    for (int from = 0, half = 0; from < pieces; from += STAGE, half ^= 1) {
        u32 a[STAGE][4];
        UNROLL for (int i = 0; i < STAGE; i++) {
            int at = min(from + i, pieces - 1);
            F::codes(block_of<F>(upper, at), piece_of<F>(at), t, a[i][0], a[i][2]);
            F::codes(block_of<F>(lower, at), piece_of<F>(at), t, a[i][1], a[i][3]);
        }
        fetch(stages[half ^ 1], quants, scales, sums, first_m, m, from + STAGE, pieces);
        copy_wait<1>();
        __syncthreads();
        UNROLL for (int i = 0; i < STAGE; i++) {
            int at = from + i;
            if (at >= pieces) break;
            Scales above = F::scales(block_of<F>(upper, at), piece_of<F>(at)), below = F::scales(block_of<F>(lower, at), piece_of<F>(at));
            multiply_piece<F>(sum, stages[half], i, a[i], above, below, rows);
        }
        __syncthreads();
    }
    UNROLL for (int tile = 0; tile < M_TILE / 8; tile++)
        UNROLL for (int i = 0; i < 4; i++) {
            int at = 8 * tile + 2 * t + i % 2, to = row + i / 2 * 8;
            if (at < rows && to < n) y[(i64)(first_m + at) * n + to] = sum[tile][i];
        }
}

#define KERNELS(F, name)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) quant_gemm_##name(                                      \
        const u8* w, const i8* quants, const float* scales, const u32* sums, int n, int pieces, int m, float* y) { \
        quant_gemm<F>(w, quants, scales, sums, n, pieces, m, y);                                                  \
    }
EVERY_FORMAT(KERNELS)
