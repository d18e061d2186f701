// Counts the calls of the CUDA driver that make the host wait for the GPU. Load it with LD_PRELOAD.
//
// It counts the calls between the last cuMemPoolSetAttribute and the next cuMemPoolGetAttribute: a benchmark
// resets the peak of the memory before the code that it measures, and reads the peak after it. The counts are
// printed at exit. If LODESTONE_WAITS is set, a program that waited more often, or that measured nothing,
// exits with status 3.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static struct {
    // Calls that wait.
    long streams, contexts, events, reads, long_writes, allocations;
    // Calls that do not wait.
    long writes, queued_allocations;
} now, measured;
static int measuring, found;

static void* next(const char* name) { return dlsym(RTLD_NEXT, name); }

#define COUNTED(counter, name, parameters, arguments)        \
    int name parameters {                                    \
        static int(*real) parameters;                        \
        if (!real) *(void**)&real = next(#name);             \
        now.counter++;                                       \
        return real arguments;                               \
    }

// Copies from host memory that is not pinned: up to 64 KiB are queued, longer copies may wait for the stream.
#define QUEUED (64 << 10)
#define WRITE(name, parameters, arguments)                   \
    int name parameters {                                    \
        static int(*real) parameters;                        \
        if (!real) *(void**)&real = next(#name);             \
        *(bytes > QUEUED ? &now.long_writes : &now.writes) += 1; \
        return real arguments;                               \
    }

COUNTED(streams, cuStreamSynchronize, (void* stream), (stream))
COUNTED(contexts, cuCtxSynchronize, (void), ())
COUNTED(events, cuEventSynchronize, (void* event), (event))
COUNTED(reads, cuMemcpyDtoHAsync_v2, (void* to, unsigned long long from, size_t bytes, void* stream), (to, from, bytes, stream))
COUNTED(reads, cuMemcpyDtoH_v2, (void* to, unsigned long long from, size_t bytes), (to, from, bytes))
WRITE(cuMemcpyHtoDAsync_v2, (unsigned long long to, const void* from, size_t bytes, void* stream), (to, from, bytes, stream))
WRITE(cuMemcpyHtoD_v2, (unsigned long long to, const void* from, size_t bytes), (to, from, bytes))
COUNTED(allocations, cuMemAlloc_v2, (unsigned long long* to, size_t bytes), (to, bytes))
COUNTED(allocations, cuMemFree_v2, (unsigned long long at), (at))
COUNTED(queued_allocations, cuMemAllocAsync, (unsigned long long* to, size_t bytes, void* stream), (to, bytes, stream))

int cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
    static int (*real)(void*, int, void*);
    if (!real) *(void**)&real = next("cuMemPoolSetAttribute");
    const int status = real(pool, attribute, value);
    __builtin_memset(&now, 0, sizeof now);
    measuring = 1;
    return status;
}

int cuMemPoolGetAttribute(void* pool, int attribute, void* value) {
    static int (*real)(void*, int, void*);
    if (!real) *(void**)&real = next("cuMemPoolGetAttribute");
    if (measuring) measured = now, measuring = 0, found = 1;
    return real(pool, attribute, value);
}

__attribute__((destructor)) static void report(void) {
    const long waits = measured.streams + measured.contexts + measured.events + measured.reads + measured.long_writes + measured.allocations;
    const char* most = getenv("LODESTONE_WAITS");
    fprintf(stderr, "waits      %ld: %ld for the stream, %ld for the context, %ld for events, %ld copies to the host, %ld long ones from "
            "it, %ld allocations; without a wait %ld copies and %ld allocations\n", waits, measured.streams, measured.contexts,
            measured.events, measured.reads, measured.long_writes, measured.allocations, measured.writes, measured.queued_allocations);
    if (!most || (found && waits <= atol(most))) return;
    if (found) fprintf(stderr, "error: expected at most %s waits\n", most);
    else fprintf(stderr, "error: nothing was counted\n");
    fflush(NULL);
    _exit(3);
}
