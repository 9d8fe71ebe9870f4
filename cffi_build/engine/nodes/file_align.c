/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/file_align.c: O_DIRECT takes whole blocks only; requests are made of sectors, or lie
 * askew because of what is above (raw with an offset). As under QEMU, a block of which a read wants
 * a part is read whole; one of which a part is to be changed is read, changed and written back. A
 * file that ends within that block grows to the end of it: there is no other way to write its
 * last bytes. (The page cache would be none: a buffered write next to a direct one in flight may
 * put back what was in the same page before.)
 *
 * Who writes back what it has read must be alone there, or another's write is lost. So each
 * change claims its blocks as long as it is under way:
 *  - Whole blocks are written whatever else is claimed, unless that one must be alone.
 *  - Who changes parts of blocks claims them alone, and begins when all those who were there
 *    before have finished.
 * Requests that have to wait are held by their thread, and try again when a claim has gone. Those
 * of a thread that meet each other do so in turn: else the sectors of one busy block could
 * overtake an old request for ever.
 *
 * Claims are in lists, one of each thread, which only that thread changes and all threads read.
 * There is no lock. Everything here is sequentially consistent, which is what the whole
 * relies on:
 *  - A change makes its claim known, then looks at `alone`. Who must be alone makes its claim
 *    known and counts it in `alone`, then looks at the others' claims. At least one sees the
 *    other, and if both do, the one for whole blocks steps back.
 *  - Who has to wait is counted in `holding` first, and then looks for what is in its way. Who
 *    ends a claim takes it away first, and then looks at `holding`.
 * An ordinary change pays for that with two stores that the processor may not defer, its claim's
 * beginning and its end: a few nanoseconds where a system call follows. Reads pay nothing.
 */
#include "file_align.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PIECE_MAX (1u << 20) /* bytes that are held in memory for a request */

/* Kept for the next change of its thread when this one has ended. */
struct file_claim {
    _Atomic uint64_t start, end;  /* whole blocks; end 0: nobody's */
    _Atomic bool alone;
    struct file_align_thread *here;
    struct file_claim *next;      /* in the list; never changes */
    struct file_claim *next_spare; /* this thread's */
};

struct file_align_thread {
    struct file_align *align;
    struct vb_iothread *thread;
    struct vb_message wake;
    _Atomic bool waking;
    _Atomic uint32_t holding;               /* requests that wait, or are about to */
    struct vb_request *held, **held_last;   /* the former; FIFO */
    _Atomic(struct file_claim *) claims;    /* all there are; newest first */
    struct file_claim *spare;
};

/* A request that waits or has parts of blocks, in its scratch. */
struct odd {
    struct vb_request *next;   /* held behind this one */
    struct file_align_thread *here;
    struct file_claim *claim;  /* of a change, once it has one */
    uint64_t at, end;          /* bytes that are still to be done */
    uint64_t start, bytes;     /* whole blocks: the piece in hand */
    unsigned char *memory;     /* owned; for a piece */
    size_t size;
    uint32_t reading;
    int ret;
    struct iovec iov[2];
};

_Static_assert(sizeof(struct odd) <= VB_SCRATCH_SIZE, "scratch too small");

static struct odd *odd_of(struct vb_request *request)
{
    return (struct odd *)request->scratch;
}

static uint64_t round_down(const struct file_align *align, uint64_t offset)
{
    return offset & ~(uint64_t)(align->block - 1);
}

static uint64_t round_up(const struct file_align *align, uint64_t offset)
{
    return round_down(align, offset + align->block - 1);
}

static bool is_whole(const struct file_align *align, const struct vb_request *request)
{
    return ((request->offset | request->bytes) & (align->block - 1)) == 0;
}

/* ---- waiting ------------------------------------------------------------------------------- */

static void begin_alone(struct vb_request *request);

static void run_wake(struct vb_message *message, void *context)
{
    struct file_align_thread *here = vb_container_of(message, struct file_align_thread, wake);
    struct file_align *align = here->align;
    struct vb_request *request = here->held;

    (void)context;
    here->held = NULL;
    here->held_last = &here->held;
    /* Before anything is looked at: who takes a claim away after that sends another message. */
    atomic_store(&here->waking, false);
    while (request) {
        struct vb_request *next = odd_of(request)->next;

        atomic_fetch_sub(&here->holding, 1);
        if (odd_of(request)->claim) {
            begin_alone(request);
        } else {
            file_align_submit(align, request);
        }
        request = next;
    }
}

static void wake_thread(struct file_align_thread *there)
{
    /* One that holds something is used by an export, and so alive. */
    if (atomic_load(&there->holding) > 0 && !atomic_exchange(&there->waking, true)) {
        vb_iothread_send(there->thread, &there->wake);
    }
}

static void wake_all(struct file_align *align)
{
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        struct file_align_thread *there = atomic_load(&align->threads[i]);

        if (there) {
            wake_thread(there);
        }
    }
}

static struct file_align_thread *thread_of(struct file_align *align, struct vb_iothread *thread)
{
    struct file_align_thread *here =
        atomic_load_explicit(&align->threads[thread->index], memory_order_relaxed);

    vb_assert(vb_in_iothread(thread));
    if (!here) {
        here = vb_must_alloc(sizeof(*here));
        here->align = align;
        here->held_last = &here->held;
        here->thread = thread;
        here->wake.run = run_wake;
        atomic_store(&align->threads[thread->index], here);
    } else if (here->thread != thread) {
        here->thread = thread; /* the one that had this number has ended */
    }
    return here;
}

/* It has been counted. */
static void hold(struct file_align_thread *here, struct vb_request *request,
                 struct file_claim *claim)
{
    struct odd *odd = odd_of(request);

    odd->next = NULL;
    odd->here = here;
    odd->claim = claim;
    *here->held_last = request;
    here->held_last = &odd->next;
}

/* Another request of this thread waits for some of the same blocks. */
static bool is_in_turn(const struct file_align_thread *here, uint64_t start, uint64_t end)
{
    for (struct vb_request *request = here->held; request; request = odd_of(request)->next) {
        if (start < round_up(here->align, request->offset + request->bytes) &&
            round_down(here->align, request->offset) < end) {
            return false;
        }
    }
    return true;
}

/* ---- claims -------------------------------------------------------------------------------- */

static bool meets(struct file_claim *claim, uint64_t start, uint64_t end)
{
    /* The end first: one that was begun after that has seen us. */
    return start < atomic_load(&claim->end) && atomic_load(&claim->start) < end;
}

/* Whether others have claimed some of these blocks: any, or those who must be alone. */
static bool is_claimed(struct file_align *align, uint64_t start, uint64_t end, bool any,
                       const struct file_claim *own)
{
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        struct file_align_thread *there = atomic_load(&align->threads[i]);
        struct file_claim *claim = there ? atomic_load(&there->claims) : NULL;

        for (; claim; claim = claim->next) {
            if (claim != own && meets(claim, start, end) && (any || atomic_load(&claim->alone))) {
                return true;
            }
        }
    }
    return false;
}

static struct file_claim *new_claim(struct file_align_thread *here)
{
    struct file_claim *claim = here->spare;

    if (claim) {
        here->spare = claim->next_spare;
        return claim;
    }
    claim = vb_must_alloc(sizeof(*claim));
    claim->here = here;
    claim->next = atomic_load(&here->claims);
    atomic_store(&here->claims, claim);
    return claim;
}

static struct file_claim *make_claim(struct file_align_thread *here, uint64_t start, uint64_t end,
                                     bool alone)
{
    struct file_claim *claim = new_claim(here);

    atomic_store_explicit(&claim->start, start, memory_order_relaxed);
    atomic_store_explicit(&claim->alone, alone, memory_order_relaxed);
    atomic_store(&claim->end, end); /* and with it the other two */
    return claim;
}

void file_claim_end(struct file_claim *claim)
{
    struct file_align_thread *here = claim->here;
    bool alone = atomic_load_explicit(&claim->alone, memory_order_relaxed);

    atomic_store(&claim->end, 0);
    claim->next_spare = here->spare;
    here->spare = claim;
    if (alone) {
        atomic_fetch_sub(&here->align->alone, 1);
    }
    /* Nobody waits but for who is alone, or in order to be. */
    if (alone || atomic_load(&here->align->alone) > 0) {
        wake_all(here->align);
    }
}

/* Whether the request has to wait; then it is held. */
static bool must_wait(struct file_align_thread *here, struct vb_request *request, bool any,
                      struct file_claim *own)
{
    uint64_t start = round_down(here->align, request->offset);
    uint64_t end = round_up(here->align, request->offset + request->bytes);

    atomic_fetch_add(&here->holding, 1);
    if ((!own && !is_in_turn(here, start, end)) ||
        is_claimed(here->align, start, end, any, own)) {
        hold(here, request, own);
        return true;
    }
    atomic_fetch_sub(&here->holding, 1);
    return false;
}

/* For a change of whole blocks. NULL: it is held. */
static struct file_claim *claim_whole(struct file_align_thread *here, struct vb_request *request)
{
    struct file_align *align = here->align;
    uint64_t start = request->offset, end = request->offset + request->bytes;

    for (;;) {
        struct file_claim *claim;

        if ((here->held || atomic_load(&align->alone) > 0) &&
            must_wait(here, request, false, NULL)) {
            return NULL;
        }
        claim = make_claim(here, start, end, false);
        if (atomic_load(&align->alone) == 0 || !is_claimed(align, start, end, false, claim)) {
            return claim;
        }
        file_claim_end(claim); /* somebody has just come who may be waiting for this */
    }
}

/*
 * For a change of parts of blocks. NULL: it is held. One thread at a time does this, so that what
 * is not claimed here stays so; who comes second does not wait but comes back.
 */
static struct file_claim *claim_alone(struct file_align_thread *here, struct vb_request *request)
{
    struct file_align *align = here->align;
    struct file_claim *claim = NULL;

    if (atomic_exchange(&align->claiming, true)) {
        atomic_fetch_add(&here->holding, 1);
        hold(here, request, NULL);
        wake_thread(here);
        return NULL;
    }
    if (!must_wait(here, request, false, NULL)) {
        claim = make_claim(here, round_down(align, request->offset),
                           round_up(align, request->offset + request->bytes), true);
        atomic_fetch_add(&align->alone, 1);
    }
    atomic_store(&align->claiming, false);
    return claim;
}

/* ---- pieces: what is read, changed and written back at a time ------------------------------ */

static void next_piece(struct vb_request *request);

static void end_odd(struct vb_request *request, int ret)
{
    struct odd *odd = odd_of(request);

    if (odd->memory) {
        vb_buffer_put(request->thread, odd->memory, odd->size);
    }
    if (odd->claim) {
        file_claim_end(odd->claim);
    }
    vb_complete(request, ret);
}

static void start_part(struct vb_request *request, uint8_t op, uint64_t offset, struct iovec *iov,
                       void (*done)(struct vb_request *part))
{
    struct file_align *align = odd_of(request)->here->align;
    struct vb_request *part = vb_request_new(request->thread);

    part->op = op;
    part->flags = op == VB_OP_READ ? 0 : request->flags;
    part->offset = offset;
    part->bytes = iov->iov_len;
    part->iov = iov;
    part->niov = iov->iov_base ? 1 : 0;
    part->done = done;
    part->owner = request;
    align->start(align->node, part, NULL);
}

/* Where the request's bytes are in the piece, and how many. */
static uint64_t bytes_in_piece(const struct odd *odd)
{
    uint64_t end = odd->start + odd->bytes;

    return (odd->end < end ? odd->end : end) - odd->at;
}

static void piece_ended(struct vb_request *part)
{
    struct vb_request *request = part->owner;
    struct odd *odd = odd_of(request);
    uint64_t bytes = bytes_in_piece(odd);
    int ret = part->ret;

    vb_request_free(part);
    if (ret < 0) {
        end_odd(request, ret);
        return;
    }
    if (request->op == VB_OP_READ) {
        vb_request_put(request, odd->at - request->offset, odd->memory + (odd->at - odd->start),
                       bytes);
    }
    odd->at += bytes;
    next_piece(request);
}

static void write_back(struct vb_request *request)
{
    struct odd *odd = odd_of(request);
    unsigned char *to = odd->memory + (odd->at - odd->start);

    if (request->op == VB_OP_WRITE) {
        vb_request_get(request, odd->at - request->offset, to, bytes_in_piece(odd));
    } else {
        memset(to, 0, bytes_in_piece(odd));
    }
    odd->iov[0] = (struct iovec){odd->memory, odd->bytes};
    start_part(request, VB_OP_WRITE, odd->start, &odd->iov[0], piece_ended);
}

static void read_ended(struct vb_request *request, int ret)
{
    struct odd *odd = odd_of(request);

    odd->ret = ret < 0 ? ret : odd->ret;
    if (--odd->reading > 0) {
        return;
    }
    if (odd->ret < 0) {
        end_odd(request, odd->ret);
    } else {
        write_back(request);
    }
}

static void part_read(struct vb_request *part)
{
    struct vb_request *request = part->owner;
    int ret = part->ret;

    vb_request_free(part);
    read_ended(request, ret);
}

static void read_block(struct vb_request *request, uint64_t offset, struct iovec *iov)
{
    struct odd *odd = odd_of(request);

    odd->reading++;
    *iov = (struct iovec){odd->memory + (offset - odd->start), odd->here->align->block};
    start_part(request, VB_OP_READ, offset, iov, part_read);
}

/* The first and the last block of the piece, as far as they are not to be changed whole. */
static void read_ends(struct vb_request *request)
{
    struct odd *odd = odd_of(request);
    uint64_t end = odd->start + odd->bytes, last = end - odd->here->align->block;
    bool head = odd->at > odd->start, tail = odd->end < end;

    odd->reading = 1; /* ours */
    odd->ret = 0;
    if (head) {
        read_block(request, odd->start, &odd->iov[0]);
    }
    if (tail && !(head && last == odd->start)) {
        read_block(request, last, &odd->iov[1]);
    }
    read_ended(request, 0);
}

/* Whole blocks of zeroes, or to be discarded: all that there are in a row. */
static bool needs_no_data(const struct vb_request *request, const struct odd *odd)
{
    return request->op == VB_OP_DISCARD ||
           (request->op == VB_OP_WRITE_ZEROES && odd->at == odd->start &&
            odd->end - odd->at >= odd->here->align->block);
}

static void next_piece(struct vb_request *request)
{
    struct odd *odd = odd_of(request);
    struct file_align *align = odd->here->align;
    uint64_t rest;

    if (odd->at == odd->end) {
        end_odd(request, 0);
        return;
    }
    odd->start = round_down(align, odd->at);
    if (needs_no_data(request, odd)) {
        odd->bytes = round_down(align, odd->end) - odd->start;
        odd->iov[0] = (struct iovec){NULL, odd->bytes};
        start_part(request, request->op, odd->start, &odd->iov[0], piece_ended);
        return;
    }
    rest = round_up(align, odd->end) - odd->start;
    odd->bytes = rest < odd->size ? rest : odd->size;
    if (request->op == VB_OP_READ) {
        odd->iov[0] = (struct iovec){odd->memory, odd->bytes};
        start_part(request, VB_OP_READ, odd->start, &odd->iov[0], piece_ended);
    } else {
        read_ends(request);
    }
}

/* ---- requests ------------------------------------------------------------------------------ */

/* The request has its claim: as soon as those who were there before have finished. */
static void begin_alone(struct vb_request *request)
{
    struct odd *odd = odd_of(request);

    if (!must_wait(odd->here, request, true, odd->claim)) {
        next_piece(request);
    }
}

/* Advice to forget what is there can be followed in whole blocks only. */
static void shrink(struct vb_request *request, struct odd *odd)
{
    const struct file_align *align = odd->here->align;

    odd->at = round_up(align, request->offset);
    odd->end = round_down(align, request->offset + request->bytes);
    odd->end = odd->end > odd->at ? odd->end : odd->at;
}

static bool get_memory(struct vb_request *request, struct odd *odd)
{
    const struct file_align *align = odd->here->align;
    uint64_t size = round_up(align, odd->end) - round_down(align, odd->at);
    uint64_t most = request->op == VB_OP_WRITE_ZEROES ? align->block : PIECE_MAX;

    odd->size = size < most ? size : most;
    odd->memory = vb_buffer_get(request->thread, odd->size);
    return odd->memory;
}

static void submit_odd(struct file_align_thread *here, struct vb_request *request)
{
    struct odd *odd = odd_of(request);
    struct file_claim *claim = NULL;

    if (request->op != VB_OP_READ) {
        claim = claim_alone(here, request);
        if (!claim) {
            return;
        }
    }
    *odd = (struct odd){
        .here = here,
        .claim = claim,
        .at = request->offset,
        .end = request->offset + request->bytes,
    };
    if (request->op == VB_OP_DISCARD) {
        shrink(request, odd);
    } else if (!get_memory(request, odd)) {
        end_odd(request, -ENOMEM);
        return;
    }
    if (claim) {
        begin_alone(request);
    } else {
        next_piece(request);
    }
}

void file_align_submit(struct file_align *align, struct vb_request *request)
{
    struct file_claim *claim = NULL;

    if (!is_whole(align, request)) {
        submit_odd(thread_of(align, request->thread), request);
        return;
    }
    if (request->op != VB_OP_READ) {
        claim = claim_whole(thread_of(align, request->thread), request);
        if (!claim) {
            return;
        }
    }
    align->start(align->node, request, claim);
}

/* ---- life ---------------------------------------------------------------------------------- */

void file_align_init(struct file_align *align, struct vb_node *node, uint32_t block,
                     void (*start)(struct vb_node *node, struct vb_request *request,
                                   struct file_claim *claim))
{
    align->node = node;
    align->block = block;
    align->start = start;
}

static void free_thread(void *argument)
{
    struct file_align_thread *there = argument;
    struct file_claim *claim = atomic_load(&there->claims);

    while (claim) {
        struct file_claim *next = claim->next;

        free(claim);
        claim = next;
    }
    free(there);
}

/* A wake-up may still be on its way: freed behind it. */
void file_align_destroy(struct file_align *align)
{
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        struct file_align_thread *there = atomic_load(&align->threads[i]);

        if (there) {
            vb_after_all_threads(align->node->engine, free_thread, there);
        }
    }
}
