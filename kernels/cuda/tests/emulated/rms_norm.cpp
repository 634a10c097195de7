#include "check.h"
#include "../../rms_norm.cu"

using namespace check;

constexpr float EPS = 1e-5f;

template <typename T>
Buffer<T> forward(const Buffer<T>& x, const Buffer<T>& w, int rows, void (*kernel)(const T*, const T*, float, int, T*)) {
    int d = w.size();
    Buffer<T> y(size_t(rows) * d);
    run("rms_norm", rows, THREADS, 0, [&] { kernel(x.data(), w.data(), EPS, d, y.data()); }, y);
    return y;
}

double inverse_rms(const double* x, int d) {
    double sum = 0;
    for (int i = 0; i < d; i++) sum += x[i] * x[i];
    return 1 / std::sqrt(sum / d + double(EPS));
}

template <typename T>
void agrees(void (*kernel)(const T*, const T*, float, int, T*)) {
    Random r(1);
    for (int d : {1, 7, 33, 64, 576, 2051}) {
        int rows = 3;
        auto x = random<T>(r, size_t(rows) * d), w = random<T>(r, d);
        auto y = forward(x, w, rows, kernel);
        auto wx = wide(x), ww = wide(w);
        Buffer<double> want;
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < d; j++) want.push_back(wx[i * d + j] * inverse_rms(&wx[i * d], d) * ww[j]);
        near("y", y, want, 20 * 6e-8 + epsilon<T>());
        for (int i = 0; i < rows; i++) {
            Buffer<T> row(x.begin() + i * d, x.begin() + (i + 1) * d);
            same("a row alone", forward(row, w, 1, kernel), Buffer<T>(y.begin() + i * d, y.begin() + (i + 1) * d));
        }
    }
}

template <typename T>
void backward_agrees(void (*dx_kernel)(const T*, const T*, float, const T*, int, T*, float*),
                     void (*dw_kernel)(const T*, const T*, const float*, int, int, float*)) {
    Random r(2);
    for (int d : {5, 64, 1030}) {
        int rows = 131, parts = rounded_up(rows, ROWS_PER_PART);
        auto x = random<T>(r, size_t(rows) * d), w = random<T>(r, d), dy = random<T>(r, size_t(rows) * d);
        Buffer<T> dx(x.size());
        Buffer<float> inverse(rows), part(size_t(parts) * d), dw(d);
        run("dx", rows, THREADS, 0, [&] { dx_kernel(x.data(), w.data(), EPS, dy.data(), d, dx.data(), inverse.data()); }, dx, inverse);
        run("dw", dim3(rounded_up(d, THREADS), parts), THREADS, 0,
            [&] { dw_kernel(x.data(), dy.data(), inverse.data(), rows, d, part.data()); }, part);
        run("dw", rounded_up(d, THREADS), THREADS, 0, [&] { rms_norm_backward_w_sum(part.data(), parts, d, dw.data()); }, dw);
        auto wx = wide(x), ww = wide(w), wdy = wide(dy);
        Buffer<double> want_dx, want_dw(d);
        for (int i = 0; i < rows; i++) {
            double k = 0, inv = inverse_rms(&wx[i * d], d);
            for (int j = 0; j < d; j++) k += wdy[i * d + j] * ww[j] * wx[i * d + j];
            for (int j = 0; j < d; j++) {
                want_dx.push_back(wdy[i * d + j] * ww[j] * inv - wx[i * d + j] * k * inv * inv * inv / d);
                want_dw[j] += wdy[i * d + j] * wx[i * d + j] * inv;
            }
        }
        near("dx", dx, want_dx, 1e-6 + epsilon<T>());
        near("dw", dw, want_dw, 131 * 6e-8);
    }
}

int main(int argc, char** argv) {
    return check::main(argc, argv, {
        {"rms_norm in f32 is the formula, each row alone as in company", [] { agrees(rms_norm_f32); }},
        {"rms_norm in bf16 is the formula, each row alone as in company", [] { agrees(rms_norm_bf16); }},
        {"rms_norm in f16 is the formula, each row alone as in company", [] { agrees(rms_norm_f16); }},
        {"gradients of rms_norm in f32", [] { backward_agrees(rms_norm_backward_x_f32, rms_norm_backward_w_f32); }},
        {"gradients of rms_norm in bf16", [] { backward_agrees(rms_norm_backward_x_bf16, rms_norm_backward_w_bf16); }},
        {"gradients of rms_norm in f16", [] { backward_agrees(rms_norm_backward_x_f16, rms_norm_backward_w_f16); }},
    });
}
