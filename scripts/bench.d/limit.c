/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The same load as client.c makes, by io_uring on the file itself: what the host can do at most when
 * every request is its own I/O in one thread, with no guest, virtqueue or second process in between.
 *
 *   limit [the options of client.c] [--direct] FILE      (--queues must be 1)
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>

#include "common.h"

static struct job job;
static char *buffers;
static int fd;

static void submit(struct io_uring *ring, uint64_t blocks, uint64_t *state, uintptr_t slot)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    uint64_t offset = next_offset(&job, blocks, state);
    char *buffer = buffers + slot * job.block;

    if (job.write)
        io_uring_prep_write(sqe, fd, buffer, (unsigned)job.block, offset);
    else
        io_uring_prep_read(sqe, fd, buffer, (unsigned)job.block, offset);
    io_uring_sqe_set_data(sqe, (void *)slot);
}

int main(int argc, char **argv)
{
    static struct tally tally;
    struct io_uring_cqe *done[MAX_DEPTH];
    uint64_t begin[MAX_DEPTH], blocks, state = 1, now, word = 1;
    struct io_uring ring;
    struct window window;
    unsigned flying = 0, n, i;
    uintptr_t slot;
    off_t size;
    int ret;

    job = parse_job(argc, argv);
    if (job.queues != 1)
        die("limit has one queue");
    fd = open(job.path, (job.write ? O_RDWR : O_RDONLY) | (job.direct ? O_DIRECT : 0));
    if (fd < 0)
        die("%s: %s", job.path, strerror(errno));
    size = lseek(fd, 0, SEEK_END);
    if (job.range && (uint64_t)size > job.range)
        size = (off_t)job.range;
    blocks = (uint64_t)size / job.block;
    if (!blocks)
        die("%s: smaller than a block", job.path);
    buffers = mmap(NULL, job.depth * job.block, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (buffers == MAP_FAILED)
        die("memory: %s", strerror(errno));
    for (i = 0; i < job.depth * job.block; i += 8)
        memcpy(buffers + i, &(uint64_t){next_random(&word)}, 8);
    ret = io_uring_queue_init(MAX_DEPTH, &ring, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN);
    if (ret < 0)
        die("io_uring: %s", strerror(-ret));
    pin_thread(&job, 0);

    window = open_window(&job);
    now = now_ns();
    for (slot = 0; slot < job.depth && may_submit(&window, now); slot++, flying++) {
        begin[slot] = now;
        submit(&ring, blocks, &state, slot);
    }
    while (flying) {
        ret = io_uring_submit_and_wait(&ring, 1);
        if (ret < 0 && ret != -EINTR)
            die("io_uring: %s", strerror(-ret));
        n = io_uring_peek_batch_cqe(&ring, done, flying);
        now = now_ns();
        for (i = 0; i < n; i++) {
            slot = (uintptr_t)io_uring_cqe_get_data(done[i]);
            if (done[i]->res != (int)job.block)
                die("a request failed: %s", done[i]->res < 0 ? strerror(-done[i]->res) : "short");
            completed(&tally, &window, now, begin[slot]);
            flying--;
            if (may_submit(&window, now)) {
                begin[slot] = now;
                submit(&ring, blocks, &state, slot);
                flying++;
            }
        }
        io_uring_cq_advance(&ring, n);
    }
    report(&tally, 1);
    io_uring_queue_exit(&ring);
    return 0;
}
