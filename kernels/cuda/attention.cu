// Causal attention over packed documents and its gradients, without scores in memory (FlashAttention-2, arXiv 2307.08691).
//
// Work comes as tiles of up to 64 rows of one document; keys are walked in tiles counted from the document's start. So a
// document's results do not depend on the documents packed beside it.
#include "tile.cuh"

#define THREADS 128
// Rows of a block: 16 per warp.
#define ROWS 64

// Rows `first..first + count` of the document `start..end`.
struct Tile { u32 first, count, start, end; };

// Tiles of the other side that a block holds at once, so that f32 too fits 99 KiB of shared memory.
template <typename T, int FORWARD, int QUERIES, int KEYS>
struct Sizes { static constexpr int forward = FORWARD, queries = QUERIES, keys = KEYS; };
template <typename T> struct Inner : Sizes<T, 64, 32, 32> {};
template <> struct Inner<float> : Sizes<float, 32, 16, 16> {};

// Rows `first..first + rows` of head `head` of x: [·, heads, d], into a tile of OUTER × D.
template <int OUTER, int D, typename T>
__device__ __forceinline__ void fetch_head(T* tile, const T* x, i64 first, int rows, int heads, int head, int d) {
    fetch_tile<OUTER, D, THREADS>(tile, x + (first * heads + head) * d, (i64)heads * d, rows, d);
}

// A warp's 16 rows of a result tile to its own rows of shared memory, rounded to T: the left operand of the next product.
template <int TILES, typename T>
__device__ __forceinline__ void keep(T* rows, int pitch, const float (&c)[TILES][4]) {
    UNROLL for (int tile = 0; tile < TILES; tile++)
        UNROLL for (int i = 0; i < 4; i++) rows[row_of(i) * pitch + column_of(tile, i)] = narrow<T>(c[tile][i]);
    __syncwarp();
}

// A warp's 16 rows of a result to head `head` of y: [·, heads, d], scaled by row.
template <int TILES, typename Y>
__device__ __forceinline__ void write_head(Y* y, i64 first, int rows, int heads, int head, int d, const float (&c)[TILES][4], const float (&scale)[2]) {
    UNROLL for (int tile = 0; tile < TILES; tile++)
        UNROLL for (int i = 0; i < 4; i++) {
            int row = row_of(i), column = column_of(tile, i);
            if (row < rows && column < d) y[((first + row) * heads + head) * d + column] = narrow<Y>(c[tile][i] * scale[i / 2]);
        }
}

// The first key that the query at `row` sees; window 0 = all.
__device__ __forceinline__ int first_key(const Tile& tile, int row, int window) {
    return window > 0 ? max((int)tile.start, row + 1 - window) : (int)tile.start;
}
// Where the walk over keys begins: the tile, counted from the document's start, with the first key anyone sees.
__device__ __forceinline__ int first_tile(const Tile& tile, int row, int window, int keys) {
    int seen = first_key(tile, row, window) - (int)tile.start;
    return (int)tile.start + seen / keys * keys;
}

// Sum and maximum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(WHOLE_WARP, x, 1);
    return x + __shfl_xor_sync(WHOLE_WARP, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 2));
}

// Scores of a tile to probabilities relative to the running maximum; scales down what was summed before.
template <int TILES, int D_TILES>
__device__ __forceinline__ void soften(float (&s)[TILES][4], float (&most)[2], float (&sum)[2], float (&y)[D_TILES][4]) {
    UNROLL for (int half = 0; half < 2; half++) {
        float now = most[half];
        UNROLL for (int tile = 0; tile < TILES; tile++) now = fmaxf(now, fmaxf(s[tile][2 * half], s[tile][2 * half + 1]));
        now = row_max(now);
        // A row that has seen no key yet has no maximum to be relative to.
        float base = now == -INFINITE ? 0.0f : now, before = exponential(most[half] - base), part = 0.0f;
        UNROLL for (int tile = 0; tile < TILES; tile++)
            UNROLL for (int i = 2 * half; i < 2 * half + 2; i++) {
                s[tile][i] = exponential(s[tile][i] - base);
                part += s[tile][i];
            }
        sum[half] = sum[half] * before + row_sum(part);
        most[half] = now;
        UNROLL for (int tile = 0; tile < D_TILES; tile++) y[tile][2 * half] *= before, y[tile][2 * half + 1] *= before;
    }
}

// y = softmax(scale·q·kᵀ)·v and the logarithms of the softmax's sums. q, y: [rows, heads, d]; k, v: [rows, kv_heads, d];
// logs: [heads, rows]; d ≤ D. grid: (tiles, heads); block: THREADS; dynamic shared memory: as forward_bytes.
template <typename T, int D>
__device__ __host__ constexpr int forward_bytes() {
    constexpr int KEYS = Inner<T>::forward;
    return sizeof(T) * ((ROWS + 2 * KEYS) * Pitch<T>::of(D) + ROWS * Pitch<T>::of(KEYS));
}
template <typename T, int D>
__device__ void attention(const T* q, const T* k, const T* v, const Tile* tiles, int rows, int heads, int kv_heads, int d, float scale, int window, T* y, float* logs) {
    constexpr int KEYS = Inner<T>::forward, PITCH = Pitch<T>::of(D), P_PITCH = Pitch<T>::of(KEYS);
    DYNAMIC_SHARED(memory);
    T *queries = reinterpret_cast<T*>(memory), *keys = queries + ROWS * PITCH, *values = keys + KEYS * PITCH;
    int warp = threadIdx.x / 32, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    T* p = values + KEYS * PITCH + warp * 16 * P_PITCH;
    Tile tile = tiles[blockIdx.x];
    fetch_head<ROWS, D>(queries, q, tile.first, tile.count, heads, head, d);
    float sums[D / 8][4], most[2] = {-INFINITE, -INFINITE}, sum[2] = {0.0f, 0.0f};
    clear(sums);
    int last = tile.first + tile.count, own = tile.first + warp * 16;
    for (int from = first_tile(tile, tile.first, window, KEYS); from < last; from += KEYS) {
        fetch_head<KEYS, D>(keys, k, from, last - from, kv_heads, kv_head, d);
        copy_commit();
        fetch_head<KEYS, D>(values, v, from, last - from, kv_heads, kv_head, d);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        float s[KEYS / 8][4];
        clear(s);
        multiply<Rows, Rows>(s, queries + warp * 16 * PITCH, PITCH, keys, PITCH, D);
        UNROLL for (int t = 0; t < KEYS / 8; t++)
            UNROLL for (int i = 0; i < 4; i++) {
                int row = own + row_of(i), key = from + column_of(t, i);
                s[t][i] = key <= row && key >= first_key(tile, row, window) ? s[t][i] * scale : -INFINITE;
            }
        soften(s, most, sum, sums);
        keep(p, P_PITCH, s);
        copy_wait<0>();
        __syncthreads();
        multiply<Rows, Columns>(sums, p, P_PITCH, values, PITCH, KEYS);
        __syncthreads();
    }
    int count = (int)tile.count - warp * 16;
    float inverse[2] = {__fdiv_rn(1.0f, sum[0]), __fdiv_rn(1.0f, sum[1])};
    write_head(y, own, count, heads, head, d, sums, inverse);
    UNROLL for (int half = 0; half < 2; half++) {
        int row = row_of(2 * half);
        if (threadIdx.x % 4 == 0 && row < count) logs[(i64)head * rows + own + row] = most[half] + logf(sum[half]);
    }
}

// Σ y·dy of each row and head. grid: heads·rows / 4 rounded up; block: THREADS; a warp takes a row. deltas: [heads, rows].
template <typename T>
__device__ void attention_deltas(const T* y, const T* dy, int rows, int heads, int d, float* deltas) {
    i64 at = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (at >= (i64)rows * heads) return;
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < d; i += 32) sum = fmaf(widen(y[at * d + i]), widen(dy[at * d + i]), sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) deltas[at % heads * rows + at / heads] = sum;
}

// dq of a tile of queries of a head. grid: (tiles, heads); block: THREADS; dynamic shared memory: as queries_bytes.
template <typename T, int D>
__device__ __host__ constexpr int queries_bytes() {
    constexpr int KEYS = Inner<T>::keys;
    return sizeof(T) * ((2 * ROWS + 2 * KEYS) * Pitch<T>::of(D) + ROWS * Pitch<T>::of(KEYS));
}
template <typename T, int D>
__device__ void attention_backward_queries(const T* q, const T* k, const T* v, const T* dy, const float* logs, const float* deltas, const Tile* tiles,
                                           int rows, int heads, int kv_heads, int d, float scale, int window, T* dq) {
    constexpr int KEYS = Inner<T>::keys, PITCH = Pitch<T>::of(D), P_PITCH = Pitch<T>::of(KEYS);
    DYNAMIC_SHARED(memory);
    T *queries = reinterpret_cast<T*>(memory), *slopes = queries + ROWS * PITCH, *keys = slopes + ROWS * PITCH, *values = keys + KEYS * PITCH;
    int warp = threadIdx.x / 32, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    T* ds = values + KEYS * PITCH + warp * 16 * P_PITCH;
    Tile tile = tiles[blockIdx.x];
    fetch_head<ROWS, D>(queries, q, tile.first, tile.count, heads, head, d);
    fetch_head<ROWS, D>(slopes, dy, tile.first, tile.count, heads, head, d);
    float sums[D / 8][4], log_sum[2], delta[2];
    clear(sums);
    int last = tile.first + tile.count, own = tile.first + warp * 16;
    UNROLL for (int half = 0; half < 2; half++) {
        i64 at = (i64)head * rows + min(own + row_of(2 * half), last - 1);
        log_sum[half] = logs[at], delta[half] = deltas[at];
    }
    for (int from = first_tile(tile, tile.first, window, KEYS); from < last; from += KEYS) {
        fetch_head<KEYS, D>(keys, k, from, last - from, kv_heads, kv_head, d);
        fetch_head<KEYS, D>(values, v, from, last - from, kv_heads, kv_head, d);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        float s[KEYS / 8][4], dp[KEYS / 8][4];
        clear(s);
        clear(dp);
        multiply<Rows, Rows>(s, queries + warp * 16 * PITCH, PITCH, keys, PITCH, D);
        multiply<Rows, Rows>(dp, slopes + warp * 16 * PITCH, PITCH, values, PITCH, D);
        UNROLL for (int t = 0; t < KEYS / 8; t++)
            UNROLL for (int i = 0; i < 4; i++) {
                int row = own + row_of(i), key = from + column_of(t, i);
                bool seen = row < last && key <= row && key >= first_key(tile, row, window);
                float p = seen ? exponential(s[t][i] * scale - log_sum[i / 2]) : 0.0f;
                s[t][i] = p * (dp[t][i] - delta[i / 2]) * scale;
            }
        keep(ds, P_PITCH, s);
        multiply<Rows, Columns>(sums, ds, P_PITCH, keys, PITCH, KEYS);
        __syncthreads();
    }
    float one[2] = {1.0f, 1.0f};
    write_head(dq, own, (int)tile.count - warp * 16, heads, head, d, sums, one);
}

// dk and dv of a tile of keys of a KV head: over its query heads in order, and for each over ascending queries.
// grid: (tiles, kv_heads); block: THREADS; dynamic shared memory: as keys_bytes.
template <typename T, int D>
__device__ __host__ constexpr int keys_bytes() {
    constexpr int QUERIES = Inner<T>::queries;
    return sizeof(T) * ((2 * ROWS + 2 * QUERIES) * Pitch<T>::of(D) + 2 * ROWS * Pitch<T>::of(QUERIES));
}
template <typename T, int D>
__device__ void attention_backward_keys(const T* q, const T* k, const T* v, const T* dy, const float* logs, const float* deltas, const Tile* tiles,
                                        int rows, int heads, int kv_heads, int d, float scale, int window, T* dk, T* dv) {
    constexpr int QUERIES = Inner<T>::queries, PITCH = Pitch<T>::of(D), P_PITCH = Pitch<T>::of(QUERIES);
    DYNAMIC_SHARED(memory);
    T *keys = reinterpret_cast<T*>(memory), *values = keys + ROWS * PITCH, *queries = values + ROWS * PITCH, *slopes = queries + QUERIES * PITCH;
    int warp = threadIdx.x / 32, kv_head = blockIdx.y, group = heads / kv_heads;
    T *p = slopes + QUERIES * PITCH + warp * 32 * P_PITCH, *ds = p + 16 * P_PITCH;
    Tile tile = tiles[blockIdx.x];
    fetch_head<ROWS, D>(keys, k, tile.first, tile.count, kv_heads, kv_head, d);
    fetch_head<ROWS, D>(values, v, tile.first, tile.count, kv_heads, kv_head, d);
    float key_sums[D / 8][4], value_sums[D / 8][4];
    clear(key_sums);
    clear(value_sums);
    int last = tile.first + tile.count, own = tile.first + warp * 16;
    // Behind the window of its last key nobody sees the tile.
    int end = window > 0 ? min((int)tile.end, last - 1 + window) : (int)tile.end;
    NO_UNROLL for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        NO_UNROLL for (int from = tile.first; from < end; from += QUERIES) {
            fetch_head<QUERIES, D>(queries, q, from, end - from, heads, head, d);
            fetch_head<QUERIES, D>(slopes, dy, from, end - from, heads, head, d);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
            // Transposed: a row per key, a column per query.
            float s[QUERIES / 8][4], dp[QUERIES / 8][4];
            clear(s);
            clear(dp);
            multiply<Rows, Rows>(s, keys + warp * 16 * PITCH, PITCH, queries, PITCH, D);
            multiply<Rows, Rows>(dp, values + warp * 16 * PITCH, PITCH, slopes, PITCH, D);
            UNROLL for (int t = 0; t < QUERIES / 8; t++)
                UNROLL for (int i = 0; i < 4; i++) {
                    int key = own + row_of(i), row = from + column_of(t, i);
                    bool seen = key < last && row < end && key <= row && key >= first_key(tile, row, window);
                    i64 at = (i64)head * rows + min(row, end - 1);
                    float probability = seen ? exponential(s[t][i] * scale - logs[at]) : 0.0f;
                    s[t][i] = probability;
                    dp[t][i] = probability * (dp[t][i] - deltas[at]) * scale;
                }
            keep(p, P_PITCH, s);
            keep(ds, P_PITCH, dp);
            multiply<Rows, Columns>(value_sums, p, P_PITCH, slopes, PITCH, QUERIES);
            multiply<Rows, Columns>(key_sums, ds, P_PITCH, queries, PITCH, QUERIES);
            __syncthreads();
        }
    float one[2] = {1.0f, 1.0f};
    int count = (int)tile.count - warp * 16;
    write_head(dk, own, count, kv_heads, kv_head, d, key_sums, one);
    write_head(dv, own, count, kv_heads, kv_head, d, value_sums, one);
}

#define KERNELS(T, D, name)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_##name(\
        const T* q, const T* k, const T* v, const Tile* tiles, int rows, int heads, int kv_heads, int d, float scale,     \
        int window, T* y, float* logs) {                                                                                  \
        attention<T, D>(q, k, v, tiles, rows, heads, kv_heads, d, scale, window, y, logs);                                \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_backward_queries_##name(\
        const T* q, const T* k, const T* v, const T* dy, const float* logs, const float* deltas, const Tile* tiles,       \
        int rows, int heads, int kv_heads, int d, float scale, int window, T* dq) {                                       \
        attention_backward_queries<T, D>(q, k, v, dy, logs, deltas, tiles, rows, heads, kv_heads, d, scale, window, dq);  \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys_##name(\
        const T* q, const T* k, const T* v, const T* dy, const float* logs, const float* deltas, const Tile* tiles,       \
        int rows, int heads, int kv_heads, int d, float scale, int window, T* dk, T* dv) {                                \
        attention_backward_keys<T, D>(q, k, v, dy, logs, deltas, tiles, rows, heads, kv_heads, d, scale, window, dk, dv); \
    }
#define DELTAS(T, name)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_deltas_##name(           \
        const T* y, const T* dy, int rows, int heads, int d, float* deltas) { attention_deltas(y, dy, rows, heads, d, deltas); }
KERNELS(float, 64, f32_64)
KERNELS(float, 128, f32_128)
KERNELS(bf16, 64, bf16_64)
KERNELS(bf16, 128, bf16_128)
KERNELS(f16, 64, f16_64)
KERNELS(f16, 128, f16_128)
DELTAS(float, f32)
DELTAS(bf16, bf16)
DELTAS(f16, f16)
