// AdamW, casts and unscaling, sums of squares: what a step does after the gradients.
#include "check.h"
#include "../../adamw.cu"
#undef THREADS
namespace cast_file {
#include "../../cast.cu"
}
#undef THREADS
namespace squares_file {
#include "../../squares.cu"
}
#undef THREADS

using namespace check;

constexpr AdamW RULE{0.999f, 0.1f, 0.95f, 0.05f, 1e-2f, 0.3f, 1e-8f, 0.7f};

template <typename M, typename V, typename C, typename K>
void adamw_agrees(K kernel) {
    Random r(1);
    for (int n : {1, 4, 1029, 2048}) {
        auto p = random<float>(r, n), g = random<float>(r, n);
        auto m = random<M>(r, n);
        auto v = random<V>(r, n);
        for (V& x : v) x = narrow<V>(std::fabs(widen(x)));
        Buffer<C> copy(n);
        auto wp = wide(p), wm = wide(m), wv = wide(v);
        // The trainer's scalar reference, in its order.
        Buffer<float> one = p;
        Buffer<M> one_m = m;
        Buffer<V> one_v = v;
        for (int i = 0; i < n; i++) {
            volatile float s = g[i] * RULE.gradient_scale, decayed = one[i] * RULE.keep, mean = widen(m[i]), square = widen(v[i]);
            mean = mean + (s - mean) * RULE.one_minus_beta1;
            square = square * RULE.beta2 + (RULE.one_minus_beta2 * s) * s;
            one[i] = decayed - RULE.step_size * (mean / (std::sqrt(square) / RULE.root_correction2 + RULE.eps));
            one_m[i] = narrow<M>(mean), one_v[i] = narrow<V>(square);
        }
        run("adamw", rounded_up(n, 1024), 256, 0, [&] { kernel(RULE, p.data(), m.data(), v.data(), g.data(), copy.data(), n); }, p, m, v, copy);
        same("p", p, one);
        same("m", m, one_m);
        same("v", v, one_v);
        for (int i = 0; i < n; i++) {
            double s = double(g[i]) * RULE.gradient_scale, mean = wm[i] + (s - wm[i]) * RULE.one_minus_beta1;
            double square = wv[i] * RULE.beta2 + RULE.one_minus_beta2 * s * s;
            wp[i] = wp[i] * RULE.keep - RULE.step_size * mean / (std::sqrt(square) / RULE.root_correction2 + RULE.eps);
            if constexpr (!std::is_same_v<C, Nothing>) {
                C want = narrow<C>(p[i]);
                if (std::memcmp(&copy[i], &want, sizeof want)) fail("copy");
            }
        }
        near("p", p, wp, 1e-5);
    }
}

void casts_round() {
    Random r(2);
    for (int n : {1, 7, 4096, 2051}) {
        auto x = random<float>(r, n, 3);
        Buffer<bf16> b(n);
        Buffer<f16> h(n);
        Buffer<float> fb(n), fh(n);
        int blocks = rounded_up(n, 2048);
        run("cast", blocks, 256, 0, [&] { cast_file::cast_f32_bf16(x.data(), n, b.data()); }, b);
        run("cast", blocks, 256, 0, [&] { cast_file::cast_f32_f16(x.data(), n, h.data()); }, h);
        run("cast", blocks, 256, 0, [&] { cast_file::cast_bf16_f32(b.data(), n, fb.data()); }, fb);
        run("cast", blocks, 256, 0, [&] { cast_file::cast_f16_f32(h.data(), n, fh.data()); }, fh);
        near("bf16", fb, wide(x), epsilon<bf16>(), 0);
        near("f16", fh, wide(x), epsilon<f16>(), 1e-3);
    }
}

template <typename T, typename K>
void unscale_flags(K kernel) {
    Random r(3);
    for (int n : {1, 2051, 6000}) {
        auto x = random<T>(r, n);
        Buffer<float> y(n);
        Buffer<unsigned> flag(1);
        auto step = [&] { run("unscale", rounded_up(n, 2048), 256, 0, [&] { kernel(x.data(), 0.25f, n, y.data(), flag.data()); }, y, flag); };
        step();
        if (flag[0]) fail("a flag without an overflow");
        for (int i = 0; i < n; i++) if (y[i] != widen(x[i]) * 0.25f) fail("unscale");
        for (float bad : {INFINITY, -INFINITY, NAN}) {
            auto kept = x;
            x[r.below(n)] = narrow<T>(bad), flag[0] = 0;
            step();
            if (flag[0] != 1) fail("an overflow of " + std::to_string(bad) + " was missed");
            x = kept;
        }
    }
}

void squares_have_the_trainers_bits() {
    Random r(4);
    for (int n : {1, 9, 4095, 4096, 4097, 70001}) {
        auto x = random<float>(r, n, 10);
        int chunks = rounded_up(n, CHUNK);
        Buffer<double> sums(chunks), want;
        run("squares", rounded_up(chunks, 16), 128, 0, [&] { squares_file::chunk_squares(x.data(), n, sums.data()); }, sums);
        double plain = 0, total = 0;
        for (int first = 0; first < n; first += CHUNK) {
            double lanes[8] = {}, sum = 0;
            for (int i = first; i < std::min(n, first + CHUNK); i++) lanes[(i - first) % 8] += double(x[i]) * double(x[i]), plain += double(x[i]) * x[i];
            for (double lane : lanes) sum += lane;
            want.push_back(sum);
        }
        same("chunks", sums, want);
        for (double s : sums) total += s;
        if (std::fabs(total - plain) > 1e-12 * plain) fail("the sum");
    }
}

int main(int argc, char** argv) {
    return check::main(argc, argv, {
        {"adamw has the reference's bits, no copy", [] { adamw_agrees<float, float, Nothing>(adamw_f32_f32); }},
        {"adamw has the reference's bits, copy in f32", [] { adamw_agrees<float, float, float>(adamw_f32_f32_to_f32); }},
        {"adamw has the reference's bits, copy in bf16", [] { adamw_agrees<float, float, bf16>(adamw_f32_f32_to_bf16); }},
        {"adamw has the reference's bits, copy in f16", [] { adamw_agrees<float, float, f16>(adamw_f32_f32_to_f16); }},
        {"adamw has the reference's bits, variance in bf16", [] { adamw_agrees<float, bf16, bf16>(adamw_f32_bf16_to_bf16); }},
        {"adamw has the reference's bits, mean in bf16", [] { adamw_agrees<bf16, float, f16>(adamw_bf16_f32_to_f16); }},
        {"adamw has the reference's bits, both states in bf16", [] { adamw_agrees<bf16, bf16, bf16>(adamw_bf16_bf16_to_bf16); }},
        {"casts round to nearest", casts_round},
        {"unscaling flags what is not finite, f32", [] { unscale_flags<float>(cast_file::unscale_f32); }},
        {"unscaling flags what is not finite, bf16", [] { unscale_flags<bf16>(cast_file::unscale_bf16); }},
        {"unscaling flags what is not finite, f16", [] { unscale_flags<f16>(cast_file::unscale_f16); }},
        {"sums of squares have the trainer's bits", squares_have_the_trainers_bits},
    });
}
