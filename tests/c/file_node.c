/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * file_node.c: random requests with many odd buffers against the file node, and a
 * model in memory to compare with. Run by tests/test_file_node_random.py.
 *
 *     file_node PATH AIO ALIGN UNIT DETECT_ZEROES THREADS ROUNDS SEED
 *
 * The file exists; its size is the model's. Offsets and lengths are multiples of UNIT, except at the
 * file's end. Unless ALIGN is 0 it is opened with O_DIRECT and has blocks of that size, and half of
 * all buffers are unaligned. The requests of a batch touch different bytes, but not
 * different blocks, and are spread over the threads.
 */
#include "engine.h"
#include "nodes/file.api.h"

#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BATCH 16
#define THREADS_MAX 4
#define IOV 1500
#define SLOT_MAX (3u << 20)

/* One request of a batch, its memory and what a read has to find. */
struct slot {
    struct vb_request request;
    struct iovec iov[IOV];
    unsigned char *memory;
};

/* What a thread is told: its part of the batch. */
struct start {
    struct vb_message message;
    int first;
};

static struct vb_node *node;
static unsigned char *model;
static uint64_t size;
static uint32_t align, unit;
static struct slot *slots[BATCH];
static int in_batch, threads_count;
static atomic_int running;
static sem_t batch_done;

static uint64_t random_below(uint64_t limit)
{
    return ((uint64_t)random() << 31 | (uint64_t)random()) % limit;
}

static void fail(const char *what, const struct vb_request *request)
{
    fprintf(stderr, "%s: op %d ret %d (%s) offset %llu bytes %llu niov %u\n", what, request->op,
            request->ret, strerror(-request->ret), (unsigned long long)request->offset,
            (unsigned long long)request->bytes, request->niov);
    exit(1);
}

/* ---- on the I/O threads ------------------------------------------------------- */

static void done(struct vb_request *request)
{
    (void)request;
    if (atomic_fetch_sub(&running, 1) == 1) {
        sem_post(&batch_done);
    }
}

static void run_batch(struct vb_message *message, void *context)
{
    for (int i = vb_container_of(message, struct start, message)->first; i < in_batch;
         i += threads_count) {
        slots[i]->request.thread = context;
        vb_submit(node, &slots[i]->request);
    }
    done(NULL); /* of the message */
}

/* ---- making requests ------------------------------------------------------------ */

/* Cuts the memory into pieces of random length; `gap` unaligns each further. */
static void scatter(struct slot *slot, bool aligned)
{
    struct vb_request *request = &slot->request;
    uint32_t most = random() % 3 ? 1 + (uint32_t)random() % 8 : IOV;
    unsigned char *at = slot->memory + (aligned ? 0 : random() % 64);
    uint64_t left = request->bytes;

    request->iov = slot->iov;
    request->niov = 0;
    while (left > 0) {
        uint64_t length = left;

        if (request->niov + 1 < most && left > 512) {
            uint64_t mean = request->bytes / most;
            length = 1 + random_below(mean * 2 + 1);
            length = aligned ? (length + 511) / 512 * 512 : length;
            length = length < left ? length : left;
        }
        slot->iov[request->niov++] = (struct iovec){at, length};
        at += length;
        left -= length;
        if (!aligned && random() % 4 == 0) {
            at += random() % 16;
        }
    }
}

static void place(struct vb_request *request)
{
    static const uint64_t most[] = {512, 4096, 65536, 2u << 20};
    uint64_t limit = most[random() % 4];

    limit = limit < size ? limit : size;
    request->offset = random_below(size) / unit * unit;
    request->bytes = (random_below(limit) + unit) / unit * unit;
    if (request->bytes > size - request->offset) {
        request->bytes = size - request->offset; /* the end, perhaps an odd one */
    }
}

static void fill(struct slot *slot)
{
    int kind = random() % 3; /* zeroes, one byte in a thousand, noise */

    for (uint32_t i = 0; i < slot->request.niov; i++) {
        unsigned char *base = slot->iov[i].iov_base;
        size_t length = slot->iov[i].iov_len;

        memset(base, kind == 2 ? (int)(random() % 256) : 0, length);
        if (kind == 1 && random() % 2) {
            base[random_below(length)] = 1;
        }
    }
}

static bool overlaps(const struct vb_request *request)
{
    for (int i = 0; i < in_batch; i++) {
        const struct vb_request *other = &slots[i]->request;
        if (request->offset < other->offset + other->bytes &&
            other->offset < request->offset + request->bytes) {
            return true;
        }
    }
    return false;
}

static void make_request(struct slot *slot)
{
    static const uint8_t ops[] = {VB_OP_READ, VB_OP_READ, VB_OP_WRITE, VB_OP_WRITE,
                                  VB_OP_FLUSH, VB_OP_WRITE_ZEROES};
    struct vb_request *request = &slot->request;

    memset(request, 0, sizeof(*request));
    request->done = done;
    request->op = ops[random() % 6];
    if (request->op == VB_OP_FLUSH) {
        return;
    }
    for (int attempt = 0; attempt == 0 || overlaps(request); attempt++) {
        if (attempt == 100) { /* the batch has the whole file */
            request->op = VB_OP_FLUSH;
            request->bytes = 0;
            return;
        }
        place(request);
    }
    request->flags = (uint16_t)((random() % 4 ? 0 : VB_REQ_FUA) |
                                (random() % 2 ? 0 : VB_REQ_MAY_UNMAP));
    if (request->op <= VB_OP_WRITE) {
        scatter(slot, align && unit > 1 && random() % 2);
        fill(slot);
    }
}

/* ---- judging them ------------------------------------------------------------------ */

static void check(struct slot *slot)
{
    struct vb_request *request = &slot->request;
    unsigned char *expected = model + request->offset;

    if (request->ret != 0) {
        fail("unexpected error", request);
    }
    if (request->op == VB_OP_WRITE_ZEROES) {
        memset(expected, 0, request->bytes);
    }
    for (uint32_t i = 0; i < request->niov; i++) {
        if (request->op == VB_OP_WRITE) {
            memcpy(expected, slot->iov[i].iov_base, slot->iov[i].iov_len);
        } else if (memcmp(expected, slot->iov[i].iov_base, slot->iov[i].iov_len) != 0) {
            fail("wrong data", request);
        }
        expected += slot->iov[i].iov_len;
    }
}

static void compare_file(const char *path)
{
    unsigned char *data = malloc(size);
    struct stat status;
    int fd = open(path, O_RDONLY);

    uint64_t most = align ? (size + align - 1) / align * align : size;

    /* With O_DIRECT a write of the odd end grows the file to whole blocks, never further. */
    if (fstat(fd, &status) < 0 || (uint64_t)status.st_size < size ||
        (uint64_t)status.st_size > most) {
        fprintf(stderr, "the file's size changed to %lld\n", (long long)status.st_size);
        exit(1);
    }
    if (pread(fd, data, size, 0) != (ssize_t)size || memcmp(data, model, size) != 0) {
        fprintf(stderr, "the file's contents are wrong\n");
        exit(1);
    }
    close(fd);
    free(data);
}

static struct vb_node *open_node(struct vb_engine *engine, char **arguments, char *error)
{
    struct vb_file_options options = {
        .fd = open(arguments[1], O_RDWR | (align ? O_DIRECT : 0)),
        .direct = align,
        .discard_unmap = true,
        .detect_zeroes = (uint32_t)atoi(arguments[5]),
        .memory_align = align ? 512 : 1,
        .request_align = align ? align : 1,
    };
    struct stat status;

    if (options.fd < 0 || fstat(options.fd, &status) < 0) {
        perror(arguments[1]);
        exit(1);
    }
    size = (uint64_t)status.st_size;
    return vb_node_file_new(engine, &options, error);
}

static void run_rounds(struct vb_iothread **threads, int rounds)
{
    while (rounds-- > 0) {
        struct start starts[THREADS_MAX];
        int count = 1 + (int)(random() % BATCH);

        for (in_batch = 0; in_batch < count; in_batch++) {
            make_request(slots[in_batch]);
        }
        running = count + threads_count;
        for (int i = 0; i < threads_count; i++) {
            starts[i] = (struct start){.message.run = run_batch, .first = i};
            vb_iothread_send(threads[i], &starts[i].message);
        }
        sem_wait(&batch_done);
        for (int i = 0; i < in_batch; i++) {
            check(slots[i]);
        }
    }
}

int main(int argc, char **argv)
{
    char error[VB_ERROR_SIZE] = "";
    struct vb_engine *engine = calloc(1, sizeof(*engine)); /* no events, so no mailbox */
    struct vb_iothread_options options = {0};
    struct vb_iothread *threads[THREADS_MAX] = {0};
    struct vb_iothread_info info;

    if (argc != 9) {
        return 2;
    }
    options.aio = (uint32_t)atoi(argv[2]);
    align = (uint32_t)atoi(argv[3]);
    unit = (uint32_t)atoi(argv[4]);
    threads_count = atoi(argv[6]);
    srandom((unsigned)atoi(argv[8]));
    sem_init(&batch_done, 0, 0);
    for (int i = 0; i < threads_count; i++) {
        threads[i] = vb_iothread_new(engine, "test", &options, error);
    }
    node = threads[threads_count - 1] ? open_node(engine, argv, error) : NULL;
    if (!node) {
        fprintf(stderr, "%s\n", error);
        return 1;
    }
    model = calloc(1, size);
    for (int i = 0; i < BATCH; i++) {
        slots[i] = malloc(sizeof(*slots[i]));
        slots[i]->memory = aligned_alloc(4096, SLOT_MAX);
    }
    run_rounds(threads, atoi(argv[7]));
    compare_file(argv[1]);
    vb_iothread_query(threads[0], &info);
    printf("inline %llu queued %llu\n", (unsigned long long)info.inline_ios,
           (unsigned long long)info.queued_ios);
    vb_node_free(node);
    for (int i = 0; i < threads_count; i++) {
        vb_iothread_free(threads[i]);
    }
    free(engine);
    return 0;
}
