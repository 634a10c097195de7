// CUDA C++ on the CPU, as far as hearth's kernels use it: the same .cu file, included after this header, runs here.
//
// Every thread of a block is a fibre. A warp runs until all of its lanes wait at a barrier or are done; its lanes meet at
// shuffles, votes and matrix products, where a lane that is missing, has ended or stands at another line is an error that
// names both places. So are barriers that not all threads of a block reach. Nothing ever hangs.
//
// What a GPU leaves open is varied: `schedule` permutes blocks, warps and lanes, so that a missing barrier or an order
// between blocks that the code silently relies on changes results. Shared memory starts as NaNs. Asynchronous copies land
// as late as they may, at the wait. Under the address sanitizer, memory ends where it ends.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <math.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define HEARTH_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

// Saves the registers that a call preserves and the stack at `*from`, goes on with those at `to`.
extern "C" void emulate_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
emulate_switch:
    stp x19, x20, [sp, #-160]!
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    ldp x19, x20, [sp], #160
    ret
)");
#else
#error "the emulation of CUDA knows how to switch stacks on x86-64 and on 64-bit ARM only"
#endif

namespace emulate {

// A line of a kernel.
struct Site {
    const char* file;
    int line;
    bool operator==(const Site& o) const { return line == o.line && (file == o.file || std::strcmp(file, o.file) == 0); }
    std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};
#define EMULATE_HERE (emulate::Site{__FILE__, __LINE__})

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Turns what the lanes of a mask brought into what they take away.
using Combine = void (*)(void* const* payloads, unsigned mask);

constexpr size_t STACK_BYTES = 64 << 10;

struct Fiber {
    enum State { Ready, AtBarrier, AtWarp, Done } state = Done;
    void* registers = nullptr;
    char* stack = nullptr;
    void* fake_stack = nullptr;
    dim3 thread;
    unsigned lane = 0;
    Site site{"", 0};
    // What it does together with its warp.
    unsigned mask = 0;
    Combine combine = nullptr;
    void* payload = nullptr;
    // What it does together with its block: votes.
    int vote = 0;
    // Asynchronous copies: under way, and the ends of the groups they form.
    struct Copy { void* to; const void* from; size_t bytes, valid; };
    std::vector<Copy> copies;
    std::vector<size_t> groups;
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    Fiber* current = nullptr;
    void* scheduler = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    std::function<void()> kernel;
    dim3 grid, block, block_index;
    unsigned char* dynamic = nullptr;
    size_t dynamic_bytes = 0;
    std::unordered_map<void*, unsigned long long> fresh;
    unsigned long long serial = 0;
    unsigned schedule = 0;
};

inline Machine& machine() {
    static Machine& m = *new Machine;
    return m;
}

inline void to_scheduler(bool forever) {
    Machine& m = machine();
    Fiber* f = m.current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(forever ? nullptr : &f->fake_stack, m.scheduler_stack, m.scheduler_stack_bytes);
#endif
    emulate_switch(&f->registers, m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f->fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
    (void)forever;
}

inline void fiber_main() {
    Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
    m.kernel();
    m.current->state = Fiber::Done;
    to_scheduler(true);
}

inline void resume(Fiber& f) {
    Machine& m = machine();
    m.current = &f;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f.stack, STACK_BYTES);
#endif
    emulate_switch(&m.scheduler, f.registers);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    m.current = nullptr;
}

inline void start(Fiber& f) {
    if (!f.stack) {
        void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) throw Error("no memory for a thread's stack");
        f.stack = static_cast<char*>(stack);
    }
#if defined(__SANITIZE_ADDRESS__)
    // A kernel that an error ended halfway leaves its frames' marks.
    if (f.state != Fiber::Done) __asan_unpoison_memory_region(f.stack, STACK_BYTES);
#endif
    // As if it had called the switch where it begins.
    uintptr_t top = reinterpret_cast<uintptr_t>(f.stack) + STACK_BYTES;
#if defined(__x86_64__)
    void** frame = reinterpret_cast<void**>(top) - 8;
    std::fill(frame, frame + 8, nullptr);
    frame[6] = reinterpret_cast<void*>(fiber_main);
#else
    void** frame = reinterpret_cast<void**>(top) - 20;
    std::fill(frame, frame + 20, nullptr);
    frame[11] = reinterpret_cast<void*>(fiber_main);
#endif
    f.registers = frame;
    f.state = Fiber::Ready;
    f.copies.clear();
    f.groups.clear();
}

inline std::string name(const Fiber& f) {
    return "thread (" + std::to_string(f.thread.x) + "," + std::to_string(f.thread.y) + "," + std::to_string(f.thread.z) + ")";
}

inline std::string where(const Fiber& f) {
    switch (f.state) {
        case Fiber::Done: return name(f) + " has ended";
        case Fiber::AtBarrier: return name(f) + " is at the barrier of " + f.site.text();
        default: return name(f) + " is at " + f.site.text();
    }
}

// Calls `each` for 0..count in an order that depends on the schedule: upwards, downwards, or scattered.
template <typename F>
void in_order(unsigned count, unsigned salt, F each) {
    unsigned schedule = machine().schedule;
    if (schedule == 0) {
        for (unsigned i = 0; i < count; i++) each(i);
    } else if (schedule == 1) {
        for (unsigned i = count; i-- > 0;) each(i);
    } else {
        unsigned mask = 1;
        while (mask < count) mask *= 2;
        // An odd factor permutes the numbers below a power of two.
        for (unsigned i = 0, factor = 2 * schedule + 1; i < mask; i++) {
            unsigned at = (i * factor + salt) & (mask - 1);
            if (at < count) each(at);
        }
    }
}

// The lanes that `f` waits for, or an error if one of them will never come.
inline bool complete(const std::vector<Fiber*>& warp, const Fiber& f) {
    if (!(f.mask >> f.lane & 1)) throw Error(where(f) + " and is not in its own mask");
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(f.mask >> lane & 1)) continue;
        if (lane >= warp.size()) throw Error(where(f) + " with lane " + std::to_string(lane) + ", which its warp lacks");
        const Fiber& other = *warp[lane];
        if (other.state == Fiber::Ready) return false;
        if (other.state != Fiber::AtWarp || other.mask != f.mask || !(other.site == f.site) || other.combine != f.combine)
            throw Error("divergent warp: " + where(f) + ", " + where(other));
    }
    return true;
}

// Runs a warp until each lane is at a barrier of the block or has ended.
inline void run_warp(const std::vector<Fiber*>& warp, unsigned salt) {
    for (;;) {
        in_order(warp.size(), salt, [&](unsigned i) {
            if (warp[i]->state == Fiber::Ready) resume(*warp[i]);
        });
        bool met = false;
        for (Fiber* f : warp) {
            if (f->state != Fiber::AtWarp || !complete(warp, *f)) continue;
            void* payloads[32] = {};
            for (unsigned lane = 0; lane < warp.size(); lane++)
                if (f->mask >> lane & 1) payloads[lane] = warp[lane]->payload;
            f->combine(payloads, f->mask);
            unsigned mask = f->mask;
            for (unsigned lane = 0; lane < warp.size(); lane++)
                if (mask >> lane & 1) warp[lane]->state = Fiber::Ready;
            met = true;
        }
        if (!met) return;
    }
}

inline void run_block() {
    Machine& m = machine();
    size_t threads = size_t(m.block.x) * m.block.y * m.block.z;
    m.serial++;
    if (m.dynamic) std::memset(m.dynamic, 0xff, m.dynamic_bytes);
    std::vector<std::vector<Fiber*>> warps((threads + 31) / 32);
    while (m.fibers.size() < threads) m.fibers.push_back(std::make_unique<Fiber>());
    for (size_t i = 0; i < threads; i++) {
        Fiber& f = *m.fibers[i];
        f.thread = dim3(i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y);
        f.lane = i % 32;
        start(f);
        warps[i / 32].push_back(&f);
    }
    for (unsigned round = 0;; round++) {
        in_order(warps.size(), round, [&](unsigned w) { run_warp(warps[w], round + w); });
        const Fiber& first = *m.fibers[0];
        int votes = 0;
        for (size_t i = 0; i < threads; i++) {
            const Fiber& f = *m.fibers[i];
            if (f.state != first.state || (f.state == Fiber::AtBarrier && !(f.site == first.site)))
                throw Error("divergent barrier: " + where(first) + ", " + where(f));
            votes += f.vote != 0;
        }
        if (first.state == Fiber::Done) return;
        for (size_t i = 0; i < threads; i++) {
            m.fibers[i]->state = Fiber::Ready;
            m.fibers[i]->vote = votes;
        }
    }
}

// Runs a kernel: `launch(grid, block, bytes of dynamic shared memory, [&] { kernel(…); })`.
inline void launch(dim3 grid, dim3 block, size_t shared, std::function<void()> kernel) {
    Machine& m = machine();
    if (block.x * block.y * block.z > 1024 || block.x * block.y * block.z == 0) throw Error("a block has 1 to 1024 threads");
    std::unique_ptr<unsigned char, void (*)(void*)> dynamic(nullptr, std::free);
    if (shared) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, shared)) throw Error("no memory");
        dynamic.reset(static_cast<unsigned char*>(memory));
    }
    m.grid = grid, m.block = block, m.dynamic = dynamic.get(), m.dynamic_bytes = shared, m.kernel = std::move(kernel);
    in_order(grid.x * grid.y * grid.z, 7, [&](unsigned i) {
        m.block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        run_block();
    });
    m.kernel = nullptr;
}

inline int barrier(Site site, int vote) {
    Fiber* f = machine().current;
    f->site = site, f->vote = vote, f->state = Fiber::AtBarrier;
    to_scheduler(false);
    return f->vote;
}

inline void meet(Site site, unsigned mask, Combine combine, void* payload) {
    Fiber* f = machine().current;
    f->site = site, f->mask = mask, f->combine = combine, f->payload = payload, f->state = Fiber::AtWarp;
    to_scheduler(false);
}

template <typename T>
struct Exchange {
    T value, result;
    unsigned source;
};

template <typename T>
void exchange(void* const* payloads, unsigned mask) {
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        auto* p = static_cast<Exchange<T>*>(payloads[lane]);
        // Reading a lane outside the mask is undefined on a GPU; here it is a value that cannot be missed.
        if (p->source < 32 && mask >> p->source & 1) p->result = static_cast<Exchange<T>*>(payloads[p->source])->value;
        else std::memset(&p->result, 0xff, sizeof(T));
    }
}

template <typename T>
T shuffle(Site site, unsigned mask, T value, unsigned source) {
    Exchange<T> e{value, value, source};
    meet(site, mask, exchange<T>, &e);
    return e.result;
}

inline unsigned lane() { return machine().current->lane; }

template <typename T>
T shuffle_index(Site s, unsigned mask, T value, int source, int width = 32) {
    return shuffle(s, mask, value, (lane() & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
T shuffle_xor(Site s, unsigned mask, T value, int with, int width = 32) {
    unsigned source = lane() ^ with;
    return shuffle(s, mask, value, (source & ~(width - 1)) == (lane() & ~(width - 1)) ? source : lane());
}
template <typename T>
T shuffle_up(Site s, unsigned mask, T value, unsigned by, int width = 32) {
    return shuffle(s, mask, value, (lane() & (width - 1)) >= by ? lane() - by : lane());
}
template <typename T>
T shuffle_down(Site s, unsigned mask, T value, unsigned by, int width = 32) {
    return shuffle(s, mask, value, (lane() & (width - 1)) + by < unsigned(width) ? lane() + by : lane());
}

inline void count_votes(void* const* payloads, unsigned mask) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1 && *static_cast<unsigned*>(payloads[lane])) votes |= 1u << lane;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) *static_cast<unsigned*>(payloads[lane]) = votes;
}
inline unsigned ballot(Site site, unsigned mask, unsigned vote) {
    meet(site, mask, count_votes, &vote);
    return vote;
}
inline void nothing(void* const*, unsigned) {}

// What a lane brings to a product on the tensor cores.
struct Product {
    const uint32_t *a, *b;
    void* c;
};

// 8-bit values `at..at + 4` of a fragment's row and column: element (row, k) of the left matrix lies with lane
// row % 8 · 4 + k % 16 / 4, in register row / 8 + 2·(k / 16); the right one's (column, k) in register k / 16.
template <int K>
void multiply_s8_lanes(void* const* payloads, unsigned) {
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            int sum = 0;
            for (int k = 0; k < K; k++) {
                auto* a = static_cast<const Product*>(payloads[row % 8 * 4 + k % 16 / 4]);
                auto* b = static_cast<const Product*>(payloads[column * 4 + k % 16 / 4]);
                int8_t x = a->a[row / 8 + k / 16 * 2] >> k % 4 * 8, y = b->b[k / 16] >> k % 4 * 8;
                sum += int(x) * int(y);
            }
            auto* c = static_cast<const Product*>(payloads[row % 8 * 4 + column / 2]);
            static_cast<int*>(c->c)[row / 8 * 2 + column % 2] += sum;
        }
}
template <int K, size_t A, size_t B>
void multiply_s8(Site site, int (&c)[4], const uint32_t (&a)[A], const uint32_t (&b)[B]) {
    static_assert(A == K / 8 && B == K / 16, "the registers of a fragment");
    Product p{a, b, c};
    meet(site, 0xffffffffu, multiply_s8_lanes<K>, &p);
}

// The same for 16-bit floats. A GPU's order of adding within a product is its own; this one is ascending.
template <typename T>
void multiply_16bit_lanes(void* const* payloads, unsigned) {
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            auto* c = static_cast<const Product*>(payloads[row % 8 * 4 + column / 2]);
            float& sum = static_cast<float*>(c->c)[row / 8 * 2 + column % 2];
            for (int k = 0; k < 16; k++) {
                auto* a = static_cast<const Product*>(payloads[row % 8 * 4 + k % 8 / 2]);
                auto* b = static_cast<const Product*>(payloads[column * 4 + k % 8 / 2]);
                T x{uint16_t(a->a[row / 8 + k / 8 * 2] >> k % 2 * 16)}, y{uint16_t(b->b[k / 8] >> k % 2 * 16)};
                sum = fmaf(widen(x), widen(y), sum);
            }
        }
}
template <typename T>
void multiply_16bit(Site site, T, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Product p{a, b, c};
    meet(site, 0xffffffffu, multiply_16bit_lanes<T>, &p);
}

struct Matrices {
    const void* row;
    uint32_t* out;
};
template <bool TRANSPOSED>
void load_matrices_lanes(void* const* payloads, unsigned) {
    for (int matrix = 0; matrix < 4; matrix++)
        for (int lane = 0; lane < 32; lane++) {
            auto element = [&](int row, int column) {
                auto* p = static_cast<const Matrices*>(payloads[matrix * 8 + row]);
                return static_cast<const uint16_t*>(p->row)[column];
            };
            int g = lane / 4, t = lane % 4;
            uint32_t low = TRANSPOSED ? element(2 * t, g) : element(g, 2 * t);
            uint32_t high = TRANSPOSED ? element(2 * t + 1, g) : element(g, 2 * t + 1);
            static_cast<const Matrices*>(payloads[lane])->out[matrix] = low | high << 16;
        }
}
template <bool TRANSPOSED>
void load_matrices(Site site, uint32_t (&r)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) throw Error(site.text() + ": a matrix row is not aligned to 16 bytes");
    Matrices m{row, r};
    meet(site, 0xffffffffu, load_matrices_lanes<TRANSPOSED>, &m);
}

// Fills a static shared array with NaNs, once per block.
inline void fresh(void* at, size_t bytes) {
    Machine& m = machine();
    unsigned long long& seen = m.fresh[at];
    if (seen != m.serial) std::memset(at, 0xff, bytes);
    seen = m.serial;
}

inline void copy_async(void* to, const void* from, size_t bytes, size_t valid) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
        throw Error("an asynchronous copy of " + std::to_string(bytes) + " bytes is not aligned to them");
    machine().current->copies.push_back({to, from, bytes, valid});
}
inline void copy_commit() {
    Fiber* f = machine().current;
    f->groups.push_back(f->copies.size());
}
inline void copy_wait(size_t left) {
    Fiber* f = machine().current;
    if (f->groups.size() <= left) return;
    size_t groups = f->groups.size() - left, end = f->groups[groups - 1];
    for (size_t i = 0; i < end; i++) {
        const Fiber::Copy& c = f->copies[i];
        if (c.valid) std::memcpy(c.to, c.from, c.valid);
        std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
    }
    f->copies.erase(f->copies.begin(), f->copies.begin() + end);
    f->groups.erase(f->groups.begin(), f->groups.begin() + groups);
    for (size_t& g : f->groups) g -= end;
}

}  // namespace emulate

#define threadIdx (emulate::machine().current->thread)
#define blockIdx (emulate::machine().block_index)
#define blockDim (emulate::machine().block)
#define gridDim (emulate::machine().grid)

#define __syncthreads() ((void)emulate::barrier(EMULATE_HERE, 0))
#define __syncthreads_or(vote) (emulate::barrier(EMULATE_HERE, vote) != 0)
#define __syncthreads_count(vote) emulate::barrier(EMULATE_HERE, vote)
#define __syncwarp(...) emulate::meet(EMULATE_HERE, emulate::full_or(__VA_ARGS__), emulate::nothing, nullptr)
#define __shfl_sync(...) emulate::shuffle_index(EMULATE_HERE, __VA_ARGS__)
#define __shfl_xor_sync(...) emulate::shuffle_xor(EMULATE_HERE, __VA_ARGS__)
#define __shfl_up_sync(...) emulate::shuffle_up(EMULATE_HERE, __VA_ARGS__)
#define __shfl_down_sync(...) emulate::shuffle_down(EMULATE_HERE, __VA_ARGS__)
#define __ballot_sync(...) emulate::ballot(EMULATE_HERE, __VA_ARGS__)
#define __any_sync(...) (emulate::ballot(EMULATE_HERE, __VA_ARGS__) != 0)

namespace emulate {
inline unsigned full_or(unsigned mask = 0xffffffffu) { return mask; }
}

// Arithmetic: IEEE, nothing contracted (-ffp-contract=off here, --fmad=false there).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
using std::exp;
using std::log;
using std::max;
using std::min;
inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int(int8_t(unsigned(a) >> 8 * i)) * int(int8_t(unsigned(b) >> 8 * i));
    return c;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}
template <typename T>
T atomicAdd(T* at, T value) { T old = *at; *at = old + value; return old; }
template <typename T>
T atomicOr(T* at, T value) { T old = *at; *at = old | value; return old; }
template <typename T>
T atomicMax(T* at, T value) { T old = *at; *at = std::max(old, value); return old; }
