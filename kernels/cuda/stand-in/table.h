// The kernels of the .cu files by name, as a driver launches them: with an array of pointers to the arguments.
#pragma once
#include "../tests/emulated/emulate.h"
#include <map>

namespace stand_in {

struct Kernel {
    std::string file;
    // Bytes of each argument, and where the driver says they lie among the parameters.
    std::vector<size_t> sizes, offsets;
    void (*call)(void (*)(), void** arguments);
    void (*function)();
};

inline std::map<std::string, Kernel>& kernels() {
    static auto& all = *new std::map<std::string, Kernel>;
    return all;
}

template <typename... A, size_t... I>
void apply(void (*function)(A...), void** arguments, std::index_sequence<I...>) {
    function(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}

// Enters a kernel: its type says how to read the arguments.
template <typename... A>
int enter(const char* file, const char* name, void (*function)(A...)) {
    Kernel kernel{file, {sizeof(A)...}, {}, nullptr, reinterpret_cast<void (*)()>(function)};
    size_t at = 0, sizes[] = {sizeof(A)...}, alignments[] = {alignof(A)...};
    for (size_t i = 0; i < sizeof...(A); i++) {
        at = (at + alignments[i] - 1) / alignments[i] * alignments[i];
        kernel.offsets.push_back(at);
        at += sizes[i];
    }
    kernel.call = [](void (*erased)(), void** arguments) {
        apply(reinterpret_cast<void (*)(A...)>(erased), arguments, std::index_sequence_for<A...>{});
    };
    kernels().emplace(name, std::move(kernel));
    return 0;
}

}  // namespace stand_in
