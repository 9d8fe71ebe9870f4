/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * vhost_message.c: reads one vhost-user message and checks it, before libvhost-user
 * sees it.
 *
 * The library trusts its peer with much: the number of file descriptors, region
 * counts, ring sizes, the size of the in-flight area, memory behind a file's end.
 * A message that fails a check here ends the connection, unanswered; the reason is
 * kept for one line in the log.
 */
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEADER_SIZE offsetof(VhostUserMsg, payload)
#define FDS_MAX VHOST_MEMORY_BASELINE_NREGIONS
#define ANY_SIZE UINT32_MAX
#define VERSION 1u
/*
 * A file can be larger than the machine, and all of it be mapped: a process has 128 TiB of addresses, and
 * without any left it ends. So much of them is for one front-end; and so much for one of its areas.
 */
#define MEMORY_MAX (32ull << 40)
#define AREA_MAX (1ull << 40)

struct message_rule {
    int request;
    uint32_t size;      /* of the payload; ANY_SIZE: the check looks at it */
    int fds_min, fds_max;
    enum vb_message_needs needs;
    bool (*check)(struct vb_device *device, const VhostUserMsg *message);
};

/* ---- memory -------------------------------------------------------------------------- */

/* Address of guest memory [qva, qva + length) if one region holds it all, else NULL. */
static void *qva_to_va(const VuDev *vu, uint64_t qva, uint64_t length)
{
    for (uint32_t i = 0; i < vu->nregions; i++) {
        const VuDevRegion *region = &vu->regions[i];
        uint64_t offset = qva - region->qva;

        if (offset < region->size && length <= region->size - offset) {
            return (void *)(uintptr_t)(region->mmap_addr + region->mmap_offset + offset);
        }
    }
    return NULL;
}

/* virtio 1.2, 2.7: sizes and alignments of the three parts; each of the last two ends in an index. */
bool vb_ring_resolve(const VuDev *vu, const struct vhost_vring_addr *addr, uint32_t num,
                     struct vb_ring *ring)
{
    const uint64_t n = num;

    ring->desc = qva_to_va(vu, addr->desc_user_addr, n * sizeof(struct vring_desc));
    ring->avail = qva_to_va(vu, addr->avail_user_addr, (n + 3) * sizeof(uint16_t));
    ring->used = qva_to_va(vu, addr->used_user_addr,
                           3 * sizeof(uint16_t) + n * sizeof(struct vring_used_elem));
    return ring->desc && ring->avail && ring->used && (uintptr_t)ring->desc % 16 == 0 &&
           (uintptr_t)ring->avail % 2 == 0 && (uintptr_t)ring->used % 4 == 0;
}

static bool overflows(uint64_t start, uint64_t length)
{
    return start + length < start;
}

/* Can it be mapped, all of it? Touching a mapping behind the end of its file is SIGBUS. */
static bool file_covers(int fd, uint64_t offset, uint64_t length)
{
    struct stat status;

    return fstat(fd, &status) == 0 && S_ISREG(status.st_mode) &&
           (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR && offset % VB_PAGE_SIZE == 0 &&
           !overflows(offset, length) && offset + length <= (uint64_t)status.st_size;
}

static bool check_region(struct vb_device *device, const VhostUserMemoryRegion *region, int fd)
{
    if (region->memory_size == 0 || overflows(region->guest_phys_addr, region->memory_size) ||
        overflows(region->userspace_addr, region->memory_size)) {
        return vb_device_drop(device, "memory region at 0x%" PRIx64 " of 0x%" PRIx64
                              " bytes is empty or wraps around",
                              region->guest_phys_addr, region->memory_size);
    }
    if (!file_covers(fd, region->mmap_offset, region->memory_size)) {
        return vb_device_drop(device, "memory region at 0x%" PRIx64 " of 0x%" PRIx64
                              " bytes cannot be mapped from the file that was sent for it",
                              region->guest_phys_addr, region->memory_size);
    }
    return true;
}

/* One more, besides those that are `shared` then. */
static bool check_total(struct vb_device *device, const VhostUserMemoryRegion *region,
                        uint64_t shared)
{
    if (region->memory_size > MEMORY_MAX - shared) {
        return vb_device_drop(device, "memory region at 0x%" PRIx64 " of 0x%" PRIx64
                              " bytes: with it there are more than %llu TiB",
                              region->guest_phys_addr, region->memory_size, MEMORY_MAX >> 40);
    }
    return true;
}

static bool check_mem_table(struct vb_device *device, const VhostUserMsg *message)
{
    uint32_t count = message->payload.memory.nregions;
    size_t size = offsetof(VhostUserMemory, regions);
    uint64_t total = 0;

    if (message->size < size || count > FDS_MAX || (uint32_t)message->fd_num != count ||
        message->size < size + count * sizeof(VhostUserMemoryRegion)) {
        return vb_device_drop(device, "SET_MEM_TABLE: %u regions in %u bytes with %d file descriptors",
                              count, message->size, message->fd_num);
    }
    for (uint32_t i = 0; i < count; i++) {
        VhostUserMemoryRegion region = message->payload.memory.regions[i];

        if (!check_region(device, &region, message->fds[i]) ||
            !check_total(device, &region, total)) {
            return false;
        }
        total += region.memory_size;
    }
    return true;
}

static bool check_add_mem_reg(struct vb_device *device, const VhostUserMsg *message)
{
    VhostUserMemoryRegion region = message->payload.memreg.region;
    uint64_t total = 0;

    for (uint32_t i = 0; i < device->vu.nregions; i++) {
        total += device->vu.regions[i].size;
    }
    return check_region(device, &region, message->fds[0]) && check_total(device, &region, total);
}

/* ---- rings ---------------------------------------------------------------------------- */

static bool check_index(struct vb_device *device, const VhostUserMsg *message, uint32_t index)
{
    if (index >= device->export_->num_queues) {
        return vb_device_drop(device, "%s: queue %u of %u",
                              vu_request_to_string((unsigned)message->request), index,
                              device->export_->num_queues);
    }
    return true;
}

static bool check_state(struct vb_device *device, const VhostUserMsg *message)
{
    return check_index(device, message, message->payload.state.index);
}

static bool check_num(struct vb_device *device, const VhostUserMsg *message)
{
    uint32_t num = message->payload.state.num;

    if (num == 0 || num > VB_QUEUE_SIZE_MAX || (num & (num - 1))) {
        return vb_device_drop(device, "ring size %u is not a power of two up to %u", num,
                              VB_QUEUE_SIZE_MAX);
    }
    return check_state(device, message);
}

static bool check_base(struct vb_device *device, const VhostUserMsg *message)
{
    if (message->payload.state.num > UINT16_MAX) {
        return vb_device_drop(device, "ring base %u is no 16-bit index",
                              message->payload.state.num);
    }
    return check_state(device, message);
}

/* The library reads the used index at once, so the ring must be there, whole and aligned. */
static bool check_addr(struct vb_device *device, const VhostUserMsg *message)
{
    struct vhost_vring_addr addr = message->payload.addr;
    struct vb_ring ring;
    uint32_t num;

    if (!check_index(device, message, addr.index)) {
        return false;
    }
    num = device->vu.vq[addr.index].vring.num;
    if (num == 0) {
        return vb_device_drop(device, "SET_VRING_ADDR before SET_VRING_NUM");
    }
    if (!vb_ring_resolve(&device->vu, &addr, num, &ring)) {
        return vb_device_drop(device, "ring of queue %u is unaligned or not inside one memory region",
                              addr.index);
    }
    return true;
}

/* Whatever else can be written to may block for as long as its owner likes. */
static bool is_eventfd(int fd)
{
    char path[32], target[32] = "";

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return readlink(path, target, sizeof(target) - 1) > 0 &&
           strcmp(target, "anon_inode:[eventfd]") == 0;
}

/* The area may not change under a ring that is being recorded in it. QEMU starts rings later. */
static bool check_stopped(struct vb_device *device, const VhostUserMsg *message)
{
    for (uint16_t i = 0; i < device->num_queues; i++) {
        if (device->vu.vq[i].started) {
            return vb_device_drop(device, "%s while queue %u runs",
                                  vu_request_to_string((unsigned)message->request), i);
        }
    }
    return true;
}

static bool check_vring_fd(struct vb_device *device, const VhostUserMsg *message)
{
    bool none = message->payload.u64 & VHOST_USER_VRING_NOFD_MASK;

    if (none != (message->fd_num == 0)) {
        return vb_device_drop(device, "%s with %d file descriptors",
                              vu_request_to_string((unsigned)message->request), message->fd_num);
    }
    if (!none && !is_eventfd(message->fds[0])) {
        return vb_device_drop(device, "%s with a descriptor that is no eventfd",
                              vu_request_to_string((unsigned)message->request));
    }
    if (!none) {
        /*
         * An event fd that is full must fail, not block everyone else's I/O. The front-end can
         * undo this, since it shares the open file: see release_signallers().
         */
        int flags = fcntl(message->fds[0], F_GETFL);
        fcntl(message->fds[0], F_SETFL, flags | O_NONBLOCK);
    }
    return check_index(device, message, message->payload.u64 & VHOST_USER_VRING_IDX_MASK);
}

/* The library signals it at once, and takes a failure for a reply to send. */
static bool check_call(struct vb_device *device, const VhostUserMsg *message)
{
    struct pollfd call = {.fd = message->fds[0], .events = POLLOUT};

    if (!check_vring_fd(device, message)) {
        return false;
    }
    if (message->fd_num > 0 && poll(&call, 1, 0) != 1) {
        return vb_device_drop(device, "SET_VRING_CALL with a descriptor that cannot be signalled");
    }
    return true;
}

static bool check_kick(struct vb_device *device, const VhostUserMsg *message)
{
    uint32_t index = message->payload.u64 & VHOST_USER_VRING_IDX_MASK;
    const VuVirtq *vq;

    if (!check_vring_fd(device, message)) {
        return false;
    }
    vq = &device->vu.vq[index];
    if (!vq->vra.desc_user_addr || vq->vring.num == 0) {
        return vb_device_drop(device, "SET_VRING_KICK of queue %u before its ring", index);
    }
    return true;
}

/* ---- features, configuration, areas -------------------------------------------------- */

static bool check_features(struct vb_device *device, const VhostUserMsg *message)
{
    uint64_t unknown = message->payload.u64 & ~vb_device_features(device);

    if (unknown) {
        return vb_device_drop(device, "feature bits 0x%" PRIx64 " were not offered", unknown);
    }
    return true;
}

static bool check_protocol_features(struct vb_device *device, const VhostUserMsg *message)
{
    uint64_t unknown = message->payload.u64 & ~vb_device_protocol_features();

    if (unknown) {
        return vb_device_drop(device, "protocol feature bits 0x%" PRIx64 " were not offered", unknown);
    }
    return true;
}

static bool check_config(struct vb_device *device, const VhostUserMsg *message)
{
    VhostUserConfig config = message->payload.config;
    uint32_t header = offsetof(VhostUserConfig, region);

    if (message->size < header || config.size != message->size - header ||
        config.size > sizeof(config.region) || config.offset > sizeof(config.region) ||
        config.offset + config.size > sizeof(config.region)) {
        return vb_device_drop(device, "configuration space: %u bytes at offset %u in a message of %u",
                              config.size, config.offset, message->size);
    }
    return true;
}

static bool check_set_config(struct vb_device *device, const VhostUserMsg *message)
{
    VhostUserConfig config = message->payload.config;

    if (!check_config(device, message)) {
        return false;
    }
    if (config.offset != VB_BLK_CONFIG_WRITEBACK || config.size != 1) {
        return vb_device_drop(device, "configuration space: only the field `writeback` may be written, "
                              "not %u bytes at offset %u", config.size, config.offset);
    }
    return true;
}

static bool check_log_base(struct vb_device *device, const VhostUserMsg *message)
{
    VhostUserLog log = message->payload.log;

    if (log.mmap_size == 0 || log.mmap_size > AREA_MAX ||
        !file_covers(message->fds[0], log.mmap_offset, log.mmap_size)) {
        return vb_device_drop(device, "dirty log of 0x%" PRIx64 " bytes cannot be mapped from its file",
                              (uint64_t)log.mmap_size);
    }
    return true;
}

static bool check_inflight_counts(struct vb_device *device, const VhostUserInflight *inflight)
{
    if (inflight->num_queues == 0 || inflight->num_queues > device->export_->num_queues ||
        inflight->queue_size == 0 || inflight->queue_size > VB_QUEUE_SIZE_MAX) {
        return vb_device_drop(device, "in-flight area for %u queues of %u", inflight->num_queues,
                              inflight->queue_size);
    }
    return true;
}

static bool check_get_inflight(struct vb_device *device, const VhostUserMsg *message)
{
    VhostUserInflight inflight = message->payload.inflight;

    return check_stopped(device, message) && check_inflight_counts(device, &inflight);
}

uint64_t vb_inflight_bytes(uint16_t queue_size)
{
    return (sizeof(VuVirtqInflight) + queue_size * sizeof(VuDescStateSplit) + 63) & ~63ull;
}

static bool check_set_inflight(struct vb_device *device, const VhostUserMsg *message)
{
    VhostUserInflight inflight = message->payload.inflight;
    uint64_t queue = vb_inflight_bytes(inflight.queue_size);

    if (!check_stopped(device, message) || !check_inflight_counts(device, &inflight)) {
        return false;
    }
    if (inflight.mmap_size < queue * inflight.num_queues || inflight.mmap_size > AREA_MAX ||
        !file_covers(message->fds[0], inflight.mmap_offset, inflight.mmap_size)) {
        return vb_device_drop(device, "in-flight area of 0x%" PRIx64 " bytes is too small or too large, or "
                              "cannot be mapped from its file", inflight.mmap_size);
    }
    return true;
}

/* ---- the table ------------------------------------------------------------------------- */

#define U64 sizeof(uint64_t)
#define STATE sizeof(struct vhost_vring_state)

static const struct message_rule rules[] = {
    {VHOST_USER_GET_FEATURES, 0, 0, 0, VB_NEEDS_NOTHING, NULL},
    {VHOST_USER_SET_FEATURES, U64, 0, 0, VB_NEEDS_DRAIN, check_features},
    {VHOST_USER_SET_OWNER, 0, 0, 0, VB_NEEDS_NOTHING, NULL},
    {VHOST_USER_RESET_OWNER, 0, 0, 0, VB_NEEDS_DRAIN, NULL},
    {VHOST_USER_SET_MEM_TABLE, ANY_SIZE, 0, FDS_MAX, VB_NEEDS_DRAIN, check_mem_table},
    {VHOST_USER_SET_LOG_BASE, sizeof(VhostUserLog), 1, 1, VB_NEEDS_DRAIN, check_log_base},
    {VHOST_USER_SET_LOG_FD, ANY_SIZE, 1, 1, VB_NEEDS_PARK, NULL},
    {VHOST_USER_SET_VRING_NUM, STATE, 0, 0, VB_NEEDS_DRAIN, check_num},
    {VHOST_USER_SET_VRING_ADDR, sizeof(struct vhost_vring_addr), 0, 0, VB_NEEDS_DRAIN, check_addr},
    {VHOST_USER_SET_VRING_BASE, STATE, 0, 0, VB_NEEDS_DRAIN, check_base},
    {VHOST_USER_GET_VRING_BASE, STATE, 0, 0, VB_NEEDS_FINISH, check_state},
    {VHOST_USER_SET_VRING_KICK, U64, 0, 1, VB_NEEDS_DRAIN, check_kick},
    {VHOST_USER_SET_VRING_CALL, U64, 0, 1, VB_NEEDS_PARK, check_call},
    {VHOST_USER_SET_VRING_ERR, U64, 0, 1, VB_NEEDS_PARK, check_vring_fd},
    {VHOST_USER_GET_PROTOCOL_FEATURES, 0, 0, 0, VB_NEEDS_NOTHING, NULL},
    {VHOST_USER_SET_PROTOCOL_FEATURES, U64, 0, 0, VB_NEEDS_PARK, check_protocol_features},
    {VHOST_USER_GET_QUEUE_NUM, 0, 0, 0, VB_NEEDS_NOTHING, NULL},
    {VHOST_USER_SET_VRING_ENABLE, STATE, 0, 0, VB_NEEDS_PARK, check_state},
    {VHOST_USER_SET_BACKEND_REQ_FD, 0, 1, 1, VB_NEEDS_NOTHING, NULL},
    {VHOST_USER_GET_CONFIG, ANY_SIZE, 0, 0, VB_NEEDS_NOTHING, check_config},
    {VHOST_USER_SET_CONFIG, ANY_SIZE, 0, 0, VB_NEEDS_NOTHING, check_set_config},
    {VHOST_USER_GET_INFLIGHT_FD, sizeof(VhostUserInflight), 0, 0, VB_NEEDS_DRAIN,
     check_get_inflight},
    {VHOST_USER_SET_INFLIGHT_FD, sizeof(VhostUserInflight), 1, 1, VB_NEEDS_DRAIN,
     check_set_inflight},
    {VHOST_USER_GET_MAX_MEM_SLOTS, 0, 0, 0, VB_NEEDS_NOTHING, NULL},
    {VHOST_USER_ADD_MEM_REG, sizeof(VhostUserMemRegMsg), 1, 1, VB_NEEDS_PARK, check_add_mem_reg},
    {VHOST_USER_REM_MEM_REG, sizeof(VhostUserMemRegMsg), 0, 1, VB_NEEDS_DRAIN, NULL},
};

static const struct message_rule *find_rule(int request)
{
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) {
        if (rules[i].request == request) {
            return &rules[i];
        }
    }
    return NULL;
}

enum vb_message_needs vb_message_needs(int request)
{
    return find_rule(request)->needs;
}

static bool check(struct vb_device *device, const VhostUserMsg *message)
{
    const struct message_rule *rule = find_rule(message->request);
    const char *name = vu_request_to_string((unsigned)message->request);

    if (!rule) {
        return vb_device_drop(device, "unexpected message %d", message->request);
    }
    if (rule->size != ANY_SIZE && message->size != rule->size) {
        return vb_device_drop(device, "%s with %u bytes instead of %u", name, message->size,
                              rule->size);
    }
    if (message->fd_num < rule->fds_min || message->fd_num > rule->fds_max) {
        return vb_device_drop(device, "%s with %d file descriptors", name, message->fd_num);
    }
    return !rule->check || rule->check(device, message);
}

/* ---- reading ------------------------------------------------------------------------------ */

/* The descriptors of one part of the header; false if there were more than fit. */
static bool take_fds(VhostUserMsg *message, struct msghdr *header)
{
    bool fits = !(header->msg_flags & MSG_CTRUNC);

    for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part)) {
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        for (size_t i = 0; i < count; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(part) + i * sizeof(fd), sizeof(fd));
            if (message->fd_num < FDS_MAX) {
                message->fds[message->fd_num++] = fd;
            } else {
                close(fd);
                fits = false;
            }
        }
    }
    return fits;
}

/* Reads exactly `length` bytes. 1: done, 0: the peer hung up before the first, -1: failed. */
static int read_all(struct vb_device *device, int sock, VhostUserMsg *message, void *to,
                    size_t length)
{
    size_t have = 0;

    while (have < length) {
        char control[CMSG_SPACE(FDS_MAX * sizeof(int))];
        struct iovec iov = {(char *)to + have, length - have};
        struct msghdr header = {
            .msg_iov = &iov,
            .msg_iovlen = 1,
            .msg_control = control,
            .msg_controllen = sizeof(control),
        };
        ssize_t got = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);

        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            vb_device_drop(device, "cannot read from the socket: %s", strerror(errno));
            return -1;
        }
        if (!take_fds(message, &header)) {
            vb_device_drop(device, "a message with more than %d file descriptors", FDS_MAX);
            return -1;
        }
        if (got == 0) {
            return have == 0 ? 0 : -1;
        }
        have += (size_t)got;
    }
    return 1;
}

static bool read_message(struct vb_device *device, int sock, VhostUserMsg *message)
{
    int got = read_all(device, sock, message, message, HEADER_SIZE);

    if (got == 0) {
        return false; /* a clean end, no reason to report */
    }
    if (got > 0 && ((message->flags & VHOST_USER_VERSION_MASK) != VERSION ||
                    (message->flags & VHOST_USER_REPLY_MASK))) {
        return vb_device_drop(device, "a message with flags 0x%x, not a vhost-user request",
                              message->flags);
    }
    if (got > 0 && message->size > sizeof(message->payload)) {
        return vb_device_drop(device, "message %d of %u bytes, more than any has", message->request,
                              message->size);
    }
    if (got > 0 && message->size > 0) {
        got = read_all(device, sock, message, &message->payload, message->size);
    }
    if (got <= 0) {
        return vb_device_drop(device, "the front-end hung up in the middle of a message");
    }
    return check(device, message);
}

bool vb_message_read(VuDev *vu, int sock, VhostUserMsg *message)
{
    struct vb_device *device = vb_container_of(vu, struct vb_device, vu);

    memset(message, 0, sizeof(*message));
    if (read_message(device, sock, message)) {
        return true;
    }
    for (int i = 0; i < message->fd_num; i++) {
        close(message->fds[i]);
    }
    return false;
}
