// Attention of single queries over a paged KV cache: decoding. The cache may be f32, f16 or int8 with a scale per vector.
//
// Keys are cut into splits of 256 counted from the sequence's start; a block takes one split of one KV head of one query row,
// and a second kernel puts the splits together in order. So a row does not depend on the rows beside it or on the batch.
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
            float scaled = visible && g < count ? s[g] * key_scale : -INFINITE;
            float now = fmaxf(most[g], warp_max(scaled));
            float base = now == -INFINITE ? 0.0f : now, before = exponential(most[g] - base), weight = exponential(scaled - base);
            sum[g] = sum[g] * before + weight;
            most[g] = now;
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
    // The warps' parts in order.
    for (int i = threadIdx.x; i < count * (d + 2); i += THREADS) {
        int g = i / (d + 2), at = i % (d + 2);
        float peak = peaks[0][g], result = 0.0f;
        UNROLL for (int w = 1; w < WARPS; w++) peak = fmaxf(peak, peaks[w][g]);
        float base = peak == -INFINITE ? 0.0f : peak;
        UNROLL for (int w = 0; w < WARPS; w++) {
            float share = exponential(peaks[w][g] - base);
            result = fmaf(share, at < d ? outs[w][g][at] : totals[w][g], result);
        }
        parts[(((i64)row * heads + first_head + g) * splits + blockIdx.x) * (d + 2) + at] = at == d ? peak : result;
    }
}

// y = Σ of the splits in order, weighed. y: [rows, heads, d]. grid: (heads, rows); block: THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) attention_paged_join(const float* parts, const Query* queries, int heads, int d, int splits, float* y) {
    i64 at = (i64)blockIdx.y * heads + blockIdx.x;
    int used = splits_of(queries[blockIdx.y].position + 1);
    const float* part = parts + at * splits * (d + 2);
    float peak = -INFINITE, total = 0.0f;
    for (int s = 0; s < used; s++) peak = fmaxf(peak, part[s * (d + 2) + d]);
    for (int s = 0; s < used; s++) total = fmaf(exponential(part[s * (d + 2) + d] - peak), part[s * (d + 2) + d + 1], total);
    float inverse = __fdiv_rn(1.0f, total);
    for (int i = threadIdx.x; i < d; i += THREADS) {
        float sum = 0.0f;
        for (int s = 0; s < used; s++) sum = fmaf(exponential(part[s * (d + 2) + d] - peak), part[s * (d + 2) + i], sum);
        y[at * d + i] = sum * inverse;
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
#define UPTO_4(T, name) KERNEL(T, 4, 2, name##_4_64) KERNEL(T, 4, 4, name##_4_128) KERNEL(T, 4, 8, name##_4_256)
#define UPTO_8(T, name) KERNEL(T, 8, 2, name##_8_64) KERNEL(T, 8, 4, name##_8_128)
KERNELS(float, f32) UPTO_4(float, f32)
KERNELS(f16, f16) UPTO_4(f16, f16) UPTO_8(f16, f16)
KERNELS(i8, i8) UPTO_4(i8, i8) UPTO_8(i8, i8)
