// RoPE, SwiGLU, sums, dropout and embeddings. A file's kernels live in a namespace of their own,
// as they do in a module.
#include "check.h"
namespace rope_file {
#include "../../rope.cu"
}
#undef KERNELS
#undef THREADS
namespace swiglu_file {
#include "../../swiglu.cu"
}
#undef KERNELS
#undef THREADS
namespace dropout_file {
#include "../../dropout.cu"
}
#undef KERNELS
#undef THREADS
namespace add_file {
#include "../../add.cu"
}
#undef KERNELS
#undef THREADS
namespace embedding_file {
#include "../../embedding.cu"
}
#undef THREADS

using namespace check;

constexpr int BLOCK = 256;

template <typename T, typename K>
void rope_agrees(K kernel) {
    Random r(1);
    for (auto [rows, heads, half] : {std::tuple{3, 5, 8}, {2, 3, 7}, {5, 2, 32}}) {
        auto x = random<T>(r, rows * heads * 2 * half);
        Buffer<float> cos, sin;
        for (int i = 0; i < rows * half; i++) cos.push_back(std::cos(i * 0.37f)), sin.push_back(std::sin(i * 0.37f));
        for (float sign : {1.0f, -1.0f}) {
            Buffer<T> y(x.size());
            int n = Width<T>::value, blocks = rounded_up(rows * heads * rounded_up(half, n), BLOCK);
            run("rope", blocks, BLOCK, 0, [&] { kernel(x.data(), cos.data(), sin.data(), sign, rows, heads, half, y.data()); }, y);
            Buffer<double> want(x.size());
            for (int h = 0; h < rows * heads; h++)
                for (int i = 0; i < half; i++) {
                    double a = widen(x[h * 2 * half + i]), b = widen(x[h * 2 * half + half + i]);
                    double c = cos[h / heads * half + i], s = sign * double(sin[h / heads * half + i]);
                    want[h * 2 * half + i] = a * c - b * s;
                    want[h * 2 * half + half + i] = b * c + a * s;
                }
            near("y", y, want, 2e-7 + epsilon<T>());
            if constexpr (std::is_same_v<T, float>) {
                // The CPU's order, nothing fused.
                Buffer<float> bits(x.size());
                for (int h = 0; h < rows * heads; h++)
                    for (int i = 0; i < half; i++) {
                        float a = x[h * 2 * half + i], b = x[h * 2 * half + half + i];
                        float c = cos[h / heads * half + i], s = sign * sin[h / heads * half + i];
                        bits[h * 2 * half + i] = a * c - b * s, bits[h * 2 * half + half + i] = b * c + a * s;
                    }
                same("the CPU's bits", y, bits);
            }
        }
    }
}

template <typename T, typename F, typename B>
void swiglu_agrees(F forward, B backward) {
    Random r(2);
    for (int n : {1, 5, 1024, 3001}) {
        auto gate = random<T>(r, n, 6), up = random<T>(r, n), dy = random<T>(r, n);
        Buffer<T> y(n), dgate(n), dup(n);
        int blocks = rounded_up(n, BLOCK * Width<T>::value);
        run("swiglu", blocks, BLOCK, 0, [&] { forward(gate.data(), up.data(), n, y.data()); }, y);
        run("backward", blocks, BLOCK, 0, [&] { backward(gate.data(), up.data(), dy.data(), n, dgate.data(), dup.data()); }, dgate, dup);
        Buffer<double> want, want_gate, want_up;
        for (int i = 0; i < n; i++) {
            double g = widen(gate[i]), u = widen(up[i]), d = widen(dy[i]), s = 1 / (1 + std::exp(-g));
            want.push_back(g * s * u);
            want_gate.push_back(d * u * s * (1 + g * (1 - s)));
            want_up.push_back(d * g * s);
        }
        if constexpr (std::is_same_v<T, float>)
            for (int i = 0; i < n; i++) {
                // The CPU's order, nothing fused.
                float s = 1.0f / (1.0f + exponential(-gate[i]));
                bool forward_bits = y[i] == gate[i] * s * up[i], up_bits = dup[i] == dy[i] * gate[i] * s;
                if (!forward_bits || !up_bits || dgate[i] != dy[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s))) fail("not the CPU's bits");
            }
        near("y", y, want, 6e-7 + epsilon<T>());
        near("dgate", dgate, want_gate, 1e-6 + epsilon<T>());
        near("dup", dup, want_up, 6e-7 + epsilon<T>());
    }
}

void dropout_is_the_cpus() {
    Random r(4);
    int n = 5001;
    auto x = random<float>(r, n);
    Buffer<float> y(n);
    unsigned long long key = 77, threshold = 0.3 * 4294967296.0;
    float scale = 1.0f / (1.0f - 0.3f);
    run("dropout", rounded_up(n, 4 * BLOCK), BLOCK, 0, [&] { dropout_file::dropout_f32(x.data(), key, threshold, scale, n, y.data()); }, y);
    int kept = 0;
    for (int i = 0; i < n; i++) {
        // The mask as the trainer defines it: SplitMix64, the upper half against the threshold.
        uint64_t z = key + (uint64_t(i) + 1) * 0x9E3779B97F4A7C15ull;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull, z = (z ^ z >> 27) * 0x94D049BB133111EBull, z ^= z >> 31;
        bool keep = z >> 32 >= threshold;
        kept += keep;
        if (y[i] != (keep ? x[i] * scale : 0.0f)) fail("element " + std::to_string(i));
    }
    if (std::abs(kept / double(n) - 0.7) > 0.03) fail("kept " + std::to_string(kept));
}

void embeddings_agree() {
    Random r(5);
    int vocab = 11, d = 70;
    auto w = random<f16>(r, vocab * d);
    Buffer<unsigned> ids{3, 10, 3, 0, 3, 10};
    Buffer<f16> y(ids.size() * d);
    run("gather", dim3(ids.size(), 1), BLOCK, 0, [&] { embedding_file::gather_rows_f16(w.data(), ids.data(), d, y.data()); }, y);
    for (size_t i = 0; i < ids.size(); i++)
        for (int j = 0; j < d; j++) if (y[i * d + j].bits != w[ids[i] * d + j].bits) fail("gather");
    auto dy = random<float>(r, ids.size() * d);
    Buffer<unsigned> rows{3, 0, 2, 4, 1, 5}, starts{0, 1, 4, 6}, of{0, 3, 10};
    Buffer<float> dw(vocab * d), want(vocab * d);
    run("scatter", dim3(3, 1), BLOCK, 0,
        [&] { embedding_file::scatter_rows_f32(dy.data(), rows.data(), starts.data(), of.data(), d, dw.data()); }, dw);
    for (size_t i = 0; i < ids.size(); i++)
        for (int j = 0; j < d; j++) want[ids[i] * d + j] += dy[i * d + j];
    same("dw", dw, want);
}

template <typename T>
void sums_agree(void (*kernel)(const T*, long long, long long, T*)) {
    Random r(8);
    for (auto [rows, period] : {std::pair{1, 37}, {3, 64}, {5, 6}, {1, 4096}}) {
        auto x = random<T>(r, period), y = random<T>(r, rows * period);
        auto want = wide(y);
        for (size_t i = 0; i < want.size(); i++) want[i] += widen(x[i % period]);
        int blocks = rounded_up(rounded_up(y.size(), Width<T>::value), BLOCK);
        run("add", blocks, BLOCK, 0, [&] { kernel(x.data(), period, y.size(), y.data()); }, y);
        near("y", y, want, epsilon<T>());
    }
}

int main(int argc, char** argv) {
    return check::main(argc, argv, {
        {"rope rotates pairs, both ways, f32", [] { rope_agrees<float>(rope_file::rope_f32); }},
        {"rope rotates pairs, both ways, bf16", [] { rope_agrees<bf16>(rope_file::rope_bf16); }},
        {"rope rotates pairs, both ways, f16", [] { rope_agrees<f16>(rope_file::rope_f16); }},
        {"swiglu and its gradients, f32", [] { swiglu_agrees<float>(swiglu_file::swiglu_f32, swiglu_file::swiglu_backward_f32); }},
        {"swiglu and its gradients, bf16", [] { swiglu_agrees<bf16>(swiglu_file::swiglu_bf16, swiglu_file::swiglu_backward_bf16); }},
        {"swiglu and its gradients, f16", [] { swiglu_agrees<f16>(swiglu_file::swiglu_f16, swiglu_file::swiglu_backward_f16); }},
        {"dropout has the trainer's mask", dropout_is_the_cpus},
        {"a row is added to every row, f32", [] { sums_agree<float>(add_file::add_f32); }},
        {"a row is added to every row, bf16", [] { sums_agree<bf16>(add_file::add_bf16); }},
        {"a row is added to every row, f16", [] { sums_agree<f16>(add_file::add_f16); }},
        {"embeddings are gathered, and their gradients added in order", embeddings_agree},
    });
}
