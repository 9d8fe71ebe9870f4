/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Writes stamped blocks and verifies them, in a guest under test.
 *
 *   stamp TARGET STOPFILE BLOCKS COUNTS
 *
 * TARGET is a device or a file, whose blocks are written in place, or a directory. There a block is a
 * file with the block's number for its name, and writing it is what a careful program does: write
 * another file, sync it, rename it over the old one, sync the directory.
 *
 * Each of THREADS threads has every THREADS-th block of the first BLOCKS for itself, and writes to
 * them in an order that follows from the number of the write (see place()), one write at a time. So
 * at any moment the disk holds the first n[t] writes of each thread t, perhaps one more, and nothing
 * else: a snapshot that is not exactly that is not of one moment. A stamp also says how many writes
 * of every other thread had completed when its own write began, which ties the threads together.
 * The other end, which judges snapshots, is vm-tests/guest/stamps.py.
 *
 * Between writes a thread reads back a block of its own and compares; now and then it flushes. It
 * ends when STOPFILE exists, after it has verified all its blocks, and then prints what it has done
 * and the longest time that a single request has taken. Any difference or error ends it at once
 * with status 1. The file COUNTS always holds how many writes of each thread have completed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define THREADS 8
#define BLOCK 4096
#define MAGIC 0x3153504d41545356ULL /* "VSTAMPS1" */

struct unit { /* repeated through the block, so that every sector tells what it is */
    uint64_t magic;
    uint64_t thread;
    uint64_t sequence; /* from 1 */
    uint64_t block;
    uint64_t completed[THREADS]; /* by each thread, when this write began */
    uint64_t unused[4];
};
_Static_assert(sizeof(struct unit) == 128, "stamps.py knows this");

static int fd; /* of the target */
static int in_files;
static const char *stop_file;
static uint64_t blocks_each;
static uint64_t *completed; /* THREADS of them, mapped from COUNTS */
static uint64_t longest_ns[THREADS];
static uint64_t requests[THREADS];

static uint64_t place(uint64_t thread, uint64_t sequence)
{
    uint64_t x = (sequence * THREADS + thread) * 0x9e3779b97f4a7c15ULL;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 32;
    return x % blocks_each;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void fail(const char *what, uint64_t block, const struct unit *found, uint64_t expected)
{
    printf("stamp: %s of block %llu: %s; sequence %llu there, %llu expected\n", what,
           (unsigned long long)block, errno ? strerror(errno) : "wrong content",
           (unsigned long long)(found ? found->sequence : 0), (unsigned long long)expected);
    fflush(stdout);
    _exit(1);
}

static void done(uint64_t thread, uint64_t begun)
{
    uint64_t took = now_ns() - begun;
    if (took > longest_ns[thread])
        longest_ns[thread] = took;
    requests[thread]++;
}

/* A file of the target directory. */
static int open_file(const char *prefix, uint64_t number, int flags)
{
    char name[32];
    snprintf(name, sizeof name, "%s%llu", prefix, (unsigned long long)number);
    return openat(fd, name, flags | O_DIRECT | O_CLOEXEC, 0644);
}

static int read_block(uint64_t block, void *buffer)
{
    if (!in_files)
        return pread(fd, buffer, BLOCK, (off_t)(block * BLOCK)) == BLOCK;
    int file = open_file("", block, O_RDONLY);
    if (file < 0) { /* not written yet */
        memset(buffer, 0, BLOCK);
        return errno == ENOENT;
    }
    int whole = pread(file, buffer, BLOCK, 0) == BLOCK;
    close(file);
    return whole;
}

static int write_block(uint64_t thread, uint64_t block, const void *buffer)
{
    if (!in_files)
        return pwrite(fd, buffer, BLOCK, (off_t)(block * BLOCK)) == BLOCK;
    char from[32], to[32];
    int file = open_file("new", thread, O_WRONLY | O_CREAT | O_TRUNC);
    if (file < 0)
        return 0;
    int written = pwrite(file, buffer, BLOCK, 0) == BLOCK && fsync(file) == 0;
    close(file);
    snprintf(from, sizeof from, "new%llu", (unsigned long long)thread);
    snprintf(to, sizeof to, "%llu", (unsigned long long)block);
    return written && renameat(fd, from, fd, to) == 0 && fsync(fd) == 0;
}

/* Block `index` of the thread must hold its write number `sequence`, or zeroes if that is 0. */
static void verify(uint64_t thread, uint64_t index, uint64_t sequence, struct unit *buffer)
{
    uint64_t block = index * THREADS + thread;
    uint64_t begun = now_ns();
    errno = 0;
    if (!read_block(block, buffer))
        fail("read", block, NULL, sequence);
    done(thread, begun);
    errno = 0;
    for (size_t i = 0; i < BLOCK / sizeof *buffer; i++) {
        if (sequence == 0) {
            if (buffer[i].magic || buffer[i].sequence)
                fail("first content", block, &buffer[i], 0);
        } else if (buffer[i].magic != MAGIC || buffer[i].thread != thread ||
                   buffer[i].block != block || buffer[i].sequence != sequence) {
            fail("verification", block, &buffer[i], sequence);
        }
    }
}

static void *work(void *argument)
{
    uint64_t thread = (uint64_t)(uintptr_t)argument;
    uint64_t *last = calloc(blocks_each, sizeof *last);
    struct unit *buffer;
    if (!last || posix_memalign((void **)&buffer, BLOCK, BLOCK))
        abort();
    for (uint64_t sequence = 1;; sequence++) {
        uint64_t index = place(thread, sequence);
        uint64_t block = index * THREADS + thread;
        struct unit unit = {MAGIC, thread, sequence, block, {0}, {0}};
        for (int i = 0; i < THREADS; i++)
            unit.completed[i] = __atomic_load_n(&completed[i], __ATOMIC_ACQUIRE);
        for (size_t i = 0; i < BLOCK / sizeof unit; i++)
            buffer[i] = unit;
        uint64_t begun = now_ns();
        errno = 0;
        if (!write_block(thread, block, buffer))
            fail("write", block, NULL, sequence);
        done(thread, begun);
        __atomic_store_n(&completed[thread], sequence, __ATOMIC_RELEASE);
        last[index] = sequence;
        if (sequence % 4 == 0) {
            uint64_t other = place(thread, sequence * 7 + 3);
            verify(thread, other, last[other], buffer);
        }
        if (sequence % 256 == thread * 32) {
            begun = now_ns();
            if (fsync(fd))
                fail("flush", block, NULL, sequence);
            done(thread, begun);
        }
        if (sequence % 16 == 0 && access(stop_file, F_OK) == 0)
            break;
    }
    for (uint64_t index = 0; index < blocks_each; index++)
        verify(thread, index, last[index], buffer);
    return NULL;
}

static int map_counts(const char *path)
{
    size_t size = THREADS * sizeof *completed;
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (file < 0 || ftruncate(file, (off_t)size))
        return 0;
    void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    completed = mapped;
    return mapped != MAP_FAILED;
}

static int open_target(const char *path)
{
    struct stat info;
    if (stat(path, &info))
        return 0;
    in_files = S_ISDIR(info.st_mode);
    fd = open(path, in_files ? O_RDONLY | O_DIRECTORY : O_RDWR | O_DIRECT);
    return fd >= 0;
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS];
    uint64_t longest = 0, count = 0;
    if (argc != 5) {
        fprintf(stderr, "usage: stamp TARGET STOPFILE BLOCKS COUNTS\n");
        return 2;
    }
    stop_file = argv[2];
    blocks_each = strtoull(argv[3], NULL, 10) / THREADS;
    if (!blocks_each || !open_target(argv[1])) {
        perror(argv[1]);
        return 2;
    }
    if (!map_counts(argv[4])) {
        perror(argv[4]);
        return 2;
    }
    for (uint64_t i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)i))
            abort();
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        count += requests[i];
        if (longest_ns[i] > longest)
            longest = longest_ns[i];
    }
    printf("stamp: %llu requests, longest %llu us; writes", (unsigned long long)count,
           (unsigned long long)(longest / 1000));
    for (int i = 0; i < THREADS; i++)
        printf(" %llu", (unsigned long long)completed[i]);
    printf("\n");
    return 0;
}
