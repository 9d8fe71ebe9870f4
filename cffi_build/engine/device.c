/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * device.c: one vhost-user connection: its device thread, and its lanes on the
 * I/O threads.
 *
 * Life: control makes the device, attaches a lane to each I/O thread and starts the
 * device thread. That thread handles messages until the socket ends, someone asks
 * it to stop or somebody breaks the rules; then it drains the lanes, unmaps the
 * guest's memory (vu_deinit) and posts `gone`. Control joins it and tells the lanes
 * to detach; the last one to do so frees the device. Messages to an I/O
 * thread arrive in the order of sending, so whatever control sent a lane before that has been
 * handled.
 */
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>

#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define DEVICE_STACK_SIZE (256 * 1024)

/* One message that parks a lane; lives on the device thread's stack until `done`. */
struct vb_park {
    struct vb_message message;
    struct vb_lane *lane;
    enum vb_message_needs needs;
    sem_t *done;
};

struct vb_pause {
    struct vb_message message;
    struct vb_lane *lane;
    struct vb_pause_round *round;
    struct vb_pause *next;
};

/* ---- lanes, on their I/O threads ------------------------------------------------------ */

/*
 * Requests that a dead predecessor took from a ring are in flight for everybody but us
 * until they are started. At the end of a connection they stay in the front-end's record.
 */
static bool lane_owes(const struct vb_lane *lane)
{
    if (lane->broken || atomic_load_explicit(&lane->device->stop, memory_order_relaxed)) {
        return false;
    }
    for (const struct vb_queue *queue = lane->queues; queue; queue = queue->next) {
        if (queue->mapped && queue->resubmit_next < queue->resubmit_num) {
            return true;
        }
    }
    return false;
}

/* Also of rings that are not, or no longer, enabled: they were when the requests were taken. */
static void lane_start_owed(struct vb_lane *lane)
{
    for (struct vb_queue *queue = lane->queues; queue && lane_owes(lane); queue = queue->next) {
        if (queue->mapped) {
            vb_queue_resubmit(queue);
        }
    }
}

/* All that was popped has completed, though not all of it need be in the used ring. */
static bool lane_is_idle(const struct vb_lane *lane)
{
    uint32_t left = lane->inflight;

    if (left == 0) {
        return true; /* without a look at the queues, which the device thread may be changing */
    }
    for (const struct vb_queue *queue = lane->queues; queue; queue = queue->next) {
        left -= queue->batch_used;
    }
    return left == 0;
}

/* The tree has none of this lane's requests any more: tell whoever waits for that. */
static void lane_settle_pauses(struct vb_lane *lane)
{
    while (lane->pausing) {
        struct vb_pause *pause = lane->pausing;

        lane->pausing = pause->next;
        vb_pause_settled(pause->round);
        free(pause);
    }
}

/* Nothing is in flight: the same, and the device thread. */
static void lane_settle(struct vb_lane *lane)
{
    lane_settle_pauses(lane);
    if (lane->parking && !(lane->parking->needs == VB_NEEDS_FINISH && lane_owes(lane))) {
        struct vb_park *park = lane->parking;

        lane->parking = NULL;
        lane->parked = true;
        sem_post(park->done); /* frees park */
    }
}

static bool lane_may_pop(const struct vb_lane *lane)
{
    return !lane->parked && !lane->parking && lane->paused == 0 && !lane->broken;
}

static bool lane_poll(struct vb_poller *poller)
{
    struct vb_lane *lane = vb_container_of(poller, struct vb_lane, poller);
    bool any = false;

    if (!lane_may_pop(lane)) {
        return false;
    }
    for (struct vb_queue *queue = lane->queues; queue; queue = queue->next) {
        any |= queue->running && vb_queue_poll(queue);
    }
    return any;
}

static bool lane_flush(struct vb_poller *poller)
{
    struct vb_lane *lane = vb_container_of(poller, struct vb_lane, poller);
    bool any = false;

    if (lane->parked) {
        /* For as long as a front-end likes that does not read its answers. Others wait for the pause. */
        if (lane->pausing && lane_is_idle(lane)) {
            lane_settle_pauses(lane);
        }
        return false;
    }
    for (struct vb_queue *queue = lane->queues; queue; queue = queue->next) {
        any |= vb_queue_flush(queue);
    }
    atomic_store_explicit(&lane->inflight_seen, lane->inflight, memory_order_relaxed);
    if (lane->inflight == 0) {
        lane_settle(lane);
    }
    return any;
}

static bool lane_arm(struct vb_poller *poller)
{
    struct vb_lane *lane = vb_container_of(poller, struct vb_lane, poller);
    bool busy = false;

    if (!lane_may_pop(lane)) {
        return false;
    }
    for (struct vb_queue *queue = lane->queues; queue; queue = queue->next) {
        busy |= queue->running && vb_queue_arm(queue);
    }
    return busy;
}

/* A kick wakes the thread, and awake it looks at every ring: there is nothing else to do. */
static void kick_ready(struct vb_watch *watch)
{
    (void)watch;
}

static void run_attach(struct vb_message *message, void *context)
{
    struct vb_lane *lane = vb_container_of(message, struct vb_lane, attach);

    vb_iothread_add_poller(context, &lane->poller);
}

static void device_free(struct vb_device *device);

static void run_detach(struct vb_message *message, void *context)
{
    struct vb_lane *lane = vb_container_of(message, struct vb_lane, detach);
    struct vb_device *device = lane->device;

    vb_iothread_remove_poller(context, &lane->poller);
    if (atomic_fetch_sub(&device->lanes_left, 1) == 1) {
        device_free(device);
    }
}

static void run_park(struct vb_message *message, void *context)
{
    struct vb_park *park = vb_container_of(message, struct vb_park, message);
    struct vb_lane *lane = park->lane;

    (void)context;
    if (park->needs == VB_NEEDS_PARK) {
        lane->parked = true;
        sem_post(park->done);
        return;
    }
    if (park->needs == VB_NEEDS_FINISH && lane->paused == 0) { /* paused: see run_resume() */
        lane_start_owed(lane);
    }
    lane->parked = false; /* may flush */
    lane->parking = park; /* may not pop; settled by a flush when nothing is in flight */
}

static void run_unpark(struct vb_message *message, void *context)
{
    struct vb_lane *lane = vb_container_of(message, struct vb_lane, unpark);

    (void)context;
    lane->parked = false;
}

static void run_pause(struct vb_message *message, void *context)
{
    struct vb_pause *pause = vb_container_of(message, struct vb_pause, message);
    struct vb_lane *lane = pause->lane;

    (void)context;
    lane->paused++;
    if (lane->inflight == 0 || (lane->parked && lane_is_idle(lane))) {
        vb_pause_settled(pause->round);
        free(pause);
        return;
    }
    pause->next = lane->pausing;
    lane->pausing = pause;
}

static void run_resume(struct vb_message *message, void *context)
{
    struct vb_pause *resume = vb_container_of(message, struct vb_pause, message);
    struct vb_lane *lane = resume->lane;

    (void)context;
    lane->paused--;
    if (lane->paused == 0 && lane->parking && lane->parking->needs == VB_NEEDS_FINISH) {
        lane_start_owed(lane);
    }
    free(resume);
}

/* Awake, the thread flushes, and sees that it owes nothing any more. */
static void run_nudge(struct vb_message *message, void *context)
{
    (void)context;
    free(vb_container_of(message, struct vb_pause, message));
}

void vb_device_violation(struct vb_lane *lane, const char *what)
{
    const char *none = NULL;

    lane->broken = true;
    atomic_compare_exchange_strong(&lane->device->violation, &none, what);
    vb_device_wake(lane->device);
}

/* ---- notes to control -------------------------------------------------------------------- */

struct note {
    struct vb_message message;
    struct vb_export *export_;
    uint32_t kind;
    int ret;
};

static void fill_note(struct vb_message *message, void *context)
{
    struct note *note = vb_container_of(message, struct note, message);

    *(struct vb_event *)context = (struct vb_event){
        .kind = note->kind,
        .ret = note->ret,
        .cookie = note->export_->cookie,
    };
    free(note);
}

static void post_note(struct vb_export *export_, uint32_t kind, int ret)
{
    struct note *note = malloc(sizeof(*note));

    if (note) {
        *note = (struct note){{.run = fill_note}, export_, kind, ret};
        vb_engine_post(export_->engine, &note->message);
    }
}

/* ---- the device thread ------------------------------------------------------------------ */

bool vb_device_drop(struct vb_device *device, const char *format, ...)
{
    va_list arguments;

    if (device->ret == 0) {
        device->ret = -EPROTO;
        va_start(arguments, format);
        vsnprintf(device->reason, sizeof(device->reason), format, arguments);
        va_end(arguments);
        device->reason[strcspn(device->reason, "\n")] = '\0'; /* some of the library's end in one */
    }
    return false;
}

/* The library gives up. It would still acknowledge the message with success: cut it off. */
static void on_panic(VuDev *vu, const char *text)
{
    struct vb_device *device = vb_container_of(vu, struct vb_device, vu);

    vb_device_drop(device, "%s", text);
    vu->broken = true;
    shutdown(vu->sock, SHUT_RDWR);
}

/* How long requests in flight may take before Python is asked to let go of those it holds. */
#define DRAIN_PATIENCE_NS 2000000
#define DRAIN_RETRY_NS 100000000

/*
 * A front-end that turns its call descriptor blocking and fills it has our I/O thread asleep in
 * eventfd_write(). Reading it wakes the writer.
 */
static void release_signallers(struct vb_device *device)
{
    for (uint16_t i = 0; i < device->num_queues; i++) {
        uint64_t ignored;
        struct iovec iov = {&ignored, sizeof(ignored)};
        struct pollfd call = {.fd = device->vu.vq[i].call_fd, .events = POLLOUT};

        if (call.fd >= 0 && poll(&call, 1, 0) == 0) {
            preadv2(call.fd, &iov, 1, -1, RWF_NOWAIT);
        }
    }
}

static struct timespec after(uint64_t ns)
{
    struct timespec at;

    clock_gettime(CLOCK_REALTIME, &at);
    at.tv_nsec += (long)ns;
    at.tv_sec += at.tv_nsec / 1000000000;
    at.tv_nsec %= 1000000000;
    return at;
}

static void wait_for_lanes(struct vb_device *device, sem_t *done, bool drain)
{
    struct timespec until = after(DRAIN_PATIENCE_NS);
    uint32_t left = device->num_lanes;
    bool late = false;

    while (left > 0) {
        if (sem_timedwait(done, &until) == 0) {
            left--;
        } else if (errno == ETIMEDOUT) {
            if (drain && !late) {
                post_note(device->export_, VB_EVENT_DRAINING, 1);
            }
            late = true;
            release_signallers(device);
            until = after(DRAIN_RETRY_NS);
        }
    }
    if (drain && late) {
        post_note(device->export_, VB_EVENT_DRAINING, 0);
    }
}

static void park_lanes(struct vb_device *device, enum vb_message_needs needs)
{
    struct vb_park parks[VB_MAX_IOTHREADS];
    sem_t done;

    sem_init(&done, 0, 0);
    for (uint32_t i = 0; i < device->num_lanes; i++) {
        parks[i] = (struct vb_park){{.run = run_park}, &device->lanes[i], needs, &done};
        vb_iothread_send(device->lanes[i].thread, &parks[i].message);
    }
    wait_for_lanes(device, &done, needs != VB_NEEDS_PARK);
    sem_destroy(&done);
    device->parked = needs;
}

static void park(struct vb_device *device, enum vb_message_needs needs)
{
    if (needs > device->parked) {
        park_lanes(device, needs);
    }
}

/* The lane's one unpark message is free again: the park before it was acknowledged after it. */
static void unpark(struct vb_device *device)
{
    vb_assert(device->parked != VB_NEEDS_NOTHING);
    for (uint32_t i = 0; i < device->num_lanes; i++) {
        vb_iothread_send(device->lanes[i].thread, &device->lanes[i].unpark);
    }
    device->parked = VB_NEEDS_NOTHING;
}

/* The ring's addresses in this process; false if it is not, or no longer, mapped. */
static bool resolve_ring(struct vb_device *device, struct vb_queue *queue)
{
    struct vb_ring ring;

    if (!vb_ring_resolve(&device->vu, &queue->vq->vra, queue->num, &ring)) {
        return false;
    }
    queue->desc = ring.desc;
    queue->avail = ring.avail;
    queue->used = ring.used;
    return true;
}

static void free_requests(struct vb_queue *queue)
{
    for (uint16_t i = 0; queue->requests && i < queue->num; i++) {
        if (queue->requests[i].iov != queue->requests[i].inline_iov) {
            free(queue->requests[i].iov);
        }
    }
    free(queue->requests);
    queue->requests = NULL;
}

static bool alloc_requests(struct vb_queue *queue, uint16_t num)
{
    free_requests(queue);
    queue->num = num;
    queue->requests = calloc(num, sizeof(queue->requests[0]));
    for (uint16_t i = 0; queue->requests && i < num; i++) {
        queue->requests[i].queue = queue;
        queue->requests[i].head = i;
        queue->requests[i].iov = queue->requests[i].inline_iov;
        queue->requests[i].iov_room = VB_BLK_INLINE_IOV;
    }
    return queue->requests != NULL;
}

/* Many queues are offered and few used: the lane walks only those that ever were. */
static void join_lane(struct vb_queue *queue)
{
    if (!queue->requests) {
        queue->next = queue->lane->queues;
        queue->lane->queues = queue;
    }
}

static void on_queue_started(VuDev *vu, int index, bool started)
{
    struct vb_device *device = vb_container_of(vu, struct vb_device, vu);
    struct vb_queue *queue = &device->queues[index];
    bool writeback = atomic_load(&device->export_->writeback_wanted);

    if (!started) {
        queue->running = queue->mapped = false;
        return;
    }
    join_lane(queue);
    if (!alloc_requests(queue, (uint16_t)queue->vq->vring.num) || !resolve_ring(device, queue)) {
        on_panic(vu, "ring is not inside one memory region, or there is no memory for it");
        return;
    }
    queue->kicks_wanted = false;
    queue->signalled_valid = false;
    vb_queue_recover(queue);
    if (atomic_load(&device->export_->writeback_wanted) != writeback) {
        post_note(device->export_, VB_EVENT_WRITEBACK, !writeback);
    }
}

static void watch_kick(struct vb_device *device, struct vb_queue *queue)
{
    int ret;

    if (queue->kick_fd == queue->vq->kick_fd) {
        return;
    }
    queue->kick_fd = queue->vq->kick_fd; /* the old one went through on_remove_watch() */
    if (queue->kick_fd < 0) {
        return;
    }
    ret = vb_iothread_add_watch(queue->lane->thread, queue->kick_fd, &queue->kick);
    if (ret < 0) {
        vb_device_drop(device, "the kick descriptor of queue %u cannot be waited for: %s",
                       queue->index, strerror(-ret));
        queue->kick_fd = -1;
    }
}

static void on_set_watch(VuDev *vu, int fd, int condition, vu_watch_cb callback, void *data)
{
    (void)vu, (void)fd, (void)condition, (void)callback, (void)data; /* see watch_kick() */
}

/* Called before the library closes a kick descriptor. */
static void on_remove_watch(VuDev *vu, int fd)
{
    struct vb_device *device = vb_container_of(vu, struct vb_device, vu);

    for (uint16_t i = 0; i < device->num_queues; i++) {
        struct vb_queue *queue = &device->queues[i];

        if (queue->kick_fd == fd) {
            vb_iothread_remove_watch(queue->lane->thread, fd);
            queue->kick_fd = -1;
        }
    }
}

/* What the lane reads of the library's state, after a message may have changed it. */
static void refresh_queue(struct vb_device *device, struct vb_queue *queue)
{
    uint64_t features = device->vu.features;
    bool enabled = queue->enabled || !(features & 1ull << VHOST_USER_F_PROTOCOL_FEATURES);

    queue->mapped = queue->vq->started && queue->requests && resolve_ring(device, queue);
    queue->running = queue->mapped && enabled;
    queue->event_idx = features & 1ull << VIRTIO_RING_F_EVENT_IDX;
    queue->indirect = features & 1ull << VIRTIO_RING_F_INDIRECT_DESC;
    queue->log = device->vu.log_table && (features & 1ull << VHOST_F_LOG_ALL);
    watch_kick(device, queue);
}

static void refresh(struct vb_device *device)
{
    uint32_t running = 0;

    for (uint16_t i = 0; i < device->num_queues; i++) {
        refresh_queue(device, &device->queues[i]);
        running += device->queues[i].running;
    }
    atomic_store_explicit(&device->queues_running, running, memory_order_relaxed);
    atomic_store_explicit(&device->regions, device->vu.nregions, memory_order_relaxed);
    if (device->vu.log_table == MAP_FAILED) { /* the library does not look */
        device->vu.log_table = NULL;
        vb_device_drop(device, "the dirty log cannot be mapped");
        return;
    }
    vb_guest_fault_watch(device);
    if (running > 0 && !device->connected_posted) {
        device->connected_posted = true;
        post_note(device->export_, VB_EVENT_CONNECTED, 0);
    }
    /* A lane that is drained and has no ring to serve may as well stay parked. */
    if (device->parked == VB_NEEDS_PARK || (device->parked != VB_NEEDS_NOTHING && running > 0)) {
        unpark(device);
    }
}

/* ---- messages answered here instead of by the library ------------------------------------- */

uint64_t vb_device_features(const struct vb_device *device)
{
    return vb_blk_features(device->export_) | 1ull << VIRTIO_F_VERSION_1 |
           1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_RING_F_EVENT_IDX |
           1ull << VHOST_F_LOG_ALL | 1ull << VHOST_USER_F_PROTOCOL_FEATURES;
}

#define INFLIGHT_FEATURE (1ull << VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)

uint64_t vb_device_protocol_features(void)
{
    return 1ull << VHOST_USER_PROTOCOL_F_MQ | 1ull << VHOST_USER_PROTOCOL_F_LOG_SHMFD |
           1ull << VHOST_USER_PROTOCOL_F_REPLY_ACK | 1ull << VHOST_USER_PROTOCOL_F_BACKEND_REQ |
           1ull << VHOST_USER_PROTOCOL_F_CONFIG | INFLIGHT_FEATURE |
           1ull << VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS;
}

static int reply_u64(VhostUserMsg *message, int *do_reply, uint64_t value)
{
    message->payload.u64 = value;
    message->size = sizeof(value);
    *do_reply = 1;
    return 1;
}

/* The library forgets the offset. Bytes behind the end of the structure read as zero. */
static int reply_config(struct vb_device *device, VhostUserMsg *message, int *do_reply)
{
    uint8_t all[VHOST_USER_MAX_CONFIG_SIZE] = {0};

    vb_blk_config(device->export_, all);
    memcpy(message->payload.config.region, all + message->payload.config.offset,
           message->payload.config.size);
    *do_reply = 1;
    return 1;
}

static int set_writeback(struct vb_device *device, const VhostUserMsg *message)
{
    bool wanted = message->payload.config.region[0];

    for (uint16_t i = 0; i < device->num_queues; i++) {
        vb_queue_note_writeback(&device->queues[i], wanted);
    }
    if (atomic_exchange(&device->export_->writeback_wanted, wanted) != wanted) {
        post_note(device->export_, VB_EVENT_WRITEBACK, wanted);
    }
    return 1;
}

/*
 * The library keeps this too, but it enables all rings when the front-end negotiates
 * VHOST_USER_F_PROTOCOL_FEATURES without SIZE_MAX, SEG_MAX and GEOMETRY: it takes the
 * number of the bit (30) for its mask.
 */
static void set_enabled(struct vb_device *device, const VhostUserMsg *message)
{
    device->queues[message->payload.state.index].enabled = message->payload.state.num;
}

static void disable_all(struct vb_device *device)
{
    for (uint16_t i = 0; i < device->num_queues; i++) {
        device->queues[i].enabled = false;
    }
}

/* The library keeps pointers into an old area, or the area itself, for ever. */
static void forget_inflight_area(VuDev *vu)
{
    if (!vu->inflight_info.addr) {
        return;
    }
    vb_guest_fault_unmap(vu->inflight_info.addr, vu->inflight_info.size);
    close(vu->inflight_info.fd);
    vu->inflight_info = (VuDevInflightInfo){0};
    for (uint16_t i = 0; i < vu->max_queues; i++) {
        vu->vq[i].inflight = NULL;
    }
}

/*
 * QEMU may ask for an in-flight area of `queue-size` entries and then set up rings of
 * 1024 (Debian's 10.0.13 always does). So every area is made for the largest ring there
 * can be; QEMU hands it back with its real size and its own idea of the entries.
 */
static void choose_inflight_size(struct vb_device *device, VhostUserMsg *message)
{
    VhostUserInflight area = message->payload.inflight;

    if (message->request == VHOST_USER_GET_INFLIGHT_FD ||
        area.mmap_size >= area.num_queues * vb_inflight_bytes(VB_QUEUE_SIZE_MAX)) {
        message->payload.inflight.queue_size = VB_QUEUE_SIZE_MAX;
    }
    device->inflight_queue_size = message->payload.inflight.queue_size;
}

/* Another back-end's area, too small for this ring: better to serve than to refuse. */
static void check_inflight_size(struct vb_device *device, uint32_t index)
{
    VuVirtq *vq = &device->vu.vq[index];

    if (vq->inflight && vq->vring.num > device->inflight_queue_size) {
        vq->inflight = NULL;
        post_note(device->export_, VB_EVENT_UNRECORDED, (int)index);
    }
}

/* Whether the library takes mappings away. All lanes are parked then: nobody else touches them. */
static bool unmaps(int request)
{
    switch (request) {
    case VHOST_USER_SET_MEM_TABLE:
    case VHOST_USER_REM_MEM_REG:
    case VHOST_USER_SET_LOG_BASE:
    case VHOST_USER_GET_INFLIGHT_FD:
    case VHOST_USER_SET_INFLIGHT_FD:
        return true;
    default:
        return false;
    }
}

static int on_message(VuDev *vu, VhostUserMsg *message, int *do_reply)
{
    struct vb_device *device = vb_container_of(vu, struct vb_device, vu);

    park(device, vb_message_needs(message->request));
    if (unmaps(message->request)) {
        vb_guest_fault_unwatch(device);
    }
    switch (message->request) {
    case VHOST_USER_GET_FEATURES:
        return reply_u64(message, do_reply, vb_device_features(device));
    case VHOST_USER_GET_PROTOCOL_FEATURES:
        return reply_u64(message, do_reply, vb_device_protocol_features());
    case VHOST_USER_GET_CONFIG:
        return reply_config(device, message, do_reply);
    case VHOST_USER_SET_CONFIG:
        return set_writeback(device, message);
    case VHOST_USER_GET_INFLIGHT_FD:
        forget_inflight_area(vu);
        choose_inflight_size(device, message);
        break;
    case VHOST_USER_SET_INFLIGHT_FD:
        forget_inflight_area(vu); /* also of queues that the new one does not cover */
        choose_inflight_size(device, message);
        break;
    case VHOST_USER_SET_VRING_ENABLE:
        set_enabled(device, message);
        break;
    case VHOST_USER_RESET_OWNER:
        disable_all(device);
        break;
    case VHOST_USER_SET_VRING_KICK:
        check_inflight_size(device, message->payload.u64 & VHOST_USER_VRING_IDX_MASK);
        /* Keeps the library from its own check of the in-flight area: vb_queue_recover(). */
        vu->protocol_features &= ~INFLIGHT_FEATURE;
        break;
    }
    return 0;
}

static void on_set_features(VuDev *vu, uint64_t features)
{
    struct vb_device *device = vb_container_of(vu, struct vb_device, vu);

    atomic_store_explicit(&device->features, features, memory_order_relaxed);
}

static void on_set_protocol_features(VuDev *vu, uint64_t features)
{
    struct vb_device *device = vb_container_of(vu, struct vb_device, vu);

    atomic_store_explicit(&device->protocol_features, features, memory_order_relaxed);
}

static const VuDevIface device_iface = {
    .set_features = on_set_features,
    .set_protocol_features = on_set_protocol_features,
    .process_msg = on_message,
    .queue_set_started = on_queue_started,
};

/* ---- the device thread's loop --------------------------------------------------------------- */

static bool handle_message(struct vb_device *device)
{
    VuDev *vu = &device->vu;
    bool alive;

    vb_guest_fault_handling(device);
    alive = vu_dispatch(vu);
    vb_guest_fault_handling(NULL);
    vu->protocol_features =
        atomic_load_explicit(&device->protocol_features, memory_order_relaxed);
    if (!alive || vu->broken || device->ret < 0) {
        return false;
    }
    if (device->parked != VB_NEEDS_NOTHING) { /* or nothing can have changed, and lanes are reading */
        refresh(device);
    }
    return device->ret == 0;
}

/*
 * Not vu_config_change_msg(), which waits for a front-end that does not read. The message
 * says nothing but "read the configuration again": if the socket is full of them, one
 * more adds nothing.
 */
static void tell_config_changed(struct vb_device *device)
{
    const uint32_t header[3] = {VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, 1 /* version */, 0 /* size */};

    if (device->vu.backend_fd >= 0) { /* else nobody asked to be told */
        send(device->vu.backend_fd, header, sizeof(header), MSG_DONTWAIT | MSG_NOSIGNAL);
    }
}

static bool handle_wake(struct vb_device *device)
{
    const char *violation = atomic_load(&device->violation);
    eventfd_t ignored;

    eventfd_read(device->wake_fd, &ignored);
    if (violation) {
        return vb_device_drop(device, "the guest broke the virtio protocol with %s", violation);
    }
    if (atomic_exchange(&device->config_changed, false)) {
        tell_config_changed(device);
    }
    return !atomic_load(&device->stop) && !device->vu.broken;
}

static void serve(struct vb_device *device)
{
    struct pollfd fds[2] = {
        {.fd = device->vu.sock, .events = POLLIN},
        {.fd = device->wake_fd, .events = POLLIN},
    };

    for (;;) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR) {
            return;
        }
        if (fds[1].revents && !handle_wake(device)) {
            return;
        }
        if (fds[0].revents && !handle_message(device)) {
            return;
        }
    }
}

static void fill_gone(struct vb_message *message, void *context)
{
    struct vb_device *device = vb_container_of(message, struct vb_device, gone);
    struct vb_export *export_ = device->export_;

    *(struct vb_event *)context = (struct vb_event){
        .kind = VB_EVENT_DISCONNECTED,
        .ret = device->ret,
        .cookie = export_->cookie,
    };
    memcpy(export_->reason, device->reason, sizeof(export_->reason));
    pthread_join(device->thread, NULL); /* posting this was the last it did */
    export_->device = NULL;
    for (uint32_t i = 0, lanes = device->num_lanes; i < lanes; i++) {
        vb_iothread_send(device->lanes[i].thread, &device->lanes[i].detach);
    }
}

static void *device_main(void *argument)
{
    struct vb_device *device = argument;

    pthread_setname_np(pthread_self(), "vhost-user");
    serve(device);
    park(device, VB_NEEDS_DRAIN); /* after this nobody touches the guest's memory */
    if (device->ret < 0) {
        atomic_fetch_add_explicit(&device->export_->broken, 1, memory_order_relaxed);
    }
    if (atomic_load(&device->stop)) {
        device->ret = 0; /* the operator's wish is no violation */
    }
    vb_guest_fault_forget(device);
    vu_deinit(&device->vu);
    vb_engine_post(device->export_->engine, &device->gone);
    return NULL;
}

/* ---- control ------------------------------------------------------------------------------------ */

void vb_device_wake(struct vb_device *device)
{
    eventfd_write(device->wake_fd, 1);
}

static void send_to_lanes(struct vb_device *device, void (*run)(struct vb_message *, void *),
                          struct vb_pause_round *round)
{
    for (uint32_t i = 0; i < device->num_lanes; i++) {
        struct vb_pause *pause = vb_must_alloc(sizeof(*pause));
        *pause = (struct vb_pause){{.run = run}, &device->lanes[i], round, NULL};
        vb_iothread_send(device->lanes[i].thread, &pause->message);
    }
}

void vb_device_stop(struct vb_device *device)
{
    atomic_store(&device->stop, true);
    shutdown(device->shutdown_fd, SHUT_RDWR);
    vb_device_wake(device);
    send_to_lanes(device, run_nudge, NULL); /* the device thread may wait for a lane that is paused */
}

void vb_device_pause(struct vb_device *device, struct vb_pause_round *round)
{
    atomic_store(&round->lanes_left, device->num_lanes);
    send_to_lanes(device, run_pause, round);
}

void vb_device_resume(struct vb_device *device)
{
    send_to_lanes(device, run_resume, NULL);
}

/* On the last lane's thread: the export may be gone by then. */
static void device_free(struct vb_device *device)
{
    for (uint16_t i = 0; device->queues && i < device->num_queues; i++) {
        free_requests(&device->queues[i]);
    }
    vb_guest_fault_forget(device);
    if (device->wake_fd >= 0) {
        close(device->wake_fd);
    }
    if (device->shutdown_fd >= 0) {
        close(device->shutdown_fd);
    }
    free(device->queues);
    free(device->lanes);
    free(device);
}

static void make_lanes(struct vb_device *device)
{
    struct vb_export *export_ = device->export_;

    for (uint32_t i = 0; i < device->num_lanes; i++) {
        struct vb_lane *lane = &device->lanes[i];

        lane->poller = (struct vb_poller){NULL, lane_poll, lane_flush, lane_arm};
        lane->device = device;
        lane->thread = export_->iothreads[i];
        if (export_->num_iothreads > 1) {
            lane->helper = export_->iothreads[(i + 1) % export_->num_iothreads];
        }
        lane->parked = true;
        lane->paused = export_->pause_depth;
        lane->attach.run = run_attach;
        lane->unpark.run = run_unpark;
        lane->detach.run = run_detach;
    }
    for (uint16_t i = 0; i < export_->num_queues; i++) {
        struct vb_queue *queue = &device->queues[i];

        queue->lane = &device->lanes[i % device->num_lanes];
        queue->index = i;
        queue->kick.ready = kick_ready;
        queue->kick_fd = -1;
        queue->vq = &device->vu.vq[i];
    }
}

static int device_prepare(struct vb_device *device, int sock)
{
    struct vb_export *export_ = device->export_;

    device->num_queues = export_->num_queues;
    device->num_lanes = export_->num_iothreads < export_->num_queues ? export_->num_iothreads
                                                                     : export_->num_queues;
    device->lanes = calloc(device->num_lanes, sizeof(device->lanes[0]));
    device->queues = calloc(export_->num_queues, sizeof(device->queues[0]));
    device->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    device->shutdown_fd = fcntl(sock, F_DUPFD_CLOEXEC, 0);
    if (!device->lanes || !device->queues || vb_guest_fault_protect(device) < 0) {
        return -ENOMEM;
    }
    if (device->wake_fd < 0 || device->shutdown_fd < 0) {
        return -errno;
    }
    if (!vu_init(&device->vu, export_->num_queues, sock, on_panic, vb_message_read, on_set_watch,
                 on_remove_watch, &device_iface)) {
        return -ENOMEM;
    }
    return 0;
}

int vb_device_start(struct vb_export *export_, int sock, char *error)
{
    struct vb_device *device = calloc(1, sizeof(*device));
    int ret;

    if (!device) {
        close(sock);
        return vb_error(error, -ENOMEM, "no memory for a connection");
    }
    device->export_ = export_;
    device->wake_fd = device->shutdown_fd = -1;
    device->parked = VB_NEEDS_DRAIN;
    device->gone.run = fill_gone;
    ret = device_prepare(device, sock);
    if (ret < 0) {
        close(sock);
        device_free(device);
        return vb_error(error, ret, "cannot serve a connection to '%s': %s", export_->id,
                        strerror(-ret));
    }
    make_lanes(device);
    atomic_store(&device->lanes_left, device->num_lanes);
    ret = vb_thread_start(&device->thread, DEVICE_STACK_SIZE, device_main, device);
    if (ret < 0) {
        vu_deinit(&device->vu);
        device_free(device);
        return vb_error(error, ret, "cannot start a thread for '%s': %s", export_->id,
                        strerror(-ret));
    }
    /* The device thread's first message to a lane may overtake this: parking needs no poller. */
    for (uint32_t i = 0; i < device->num_lanes; i++) {
        vb_iothread_send(device->lanes[i].thread, &device->lanes[i].attach);
    }
    export_->device = device;
    atomic_fetch_add_explicit(&export_->connections, 1, memory_order_relaxed);
    return 0;
}
