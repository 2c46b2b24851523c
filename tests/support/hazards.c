/* Crash on purpose with memory that is a trap for who reads it: hazards MEGABYTES [FILE].
 * It dies when standard input has a line or ends.
 * The frame that dies points to all of it:
 *   missing    a userfaultfd region that nobody fills
 *   guarded    pages with a guard page among them (MADV_GUARD_INSTALL)
 *   secret     memfd_secret(2)
 *   changing   shared memory, with the stack in it, that another process changes all the time
 *   served     a private mapping of FILE, which has three pages: read, written, never touched */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIZE (64 << 10)
#define STACK (1 << 20)
#define PAGE 4096
#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif
static char *volatile traps[3], *volatile memory;
static volatile char *volatile *target; /* what the other process changes */

static char *map(size_t size, int flags, int file)
{
    return mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, 0);
}

static char *missing(void)
{
    char *region = map(SIZE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    int faults = syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.range = {(unsigned long)region, SIZE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(faults, UFFDIO_API, &api) || ioctl(faults, UFFDIO_REGISTER, &range))
        printf("no userfaultfd\n");
    return region;
}

static char *guarded(void)
{
    char *region = map(SIZE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    memset(region, 'g', SIZE);
    if (madvise(region + PAGE, PAGE, 102))
        printf("no guard pages\n");
    return region;
}

static char *secret(void)
{
    int file = syscall(SYS_memfd_secret, 0);
    if (file < 0 || ftruncate(file, SIZE)) {
        printf("no secret memory\n");
        return NULL;
    }
    return memset(map(SIZE, MAP_SHARED, file), 's', SIZE);
}

static char *served(const char *name)
{
    char *region = map(3 * PAGE, MAP_PRIVATE, open(name, O_RDONLY));
    printf("read %c\n", region[0]);
    memset(region + PAGE, 'w', PAGE);
    return region;
}

__attribute__((noinline)) static void die_here(int depth)
{
    volatile char changing[16 << 10];
    changing[sizeof changing - 1] = 0;
    char *volatile here[] = {traps[0], traps[1], traps[1] + 2 * PAGE, traps[2], traps[3], traps[3] + PAGE,
                             traps[3] + 2 * PAGE};
    if (depth) {
        die_here(depth - 1);
    } else {
        *target = changing;
        while (!changing[sizeof changing - 1])
            ;
        *(volatile int *)8 = (int)(long)here[0];
    }
    __asm__ volatile("");
}

static void change(void)
{
    target = (void *)map(PAGE, MAP_SHARED | MAP_ANONYMOUS, -1);
    if (fork())
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (!*target)
        ;
    for (unsigned i = 0;; i++)
        (*target)[i % (16 << 10)] = 0x80 | i >> 14; /* never a letter that a test looks for */
}

static void *run(void *unused)
{
    die_here(10);
    return unused;
}

int main(int argc, char **argv)
{
    size_t size = strtoul(argv[1], NULL, 10) << 20;
    memory = memset(malloc(size), 'm', size);
    traps[0] = missing();
    traps[1] = guarded();
    traps[2] = secret();
    traps[3] = argc > 2 ? served(argv[2]) : traps[1];
    printf("ready\n");
    fflush(stdout);
    getchar();
    char *stack = map(STACK, MAP_SHARED | MAP_ANONYMOUS, -1);
    change();
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstack(&attributes, stack, STACK);
    pthread_t thread;
    pthread_create(&thread, &attributes, run, NULL);
    pthread_join(thread, NULL);
}
