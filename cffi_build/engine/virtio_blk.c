/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * virtio_blk.c: virtio-blk requests (virtio 1.2, section 5.2.6) and configuration space
 * (5.2.4). Turns a chain of guest buffers into a vb_request for the export's tree, and
 * the outcome into a status byte.
 */
#include <linux/virtio_blk.h>

#include "device.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SECTOR 512
/* Most sectors in one request, or one range of a discard or write-zeroes: QEMU's limit, 2 GiB. */
#define SECTORS_MAX ((1u << 22) - 1)

/* ---- configuration space ---------------------------------------------------------- */

uint64_t vb_blk_features(const struct vb_export *export_)
{
    uint64_t features = 1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_BLK_SIZE |
                        1ull << VIRTIO_BLK_F_TOPOLOGY | 1ull << VIRTIO_BLK_F_MQ |
                        1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_CONFIG_WCE;

    if (export_->writable) {
        features |= 1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES;
    } else {
        features |= 1ull << VIRTIO_BLK_F_RO;
    }
    return features;
}

void vb_blk_config(const struct vb_export *export_, uint8_t bytes[VB_BLK_CONFIG_SIZE])
{
    uint32_t block_size = export_->logical_block_size;
    struct virtio_blk_config config = {
        .capacity = htole64(atomic_load_explicit(&export_->capacity, memory_order_relaxed) / SECTOR),
        .seg_max = htole32(VB_BLK_SEGMENTS_MAX),
        .blk_size = htole32(block_size),
        .min_io_size = htole16(1),
        .opt_io_size = htole32(1),
        .wce = atomic_load_explicit(&export_->writeback_wanted, memory_order_relaxed),
        .num_queues = htole16(export_->num_queues),
        .max_discard_sectors = htole32(SECTORS_MAX & ~(block_size / SECTOR - 1)),
        .max_discard_seg = htole32(VB_BLK_RANGES_MAX),
        .discard_sector_alignment = htole32(block_size / SECTOR),
        .max_write_zeroes_sectors = htole32(SECTORS_MAX & ~(block_size / SECTOR - 1)),
        .max_write_zeroes_seg = htole32(VB_BLK_RANGES_MAX),
        .write_zeroes_may_unmap = 1,
    };

    _Static_assert(sizeof(config) >= VB_BLK_CONFIG_SIZE, "kernel headers too old");
    _Static_assert(offsetof(struct virtio_blk_config, wce) == VB_BLK_CONFIG_WRITEBACK, "virtio");
    memcpy(bytes, &config, VB_BLK_CONFIG_SIZE);
}

/* ---- buffers ------------------------------------------------------------------------- */

static uint64_t iov_bytes(const struct iovec *iov, uint32_t niov)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < niov; i++) {
        bytes += iov[i].iov_len;
    }
    return bytes;
}

/* Copies `length` bytes off the front of *iov and moves *iov past them; false if it is shorter. */
static bool iov_take(struct iovec **iov, uint32_t *niov, void *to, size_t length)
{
    while (length > 0 && *niov > 0) {
        size_t part = (*iov)->iov_len < length ? (*iov)->iov_len : length;

        memcpy(to, (*iov)->iov_base, part);
        to = (char *)to + part;
        length -= part;
        (*iov)->iov_base = (char *)(*iov)->iov_base + part;
        (*iov)->iov_len -= part;
        if ((*iov)->iov_len == 0) {
            (*iov)++;
            (*niov)--;
        }
    }
    /* What was copied is what counts: the compiler may not read the original again. */
    atomic_signal_fence(memory_order_seq_cst);
    return length == 0;
}

/* The last byte of the device-writable part is the status. */
static uint8_t *take_status(struct iovec *in, uint32_t *nin)
{
    struct iovec *last;

    if (*nin == 0) {
        return NULL;
    }
    last = &in[*nin - 1];
    last->iov_len--;
    if (last->iov_len == 0) {
        (*nin)--;
    }
    return (uint8_t *)last->iov_base + last->iov_len;
}

/* Moves the data buffers out of the lane's array, which the next request will use. */
static bool keep_iov(struct vb_blk_request *blk, const struct iovec *iov, uint32_t niov)
{
    if (niov > blk->iov_room) {
        struct iovec *larger = malloc(niov * sizeof(*larger));

        if (!larger) {
            return false;
        }
        if (blk->iov != blk->inline_iov) {
            free(blk->iov);
        }
        blk->iov = larger;
        blk->iov_room = niov;
    }
    memcpy(blk->iov, iov, niov * sizeof(*iov));
    blk->request.iov = blk->iov;
    blk->request.niov = niov;
    return true;
}

void vb_blk_release(struct vb_blk_request *blk)
{
    if (blk->iov_room > VB_BLK_KEPT_IOV) {
        free(blk->iov);
        blk->iov = blk->inline_iov;
        blk->iov_room = VB_BLK_INLINE_IOV;
    }
}

/* ---- completion -------------------------------------------------------------------------- */

static void run_helped(struct vb_message *message, void *context)
{
    (void)context;
    vb_queue_complete(vb_container_of(message, struct vb_blk_request, message));
}

static void answer(struct vb_blk_request *blk, uint8_t status)
{
    struct vb_iothread *thread = blk->queue->lane->thread;

    vb_guest_write_begin();
    __atomic_store_n(blk->status, status, __ATOMIC_RELAXED); /* shared with the guest */
    vb_guest_write_end();
    if (blk->request.thread == thread) {
        vb_queue_complete(blk);
        return;
    }
    blk->message.run = run_helped;
    vb_iothread_send(thread, &blk->message); /* it owns the request again */
}

static void blk_done(struct vb_request *request)
{
    struct vb_blk_request *blk = vb_container_of(request, struct vb_blk_request, request);
    int ret = request->ret;

    vb_stats_account(blk->queue->lane->device->export_->stats, request->thread, request->op, ret,
                     request->bytes, request->thread->now_ns - request->start_ns);
    if (ret == 0 && request->op == VB_OP_READ) {
        blk->written += (uint32_t)request->bytes;
    }
    answer(blk, ret == 0          ? VIRTIO_BLK_S_OK
                : ret == -ENOTSUP ? VIRTIO_BLK_S_UNSUPP
                                  : VIRTIO_BLK_S_IOERR);
}

static void part_done(struct vb_request *part)
{
    struct vb_blk_request *blk = part->owner;

    if (part->ret < 0 && blk->part_ret == 0) {
        blk->part_ret = part->ret;
    }
    vb_request_free(part);
    if (--blk->parts == 0) {
        blk->request.ret = blk->part_ret;
        blk_done(&blk->request);
    }
}

/* ---- the request types --------------------------------------------------------------------- */

static struct vb_export *export_of(const struct vb_blk_request *blk)
{
    return blk->queue->lane->device->export_;
}

/* Not started: what is wrong with it is the guest's affair, and worth a number for the operator. */
static void refuse(struct vb_blk_request *blk, uint8_t op, uint8_t status)
{
    blk->request.op = op;
    vb_stats_refused(export_of(blk)->stats, blk->request.thread, op);
    answer(blk, status);
}

static void refuse_unknown(struct vb_blk_request *blk)
{
    blk->request.op = VB_OP_FLUSH; /* no buffers were written, for the dirty log */
    atomic_fetch_add_explicit(&export_of(blk)->unsupported, 1, memory_order_relaxed);
    answer(blk, VIRTIO_BLK_S_UNSUPP);
}

/* Without a write cache every write is on stable storage when the guest hears of it. */
static bool writethrough(const struct vb_blk_request *blk)
{
    struct vb_device *device = blk->queue->lane->device;
    uint64_t features = atomic_load_explicit(&device->features, memory_order_relaxed);

    return !(features & 1ull << VIRTIO_BLK_F_FLUSH) ||
           !atomic_load_explicit(&device->export_->writeback_wanted, memory_order_relaxed);
}

static bool in_bounds(const struct vb_export *export_, uint64_t sector, uint64_t bytes)
{
    uint64_t capacity = atomic_load_explicit(&export_->capacity, memory_order_relaxed);

    return sector <= capacity / SECTOR && bytes <= capacity - sector * SECTOR;
}

static void run_help(struct vb_message *message, void *context)
{
    struct vb_blk_request *blk = vb_container_of(message, struct vb_blk_request, message);
    struct vb_iothread *thread = context;

    vb_count(&thread->shared_requests, 1);
    if (thread->now_ns < blk->request.start_ns) { /* read on the other thread */
        vb_refresh_now(thread);
    }
    thread->helped_ns = thread->now_ns;
    vb_submit(export_of(blk)->root, &blk->request);
}

/*
 * A guest can ask for 2 GiB with a few KiB of memory, which descriptors may name again and again. Nodes
 * hold data in memory of their own, and work on what they get without a break. So what is larger than
 * this is carried out in pieces, one after the other, each in another sweep.
 */
#define PIECE_MAX (4u << 20)

/* Of a large request; from malloc, and owned by it. */
struct vb_pieces {
    struct vb_message message; /* to its own thread: the next one */
    struct vb_blk_request *blk;
    uint64_t done;             /* bytes */
    uint32_t index;            /* where these end in the request's iovec */
    size_t skip;
    struct iovec iov[];        /* the piece's; room for as many as the request has */
};

/* Fills pieces->iov with the next so many bytes; returns how many entries. */
static uint32_t cut_piece(struct vb_pieces *pieces, const struct vb_request *whole, uint64_t bytes)
{
    uint32_t count = 0;

    while (bytes > 0) {
        const struct iovec *from = &whole->iov[pieces->index];
        size_t rest = from->iov_len - pieces->skip, here = rest < bytes ? rest : bytes;

        pieces->iov[count++] = (struct iovec){(char *)from->iov_base + pieces->skip, here};
        bytes -= here;
        pieces->skip += here;
        if (here == rest) {
            pieces->index++;
            pieces->skip = 0;
        }
    }
    return count;
}

static void piece_done(struct vb_request *piece);

static void start_piece(struct vb_blk_request *blk)
{
    const struct vb_request *whole = &blk->request;
    struct vb_request *piece = vb_request_new(whole->thread);
    uint64_t left = whole->bytes - blk->pieces->done;

    piece->op = whole->op;
    piece->flags = whole->flags;
    piece->offset = whole->offset + blk->pieces->done;
    piece->bytes = left < PIECE_MAX ? left : PIECE_MAX;
    piece->niov = cut_piece(blk->pieces, whole, piece->bytes);
    piece->iov = blk->pieces->iov;
    piece->done = piece_done;
    piece->owner = blk;
    vb_submit(export_of(blk)->root, piece);
}

static void run_piece(struct vb_message *message, void *context)
{
    (void)context;
    start_piece(vb_container_of(message, struct vb_pieces, message)->blk);
}

static void piece_done(struct vb_request *piece)
{
    struct vb_blk_request *blk = piece->owner;
    int ret = piece->ret;

    blk->pieces->done += piece->bytes;
    vb_request_free(piece);
    if (ret == 0 && blk->pieces->done < blk->request.bytes) {
        vb_iothread_send(blk->request.thread, &blk->pieces->message);
        return;
    }
    free(blk->pieces);
    blk->request.ret = ret;
    blk_done(&blk->request);
}

static void start_pieces(struct vb_blk_request *blk)
{
    struct vb_request *whole = &blk->request;
    struct vb_pieces *pieces = malloc(sizeof(*pieces) + whole->niov * sizeof(pieces->iov[0]));

    if (!pieces) {
        whole->ret = -ENOMEM;
        blk_done(whole);
        return;
    }
    *pieces = (struct vb_pieces){.message.run = run_piece, .blk = blk};
    blk->pieces = pieces;
    start_piece(blk);
}

/* The request is complete but for its way through the tree: this thread's, or its helper's. */
static void carry_out(struct vb_blk_request *blk)
{
    struct vb_lane *lane = blk->queue->lane;

    if (lane->give == 0) {
        vb_submit(export_of(blk)->root, &blk->request);
        return;
    }
    lane->give--;
    blk->request.thread = lane->helper;
    blk->message.run = run_help;
    vb_iothread_send(lane->helper, &blk->message);
}

static void start_io(struct vb_blk_request *blk, uint8_t op, uint64_t sector,
                     const struct iovec *iov, uint32_t niov)
{
    const struct vb_export *export_ = export_of(blk);
    struct vb_request *request = &blk->request;
    uint64_t bytes = iov_bytes(iov, niov);
    uint64_t unaligned = (bytes | sector * SECTOR) & (export_->logical_block_size - 1);

    request->op = op;
    if (unaligned || bytes > (uint64_t)SECTORS_MAX * SECTOR || !in_bounds(export_, sector, bytes) ||
        (op == VB_OP_WRITE && !export_->writable)) {
        refuse(blk, op, VIRTIO_BLK_S_IOERR);
        return;
    }
    if (!keep_iov(blk, iov, niov)) {
        request->ret = -ENOMEM;
        blk_done(request);
        return;
    }
    request->flags = op == VB_OP_WRITE ? VB_REQ_GUEST : 0;
    if (op == VB_OP_WRITE && writethrough(blk)) {
        request->flags |= VB_REQ_FUA;
    }
    request->offset = sector * SECTOR;
    request->bytes = bytes;
    if (bytes > PIECE_MAX) {
        start_pieces(blk);
    } else {
        carry_out(blk);
    }
}

static void start_flush(struct vb_blk_request *blk)
{
    blk->request.op = VB_OP_FLUSH;
    vb_submit(export_of(blk)->root, &blk->request);
}

static void start_get_id(struct vb_blk_request *blk, struct iovec *in, uint32_t nin)
{
    const char *from = export_of(blk)->serial;
    size_t left = VIRTIO_BLK_ID_BYTES;

    if (iov_bytes(in, nin) < left) {
        refuse(blk, VB_OP_READ, VIRTIO_BLK_S_IOERR);
        return;
    }
    for (uint32_t i = 0; left > 0; i++) {
        size_t part = in[i].iov_len < left ? in[i].iov_len : left;

        memcpy(in[i].iov_base, from, part);
        from += part;
        left -= part;
    }
    blk->request.op = VB_OP_READ; /* for the dirty log: these buffers were written */
    keep_iov(blk, in, nin);
    blk->written += VIRTIO_BLK_ID_BYTES;
    answer(blk, VIRTIO_BLK_S_OK);
}

/* Status of one range, before anything is started. */
static uint8_t check_range(const struct vb_export *export_, uint8_t op,
                           const struct virtio_blk_discard_write_zeroes *range)
{
    uint32_t flags = le32toh(range->flags), sectors = le32toh(range->num_sectors);
    uint32_t known = op == VB_OP_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;
    uint32_t block = export_->logical_block_size / SECTOR;

    if (flags & ~known) {
        return VIRTIO_BLK_S_UNSUPP;
    }
    if (sectors > SECTORS_MAX || ((le64toh(range->sector) | sectors) & (block - 1)) ||
        !in_bounds(export_, le64toh(range->sector), (uint64_t)sectors * SECTOR)) {
        return VIRTIO_BLK_S_IOERR;
    }
    return VIRTIO_BLK_S_OK;
}

static void fill_range(struct vb_request *request, uint8_t op, uint16_t flags,
                       const struct virtio_blk_discard_write_zeroes *range)
{
    request->op = op;
    request->flags = flags;
    if (le32toh(range->flags) & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) {
        request->flags |= VB_REQ_MAY_UNMAP;
    }
    request->offset = le64toh(range->sector) * SECTOR;
    request->bytes = (uint64_t)le32toh(range->num_sectors) * SECTOR;
}

static void start_parts(struct vb_blk_request *blk, uint8_t op, uint16_t flags,
                        const struct virtio_blk_discard_write_zeroes *ranges, uint32_t count)
{
    struct vb_node *root = export_of(blk)->root;

    blk->request.op = op;
    blk->request.bytes = 0;
    blk->parts = count;
    blk->part_ret = 0;
    for (uint32_t i = 0; i < count; i++) {
        struct vb_request *part = vb_request_new(blk->request.thread);

        fill_range(part, op, flags, &ranges[i]);
        part->done = part_done;
        part->owner = blk;
        blk->request.bytes += part->bytes;
        vb_submit(root, part);
    }
}

static void start_ranges(struct vb_blk_request *blk, uint8_t op, struct iovec *out, uint32_t nout)
{
    struct virtio_blk_discard_write_zeroes ranges[VB_BLK_RANGES_MAX];
    const struct vb_export *export_ = export_of(blk);
    uint64_t bytes = iov_bytes(out, nout);
    uint32_t count = (uint32_t)(bytes / sizeof(ranges[0]));
    uint16_t flags = op == VB_OP_WRITE_ZEROES && writethrough(blk) ? VB_REQ_FUA : 0;

    if (bytes % sizeof(ranges[0]) || bytes == 0 || bytes > sizeof(ranges) || !export_->writable) {
        refuse(blk, op, VIRTIO_BLK_S_IOERR);
        return;
    }
    iov_take(&out, &nout, ranges, bytes);
    for (uint32_t i = 0; i < count; i++) {
        uint8_t status = check_range(export_, op, &ranges[i]);

        if (status != VIRTIO_BLK_S_OK) {
            refuse(blk, op, status);
            return;
        }
    }
    if (count == 1) {
        fill_range(&blk->request, op, flags, &ranges[0]);
        vb_submit(export_->root, &blk->request);
        return;
    }
    start_parts(blk, op, flags, ranges, count);
}

static void prepare(struct vb_blk_request *blk)
{
    struct vb_request *request = &blk->request;

    request->thread = blk->queue->lane->thread;
    request->start_ns = request->thread->now_ns;
    request->done = blk_done;
    request->depth = 0;
    request->flags = 0;
    request->offset = 0;
    request->bytes = 0;
    request->niov = 0;
    request->take = NULL;
    blk->written = 1;
}

bool vb_blk_start(struct vb_blk_request *blk, struct iovec *out, uint32_t nout,
                  struct iovec *in, uint32_t nin)
{
    struct virtio_blk_outhdr header;

    prepare(blk);
    if (!iov_take(&out, &nout, &header, sizeof(header))) {
        return false;
    }
    blk->status = take_status(in, &nin);
    if (!blk->status) {
        return false;
    }
    switch (le32toh(header.type)) {
    case VIRTIO_BLK_T_IN:
        start_io(blk, VB_OP_READ, le64toh(header.sector), in, nin);
        break;
    case VIRTIO_BLK_T_OUT:
        start_io(blk, VB_OP_WRITE, le64toh(header.sector), out, nout);
        break;
    case VIRTIO_BLK_T_FLUSH:
        start_flush(blk);
        break;
    case VIRTIO_BLK_T_GET_ID:
        start_get_id(blk, in, nin);
        break;
    case VIRTIO_BLK_T_DISCARD:
        start_ranges(blk, VB_OP_DISCARD, out, nout);
        break;
    case VIRTIO_BLK_T_WRITE_ZEROES:
        start_ranges(blk, VB_OP_WRITE_ZEROES, out, nout);
        break;
    default:
        refuse_unknown(blk);
        break;
    }
    return true;
}
