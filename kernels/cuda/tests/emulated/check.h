// Cases, random numbers and comparisons for the emulated kernels.
#pragma once
#include "emulate.h"
#include "../../prelude.cuh"

namespace check {

// Exact memory: what lies past the end is the sanitizer's.
template <typename T>
using Buffer = std::vector<T>;

struct Random {
    unsigned long long state;
    explicit Random(unsigned long long seed) : state(seed * 0x9e3779b97f4a7c15ull + 1) {}
    unsigned long long bits() {
        state += 0x9e3779b97f4a7c15ull;
        unsigned long long z = state;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return z ^ z >> 31;
    }
    // Uniform in [-1, 1).
    float uniform() { return float(bits() >> 40) / float(1 << 23) - 1.0f; }
    int below(int n) { return int(bits() % unsigned(n)); }
};

template <typename T>
Buffer<T> random(Random& r, size_t n, float scale = 1.0f) {
    Buffer<T> v(n);
    for (T& x : v) x = narrow<T>(r.uniform() * scale);
    return v;
}

template <typename T>
Buffer<double> wide(const Buffer<T>& v) {
    Buffer<double> w;
    for (const T& x : v) w.push_back(widen(x));
    return w;
}

[[noreturn]] inline void fail(const std::string& sentence) { throw emulate::Error(sentence); }

// Half a unit in the last place, relative.
template <typename T> inline double epsilon();
template <> inline double epsilon<float>() { return 6e-8; }
template <> inline double epsilon<bf16>() { return 4e-3; }
template <> inline double epsilon<f16>() { return 5e-4; }

// |got − want| ≤ tolerance · max(|want|, scale), element by element.
template <typename T>
void near(const std::string& what, const Buffer<T>& got, const Buffer<double>& want, double tolerance, double scale = 1.0) {
    if (got.size() != want.size()) fail(what + ": " + std::to_string(got.size()) + " elements instead of " + std::to_string(want.size()));
    for (size_t i = 0; i < got.size(); i++) {
        double g = widen(got[i]), error = std::fabs(g - want[i]), limit = tolerance * std::max(std::fabs(want[i]), scale);
        if (!(error <= limit))
            fail(what + "[" + std::to_string(i) + "]: " + std::to_string(g) + " instead of " + std::to_string(want[i]) +
                 ", off by " + std::to_string(error / limit) + " times the limit");
    }
}

template <typename T>
void same(const std::string& what, const Buffer<T>& a, const Buffer<T>& b) {
    if (a.size() != b.size()) fail(what + ": lengths differ");
    for (size_t i = 0; i < a.size(); i++)
        if (std::memcmp(&a[i], &b[i], sizeof(T))) fail(what + "[" + std::to_string(i) + "]: the bits differ");
}

// Runs `kernel(out)` under several schedules; all must write the same bits. `outs` start as given each time.
template <typename... T>
void run(const std::string& what, dim3 grid, int threads, size_t shared, std::function<void()> kernel, Buffer<T>&... outs) {
    auto start = std::make_tuple(outs...);
    emulate::machine().schedule = 0;
    emulate::launch(grid, dim3(threads), shared, kernel);
    auto first = std::make_tuple(outs...);
    for (unsigned schedule = 1; schedule < 3; schedule++) {
        std::tie(outs...) = start;
        emulate::machine().schedule = schedule;
        emulate::launch(grid, dim3(threads), shared, kernel);
        auto again = std::make_tuple(outs...);
        std::apply([&](const auto&... a) {
            std::apply([&](const auto&... b) { (same(what + " under schedule " + std::to_string(schedule), a, b), ...); }, again);
        }, first);
    }
    emulate::machine().schedule = 0;
}

inline int rounded_up(int n, int by) { return (n + by - 1) / by; }

struct Case {
    const char* claim;
    void (*body)();
};

// Runs the cases whose claim contains the first argument, all without one.
inline int main(int argc, char** argv, std::initializer_list<Case> cases) {
    int failures = 0;
    for (const Case& c : cases) {
        if (argc > 1 && !std::strstr(c.claim, argv[1])) continue;
        try {
            c.body();
            std::printf("ok      %s\n", c.claim);
        } catch (const std::exception& e) {
            std::printf("FAILED  %s: %s\n", c.claim, e.what());
            failures++;
        }
    }
    return failures != 0;
}

}  // namespace check
