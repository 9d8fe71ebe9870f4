/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/crypt.c: a disk that is encrypted below. Its Python halves are vhostblk/nodes/luks.py and
 * the encrypted qcow2 (vhostblk/nodes/qcow2/).
 *
 * A write's data are encrypted into a buffer of the thread's: guest memory must not change. Of a
 * read the guest gets to see nothing but the plain text, decrypted from such a buffer or from
 * where the file node has the data in memory. (Decrypting in place would save no pass over
 * them, and a guest that changes its memory meanwhile could have anything decrypted.) A
 * request goes in steps: a step has one buffer, and lies on one side of the boundary.
 *
 * Re-encryption. While a job moves the boundary from one end of the disk to the other, requests that
 * touch what it works on are held: they are handed to Python, which hands them back. hold() says when all
 * that started earlier is done. The boundary only ever moves over what is held, so a request sees
 * the same one from its begin to its end.
 */
#include "../cipher.h"
#include "../grace.h"
#include "../upcall.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEP_MAX (1u << 20)

/* One thread's part of a node. */
struct crypt_thread {
    struct vb_epochs epochs;
    char apart[64]; /* from the next thread's, which writes to its own all the time */
};

struct crypt_node {
    struct vb_node node;
    uint64_t cookie;
    struct vb_crypt_layout layout;           /* changes while drained; but for the boundary: */
    _Atomic uint64_t boundary;
    _Atomic uint64_t hold_begin, hold_end;   /* written by control; equal: nothing is held */
    struct crypt_thread threads[VB_MAX_IOTHREADS]; /* each its thread's own */
};

/* A request under way, in its scratch. */
struct crypt_op {
    struct vb_message message; /* to its own thread: the next step */
    struct vb_request *request;
    struct crypt_node *crypt;
    uint64_t boundary;
    uint64_t done;          /* bytes of the request */
    uint64_t begin, end;    /* of this step on the disk, whole sectors */
    unsigned char *memory;  /* owned; room for one step */
    int ret;                /* of a step whose data were taken */
    size_t memory_size;
    struct iovec iov;       /* the step's */
    uint32_t epoch;
    uint32_t index;         /* where `done` is in the request's iovec */
    size_t skip;
    uint32_t next_index;    /* the same behind a step whose data were taken */
    size_t next_skip;
};

_Static_assert(sizeof(struct crypt_op) <= VB_SCRATCH_SIZE, "scratch too small");

/* ---- holding requests back ----------------------------------------------------------------- */

static struct vb_epochs *epochs_of(struct vb_node *node, struct vb_iothread *thread)
{
    return &vb_container_of(node, struct crypt_node, node)->threads[thread->index].epochs;
}

void vb_node_crypt_hold(struct vb_node *node, uint64_t begin, uint64_t end, uint64_t cookie)
{
    struct crypt_node *crypt = vb_container_of(node, struct crypt_node, node);

    atomic_store(&crypt->hold_begin, begin);
    atomic_store(&crypt->hold_end, end);
    vb_grace_ask(node, epochs_of, cookie);
}

/* The boundary first: who finds nothing held any more must find it moved. */
void vb_node_crypt_release(struct vb_node *node, uint64_t boundary)
{
    struct crypt_node *crypt = vb_container_of(node, struct crypt_node, node);

    atomic_store(&crypt->boundary, boundary);
    atomic_store(&crypt->hold_end, 0);
    atomic_store(&crypt->hold_begin, 0);
}

static void begin_op(struct crypt_op *op)
{
    op->epoch = vb_epochs_begin(epochs_of(&op->crypt->node, op->request->thread));
}

static void end_op(struct crypt_op *op, int ret)
{
    struct vb_request *request = op->request;

    if (op->memory) {
        vb_buffer_put(request->thread, op->memory, op->memory_size);
    }
    vb_epochs_end(epochs_of(&op->crypt->node, request->thread), op->epoch);
    vb_complete(request, ret);
}

/* ---- steps ------------------------------------------------------------------------------------- */

static const struct vb_crypt_half *half_of(const struct crypt_op *op)
{
    const struct vb_crypt_layout *layout = &op->crypt->layout;

    return op->begin < op->boundary ? &layout->low : &layout->high;
}

static uint64_t sector_mask(const struct crypt_op *op)
{
    return op->crypt->layout.sector_size - 1;
}

/* The step that begins at `done`. */
static void place_step(struct crypt_op *op)
{
    uint64_t end = op->request->offset + op->request->bytes;
    uint64_t mask = sector_mask(op);

    op->begin = (op->request->offset + op->done) & ~mask;
    op->end = (end + mask) & ~mask;
    if (op->begin < op->boundary && op->boundary < op->end) {
        op->end = op->boundary;
    }
    if (op->end - op->begin > STEP_MAX && op->request->op != VB_OP_DISCARD) {
        op->end = op->begin + STEP_MAX;
    }
}

static bool get_memory(struct crypt_op *op)
{
    if (!op->memory) {
        uint64_t mask = sector_mask(op), end = op->request->offset + op->request->bytes;
        uint64_t sectors = ((end + mask) & ~mask) - (op->request->offset & ~mask);

        op->memory_size = sectors < STEP_MAX ? sectors : STEP_MAX;
        op->memory = vb_buffer_get(op->request->thread, op->memory_size);
    }
    return op->memory != NULL;
}

/* Of the request's memory the next piece in a row, at most `bytes`. */
static unsigned char *next_piece(struct crypt_op *op, size_t *bytes)
{
    const struct iovec *iov = &op->request->iov[op->index];
    unsigned char *piece = (unsigned char *)iov->iov_base + op->skip;
    size_t rest = iov->iov_len - op->skip;

    if (rest > *bytes) {
        op->skip += *bytes;
    } else {
        *bytes = rest;
        op->index++;
        op->skip = 0;
    }
    return piece;
}

/* How much of the next piece is in a row. */
static size_t in_a_row(struct crypt_op *op)
{
    while (op->request->iov[op->index].iov_len == op->skip) {
        op->index++;
        op->skip = 0;
    }
    return op->request->iov[op->index].iov_len - op->skip;
}

static int transform(struct crypt_op *op, bool encrypt, uint64_t offset, const void *from, void *to,
                     size_t bytes)
{
    struct vb_cipher *cipher = half_of(op)->cipher;
    int ret = 0;

    vb_guest_write_begin();
    if (cipher) {
        ret = vb_cipher_run(cipher, op->request->thread->index, encrypt, offset, from, to, bytes);
    } else if (from != to) {
        memcpy(to, from, bytes);
    }
    vb_guest_write_end();
    return ret;
}

static void step_ended(struct crypt_op *op, int ret);
static void read_taken(struct vb_request *part, const void *data, uint64_t position,
                       uint64_t bytes);

static struct vb_request *new_part(struct crypt_op *op, void (*done)(struct vb_request *part))
{
    struct vb_request *request = op->request;
    struct vb_request *part = vb_request_new(request->thread);

    op->iov = (struct iovec){op->memory, op->end - op->begin};
    part->op = request->op == VB_OP_WRITE_ZEROES ? VB_OP_WRITE : request->op;
    part->flags = request->flags & (VB_REQ_FUA | VB_REQ_GUEST);
    part->offset = op->begin + half_of(op)->offset;
    part->bytes = op->end - op->begin;
    part->iov = &op->iov;
    part->niov = 1;
    part->done = done;
    part->owner = op;
    if (part->op == VB_OP_WRITE) {
        part->flags |= VB_REQ_STABLE;
    } else if (part->op == VB_OP_READ) {
        part->take = read_taken;
        part->take_unit = op->crypt->layout.sector_size;
    }
    return part;
}

/* ---- reads ------------------------------------------------------------------------------------- */

static void copy_out(struct crypt_op *op, const unsigned char *from, size_t bytes)
{
    while (bytes > 0) {
        size_t n = bytes;
        unsigned char *to;

        in_a_row(op); /* passes over empty ones */
        to = next_piece(op, &n);
        vb_guest_write_begin();
        memcpy(to, from, n);
        vb_guest_write_end();
        from += n;
        bytes -= n;
    }
}

/* Sectors that the guest does not want all of, or in more than one place. */
static int decrypt_pieces(struct crypt_op *op, const unsigned char *from, uint64_t offset,
                          size_t head, size_t bytes)
{
    unsigned char *sector = op->memory + (offset - op->begin);
    int ret = transform(op, false, offset, from, sector, op->crypt->layout.sector_size);

    if (ret == 0) {
        copy_out(op, sector + head, bytes);
    }
    return ret;
}

/*
 * What has been read, whole sectors from `position` of the step on, into guest memory. Their pieces
 * come in order: the cursor goes on.
 */
static int decrypt_sectors(struct crypt_op *op, const unsigned char *data, uint64_t position,
                           uint64_t bytes)
{
    uint64_t size = op->crypt->layout.sector_size, begin = op->begin + position;
    uint64_t at = op->request->offset + op->done, end = op->request->offset + op->request->bytes;
    int ret = 0;

    at = at > begin ? at : begin;
    end = end < begin + bytes ? end : begin + bytes;
    while (at < end && ret == 0) {
        size_t head = at & (size - 1), row = in_a_row(op), n;

        n = (row < end - at ? row : end - at) & ~(size - 1);
        if (head > 0 || n == 0) {
            n = size - head < end - at ? size - head : end - at;
            ret = decrypt_pieces(op, data + (at - head - begin), at - head, head, n);
        } else {
            unsigned char *to = next_piece(op, &n);

            ret = transform(op, false, at, data + (at - begin), to, n);
        }
        at += n;
    }
    return ret;
}

/*
 * The file's pages are decrypted from where they are, without a copy in between. Should they turn
 * out to be worthless afterwards, the same is done again with what has been read.
 */
static void read_taken(struct vb_request *part, const void *data, uint64_t position,
                       uint64_t bytes)
{
    struct crypt_op *op = part->owner;
    uint32_t index = op->index;
    size_t skip = op->skip;

    if (position == 0) {
        op->ret = 0;
    } else {
        op->index = op->next_index;
        op->skip = op->next_skip;
    }
    if (op->ret == 0) {
        op->ret = decrypt_sectors(op, data, position, bytes);
    }
    op->next_index = op->index;
    op->next_skip = op->skip;
    op->index = index;
    op->skip = skip;
}

static void read_done(struct vb_request *part)
{
    struct crypt_op *op = part->owner;
    bool taken = part->taken;
    int ret = part->ret;

    vb_request_free(part);
    if (ret == 0 && taken) {
        ret = op->ret;
        op->index = op->next_index;
        op->skip = op->next_skip;
    } else if (ret == 0) {
        ret = decrypt_sectors(op, op->memory, 0, op->end - op->begin);
    }
    step_ended(op, ret);
}

/* ---- writes ------------------------------------------------------------------------------------ */

static void copy_in(struct crypt_op *op, unsigned char *to, size_t bytes)
{
    while (bytes > 0) {
        size_t n = bytes;
        const unsigned char *from;

        in_a_row(op);
        from = next_piece(op, &n);
        memcpy(to, from, n);
        to += n;
        bytes -= n;
    }
}

/* Guest memory, read once and only read. */
static int encrypt_step(struct crypt_op *op)
{
    uint64_t size = op->crypt->layout.sector_size;
    int ret = 0;

    for (uint64_t at = op->begin; at < op->end && ret == 0;) {
        unsigned char *to = op->memory + (at - op->begin);
        size_t row = in_a_row(op), n;

        n = (row < op->end - at ? row : op->end - at) & ~(size - 1);
        if (n == 0) {
            n = size;
            copy_in(op, to, n);
            ret = transform(op, true, at, to, to, n);
        } else {
            ret = transform(op, true, at, next_piece(op, &n), to, n);
        }
        at += n;
    }
    return ret;
}

/* On an encrypted disk zeroes are data like any others. */
static int encrypt_zeroes(struct crypt_op *op)
{
    memset(op->memory, 0, op->end - op->begin);
    return transform(op, true, op->begin, op->memory, op->memory, op->end - op->begin);
}

static void write_done(struct vb_request *part)
{
    struct crypt_op *op = part->owner;
    int ret = part->ret;

    vb_request_free(part);
    step_ended(op, ret);
}

/* ---- the way of a request ------------------------------------------------------------------------ */

static void submit_part(struct crypt_op *op, struct vb_request *part)
{
    vb_submit(op->crypt->node.children[0], part);
}

static void step_write(struct crypt_op *op)
{
    int ret = op->request->op == VB_OP_WRITE ? encrypt_step(op) : encrypt_zeroes(op);

    if (ret < 0) {
        end_op(op, ret);
    } else {
        submit_part(op, new_part(op, write_done));
    }
}

/* No data: only the place changes. */
static void step_discard(struct crypt_op *op)
{
    struct vb_request *part = new_part(op, write_done);

    part->iov = NULL;
    part->niov = 0;
    submit_part(op, part);
}

static void step(struct crypt_op *op)
{
    place_step(op);
    if (op->request->op == VB_OP_DISCARD) {
        step_discard(op);
    } else if (!get_memory(op)) {
        end_op(op, -ENOMEM);
    } else if (op->request->op == VB_OP_READ) {
        submit_part(op, new_part(op, read_done));
    } else {
        step_write(op);
    }
}

static void run_step(struct vb_message *message, void *context)
{
    (void)context;
    step(vb_container_of(message, struct crypt_op, message));
}

/*
 * The next step is the next sweep's: others want to use this thread, too. And where all that is below
 * answers at once, steps that began within each other would need a stack without an end.
 */
static void step_ended(struct crypt_op *op, int ret)
{
    op->done = op->end - op->request->offset;
    if (ret < 0 || op->done >= op->request->bytes) {
        end_op(op, ret);
        return;
    }
    op->message.run = run_step;
    vb_iothread_send(op->request->thread, &op->message);
}

/* ---- the node ------------------------------------------------------------------------------------- */

static bool is_held(const struct crypt_node *crypt, const struct vb_request *request)
{
    uint64_t begin = atomic_load_explicit(&crypt->hold_begin, memory_order_acquire);
    uint64_t end = atomic_load_explicit(&crypt->hold_end, memory_order_acquire);
    uint64_t mask = crypt->layout.sector_size - 1;
    uint64_t first = request->offset & ~mask;
    uint64_t last = (request->offset + request->bytes + mask) & ~mask;

    return first < end && begin < last;
}

static bool whole_sectors(const struct crypt_node *crypt, const struct vb_request *request)
{
    return ((request->offset | request->bytes) & (crypt->layout.sector_size - 1)) == 0;
}

/* Discards are advice: what is not a whole sector stays. */
static void shrink(const struct crypt_node *crypt, struct vb_request *request)
{
    uint64_t mask = crypt->layout.sector_size - 1;
    uint64_t begin = (request->offset + mask) & ~mask;
    uint64_t end = (request->offset + request->bytes) & ~mask;

    request->offset = begin;
    request->bytes = end > begin ? end - begin : 0;
}

static void crypt_submit(struct vb_node *node, struct vb_request *request)
{
    struct crypt_node *crypt = vb_container_of(node, struct crypt_node, node);
    struct crypt_op *op = (struct crypt_op *)request->scratch;

    if (request->op == VB_OP_FLUSH) {
        vb_submit(node->children[0], request);
        return;
    }
    if (request->op == VB_OP_DISCARD) {
        shrink(crypt, request);
    }
    if (request->bytes == 0 || (request->op == VB_OP_DISCARD && !crypt->layout.discard)) {
        vb_complete(request, 0);
        return;
    }
    if (is_held(crypt, request) ||
        (request->op != VB_OP_READ && !whole_sectors(crypt, request))) {
        vb_upcall_post(node, crypt->cookie, request);
        return;
    }
    *op = (struct crypt_op){
        .request = request,
        .crypt = crypt,
        /* After what is held has been looked at: see vb_node_crypt_release(). */
        .boundary = atomic_load_explicit(&crypt->boundary, memory_order_acquire),
    };
    begin_op(op);
    step(op);
}

static const struct vb_node_ops crypt_ops = {
    .name = "crypt",
    .submit = crypt_submit,
};

void vb_node_crypt_set(struct vb_node *node, const struct vb_crypt_layout *layout)
{
    struct crypt_node *crypt = vb_container_of(node, struct crypt_node, node);

    crypt->layout = *layout;
    atomic_store(&crypt->boundary, layout->boundary);
}

struct vb_node *vb_node_crypt_new(struct vb_engine *engine, uint64_t cookie,
                                  const struct vb_crypt_layout *layout, char *error)
{
    struct crypt_node *crypt = vb_node_alloc(engine, &crypt_ops, sizeof(*crypt), error);

    if (!crypt) {
        return NULL;
    }
    crypt->cookie = cookie;
    vb_node_crypt_set(&crypt->node, layout);
    return &crypt->node;
}
