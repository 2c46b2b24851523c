// Maps files executable, as a program has its libraries, prints "ready", and crashes when its input ends.
// mapper FILE...          `memfd` stands for an anonymous file
// mapper lease FILE       and holds a write lease on it
// mapper many DIR COUNT   files that it makes
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void map(int fd) {
  if (fd < 0 || mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0) == MAP_FAILED) {
    perror("map");
    exit(1);
  }
}

static int anonymous(void) {
  int fd = memfd_create("code", 0);
  for (int i = 0; i < 1000; i++)
    if (write(fd, "memfd", 5) != 5) exit(1);
  return fd;
}

static void many(const char *directory, int count) {
  char name[4096], text[16];
  for (int i = 0; i < count; i++) {
    snprintf(name, sizeof name, "%s/%d", directory, i);
    int fd = open(name, O_RDWR | O_CREAT, 0755), length = sprintf(text, "%d", i);
    if (write(fd, text, length) != length) exit(1);
    map(fd);
    close(fd);
  }
}

int main(int argc, char **argv) {
  char c;
  if (argc > 3 && !strcmp(argv[1], "many")) {
    many(argv[2], atoi(argv[3]));
  } else if (argc > 2 && !strcmp(argv[1], "lease")) {
    int fd = open(argv[2], O_RDONLY);
    map(fd);
    signal(SIGIO, SIG_IGN);
    if (fcntl(fd, F_SETLEASE, F_WRLCK)) return 1;
  } else {
    for (int i = 1; i < argc; i++) {
      int fd = strcmp(argv[i], "memfd") ? open(argv[i], O_RDONLY) : anonymous();
      map(fd);
      close(fd);
    }
  }
  puts("ready");
  fflush(stdout);
  while (read(0, &c, 1) > 0) {
  }
  raise(SIGSEGV);
}
