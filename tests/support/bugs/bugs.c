// Usage: bugs BUG MIB: touch so many MiB of memory, then fail in one of several ways.
#include <assert.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define APART __attribute__((noinline, noclone))

volatile int zero;
char *volatile nowhere;
void (*volatile no_function)(void);
volatile size_t sink;

static void touch(size_t mib)
{
    char *memory = malloc((mib << 20) + 1);
    memset(memory, 7, (mib << 20) + 1);
    sink += memory[mib];
}

APART size_t length(const char *text) { return strlen(text) + 1; }
APART size_t parse(const char *text) { return length(text) + 2; }
APART size_t load(const char *text) { return length(text) * 3; }
APART int store(int *place) { *place = 5; return zero + 3; }
APART int update(int *place) { return store(place) + 1; }
APART int insert(int *place) { return store(place) * 2; }
APART void give_up(void) { abort(); }
APART void check_header(void) { if (!zero) give_up(); puts("checked"); }
APART void check_footer(void) { if (!zero) give_up(); printf("%d", zero); }
APART int divide(int value) { return value / zero; }
APART int average(int value) { return divide(value) + 7; }
APART int descend(int depth)
{
    char used[300];
    memset(used, depth, sizeof used);
    sink += used[depth % 300];
    return descend(depth + 1) + used[zero];
}
APART void require(void) { assert(zero == 1); }
APART void free_twice(void) { char *memory = malloc(64); sink += (size_t)memory; free(memory); free(memory); }
static int compare(const void *a, const void *b) { (void)a; (void)b; return *nowhere; }
APART void sort(void) { int values[5] = {1, 2, 3}; qsort(values, 5, sizeof *values, compare); sink += values[zero]; }
APART void call_nothing(void) { no_function(); sink++; }
static void on_signal(int number) { (void)number; abort(); }
APART void handle(void) { signal(SIGSEGV, on_signal); store((int *)nowhere); sink++; }
APART void overflow(size_t size) { char text[16]; memset(text, 'x', size); sink += text[zero]; }
APART void kill_itself(void) { kill(getpid(), SIGSEGV); sink++; }

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    touch(strtoul(words[2], NULL, 10));
    switch (atoi(words[1])) {
    case 0: sink = parse(nowhere); break;
    case 1: sink = load(nowhere); break;
    case 2: sink = update((int *)nowhere); break;
    case 3: sink = insert((int *)nowhere); break;
    case 4: check_header(); break;
    case 5: check_footer(); break;
    case 6: sink = average(3); break;
    case 7: sink = descend(1); break;
    case 8: require(); break;
    case 9: free_twice(); break;
    case 10: sort(); break;
    case 11: call_nothing(); break;
    case 12: handle(); break;
    case 13: kill_itself(); break;
    case 14: overflow(zero + 64); break;
    }
    return 1;
}
