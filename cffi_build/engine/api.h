/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * api.h: all that Python sees of the engine; what a kind of node has of its own
 * is in nodes/NAME.api.h, which is read the same way.
 *
 * This text has two readers: the C compiler includes it, and cffi parses it as
 * its cdef. So it holds plain declarations only: no #include, no #if, no
 * inline function. Lengths and offsets are bytes, times are nanoseconds of
 * CLOCK_MONOTONIC. A function that can fail returns 0 or a negative errno and
 * leaves a sentence for the operator in `error` (VB_ERROR_SIZE bytes).
 *
 * Unless a comment says otherwise, every function here is called from the
 * control thread (Python's asyncio thread) and returns without waiting for I/O.
 */

typedef struct vb_engine vb_engine;
typedef struct vb_iothread vb_iothread;
typedef struct vb_node vb_node;
typedef struct vb_export vb_export;

#define VB_ERROR_SIZE 256

/* Operations of a request. The order is that of vb_stats.op[]. */
#define VB_OP_READ 0
#define VB_OP_WRITE 1
#define VB_OP_FLUSH 2
#define VB_OP_DISCARD 3
#define VB_OP_WRITE_ZEROES 4
#define VB_OP_COUNT 5

/* Flags of a request. */
#define VB_REQ_FUA 1       /* write, write-zeroes: on stable storage before completion */
#define VB_REQ_MAY_UNMAP 2 /* write-zeroes: the range may be deallocated */
#define VB_REQ_GUEST 4     /* write: if we are killed, a guest repeats it; half a sector may be written */
#define VB_REQ_LITERAL 8   /* write: as data, even if they are zeroes */
#define VB_REQ_STABLE 16   /* write: nobody changes the data before it is complete */

/* ---- the engine: owner of everything below, one per process ---------------- */

vb_engine *vb_engine_new(char *error);
void vb_engine_free(vb_engine *engine); /* all threads, nodes, exports freed before */

/* Readable while vb_engine_poll() has something to say. Owned by the engine. */
int vb_engine_event_fd(vb_engine *engine);

/* ---- I/O threads ------------------------------------------------------------ */

#define VB_AIO_AUTO 0     /* io_uring where the kernel allows it, else threads */
#define VB_AIO_IO_URING 1
#define VB_AIO_THREADS 2

struct vb_iothread_options {
    uint64_t poll_max_ns; /* longest busy wait before sleeping; 0: never poll */
    uint64_t poll_grow;   /* factor by which the busy wait grows; 0 means 2 */
    uint64_t poll_shrink; /* divisor by which it shrinks; 0: straight to zero */
    uint32_t aio;         /* VB_AIO_* */
    uint32_t threads_max; /* size of the thread pool of VB_AIO_THREADS; 0 means 16 */
};

struct vb_iothread_info {
    int32_t thread_id;    /* gettid(), for psutil */
    uint32_t aio;         /* VB_AIO_IO_URING or VB_AIO_THREADS, what is really used */
    uint64_t poll_ns;     /* busy wait in force now */
    uint64_t loops;       /* times round the loop */
    uint64_t sleeps;      /* times it went to sleep */
    uint64_t requests;    /* requests popped */
    uint64_t notifies;    /* interrupts sent to guests */
    uint64_t inline_ios;  /* file I/O served by the kernel at once */
    uint64_t mapped_ios;  /* file reads served from a mapping, without the kernel */
    uint64_t queued_ios;  /* file I/O that had to wait */
    uint64_t shared_requests; /* carried out for another I/O thread */
};

vb_iothread *vb_iothread_new(vb_engine *engine, const char *name,
                             const struct vb_iothread_options *options, char *error);
void vb_iothread_set_poll(vb_iothread *thread, uint64_t max_ns, uint64_t grow, uint64_t shrink);
void vb_iothread_query(vb_iothread *thread, struct vb_iothread_info *info);
/* Why VB_AIO_AUTO fell back to threads; "" if it did not. */
const char *vb_iothread_fallback_reason(vb_iothread *thread);
void vb_iothread_free(vb_iothread *thread); /* no export uses it; joins the thread */

/* ---- statistics -------------------------------------------------------------- */

/*
 * Latency histogram: log-linear, 8 buckets to the octave. Bucket 0 counts
 * everything below 128 ns; bucket i > 0 starts at vb_histogram_floor(i).
 */
#define VB_HISTOGRAM_BUCKETS 241

struct vb_stats_op {
    uint64_t ops;      /* completed, failed ones included */
    uint64_t errors;   /* completed with an error */
    uint64_t bytes;    /* of the successful ones */
    uint64_t total_ns; /* sum of the latencies */
    uint64_t invalid;  /* refused before they were started, in none of the other numbers */
    uint64_t histogram[VB_HISTOGRAM_BUCKETS];
};

struct vb_stats {
    struct vb_stats_op op[VB_OP_COUNT];
};

uint64_t vb_histogram_floor(uint32_t bucket);

/* ---- nodes -------------------------------------------------------------------- */
/*
 * A node is created for good: only its children change, and only while every
 * export that reaches it is paused (see vb_export_pause). A node is freed by
 * the control thread once no export and no other node can reach it.
 */

/*
 * upcall: requests whose operation is in op_mask (bit VB_OP_*) become
 * VB_EVENT_UPCALL events with `cookie` in vb_event.cookie; all others go to
 * child 0 unchanged. With op_mask 0 the node is pure pass-through.
 */
vb_node *vb_node_upcall_new(vb_engine *engine, uint32_t op_mask, uint64_t cookie, char *error);

#define VB_MAX_CHILDREN 32
void vb_node_set_child(vb_node *node, uint32_t index, vb_node *child);
void vb_node_stats(vb_node *node, struct vb_stats *stats);
void vb_node_free(vb_node *node);

/* ---- exports ------------------------------------------------------------------ */

#define VB_SERIAL_SIZE 20

struct vb_export_options {
    const char *id;               /* copied; for messages only */
    uint64_t cookie;              /* comes back in the export's events */
    uint64_t capacity;            /* bytes, a multiple of 512 */
    uint32_t logical_block_size;  /* power of two, 512..32768 */
    uint16_t num_queues;          /* 1..256 */
    bool writable;
    bool writethrough;            /* every write is followed by a flush until the guest asks otherwise */
    char serial[VB_SERIAL_SIZE + 1];
    uint32_t num_iothreads;       /* 1..; virtqueue i runs on iothreads[i % num_iothreads] */
    vb_iothread *const *iothreads; /* copied */
};

struct vb_export_info {
    bool connected;
    bool writeback;            /* the write cache is on: the guest sends flushes */
    uint64_t features;         /* negotiated virtio feature bits */
    uint64_t protocol_features;
    uint32_t queues_started;
    uint32_t memory_regions;
    uint64_t inflight;         /* requests popped and not yet completed */
    uint64_t resubmitted;      /* requests taken over from a dead predecessor */
    uint64_t connections;      /* accepted so far */
    uint64_t broken;           /* connections dropped because of a protocol violation */
    uint64_t unsupported;      /* requests of a type that there is none of */
};

vb_export *vb_export_new(vb_engine *engine, const struct vb_export_options *options, char *error);

/* The tree below the drive. Only before the first connection, or paused. */
void vb_export_set_root(vb_export *export_, vb_node *root);

/* A front-end has connected: the engine owns `sock` from here on, also on failure.
 * One connection at a time: -EBUSY until VB_EVENT_DISCONNECTED came. */
int vb_export_connect(vb_export *export_, int sock, char *error);

/* Ask for the connection to end; VB_EVENT_DISCONNECTED follows when it has. */
void vb_export_disconnect(vb_export *export_);

/*
 * Quiesce: no new request is popped, those in flight finish; then
 * VB_EVENT_PAUSED arrives once per call. Calls nest, each is matched by one
 * vb_export_resume(), which may only be called after its event.
 */
void vb_export_pause(vb_export *export_);
void vb_export_resume(vb_export *export_);

/* New size; a connected front-end is told (config-change message). Any time. */
void vb_export_set_capacity(vb_export *export_, uint64_t capacity);

void vb_export_query(vb_export *export_, struct vb_export_info *info);
void vb_export_stats(vb_export *export_, struct vb_stats *stats);
void vb_export_free(vb_export *export_); /* disconnected, not paused */

/* ---- events: from the engine to Python ------------------------------------------ */

#define VB_EVENT_UPCALL 1       /* a request for a filter in Python */
#define VB_EVENT_DONE 2         /* a request started with VB_COMMAND_SUBMIT has completed */
#define VB_EVENT_PAUSED 3       /* vb_export_pause() has taken effect */
#define VB_EVENT_CONNECTED 4    /* the front-end started its first queue */
#define VB_EVENT_DISCONNECTED 5 /* connection is gone, its memory unmapped; ret < 0: dropped, see text */
#define VB_EVENT_WRITEBACK 6    /* the guest switched its write cache; ret is 0 or 1 */
/*
 * The front-end waits for the requests in flight (its VM is stopped, its memory
 * changes, it is gone), and they take their time. ret 1: whoever holds requests back must let
 * go of them now; 0: it is over. DISCONNECTED ends it too.
 */
#define VB_EVENT_DRAINING 7
/* Queue `ret` has more entries than the record of requests in flight: a kill would lose some. */
#define VB_EVENT_UNRECORDED 8

/* A node has something to tell; what the other members mean, its header says. */
#define VB_EVENT_NODE 10

#define VB_EVENT_TEXT 160

struct vb_event {
    uint32_t kind;      /* VB_EVENT_* */
    int32_t ret;        /* 0 or negative errno */
    uint64_t cookie;    /* of the upcall node, the command or the export */
    uint64_t request;   /* UPCALL: handle for vb_command.request */
    uint64_t offset;    /* UPCALL */
    uint64_t bytes;     /* UPCALL */
    uint64_t iov;       /* UPCALL: address of a struct iovec array, guest memory */
    uint32_t niov;      /* UPCALL */
    uint16_t op;        /* UPCALL */
    uint16_t flags;     /* UPCALL */
    uint64_t reserved;
};

/*
 * Takes up to `max` events; returns how many. Also drains the event fd. With `wait`, if there is none
 * and the last ones came shortly one after the other, it spins for up to 32 µs.
 */
int vb_engine_poll(vb_engine *engine, struct vb_event *events, int max, bool wait);

/* Reason of the last VB_EVENT_DISCONNECTED with ret < 0, for one log line. */
void vb_export_reason(vb_export *export_, char *text); /* VB_EVENT_TEXT bytes */

/* ---- commands: from Python to the engine ------------------------------------------ */

#define VB_COMMAND_COMPLETE 1 /* finish upcall `request` with `ret` */
#define VB_COMMAND_FORWARD 2  /* hand upcall `request` to child `child` of its node; no event follows */
#define VB_COMMAND_SUBMIT 3   /* start a request of Python's own on `node` */
#define VB_COMMAND_RETRY 4    /* hand upcall `request` to its node once more; it may come up again */

/*
 * SUBMIT runs on the I/O thread of upcall `request`, or, with request 0, on
 * `thread`. Its data is `bytes` bytes from `buffer_offset` on: of the upcall's
 * guest memory if `buffer` is 0, else at address `buffer`, which the caller
 * keeps alive until VB_EVENT_DONE with `cookie` arrives.
 */
struct vb_command {
    uint32_t kind;          /* VB_COMMAND_* */
    int32_t ret;            /* COMPLETE */
    uint64_t request;
    uint64_t cookie;        /* SUBMIT */
    uint64_t node;          /* SUBMIT: address of a vb_node */
    uint64_t thread;        /* SUBMIT with request 0: address of a vb_iothread */
    uint64_t offset;        /* SUBMIT */
    uint64_t bytes;         /* SUBMIT */
    uint64_t buffer;        /* SUBMIT */
    uint64_t buffer_offset; /* SUBMIT */
    uint16_t op;            /* SUBMIT */
    uint16_t flags;         /* SUBMIT */
    uint32_t child;         /* FORWARD */
};

void vb_engine_submit(vb_engine *engine, const struct vb_command *commands, int count);

/*
 * Guest memory that a filter kept a view of after its request completed stays
 * mapped (as private zero pages) when its region goes away, so that a mistake
 * in a filter is an error and not a crash. Called when such a view is found.
 */
void vb_engine_keep_unmapped_memory(vb_engine *engine);

/* ---- about the build ---------------------------------------------------------------- */

const char *vb_build_libvhost_user(void); /* version and sha256 of the sources compiled in */
