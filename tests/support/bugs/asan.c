// Usage: asan BUG MIB: touch so many MiB of memory, then have AddressSanitizer abort in one of several ways.
#include <stdlib.h>
#include <string.h>

#define APART __attribute__((noinline))

volatile size_t zero;
volatile size_t sink;

APART void read_beyond(char *text) { sink += text[zero + 64]; }
APART void use_freed(char *text) { free(text); sink += text[zero]; }
APART void free_twice(char *text) { free(text); free(text); }
APART void leave_stack(void) { volatile char text[16]; text[zero] = 1; sink += text[zero + 18]; }
APART void copy_too_much(char *text) { memcpy(text, text + 1, zero + 100); }

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    size_t size = (strtoul(words[2], NULL, 10) << 20) + 1;
    memset(malloc(size), 7, size);
    char *text = malloc(64);
    memset(text, 3, 64);
    switch (atoi(words[1])) {
    case 0: read_beyond(text); break;
    case 1: use_freed(text); break;
    case 2: free_twice(text); break;
    case 3: leave_stack(); break;
    case 4: copy_too_much(text); break;
    }
    return 1;
}
