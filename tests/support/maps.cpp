// Crash on purpose with many mappings: maps COUNT [PAGES]. Every second mapping, of PAGES pages (1), is read-only. With 0
// pages, the core holds nothing of the mappings, but 9 MiB of other memory.
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

int main(int argc, char **argv)
{
    size_t count = strtoul(argv[1], NULL, 10), pages = argc > 2 ? atoi(argv[2]) : 1;
    size_t page = 4096 * (pages ? pages : 1);
    char *base = (char *)mmap(NULL, count * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    std::string memory(9 << 20, 'm');
    if (!pages)
        madvise(base, count * page, MADV_DONTDUMP);
    for (size_t i = 0; i < count; i++) {
        for (size_t at = 0; at < pages * 4096; at += 4096)
            base[i * page + at] = (char)i;
        if (i % 2)
            mprotect(base + i * page, page, PROT_READ);
    }
    die_here("culprit", 10);
}
