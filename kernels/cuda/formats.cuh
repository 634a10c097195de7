// The block formats of GGUF as they lie in files, read in pieces of 32 values.
//
// A value is d·(code − ZERO) + m. `codes` hands out four codes of each half of a piece as packed bytes, as dp4a and the
// tensor cores' integer products take them; `scales` the rest. Matrices begin at a multiple of 16 bytes and rows are whole
// blocks, so a block begins at a multiple of the largest power of two (up to 16) that divides BYTES.
#pragma once
#include "prelude.cuh"

// What turns integer dot products into values: of the first and second 16 values of a piece, and what is added to each.
struct Scales { float d0, d1, m; };

__device__ __forceinline__ float half_at(const u8* p) { return widen(*reinterpret_cast<const f16*>(p)); }
__device__ __forceinline__ u32 word_at(const u8* p) { return *reinterpret_cast<const u32*>(p); }
// The same where blocks begin at even addresses only.
__device__ __forceinline__ u32 split_word_at(const u8* p) {
    const u16* halves = reinterpret_cast<const u16*>(p);
    return halves[0] | (u32)halves[1] << 16;
}
// Bit i of four to bit 4 of byte i.
__device__ __forceinline__ u32 fifth_bits(u32 four) { return ((four & 15) * 0x00204081u & 0x01010101u) << 4; }

#define NIBBLES 0x0f0f0f0fu

struct Q8_0 {
    enum { VALUES = 32, BYTES = 34, ZERO = 0, HALVES = 0, MINIMUM = 0 };
    static __device__ __forceinline__ void codes(const u8* p, int, int j, u32& low, u32& high) {
        low = split_word_at(p + 2 + 4 * j), high = split_word_at(p + 18 + 4 * j);
    }
    static __device__ __forceinline__ Scales scales(const u8* p, int) { return {half_at(p), 0.0f, 0.0f}; }
};

struct Q4_0 {
    enum { VALUES = 32, BYTES = 18, ZERO = 8, HALVES = 0, MINIMUM = 0 };
    static __device__ __forceinline__ void codes(const u8* p, int, int j, u32& low, u32& high) {
        u32 both = split_word_at(p + 2 + 4 * j);
        low = both & NIBBLES, high = both >> 4 & NIBBLES;
    }
    static __device__ __forceinline__ Scales scales(const u8* p, int) { return {half_at(p), 0.0f, 0.0f}; }
};

struct Q4_1 {
    enum { VALUES = 32, BYTES = 20, ZERO = 0, HALVES = 0, MINIMUM = 1 };
    static __device__ __forceinline__ void codes(const u8* p, int, int j, u32& low, u32& high) {
        u32 both = word_at(p + 4 + 4 * j);
        low = both & NIBBLES, high = both >> 4 & NIBBLES;
    }
    static __device__ __forceinline__ Scales scales(const u8* p, int) { return {half_at(p), 0.0f, half_at(p + 2)}; }
};

struct Q5_0 {
    enum { VALUES = 32, BYTES = 22, ZERO = 16, HALVES = 0, MINIMUM = 0 };
    static __device__ __forceinline__ void codes(const u8* p, int, int j, u32& low, u32& high) {
        u32 bits = split_word_at(p + 2) >> 4 * j, both = split_word_at(p + 6 + 4 * j);
        low = (both & NIBBLES) | fifth_bits(bits), high = (both >> 4 & NIBBLES) | fifth_bits(bits >> 16);
    }
    static __device__ __forceinline__ Scales scales(const u8* p, int) { return {half_at(p), 0.0f, 0.0f}; }
};

struct Q5_1 {
    enum { VALUES = 32, BYTES = 24, ZERO = 0, HALVES = 0, MINIMUM = 1 };
    static __device__ __forceinline__ void codes(const u8* p, int, int j, u32& low, u32& high) {
        u32 bits = word_at(p + 4) >> 4 * j, both = word_at(p + 8 + 4 * j);
        low = (both & NIBBLES) | fifth_bits(bits), high = (both >> 4 & NIBBLES) | fifth_bits(bits >> 16);
    }
    static __device__ __forceinline__ Scales scales(const u8* p, int) { return {half_at(p), 0.0f, half_at(p + 2)}; }
};

// Scale and minimum of piece `i` of the eight of a Q4_K or Q5_K block, which share a layout: f16 scale, f16 minimum,
// then 12 bytes of 6-bit factors.
__device__ __forceinline__ Scales k_scales(const u8* p, int i) {
    const u8* packed = p + 4;
    u32 scale, minimum;
    if (i < 4) {
        scale = packed[i] & 63, minimum = packed[i + 4] & 63;
    } else {
        scale = (packed[i + 4] & 15) | (packed[i - 4] >> 2 & 48);
        minimum = packed[i + 4] >> 4 | (packed[i] >> 2 & 48);
    }
    return {half_at(p) * (float)scale, 0.0f, -(half_at(p + 2) * (float)minimum)};
}

struct Q4_K {
    enum { VALUES = 256, BYTES = 144, ZERO = 0, HALVES = 0, MINIMUM = 1 };
    static __device__ __forceinline__ void codes(const u8* p, int i, int j, u32& low, u32& high) {
        const u8* nibbles = p + 16 + i / 2 * 32 + 4 * j;
        int shift = i % 2 * 4;
        low = word_at(nibbles) >> shift & NIBBLES, high = word_at(nibbles + 16) >> shift & NIBBLES;
    }
    static __device__ __forceinline__ Scales scales(const u8* p, int i) { return k_scales(p, i); }
};

struct Q5_K {
    enum { VALUES = 256, BYTES = 176, ZERO = 0, HALVES = 0, MINIMUM = 1 };
    static __device__ __forceinline__ void codes(const u8* p, int i, int j, u32& low, u32& high) {
        const u8 *fifth = p + 16 + 4 * j, *nibbles = p + 48 + i / 2 * 32 + 4 * j;
        int shift = i % 2 * 4;
        low = (word_at(nibbles) >> shift & NIBBLES) | (word_at(fifth) >> i & 0x01010101u) << 4;
        high = (word_at(nibbles + 16) >> shift & NIBBLES) | (word_at(fifth + 16) >> i & 0x01010101u) << 4;
    }
    static __device__ __forceinline__ Scales scales(const u8* p, int i) { return k_scales(p, i); }
};

struct Q6_K {
    enum { VALUES = 256, BYTES = 210, ZERO = 32, HALVES = 1, MINIMUM = 0 };
    static __device__ __forceinline__ void codes(const u8* p, int i, int j, u32& low, u32& high) {
        int half = i / 4, group = i % 4, shift = group / 2 * 4;
        const u8 *nibbles = p + half * 64 + group % 2 * 32 + 4 * j, *upper = p + 128 + half * 32 + 4 * j;
        low = (split_word_at(nibbles) >> shift & NIBBLES) | (split_word_at(upper) >> 2 * group & 0x03030303u) << 4;
        high = (split_word_at(nibbles + 16) >> shift & NIBBLES) | (split_word_at(upper + 16) >> 2 * group & 0x03030303u) << 4;
    }
    static __device__ __forceinline__ Scales scales(const u8* p, int i) {
        const i8* factors = reinterpret_cast<const i8*>(p + 192) + 2 * i;
        float d = half_at(p + 208);
        return {d * (float)factors[0], d * (float)factors[1], 0.0f};
    }
};

// Bytes of a row of `pieces`.
template <typename F>
__device__ __forceinline__ i64 row_bytes(int pieces) { return (i64)(pieces / (F::VALUES / 32)) * F::BYTES; }
// The block with piece `at` of a row, and the piece's number in it.
template <typename F>
__device__ __forceinline__ const u8* block_of(const u8* row, int at) { return row + (i64)(at / (F::VALUES / 32)) * F::BYTES; }
template <typename F>
__device__ __forceinline__ int piece_of(int at) { return at % (F::VALUES / 32); }

// One link of the chain that every element of a quantized product is, over ascending pieces; the CPU's, bit for bit. The
// dots are Σ code·q of a piece's halves, exact integers, and the sums Σ q; a format scaled by whole pieces has both in the first dot.
template <typename F>
__device__ __forceinline__ float add_piece(float sum, const Scales& w, int dot0, int dot1, float scale, int sum0, int sum1) {
    if (F::HALVES) {
        sum = fmaf(w.d0 * scale, (float)(dot0 - F::ZERO * sum0), sum);
        return fmaf(w.d1 * scale, (float)(dot1 - F::ZERO * sum1), sum);
    }
    sum = fmaf(w.d0 * scale, (float)(dot0 - F::ZERO * (sum0 + sum1)), sum);
    return F::MINIMUM ? fmaf(w.m, scale * (float)(sum0 + sum1), sum) : sum;
}

// Sums of the quants of a piece's halves, as they are stored.
__device__ __forceinline__ int first_sum(u32 sums) { return (i16)(sums & 0xffff); }
__device__ __forceinline__ int second_sum(u32 sums) { return (i16)(sums >> 16); }

#define EVERY_FORMAT(K) K(Q8_0, q8_0) K(Q4_0, q4_0) K(Q4_1, q4_1) K(Q5_0, q5_0) K(Q5_1, q5_1) K(Q4_K, q4_k) K(Q5_K, q5_k) K(Q6_K, q6_k)
