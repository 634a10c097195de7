// NVIDIA's driver and run-time compiler, as far as hearth calls them, on a machine without a card: memory is the host's and
// kernels run in the emulation.
//
// What a real driver leaves open is chosen to hurt: memory begins as NaNs and ends at a page that nobody may touch; what is
// sent to a stream happens at once or as late as it may (`policy`), so that a missing wait shows as wrong data, without any
// clock. Faults are set by `stand_in_set`, or by HEARTH_STAND_IN="key=value,…" for a process of its own.
#include "table.h"
#include <deque>
#include <mutex>
#include <set>
#include <unistd.h>

namespace {

enum Code {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201, NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, LAUNCH_FAILED = 719,
    NOT_PERMITTED = 800, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901,
};

// What happens late: nothing, copies, kernels, everything.
enum Policy { EAGER = 0, LATE_COPIES = 1, LATE_KERNELS = 2, LATE = 3 };

struct Setting { const char* name; long value; };
Setting settings[] = {
    {"init", 0}, {"version", 12090}, {"count", 1}, {"major", 9}, {"minor", 0}, {"total_bytes", 1l << 30}, {"policy", EAGER},
    {"schedule", 0},            // order of blocks, warps and lanes in the emulation
    {"allocations", -1},        // how many succeed before the card is full
    {"pinnings", -1},           // how many succeed before the system refuses
    {"launches", -1},           // how many succeed before the card is lost
    {"lost_code", LAUNCH_FAILED},
    {"cubins", 1},              // 0: images are refused, PTX is not
    {"archs", 1},               // 0: the compiler knows nothing newer than sm_80
};
long& setting(const std::string& name) {
    for (Setting& s : settings)
        if (name == s.name) return s.value;
    std::fprintf(stderr, "stand-in: there is no setting `%s`\n", name.c_str());
    std::abort();
}
bool spend(const char* name) {
    long& left = setting(name);
    if (left == 0) return false;
    if (left > 0) left--;
    return true;
}

// What images begin with; the name of a file of kernels follows.
const std::string &ELF = *new std::string("\x7f" "ELF stand-in "), &PTX = *new std::string("// PTX stand-in ");

struct Operation {
    bool copy;
    std::function<void()> run;
};
struct Graph { std::vector<Operation> operations; };
struct Stream {
    std::deque<Operation> waiting;
    unsigned long long sent = 0, done = 0;
    Graph* capturing = nullptr;
};
struct Event {
    Stream* stream = nullptr;
    unsigned long long after = 0;
    double milliseconds = 0;
};
struct Module { std::string file; };
struct Function { std::string name; const stand_in::Kernel* kernel; Module* module; size_t dynamic_limit = 48 << 10; };
struct Memory { size_t bytes; char* pages; size_t page_bytes; };

struct Driver {
    bool started = false;
    Code lost = OK;
    size_t used = 0;
    int contexts = 0;
    unsigned long long launches = 0, copies = 0, graphs = 0;
    std::map<uintptr_t, Memory> device, pinned;
    std::set<Stream*> streams;
    std::set<Event*> events;
    std::set<Module*> modules;
    std::map<std::string, std::unique_ptr<Function>> functions;
    std::set<std::string> launched;
    double clock = 0;
};
// Never destroyed, like all that outlives a call: a process may end while one of its threads is still in a call.
Driver& driver = *new Driver;
std::recursive_mutex& mutex = *new std::recursive_mutex;
int primary;
thread_local void* current = nullptr;

// Every call: one at a time, none after the card is lost, and most need a context.
struct Call {
    std::lock_guard<std::recursive_mutex> guard;
    Code code;
    explicit Call(bool needs_context) : guard(mutex) {
        code = !driver.started ? NOT_INITIALIZED : driver.lost ? driver.lost : needs_context && current != &primary ? INVALID_CONTEXT : OK;
    }
};
#define ENTER_WITH(context) \
    Call call(context);     \
    if (call.code) return call.code
#define ENTER() ENTER_WITH(true)
#define REQUIRE(condition, error) \
    if (!(condition)) return error

// Does what a stream still has to do, up to a point.
void run(Stream* stream, unsigned long long until) {
    while (stream->done < until && !stream->waiting.empty()) {
        Operation next = std::move(stream->waiting.front());
        stream->waiting.pop_front();
        stream->done++;
        if (driver.lost) continue;
        try {
            next.run();
        } catch (const std::exception& e) {
            std::fprintf(stderr, "stand-in: %s\n", e.what());
            driver.lost = LAUNCH_FAILED;
        }
    }
}
void run(Stream* stream) { run(stream, stream->sent); }
void run_all() {
    for (Stream* stream : driver.streams) run(stream);
}

void send(Stream* stream, bool copy, std::function<void()> what) {
    if (stream->capturing) {
        stream->capturing->operations.push_back({copy, std::move(what)});
        return;
    }
    stream->waiting.push_back({copy, std::move(what)});
    stream->sent++;
    long policy = setting("policy");
    bool late = policy == LATE || (copy ? policy == LATE_COPIES : policy == LATE_KERNELS);
    if (!late) run(stream);
}

// Memory whose end (but for less than 16 bytes) is the end of its last page; the next page is out of bounds.
bool take(std::map<uintptr_t, Memory>& from, size_t bytes, uintptr_t* at) {
    size_t page = sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
    void* pages = mmap(nullptr, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return false;
    mprotect(static_cast<char*>(pages) + body, page, PROT_NONE);
    std::memset(pages, 0xff, body);
    *at = reinterpret_cast<uintptr_t>(pages) + body - (bytes + 15) / 16 * 16;
    from[*at] = {bytes, static_cast<char*>(pages), body + page};
    return true;
}
bool give_back(std::map<uintptr_t, Memory>& to, uintptr_t at) {
    auto found = to.find(at);
    if (found == to.end()) return false;
    munmap(found->second.pages, found->second.page_bytes);
    to.erase(found);
    return true;
}
bool within(const std::map<uintptr_t, Memory>& all, uintptr_t at, size_t bytes) {
    auto next = all.upper_bound(at);
    if (next == all.begin()) return false;
    auto [start, memory] = *--next;
    return at - start <= memory.bytes && bytes <= memory.bytes - (at - start);
}

// Pinned memory is read when the copy happens; anything else has been read when the call returns.
Code copy(uintptr_t to, uintptr_t from, size_t bytes, uintptr_t host, Stream* stream) {
    REQUIRE(driver.streams.count(stream), INVALID_HANDLE);
    driver.copies++;
    auto move = [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes); };
    bool pinned = within(driver.pinned, host, bytes);
    REQUIRE(pinned || !stream->capturing, CAPTURE_UNSUPPORTED);
    if (pinned) {
        send(stream, true, move);
    } else {
        run(stream);
        move();
    }
    return driver.lost;
}

// As the library is loaded: a driver may be asked for its version before it is started.
[[maybe_unused]] const bool told = [] {
    if (const char* text = std::getenv("HEARTH_STAND_IN")) {
        std::string all = text;
        for (size_t from = 0; from < all.size();) {
            size_t end = std::min(all.find(',', from), all.size()), equals = all.find('=', from);
            if (equals >= end) break;
            setting(all.substr(from, equals - from)) = std::atol(all.c_str() + equals + 1);
            from = end + 1;
        }
    }
    return true;
}();

int start() {
    driver.started = true;
    return setting("init");
}

}  // namespace

extern "C" {

// For tests: faults and policies, and counts of what happened.
void stand_in_set(const char* name, long value) { std::lock_guard guard(mutex); setting(name) = value; }
long stand_in_count(const char* name) {
    std::lock_guard guard(mutex);
    std::string what = name;
    if (what == "used") return driver.used;
    if (what == "contexts") return driver.contexts;
    if (what == "launches") return driver.launches;
    if (what == "copies") return driver.copies;
    if (what == "graphs") return driver.graphs;
    if (what == "kernels") return stand_in::kernels().size();
    if (what == "held") return driver.device.size() + driver.pinned.size() + driver.streams.size() + driver.events.size() + driver.modules.size();
    return -1;
}
// The `index`th kernel that was never launched, or null.
const char* stand_in_idle(long index) {
    std::lock_guard guard(mutex);
    for (auto& [name, kernel] : stand_in::kernels())
        if (!driver.launched.count(name) && index-- == 0) return name.c_str();
    return nullptr;
}

int cuInit(unsigned flags) { std::lock_guard guard(mutex); return flags ? INVALID_VALUE : start(); }
int cuDriverGetVersion(int* version) { *version = setting("version"); return OK; }
int cuGetErrorString(int code, const char** text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : code == LAUNCH_FAILED ? "unspecified launch failure" :
            code == 46 ? "CUDA-capable device(s) is/are busy or unavailable" : code == NOT_PERMITTED ? "operation not permitted" :
            code == INVALID_VALUE ? "invalid argument" : code == NO_BINARY ? "no kernel image is available for execution on the device" : nullptr;
    return OK;
}
int cuDeviceGetCount(int* count) { ENTER_WITH(false); *count = setting("count"); return OK; }
int cuDeviceGet(int* device, int ordinal) { ENTER_WITH(false); *device = ordinal; return ordinal < setting("count") ? OK : INVALID_DEVICE; }
int cuDeviceGetName(char* name, int length, int) { ENTER_WITH(false); std::snprintf(name, length, "stand-in"); return OK; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { ENTER_WITH(false); *bytes = setting("total_bytes"); return OK; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    ENTER_WITH(false);
    switch (attribute) {
        case 16: *value = 4; break;              // multiprocessors
        case 36: *value = 1000000; break;        // memory clock, kHz
        case 37: *value = 64; break;             // memory bus, bits
        case 75: *value = setting("major"); break;
        case 76: *value = setting("minor"); break;
        case 97: *value = 99 << 10; break;       // shared memory of a block that asks for more
        default: return INVALID_VALUE;
    }
    return OK;
}
int cuDevicePrimaryCtxRetain(void** context, int) { ENTER_WITH(false); driver.contexts++; *context = &primary; return OK; }
int cuDevicePrimaryCtxRelease_v2(int) {
    std::lock_guard guard(mutex);
    driver.contexts--;
    return driver.lost;
}
int cuCtxPushCurrent_v2(void* context) { ENTER_WITH(false); REQUIRE(context == &primary, INVALID_CONTEXT); current = context; return OK; }
int cuCtxPopCurrent_v2(void** context) { ENTER_WITH(false); *context = current; current = nullptr; return OK; }
int cuCtxSetCurrent(void* context) { ENTER_WITH(false); REQUIRE(context == &primary, INVALID_CONTEXT); current = context; return OK; }
int cuCtxSynchronize() { ENTER(); run_all(); return driver.lost; }

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER();
    *total = setting("total_bytes"), *free = *total - driver.used;
    return OK;
}
int cuMemAlloc_v2(uintptr_t* at, size_t bytes) {
    ENTER();
    REQUIRE(bytes, INVALID_VALUE);
    REQUIRE(spend("allocations") && bytes <= setting("total_bytes") - driver.used && take(driver.device, bytes, at), OUT_OF_MEMORY);
    driver.used += bytes;
    return OK;
}
int cuMemFree_v2(uintptr_t at) {
    std::lock_guard guard(mutex);
    run_all();
    auto found = driver.device.find(at);
    REQUIRE(found != driver.device.end(), INVALID_VALUE);
    driver.used -= found->second.bytes;
    give_back(driver.device, at);
    return driver.lost;
}
int cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    ENTER();
    REQUIRE(bytes, INVALID_VALUE);
    REQUIRE(spend("pinnings"), NOT_PERMITTED);
    REQUIRE(take(driver.pinned, bytes, reinterpret_cast<uintptr_t*>(at)), OUT_OF_MEMORY);
    return OK;
}
int cuMemFreeHost(void* at) {
    std::lock_guard guard(mutex);
    run_all();
    return give_back(driver.pinned, reinterpret_cast<uintptr_t>(at)) ? driver.lost : INVALID_VALUE;
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t bytes, Stream* stream) {
    ENTER();
    REQUIRE(within(driver.device, to, bytes), INVALID_VALUE);
    auto host = reinterpret_cast<uintptr_t>(from);
    return copy(to, host, bytes, host, stream);
}
int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t bytes, Stream* stream) {
    ENTER();
    REQUIRE(within(driver.device, from, bytes), INVALID_VALUE);
    auto host = reinterpret_cast<uintptr_t>(to);
    return copy(host, from, bytes, host, stream);
}
int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, Stream* stream) {
    ENTER();
    REQUIRE(within(driver.device, to, bytes) && within(driver.device, from, bytes), INVALID_VALUE);
    REQUIRE(driver.streams.count(stream), INVALID_HANDLE);
    send(stream, false, [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
    return driver.lost;
}
int cuMemsetD8Async(uintptr_t at, unsigned char value, size_t bytes, Stream* stream) {
    ENTER();
    REQUIRE(within(driver.device, at, bytes), INVALID_VALUE);
    REQUIRE(driver.streams.count(stream), INVALID_HANDLE);
    send(stream, false, [=] { std::memset(reinterpret_cast<void*>(at), value, bytes); });
    return driver.lost;
}

int cuStreamCreate(Stream** stream, unsigned) { ENTER(); *stream = new Stream; driver.streams.insert(*stream); return OK; }
int cuStreamDestroy_v2(Stream* stream) {
    std::lock_guard guard(mutex);
    REQUIRE(driver.streams.count(stream), INVALID_HANDLE);
    run(stream);
    driver.streams.erase(stream);
    for (Event* event : driver.events)
        if (event->stream == stream) event->stream = nullptr;
    delete stream;
    return driver.lost;
}
int cuStreamSynchronize(Stream* stream) {
    ENTER();
    REQUIRE(driver.streams.count(stream), INVALID_HANDLE);
    REQUIRE(!stream->capturing, CAPTURE_UNSUPPORTED);
    run(stream);
    return driver.lost;
}
int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    ENTER();
    REQUIRE(driver.streams.count(stream) && driver.events.count(event), INVALID_HANDLE);
    REQUIRE(!stream->capturing, CAPTURE_UNSUPPORTED);
    Stream* of = event->stream;
    unsigned long long after = event->after;
    if (!of || of == stream) return OK;
    // It makes nothing happen by itself: only what follows it, when that happens.
    stream->waiting.push_back({false, [=] { if (driver.streams.count(of)) run(of, after); }});
    stream->sent++;
    return OK;
}
int cuEventCreate(Event** event, unsigned) { ENTER(); *event = new Event; driver.events.insert(*event); return OK; }
int cuEventDestroy_v2(Event* event) {
    std::lock_guard guard(mutex);
    REQUIRE(driver.events.erase(event), INVALID_HANDLE);
    delete event;
    return driver.lost;
}
int cuEventRecord(Event* event, Stream* stream) {
    ENTER();
    REQUIRE(driver.streams.count(stream) && driver.events.count(event), INVALID_HANDLE);
    REQUIRE(!stream->capturing, CAPTURE_UNSUPPORTED);
    event->stream = stream, event->after = stream->sent;
    event->milliseconds = driver.clock += 1;
    return OK;
}
int cuEventQuery(Event* event) {
    ENTER();
    REQUIRE(driver.events.count(event), INVALID_HANDLE);
    return event->stream && event->stream->done < event->after ? NOT_READY : driver.lost;
}
int cuEventSynchronize(Event* event) {
    ENTER();
    REQUIRE(driver.events.count(event), INVALID_HANDLE);
    if (event->stream) run(event->stream, event->after);
    return driver.lost;
}
int cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
    ENTER();
    REQUIRE(driver.events.count(from) && driver.events.count(to), INVALID_HANDLE);
    *milliseconds = to->milliseconds - from->milliseconds;
    return OK;
}

int cuModuleLoadData(Module** module, const void* image) {
    ENTER();
    std::string text = static_cast<const char*>(image);
    bool cubin = text.rfind(ELF, 0) == 0;
    REQUIRE(cubin || text.rfind(PTX, 0) == 0, INVALID_IMAGE);
    REQUIRE(!cubin || setting("cubins"), NO_BINARY);
    *module = new Module{text.substr((cubin ? ELF : PTX).size())};
    driver.modules.insert(*module);
    return OK;
}
int cuModuleUnload(Module* module) {
    std::lock_guard guard(mutex);
    run_all();
    REQUIRE(driver.modules.erase(module), INVALID_HANDLE);
    delete module;
    return driver.lost;
}
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    ENTER();
    REQUIRE(driver.modules.count(module), INVALID_HANDLE);
    auto found = stand_in::kernels().find(name);
    REQUIRE(found != stand_in::kernels().end() && found->second.file == module->file, NOT_FOUND);
    auto& place = driver.functions[name];
    place.reset(new Function{name, &found->second, module});
    *function = place.get();
    return OK;
}
int cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* size) {
    ENTER_WITH(false);
    REQUIRE(index < function->kernel->sizes.size(), INVALID_VALUE);
    *offset = function->kernel->offsets[index], *size = function->kernel->sizes[index];
    return OK;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    ENTER();
    REQUIRE(attribute == 8 && value >= 0 && value <= 99 << 10, INVALID_VALUE);
    function->dynamic_limit = value;
    return OK;
}
int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   Stream* stream, void** arguments, void**) {
    ENTER();
    REQUIRE(driver.streams.count(stream), INVALID_HANDLE);
    REQUIRE(driver.modules.count(function->module), INVALID_HANDLE);
    REQUIRE(gx && gy && gz && gx < 1u << 31 && gy < 65536 && gz < 65536, INVALID_VALUE);
    REQUIRE(bx > 0 && by > 0 && bz > 0 && bx * by * bz <= 1024 && shared <= function->dynamic_limit, INVALID_VALUE);
    if (!spend("launches")) return driver.lost = Code(setting("lost_code"));
    driver.launches++;
    driver.launched.insert(function->name);
    const stand_in::Kernel* kernel = function->kernel;
    auto copies = std::make_shared<std::vector<std::vector<uint64_t>>>();
    for (size_t i = 0; i < kernel->sizes.size(); i++) {
        copies->emplace_back((kernel->sizes[i] + 7) / 8);
        std::memcpy(copies->back().data(), arguments[i], kernel->sizes[i]);
    }
    send(stream, false, [=] {
        std::vector<void*> pointers;
        for (auto& argument : *copies) pointers.push_back(argument.data());
        emulate::machine().schedule = setting("schedule");
        emulate::launch(dim3(gx, gy, gz), dim3(bx, by, bz), shared, [&] { kernel->call(kernel->function, pointers.data()); });
    });
    return driver.lost;
}

int cuStreamBeginCapture_v2(Stream* stream, int) {
    ENTER();
    REQUIRE(driver.streams.count(stream) && !stream->capturing, INVALID_VALUE);
    stream->capturing = new Graph;
    return OK;
}
int cuStreamEndCapture(Stream* stream, Graph** graph) {
    ENTER();
    REQUIRE(driver.streams.count(stream) && stream->capturing, INVALID_VALUE);
    *graph = stream->capturing;
    stream->capturing = nullptr;
    return OK;
}
int cuGraphInstantiateWithFlags(Graph** ready, Graph* graph, unsigned long long) { ENTER(); *ready = new Graph(*graph); return OK; }
int cuGraphLaunch(Graph* ready, Stream* stream) {
    ENTER();
    REQUIRE(driver.streams.count(stream), INVALID_HANDLE);
    if (!spend("launches")) return driver.lost = Code(setting("lost_code"));
    driver.graphs++;
    for (const Operation& operation : ready->operations) send(stream, operation.copy, operation.run);
    return driver.lost;
}
int cuGraphDestroy(Graph* graph) { std::lock_guard guard(mutex); delete graph; return OK; }
int cuGraphExecDestroy(Graph* ready) { std::lock_guard guard(mutex); run_all(); delete ready; return OK; }

// The compiler: an image says which file it stands for.
struct Program { std::string file; bool ptx = false; };
// A version of its own: what it makes is never found in a cache in place of code.
int nvrtcVersion(int* major, int* minor) { *major = 0, *minor = 1; return 0; }
int nvrtcCreateProgram(Program** program, const char*, const char* name, int, const char* const*, const char* const*) {
    *program = new Program{name};
    return 0;
}
int nvrtcDestroyProgram(Program** program) { delete *program; return 0; }
int nvrtcGetNumSupportedArchs(int* count) { *count = setting("archs") ? 3 : 1; return 0; }
int nvrtcGetSupportedArchs(int* archs) {
    archs[0] = 80;
    if (setting("archs")) archs[1] = 90, archs[2] = 100;
    return 0;
}
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    for (int i = 0; i < count; i++) program->ptx |= std::strstr(options[i], "compute_") != nullptr;
    return 0;
}
int nvrtcGetProgramLogSize(Program*, size_t* bytes) { *bytes = 1; return 0; }
int nvrtcGetProgramLog(Program*, char* log) { *log = 0; return 0; }
int nvrtcGetCUBINSize(Program* p, size_t* bytes) { *bytes = p->ptx ? 0 : (ELF + p->file).size() + 1; return 0; }
int nvrtcGetCUBIN(Program* p, char* image) { std::strcpy(image, (ELF + p->file).c_str()); return 0; }
int nvrtcGetPTXSize(Program* p, size_t* bytes) { *bytes = (PTX + p->file).size() + 1; return 0; }
int nvrtcGetPTX(Program* p, char* image) { std::strcpy(image, (PTX + p->file).c_str()); return 0; }

}  // extern "C"
