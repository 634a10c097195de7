// The emulation itself: what it refuses, and what its schedules bring to light.
#include "check.h"

using namespace check;

std::string refusal(int threads, size_t shared, std::function<void()> kernel) {
    try {
        emulate::launch(1, threads, shared, kernel);
    } catch (const emulate::Error& e) {
        return e.what();
    }
    fail("nothing was refused");
}

void says(const std::string& sentence, const std::string& part) {
    if (sentence.find(part) == std::string::npos) fail("\"" + sentence + "\" does not speak of \"" + part + "\"");
}

void barriers_must_be_reached_by_all() {
    says(refusal(64, 0, [] { if (threadIdx.x < 32) __syncthreads(); }), "divergent barrier: thread (0,0,0) is at the barrier");
    says(refusal(64, 0, [] {
        if (threadIdx.x < 32)
            __syncthreads();
        else
            __syncthreads();
    }), "divergent barrier");
}

void lanes_must_meet() {
    says(refusal(32, 0, [] { if (threadIdx.x != 5) __syncwarp(); }), "thread (5,0,0) has ended");
    says(refusal(32, 0, [] { if (threadIdx.x < 16) __syncwarp(0xffff); else __syncwarp(0xfff0000); }), "not in its own mask");
    says(refusal(20, 0, [] { __syncwarp(); }), "which its warp lacks");
    says(refusal(32, 0, [] {
        if (threadIdx.x == 3)
            __syncthreads();
        else
            __syncwarp();
    }), "divergent warp");
}

void a_missing_barrier_is_seen() {
    Buffer<float> out(64);
    auto kernel = [&](bool correct) {
        SHARED(float, tile, [64]);
        tile[threadIdx.x] = threadIdx.x;
        if (correct) __syncthreads();
        out[threadIdx.x] = tile[63 - threadIdx.x];
    };
    run("with it", 1, 64, 0, [&] { kernel(true); }, out);
    for (int i = 0; i < 64; i++) if (out[i] != 63 - i) fail("wrong value");
    try {
        run("without it", 1, 64, 0, [&] { kernel(false); }, out);
    } catch (const emulate::Error& e) {
        return says(e.what(), "the bits differ");
    }
    fail("not seen");
}

void copies_land_at_the_wait() {
    Buffer<uint4> from(32, uint4{1, 2, 3, 4});
    Buffer<unsigned> out(32);
    auto kernel = [&](bool wait) {
        DYNAMIC_SHARED(memory);
        auto* to = reinterpret_cast<uint4*>(memory) + threadIdx.x;
        emulate::copy_async(to, &from[threadIdx.x], 16, threadIdx.x == 7 ? 4 : 16);
        emulate::copy_commit();
        if (wait) emulate::copy_wait(0);
        out[threadIdx.x] = to->y;
    };
    run("copy", 1, 32, 512, [&] { kernel(true); }, out);
    if (out[0] != 2 || out[7] != 0) fail("not what was copied");
    run("copy", 1, 32, 512, [&] { kernel(false); }, out);
    if (out[0] != 0xffffffffu) fail("a copy nobody waited for has landed");
}

void halves_round_as_hardware_does() {
    for (unsigned bits = 0; bits < 65536; bits++) {
        f16 h{u16(bits)};
        float x = widen(h);
        bool nan = (bits & 0x7fff) > 0x7c00;
        if (nan ? x == x : half_bits(x) != bits) fail("f16 " + std::to_string(bits));
        if (nan || (bits & 0x7fff) >= 0x7bff) continue;
        // Halfway to the next one: to the even one. A little further: up.
        float next = widen(f16{u16(bits + 1)}), middle = (x + next) / 2;
        if (half_bits(middle) != (bits & 1 ? bits + 1 : bits)) fail("the middle above f16 " + std::to_string(bits));
        if (half_bits(std::nextafter(middle, next)) != bits + 1) fail("above the middle of f16 " + std::to_string(bits));
        if (half_bits(std::nextafter(middle, x)) != bits) fail("below the middle of f16 " + std::to_string(bits));
    }
    for (auto [x, bits] : {std::pair<float, unsigned>{1.0f, 0x3f80}, {-2.0f, 0xc000}, {1.00390625f, 0x3f80}, {1.01171875f, 0x3f82}, {3.4e38f, 0x7f80}})
        if (bf16_bits(x) != bits) fail("bf16 of " + std::to_string(x));
}

void the_exponential_is_the_cpus() {
    for (int i = 0; i < 20000; i++) {
        float x = -86.9f + i * (174.0f / 20000);
        double want = std::exp(double(x));
        if (std::fabs(exponential(x) - want) > want * 2.4e-7) fail("e^" + std::to_string(x));
    }
    // A hash of the bits that `hearth_kernels::cpu::simd::exp` gives.
    unsigned long long hash = 0;
    for (int i = 0; i < 20000; i++) {
        volatile float step = i * 0.0087f;
        hash = hash * 6364136223846793005ull + __float_as_uint(exponential(-86.9f + step));
    }
    if (hash != 0xe22c304c7975d241ull) fail("other bits than the CPU's");
    if (exponential(-INFINITE) != 0 || exponential(0) != 1 || exponential(NAN) == exponential(NAN)) fail("at an edge");
}

int main(int argc, char** argv) {
    return check::main(argc, argv, {
        {"a barrier that not all threads reach is an error", barriers_must_be_reached_by_all},
        {"lanes that do not meet are an error", lanes_must_meet},
        {"a missing barrier changes results between schedules", a_missing_barrier_is_seen},
        {"asynchronous copies land at the wait", copies_land_at_the_wait},
        {"halves round to nearest even", halves_round_as_hardware_does},
        {"the exponential has the CPU's bits and is within two units in the last place", the_exponential_is_the_cpus},
    });
}
