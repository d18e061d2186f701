// NVIDIA's libraries, opened when a GPU is and not when a program starts: one program for machines with a GPU and without.
//
// build.rs lists what they export. Each name becomes a jump to an address that `lodestone_open` finds. The names are hidden, so
// that the libraries, which call each other, do not find them here.
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

// Until a library is open, and where it is too old to have a name, that name returns its status for what is not supported.
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

// Opens a library: null, or what the loader says of it.
const char* lodestone_open(int number) {
    void* library = dlopen(files[number], RTLD_NOW | RTLD_GLOBAL);
    if (!library) return dlerror();
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        if (entries[i].library != number) continue;
        // Preloaded libraries, which count calls, come first.
        void* at = dlsym(RTLD_DEFAULT, entries[i].name);
        if (!at) at = dlsym(library, entries[i].name);
        if (at) *entries[i].at = at;
    }
    return NULL;
}
