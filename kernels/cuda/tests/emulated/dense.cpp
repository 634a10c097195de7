// Dense products and cross-entropy.
#include "check.h"
#include "../../gemm.cu"
#undef KERNEL
#undef THREADS
namespace loss_file {
#include "../../cross_entropy.cu"
}

using namespace check;

template <typename T, typename Y>
void product_agrees(Orientation a, Orientation b, void (*kernel)(const T*, const T*, int, int, int, int, Y*), bool exact) {
    for (auto [m, n, k] : {std::tuple{1, 3, 5}, {130, 70, 33}, {37, 65, 64}}) {
        Random r(m);
        auto x = random<T>(r, m * k), w = random<T>(r, n * k);
        auto start = random<Y>(r, m * n);
        size_t shared = 2 * sizeof(T) * (stage_size<T>(a, M_TILE) + stage_size<T>(b, N_TILE));
        auto left = [&, m = m, k = k](int i, int l) { return x[a == Rows ? i * k + l : l * m + i]; };
        auto right = [&, n = n, k = k](int j, int l) { return w[b == Rows ? j * k + l : l * n + j]; };
        for (int accumulate : {0, 1}) {
            auto y = start;
            run("gemm", dim3(rounded_up(n, N_TILE), rounded_up(m, M_TILE)), 128, shared,
                [&, m = m, n = n, k = k] { kernel(x.data(), w.data(), m, n, k, accumulate, y.data()); }, y);
            Buffer<double> want;
            Buffer<Y> chain;
            for (int i = 0; i < m; i++)
                for (int j = 0; j < n; j++) {
                    double sum = accumulate ? widen(start[i * n + j]) : 0;
                    float one = sum;
                    for (int l = 0; l < k; l++) sum += double(widen(left(i, l))) * widen(right(j, l)), one = fmaf(widen(left(i, l)), widen(right(j, l)), one);
                    want.push_back(sum), chain.push_back(narrow<Y>(one));
                }
            near("y", y, want, 64 * 6e-8 + epsilon<Y>());
            if (exact) same("the chain over k", y, chain);
        }
    }
}

template <typename T>
void losses_agree(void (*kernel)(const float*, const int*, int, double*, T*)) {
    Random r(3);
    for (int vocab : {1, 77, 1000}) {
        Buffer<int> targets{0, -100, vocab - 1, vocab / 2};
        int rows = targets.size();
        auto logits = random<float>(r, rows * vocab, 8);
        Buffer<double> nll(rows), want, want_slopes;
        Buffer<T> slopes(rows * vocab);
        run("loss", rows, 256, 0, [&] { kernel(logits.data(), targets.data(), vocab, nll.data(), slopes.data()); }, nll, slopes);
        Buffer<double> alone(rows);
        run("loss alone", rows, 256, 0, [&] { kernel(logits.data(), targets.data(), vocab, alone.data(), nullptr); }, alone);
        same("without slopes", alone, nll);
        for (int i = 0; i < rows; i++) {
            double sum = 0, most = -1e30;
            for (int j = 0; j < vocab; j++) most = std::max<double>(most, logits[i * vocab + j]);
            for (int j = 0; j < vocab; j++) sum += std::exp(logits[i * vocab + j] - most);
            bool counts = targets[i] >= 0;
            want.push_back(counts ? std::log(sum) + most - logits[i * vocab + targets[i]] : 0);
            for (int j = 0; j < vocab; j++) want_slopes.push_back(counts ? std::exp(logits[i * vocab + j] - most) / sum - (j == targets[i]) : 0);
        }
        for (int i = 0; i < rows; i++) if (!(std::fabs(nll[i] - want[i]) <= 2e-6 * std::max(1.0, std::fabs(want[i])))) fail("nll");
        near("slopes", slopes, want_slopes, 5e-7 + epsilon<T>());
        if constexpr (std::is_same_v<T, float>) {
            auto in_place = logits;
            run("in place", rows, 256, 0, [&] { kernel(in_place.data(), targets.data(), vocab, nll.data(), in_place.data()); }, in_place, nll);
            same("in place", in_place, slopes);
        }
    }
}

int main(int argc, char** argv) {
    return check::main(argc, argv, {
        {"x·wᵀ in f32 has the CPU's bits", [] { product_agrees(Rows, Rows, gemm_nt_f32, true); }},
        {"dy·w in f32 has the CPU's bits", [] { product_agrees(Rows, Columns, gemm_nn_f32, true); }},
        {"dyᵀ·x in f32 has the CPU's bits", [] { product_agrees(Columns, Columns, gemm_tn_f32, true); }},
        {"x·wᵀ in bf16", [] { product_agrees(Rows, Rows, gemm_nt_bf16, false); }},
        {"dy·w in bf16, f32 out", [] { product_agrees(Rows, Columns, gemm_nn_bf16_to_f32, false); }},
        {"dyᵀ·x in bf16, f32 out", [] { product_agrees(Columns, Columns, gemm_tn_bf16_to_f32, false); }},
        {"x·wᵀ in f16, f32 out", [] { product_agrees(Rows, Rows, gemm_nt_f16_to_f32, false); }},
        {"dy·w in f16", [] { product_agrees(Rows, Columns, gemm_nn_f16, false); }},
        {"cross-entropy and its slopes, f32, also in place", [] { losses_agree(loss_file::cross_entropy_f32); }},
        {"cross-entropy and its slopes, bf16", [] { losses_agree(loss_file::cross_entropy_bf16); }},
        {"cross-entropy and its slopes, f16", [] { losses_agree(loss_file::cross_entropy_f16); }},
    });
}
