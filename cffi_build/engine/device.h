/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * device.h: one vhost-user-blk connection, and who owns which part of it.
 *
 *   vb_export   the drive's outside: options, statistics, the root of its tree.
 *               Control makes and frees it; it outlives connections.
 *   vb_device   one connection. Its device thread runs libvhost-user, one message
 *               at a time.
 *   vb_lane     the device's virtqueues on one I/O thread.
 *   vb_queue    one virtqueue: popped, completed and notified by its lane's thread. What
 *               comes between for a request may be another thread's (virtqueue.c, "help").
 *
 * What the library's messages change (memory table, rings, file descriptors) is
 * read by I/O threads without a lock. So the device thread *parks* the lanes
 * around each such message: a parked lane touches neither rings nor memory table.
 * Messages after which buffers may be gone, or the used ring may not move, park
 * with a drain: the lane first finishes what is in flight.
 */
#ifndef VB_DEVICE_H
#define VB_DEVICE_H

#include <pthread.h>
#include <semaphore.h>

#include "engine.h"
#include "libvhost-user.h"

/* vhost-user.rst: a ring has at most 32768 entries; QEMU's limit is 1024, and ours. */
#define VB_QUEUE_SIZE_MAX 1024
/* 126 data segments, a header and a status make up QEMU's default queue size of 128. */
#define VB_BLK_SEGMENTS_MAX 126
/* Of one discard or write-zeroes request. */
#define VB_BLK_RANGES_MAX 32
#define VB_BLK_INLINE_IOV 8
/* Longer arrays of buffers are not kept: a ring of requests with 1000 each would hold 17 MiB. */
#define VB_BLK_KEPT_IOV 64
/* Buffers may cross memory regions, so a chain can have a few more parts than descriptors. */
#define VB_CHAIN_IOV_MAX (VB_QUEUE_SIZE_MAX + 64)
/* x86-64's, and by definition that of vhost-user's dirty log. */
#define VB_PAGE_SIZE 4096

/* What a message needs of the lanes before the library may see it; also their state now. */
enum vb_message_needs {
    VB_NEEDS_NOTHING,
    VB_NEEDS_PARK,
    VB_NEEDS_DRAIN,  /* nothing is in flight */
    VB_NEEDS_FINISH, /* and what a dead predecessor left in flight has been done too */
};

/* A guest's request, from pop to push. One per ring entry, indexed by the head descriptor. */
struct vb_blk_request {
    struct vb_request request;
    struct vb_queue *queue;
    uint16_t head;
    bool busy;              /* popped and not yet pushed */
    uint8_t *status;        /* guest memory: the virtio_blk_req's last byte */
    uint32_t written;       /* bytes written to guest memory, status included */
    uint32_t parts;         /* ranges of a discard still in flight */
    int part_ret;           /* first error among them */
    struct vb_pieces *pieces; /* of a large one in flight: virtio_blk.c's */
    uint32_t iov_room;      /* entries of `iov` */
    struct iovec *iov;      /* inline_iov, or from malloc once a chain was longer */
    struct iovec inline_iov[VB_BLK_INLINE_IOV];
    struct vb_message message; /* between the queue's thread and the one that helps it */
};

struct vb_queue {
    struct vb_queue *next; /* in the lane */
    struct vb_lane *lane;
    struct vb_watch kick;
    uint16_t index;
    VuVirtq *vq;
    int kick_fd;           /* watched; the device thread's view */
    bool enabled;          /* SET_VRING_ENABLE; the device thread's */
    /* Set by the device thread while the lane is parked. */
    bool mapped;           /* started, with its ring in guest memory */
    bool running;          /* mapped and enabled */
    bool event_idx;
    bool indirect;
    bool log;              /* dirty pages are recorded */
    uint16_t num;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    struct vb_blk_request *requests; /* [num] */
    uint16_t resubmit_num, resubmit_next;
    uint16_t resubmit[VB_QUEUE_SIZE_MAX]; /* heads to start first, found in the in-flight area */
    /* The lane's own. */
    bool kicks_wanted;     /* the guest was asked to kick */
    bool signalled_valid;  /* signalled_used means something */
    uint16_t signalled_used;
    uint16_t batch_used;
    struct vring_used_elem batch[VB_QUEUE_SIZE_MAX]; /* completed, not yet in the ring */
};

struct vb_lane {
    struct vb_poller poller;
    struct vb_device *device;
    struct vb_iothread *thread;
    struct vb_queue *queues;        /* those that were ever started */
    uint32_t inflight;              /* popped and not yet in the used ring */
    _Atomic uint64_t inflight_seen; /* the same, for control to read */
    bool parked;
    bool broken;                    /* the guest violated the protocol: pop no more */
    uint32_t paused;                /* depth of vb_export_pause() */
    struct vb_park *parking;        /* wants to hear when all is finished */
    struct vb_pause *pausing;       /* likewise; a list */
    struct vb_message attach, unpark, detach;
    struct vb_iothread *helper;     /* another of the export's threads; NULL if it has one only */
    uint64_t request_ns;            /* what starting a request took lately; with a helper */
    uint32_t give;                  /* so many of the next requests are the helper's */
    uint32_t region;                /* index of the memory region used last */
    struct iovec chain[VB_CHAIN_IOV_MAX]; /* while a chain is parsed */
};

struct vb_device {
    VuDev vu;
    struct vb_export *export_;
    pthread_t thread;
    int wake_fd;            /* eventfd: look at the flags below */
    int shutdown_fd;        /* a duplicate of the socket, to interrupt a blocking read */
    _Atomic bool stop;
    _Atomic bool config_changed;
    _Atomic(const char *) violation; /* by the guest, found on an I/O thread; a literal */
    _Atomic uint32_t queues_running, regions;
    _Atomic uint64_t features, protocol_features;
    _Atomic uint32_t lanes_left;     /* to detach; the last one frees the device */
    enum vb_message_needs parked; /* the device thread's view of the lanes */
    bool connected_posted;
    uint16_t inflight_queue_size;
    int ret;                /* 0, or why the connection was dropped */
    char reason[VB_EVENT_TEXT];
    uint32_t num_lanes;
    uint16_t num_queues;
    struct vb_lane *lanes;   /* [num_lanes] */
    struct vb_queue *queues; /* [num_queues] */
    struct vb_shared *shared; /* guest_fault.c's */
    struct vb_message gone;
};

struct vb_export {
    struct vb_engine *engine;
    uint64_t cookie;
    uint16_t num_queues;
    uint32_t logical_block_size;
    bool writable;
    char serial[VB_SERIAL_SIZE + 1];
    char id[64];
    uint32_t num_iothreads;
    struct vb_iothread *iothreads[VB_MAX_IOTHREADS];
    struct vb_node *root;          /* read by lanes; control changes it while they are paused */
    _Atomic uint64_t capacity;
    _Atomic bool writeback_wanted; /* config space `writeback`; kept from connection to connection */
    struct vb_device *device;      /* control's */
    uint32_t pause_depth;          /* control's */
    char reason[VB_EVENT_TEXT];    /* control's copy of the last device's */
    _Atomic uint64_t connections, broken, resubmitted, unsupported;
    _Atomic(struct vb_stats *) stats[VB_MAX_IOTHREADS];
};

/* Shared by the lanes of one vb_export_pause(); the last one posts the event and frees it. */
struct vb_pause_round {
    struct vb_message paused;
    struct vb_export *export_;
    _Atomic uint32_t lanes_left;
};

/* ---- device.c ------------------------------------------------------------------- */

int vb_device_start(struct vb_export *export_, int sock, char *error); /* control */
void vb_device_stop(struct vb_device *device);                         /* control */
void vb_device_wake(struct vb_device *device);                         /* any */
void vb_device_pause(struct vb_device *device, struct vb_pause_round *round); /* control */
void vb_device_resume(struct vb_device *device);                              /* control */
void vb_pause_settled(struct vb_pause_round *round);                          /* any */
/* Lane's thread: the guest broke the rules; ends the connection, and only that. */
void vb_device_violation(struct vb_lane *lane, const char *what);

/* Device thread: remember why the connection ends; the first reason counts. Returns false. */
bool vb_device_drop(struct vb_device *device, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Offered feature bits: virtio's and vhost-user's, exactly; the library's own set is wider. */
uint64_t vb_device_features(const struct vb_device *device);
uint64_t vb_device_protocol_features(void);

/* ---- vhost_message.c --------------------------------------------------------------- */

/* VuDev.read_msg: one message from the socket, checked; false ends the connection. */
bool vb_message_read(VuDev *vu, int sock, VhostUserMsg *message);
enum vb_message_needs vb_message_needs(int request);
/* Of one queue in the in-flight area, as libvhost-user lays it out: header, descriptors, on 64. */
uint64_t vb_inflight_bytes(uint16_t queue_size);
/* A ring's three parts in this process; false if one is unaligned or not inside one region. */
struct vb_ring {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
};
bool vb_ring_resolve(const VuDev *vu, const struct vhost_vring_addr *addr, uint32_t num,
                     struct vb_ring *ring);

/* ---- guest_fault.c ----------------------------------------------------------------- */

int vb_guest_fault_protect(struct vb_device *device); /* control: 0, or -ENOMEM */
void vb_guest_fault_handling(struct vb_device *device); /* device thread: NULL when it is done */
void vb_guest_fault_watch(struct vb_device *device);  /* device thread: what is mapped has changed */
void vb_guest_fault_unwatch(struct vb_device *device); /* device thread: it is about to change */
void vb_guest_fault_forget(struct vb_device *device); /* before it is unmapped; again does no harm */

/* Zero pages in place of memory that a front-end shared; and nothing in its place. Any thread. */
bool vb_guest_fault_put_zeroes(uintptr_t start, size_t length);
int vb_guest_fault_unmap(void *address, size_t length);

/* ---- virtqueue.c -------------------------------------------------------------------- */

bool vb_queue_poll(struct vb_queue *queue);  /* pop and start; true if there was something */
bool vb_queue_resubmit(struct vb_queue *queue); /* start what a predecessor left; true if any */
bool vb_queue_flush(struct vb_queue *queue); /* push what completed and notify; true if any */
bool vb_queue_arm(struct vb_queue *queue);   /* ask for kicks; true: there is work already */
void vb_queue_complete(struct vb_blk_request *blk); /* into the batch for the next flush */
/* Device thread, parked, when the ring starts: take over from whoever served it last. */
void vb_queue_recover(struct vb_queue *queue);
/* Device thread: record the guest's write cache setting for whoever serves this ring next. */
void vb_queue_note_writeback(struct vb_queue *queue, bool writeback);

/* ---- virtio_blk.c ---------------------------------------------------------------------- */

/*
 * Start the request in the chain out[0..nout) + in[0..nin), which lies in
 * lane->chain. False if it is no virtio-blk request at all.
 */
bool vb_blk_start(struct vb_blk_request *blk, struct iovec *out, uint32_t nout,
                  struct iovec *in, uint32_t nin);
/* The request is in the used ring: give back what memory it has that most do not need. */
void vb_blk_release(struct vb_blk_request *blk);
uint64_t vb_blk_features(const struct vb_export *export_);
#define VB_BLK_CONFIG_SIZE 60
void vb_blk_config(const struct vb_export *export_, uint8_t config[VB_BLK_CONFIG_SIZE]);
#define VB_BLK_CONFIG_WRITEBACK 32 /* offset of the only field a driver may write */

#endif
