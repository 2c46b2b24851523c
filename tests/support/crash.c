/* Crash on purpose: crash SIGNAL NAME_HEX MEGABYTES mixed|zero|random THREADS
 * Sets the name of the thread that dies, holds so much memory, has so many more threads, prints its pid, and dies
 * in die_here(). With threads, the last one dies, under the name; the process keeps its own. */
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static int number;
static char name[16];
static pthread_barrier_t all_there;

__attribute__((noinline)) void die_here(int signal_number)
{
    prctl(PR_SET_NAME, name);
    if (signal_number == SIGSEGV)
        *(volatile int *)8 = 1;
    raise(signal_number);
    pause();
}

static void *wait_for_ever(void *last)
{
    pthread_barrier_wait(&all_there);
    if (last)
        die_here(number);
    for (;;)
        pause();
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    number = atoi(argv[1]);
    signal(number, SIG_DFL); /* a background job of a shell inherits SIGQUIT ignored */
    for (size_t i = 0; i < 15 && argv[2][2 * i] && argv[2][2 * i + 1]; i++) {
        unsigned byte;
        if (sscanf(argv[2] + 2 * i, "%2x", &byte) == 1)
            name[i] = (char)byte;
    }
    size_t size = strtoul(argv[3], NULL, 10) << 20;
    uint64_t *memory = malloc(size + 8), state = 88172645463325252ULL;
    for (size_t i = 0; i < size / 8; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        memory[i] = argv[4][0] == 'z' ? 0 : argv[4][0] == 'r' || i / 512 % 8 == 0 ? state : i / 512 % 8 < 4 ? 0 : i;
    }
    printf("%d\n", getpid());
    fflush(stdout);
    int threads = atoi(argv[5]);
    pthread_barrier_init(&all_there, NULL, threads + 1);
    for (int i = 1; i <= threads; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, wait_for_ever, i == threads ? memory : NULL);
    }
    if (threads)
        wait_for_ever(NULL);
    die_here(number);
    return (int)memory[size / 16];
}
