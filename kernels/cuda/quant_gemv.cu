// y = x·wᵀ for a quantized w and up to eight rows of 8-bit activations: decoding.
//
// The weights pass once, as they lie in the file. A warp takes a row of w and turns pieces of 32 weights into exact integer
// dot products, four lanes to a piece; then one thread per element of y chains them over ascending pieces. That is the order of
// quant_gemm.cu and of the CPU: all three give the same bits, whatever the number of rows.
#include "formats.cuh"

#define THREADS 256
// Rows of w per block: one per warp.
#define ROWS (THREADS / 32)

// How many pieces' dot products lie in shared memory at once, twice.
template <int M>
struct Chunk { static constexpr int pieces = M > 4 ? 32 : 64; };

// w: [n, 32·pieces]; quants: [m, 32·pieces] with scales and sums [m, pieces] as of quantize_rows; y: [m, n]; m ≤ M.
// grid: n / ROWS rounded up; block: THREADS.
template <typename F, int M>
__device__ void quant_gemv(const u8* w, const i8* quants, const float* scales, const u32* sums, int n, int pieces, int m, float* y) {
    constexpr int DOTS = F::HALVES ? 2 : 1, PIECES = Chunk<M>::pieces, STEPS = 4;
    SHARED(int, dots, [2][DOTS][M][ROWS][PIECES + 1]);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, j = lane % 4;
    const u8* row = w + row_bytes<F>(pieces) * min((int)blockIdx.x * ROWS + warp, n - 1);
    // The element of y that this thread chains, if any.
    int own_row = threadIdx.x % ROWS, own_m = threadIdx.x / ROWS, own_n = blockIdx.x * ROWS + own_row;
    bool owner = own_m < m && own_n < n;
    const u8* owned = w + row_bytes<F>(pieces) * min(own_n, n - 1);
    float sum = 0.0f;
    for (int chunk = 0, half = 0; chunk < pieces; chunk += PIECES, half ^= 1) {
        for (int step = 0; step < PIECES; step += 8 * STEPS) {
            u32 low[STEPS], high[STEPS];
            UNROLL for (int s = 0; s < STEPS; s++) {
                // Past the end of a row its last piece is read again and its products are not used.
                int at = min(chunk + step + 8 * s + lane / 4, pieces - 1);
                F::codes(block_of<F>(row, at), piece_of<F>(at), j, low[s], high[s]);
            }
            UNROLL for (int s = 0; s < STEPS; s++) {
                int slot = step + 8 * s + lane / 4, at = min(chunk + slot, pieces - 1);
                UNROLL for (int i = 0; i < M; i++) {
                    const i8* q = quants + ((i64)min(i, m - 1) * pieces + at) * 32 + 4 * j;
                    int a = *reinterpret_cast<const int*>(q), b = *reinterpret_cast<const int*>(q + 16);
                    int first = __dp4a((int)low[s], a, 0), second = 0;
                    if (DOTS == 2) second = __dp4a((int)high[s], b, 0);
                    else first = __dp4a((int)high[s], b, first);
                    first += __shfl_xor_sync(WHOLE_WARP, first, 1);
                    first += __shfl_xor_sync(WHOLE_WARP, first, 2);
                    if (DOTS == 2) {
                        second += __shfl_xor_sync(WHOLE_WARP, second, 1);
                        second += __shfl_xor_sync(WHOLE_WARP, second, 2);
                    }
                    if (j == 0) {
                        dots[half][0][i][warp][slot] = first;
                        if (DOTS == 2) dots[half][DOTS - 1][i][warp][slot] = second;
                    }
                }
            }
        }
        // While some chain this half, the others go on with the other one.
        __syncthreads();
        if (owner) {
            int count = min(PIECES, pieces - chunk);
            for (int slot = 0; slot < count; slot++) {
                int at = chunk + slot;
                i64 of = (i64)own_m * pieces + at;
                sum = add_piece<F>(sum, F::scales(block_of<F>(owned, at), piece_of<F>(at)), dots[half][0][own_m][own_row][slot],
                                   dots[half][DOTS - 1][own_m][own_row][slot], scales[of], first_sum(sums[of]), second_sum(sums[of]));
            }
        }
    }
    if (owner) y[(i64)own_m * n + own_n] = sum;
}

#define KERNEL(F, name, M)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) quant_gemv_##name##_##M(                                \
        const u8* w, const i8* quants, const float* scales, const u32* sums, int n, int pieces, int m, float* y) { \
        quant_gemv<F, M>(w, quants, scales, sums, n, pieces, m, y);                                               \
    }
#define KERNELS(F, name) KERNEL(F, name, 1) KERNEL(F, name, 4) KERNEL(F, name, 8)
EVERY_FORMAT(KERNELS)
