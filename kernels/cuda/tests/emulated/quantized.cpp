// Quantized activations, dequantized matrices, and products of both by dp4a and by tensor cores.
#include "blocks.h"
#include "../../formats.cuh"
#include "../../tensor.cuh"
#include "../../quantize_rows.cu"
#undef KERNELS
#undef THREADS
namespace dequantize_file {
#include "../../dequantize.cu"
}
#undef KERNEL
#undef KERNELS
#undef THREADS
namespace gemv_file {
#include "../../quant_gemv.cu"
}
#undef KERNEL
#undef KERNELS
#undef THREADS
namespace gemm_file {
#include "../../quant_gemm.cu"
}

using namespace check;

using Product = void (*)(const u8*, const i8*, const float*, const u32*, int, int, int, float*);

struct Kernels {
    Product gemv[3], gemm;
    void (*dequantize)(const u8*, i64, float*);
    void (*dequantize_bf16)(const u8*, i64, bf16*);
};
#define KERNELS_OF(F, name)                                                                                     \
    {{gemv_file::quant_gemv_##name##_1, gemv_file::quant_gemv_##name##_4, gemv_file::quant_gemv_##name##_8}, gemm_file::quant_gemm_##name, dequantize_file::dequantize_##name##_f32, \
     dequantize_file::dequantize_##name##_bf16},
constexpr Kernels KERNELS[] = {EVERY_FORMAT(KERNELS_OF)};
constexpr int COUNT = sizeof KERNELS / sizeof *KERNELS;

template <typename T, typename K>
void rows_are_quantized(K kernel) {
    Random r(1);
    auto x = random<T>(r, 23 * 32, 5);
    for (int i = 64; i < 96; i++) x[i] = narrow<T>(0);
    x[101] = narrow<T>(1e-38f), x[130] = narrow<T>(-60000);
    Buffer<float> wide_x;
    for (T v : x) wide_x.push_back(widen(v));
    auto want = quantized(wide_x, 1, x.size());
    Activations got{1, int(x.size()), Buffer<signed char>(x.size()), Buffer<float>(23), Buffer<unsigned>(23)};
    auto go = [&] {
        run("quantize_rows", rounded_up(x.size(), 1024), 256, 0,
            [&] { kernel(x.data(), x.size(), got.quants.data(), got.scales.data(), got.sums.data()); }, got.quants, got.scales, got.sums);
    };
    go();
    same("quants", got.quants, want.quants);
    same("scales", got.scales, want.scales);
    same("sums", got.sums, want.sums);
    for (float bad : {NAN, INFINITY}) {
        x[40] = narrow<T>(bad);
        go();
        if (std::isfinite(got.scales[1]) || got.quants[40] != 0) fail("a value that is not finite is hidden");
    }
}

void matrices_are_decoded() {
    Random r(2);
    for (int f = 0; f < COUNT; f++) {
        auto w = matrix(r, FORMATS[f], 3, 768);
        Buffer<float> y(w.n * w.k), want;
        Buffer<bf16> rounded(y.size()), want_rounded;
        int blocks = rounded_up(y.size(), 8 * 256);
        run("dequantize", blocks, 256, 0, [&] { KERNELS[f].dequantize(w.bytes.data(), y.size(), y.data()); }, y);
        run("dequantize", blocks, 256, 0, [&] { KERNELS[f].dequantize_bf16(w.bytes.data(), y.size(), rounded.data()); }, rounded);
        for (int i = 0; i < w.n; i++)
            for (int j = 0; j < w.k; j++) {
                auto p = w.at(i, j);
                want.push_back(FORMATS[f].minimum ? p.d * p.code + p.m : p.d * p.code);
                want_rounded.push_back(narrow<bf16>(want.back()));
            }
        same(FORMATS[f].name, y, want);
        same(FORMATS[f].name, rounded, want_rounded);
    }
}

// Both kernels against the chain, bit for bit; hence against each other, and a row alone against the row in company.
void products_are_the_chain(int m, bool gemm, std::initializer_list<std::pair<int, int>> shapes) {
    for (int f = 0; f < COUNT; f++)
        for (auto [n, pieces] : shapes) {
            Random r(n * 31 + pieces);
            int k = pieces * 32;
            if (k % FORMATS[f].values) continue;
            auto w = matrix(r, FORMATS[f], n, k);
            auto x = quantized(random<float>(r, m * k, 2), m, k);
            Buffer<float> y(m * n), chain;
            Buffer<double> plain, sizes;
            product(w, x, chain, plain, sizes);
            auto call = [&](Product kernel) { kernel(w.bytes.data(), x.quants.data(), x.scales.data(), x.sums.data(), n, pieces, m, y.data()); };
            std::string what = std::string(FORMATS[f].name) + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
            if (gemm)
                run(what, dim3(rounded_up(n, 64), rounded_up(m, 64)), 128, 0, [&] { call(KERNELS[f].gemm); }, y);
            else
                run(what, rounded_up(n, 8), 256, 0, [&] { call(KERNELS[f].gemv[m == 1 ? 0 : m <= 4 ? 1 : 2]); }, y);
            same(what, y, chain);
            for (size_t i = 0; i < y.size(); i++)
                if (!(std::fabs(y[i] - plain[i]) <= (pieces + 4) * 6e-8 * sizes[i])) fail(what + ": far from the exact product");
        }
}

int main(int argc, char** argv) {
    return check::main(argc, argv, {
        {"activations are quantized as on the CPU, f32", [] { rows_are_quantized<float>(quantize_rows_f32); }},
        {"activations are quantized as on the CPU, bf16", [] { rows_are_quantized<bf16>(quantize_rows_bf16); }},
        {"activations are quantized as on the CPU, f16", [] { rows_are_quantized<f16>(quantize_rows_f16); }},
        {"matrices of every format are decoded exactly", matrices_are_decoded},
        {"gemv of one row has the CPU's bits", [] { products_are_the_chain(1, false, {{1, 1}, {21, 3}, {9, 72}, {3, 136}}); }},
        {"gemv of two rows, a kernel for four has the CPU's bits", [] { products_are_the_chain(2, false, {{9, 5}, {9, 72}}); }},
        {"gemv of three rows has the CPU's bits", [] { products_are_the_chain(3, false, {{9, 5}, {9, 72}}); }},
        {"gemv of eight rows has the CPU's bits", [] { products_are_the_chain(8, false, {{9, 5}, {9, 40}}); }},
        {"gemm of one row has the CPU's bits", [] { products_are_the_chain(1, true, {{5, 1}, {69, 24}}); }},
        {"gemm of 13 rows has the CPU's bits", [] { products_are_the_chain(13, true, {{69, 7}, {17, 16}}); }},
        {"gemm of 71 rows has the CPU's bits", [] { products_are_the_chain(71, true, {{66, 9}, {16, 8}}); }},
    });
}
