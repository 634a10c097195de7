// Sums of squares by chunks of 4096, in f64 and in the trainer's order bit for bit: eight lanes, lane i chaining over
// elements i, i + 8, …, then the lanes in order. The caller adds the chunks in order.
#include "prelude.cuh"

#define THREADS 128
#define CHUNK 4096

// A warp takes four chunks, eight lanes each. sums: [⌈n / CHUNK⌉]. grid: chunks / 16 rounded up; block: THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) chunk_squares(const float* x, i64 n, double* sums) {
    int lane = threadIdx.x % 8;
    i64 chunk = ((i64)blockIdx.x * THREADS + threadIdx.x) / 8, first = chunk * CHUNK;
    i64 left = n - first;
    int count = left <= 0 ? 0 : left < CHUNK ? (int)left : CHUNK;
    double sum = 0.0;
    int i = lane;
    for (; i + 7 * 8 < count; i += 64) {
        float v[8];
        UNROLL for (int j = 0; j < 8; j++) v[j] = x[first + i + 8 * j];
        // The square of an f32 is exact in f64.
        UNROLL for (int j = 0; j < 8; j++) sum = sum + (double)v[j] * (double)v[j];
    }
    for (; i < count; i += 8) sum = sum + (double)x[first + i] * (double)x[first + i];
    double total = 0.0;
    UNROLL for (int j = 0; j < 8; j++) total = total + __shfl_sync(WHOLE_WARP, sum, j, 8);
    if (lane == 0 && count > 0) sums[chunk] = total;
}
