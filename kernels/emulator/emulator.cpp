#include "emulator.hpp"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

namespace emulator {

thread_local Coordinates coordinates;

namespace {

constexpr size_t STACK = 256 << 10;
constexpr int NOBODY = -1;

// The thread and the time of an access. It happened before an access of another thread if a barrier of the
// block, or an operation of their warp, came in between.
struct Access {
    int thread = NOBODY;
    uint32_t block_phase = 0, warp_phase = 0;
};

// The accesses of two bytes of shared memory.
struct Cell {
    Access written, read, read_by_another;
    bool in_flight = false;
};

struct Copy {
    size_t offset;
    std::vector<char> bytes;
};

enum class State { READY, AT_BARRIER, AT_WARP_OPERATION, DONE };

struct Fiber {
    Coordinates coordinates;
    State state;
    bool started;
    jmp_buf context;
    const char* file;  // of the barrier that it waits at
    int line;
    WarpOperation operation;
    std::vector<std::vector<Copy>> copies;  // by group; the last group is not committed yet
};

struct Warp {
    unsigned arrived = 0;
    uint32_t phase = 0;
    char contributions[2][32 * CONTRIBUTION_BYTES];  // of this operation and of the one before, which some lanes may still have to read
};

// xorshift (Marsaglia 2003), for the order of fibers and blocks.
struct Random {
    uint64_t state;
    size_t below(size_t n) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return (state >> 11) % n;
    }
};

struct Machine {
    const Launch* launch = nullptr;
    const std::function<void()>* body = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<size_t> ready;
    std::vector<char> memory;
    std::vector<Cell> cells;
    char* stacks = nullptr;
    size_t stack_count = 0;
    size_t running = 0;
    uint32_t block_phase = 0;
    jmp_buf scheduler;
    sigjmp_buf end;
    bool active = false;
    Random random{88172645463325252ull};
    std::string error;

    ~Machine() {
        if (stacks) munmap(stacks, stack_count * STACK);
    }
    void run_block(dim3 block);
    void enter(size_t thread);
    void release_barrier();
    void pause(State state);
    const char* name(size_t thread);
};

thread_local Machine machine;

// The guarded buffers of all threads: address of the first byte → size.
std::mutex buffers_lock;
std::map<uintptr_t, size_t> buffers;
struct sigaction previous_handler;
const size_t page = size_t(sysconf(_SC_PAGESIZE));

const char* Machine::name(size_t thread) {
    static thread_local char text[2][96];
    static thread_local int which = 0;
    which ^= 1;
    const Coordinates& p = fibers[thread].coordinates;
    snprintf(text[which], sizeof(text[which]), "thread %u,%u,%u of block %u,%u,%u", p.thread.x, p.thread.y, p.thread.z,
             p.block.x, p.block.y, p.block.z);
    return text[which];
}

void fiber_main() {
    (*machine.body)();
    machine.pause(State::DONE);
}

void Machine::pause(State state) {
    fibers[running].state = state;
    if (!_setjmp(fibers[running].context)) _longjmp(scheduler, 1);
}

// Switches to a fiber until it pauses.
void Machine::enter(size_t thread) {
    running = thread;
    Fiber& fiber = fibers[thread];
    coordinates = fiber.coordinates;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    static thread_local ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + thread * STACK;
    start.uc_stack.ss_size = STACK;
    start.uc_link = nullptr;
    makecontext(&start, fiber_main, 0);
    setcontext(&start);
}

void Machine::run_block(dim3 block) {
    size_t threads = size_t(launch->block.x) * launch->block.y * launch->block.z;
    if (stack_count < threads) {
        if (stacks) munmap(stacks, stack_count * STACK);
        stack_count = threads;
        stacks = static_cast<char*>(mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks == MAP_FAILED) abort();
    }
    fibers.resize(threads);
    warps.assign(threads / 32, Warp());
    memory.assign(launch->shared_bytes, char(0xff));
    cells.assign((launch->shared_bytes + 1) / 2, Cell());
    block_phase = 0;
    ready.clear();
    for (size_t t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        fiber.coordinates.grid = launch->grid;
        fiber.coordinates.block_size = launch->block;
        fiber.coordinates.block = block;
        fiber.coordinates.thread = dim3(t % launch->block.x, t / launch->block.x % launch->block.y,
                                  t / (launch->block.x * launch->block.y));
        fiber.coordinates.lane = int(t % 32);
        fiber.state = State::READY;
        fiber.started = false;
        fiber.copies.assign(1, {});
        ready.push_back(t);
    }
    for (;;) {
        while (!ready.empty()) {
            size_t pick = random.below(ready.size());
            size_t thread = ready[pick];
            ready[pick] = ready.back();
            ready.pop_back();
            enter(thread);
        }
        bool done = true;
        for (Fiber& fiber : fibers) done &= fiber.state == State::DONE;
        if (done) return;
        release_barrier();
    }
}

// Releases the barrier after no thread can continue. All threads must wait at the same barrier.
void Machine::release_barrier() {
    size_t waiting = fibers.size();
    for (size_t t = 0; t < fibers.size(); t++) {
        running = t;
        if (fibers[t].state == State::AT_WARP_OPERATION)
            fail("%s waits for lanes of its warp that never reach the same instruction", name(t));
        if (fibers[t].state == State::AT_BARRIER) waiting = t;
    }
    const Fiber& first = fibers[waiting];
    for (size_t t = 0; t < fibers.size(); t++) {
        const Fiber& other = fibers[t];
        if (other.state == State::DONE)
            fail("%s is at the barrier of %s:%d, which %s never reaches", name(waiting), first.file, first.line, name(t));
        if (other.line != first.line || strcmp(other.file, first.file))
            fail("%s is at the barrier of %s:%d, but %s at that of %s:%d", name(waiting), first.file, first.line, name(t),
                 other.file, other.line);
    }
    block_phase++;
    for (size_t t = 0; t < fibers.size(); t++) {
        fibers[t].state = State::READY;
        ready.push_back(t);
    }
}

bool happened_before(const Access& access, int thread) {
    if (access.thread == NOBODY || access.thread == thread || access.block_phase < machine.block_phase) return true;
    return access.thread / 32 == thread / 32 && access.warp_phase < machine.warps[thread / 32].phase;
}

Access now() {
    int thread = int(machine.running);
    return {thread, machine.block_phase, machine.warps[thread / 32].phase};
}

Cell* cells_of(size_t offset, size_t bytes, size_t& count) {
    if (offset % 2 || bytes % 2) fail("an access of a single byte of shared memory, which the emulator does not support");
    if (offset % bytes && bytes <= 16) fail("an access of %zu bytes at byte %zu of shared memory", bytes, offset);
    if (offset + bytes > machine.memory.size())
        fail("bytes %zu..%zu of a shared memory of %zu", offset, offset + bytes, machine.memory.size());
    count = bytes / 2;
    return &machine.cells[offset / 2];
}

void expect_no_race(const Access& earlier, size_t offset, const char* what) {
    if (!happened_before(earlier, int(machine.running)))
        fail("a race at byte %zu of shared memory: %s what %s accessed, with no barrier in between", offset, what,
             machine.name(size_t(earlier.thread)));
}

void record_write(size_t offset, size_t bytes, bool in_flight) {
    size_t count;
    Cell* cell = cells_of(offset, bytes, count);
    for (size_t i = 0; i < count; i++, cell++) {
        if (cell->in_flight) fail("a write to byte %zu of shared memory, where a copy is in flight", offset + 2 * i);
        expect_no_race(cell->written, offset + 2 * i, "this thread writes");
        expect_no_race(cell->read, offset + 2 * i, "this thread writes");
        expect_no_race(cell->read_by_another, offset + 2 * i, "this thread writes");
        cell->written = now();
        cell->in_flight = in_flight;
    }
}

void out_of_bounds(int signal, siginfo_t* info, void* context) {
    uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (machine.active) {
        uintptr_t start = 0;
        size_t size = 0;
        buffers_lock.lock();
        for (auto& [first, bytes] : buffers) {
            uintptr_t guard = first / page * page - page, end = (first + bytes + page - 1) / page * page + page;
            if (address >= guard && address < end) start = first, size = bytes;
        }
        buffers_lock.unlock();
        if (start == 0) fail("out of bounds: address %#zx belongs to no buffer", size_t(address));
        if (address < start) fail("out of bounds: %zu bytes before a buffer of %zu", size_t(start - address), size);
        fail("out of bounds: byte %zu of a buffer of %zu", size_t(address - start), size);
    }
    if (previous_handler.sa_flags & SA_SIGINFO && previous_handler.sa_sigaction) {
        previous_handler.sa_sigaction(signal, info, context);
    } else {
        ::signal(signal, SIG_DFL);
    }
}

void install_handler() {
    struct sigaction action = {};
    action.sa_sigaction = out_of_bounds;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_handler);
}

}  // namespace

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    machine.error = std::string(machine.launch->name) + ", " + machine.name(machine.running) + ": " + text;
    siglongjmp(machine.end, 1);
}

int run(const Launch& launch, const std::function<void()>& body) {
    machine.launch = &launch;
    machine.body = &body;
    size_t threads = size_t(launch.block.x) * launch.block.y * launch.block.z;
    size_t blocks = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    if (threads == 0 || threads % 32 || threads > 1024 || blocks == 0 || launch.grid.y > 65535 || launch.grid.z > 65535 ||
        launch.shared_bytes > (227 << 10)) {
        machine.error = std::string(launch.name) + ": cannot launch " + std::to_string(blocks) + " blocks of " +
                        std::to_string(threads) + " threads with " + std::to_string(launch.shared_bytes) +
                        " bytes of shared memory";
        return 1;
    }
    std::vector<size_t> order(blocks);
    std::iota(order.begin(), order.end(), size_t(0));
    if (sigsetjmp(machine.end, 1)) {
        machine.active = false;
        return 1;
    }
    machine.active = true;
    for (size_t left = blocks; left > 0; left--) {
        size_t pick = machine.random.below(left), block = order[pick];
        order[pick] = order[left - 1];
        machine.run_block(dim3(block % launch.grid.x, block / launch.grid.x % launch.grid.y,
                               block / (size_t(launch.grid.x) * launch.grid.y)));
    }
    machine.active = false;
    return 0;
}

void barrier(const char* file, int line) {
    Fiber& fiber = machine.fibers[machine.running];
    fiber.file = file;
    fiber.line = line;
    machine.pause(State::AT_BARRIER);
}

const char* exchange(WarpOperation operation, const void* contribution, size_t bytes) {
    size_t thread = machine.running, warp_index = thread / 32;
    Warp& warp = machine.warps[warp_index];
    Fiber* lanes = &machine.fibers[warp_index * 32];
    Fiber& fiber = machine.fibers[thread];
    char* contributions = warp.contributions[warp.phase % 2];
    memcpy(contributions + fiber.coordinates.lane * CONTRIBUTION_BYTES, contribution, bytes);
    fiber.operation = operation;
    warp.arrived |= 1u << fiber.coordinates.lane;
    if (warp.arrived != ~0u) {
        machine.pause(State::AT_WARP_OPERATION);
        return contributions;
    }
    for (int l = 0; l < 32; l++) {
        if (lanes[l].operation != operation) fail("the lanes of a warp wait at different instructions");
    }
    warp.arrived = 0;
    warp.phase++;
    for (int l = 0; l < 32; l++) {
        if (&lanes[l] == &fiber) continue;
        lanes[l].state = State::READY;
        machine.ready.push_back(warp_index * 32 + size_t(l));
    }
    return contributions;
}

size_t shared_bytes() { return machine.memory.size(); }

const char* readable(size_t offset, size_t bytes) {
    size_t count;
    Cell* cell = cells_of(offset, bytes, count);
    for (size_t i = 0; i < count; i++, cell++) {
        if (cell->in_flight) fail("a read of byte %zu of shared memory, where a copy is in flight", offset + 2 * i);
        if (cell->written.thread == NOBODY) fail("a read of byte %zu of shared memory, which nothing has written", offset + 2 * i);
        expect_no_race(cell->written, offset + 2 * i, "this thread reads");
        if (cell->read.thread != int(machine.running)) cell->read_by_another = cell->read;
        cell->read = now();
    }
    return &machine.memory[offset];
}

char* writable(size_t offset, size_t bytes) {
    record_write(offset, bytes, false);
    return &machine.memory[offset];
}

void copy_async(size_t offset, const void* from, size_t bytes, size_t zeros) {
    if (offset % bytes) fail("an asynchronous copy of %zu bytes to byte %zu of shared memory", bytes, offset);
    expect_aligned(from, bytes);
    record_write(offset, bytes, true);
    Copy copy{offset, std::vector<char>(bytes, 0)};
    if (zeros < bytes) memcpy(copy.bytes.data(), from, bytes - zeros);
    machine.fibers[machine.running].copies.back().push_back(std::move(copy));
}

void commit_copies() { machine.fibers[machine.running].copies.emplace_back(); }

void wait_for_copies(int groups_in_flight) {
    auto& groups = machine.fibers[machine.running].copies;
    while (int(groups.size()) - 1 > groups_in_flight) {
        for (Copy& copy : groups.front()) {
            memcpy(&machine.memory[copy.offset], copy.bytes.data(), copy.bytes.size());
            for (size_t i = 0; i < copy.bytes.size() / 2; i++) {
                Cell& cell = machine.cells[copy.offset / 2 + i];
                cell.in_flight = false;
                cell.written = now();
            }
        }
        groups.erase(groups.begin());
    }
}

}  // namespace emulator

// Allocates `bytes` bytes, initialised with NaNs, between two guard pages. The buffer ends at the second
// guard page, except for up to 15 bytes that keep it aligned for vectors.
extern "C" void* emulated_allocate(size_t bytes) {
    using namespace emulator;
    static std::once_flag once;
    std::call_once(once, install_handler);
    size_t rounded = (bytes + 15) / 16 * 16, pages = (rounded + page - 1) / page;
    char* start = static_cast<char*>(
        mmap(nullptr, (pages + 2) * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (start == MAP_FAILED) abort();
    if (pages && mprotect(start + page, pages * page, PROT_READ | PROT_WRITE)) abort();
    memset(start + page, 0xff, pages * page);
    char* buffer = start + (pages + 1) * page - rounded;
    std::lock_guard<std::mutex> guard(buffers_lock);
    buffers[reinterpret_cast<uintptr_t>(buffer)] = bytes;
    return buffer;
}

// Frees a buffer. Returns 1 if the bytes between the buffer and its guard pages have changed.
extern "C" int emulated_free(void* buffer) {
    using namespace emulator;
    std::lock_guard<std::mutex> guard(buffers_lock);
    uintptr_t start = reinterpret_cast<uintptr_t>(buffer);
    size_t bytes = buffers.at(start), rounded = (bytes + 15) / 16 * 16, pages = (rounded + page - 1) / page;
    bool changed = false;
    const unsigned char* first = static_cast<unsigned char*>(buffer) + rounded - pages * page;
    for (size_t i = 0; i < pages * page; i++) {
        changed |= (i < pages * page - rounded || i >= pages * page - rounded + bytes) && first[i] != 0xff;
    }
    buffers.erase(start);
    munmap(reinterpret_cast<void*>(start + rounded - (pages + 1) * page), (pages + 2) * page);
    return changed;
}

// The message of the last launch of this thread that failed.
extern "C" const char* emulated_error() { return emulator::machine.error.c_str(); }

// Sets the seed of the order of fibers and blocks.
extern "C" void emulated_seed(uint64_t seed) { emulator::machine.random.state = seed * 2 + 1; }
