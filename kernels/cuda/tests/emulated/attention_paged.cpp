// Decoding through the paged KV cache, in every type it may have.
#include "check.h"
#include "../../attention_paged.cu"

using namespace check;

template <typename T>
struct Kernels {
    void (*write)(const float*, const float*, const Query*, const u32*, int, int, int, T*, float*);
    void (*attend)(const float*, const Query*, const u32*, T*, float*, int, int, int, float, int, int, float*);
    void (*prompt)(const float*, const Stretch*, const u32*, T*, float*, int, int, int, float, int, float*);
    int group;
};

// Sequences of these lengths; each row is the last query of one.
struct Shape {
    Buffer<int> lengths;
    int heads, kv_heads, d, window;
};

struct Pages {
    Buffer<u32> tables, starts;
    int blocks = 0;
};

// Block tables in a shuffled order, with a block that belongs to nobody.
Pages pages(const Shape& s) {
    Pages p;
    for (int length : s.lengths) p.starts.push_back(p.blocks), p.blocks += rounded_up(length, KV_BLOCK);
    p.tables.resize(p.blocks);
    int stride = 1;
    for (int candidate : {7, 11, 13, 17}) if (p.blocks % candidate) stride = candidate;
    for (int i = 0; i < p.blocks; i++) p.tables[i] = 1 + (i * stride) % p.blocks;
    p.blocks++;
    return p;
}

template <typename T>
Buffer<float> attend(const Kernels<T>& kernels, const Shape& s, const Pages& p, const Buffer<float>& q, const Buffer<Query>& queries, Buffer<T>& data, Buffer<float>& scales) {
    int rows = queries.size(), splits = 0, group = s.heads / s.kv_heads;
    for (const Query& query : queries) splits = std::max(splits, splits_of(query.position + 1));
    Buffer<float> parts(size_t(rows) * s.heads * splits * (s.d + 2), NAN), y(size_t(rows) * s.heads * s.d);
    float scale = 1 / std::sqrt(float(s.d));
    run("attend", dim3(splits, s.kv_heads * rounded_up(group, kernels.group), rows), THREADS, 0, [&] {
        kernels.attend(q.data(), queries.data(), p.tables.data(), data.data(), scales.data(), s.heads, s.kv_heads, s.d, scale, s.window, splits, parts.data());
    }, parts);
    run("join", dim3(s.heads, rows), THREADS, 0, [&] { attention_paged_join(parts.data(), queries.data(), s.heads, s.d, splits, y.data()); }, y);
    return y;
}

// The first piece and the last ones of every sequence, as prompts are read: the bits of a row alone.
const int PIECE = 90;

template <typename T>
void reads_alike(const Kernels<T>& kernels, const Shape& s, const Pages& p, const Buffer<Query>& tokens, Buffer<T>& data, Buffer<float>& scales) {
    Random r(s.d + 1);
    size_t width = s.heads * s.d;
    auto q = random<float>(r, tokens.size() * width, 2);
    auto is_read = [&](int at, int length) { return at < PIECE || at / PIECE * PIECE + 2 * PIECE > length; };
    // Some of their rows, the last among them.
    Buffer<size_t> some;
    size_t start = 0;
    for (int length : s.lengths) {
        for (int at = 0; at < length; at++)
            if (is_read(at, length) && (at % 61 == 17 || at + 1 == length)) some.push_back(start + at);
        start += length;
    }
    auto of = [&](const Buffer<float>& x) {
        Buffer<float> rows;
        for (size_t i : some) rows.insert(rows.end(), x.begin() + i * width, x.begin() + (i + 1) * width);
        return rows;
    };
    Buffer<Query> queries;
    for (size_t i : some) queries.push_back(tokens[i]);
    auto want = attend(kernels, s, p, of(q), queries, data, scales);
    int at_once = s.d > 128 ? 8 : 32, threads = s.d > 128 ? 128 : 256, group = s.heads / s.kv_heads;
    Buffer<Stretch> stretches;
    u32 row = 0;
    for (size_t i = 0; i < s.lengths.size(); i++)
        for (int at = 0; at < s.lengths[i]; at += PIECE) {
            u32 rows = std::min(PIECE, s.lengths[i] - at);
            for (u32 first = 0; is_read(at, s.lengths[i]) && first < rows * group; first += at_once) stretches.push_back({row, rows, u32(at), p.starts[i], first});
            row += rows;
        }
    Buffer<float> y(q.size(), NAN);
    run("prompt", dim3(stretches.size(), s.kv_heads), threads, 0, [&] {
        kernels.prompt(q.data(), stretches.data(), p.tables.data(), data.data(), scales.data(), s.heads, s.kv_heads, s.d,
                       1 / std::sqrt(float(s.d)), s.window, y.data()); }, y);
    same("rows of a prompt", of(y), want);
}

template <typename T>
void agrees(const Kernels<T>& kernels, const Shape& s) {
    Random r(s.d);
    Pages p = pages(s);
    size_t vectors = size_t(p.blocks) * s.kv_heads * 2 * KV_BLOCK;
    Buffer<T> data(vectors * s.d);
    Buffer<float> scales(vectors, NAN), all_k, all_v;
    // Everything is written through the kernel, a row per token of every sequence.
    Buffer<Query> tokens, queries;
    for (size_t i = 0; i < s.lengths.size(); i++) {
        for (int at = 0; at < s.lengths[i]; at++) tokens.push_back({u32(at), p.starts[i]});
        queries.push_back(tokens.back());
    }
    auto k = random<float>(r, tokens.size() * s.kv_heads * s.d, 2), v = random<float>(r, k.size());
    run("write", rounded_up(tokens.size() * s.kv_heads * 2, WARPS), THREADS, 0, [&] {
        kernels.write(k.data(), v.data(), tokens.data(), p.tables.data(), tokens.size(), s.kv_heads, s.d, data.data(), scales.data()); }, data, scales);
    auto q = random<float>(r, queries.size() * s.heads * s.d, 2);
    auto y = attend(kernels, s, p, q, queries, data, scales);

    auto stored = [&](size_t row, int at, int head, int value, int i) {
        size_t vector = ((size_t(p.tables[p.starts[row] + at / KV_BLOCK]) * s.kv_heads + head) * 2 + value) * KV_BLOCK + at % KV_BLOCK;
        double x = widen(data[vector * s.d + i]);
        return sizeof(T) == 1 ? x * scales[vector] : x;
    };
    Buffer<double> want;
    size_t token = 0;
    for (size_t row = 0; row < queries.size(); row++) {
        int length = s.lengths[row], first = s.window ? std::max(0, length - s.window) : 0;
        for (int head = 0; head < s.heads; head++) {
            int kv = head / (s.heads / s.kv_heads);
            std::vector<double> p, out(s.d);
            double sum = 0;
            for (int at = first; at < length; at++) {
                double score = 0;
                for (int i = 0; i < s.d; i++) score += q[(row * s.heads + head) * s.d + i] * stored(row, at, kv, 0, i);
                p.push_back(std::exp(score / std::sqrt(double(s.d))));
                sum += p.back();
                for (int i = 0; i < s.d; i++) out[i] += p.back() * stored(row, at, kv, 1, i);
            }
            for (double x : out) want.push_back(x / sum);
        }
        // What is stored is what was given, rounded.
        for (int at = 0; at < length; at++, token++)
            for (int i = 0; i < s.d; i++) {
                double tolerance = sizeof(T) == 1 ? 0.51 * 2 / 127 : 2 * epsilon<T>() + 1e-7;
                size_t from = token * s.kv_heads * s.d + i;
                if (std::fabs(stored(row, at, 0, 0, i) - k[from]) > tolerance || std::fabs(stored(row, at, 0, 1, i) - v[from]) > tolerance) fail("stored");
            }
    }
    near("y", y, want, 4e-6);
    for (size_t row = 0; row < queries.size(); row++) {
        size_t width = s.heads * s.d;
        Buffer<float> own(q.begin() + row * width, q.begin() + (row + 1) * width);
        auto alone = attend(kernels, s, p, own, {queries[row]}, data, scales);
        same("a row alone", alone, Buffer<float>(y.begin() + row * width, y.begin() + (row + 1) * width));
    }
    reads_alike(kernels, s, p, tokens, data, scales);
}

namespace check {
template <> double epsilon<i8>() { return 0; }
}

int main(int argc, char** argv) {
    return check::main(argc, argv, {
        {"f32, three heads per KV head", [] { agrees<float>({write_kv_f32, attention_paged_f32_4_64, attention_prompt_f32_64, 4}, {{1, 17, 300}, 3, 1, 64, 0}); }},
        {"f32, heads of 256", [] { agrees<float>({write_kv_f32, attention_paged_f32_4_256, attention_prompt_f32_256, 4}, {{33}, 2, 1, 256, 0}); }},
        {"f16, two KV heads, a window", [] { agrees<f16>({write_kv_f16, attention_paged_f16_4_64, attention_prompt_f16_64, 4}, {{5, 530, 31}, 4, 2, 40, 100}); }},
        {"f16, eight heads per KV head of 128", [] { agrees<f16>({write_kv_f16, attention_paged_f16_8_128, attention_prompt_f16_128, 8}, {{70, 3}, 8, 1, 128, 0}); }},
        {"f16, ten heads per KV head in two parts", [] { agrees<f16>({write_kv_f16, attention_paged_f16_8_64, attention_prompt_f16_64, 8}, {{270}, 10, 1, 64, 0}); }},
        {"bf16, three heads per KV head of 80", [] { agrees<bf16>({write_kv_bf16, attention_paged_bf16_4_128, attention_prompt_bf16_128, 4}, {{40, 290}, 6, 2, 80, 0}); }},
        {"int8, heads of 96", [] { agrees<i8>({write_kv_i8, attention_paged_i8_4_128, attention_prompt_i8_128, 4}, {{1, 45}, 4, 2, 96, 0}); }},
        {"int8, eight heads per KV head, a window across splits", [] { agrees<i8>({write_kv_i8, attention_paged_i8_8_64, attention_prompt_i8_64, 8}, {{300}, 8, 1, 64, 60}); }},
    });
}
