/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * engine.h: a small asynchronous block layer.
 *
 * A request (operation, offset, length, buffers) enters at the root of a tree of
 * nodes and travels down through vb_node_ops.submit; its completion runs
 * request->done. A request stays on one I/O thread from birth to completion, so
 * nothing on its way takes a lock or needs an atomic. Threads talk by messages:
 * a vb_mailbox is a lock-free list that many push to and one takes from.
 *
 * Contexts. Each function below runs on the I/O thread that owns its argument,
 * unless a comment says "control" (Python's thread) or "any". VB_DEBUG builds
 * assert it.
 */
#ifndef VB_ENGINE_H
#define VB_ENGINE_H

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "api.h"

#ifdef VB_DEBUG
#define vb_assert(condition) assert(condition)
#else
#define vb_assert(condition) ((void)sizeof(condition))
#endif

/*
 * Around writing to guest memory. A guest orders its requests by itself, whatever threads serve
 * them: to ThreadSanitizer, which sees this process only, two buffers in one place look like a race.
 */
#ifdef __SANITIZE_THREAD__
void AnnotateIgnoreWritesBegin(const char *file, int line); /* libtsan's */
void AnnotateIgnoreWritesEnd(const char *file, int line);
#define vb_guest_write_begin() AnnotateIgnoreWritesBegin(__FILE__, __LINE__)
#define vb_guest_write_end() AnnotateIgnoreWritesEnd(__FILE__, __LINE__)
#else
#define vb_guest_write_begin() ((void)0)
#define vb_guest_write_end() ((void)0)
#endif

#define VB_MAX_IOTHREADS 64

#define vb_container_of(pointer, type, member) \
    ((type *)((char *)(pointer) - offsetof(type, member)))

/* ---- messages between threads ------------------------------------------------ */

/*
 * Embedded in what it is about; belongs to the receiver from the push until
 * run() is called. `context` is the receiver: a vb_iothread, or for the control
 * mailbox the vb_event to fill.
 */
struct vb_message {
    struct vb_message *next;
    void (*run)(struct vb_message *message, void *context);
};

struct vb_mailbox {
    _Atomic(struct vb_message *) head; /* newest first */
    _Atomic bool asleep;               /* the receiver needs the event fd to notice */
    int event_fd;
};

int vb_mailbox_init(struct vb_mailbox *mailbox);
void vb_mailbox_destroy(struct vb_mailbox *mailbox);
void vb_mailbox_push(struct vb_mailbox *mailbox, struct vb_message *message); /* any */
void vb_mailbox_wake(struct vb_mailbox *mailbox);                             /* any */
struct vb_message *vb_mailbox_take(struct vb_mailbox *mailbox); /* all of it, oldest first */

/* ---- requests ------------------------------------------------------------------ */

#define VB_PATH_MAX 16
#define VB_SCRATCH_SIZE 192

struct vb_request {
    uint8_t op;          /* VB_OP_* */
    uint8_t depth;       /* used entries of path */
    uint16_t flags;      /* VB_REQ_* */
    int32_t ret;         /* set by vb_complete: 0 or negative errno */
    uint64_t offset;
    uint64_t bytes;      /* read, write: the sum of iov */
    struct iovec *iov;   /* the creator's; nodes read it and never change it */
    uint32_t niov;
    uint64_t start_ns;   /* when it was created */
    struct vb_iothread *thread;
    void (*done)(struct vb_request *request); /* takes the request back from the tree */
    void *owner;         /* the creator's */
    /*
     * Reads. If not NULL, who has all that is read in memory may call this instead of copying it to
     * iov: once, with all of it, or, if take_unit is not 0, again and again, with the next so many
     * units each time. When all has been taken, `taken` is set, unless what was in memory has turned
     * out to be worthless meanwhile: then it goes on as if this had not been called.
     */
    void (*take)(struct vb_request *request, const void *data, uint64_t position, uint64_t bytes);
    uint32_t take_unit;
    bool taken;
    struct vb_request *next; /* in a free list */
    struct vb_node *path[VB_PATH_MAX]; /* nodes passed, for their statistics */
    /* Private to the node that has the request; gone once it is passed on. */
    _Alignas(16) unsigned char scratch[VB_SCRATCH_SIZE];
};

/*
 * Requests of a node's own (a leg's copy, a bounce buffer's). Never fail: the
 * pool grows. The creator sets op, flags, offset, bytes, iov, niov, done, owner.
 */
struct vb_request *vb_request_new(struct vb_iothread *thread);
void vb_request_free(struct vb_request *request);

/* Hands the request to `node`, which owns it until it calls vb_complete(). */
void vb_submit(struct vb_node *node, struct vb_request *request);

/* Zeroed; or the end of the process: for what nothing can go on without. */
void *vb_must_alloc(size_t size);

/* Memory that is about to be read: its way into the cache begins now, all of it at once. */
static inline void vb_prefetch(const void *memory, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch((const char *)memory + at);
    }
}

/* The data of a read, into its iovec. */
void vb_request_fill(struct vb_request *request, const void *data);
/* Some of the data, at least one byte from `position` on: of a write, and of a read. */
void vb_request_get(const struct vb_request *request, uint64_t position, void *to, uint64_t bytes);
void vb_request_put(struct vb_request *request, uint64_t position, const void *from,
                    uint64_t bytes);
/* Whether all the data of a write are zeroes. */
bool vb_request_is_zero(const struct vb_request *request);

/* Ends the request: counts it for every node on its path, then calls done(). */
void vb_complete(struct vb_request *request, int ret);

/*
 * Page-aligned memory for data that a node must hold itself; NULL if there is none. Give it
 * back with the same size, on the same thread.
 */
#define VB_BUFFER_CLASSES 9
void *vb_buffer_get(struct vb_iothread *thread, size_t size);
void vb_buffer_put(struct vb_iothread *thread, void *memory, size_t size);
void vb_buffers_free(struct vb_iothread *thread); /* the thread has ended */

/* ---- nodes ---------------------------------------------------------------------- */

struct vb_node_ops {
    const char *name;
    /* Start the request; may complete it before returning. */
    void (*submit)(struct vb_node *node, struct vb_request *request);
    /* Control: free what the node owns besides its vb_node. */
    void (*destroy)(struct vb_node *node);
};

/* First member of each driver's own structure, which vb_node_free() frees. */
struct vb_node {
    const struct vb_node_ops *ops;
    struct vb_engine *engine;
    struct vb_node *children[VB_MAX_CHILDREN];
    /* One per I/O thread, made by that thread at its first request here. */
    _Atomic(struct vb_stats *) stats[VB_MAX_IOTHREADS];
};

/* Control: zeroed memory of `size` bytes whose first member is a vb_node; NULL and `error`. */
void *vb_node_alloc(struct vb_engine *engine, const struct vb_node_ops *ops, size_t size,
                    char *error);

/* ---- statistics ------------------------------------------------------------------- */

/* One completed operation into this thread's own statistics; `stats` is created on demand. */
void vb_stats_account(_Atomic(struct vb_stats *) *stats, const struct vb_iothread *thread,
                      unsigned op, int ret, uint64_t bytes, uint64_t latency_ns);
/* One that the device refused: out of bounds, not aligned, a write to a read-only disk. */
void vb_stats_refused(_Atomic(struct vb_stats *) *stats, const struct vb_iothread *thread,
                      unsigned op);
/* Control: the sum over the threads, read without disturbing them. */
void vb_stats_sum(_Atomic(struct vb_stats *) *stats, struct vb_stats *sum);
void vb_stats_free(_Atomic(struct vb_stats *) *stats); /* control */

/* ---- timers ------------------------------------------------------------------------ */

struct vb_timer {
    uint64_t deadline_ns;
    void (*expired)(struct vb_timer *timer);
    uint32_t slot; /* place in the thread's heap */
};

/* `delay_ns` from now; one that is as good as for ever does not come round to the past. */
static inline uint64_t vb_deadline(const struct vb_iothread *thread, uint64_t delay_ns);
void vb_timer_start(struct vb_iothread *thread, struct vb_timer *timer, uint64_t deadline_ns);
void vb_timer_stop(struct vb_iothread *thread, struct vb_timer *timer);

/* ---- asynchronous file I/O ----------------------------------------------------------- */

#define VB_AIO_READV 0
#define VB_AIO_WRITEV 1
#define VB_AIO_FDATASYNC 2
#define VB_AIO_FALLOCATE 3

/* One system call, to be made somewhere where it may wait. Belongs to the backend until done(). */
struct vb_aio {
    struct vb_message message; /* the backend's */
    uint32_t opcode;           /* VB_AIO_* */
    int fd;
    int flags;                 /* readv, writev: RWF_*; fallocate: mode */
    uint32_t niov;
    const struct iovec *iov;
    uint64_t offset;
    uint64_t length;           /* fallocate */
    bool elsewhere;            /* would keep the thread busy even if it says not to wait */
    int result;                /* bytes, or negative errno; short transfers are the caller's to continue */
    void (*done)(struct vb_aio *aio);
    struct vb_iothread *thread; /* set by vb_aio_submit */
};

/* How an I/O thread sleeps and does file I/O: io_uring, or epoll and a pool of threads. */
struct vb_aio_backend {
    uint32_t kind; /* VB_AIO_IO_URING or VB_AIO_THREADS */
    /* On the I/O thread, before anything else; 0 or negative errno and `error`. */
    int (*init)(struct vb_iothread *thread, char *error);
    /* Accept one operation; it need not reach the kernel before poll() or wait(). */
    void (*submit)(struct vb_iothread *thread, struct vb_aio *aio);
    /*
     * Pass on what was submitted and call done() for what has completed, without
     * sleeping; true if anything completed. Costs nothing if nothing is outstanding.
     */
    bool (*poll)(struct vb_iothread *thread);
    /*
     * Like poll(), but sleeps until an operation completes, thread->epoll_fd is
     * readable or timeout_ns have passed (UINT64_MAX: for ever). May return early.
     * True if epoll_fd may be readable.
     */
    bool (*wait)(struct vb_iothread *thread, uint64_t timeout_ns);
    void (*destroy)(struct vb_iothread *thread); /* nothing is outstanding */
};

extern const struct vb_aio_backend vb_aio_uring;
extern const struct vb_aio_backend vb_aio_threads;

static inline void vb_aio_submit(struct vb_iothread *thread, struct vb_aio *aio);

/* ---- I/O threads --------------------------------------------------------------------- */

/* An fd that wakes the thread. ready() only notes the fact: it may not free anything. */
struct vb_watch {
    void (*ready)(struct vb_watch *watch);
};

/* A source of requests, asked each time round the loop. */
struct vb_poller {
    struct vb_poller *next;
    bool (*poll)(struct vb_poller *poller);  /* start what is there; true if there was something */
    bool (*flush)(struct vb_poller *poller); /* pass on what has completed; true if any had */
    bool (*arm)(struct vb_poller *poller);   /* before sleeping: ask to be woken; true: stay awake */
};

/* Pages that had to be made ready, and those for which a disk had to be waited for. */
struct vb_page_faults {
    uint64_t minor, major;
};

struct vb_iothread {
    struct vb_engine *engine;
    uint32_t index;           /* into per-thread arrays, below VB_MAX_IOTHREADS */
    uint64_t now_ns;          /* clock, read once a sweep and after each system call that took time */
    struct vb_mailbox mailbox;
    int epoll_fd;             /* watches; the mailbox's event fd is one of them */
    const struct vb_aio_backend *aio;
    void *aio_state;          /* the backend's */
    uint32_t aio_threads_max; /* VB_AIO_THREADS: most threads in the pool */
    struct vb_poller *pollers;
    struct vb_request *free_requests;
    struct free_buffer *free_buffers[VB_BUFFER_CLASSES];
    uint32_t free_buffer_counts[VB_BUFFER_CLASSES];
    struct vb_timer **timers; /* binary heap, earliest first */
    uint32_t timers_used, timers_size;
    struct vb_timer trim;     /* file_map.c's */
    bool trimming;            /* it is running */
    struct vb_page_faults page_faults; /* of this thread, when last looked at: file_map.c's */
    uint64_t max_sleep_ns;    /* set by arm(), for one sleep */
    _Atomic uint64_t poll_max_ns, poll_grow, poll_shrink; /* written by control at any time */
    _Atomic uint64_t poll_ns;
    _Atomic bool spinning;    /* has nothing to do, and would see a message at once */
    uint64_t helped_ns;       /* when it was last called, or did something for another thread */
    _Atomic bool called;      /* vb_iothread_call(): somebody is about to have work for it */
    /* Counters: this thread writes, control reads. */
    _Atomic uint64_t loops, sleeps, requests, notifies, inline_ios, mapped_ios, queued_ios,
        shared_requests;
    /* Set before the thread runs, or by control. */
    struct vb_iothread_start *start;
    char name[64];
    char fallback[VB_ERROR_SIZE];
    _Atomic int32_t thread_id;
    bool stop;
};

static inline void vb_aio_submit(struct vb_iothread *thread, struct vb_aio *aio)
{
    aio->thread = thread;
    thread->aio->submit(thread, aio);
}

/* A counter with one writer: no read-modify-write on the bus. */
static inline void vb_count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n,
                          memory_order_relaxed);
}

uint64_t vb_clock_ns(void); /* any */

/* First value of a time to spin when it grows from zero; QEMU's. */
#define VB_POLL_NS_START 4000

/*
 * How long to spin after having been idle for `idle_ns`, spinning included, as in QEMU's AioContext: longer (`grow`
 * times, 0 for 2) if that would have caught what came, less (1/`shrink`, 0 for nothing) if nothing
 * up to `max_ns` would have.
 */
static inline uint64_t vb_adapt_poll(uint64_t poll_ns, uint64_t idle_ns, uint64_t max_ns,
                                     uint64_t grow, uint64_t shrink)
{
    uint64_t next;

    if (poll_ns > max_ns) {
        return max_ns;
    }
    if (idle_ns > max_ns) {
        return shrink ? poll_ns / shrink : 0;
    }
    if (idle_ns <= poll_ns || poll_ns == max_ns) {
        return poll_ns;
    }
    next = poll_ns ? poll_ns * (grow ? grow : 2) : VB_POLL_NS_START;
    return next < max_ns ? next : max_ns;
}

/* This is a loop that waits: let the CPU's other thread go first. */
static inline void vb_pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline void vb_refresh_now(struct vb_iothread *thread) { thread->now_ns = vb_clock_ns(); }

static inline uint64_t vb_deadline(const struct vb_iothread *thread, uint64_t delay_ns)
{
    return delay_ns < UINT64_MAX - thread->now_ns ? thread->now_ns + delay_ns : UINT64_MAX;
}

/* Its own: other threads look at it, so it is written only if it changes. */
static inline void vb_iothread_set_spinning(struct vb_iothread *thread, bool spinning)
{
    if (atomic_load_explicit(&thread->spinning, memory_order_relaxed) != spinning) {
        atomic_store_explicit(&thread->spinning, spinning, memory_order_relaxed);
    }
}

void vb_iothread_send(struct vb_iothread *thread, struct vb_message *message); /* any */
/* Wakes a thread that sleeps, and has it spin for a while even if there is nothing to do yet. */
void vb_iothread_call(struct vb_iothread *thread); /* another I/O thread */
void vb_iothread_add_poller(struct vb_iothread *thread, struct vb_poller *poller);
void vb_iothread_remove_poller(struct vb_iothread *thread, struct vb_poller *poller);
int vb_iothread_add_watch(struct vb_iothread *thread, int fd, struct vb_watch *watch); /* any */
void vb_iothread_remove_watch(struct vb_iothread *thread, int fd);                    /* any */
bool vb_in_iothread(const struct vb_iothread *thread); /* any; for assertions */

/*
 * Any: run(argument) once every I/O thread of the engine has finished what it is just doing, so that
 * it cannot hold a pointer any more that has been unlinked before.
 */
void vb_after_all_threads(struct vb_engine *engine, void (*run)(void *argument), void *argument);

/* Any: 0 or negative errno; run(argument) starts with the signals blocked that are not its own. */
int vb_thread_start(pthread_t *thread, size_t stack_size, void *(*run)(void *), void *argument);

/* ---- the control side ------------------------------------------------------------------ */

struct vb_engine {
    struct vb_mailbox control;      /* messages fill a vb_event each */
    struct vb_message *taken;       /* taken from the mailbox, not yet asked for */
    uint64_t poll_ns;               /* how long to spin for the next message */
    uint64_t idle_since;            /* when the last one was taken, or waiting for the next began */
    struct vb_iothread *iothreads[VB_MAX_IOTHREADS];
};

void vb_guest_fault_init(void); /* guest_fault.c; control; more than once does no harm */

/* Any thread: tell Python; message->run(message, event) fills the event on the control thread. */
void vb_engine_post(struct vb_engine *engine, struct vb_message *message);

/* printf into an error buffer of VB_ERROR_SIZE; returns `ret` for the caller to return. */
int vb_error(char *error, int ret, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
