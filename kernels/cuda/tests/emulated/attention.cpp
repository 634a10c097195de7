// Causal attention over packed documents, and its gradients.
#include "check.h"
#include "../../attention.cu"

using namespace check;

struct Shape {
    std::vector<int> documents;
    int heads, kv_heads, d, window;
    int rows() const { return std::accumulate(documents.begin(), documents.end(), 0); }
};

Buffer<Tile> tiles(const Shape& s) {
    Buffer<Tile> all;
    unsigned start = 0;
    for (unsigned length : s.documents) {
        for (unsigned at = 0; at < length; at += ROWS) all.push_back({start + at, std::min<unsigned>(ROWS, length - at), start, start + length});
        start += length;
    }
    return all;
}

template <typename T>
struct Tensors { Buffer<T> q, k, v, dy, y, dq, dk, dv; Buffer<float> logs, deltas; };

template <typename T>
Tensors<T> inputs(const Shape& s) {
    Random r(s.d + s.window);
    size_t rows = s.rows(), wide = rows * s.heads * s.d, narrow = rows * s.kv_heads * s.d;
    return {random<T>(r, wide, 2), random<T>(r, narrow, 2), random<T>(r, narrow), random<T>(r, wide), Buffer<T>(wide), Buffer<T>(wide),
            Buffer<T>(narrow), Buffer<T>(narrow), Buffer<float>(rows * s.heads), Buffer<float>(rows * s.heads)};
}

// The kernels of one type and width.
template <typename T>
struct Kernels {
    void (*forward)(const T*, const T*, const T*, const Tile*, int, int, int, int, float, int, T*, float*);
    void (*deltas)(const T*, const T*, int, int, int, float*);
    void (*queries)(const T*, const T*, const T*, const T*, const float*, const float*, const Tile*, int, int, int, int, float, int, T*);
    void (*keys)(const T*, const T*, const T*, const T*, const float*, const float*, const Tile*, int, int, int, int, float, int, T*, T*);
    int forward_bytes, queries_bytes, keys_bytes;
};
#define KERNELS_OF(T, D, name, type)                                                                                                    \
    Kernels<T>{attention_##name, attention_deltas_##type, attention_backward_queries_##name, attention_backward_keys_##name, \
               forward_bytes<T, D>(), queries_bytes<T, D>(), keys_bytes<T, D>()}

template <typename T>
void compute(const Kernels<T>& kernels, const Shape& s, Tensors<T>& t) {
    auto work = tiles(s);
    int rows = s.rows(), count = work.size();
    float scale = 1 / std::sqrt(float(s.d));
    const T *q = t.q.data(), *k = t.k.data(), *v = t.v.data(), *dy = t.dy.data();
    if (std::max({kernels.forward_bytes, kernels.queries_bytes, kernels.keys_bytes}) > 99 << 10) fail("more shared memory than consumer cards have");
    run("attention", dim3(count, s.heads), THREADS, kernels.forward_bytes, [&] {
        kernels.forward(q, k, v, work.data(), rows, s.heads, s.kv_heads, s.d, scale, s.window, t.y.data(), t.logs.data()); }, t.y, t.logs);
    run("deltas", rounded_up(rows * s.heads, 4), THREADS, 0, [&] { kernels.deltas(t.y.data(), dy, rows, s.heads, s.d, t.deltas.data()); }, t.deltas);
    run("dq", dim3(count, s.heads), THREADS, kernels.queries_bytes, [&] {
        kernels.queries(q, k, v, dy, t.logs.data(), t.deltas.data(), work.data(), rows, s.heads, s.kv_heads, s.d, scale, s.window, t.dq.data()); }, t.dq);
    run("dk, dv", dim3(count, s.kv_heads), THREADS, kernels.keys_bytes, [&] {
        kernels.keys(q, k, v, dy, t.logs.data(), t.deltas.data(), work.data(), rows, s.heads, s.kv_heads, s.d, scale, s.window, t.dk.data(), t.dv.data()); }, t.dk, t.dv);
}

// y, dq, dk, dv in double precision.
template <typename T>
std::array<Buffer<double>, 4> reference(const Shape& s, const Tensors<T>& t) {
    int rows = s.rows(), group = s.heads / s.kv_heads, d = s.d;
    double scale = 1 / std::sqrt(double(d));
    auto q = wide(t.q), k = wide(t.k), v = wide(t.v), dy = wide(t.dy);
    Buffer<double> y(q.size()), dq(q.size()), dk(k.size()), dv(k.size());
    Buffer<int> starts;
    for (int length : s.documents) starts.insert(starts.end(), length, int(starts.size()));
    for (int row = 0; row < rows; row++)
        for (int head = 0; head < s.heads; head++) {
            size_t at = (size_t(row) * s.heads + head) * d;
            int first = s.window ? std::max(starts[row], row + 1 - s.window) : starts[row];
            auto key = [&](int j) { return (size_t(j) * s.kv_heads + head / group) * d; };
            std::vector<double> p, dp;
            double sum = 0, delta = 0;
            for (int j = first; j <= row; j++) {
                double score = 0, slope = 0;
                for (int i = 0; i < d; i++) score += q[at + i] * k[key(j) + i], slope += dy[at + i] * v[key(j) + i];
                p.push_back(std::exp(score * scale)), dp.push_back(slope);
                sum += p.back();
            }
            for (size_t j = 0; j < p.size(); j++) p[j] /= sum, delta += p[j] * dp[j];
            for (int j = first; j <= row; j++)
                for (int i = 0; i < d; i++) {
                    double w = p[j - first], ds = w * (dp[j - first] - delta) * scale;
                    y[at + i] += w * v[key(j) + i];
                    dv[key(j) + i] += w * dy[at + i];
                    dq[at + i] += ds * k[key(j) + i];
                    dk[key(j) + i] += ds * q[at + i];
                }
        }
    return {y, dq, dk, dv};
}

template <typename T>
void agrees(const Kernels<T>& kernels, const Shape& s) {
    auto t = inputs<T>(s);
    compute(kernels, s, t);
    auto [y, dq, dk, dv] = reference(s, t);
    // Scores and probabilities are rounded to T between the products.
    double tolerance = 4e-6 + 3 * (sizeof(T) == 2 ? epsilon<T>() : 0);
    near("y", t.y, y, tolerance);
    near("dq", t.dq, dq, tolerance);
    near("dk", t.dk, dk, tolerance, 2);
    near("dv", t.dv, dv, tolerance, 2);
}

// Bit for bit: the last document of a pack, and that document by itself.
template <typename T>
void a_document_does_not_see_its_neighbours(const Kernels<T>& kernels) {
    Shape pack{{37, 70}, 2, 1, 16, 50}, alone{{70}, 2, 1, 16, 50};
    auto t = inputs<T>(pack);
    Tensors<T> own = inputs<T>(alone);
    auto tail = [&](const Buffer<T>& x) { return Buffer<T>(x.begin() + x.size() / 107 * 37, x.end()); };
    own.q = tail(t.q), own.k = tail(t.k), own.v = tail(t.v), own.dy = tail(t.dy);
    compute(kernels, pack, t);
    compute(kernels, alone, own);
    same("y", own.y, tail(t.y));
    same("dq", own.dq, tail(t.dq));
    same("dk", own.dk, tail(t.dk));
    same("dv", own.dv, tail(t.dv));
}

int main(int argc, char** argv) {
    return check::main(argc, argv, {
        {"f32, heads of 6, three documents", [] { agrees(KERNELS_OF(float, 64, f32_64, f32), {{5, 67, 1}, 4, 2, 6, 0}); }},
        {"f32, heads of 64, a window", [] { agrees(KERNELS_OF(float, 64, f32_64, f32), {{80, 3}, 3, 1, 64, 20}); }},
        {"f32, heads of 128", [] { agrees(KERNELS_OF(float, 128, f32_128, f32), {{70}, 1, 1, 128, 0}); }},
        {"bf16, heads of 64, three documents", [] { agrees(KERNELS_OF(bf16, 64, bf16_64, bf16), {{5, 131, 1}, 4, 2, 64, 0}); }},
        {"bf16, heads of 20, a window", [] { agrees(KERNELS_OF(bf16, 64, bf16_64, bf16), {{140}, 2, 2, 20, 33}); }},
        {"bf16, heads of 128", [] { agrees(KERNELS_OF(bf16, 128, bf16_128, bf16), {{67}, 2, 1, 128, 0}); }},
        {"f16, heads of 64", [] { agrees(KERNELS_OF(f16, 64, f16_64, f16), {{65, 9}, 2, 1, 64, 0}); }},
        {"f16, heads of 80, a window", [] { agrees(KERNELS_OF(f16, 128, f16_128, f16), {{70}, 1, 1, 80, 40}); }},
        {"a document has the same bits in any pack, f32", [] { a_document_does_not_see_its_neighbours(KERNELS_OF(float, 64, f32_64, f32)); }},
        {"a document has the same bits in any pack, bf16", [] { a_document_does_not_see_its_neighbours(KERNELS_OF(bf16, 64, bf16_64, bf16)); }},
    });
}
