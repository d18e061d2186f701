// Counts what makes the host wait for the GPU: LD_PRELOADed before a program that links the driver's library. Counting
// starts anew at each cuMemPoolSetAttribute, which a benchmark calls before what it measures; at exit the numbers since the
// last one are printed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

static long stream_waits, context_waits, event_waits, reads, writes, allocations;

static void* next(const char* name) { return dlsym(RTLD_NEXT, name); }

#define COUNTED(counter, name, parameters, arguments)        \
    int name parameters {                                    \
        static int(*real) parameters;                        \
        if (!real) *(void**)&real = next(#name);             \
        counter++;                                           \
        return real arguments;                               \
    }

COUNTED(stream_waits, cuStreamSynchronize, (void* stream), (stream))
COUNTED(context_waits, cuCtxSynchronize, (void), ())
COUNTED(event_waits, cuEventSynchronize, (void* event), (event))
COUNTED(reads, cuMemcpyDtoHAsync_v2, (void* to, unsigned long long from, size_t bytes, void* stream), (to, from, bytes, stream))
COUNTED(reads, cuMemcpyDtoH_v2, (void* to, unsigned long long from, size_t bytes), (to, from, bytes))
COUNTED(writes, cuMemcpyHtoDAsync_v2, (unsigned long long to, const void* from, size_t bytes, void* stream), (to, from, bytes, stream))
COUNTED(allocations, cuMemAllocAsync, (unsigned long long* to, size_t bytes, void* stream), (to, bytes, stream))

int cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
    static int (*real)(void*, int, void*);
    if (!real) *(void**)&real = next("cuMemPoolSetAttribute");
    stream_waits = context_waits = event_waits = reads = writes = allocations = 0;
    return real(pool, attribute, value);
}

__attribute__((destructor)) static void report(void) {
    fprintf(stderr, "waits      %ld for the stream, %ld for the context, %ld for events; %ld copies to the host, %ld from it, "
            "%ld allocations\n", stream_waits, context_waits, event_waits, reads, writes, allocations);
}
