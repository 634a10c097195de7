// Products of tiles in shared memory, a warp at a time: 16-bit floats on tensor cores, f32 by chains of fused multiply-adds
// over ascending k, which are the CPU's order.
//
// A warp's result is 16 rows of 8-column tiles; of each, lane (g, t) = (lane / 4, lane % 4) holds columns 2t, 2t + 1 of
// rows g and g + 8, as the tensor cores hand them out, whatever the type.
#pragma once
#include "tensor.cuh"

// Elements between rows of a tile whose rows hold `columns`: spreads rows over banks, keeps them aligned to 16 bytes.
template <typename T>
struct Pitch { static constexpr int of(int columns) { return columns + Width<T>::value; } };

// Row r of the left operand is row r of `a`, or its column r; likewise the right operand's row, a column of the result.
enum Orientation { Rows, Columns };

// c[16, 8·TILES] += left[16, k]·right[8·TILES, k]ᵀ. Pitches in elements; k is a multiple of 16.
template <Orientation A, Orientation B, int TILES, typename T>
__device__ __forceinline__ void multiply(float (&c)[TILES][4], const T* a, int a_pitch, const T* b, int b_pitch, int k) {
    static_assert(TILES % 2 == 0, "two tiles of the right operand are loaded at once");
    int lane = threadIdx.x % 32, inner = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    for (int at = 0; at < k; at += 16) {
        u32 left[4];
        if (A == Rows) load_matrices(left, a + (inner + second) * a_pitch + at + third);
        else load_matrices_transposed(left, a + (at + inner + third) * a_pitch + second);
        UNROLL for (int tile = 0; tile < TILES; tile += 2) {
            u32 right[4];
            if (B == Rows) load_matrices(right, b + (8 * tile + inner + third) * b_pitch + at + second);
            else load_matrices_transposed(right, b + (at + inner + second) * b_pitch + 8 * tile + third);
            u32 even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
            multiply_16bit(T{}, c[tile], left, even);
            multiply_16bit(T{}, c[tile + 1], left, odd);
        }
    }
}

// Element `k..k + 4` of row `r` of an operand.
template <Orientation O>
__device__ __forceinline__ void four(const float* x, int pitch, int r, int k, float (&out)[4]) {
    if (O == Rows) {
        Vector<float, 4> v = load<4>(x + r * pitch + k);
        UNROLL for (int i = 0; i < 4; i++) out[i] = v.at[i];
    } else {
        UNROLL for (int i = 0; i < 4; i++) out[i] = x[(k + i) * pitch + r];
    }
}

template <Orientation A, Orientation B, int TILES>
__device__ __forceinline__ void multiply(float (&c)[TILES][4], const float* a, int a_pitch, const float* b, int b_pitch, int k) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    NO_UNROLL for (int at = 0; at < k; at += 4) {
        float upper[4], lower[4];
        four<A>(a, a_pitch, g, at, upper);
        four<A>(a, a_pitch, g + 8, at, lower);
        UNROLL for (int tile = 0; tile < TILES; tile++) {
            float even[4], odd[4];
            four<B>(b, b_pitch, 8 * tile + 2 * t, at, even);
            four<B>(b, b_pitch, 8 * tile + 2 * t + 1, at, odd);
            UNROLL for (int i = 0; i < 4; i++) {
                c[tile][0] = fmaf(upper[i], even[i], c[tile][0]);
                c[tile][1] = fmaf(upper[i], odd[i], c[tile][1]);
                c[tile][2] = fmaf(lower[i], even[i], c[tile][2]);
                c[tile][3] = fmaf(lower[i], odd[i], c[tile][3]);
            }
        }
    }
}

template <int TILES>
__device__ __forceinline__ void clear(float (&c)[TILES][4]) {
    UNROLL for (int tile = 0; tile < TILES; tile++)
        UNROLL for (int i = 0; i < 4; i++) c[tile][i] = 0.0f;
}

// Row and column of element `i` of an 8-column tile that this lane holds.
__device__ __forceinline__ int row_of(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ __forceinline__ int column_of(int tile, int i) { return 8 * tile + threadIdx.x % 4 * 2 + i % 2; }

// Sends for `rows` rows of `columns` values into a tile of OUTER × INNER, zeros beyond them. x: the first of them; ld: values
// between rows in memory. In the background where rows are aligned to 16 bytes; the caller commits and waits either way.
template <int OUTER, int INNER, int THREADS, typename T>
__device__ __forceinline__ void fetch_tile(T* tile, const T* x, i64 ld, int rows, int columns) {
    constexpr int N = Width<T>::value, PARTS = INNER / N, PITCH = Pitch<T>::of(INNER);
    bool aligned = ld % N == 0 && reinterpret_cast<u64>(x) % 16 == 0;
    for (int i = threadIdx.x; i < OUTER * PARTS; i += THREADS) {
        int row = i / PARTS, column = i % PARTS * N;
        int valid = row < rows ? min(max(columns - column, 0), N) : 0;
        T* to = tile + row * PITCH + column;
        if (aligned) {
            copy_async<16>(to, valid ? x + row * ld + column : x, valid * (int)sizeof(T));
        } else {
            UNROLL for (int j = 0; j < N; j++) to[j] = j < valid ? x[row * ld + column + j] : narrow<T>(0.0f);
        }
    }
}
