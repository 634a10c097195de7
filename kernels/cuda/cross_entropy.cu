// Cross-entropy over a chunk of logits. The caller makes logits a few rows at a time (gemm_nt_*), turns them into the loss
// and softmax − onehot here, multiplies those back (gemm_nn_*, gemm_tn_* accumulating), and forgets them: [tokens, vocab]
// never exists.
#include "prelude.cuh"

#define THREADS 256

// nll[row] = −log softmax(logits)[target], 0 for a negative target; slopes, unless null: softmax − onehot, or zeros, rounded
// to T. slopes may be the logits themselves. logits, slopes: [rows, vocab]. grid: rows; block: THREADS.
template <typename T>
__device__ void cross_entropy(const float* logits, const int* targets, int vocab, double* nll, T* slopes) {
    SHARED(float, floats, [THREADS / 32]);
    SHARED(double, doubles, [THREADS / 32]);
    int target = targets[blockIdx.x];
    logits += (i64)blockIdx.x * vocab, slopes = slopes ? slopes + (i64)blockIdx.x * vocab : slopes;
    if (target < 0) {
        for (int i = threadIdx.x; slopes && i < vocab; i += THREADS) slopes[i] = narrow<T>(0.0f);
        if (threadIdx.x == 0) nll[blockIdx.x] = 0.0;
        return;
    }
    float most = -INFINITE;
    for (int i = threadIdx.x; i < vocab; i += THREADS) most = fmaxf(most, logits[i]);
    most = block_max(most, floats);
    double sum = 0.0;
    for (int i = threadIdx.x; i < vocab; i += THREADS) sum = sum + (double)exponential(logits[i] - most);
    sum = block_sum(sum, doubles);
    if (threadIdx.x == 0) nll[blockIdx.x] = log(sum) - (double)(logits[target] - most);
    if (!slopes) return;
    __syncthreads();  // the target's logit has been read
    float inverse = (float)(1.0 / sum);
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        float p = exponential(logits[i] - most) * inverse;
        slopes[i] = narrow<T>(i == target ? p - 1.0f : p);
    }
}

#define KERNELS(T, name)                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_##name(   \
        const float* logits, const int* targets, int vocab, double* nll, T* slopes) { cross_entropy(logits, targets, vocab, nll, slopes); }
KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
