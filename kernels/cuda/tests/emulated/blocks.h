// The block formats once more, value by value as ggml documents them, for comparison; random matrices in them; and the chain
// that defines a quantized product.
#pragma once
#include "check.h"

namespace check {

struct Format {
    const char* name;
    int values, bytes;
    // What value `e` of a block is: d · code + m, exactly.
    struct Parts { int code; float d, m; };
    Parts (*parts)(const uint8_t* block, int e);
    // Whether the second 16 of 32 have a scale of their own; whether there is a minimum.
    bool halves, minimum;
    // Where f16 scales lie: the rest of a random block may be any bytes.
    int scale_at, minimum_at;
};

inline float f16_at(const uint8_t* p) { return widen(f16{uint16_t(p[0] | p[1] << 8)}); }
inline int nibble(const uint8_t* p, int e) { return e < 16 ? p[e] % 16 : p[e - 16] / 16; }
inline int fifth(const uint8_t* p, int e) { return (p[e / 8] >> e % 8 & 1) * 16; }
inline int six_bits(const uint8_t* p, int i, bool minimum) {
    if (i < 4) return p[i + 4 * minimum] % 64;
    return (minimum ? p[i + 4] / 16 : p[i + 4] % 16) + p[i - 4 + 4 * minimum] / 64 * 16;
}

inline const Format FORMATS[] = {
    {"q8_0", 32, 34, [](const uint8_t* b, int e) { return Format::Parts{int8_t(b[2 + e]), f16_at(b), 0}; }, false, false, 0, -1},
    {"q4_0", 32, 18, [](const uint8_t* b, int e) { return Format::Parts{nibble(b + 2, e) - 8, f16_at(b), 0}; }, false, false, 0, -1},
    {"q4_1", 32, 20, [](const uint8_t* b, int e) { return Format::Parts{nibble(b + 4, e), f16_at(b), f16_at(b + 2)}; }, false, true, 0, 2},
    {"q5_0", 32, 22, [](const uint8_t* b, int e) { return Format::Parts{nibble(b + 6, e) + fifth(b + 2, e) - 16, f16_at(b), 0}; }, false, false, 0, -1},
    {"q5_1", 32, 24, [](const uint8_t* b, int e) { return Format::Parts{nibble(b + 8, e) + fifth(b + 4, e), f16_at(b), f16_at(b + 2)}; }, false, true, 0, 2},
    {"q4_k", 256, 144, [](const uint8_t* b, int e) {
        int i = e / 32, byte = b[16 + e / 64 * 32 + e % 32];
        return Format::Parts{i % 2 ? byte / 16 : byte % 16, f16_at(b) * six_bits(b + 4, i, false), -(f16_at(b + 2) * six_bits(b + 4, i, true))};
    }, false, true, 0, 2},
    {"q5_k", 256, 176, [](const uint8_t* b, int e) {
        int i = e / 32, byte = b[48 + e / 64 * 32 + e % 32], code = (i % 2 ? byte / 16 : byte % 16) + (b[16 + e % 32] >> i & 1) * 16;
        return Format::Parts{code, f16_at(b) * six_bits(b + 4, i, false), -(f16_at(b + 2) * six_bits(b + 4, i, true))};
    }, false, true, 0, 2},
    {"q6_k", 256, 210, [](const uint8_t* b, int e) {
        int half = e / 128, group = e / 32 % 4, l = e % 32, byte = b[half * 64 + group % 2 * 32 + l];
        int code = (group < 2 ? byte % 16 : byte / 16) + (b[128 + half * 32 + l] >> 2 * group & 3) * 16;
        return Format::Parts{code - 32, f16_at(b + 208) * float(int8_t(b[192 + e / 16])), 0};
    }, true, false, 208, -1},
};

struct Matrix {
    const Format& format;
    int n, k;
    // Begins where allocations do, at a multiple of 16.
    Buffer<uint8_t> bytes;
    size_t row_bytes() const { return size_t(k / format.values) * format.bytes; }
    Format::Parts at(int row, int column) const {
        return format.parts(&bytes[row * row_bytes() + column / format.values * format.bytes], column % format.values);
    }
};

inline Matrix matrix(Random& r, const Format& f, int n, int k) {
    Matrix m{f, n, k, {}};
    m.bytes.resize(n * m.row_bytes());
    for (uint8_t& b : m.bytes) b = r.bits() >> 13;
    for (size_t at = 0; at < m.bytes.size(); at += f.bytes)
        for (int scale : {f.scale_at, f.minimum_at})
            if (scale >= 0) {
                uint16_t bits = half_bits(r.uniform() * 0.05f);
                m.bytes[at + scale] = bits, m.bytes[at + scale + 1] = bits >> 8;
            }
    return m;
}

// Rows of 8-bit activations, quantized as the trainer's reference does.
struct Activations {
    int m, k;
    Buffer<signed char> quants;
    Buffer<float> scales;
    Buffer<unsigned> sums;
};

inline Activations quantized(const Buffer<float>& x, int m, int k) {
    Activations a{m, k, Buffer<signed char>(x.size()), Buffer<float>(x.size() / 32), Buffer<unsigned>(x.size() / 32)};
    for (size_t piece = 0; piece < x.size() / 32; piece++) {
        float most = 0;
        for (int i = 0; i < 32; i++) most = std::fabs(x[piece * 32 + i]) > most ? std::fabs(x[piece * 32 + i]) : most;
        float inverse = most > 0 ? 127.0f / most : 0.0f;
        if (std::isinf(inverse)) inverse = 0;
        int sums[2] = {};
        for (int i = 0; i < 32; i++) {
            a.quants[piece * 32 + i] = int(std::nearbyint(x[piece * 32 + i] * inverse));
            sums[i / 16] += a.quants[piece * 32 + i];
        }
        a.scales[piece] = most / 127.0f;
        a.sums[piece] = (sums[0] & 0xffff) | unsigned(sums[1]) << 16;
    }
    return a;
}

// The product as ../../../src/cpu/quant/product.rs defines it, and in double precision, with the sum of the
// terms' magnitudes.
inline void product(const Matrix& w, const Activations& x, Buffer<float>& chain, Buffer<double>& plain, Buffer<double>& sizes) {
    chain.clear(), plain.clear(), sizes.clear();
    for (int row = 0; row < x.m; row++)
        for (int n = 0; n < w.n; n++) {
            float sum = 0;
            double exact = 0, size = 0;
            for (int piece = 0; piece < w.k / 32; piece++) {
                float scale = x.scales[row * (w.k / 32) + piece];
                const signed char* q = &x.quants[size_t(row) * w.k + piece * 32];
                int dots[2] = {}, sums[2] = {};
                for (int i = 0; i < 32; i++) {
                    auto p = w.at(n, piece * 32 + i);
                    dots[i / 16] += p.code * q[i], sums[i / 16] += q[i];
                    double term = (double(p.d) * p.code + p.m) * q[i] * scale;
                    exact += term, size += (std::fabs(double(p.d) * p.code) + std::fabs(p.m)) * std::abs(q[i]) * scale;
                }
                auto first = w.at(n, piece * 32), second = w.at(n, piece * 32 + 16);
                if (w.format.halves) {
                    sum = fmaf(first.d * scale, float(dots[0]), sum);
                    sum = fmaf(second.d * scale, float(dots[1]), sum);
                } else {
                    sum = fmaf(first.d * scale, float(dots[0] + dots[1]), sum);
                    if (w.format.minimum) sum = fmaf(first.m, scale * float(sums[0] + sums[1]), sum);
                }
            }
            chain.push_back(sum), plain.push_back(exact), sizes.push_back(size);
        }
}

}  // namespace check
