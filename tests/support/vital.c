/* Crash on purpose with much memory and many threads: vital MEGABYTES THREADS [HOSTILE].
 * The last thread dies, 20 frames deep, in die_here(); the others wait. HOSTILE is one of
 *   leader     the main thread has ended before
 *   pages      memory that cannot be read, or that the process does not want to be dumped
 *   nowhere    the stack pointer of the thread that dies points to no memory
 *   libraries  the loader's list of libraries points to itself
 *   zeros      memory of which only the first page was touched; shared memory that only a child has touched */
#define _GNU_SOURCE
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#pragma weak _r_debug /* a static program has none */
#define SIZE (1 << 20)
static const char *hostile = "";
static pthread_barrier_t all_there;
static char *unwanted, *forbidden, *cut;
char *zeros, *shared; /* not static: debuggers ask for them */
uint64_t *heap;

static void *map(int flags, int file)
{
    return mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, file, 0);
}

static void make_pages(void)
{
    unwanted = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
    memset(unwanted, 'u', SIZE);
    madvise(unwanted, SIZE, MADV_DONTDUMP);
    forbidden = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
    memset(forbidden, 'f', SIZE);
    mprotect(forbidden, SIZE, PROT_NONE);
    int file = memfd_create("cut", 0);
    ftruncate(file, SIZE);
    cut = map(MAP_PRIVATE, file);
    memset(cut, 'c', SIZE / 2);
    ftruncate(file, 4096);
}

static void make_zeros(void)
{
    zeros = mmap(NULL, 64 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memset(zeros, 'z', 4096);
    shared = map(MAP_SHARED | MAP_ANONYMOUS, -1);
    pid_t child = fork();
    if (!child) {
        memset(shared, 's', SIZE);
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

static void loop_libraries(void)
{
    struct link_map *first = _r_debug.r_map;
    while (first->l_next)
        first = first->l_next;
    first->l_next = _r_debug.r_map;
}

__attribute__((noinline)) static void die_here(const char *word, int depth)
{
    if (depth)
        die_here(word, depth - 1);
    else if (!strcmp(hostile, "nowhere"))
#ifdef __x86_64__
        __asm__ volatile("mov $16, %rsp\n\tpush %rax");
#else
        abort();
#endif
    else
        *(volatile int *)8 = 1;
    __asm__ volatile("");
}

static void *wait_for_ever(void *last)
{
    pthread_barrier_wait(&all_there);
    if (last) {
        if (!strcmp(hostile, "leader"))
            usleep(200000); /* pthread_exit() of the main thread tells nobody when it is done */
        die_here(strdup("culprit"), 20);
    }
    for (;;)
        pause();
}

int main(int argc, char **argv)
{
    size_t size = strtoul(argv[1], NULL, 10) << 20;
    int threads = atoi(argv[2]);
    uint64_t *memory = heap = malloc(size), state = 88172645463325252ULL;
    for (size_t i = 0; i < size / 8; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        memory[i] = i / 512 % 2 ? state : i;
    }
    hostile = argc > 3 ? argv[3] : "";
    if (!strcmp(hostile, "pages"))
        make_pages();
    if (!strcmp(hostile, "zeros"))
        make_zeros();
    if (!strcmp(hostile, "libraries"))
        loop_libraries();
    pthread_barrier_init(&all_there, NULL, threads + 1);
    for (int i = 1; i <= threads; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, wait_for_ever, i == threads ? memory : NULL);
    }
    if (!strcmp(hostile, "leader")) {
        pthread_barrier_wait(&all_there);
        pthread_exit(NULL);
    }
    wait_for_ever(NULL);
}
