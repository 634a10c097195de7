// Attention over a paged KV cache. The cache may be f32, f16, bf16 or int8 with a scale per vector.
//
// Keys are cut into splits of 256 counted from the sequence's start, a split into tiles of 32 and these into four chains: every
// fourth tile. A chain's tiles are taken in order, then a split's chains, then the splits. Whoever computes a row does it in
// this order, so it does not depend on the rows beside it:
// - attention_paged: decoding. A block takes one split of one KV head of one row, a warp a chain; attention_paged_join puts
//   the splits together.
// - attention_prompt: many rows of one sequence. A block takes as many of them as its warps hold, with all their keys: each
//   tile of keys and of values is brought to shared memory once for all of them.
#include "prelude.cuh"

#define THREADS 128
#define WARPS 4
// Tokens of a KV block, of a split, and of what a warp takes at a time: a lane each.
#define KV_BLOCK 16
#define SPLIT 256
#define TOKENS 32

// A query: its position in its sequence, and where the sequence's KV blocks begin in `tables`.
struct Query { u32 position, table; };

// A cache: [blocks, kv_heads, 2, KV_BLOCK, d], keys before values; int8 has scales [blocks, kv_heads, 2, KV_BLOCK].
template <typename T>
struct Cache {
    T* data;
    float* scales;
};

__device__ __forceinline__ float widen(i8 x) { return (float)x; }

// N consecutive values as f32.
template <int N, typename T>
__device__ __forceinline__ void read(const T* x, float (&out)[N]) {
    Vector<T, N> v = load<N>(x);
    UNROLL for (int i = 0; i < N; i++) out[i] = widen(v.at[i]);
}

// The same from memory where only 16 bytes are sure to lie together.
template <int N, typename T>
__device__ __forceinline__ void read_parts(const T* x, float (&out)[N]) {
    constexpr int PIECE = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
    UNROLL for (int i = 0; i < N; i += PIECE) {
        Vector<T, PIECE> v = load<PIECE>(x + i);
        UNROLL for (int j = 0; j < PIECE; j++) out[i + j] = widen(v.at[j]);
    }
}

// Number of the vector of a token: of its key, of its value if `value`.
__device__ __forceinline__ i64 vector_of(u32 block, int kv_heads, int head, int value, int offset) {
    return (((i64)block * kv_heads + head) * 2 + value) * KV_BLOCK + offset;
}

// Quantizes or rounds a vector of d values into slot `at`: a warp's work.
__device__ __forceinline__ void put(const Cache<i8>& cache, i64 at, const float* x, int d) {
    int lane = threadIdx.x % 32;
    float most = 0.0f;
    for (int i = lane; i < d; i += 32) most = fmaxf(most, fabsf(x[i]));
    most = warp_max(most);
    float inverse = most > 0.0f ? __fdiv_rn(127.0f, most) : 0.0f;
    if (__float_as_uint(inverse) >= 0x7f800000u) inverse = 0.0f;
    for (int i = lane; i < d; i += 32) cache.data[at * d + i] = (i8)(int)rintf(x[i] * inverse);
    if (lane == 0) cache.scales[at] = __fdiv_rn(most, 127.0f);
}
template <typename T>
__device__ __forceinline__ void put(const Cache<T>& cache, i64 at, const float* x, int d) {
    for (int i = threadIdx.x % 32; i < d; i += 32) cache.data[at * d + i] = narrow<T>(x[i]);
}

// Writes the rows' keys and values where their positions say. k, v: [rows, kv_heads, d]. grid: rows·kv_heads·2 / WARPS
// rounded up; block: THREADS; a warp takes a vector.
template <typename T>
__device__ void write_kv(const float* k, const float* v, const Query* queries, const u32* tables, int rows, int kv_heads, int d, Cache<T> cache) {
    i64 at = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (at >= (i64)rows * kv_heads * 2) return;
    int value = (int)(at % 2), head = (int)(at / 2 % kv_heads);
    i64 row = at / 2 / kv_heads;
    Query query = queries[row];
    u32 block = tables[query.table + query.position / KV_BLOCK];
    put(cache, vector_of(block, kv_heads, head, value, query.position % KV_BLOCK), (value ? v : k) + (row * kv_heads + head) * d, d);
}

// Score of each of GROUP queries with this lane's key: a chain over the head dimension, eight values at a time.
template <int GROUP, typename T>
__device__ __forceinline__ void score(const float* queries, int pitch, int count, const T* key, int d, float (&s)[GROUP]) {
    UNROLL for (int g = 0; g < GROUP; g++) s[g] = 0.0f;
    for (int i = 0; i < d; i += 8) {
        float k[8];
        if (sizeof(T) == 4) {
            float low[4], high[4];
            read(key + i, low);
            read(key + i + 4, high);
            UNROLL for (int j = 0; j < 4; j++) k[j] = low[j], k[j + 4] = high[j];
        } else {
            read(key + i, k);
        }
        UNROLL for (int g = 0; g < GROUP; g++) {
            if (g < count) {
                Vector<float, 4> low = load<4>(queries + g * pitch + i), high = load<4>(queries + g * pitch + i + 4);
                UNROLL for (int j = 0; j < 4; j++) s[g] = fmaf(low.at[j], k[j], s[g]);
                UNROLL for (int j = 0; j < 4; j++) s[g] = fmaf(high.at[j], k[j + 4], s[g]);
            }
        }
    }
}

// Largest score so far, sum of weights relative to it, and values weighed by them.
//
// Puts the next part of a sequence behind those before it: how much each side counts from now on.
struct Shares { float before, next; };
__device__ __forceinline__ Shares join_parts(float& peak, float next) {
    float now = fmaxf(peak, next), base = now == -INFINITE ? 0.0f : now;
    Shares shares{exponential(peak - base), exponential(next - base)};
    peak = now;
    return shares;
}

// A tile's scores, a lane each, into what a chain has: the peak and sum of a query. Gives the tile's weight.
__device__ __forceinline__ float take_score(float scaled, float& most, float& sum, float& before) {
    float now = fmaxf(most, warp_max(scaled)), base = now == -INFINITE ? 0.0f : now, weight = exponential(scaled - base);
    before = exponential(most - base);
    sum = sum * before + weight;
    most = now;
    return weight;
}

// Splits of a query that spans `keys` of them.
__device__ __forceinline__ int splits_of(int keys) { return (keys + SPLIT - 1) / SPLIT; }

// A split's outputs, their maximum and sum of weights for each query head. q: [rows, heads, d], d ≤ 32·DIMS, a multiple
// of 8; parts: [rows, heads, splits, d + 2]: outputs relative to the maximum, the maximum, the sum. splits ≥ those of the
// longest sequence. grid: (splits, kv_heads · ⌈group / GROUP⌉, rows); block: THREADS.
template <typename T, int GROUP, int DIMS>
__device__ void attention_paged(const float* q, const Query* queries, const u32* tables, Cache<T> cache, int heads, int kv_heads, int d,
                                float scale, int window, int splits, float* parts) {
    constexpr int PITCH = 32 * DIMS + 4;
    SHARED(float, query, [GROUP][PITCH]);
    SHARED(float, weights, [WARPS][TOKENS][GROUP]);
    SHARED(float, outs, [WARPS][GROUP][PITCH]);
    SHARED(float, peaks, [WARPS][GROUP]);
    SHARED(float, totals, [WARPS][GROUP]);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.z, group = heads / kv_heads;
    int head = blockIdx.y % kv_heads, first_head = head * group + blockIdx.y / kv_heads * GROUP;
    int count = min(GROUP, (head + 1) * group - first_head);
    Query own = queries[row];
    int end = own.position + 1, seen = window > 0 ? max(end - window, 0) : 0;
    int from = blockIdx.x * SPLIT, to = min(from + SPLIT, end);
    if (from >= end) return;
    for (int i = threadIdx.x; i < count * d; i += THREADS) query[i / d][i % d] = q[((i64)row * heads + first_head) * d + i];
    __syncthreads();
    const u32* table = tables + own.table;
    float most[GROUP], sum[GROUP], out[GROUP][DIMS];
    UNROLL for (int g = 0; g < GROUP; g++) {
        most[g] = -INFINITE, sum[g] = 0.0f;
        UNROLL for (int i = 0; i < DIMS; i++) out[g][i] = 0.0f;
    }
    NO_UNROLL for (int tile = from + warp * TOKENS; tile < to; tile += WARPS * TOKENS) {
        if (tile + TOKENS <= seen) continue;
        int token = tile + lane;
        bool visible = token < to && token >= seen;
        i64 key = vector_of(table[min(token, to - 1) / KV_BLOCK], kv_heads, head, 0, min(token, to - 1) % KV_BLOCK);
        float s[GROUP], value_scale = 1.0f;
        score<GROUP>(&query[0][0], PITCH, count, cache.data + key * d, d, s);
        float key_scale = scale;
        if (sizeof(T) == 1) key_scale = scale * cache.scales[key], value_scale = cache.scales[key + KV_BLOCK];
        UNROLL for (int g = 0; g < GROUP; g++) {
            float before, weight = take_score(visible && g < count ? s[g] * key_scale : -INFINITE, most[g], sum[g], before);
            UNROLL for (int i = 0; i < DIMS; i++) out[g][i] *= before;
            weights[warp][lane][g] = visible && g < count ? weight * value_scale : 0.0f;
        }
        __syncwarp();
        // Now a lane owns dimensions and the keys come one after another.
        int tokens = min(TOKENS, to - tile);
        for (int j = max(seen - tile, 0); j < tokens; j++) {
            float v[DIMS];
            i64 value = vector_of(table[(tile + j) / KV_BLOCK], kv_heads, head, 1, (tile + j) % KV_BLOCK);
            if (lane * DIMS < d) read(cache.data + value * d + lane * DIMS, v);
            else UNROLL for (int i = 0; i < DIMS; i++) v[i] = 0.0f;
            UNROLL for (int g = 0; g < GROUP; g++) {
                // Where there are fewer heads than GROUP, the rest have weight 0.
                float weight = weights[warp][j][g];
                UNROLL for (int i = 0; i < DIMS; i++) out[g][i] = fmaf(weight, v[i], out[g][i]);
            }
        }
        __syncwarp();
    }
    UNROLL for (int g = 0; g < GROUP; g++) {
        float total = warp_sum(sum[g]);
        if (lane == 0) peaks[warp][g] = most[g], totals[warp][g] = total;
        UNROLL for (int i = 0; i < DIMS; i++) outs[warp][g][lane * DIMS + i] = out[g][i];
    }
    __syncthreads();
    // The chains in order.
    for (int i = threadIdx.x; i < count * (d + 2); i += THREADS) {
        int g = i / (d + 2), at = i % (d + 2);
        float peak = -INFINITE, result = 0.0f;
        UNROLL for (int w = 0; w < WARPS; w++) {
            Shares shares = join_parts(peak, peaks[w][g]);
            result = fmaf(at < d ? outs[w][g][at] : totals[w][g], shares.next, result * shares.before);
        }
        parts[(((i64)row * heads + first_head + g) * splits + blockIdx.x) * (d + 2) + at] = at == d ? peak : result;
    }
}

// y = Σ of the splits in order, weighed. y: [rows, heads, d]. grid: (heads, rows); block: THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) attention_paged_join(const float* parts, const Query* queries, int heads, int d, int splits, float* y) {
    i64 at = (i64)blockIdx.y * heads + blockIdx.x;
    int used = splits_of(queries[blockIdx.y].position + 1);
    const float* part = parts + at * splits * (d + 2);
    for (int i = threadIdx.x; i < d; i += THREADS) {
        float peak = -INFINITE, total = 0.0f, sum = 0.0f;
        for (int s = 0; s < used; s++) {
            Shares shares = join_parts(peak, part[s * (d + 2) + d]);
            total = fmaf(part[s * (d + 2) + d + 1], shares.next, total * shares.before);
            sum = fmaf(part[s * (d + 2) + i], shares.next, sum * shares.before);
        }
        y[at * d + i] = sum * __fdiv_rn(1.0f, total);
    }
}

// Consecutive rows of one sequence: the number of the first in the step, how many, its position, and where the sequence's KV
// blocks begin in `tables`. `first` is the block's first query, counted over rows and the query heads of a KV head.
struct Stretch { u32 row, rows, position, table, first; };

// What a part of a sequence's keys comes to for each query of a warp; a lane has DIMS of the values.
template <int GROUP, int DIMS>
struct Part {
    float most[GROUP], sum[GROUP], out[GROUP][DIMS];
    __device__ __forceinline__ void clear() {
        UNROLL for (int g = 0; g < GROUP; g++) {
            most[g] = -INFINITE, sum[g] = 0.0f;
            UNROLL for (int i = 0; i < DIMS; i++) out[g][i] = 0.0f;
        }
    }
    // Takes the next part where the query has it.
    __device__ __forceinline__ void take(const Part& next, const int (&end)[GROUP], int from) {
        UNROLL for (int g = 0; g < GROUP; g++) {
            if (from < end[g]) {
                Shares shares = join_parts(most[g], next.most[g]);
                sum[g] = fmaf(next.sum[g], shares.next, sum[g] * shares.before);
                UNROLL for (int i = 0; i < DIMS; i++) out[g][i] = fmaf(next.out[g][i], shares.next, out[g][i] * shares.before);
            }
        }
    }
};

// Brings the keys or values of tokens `tile..tile + TOKENS`, up to `end`, to shared memory in rows of PITCH.
template <int THREAD_COUNT, int PITCH, typename T>
__device__ __forceinline__ void fetch(T* shared, const Cache<T>& cache, const u32* table, int kv_heads, int head, int value, int d, int tile, int end) {
    constexpr int N = sizeof(T) == 4 ? 4 : 8;
    int per_row = d / N;
    for (int i = threadIdx.x; i < TOKENS * per_row; i += THREAD_COUNT) {
        int row = i / per_row, at = i % per_row * N, token = min(tile + row, end - 1);
        i64 vector = vector_of(table[token / KV_BLOCK], kv_heads, head, value, token % KV_BLOCK);
        store(shared + row * PITCH + at, load<N>(cache.data + vector * d + at));
    }
}

// y = softmax(scale·q·kᵀ)·v of many rows. q, y: [rows, heads, d], d ≤ 32·DIMS, a multiple of 8. grid: (stretches, kv_heads);
// block: 32·COUNT threads, a warp takes GROUP queries.
template <typename T, int GROUP, int DIMS, int COUNT>
__device__ void attention_prompt(const float* q, const Stretch* stretches, const u32* tables, Cache<T> cache, int heads, int kv_heads, int d,
                                 float scale, int window, float* y) {
    constexpr int PITCH = 32 * DIMS + 4, TILE = 32 * DIMS + 16 / sizeof(T);
    SHARED(float, query, [COUNT][GROUP][PITCH]);
    SHARED(float, weights, [COUNT][TOKENS][GROUP]);
    SHARED(T, tile, [TOKENS * TILE]);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, group = heads / kv_heads;
    Stretch own = stretches[blockIdx.x];
    const u32* table = tables + own.table;
    // Which row and head each query is of, and the keys it sees.
    int first = own.first + warp * GROUP, count = min(GROUP, max((int)own.rows * group - first, 0));
    int seen[GROUP], end[GROUP];
    auto place = [&](int g) { return (((i64)own.row + (first + g) / group) * heads + head * group + (first + g) % group) * d; };
    UNROLL for (int g = 0; g < GROUP; g++) {
        int row = (first + g) / group;
        end[g] = g < count ? (int)own.position + row + 1 : 0;
        seen[g] = window > 0 ? max(end[g] - window, 0) : 0;
        if (g < count)
            for (int i = lane; i < d; i += 32) query[warp][g][i] = q[place(g) + i];
    }
    // The block's.
    int last = min(((int)own.first + COUNT * GROUP - 1) / group, (int)own.rows - 1);
    int to = own.position + last + 1, from = window > 0 ? max((int)own.position + (int)own.first / group + 1 - window, 0) : 0;
    Part<GROUP, DIMS> total, part, chain;
    total.clear();
    NO_UNROLL for (int split = from / SPLIT * SPLIT; split < to; split += SPLIT) {
        part.clear();
        NO_UNROLL for (int link = 0; link < WARPS; link++) {
            chain.clear();
            NO_UNROLL for (int start = split + link * TOKENS; start < min(split + SPLIT, to); start += WARPS * TOKENS) {
                if (start + TOKENS <= from) continue;
                __syncthreads();
                fetch<32 * COUNT, TILE>(tile, cache, table, kv_heads, head, 0, d, start, to);
                __syncthreads();
                int token = start + lane, within = min(token, to - 1);
                float s[GROUP], key_scale = scale, value_scale = 1.0f;
                score<GROUP>(&query[warp][0][0], PITCH, count, tile + lane * TILE, d, s);
                if (sizeof(T) == 1) {
                    i64 key = vector_of(table[within / KV_BLOCK], kv_heads, head, 0, within % KV_BLOCK);
                    key_scale = scale * cache.scales[key], value_scale = cache.scales[key + KV_BLOCK];
                }
                UNROLL for (int g = 0; g < GROUP; g++) {
                    bool visible = token < end[g] && token >= seen[g];
                    float before, weight = take_score(visible ? s[g] * key_scale : -INFINITE, chain.most[g], chain.sum[g], before);
                    UNROLL for (int i = 0; i < DIMS; i++) chain.out[g][i] *= before;
                    weights[warp][lane][g] = visible ? weight * value_scale : 0.0f;
                }
                __syncthreads();
                fetch<32 * COUNT, TILE>(tile, cache, table, kv_heads, head, 1, d, start, to);
                __syncthreads();
                for (int j = 0; j < TOKENS; j++) {
                    float v[DIMS];
                    if (lane * DIMS < d) read_parts(tile + j * TILE + lane * DIMS, v);
                    else UNROLL for (int i = 0; i < DIMS; i++) v[i] = 0.0f;
                    UNROLL for (int g = 0; g < GROUP; g++) {
                        float weight = weights[warp][j][g];
                        if (start + j >= seen[g] && start + j < end[g]) {
                            UNROLL for (int i = 0; i < DIMS; i++) chain.out[g][i] = fmaf(weight, v[i], chain.out[g][i]);
                        }
                    }
                }
            }
            UNROLL for (int g = 0; g < GROUP; g++) chain.sum[g] = warp_sum(chain.sum[g]);
            part.take(chain, end, split);
        }
        total.take(part, end, split);
    }
    UNROLL for (int g = 0; g < GROUP; g++) {
        float inverse = __fdiv_rn(1.0f, total.sum[g]);
        UNROLL for (int i = 0; i < DIMS; i++)
            if (g < count && lane * DIMS + i < d) y[place(g) + lane * DIMS + i] = total.out[g][i] * inverse;
    }
}

#define KERNEL(T, GROUP, DIMS, name)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) attention_paged_##name(                                             \
        const float* q, const Query* queries, const u32* tables, T* data, float* scales, int heads, int kv_heads, int d,       \
        float scale, int window, int splits, float* parts) {                                                                   \
        attention_paged<T, GROUP, DIMS>(q, queries, tables, Cache<T>{data, scales}, heads, kv_heads, d, scale, window, splits, parts); \
    }
#define KERNELS(T, name)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) write_kv_##name(                                                     \
        const float* k, const float* v, const Query* queries, const u32* tables, int rows, int kv_heads, int d, T* data, float* scales) { \
        write_kv(k, v, queries, tables, rows, kv_heads, d, Cache<T>{data, scales});                                            \
    }
#define PROMPT(T, GROUP, DIMS, COUNT, name)                                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * COUNT, 1) attention_prompt_##name(                                          \
        const float* q, const Stretch* stretches, const u32* tables, T* data, float* scales, int heads, int kv_heads, int d,   \
        float scale, int window, float* y) {                                                                                   \
        attention_prompt<T, GROUP, DIMS, COUNT>(q, stretches, tables, Cache<T>{data, scales}, heads, kv_heads, d, scale, window, y); \
    }
#define PROMPTS(T, name) PROMPT(T, 4, 2, 8, name##_64) PROMPT(T, 4, 4, 8, name##_128) PROMPT(T, 2, 8, 4, name##_256)
#define UPTO_4(T, name) KERNEL(T, 4, 2, name##_4_64) KERNEL(T, 4, 4, name##_4_128) KERNEL(T, 4, 8, name##_4_256)
#define UPTO_8(T, name) KERNEL(T, 8, 2, name##_8_64) KERNEL(T, 8, 4, name##_8_128)
KERNELS(float, f32) UPTO_4(float, f32) PROMPTS(float, f32)
KERNELS(f16, f16) UPTO_4(f16, f16) UPTO_8(f16, f16) PROMPTS(f16, f16)
KERNELS(bf16, bf16) UPTO_4(bf16, bf16) UPTO_8(bf16, bf16) PROMPTS(bf16, bf16)
KERNELS(i8, i8) UPTO_4(i8, i8) UPTO_8(i8, i8) PROMPTS(i8, i8)
