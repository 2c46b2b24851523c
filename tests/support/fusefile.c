/* Serve a file system of one file, as /dev/fuse wants it: fusefile DIRECTORY BYTES. Mounts it in this mount namespace.
 * A line on standard input tells what is next:
 *   silent    answer no more requests of pages
 *   withdraw  take all pages out of the page cache
 * Each is confirmed by a line. The file ends with this process. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/uio.h>
#include <unistd.h>

static int device, silent;
static size_t size;
static char request[1 << 20];

static void answer(uint64_t unique, int error, const void *content, size_t length)
{
    struct fuse_out_header head = {sizeof head + length, error, unique};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)content, length}};
    writev(device, parts, 2);
}

static struct fuse_attr attributes(uint64_t node)
{
    struct fuse_attr found = {.ino = node, .size = node == 1 ? 0 : size, .nlink = 1};
    found.mode = node == 1 ? 040755 : 0100755;
    return found;
}

static void serve(void)
{
    if (read(device, request, sizeof request) < (ssize_t)sizeof(struct fuse_in_header))
        exit(0);
    struct fuse_in_header *head = (void *)request;
    void *body = head + 1;
    if (head->opcode == FUSE_INIT) {
        struct fuse_init_out reply = {.major = 7, .minor = 31, .max_write = 65536, .max_readahead = 0};
        answer(head->unique, 0, &reply, sizeof reply);
    } else if (head->opcode == FUSE_LOOKUP) {
        struct fuse_entry_out reply = {.nodeid = 2, .entry_valid = 3600, .attr_valid = 3600};
        reply.attr = attributes(2);
        answer(head->unique, 0, &reply, sizeof reply);
    } else if (head->opcode == FUSE_GETATTR) {
        struct fuse_attr_out reply = {.attr_valid = 3600};
        reply.attr = attributes(head->nodeid);
        answer(head->unique, 0, &reply, sizeof reply);
    } else if (head->opcode == FUSE_OPEN || head->opcode == FUSE_OPENDIR) {
        struct fuse_open_out reply = {.fh = 1, .open_flags = FOPEN_KEEP_CACHE};
        answer(head->unique, 0, &reply, sizeof reply);
    } else if (head->opcode == FUSE_READ) {
        struct fuse_read_in *wanted = body;
        char *page = malloc(wanted->size);
        memset(page, 'F', wanted->size);
        if (!silent)
            answer(head->unique, 0, page, wanted->size);
        free(page);
    } else if (head->opcode == FUSE_FORGET || head->opcode == FUSE_BATCH_FORGET || head->opcode == FUSE_INTERRUPT) {
        return;
    } else {
        answer(head->unique, head->opcode == FUSE_FLUSH || head->opcode == FUSE_RELEASE ? 0 : -38, NULL, 0);
    }
}

int main(int argc, char **argv)
{
    char options[200], line[20];
    size = strtoul(argv[2], NULL, 10);
    device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", device);
    if (device < 0 || mount("file", argv[1], "fuse", 0, options))
        return 1;
    puts("mounted");
    fflush(stdout);
    struct pollfd both[] = {{0, POLLIN}, {device, POLLIN}};
    while (poll(both, 2, -1) > 0) {
        if (both[1].revents)
            serve();
        if (!both[0].revents)
            continue;
        if (!fgets(line, sizeof line, stdin))
            return 0;
        silent = silent || !strcmp(line, "silent\n");
        if (!strcmp(line, "withdraw\n")) {
            struct fuse_notify_inval_inode_out what = {.ino = 2};
            struct fuse_out_header head = {sizeof head + sizeof what, FUSE_NOTIFY_INVAL_INODE, 0};
            struct iovec parts[] = {{&head, sizeof head}, {&what, sizeof what}};
            writev(device, parts, 2);
        }
        fputs(line, stdout);
        fflush(stdout);
    }
}
