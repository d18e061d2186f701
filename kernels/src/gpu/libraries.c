// Opens NVIDIA's libraries when a GPU is opened, not when the program starts, so that one program runs with
// and without a GPU.
//
// build.rs lists the functions that the libraries export. Each function is defined here as a jump to an
// address that `lodestone_open` looks up. The definitions are hidden, so that the libraries, which call each
// other, do not find them.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

#if defined(__x86_64__)
#define JUMP(name) "jmp *lodestone_at_" #name "(%rip)\n"
#elif defined(__aarch64__)
#define JUMP(name) \
    "adrp x16, lodestone_at_" #name "\n" \
    "ldr x16, [x16, :lo12:lodestone_at_" #name "]\n" \
    "br x16\n"
#else
#error "the feature `cuda` is for x86-64 and aarch64"
#endif

// A function returns the status "not supported" until its library is open, and if the library is too old to
// have it.
#define LIBRARY(number, file, status) \
    static int missing_##number(void) { return status; }
#define ENTRY(number, name)                                          \
    void* lodestone_at_##name = (void*)missing_##number;             \
    __asm__(".text\n.globl " #name "\n.hidden " #name "\n.type " #name ",%function\n" #name ":\n" JUMP(name));
#include "libraries.inc"
#undef LIBRARY
#undef ENTRY

static const char* const files[] = {
#define LIBRARY(number, file, status) file,
#define ENTRY(number, name)
#include "libraries.inc"
#undef LIBRARY
#undef ENTRY
};

static const struct {
    int library;
    const char* name;
    void** at;
} entries[] = {
#define LIBRARY(number, file, status)
#define ENTRY(number, name) {number, #name, &lodestone_at_##name},
#include "libraries.inc"
};

// Opens a library. Returns null, or the error message of the loader.
const char* lodestone_open(int number) {
    void* library = dlopen(files[number], RTLD_NOW | RTLD_GLOBAL);
    if (!library) return dlerror();
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        if (entries[i].library != number) continue;
        // Preloaded libraries, such as the one that counts waits (benches/count.c), have priority.
        void* at = dlsym(RTLD_DEFAULT, entries[i].name);
        if (!at) at = dlsym(library, entries[i].name);
        if (at) *entries[i].at = at;
    }
    return NULL;
}
