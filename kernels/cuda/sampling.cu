// Logits → token: greedy, or by temperature, top-k, top-p and min-p, deterministic for a seed.
//
// Weights are whole numbers, 2⁴⁰·e^((logit − best)/temperature), so sums are exact in any order. Top-k, top-p and min-p each keep
// a prefix of the tokens ranked by logit (the lower id first among equals), hence together the shortest of the three; its
// weight is all a draw needs. The order of the draw is the CPU's: ranked with top-k or top-p, by id without. The CPU's
// weights are f64: a draw may differ where the random number falls within about 10⁻⁵ of the border between two tokens.
#include "prelude.cuh"

#define THREADS 256

struct Sampling {
    float temperature;  // 0 = greedy
    float top_p;        // 1 = off
    float min_p;        // 0 = off
    u32 top_k;          // 0 = off
    u64 seed, position;
};

// What the steps share.
struct Scratch {
    u64 sums[THREADS / 32];
    float floats[THREADS / 32];
    u64 bins[256];
    u64 before;
    u32 prefix, token;
};

// A row of logits and how they become weights.
struct Row {
    const float* logits;
    int vocab;
    float best, temperature, least;
};

// Larger for larger logits; zeros of either sign are equal.
__device__ __forceinline__ u32 key_of(float logit) {
    u32 bits = __float_as_uint(logit + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

__device__ __forceinline__ u64 weight_of(const Row& row, float logit) {
    float likelihood = exponential(__fdiv_rn(logit - row.best, row.temperature));
    return likelihood >= row.least ? (u64)(likelihood * 1099511627776.0f) : 0;
}

// Weight of the tokens whose keys exceed `key`. Everyone gets it.
__device__ __forceinline__ u64 weight_above(const Row& row, u64 key, Scratch& scratch) {
    u64 sum = 0;
    for (int i = threadIdx.x; i < row.vocab; i += THREADS)
        if ((u64)key_of(row.logits[i]) > key) sum += weight_of(row, row.logits[i]);
    return block_sum(sum, scratch.sums);
}

// Walks down the ranking until what was passed exceeds `target`: weights, or tokens if `count`. Returns the key where that
// happens; scratch.before is what lies above it. A byte of the key at a time.
__device__ __forceinline__ u32 find(const Row& row, u64 target, bool count, Scratch& scratch) {
    __syncthreads();  // the last search's results have been read
    if (threadIdx.x == 0) scratch.before = 0, scratch.prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        scratch.bins[threadIdx.x] = 0;
        __syncthreads();
        u32 prefix = scratch.prefix;
        for (int i = threadIdx.x; i < row.vocab; i += THREADS) {
            u32 key = key_of(row.logits[i]);
            if (shift < 24 && key >> (shift + 8) != prefix >> (shift + 8)) continue;
            u64 measure = count ? 1 : weight_of(row, row.logits[i]);
            if (measure) atomicAdd(&scratch.bins[key >> shift & 255], measure);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255;
            for (; bin > 0 && scratch.before + scratch.bins[bin] <= target; bin--) scratch.before += scratch.bins[bin];
            scratch.prefix = prefix | (u32)bin << shift;
        }
        __syncthreads();
    }
    return scratch.prefix;
}

// The token at share `left` of the weight, by ascending id; of the tokens with key `key` unless that is 0, by number.
__device__ __forceinline__ u32 token_at(const Row& row, u64 left, u32 key, Scratch& scratch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int from = 0; from < row.vocab; from += THREADS) {
        int i = from + threadIdx.x;
        u64 own = 0;
        if (i < row.vocab) own = key ? key_of(row.logits[i]) == key : weight_of(row, row.logits[i]);
        u64 upto = own;
        UNROLL for (int by = 1; by < 32; by *= 2) {
            u64 lower = __shfl_up_sync(WHOLE_WARP, upto, by);
            if (lane >= by) upto += lower;
        }
        __syncthreads();
        if (lane == 31) scratch.sums[warp] = upto;
        __syncthreads();
        u64 all = 0;
        UNROLL for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) upto += scratch.sums[w];
            all += scratch.sums[w];
        }
        if (left < all) {
            if (left < upto && left >= upto - own) scratch.token = i;
            __syncthreads();
            return scratch.token;
        }
        left -= all;
    }
    return 0;  // not reached: the share is below the whole
}

// The uniform number of a position under a seed, in [0, 1) with 53 random bits: the engine's.
__device__ __forceinline__ u64 mix(u64 state) {
    u64 z = state + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
__device__ __forceinline__ double uniform(u64 seed, u64 position) {
    return (double)(mix(mix(seed) + position) >> 11) * (1.0 / 9007199254740992.0);
}

__device__ __forceinline__ u32 draw(Row row, const Sampling& s, Scratch& scratch) {
    u64 total = weight_above(row, 0, scratch);
    if (s.top_k > 0 && s.top_k < (u32)row.vocab) {
        u32 key = find(row, s.top_k - 1, true, scratch);
        u64 equals = s.top_k - scratch.before;
        total = weight_above(row, key, scratch) + equals * weight_of(row, logit_of(key));
    }
    if (s.top_p < 1.0f) {
        double enough = (double)s.top_p * (double)total;
        u64 target = enough > 1.0 ? (u64)ceil(enough) - 1 : 0;
        u32 key = find(row, target, false, scratch);
        u64 weight = weight_of(row, logit_of(key));
        u64 kept = scratch.before + ((target - scratch.before) / weight + 1) * weight;
        total = min(total, kept);
    }
    if (s.min_p > 0.0f) {
        row.least = s.min_p;
        total = min(total, weight_above(row, 0, scratch));
    }
    u64 target = min((u64)(uniform(s.seed, s.position) * (double)total), total - 1);
    if (s.top_k == 0 && s.top_p >= 1.0f) return token_at(row, target, 0, scratch);
    u32 key = find(row, target, false, scratch);
    return token_at(row, (target - scratch.before) / weight_of(row, logit_of(key)), key, scratch);
}

// tokens[row] = the choice; −1 if a logit is NaN or +∞, its lowest token in wrong[row]; −2 if every one is −∞. The best token
// may always be drawn. logits: [rows, vocab]. grid: rows; block: THREADS.
extern "C" __global__ void __launch_bounds__(THREADS, 2) sample(const float* logits, const Sampling* samplings, int vocab, int* tokens, u32* wrong) {
    SHARED(Scratch, scratch, [1]);
    logits += (i64)blockIdx.x * vocab;
    u64 best = 0, bad = ~0ull;
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        float x = logits[i];
        if (!(x < INFINITE)) bad = min(bad, (u64)i);
        // Of equal keys the lower id is the larger number.
        u64 rank = (u64)key_of(x) << 32 | (0xffffffffu - i);
        if (x > -INFINITE) best = max(best, rank);
    }
    UNROLL for (int with = 16; with > 0; with /= 2) {
        best = max(best, __shfl_xor_sync(WHOLE_WARP, best, with));
        bad = min(bad, __shfl_xor_sync(WHOLE_WARP, bad, with));
    }
    if (threadIdx.x % 32 == 0) scratch->bins[threadIdx.x / 32] = best, scratch->sums[threadIdx.x / 32] = bad;
    __syncthreads();
    UNROLL for (int w = 0; w < THREADS / 32; w++) best = max(best, scratch->bins[w]), bad = min(bad, scratch->sums[w]);
    __syncthreads();
    int token = bad != ~0ull ? -1 : best == 0 ? -2 : (int)(0xffffffffu - (u32)best);
    Sampling s = samplings[blockIdx.x];
    if (token >= 0 && s.temperature > 0.0f)
        token = draw(Row{logits, vocab, logits[token], s.temperature, 0.0f}, s, scratch[0]);
    if (threadIdx.x == 0) tokens[blockIdx.x] = token, wrong[blockIdx.x] = (u32)bad;
}
