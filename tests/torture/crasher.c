/* Crash on purpose: crasher NAME_HEX SIZE SEED SIGNAL
 * Sets its name to the bytes of NAME_HEX, fills SIZE bytes of memory with a sequence that SEED determines,
 * behind a marker, prints "ready", waits for a byte on standard input, and raises SIGNAL. */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char name[16] = {0};
    if (argc != 5)
        return 2;
    for (size_t i = 0; i < 15 && argv[1][2 * i] && argv[1][2 * i + 1]; i++) {
        unsigned byte;
        sscanf(argv[1] + 2 * i, "%2x", &byte);
        name[i] = (char)byte;
    }
    size_t size = strtoul(argv[2], NULL, 10) / 8 * 8;
    uint64_t state = strtoull(argv[3], NULL, 10) | 1;
    unsigned char *memory = malloc(24 + size);
    memcpy(memory, "TORTURE-MARK-", 13); /* put together here, so that the code does not hold it whole */
    memcpy(memory + 13, "START::", 7);
    memory[20] = memory[21] = memory[22] = memory[23] = '#';
    for (size_t i = 0; i < size; i += 8) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        uint64_t word = (i / 4096) % 4 ? 0 : state; /* three of four pages compress well, as in real memory */
        memcpy(memory + 24 + i, &word, 8);
    }
    prctl(PR_SET_NAME, name);
    char byte;
    if (write(1, "ready\n", 6) != 6 || read(0, &byte, 1) < 0)
        return 3;
    raise(atoi(argv[4]));
    return memory[0] == 1;
}
