// Tensor cores and asynchronous copies: PTX on a GPU, plain arithmetic in the emulation. Fragments are laid out as the PTX
// manual says; `g` is a lane's number / 4, `t` its remainder.
#pragma once
#include "prelude.cuh"

#ifdef HEARTH_EMULATED
// c[16, 8] += a[16, 32]·b[8, 32]ᵀ in integers: a holds rows g, g + 8 at columns 4t, then both at 16 + 4t; b row g at 4t and 16 + 4t.
#define multiply_s8_k32(...) emulate::multiply_s8<32>(EMULATE_HERE, __VA_ARGS__)
// The same over 16 columns: a holds rows g, g + 8 at 4t; b row g.
#define multiply_s8_k16(...) emulate::multiply_s8<16>(EMULATE_HERE, __VA_ARGS__)
// c[16, 8] += a[16, 16]·b[8, 16]ᵀ, f32 sums: a holds rows g, g + 8 at columns 2t, then both at 8 + 2t; b row g at 2t and 8 + 2t.
#define multiply_16bit(...) emulate::multiply_16bit(EMULATE_HERE, __VA_ARGS__)
// Four 8×8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8 and gets elements 2t, 2t + 1 of
// row g of each; of the transposed matrices in the second form.
#define load_matrices(...) emulate::load_matrices<false>(EMULATE_HERE, __VA_ARGS__)
#define load_matrices_transposed(...) emulate::load_matrices<true>(EMULATE_HERE, __VA_ARGS__)

template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid) { emulate::copy_async(to, from, BYTES, valid); }
__device__ __forceinline__ void copy_commit() { emulate::copy_commit(); }
template <int LEFT>
__device__ __forceinline__ void copy_wait() { emulate::copy_wait(LEFT); }
#else
__device__ __forceinline__ void multiply_s8_k32(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_s8_k16(int (&c)[4], const u32 (&a)[2], const u32 (&b)[1]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
__device__ __forceinline__ void multiply_16bit(bf16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_16bit(f16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Copies BYTES (4, 8 or 16) to shared memory in the background: the first `valid` of them, then zeros.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid), "n"(BYTES) : "memory");
}
// The copies since the last commit become a group.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most LEFT of this thread's groups are under way.
template <int LEFT>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
#endif
