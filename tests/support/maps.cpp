// Crash on purpose with many mappings: maps COUNT. Every second page has another protection.
#include <cstdlib>
#include <string>
#include <sys/mman.h>

__attribute__((noinline)) static void die_here(const std::string &word, int depth)
{
    if (depth)
        die_here(word, depth - 1);
    else
        *(volatile int *)8 = 1;
    __asm__ volatile("");
}

int main(int, char **argv)
{
    size_t count = strtoul(argv[1], NULL, 10), page = 4096;
    char *base = (char *)mmap(NULL, count * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < count; i++) {
        base[i * page] = (char)i;
        if (i % 2)
            mprotect(base + i * page, page, PROT_READ);
    }
    die_here("culprit", 10);
}
