/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * virtqueue.c: split virtqueues (virtio 1.2, section 2.7), popped and pushed in
 * batches.
 *
 * libvhost-user keeps the state (VuVirtq) and answers the messages; its own
 * vu_queue_pop/push are not used, because they allocate for each request, walk the
 * chain twice and cannot batch while in-flight requests are recorded.
 *
 * The guest may change its memory at any moment. So each index, descriptor and
 * header is read once into our own memory, and only the copy is checked and used.
 *
 * In-flight record (vhost-user.rst, "Inflight I/O tracking"). Order on pop: the
 * counter, then inflight = 1. Order on push: link the batch's heads from
 * last_batch_head, then the used index, then inflight = 0 for each, then
 * used_idx. A process killed anywhere in between leaves either used_idx equal to
 * the ring's index (the batch was not published: all of it is done again, which a
 * block device may), or different (published: vb_queue_recover() clears it).
 */
#include "device.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>

/* Shared with the guest: whole loads and stores, in the order written here. */
#define guest_load(pointer) __atomic_load_n((pointer), __ATOMIC_RELAXED)
#define guest_load_acquire(pointer) __atomic_load_n((pointer), __ATOMIC_ACQUIRE)
#define guest_store(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_RELAXED)
#define guest_store_release(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_RELEASE)

/* ---- guest memory --------------------------------------------------------------- */

static const VuDevRegion *find_region(struct vb_lane *lane, uint64_t gpa)
{
    const VuDev *vu = &lane->device->vu;
    uint32_t low = 0, high = vu->nregions;

    if (lane->region < vu->nregions) { /* most often the same as last time */
        const VuDevRegion *last = &vu->regions[lane->region];
        if (gpa - last->gpa < last->size) {
            return last;
        }
    }
    while (low < high) { /* the library keeps them sorted by guest physical address */
        uint32_t middle = low + (high - low) / 2;
        const VuDevRegion *region = &vu->regions[middle];

        if (gpa < region->gpa) {
            high = middle;
        } else if (gpa - region->gpa >= region->size) {
            low = middle + 1;
        } else {
            lane->region = middle;
            return region;
        }
    }
    return NULL;
}

/* Guest memory at gpa; *length is cut to what is contiguous. NULL if it is no memory. */
static void *gpa_to_va(struct vb_lane *lane, uint64_t gpa, uint64_t *length)
{
    const VuDevRegion *region = find_region(lane, gpa);
    uint64_t offset;

    if (!region) {
        return NULL;
    }
    offset = gpa - region->gpa;
    if (*length > region->size - offset) {
        *length = region->size - offset;
    }
    return (void *)(uintptr_t)(region->mmap_addr + region->mmap_offset + offset);
}

static bool read_guest(struct vb_lane *lane, uint64_t gpa, void *to, uint64_t length)
{
    while (length > 0) {
        uint64_t part = length;
        const void *from = gpa_to_va(lane, gpa, &part);

        if (!from) {
            return false;
        }
        memcpy(to, from, part);
        to = (char *)to + part;
        gpa += part;
        length -= part;
    }
    /* What was copied is what counts: the compiler may not read the original again. */
    atomic_signal_fence(memory_order_seq_cst);
    return true;
}

static uint64_t region_gpa(const VuDev *vu, const void *va)
{
    for (uint32_t i = 0; i < vu->nregions; i++) {
        const VuDevRegion *region = &vu->regions[i];
        uint64_t offset = (uintptr_t)va - (region->mmap_addr + region->mmap_offset);

        if (offset < region->size) {
            return region->gpa + offset;
        }
    }
    return UINT64_MAX;
}

/* ---- dirty log (vhost-user.rst, "Migration") ----------------------------------------- */

static void log_gpa(VuDev *vu, uint64_t gpa, uint64_t length)
{
    if (!vu->log_table || length == 0 || gpa + length < gpa) {
        return;
    }
    for (uint64_t page = gpa / VB_PAGE_SIZE; page <= (gpa + length - 1) / VB_PAGE_SIZE; page++) {
        if (page / 8 >= vu->log_size) {
            return;
        }
        __atomic_fetch_or(&vu->log_table[page / 8], (uint8_t)(1u << (page % 8)), __ATOMIC_RELAXED);
    }
}

static void log_va(VuDev *vu, const void *va, uint64_t length)
{
    uint64_t gpa = region_gpa(vu, va);

    if (gpa != UINT64_MAX) {
        log_gpa(vu, gpa, length);
    }
}

/* Not before the push: a lane that is parked may complete, but not look at memory regions. */
static void log_request(struct vb_queue *queue, const struct vb_blk_request *blk)
{
    VuDev *vu = &queue->lane->device->vu;

    if (blk->request.op == VB_OP_READ) { /* also GET_ID, which has the buffers of one */
        for (uint32_t i = 0; i < blk->request.niov; i++) {
            log_va(vu, blk->request.iov[i].iov_base, blk->request.iov[i].iov_len);
        }
    }
    log_va(vu, blk->status, 1);
}

static void log_used(struct vb_queue *queue, uint64_t offset, uint64_t length)
{
    if (queue->vq->vring.flags & (1u << VHOST_VRING_F_LOG)) {
        log_gpa(&queue->lane->device->vu, queue->vq->vring.log_guest_addr + offset, length);
    }
}

/* ---- parsing a chain -------------------------------------------------------------------- */

struct chain {
    struct vb_lane *lane;
    uint32_t nout, nin;
    const char *error;
};

static bool chain_error(struct chain *chain, const char *error)
{
    chain->error = error;
    return false;
}

/* Appends one descriptor's buffer, which may lie in several regions. */
static bool chain_add(struct chain *chain, const struct vring_desc *desc)
{
    bool in = le16toh(desc->flags) & VRING_DESC_F_WRITE;
    uint64_t gpa = le64toh(desc->addr);
    uint64_t length = le32toh(desc->len);

    if (length == 0) {
        return chain_error(chain, "a descriptor of length 0");
    }
    if (!in && chain->nin > 0) {
        return chain_error(chain, "a device-readable descriptor after a device-writable one");
    }
    while (length > 0) {
        struct iovec *iov = &chain->lane->chain[chain->nout + chain->nin];
        uint64_t part = length;

        if (chain->nout + chain->nin == VB_CHAIN_IOV_MAX) {
            return chain_error(chain, "a chain with too many parts");
        }
        iov->iov_base = gpa_to_va(chain->lane, gpa, &part);
        iov->iov_len = part;
        if (!iov->iov_base) {
            return chain_error(chain, "a descriptor that points outside guest memory");
        }
        if (in) {
            chain->nin++;
        } else {
            chain->nout++;
        }
        gpa += part;
        length -= part;
    }
    return true;
}

static bool chain_add_indirect(struct chain *chain, const struct vring_desc *table)
{
    uint64_t gpa = le64toh(table->addr);
    uint32_t count = le32toh(table->len) / sizeof(*table);
    uint32_t index = 0;

    if (le32toh(table->len) % sizeof(*table) != 0 || count == 0 || count > VB_QUEUE_SIZE_MAX) {
        return chain_error(chain, "an indirect table of invalid length");
    }
    for (uint32_t steps = 0; steps < count; steps++) {
        struct vring_desc desc;

        if (!read_guest(chain->lane, gpa + (uint64_t)index * sizeof(desc), &desc, sizeof(desc))) {
            return chain_error(chain, "an indirect table outside guest memory");
        }
        if (le16toh(desc.flags) & VRING_DESC_F_INDIRECT) {
            return chain_error(chain, "an indirect table inside an indirect table");
        }
        if (!chain_add(chain, &desc)) {
            return false;
        }
        if (!(le16toh(desc.flags) & VRING_DESC_F_NEXT)) {
            return true;
        }
        index = le16toh(desc.next);
        if (index >= count) {
            return chain_error(chain, "a next descriptor outside its indirect table");
        }
    }
    return chain_error(chain, "a loop of descriptors in an indirect table");
}

static struct vring_desc read_desc(const struct vring_desc *from)
{
    struct vring_desc desc = {
        .addr = guest_load(&from->addr),
        .len = guest_load(&from->len),
        .flags = guest_load(&from->flags),
        .next = guest_load(&from->next),
    };
    return desc;
}

static bool chain_read(struct vb_queue *queue, uint16_t head, struct chain *chain)
{
    uint16_t index = head;

    for (uint32_t steps = 0; steps < queue->num; steps++) {
        struct vring_desc desc = read_desc(&queue->desc[index]);
        uint16_t flags = le16toh(desc.flags);

        if (flags & VRING_DESC_F_INDIRECT) {
            if (!queue->indirect) {
                return chain_error(chain, "an indirect descriptor that was not negotiated");
            }
            if (flags & VRING_DESC_F_NEXT) {
                return chain_error(chain, "an indirect descriptor with a next one");
            }
            return chain_add_indirect(chain, &desc);
        }
        if (!chain_add(chain, &desc)) {
            return false;
        }
        if (!(flags & VRING_DESC_F_NEXT)) {
            return true;
        }
        index = le16toh(desc.next);
        if (index >= queue->num) {
            return chain_error(chain, "a next descriptor outside the table");
        }
    }
    return chain_error(chain, "a loop of descriptors");
}

/*
 * What one queue may start before all that has completed is passed on and the thread's
 * other queues, perhaps another guest's, have their turn. A guest that is told of it takes some
 * 100 us to wake up and bring more, and telling costs several us: so a sweep ends as soon as
 * what is left would keep us busy no longer than that, but at first that is not known.
 */
#define SWEEP_REQUESTS 8
#define SWEEP_REQUESTS_MAX 16
#define SWEEP_BYTES (4u << 20)
#define SWEEP_NS 100000u
#define WAKE_NS 100000u

/* ---- pop ------------------------------------------------------------------------------------ */

static void mark_inflight(struct vb_queue *queue, uint16_t head)
{
    VuVirtqInflight *inflight = queue->vq->inflight;

    if (inflight) {
        inflight->desc[head].counter = queue->vq->counter++;
        guest_store_release(&inflight->desc[head].inflight, 1);
    }
}

/* Nothing sensible can be answered: give the chain back untouched and end the connection. */
static void reject(struct vb_queue *queue, uint16_t head, const char *what)
{
    if (head < queue->num && !queue->requests[head].busy) {
        /* Or a reconnecting front-end would have it resubmitted, and rejected, for ever. */
        queue->requests[head].request.niov = 0; /* nothing was written, for the dirty log */
        queue->requests[head].status = NULL;
        queue->requests[head].busy = true;
        queue->batch[queue->batch_used++] = (struct vring_used_elem){.id = htole32(head)};
        queue->lane->inflight++;
    }
    vb_device_violation(queue->lane, what);
}

/* Returns the bytes it transfers. */
static uint64_t start(struct vb_queue *queue, uint16_t head)
{
    struct vb_lane *lane = queue->lane;
    struct chain chain = {.lane = lane};
    struct vb_blk_request *blk;

    if (head >= queue->num) {
        reject(queue, head, "a head descriptor outside the table");
        return 0;
    }
    blk = &queue->requests[head];
    if (blk->busy) {
        reject(queue, head, "a descriptor that is made available twice");
        return 0;
    }
    if (!chain_read(queue, head, &chain)) {
        reject(queue, head, chain.error);
        return 0;
    }
    blk->busy = true;
    lane->inflight++;
    mark_inflight(queue, head);
    vb_count(&lane->thread->requests, 1);
    if (!vb_blk_start(blk, lane->chain, chain.nout, lane->chain + chain.nout, chain.nin)) {
        blk->busy = false;
        lane->inflight--;
        reject(queue, head, "a request without a whole header or a status byte");
        return 0;
    }
    return blk->request.bytes;
}

/* Requests that were in flight when this ring's last back-end died, oldest first. */
bool vb_queue_resubmit(struct vb_queue *queue)
{
    bool any = queue->resubmit_next < queue->resubmit_num;

    while (queue->resubmit_next < queue->resubmit_num && !queue->lane->broken) {
        atomic_fetch_add_explicit(&queue->lane->device->export_->resubmitted, 1,
                                  memory_order_relaxed);
        start(queue, queue->resubmit[queue->resubmit_next++]);
    }
    return any;
}

/* The clock is read when that costs little compared to what has just been done. */
static bool is_sweep_over(struct vb_iothread *thread, uint64_t begin_ns, uint64_t bytes,
                          unsigned started, unsigned left)
{
    uint64_t took;

    if (started < SWEEP_REQUESTS && bytes < SWEEP_REQUESTS * 4096u) {
        return false;
    }
    vb_refresh_now(thread);
    took = thread->now_ns - begin_ns;
    return took > SWEEP_NS || bytes >= SWEEP_BYTES || started >= SWEEP_REQUESTS_MAX ||
           (started >= SWEEP_REQUESTS && took / started * left < WAKE_NS);
}

/* ---- help ----------------------------------------------------------------------------------- */

/*
 * A queue belongs to one thread. But where requests are work, as those of a cipher or a vote are,
 * and another of the export's threads has nothing to do, that one carries out half of a sweep:
 * data reads and writes, which go to it as messages and come back as messages. A request that
 * costs less than SHARE_NS is not worth that. Nothing is given to a thread that sleeps, since it
 * would take too long to wake; it is called, if more is waiting than would be done by then.
 */
#define SHARE_NS 1500u
#define SHARE_CALL_NS (WAKE_NS / 2)

static unsigned choose_share(struct vb_lane *lane, unsigned count)
{
    uint64_t cost = lane->request_ns;
    unsigned most = cost ? (unsigned)(SWEEP_NS / cost) + 1 : 0;
    unsigned half = count / 2 < SWEEP_REQUESTS ? count / 2 : SWEEP_REQUESTS;

    if (!lane->helper || cost < SHARE_NS || half == 0 ||
        atomic_load_explicit(&lane->helper->poll_max_ns, memory_order_relaxed) == 0) {
        return 0; /* who may not spin always sleeps */
    }
    if (atomic_load_explicit(&lane->helper->spinning, memory_order_relaxed)) {
        return half < most ? half : most;
    }
    if (count * cost >= SHARE_CALL_NS &&
        atomic_load_explicit(&lane->helper->mailbox.asleep, memory_order_relaxed)) {
        vb_iothread_call(lane->helper);
    }
    return 0;
}

/* A running average. One sweep that another process has interrupted must not count for much. */
static void measure(struct vb_lane *lane, uint64_t begin_ns, unsigned started)
{
    uint64_t cost;

    if (!lane->helper || started == 0) {
        return;
    }
    vb_refresh_now(lane->thread);
    cost = (lane->thread->now_ns - begin_ns) / started;
    cost = cost < 2 * lane->request_ns + SHARE_NS ? cost : 2 * lane->request_ns + SHARE_NS;
    lane->request_ns = (3 * lane->request_ns + cost) / 4;
}

bool vb_queue_poll(struct vb_queue *queue)
{
    VuVirtq *vq = queue->vq;
    struct vb_lane *lane = queue->lane;
    struct vb_iothread *thread = lane->thread;
    bool any = vb_queue_resubmit(queue);
    uint16_t count = (uint16_t)(le16toh(guest_load_acquire(&queue->avail->idx)) -
                                vq->last_avail_idx);
    uint64_t bytes = 0, begin;
    unsigned started = 0; /* by this thread itself */

    if (count == 0 || lane->broken) {
        return any;
    }
    if (count > queue->num) {
        vb_device_violation(lane, "an available index that runs ahead of its ring");
        return true;
    }
    if (queue->kicks_wanted && !queue->event_idx) {
        guest_store(&queue->used->flags, htole16(VRING_USED_F_NO_NOTIFY));
    }
    queue->kicks_wanted = false;
    vb_iothread_set_spinning(thread, false);
    if (lane->helper) {
        vb_refresh_now(thread);
    }
    begin = thread->now_ns;
    lane->give = choose_share(lane, count);
    for (uint16_t i = 0; i < count && !lane->broken; i++) {
        uint16_t slot = vq->last_avail_idx++ & (queue->num - 1);
        unsigned give = lane->give;
        uint64_t moved = start(queue, le16toh(guest_load(&queue->avail->ring[slot])));

        if (lane->give < give) {
            continue;
        }
        bytes += moved;
        started++;
        if (is_sweep_over(thread, begin, bytes, started, count - i - 1u)) {
            break;
        }
    }
    lane->give = 0;
    measure(lane, begin, started);
    return true;
}

bool vb_queue_arm(struct vb_queue *queue)
{
    VuVirtq *vq = queue->vq;

    if (vq->kick_fd < 0) { /* the front-end wants us to poll */
        queue->lane->thread->max_sleep_ns = 1000000;
        return false;
    }
    if (queue->event_idx) {
        guest_store((uint16_t *)&queue->used->ring[queue->num], htole16(vq->last_avail_idx));
    } else if (!queue->kicks_wanted) {
        guest_store(&queue->used->flags, 0);
    }
    queue->kicks_wanted = true;
    if (queue->log) { /* the event index lies right behind the ring */
        log_used(queue, 0, sizeof(uint16_t));
        log_used(queue, offsetof(struct vring_used, ring) + queue->num * sizeof(queue->batch[0]),
                 sizeof(uint16_t));
    }
    /* The guest stores its index and then reads ours: one of the two must see the other. */
    atomic_thread_fence(memory_order_seq_cst);
    return le16toh(guest_load(&queue->avail->idx)) != vq->last_avail_idx;
}

/* ---- push --------------------------------------------------------------------------------------- */

void vb_queue_complete(struct vb_blk_request *blk)
{
    struct vb_queue *queue = blk->queue;

    vb_assert(queue->batch_used < queue->num);
    queue->batch[queue->batch_used++] = (struct vring_used_elem){
        .id = htole32(blk->head),
        .len = htole32(blk->written),
    };
}

static void write_used(struct vb_queue *queue, uint16_t used_idx)
{
    VuVirtqInflight *inflight = queue->vq->inflight;

    for (uint16_t i = 0; i < queue->batch_used; i++) {
        uint16_t slot = (uint16_t)(used_idx + i) & (queue->num - 1);
        uint16_t head = (uint16_t)le32toh(queue->batch[i].id);

        queue->used->ring[slot] = queue->batch[i];
        if (queue->log) {
            log_request(queue, &queue->requests[head]);
            log_used(queue, offsetof(struct vring_used, ring) + slot * sizeof(queue->batch[0]),
                     sizeof(queue->batch[0]));
        }
        if (inflight) {
            inflight->desc[head].next = inflight->last_batch_head;
            inflight->last_batch_head = head;
        }
        /* Not earlier: each head is in the batch once at most, whatever the guest makes available. */
        queue->requests[head].busy = false;
        vb_blk_release(&queue->requests[head]);
    }
}

static void clear_inflight(struct vb_queue *queue, uint16_t used_idx)
{
    VuVirtqInflight *inflight = queue->vq->inflight;

    if (!inflight) {
        return;
    }
    for (uint16_t i = 0; i < queue->batch_used; i++) {
        /* Release: not before the used index, or a kill in between would lose the request. */
        guest_store_release(&inflight->desc[(uint16_t)le32toh(queue->batch[i].id)].inflight, 0);
    }
    guest_store_release(&inflight->used_idx, used_idx);
}

/* virtio 1.2, 2.7.10: has `event` been passed between `before` and `now`? */
static bool need_event(uint16_t event, uint16_t now, uint16_t before)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

static bool wants_interrupt(struct vb_queue *queue, uint16_t used_idx)
{
    uint16_t before = queue->signalled_used;
    bool valid = queue->signalled_valid;

    if (!queue->event_idx) {
        return !(le16toh(guest_load(&queue->avail->flags)) & VRING_AVAIL_F_NO_INTERRUPT);
    }
    queue->signalled_used = used_idx;
    queue->signalled_valid = true;
    return !valid ||
           need_event(le16toh(guest_load(&queue->avail->ring[queue->num])), used_idx, before);
}

bool vb_queue_flush(struct vb_queue *queue)
{
    VuVirtq *vq = queue->vq;
    uint16_t used_idx = (uint16_t)(vq->used_idx + queue->batch_used);

    if (queue->batch_used == 0) {
        return false;
    }
    write_used(queue, vq->used_idx);
    guest_store_release(&queue->used->idx, htole16(used_idx));
    vq->used_idx = used_idx;
    if (queue->log) {
        log_used(queue, offsetof(struct vring_used, idx), sizeof(uint16_t));
    }
    clear_inflight(queue, used_idx);
    queue->lane->inflight -= queue->batch_used;
    queue->batch_used = 0;

    /* The guest stores its event index and then reads ours: one must see the other. */
    atomic_thread_fence(memory_order_seq_cst);
    if (wants_interrupt(queue, used_idx) && vq->call_fd >= 0) {
        eventfd_write(vq->call_fd, 1);
        vb_count(&queue->lane->thread->notifies, 1);
    }
    return true;
}

/* ---- taking over from a predecessor -------------------------------------------------------------- */

/* Finishes the push of a batch that was published in the used ring but not yet cleared. */
static void finish_last_batch(struct vb_queue *queue, VuVirtqInflight *inflight, uint16_t used_idx)
{
    uint16_t left = (uint16_t)(used_idx - guest_load(&inflight->used_idx));
    uint16_t head = guest_load(&inflight->last_batch_head);

    for (; left > 0 && head < queue->num; left--) {
        guest_store(&inflight->desc[head].inflight, 0);
        head = guest_load(&inflight->desc[head].next);
    }
}

/* Inserts `head` by its counter, which wraps; `counters` runs alongside queue->resubmit. */
static void insert_resubmit(struct vb_queue *queue, uint64_t *counters, uint16_t head,
                            uint64_t counter)
{
    uint16_t at = queue->resubmit_num++;

    while (at > 0 && (int64_t)(counters[at - 1] - counter) > 0) {
        queue->resubmit[at] = queue->resubmit[at - 1];
        counters[at] = counters[at - 1];
        at--;
    }
    queue->resubmit[at] = head;
    counters[at] = counter;
}

static void collect_resubmits(struct vb_queue *queue, VuVirtqInflight *inflight)
{
    uint64_t counters[VB_QUEUE_SIZE_MAX];

    for (uint16_t head = 0; head < queue->num; head++) {
        if (guest_load(&inflight->desc[head].inflight)) {
            insert_resubmit(queue, counters, head, guest_load(&inflight->desc[head].counter));
        }
    }
    if (queue->resubmit_num > 0) {
        queue->vq->counter = counters[queue->resubmit_num - 1] + 1;
    }
}

/*
 * Ours among the area's feature flags, which nobody else uses. A guest that has
 * switched its write cache off sends no flushes, and the front-end does not tell a
 * new back-end of it: after a kill -9 the successor has to know from here.
 */
#define INFLIGHT_WRITETHROUGH (1ull << 63)

void vb_queue_note_writeback(struct vb_queue *queue, bool writeback)
{
    VuVirtqInflight *inflight = queue->vq->inflight;

    if (inflight && guest_load(&inflight->version) != 0) {
        guest_store(&inflight->features, writeback ? 0 : INFLIGHT_WRITETHROUGH);
    }
}

static void recover_writeback(struct vb_queue *queue)
{
    struct vb_export *export_ = queue->lane->device->export_;

    if (guest_load(&queue->vq->inflight->features) & INFLIGHT_WRITETHROUGH) {
        atomic_store(&export_->writeback_wanted, false);
    }
}

/*
 * The library's own check at SET_VRING_KICK is left out in favour of this one. It knows
 * batches of one only; it trusts the size that stands in the shared area; and at the
 * first use of an area with a used ring that is not at zero (after a migration, say) it
 * leaves used_idx at zero, so that after a kill before the first completion it takes
 * request 0 for a completed batch and the guest waits for it for ever.
 */
void vb_queue_recover(struct vb_queue *queue)
{
    VuVirtq *vq = queue->vq;
    VuVirtqInflight *inflight = vq->inflight;
    uint16_t used_idx = le16toh(guest_load(&queue->used->idx));

    queue->resubmit_num = queue->resubmit_next = 0;
    vq->used_idx = used_idx;
    vq->inuse = 0;
    vq->counter = 0;
    if (!inflight) {
        return;
    }
    if (guest_load(&inflight->version) == 0) { /* new, or the guest was reset */
        memset(inflight->desc, 0, queue->num * sizeof(inflight->desc[0]));
        guest_store(&inflight->used_idx, used_idx);
        guest_store_release(&inflight->version, 1);
        vb_queue_note_writeback(queue, atomic_load(&queue->lane->device->export_->writeback_wanted));
        return;
    }
    recover_writeback(queue);
    finish_last_batch(queue, inflight, used_idx);
    guest_store_release(&inflight->used_idx, used_idx);
    collect_resubmits(queue, inflight);
    vq->last_avail_idx = (uint16_t)(used_idx + queue->resubmit_num);
}
