/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Load on a vhost-user-blk socket through libblkio, one thread per queue; results as JSON on stdout.
 *
 *   client [--job randread|randwrite|read|write] [--block-size N] [--depth N] [--queues N]
 *          [--seconds S | --count N] [--warmup S] [--range N] [--cpu N] [--poll] [--timeline] SOCKET
 *   client --idle SOCKET     connects, reads a little, says "idle", stays until its stdin ends
 *
 * A queue sleeps on its call eventfd, as a guest waits for an interrupt. With --poll it spins on the
 * used ring instead, which costs the backend no notification and this thread a whole CPU.
 */
#define _GNU_SOURCE
#include <blkio.h>

#include "common.h"

struct queue {
    pthread_t thread;
    struct blkioq *q;
    char *buffers;
    uint64_t written; /* pieces of unique data */
    unsigned index;
    uint64_t blocks;
    struct tally *tally;
};

static struct job job;
static struct blkio *device;
static pthread_barrier_t barrier;

static void check(int ret, const char *what)
{
    if (ret < 0)
        die("%s: %s", what, blkio_get_error_msg());
}

static void submit(struct queue *queue, uint64_t *state, uintptr_t slot)
{
    uint64_t offset = next_offset(&job, queue->blocks, state);
    char *buffer = queue->buffers + slot * job.block;

    if (job.unique) { /* no 4 KiB are like any others */
        for (uint64_t at = 0; at < job.block; at += 4096)
            memcpy(buffer + at, &(uint64_t[]){queue->index, ++queue->written}, 16);
    }
    if (job.write)
        blkioq_write(queue->q, offset, buffer, job.block, (void *)slot, 0);
    else
        blkioq_read(queue->q, offset, buffer, job.block, (void *)slot, 0);
}

static void *run_queue(void *opaque)
{
    struct queue *queue = opaque;
    struct blkio_completion done[MAX_DEPTH];
    uint64_t begin[MAX_DEPTH], state, now;
    struct window window;
    unsigned flying = 0;
    uintptr_t slot;
    int n, i;

    pin_thread(&job, queue->index);
    state = job.random ? 0x5eed + queue->index : queue->blocks / job.queues * queue->index;
    pthread_barrier_wait(&barrier);
    window = open_window(&job);
    now = now_ns();
    for (slot = 0; slot < job.depth && may_submit(&window, now); slot++, flying++) {
        begin[slot] = now;
        submit(queue, &state, slot);
    }
    while (flying) {
        struct timespec limit = {.tv_sec = 10};

        n = blkioq_do_io(queue->q, done, 1, (int)flying, &limit);
        if (n < 0)
            die("queue %u, %u requests in flight: %s", queue->index, flying,
                n == -ETIME ? "no completion for 10 s" : strerror(-n));
        now = now_ns();
        for (i = 0; i < n; i++) {
            slot = (uintptr_t)done[i].user_data;
            if (done[i].ret)
                die("a request failed: %s", strerror(-done[i].ret));
            completed(queue->tally, &window, now, begin[slot]);
            flying--;
            if (may_submit(&window, now)) {
                begin[slot] = now;
                submit(queue, &state, slot);
                flying++;
            }
        }
    }
    return NULL;
}

static void wait_idly(void)
{
    char c;

    puts("idle");
    fflush(stdout);
    while (read(0, &c, 1) > 0)
        ;
}

int main(int argc, char **argv)
{
    struct queue queues[MAX_QUEUES];
    struct blkio_mem_region region;
    struct tally *tallies;
    uint64_t capacity, per_queue, word = 1, at;
    unsigned i;
    int max;

    job = parse_job(argc, argv);
    if (job.idle)
        job.count = job.depth;
    check(blkio_create("virtio-blk-vhost-user", &device), "create");
    check(blkio_set_str(device, "path", job.path), "path");
    check(blkio_connect(device), "connect");
    check(blkio_get_int(device, "max-queues", &max), "max-queues");
    if ((unsigned)max < job.queues)
        die("the backend offers %d queues, %u are wanted", max, job.queues);
    check(blkio_set_int(device, "num-queues", job.poll ? 0 : (int)job.queues), "num-queues");
    check(blkio_set_int(device, "num-poll-queues", job.poll ? (int)job.queues : 0), "num-poll-queues");
    check(blkio_start(device), "start");
    check(blkio_get_uint64(device, "capacity", &capacity), "capacity");
    if (job.range && job.range < capacity)
        capacity = job.range;
    if (capacity < job.block)
        die("the disk has %llu bytes, less than a block", (unsigned long long)capacity);

    per_queue = (job.depth * job.block + 0xfffff) & ~0xfffffull;
    check(blkio_alloc_mem_region(device, &region, per_queue * job.queues), "memory");
    check(blkio_map_mem_region(device, &region), "memory");
    for (at = 0; at < region.len; at += 8) /* data that no zero detection likes */
        memcpy((char *)region.addr + at, &(uint64_t){next_random(&word)}, 8);

    tallies = calloc(job.queues, sizeof(*tallies));
    pthread_barrier_init(&barrier, NULL, job.queues);
    for (i = 0; i < job.queues; i++) {
        queues[i] = (struct queue){
            .q = job.poll ? blkio_get_poll_queue(device, (int)i) : blkio_get_queue(device, (int)i),
            .buffers = (char *)region.addr + per_queue * i,
            .index = i,
            .blocks = capacity / job.block,
            .tally = &tallies[i],
        };
        if (job.timeline)
            keep_timeline(&tallies[i], &job);
        if (pthread_create(&queues[i].thread, NULL, run_queue, &queues[i]))
            die("cannot start a thread");
    }
    for (i = 0; i < job.queues; i++)
        pthread_join(queues[i].thread, NULL);
    if (job.idle)
        wait_idly();
    else
        report(tallies, job.queues);
    blkio_unmap_mem_region(device, &region);
    blkio_free_mem_region(device, &region);
    blkio_destroy(&device);
    for (i = 0; i < job.queues; i++)
        free(tallies[i].timeline);
    free(tallies);
    return 0;
}
