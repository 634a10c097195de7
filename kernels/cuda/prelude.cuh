// What every kernel here starts from. No header of CUDA's is included: users have a driver and NVRTC, not a toolkit.
//
// Nothing is contracted (--fmad=false): every fused multiply-add is written out, so the emulation on the CPU computes the
// bits of the GPU wherever no tensor core takes part.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#ifdef HEARTH_EMULATED
#define SHARED(type, name, extent) static type name extent; emulate::fresh(&name, sizeof name)
#define DYNAMIC_SHARED(name) unsigned char* const name = emulate::machine().dynamic
#define UNROLL
#define UNROLL2
#define NO_UNROLL
#else
#define SHARED(type, name, extent) __shared__ __align__(16) type name extent
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define UNROLL _Pragma("unroll")
#define UNROLL2 _Pragma("unroll 2")
#define NO_UNROLL _Pragma("unroll 1")
#endif

#define WHOLE_WARP 0xffffffffu
#define INFINITE __uint_as_float(0x7f800000u)

// 16-bit floats are bits; arithmetic is in f32.
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

#ifdef HEARTH_EMULATED
__device__ __forceinline__ float widen(f16 x) {
    u32 sign = (u32)(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint(mantissa * 5.9604644775390625e-8f));  // 2^-24
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
__device__ __forceinline__ u16 half_bits(float x) {
    u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00;
    // Below the smallest normal number, adding 0.5 lines the mantissa up with 2^-24 and rounds it.
    if (magnitude < 0x38800000u) return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u);
    return sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
}
__device__ __forceinline__ u16 bf16_bits(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
__device__ __forceinline__ float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ u16 half_bits(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u16 bf16_bits(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) { return bf16{bf16_bits(x)}; }
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) { return f16{half_bits(x)}; }

// `N` values that move as one load or store; the address is a multiple of their size.
template <typename T, int N>
struct __align__(sizeof(T) * N) Vector { T at[N]; };

// Values per 16 bytes.
template <typename T>
struct Width { static constexpr int value = 16 / sizeof(T); };

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* p) { return *reinterpret_cast<const Vector<T, N>*>(p); }
template <int N, typename T>
__device__ __forceinline__ void store(T* p, const Vector<T, N>& v) { *reinterpret_cast<Vector<T, N>*>(p) = v; }

// Values `first..first + N` of a row of `length`, zeros past its end; a whole vector where the row's layout allows.
template <int N, typename T>
__device__ __forceinline__ void read_row(const T* row, i64 first, i64 length, float (&out)[N]) {
    if (length % N == 0) {
        Vector<T, N> v = load<N>(row + first);
        UNROLL for (int i = 0; i < N; i++) out[i] = widen(v.at[i]);
    } else {
        UNROLL for (int i = 0; i < N; i++) out[i] = first + i < length ? widen(row[first + i]) : 0.0f;
    }
}
template <int N, typename T>
__device__ __forceinline__ void write_row(T* row, i64 first, i64 length, const float (&in)[N]) {
    if (length % N == 0) {
        Vector<T, N> v;
        UNROLL for (int i = 0; i < N; i++) v.at[i] = narrow<T>(in[i]);
        store<N>(row + first, v);
    } else {
        UNROLL for (int i = 0; i < N; i++) if (first + i < length) row[first + i] = narrow<T>(in[i]);
    }
}

// Sum and maximum over the lanes of a warp by a fixed tree; every lane has the result.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
    UNROLL for (int with = 16; with > 0; with /= 2) x = x + __shfl_xor_sync(WHOLE_WARP, x, with);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    UNROLL for (int with = 16; with > 0; with /= 2) x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, with));
    return x;
}

// Sum over the block's threads: warps by the tree, then their sums in order. `scratch` holds one value per warp; all
// threads take part, and the result is everyone's.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
    int warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();  // the scratch may still be read from the last sum
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = scratch[0];
    for (int w = 1; w < warps; w++) sum = sum + scratch[w];
    return sum;
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    int warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float most = scratch[0];
    for (int w = 1; w < warps; w++) most = fmaxf(most, scratch[w]);
    return most;
}

// e^x with the polynomial of the CPU kernels, bit for bit; 0 below -87.
__device__ __forceinline__ float exponential(float x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = fmaf(clamped, 1.44269504088896340736f, round);
    float n = shifted - round;
    float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, clamped));
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3982e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 5.0000003e-1f);
    float y = fmaf(p, r * r, r) + 1.0f;
    float scale = __uint_as_float((__float_as_uint(shifted) - 0x4b400000u + 127) << 23);
    return x < -87.0f ? 0.0f : y * scale;
}
__device__ __forceinline__ float sigmoid(float x) { return __fdiv_rn(1.0f, 1.0f + exponential(-x)); }
