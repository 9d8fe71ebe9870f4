/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/file.c: the drivers file and host_device, over an fd that Python opened
 * and locked. Their Python half is vhostblk/nodes/file.py.
 *
 * A request's work is a series of pieces, each one system call. A piece that the
 * kernel can serve from memory is done inline, by this thread, at once; whatever
 * has to wait goes to the I/O thread's backend (aio_*.c). Measured, a cached 4 KiB
 * read costs the same inline as in an io_uring batch of 32, and a cached write
 * half: ext4 hands every buffered write of a ring to a kernel thread. What touches only
 * pages that are known to be in memory costs half of that again, or less: it is copied from or to a
 * mapping of the file (file_map.c).
 *
 * When is it safe to try inline?
 *  - Where RWF_NOWAIT works (most file systems' reads, few ones' writes) the kernel
 *    says -EAGAIN instead of waiting.
 *  - On tmpfs and its like nothing waits for a disk.
 *  - What another process or host serves (FUSE, NFS) is never tried: not even RWF_NOWAIT keeps the
 *    kernel from waiting for it.
 *  - Else we try and measure: see struct inline_history.
 * Never inline: O_DIRECT, synchronisation, allocation, and large requests, during
 * which other queues of this thread would starve.
 *
 * With O_DIRECT what gets here is made of whole blocks: file_align.c sees to that.
 */
#include "../engine.h"
#include "file.api.h"
#include "file_align.h"
#include "../file_map.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef CIFS_SUPER_MAGIC
#define CIFS_SUPER_MAGIC 0xFF534D42
#endif
#ifndef SMB2_SUPER_MAGIC
#define SMB2_SUPER_MAGIC 0xFE534D42
#endif

#define INLINE_MAX (1u << 20) /* bytes */
#define BOUNCE_MAX (1u << 20) /* bytes of aligned memory per request */
#define ZERO_SIZE 65536u
#define ZERO_COUNT 16u

/* An inline call that took longer than this, plus 1 ns per byte, did not find memory ready. */
#define SLOW_NS 50000u
/* What a page fault costs, or more than storing what fits in a page does. */
#define FAULT_NS 1000u
/* Longer than another process has the CPU of a thread that is about to write. */
#define REFUSED_NS 5000000u
#define WATCH_NS 1000000000u
#define AVOID_NS 100000000u
#define AVOID_FACTOR 16u

/* Ways to write zeroes other than writing zeroes; bits. */
#define METHOD_PUNCH 1u
#define METHOD_ZERO_RANGE 2u

/*
 * What has been learnt about inline calls without RWF_NOWAIT, for one direction. A
 * slow call is at first only a suspicion, since a busy host may have preempted us: for
 * WATCH_NS we look whether a slow call really slept. When one did, inline calls are
 * avoided for AVOID_NS and for a multiple of the time it took, then tried again. So,
 * after the first two, slow storage stops this thread for one call in a tenth of a second at
 * most, and for a sixteenth of the time at most.
 * Shared by all threads that use the node, relaxed: at worst one more call is slow.
 */
struct inline_history {
    _Atomic bool no_nowait; /* RWF_NOWAIT is not supported here */
    _Atomic uint64_t watch_until;
    _Atomic uint64_t avoid_until;
};

struct file_node {
    struct vb_node node;
    int fd;              /* owned */
    bool read_only, direct, no_flush, discard_unmap;
    bool regular;        /* not a block device */
    bool in_memory;      /* tmpfs: inline whatever it says */
    bool remote;         /* another process or host serves it, and may stop: never inline */
    uint32_t detect_zeroes;
    uint32_t memory_align;
    _Atomic uint32_t unsupported; /* METHOD_*: known not to work here */
    _Atomic uint64_t covered;     /* a regular file's size, at least */
    _Atomic int flush_error;      /* see flushed() */
    _Atomic bool writing;         /* see may_write() */
    struct inline_history history[2]; /* read, write */
    struct file_align align; /* with O_DIRECT */
    struct vb_file_map map;
    _Atomic uint64_t avoid_map_until; /* memory is short: see check_memory() */
};

/* A request's work, in its scratch. */
struct file_io {
    struct vb_aio aio;       /* the current piece */
    struct vb_request *request;
    struct file_node *file;
    struct file_claim *claim; /* owned; of a change with O_DIRECT */
    uint64_t offset, left;   /* what is still to be transferred */
    size_t skip;             /* ... starting `skip` bytes into request->iov[index] */
    uint32_t index;
    bool zeroes;             /* the data are zeroes, not request->iov */
    bool queued;             /* do not try inline again */
    bool bounced;            /* the piece uses `bounce` */
    bool sync;               /* fdatasync before completing */
    uint32_t methods;        /* METHOD_*: still worth trying; the lowest bit is next */
    struct iovec *rest;      /* owned: what remains of request->iov after a short transfer */
    void *bounce;            /* owned: aligned memory */
    struct iovec one;        /* for `bounce` or a last bit of zeroes */
    uint64_t refused_ns;     /* when it first could not write; 0: it could */
};

_Static_assert(sizeof(struct file_io) <= VB_SCRATCH_SIZE, "scratch too small");

static unsigned char zeroes[ZERO_SIZE] __attribute__((aligned(ZERO_SIZE)));
#define Z {zeroes, ZERO_SIZE}
static const struct iovec zero_iov[ZERO_COUNT] = {Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z};
#undef Z

static void transfer(struct file_io *io);

static struct file_io *io_of(struct vb_aio *aio)
{
    return vb_container_of(aio, struct file_io, aio);
}

static bool is_write(const struct file_io *io)
{
    return io->request->op != VB_OP_READ;
}

/* The kernel wants to be asked again, and nothing has happened yet. */
static bool try_again(int ret)
{
    return ret == -EAGAIN || ret == -EINTR;
}

static bool not_supported(int ret)
{
    return ret == -EOPNOTSUPP || ret == -ENOSYS || ret == -ENODEV || ret == -ENOTTY;
}

static void finish(struct file_io *io, int ret)
{
    free(io->rest);
    free(io->bounce);
    if (io->claim) {
        file_claim_end(io->claim);
    }
    vb_complete(io->request, ret);
}

static void queue(struct file_io *io, void (*done)(struct vb_aio *aio))
{
    struct vb_iothread *thread = io->request->thread;

    io->aio.done = done;
    vb_count(&thread->queued_ios, 1);
    vb_aio_submit(thread, &io->aio);
}

/* ---- flush, and the end of FUA writes --------------------------------------------- */

static void queue_fdatasync(struct file_io *io);

/*
 * ext4 turns read-only after an error. From then on (before Linux 6.15) fdatasync() succeeds and writes
 * nothing, while pages that are mapped and dirty can still be written to.
 */
static bool turned_read_only(const struct file_node *file)
{
    struct statfs status;

    return fstatfs(file->fd, &status) == 0 && (status.f_flags & ST_RDONLY);
}

/*
 * Linux reports a failed write-back once, marks the pages clean and forgets: the
 * next fdatasync() succeeds though data are lost. So after a failure every later flush
 * fails too, until the file is opened anew. With O_DIRECT no data were in our
 * hands, the guest may well try again (as in QEMU). A flush that ran at the
 * same time and was told nothing fails also.
 */
static void flushed(struct vb_aio *aio)
{
    struct file_io *io = io_of(aio);
    struct file_node *file = io->file;
    int none = 0, ret = aio->result;

    if (try_again(ret)) {
        queue_fdatasync(io);
        return;
    }
    if (ret >= 0 && !file->direct && turned_read_only(file)) {
        ret = -EROFS;
    }
    if (ret < 0 && !file->direct) {
        atomic_compare_exchange_strong(&file->flush_error, &none, ret);
    }
    if (ret >= 0) {
        ret = atomic_load_explicit(&file->flush_error, memory_order_relaxed);
    }
    finish(io, ret);
}

static void queue_fdatasync(struct file_io *io)
{
    io->aio.opcode = VB_AIO_FDATASYNC;
    io->aio.fd = io->file->fd;
    vb_file_map_clean(&io->file->map, io->request->thread->now_ns);
    queue(io, flushed);
}

static void sync_then_finish(struct file_io *io)
{
    int error = atomic_load_explicit(&io->file->flush_error, memory_order_relaxed);

    if (error) {
        finish(io, error);
    } else {
        queue_fdatasync(io);
    }
}

/* With cache.no-flush nobody waits for the disk, FUA or not; as QEMU. */
static bool wants_fua(const struct file_io *io)
{
    return (io->request->flags & VB_REQ_FUA) && !io->file->no_flush;
}

/* ---- pieces: what the next system call transfers ------------------------------------ */

static bool is_aligned(const struct file_io *io)
{
    const struct iovec *iov = io->request->iov;
    uintptr_t bits = io->skip;

    for (uint32_t i = io->index; i < io->request->niov; i++) {
        bits |= (uintptr_t)iov[i].iov_base | iov[i].iov_len;
    }
    return (bits & (io->file->memory_align - 1)) == 0;
}

static void use_zeroes(struct file_io *io)
{
    if (io->left < ZERO_SIZE) {
        io->one = (struct iovec){zeroes, io->left};
        io->aio.iov = &io->one;
        io->aio.niov = 1;
        return;
    }
    io->aio.iov = zero_iov;
    io->aio.niov = ZERO_COUNT;
    if (io->left / ZERO_SIZE < ZERO_COUNT) {
        io->aio.niov = (uint32_t)(io->left / ZERO_SIZE);
    }
}

/* Steps the cursor over `bytes` bytes; copies them from or to `memory` unless it is NULL. */
static void advance_cursor(struct file_io *io, size_t bytes, unsigned char *memory, bool fill)
{
    const struct iovec *iov = io->request->iov;

    while (bytes > 0) {
        unsigned char *base = (unsigned char *)iov[io->index].iov_base + io->skip;
        size_t here = iov[io->index].iov_len - io->skip;
        size_t n = here < bytes ? here : bytes;

        if (memory && fill) {
            memcpy(memory, base, n);
        } else if (memory) {
            vb_guest_write_begin();
            memcpy(base, memory, n);
            vb_guest_write_end();
        }
        memory = memory ? memory + n : NULL;
        bytes -= n;
        io->skip += n;
        if (n == here) {
            io->index++;
            io->skip = 0;
        }
    }
}

static int use_bounce(struct file_io *io)
{
    size_t size = io->left < BOUNCE_MAX ? io->left : BOUNCE_MAX;
    uint32_t index = io->index;
    size_t skip = io->skip;

    if (!io->bounce && posix_memalign(&io->bounce, io->file->memory_align, size)) {
        io->bounce = NULL;
        return -ENOMEM;
    }
    if (is_write(io)) {
        advance_cursor(io, size, io->bounce, true);
        io->index = index; /* the write may be short */
        io->skip = skip;
    }
    io->bounced = true;
    io->one = (struct iovec){io->bounce, size};
    io->aio.iov = &io->one;
    io->aio.niov = 1;
    return 0;
}

/* The guest's own memory; the array is copied only if the piece starts inside an entry. */
static int use_request_iov(struct file_io *io)
{
    uint32_t count = io->request->niov - io->index;

    io->aio.iov = io->request->iov + io->index;
    io->aio.niov = count < IOV_MAX ? count : IOV_MAX;
    if (io->skip == 0) {
        return 0;
    }
    free(io->rest);
    io->rest = malloc(io->aio.niov * sizeof(*io->rest));
    if (!io->rest) {
        return -ENOMEM;
    }
    memcpy(io->rest, io->aio.iov, io->aio.niov * sizeof(*io->rest));
    io->rest[0].iov_base = (char *)io->rest[0].iov_base + io->skip;
    io->rest[0].iov_len -= io->skip;
    io->aio.iov = io->rest;
    return 0;
}

static bool needs_bounce(const struct file_io *io)
{
    return io->file->direct && (io->request->niov - io->index > IOV_MAX || !is_aligned(io));
}

static int prepare_piece(struct file_io *io)
{
    io->aio.opcode = is_write(io) ? VB_AIO_WRITEV : VB_AIO_READV;
    io->aio.fd = io->file->fd;
    io->aio.flags = is_write(io) && io->file->direct && wants_fua(io) ? RWF_DSYNC : 0;
    io->aio.offset = io->offset;
    io->bounced = false;
    if (io->zeroes) {
        use_zeroes(io);
        return 0;
    }
    return needs_bounce(io) ? use_bounce(io) : use_request_iov(io);
}

static void clear_rest(struct file_io *io)
{
    const struct iovec *iov = io->request->iov;

    vb_guest_write_begin();
    for (; io->index < io->request->niov; io->index++, io->skip = 0) {
        memset((char *)iov[io->index].iov_base + io->skip, 0, iov[io->index].iov_len - io->skip);
    }
    vb_guest_write_end();
}

static void step(struct file_io *io, size_t bytes)
{
    if (io->bounced && !is_write(io)) {
        advance_cursor(io, bytes, io->bounce, false);
    } else if (!io->zeroes && bytes < io->left) {
        advance_cursor(io, bytes, NULL, false);
    }
    io->offset += bytes;
    io->left -= bytes;
}

/* A read has come to the end of the file; with O_DIRECT only there can it return odd bytes. */
static bool end_of_file(const struct file_io *io, ssize_t ret)
{
    return !is_write(io) &&
           (ret == 0 || (io->file->direct && (size_t)ret % io->file->align.block != 0));
}

/* A piece has ended with `ret`. False: the request has, too. */
static bool piece_done(struct file_io *io, ssize_t ret)
{
    if (ret < 0 || (ret == 0 && is_write(io))) {
        finish(io, ret < 0 ? (int)ret : -ENOSPC); /* as QEMU */
        return false;
    }
    if (ret > 0 && is_write(io)) {
        vb_file_map_wrote(&io->file->map, io->offset, (uint64_t)ret);
    } else if (ret > 0) {
        vb_file_map_seen(&io->file->map, io->offset, (uint64_t)ret);
    }
    step(io, (uint64_t)ret < io->left ? (size_t)ret : io->left);
    if (io->left > 0 && end_of_file(io, ret)) {
        clear_rest(io);
        io->left = 0;
    }
    return true;
}

/* ---- inline ---------------------------------------------------------------------------- */

static ssize_t call(struct file_io *io, int flags)
{
    const struct vb_aio *aio = &io->aio;
    ssize_t ret;

    ret = is_write(io)
        ? pwritev2(aio->fd, aio->iov, (int)aio->niov, (off_t)aio->offset, flags)
        : preadv2(aio->fd, aio->iov, (int)aio->niov, (off_t)aio->offset, flags);
    ret = ret < 0 ? -errno : ret;
    vb_refresh_now(io->request->thread);
    return ret;
}

static long voluntary_switches(void)
{
    struct rusage usage;

    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;
}

static uint64_t relaxed(_Atomic uint64_t *value)
{
    return atomic_load_explicit(value, memory_order_relaxed);
}

static void learn_from_slow_call(struct inline_history *history, uint64_t now, uint64_t took,
                                 bool slept)
{
    uint64_t again = now;

    if (slept) {
        again += AVOID_NS + took * AVOID_FACTOR;
        atomic_store_explicit(&history->avoid_until, again, memory_order_relaxed);
    }
    atomic_store_explicit(&history->watch_until, again + WATCH_NS, memory_order_relaxed);
}

/* A call that may have to wait. */
struct measured {
    struct inline_history *history;
    uint64_t start;
    bool watched;
    long switches;
};

/* False: not now. */
static bool begin_measured(struct measured *here, struct inline_history *history,
                           struct vb_iothread *thread)
{
    vb_refresh_now(thread);
    here->history = history;
    here->start = thread->now_ns;
    here->watched = here->start < relaxed(&history->watch_until);
    here->switches = here->watched ? voluntary_switches() : 0;
    return here->start >= relaxed(&history->avoid_until);
}

/* The clock has been read after the call. */
static void end_measured(const struct measured *here, struct vb_iothread *thread,
                         uint64_t bytes)
{
    uint64_t took = thread->now_ns - here->start;

    if (took > SLOW_NS + bytes) {
        learn_from_slow_call(here->history, thread->now_ns, took,
                             here->watched && voluntary_switches() != here->switches);
    }
}

static ssize_t measured_call(struct file_io *io, struct inline_history *history)
{
    struct vb_iothread *thread = io->request->thread;
    struct measured here;
    ssize_t ret;

    if (!begin_measured(&here, history, thread)) {
        return -EAGAIN;
    }
    ret = call(io, 0);
    end_measured(&here, thread, io->left);
    return ret;
}

/*
 * After a copy that was slow. If the disk had to be waited for, memory has become short; after that
 * the limits of inline_history hold for mappings, too.
 */
static void check_memory(struct file_node *file, struct vb_iothread *thread,
                         struct vb_page_faults faults, uint64_t took)
{
    if (faults.major > 0) {
        vb_file_map_forget(&file->map);
        atomic_store_explicit(&file->avoid_map_until,
                              thread->now_ns + AVOID_NS + took * AVOID_FACTOR,
                              memory_order_relaxed);
    }
}

/* A small read of pages that are in memory; false: read by a system call. */
static bool read_mapped(struct file_node *file, struct vb_request *request)
{
    struct vb_iothread *thread = request->thread;
    uint64_t start = thread->now_ns;
    bool done;

    if (request->bytes > (request->take ? VB_FILE_MAP_TAKE_MAX : VB_FILE_MAP_COPY_MAX) ||
        !vb_file_map_has(&file->map, request->offset, request->bytes) ||
        start < relaxed(&file->avoid_map_until)) {
        return false;
    }
    done = vb_file_map_read(&file->map, request);
    vb_refresh_now(thread);
    if (thread->now_ns - start > SLOW_NS) {
        check_memory(file, thread, vb_page_faults(thread), thread->now_ns - start);
    }
    request->taken = done && request->take;
    return done;
}

/*
 * The same for a write. Page faults make it slow, and in a fault the kernel may make us wait as in
 * write(): for its journal, or because too much is dirty.
 */
static bool write_mapped(struct file_node *file, struct vb_request *request)
{
    struct vb_iothread *thread = request->thread;
    struct vb_file_map *map = &file->map;
    struct measured here;
    uint64_t took;
    bool done;

    if (!(request->flags & VB_REQ_GUEST) || request->bytes > VB_FILE_MAP_TAKE_MAX ||
        !vb_file_map_accepts(map, request->offset, request->bytes, thread->now_ns)) {
        return false;
    }
    if (!begin_measured(&here, &file->history[1], thread) ||
        here.start < relaxed(&file->avoid_map_until)) {
        return false;
    }
    done = vb_file_map_write(map, request);
    vb_refresh_now(thread);
    took = thread->now_ns - here.start;
    if (took > FAULT_NS + request->bytes / 4) {
        struct vb_page_faults faults = vb_page_faults(thread);
        uint64_t cost = faults.minor * FAULT_NS;

        vb_file_map_lost(map, cost < took ? cost : took);
        check_memory(file, thread, faults, took);
    }
    end_measured(&here, thread, request->bytes);
    return done;
}

/* The piece's result, or -EAGAIN: it has to be queued. */
static ssize_t try_inline(struct file_io *io)
{
    struct inline_history *history = &io->file->history[is_write(io)];

    if (!atomic_load_explicit(&history->no_nowait, memory_order_relaxed)) {
        ssize_t ret = call(io, RWF_NOWAIT);

        if (ret != -EOPNOTSUPP) {
            /* Linux 5.9 and 5.10 may return 0 where there is no end of file: ask again. */
            return ret ? ret : -EAGAIN;
        }
        atomic_store_explicit(&history->no_nowait, true, memory_order_relaxed);
    }
    return io->file->in_memory ? call(io, 0) : measured_call(io, history);
}

/* ---- read and write ---------------------------------------------------------------------- */

static void transferred(struct vb_aio *aio)
{
    struct file_io *io = io_of(aio);

    if (try_again(aio->result) || piece_done(io, aio->result)) {
        transfer(io);
    }
}

static void transfer_end(struct file_io *io)
{
    if (io->sync) {
        sync_then_finish(io);
    } else {
        finish(io, 0);
    }
}

/*
 * Linux lets one thread at a time write to a file through the page cache. A second one would spin, or
 * sleep, and that would be taken for slow storage. It has other things to do (another leg of a
 * quorum, the next request to be encrypted) and comes back, unless it is storage that takes so long.
 */
static bool may_write(struct file_node *file)
{
    return !atomic_load_explicit(&file->writing, memory_order_relaxed) &&
           !atomic_exchange_explicit(&file->writing, true, memory_order_acquire);
}

static void wrote(struct file_node *file)
{
    atomic_store_explicit(&file->writing, false, memory_order_release);
}

static void run_again(struct vb_message *message, void *context)
{
    (void)context;
    transfer(io_of(vb_container_of(message, struct vb_aio, message)));
}

/* Later in this sweep, or in the next; false: the kernel may as well put someone else to sleep. */
static bool come_back(struct file_io *io)
{
    struct vb_iothread *thread = io->request->thread;

    io->refused_ns = io->refused_ns ? io->refused_ns : thread->now_ns;
    if (thread->now_ns - io->refused_ns > REFUSED_NS) {
        return false;
    }
    io->aio.message.run = run_again; /* no operation of its own is under way */
    vb_iothread_send(thread, &io->aio.message);
    return true;
}

/* Piece after piece inline, until all is done or one has to be queued. */
static void transfer(struct file_io *io)
{
    while (io->left > 0) {
        int error = prepare_piece(io);
        ssize_t ret;

        if (error) {
            finish(io, error);
            return;
        }
        if (io->queued) {
            queue(io, transferred);
            return;
        }
        if (is_write(io) && !may_write(io->file)) {
            if (come_back(io)) {
                return;
            }
            io->queued = true;
            continue;
        }
        ret = try_inline(io);
        if (is_write(io)) {
            wrote(io->file);
        }
        if (try_again((int)ret)) {
            io->queued = true;
            continue;
        }
        vb_count(&io->request->thread->inline_ios, 1);
        if (!piece_done(io, ret)) {
            return;
        }
    }
    transfer_end(io);
}

/*
 * FUA without O_DIRECT is an ordinary write and an fdatasync(), not RWF_DSYNC: after
 * a failed RWF_DSYNC nobody could tell a full disk (try again) from lost pages (never again).
 */
static void start_transfer(struct file_io *io)
{
    io->aio.elsewhere =
        io->file->remote || (!io->file->direct && io->request->bytes > INLINE_MAX);
    io->queued = io->file->direct || io->aio.elsewhere;
    io->sync = !io->file->direct && wants_fua(io);
    transfer(io);
}

/* ---- write zeroes -------------------------------------------------------------------------- */

static void start_zeroes(struct file_io *io);

/*
 * The guest may rely on nothing but zeroes; the file's size must still cover them. A server that
 * stands still must not be asked here.
 */
static bool file_covers(const struct file_io *io)
{
    struct file_node *file = io->file;
    uint64_t end = io->offset + io->left;
    struct stat status;

    if (!file->regular || end <= atomic_load_explicit(&file->covered, memory_order_relaxed)) {
        return true;
    }
    return !file->remote && (fstat(file->fd, &status) < 0 || (uint64_t)status.st_size >= end);
}

static void extended(struct vb_aio *aio)
{
    struct file_io *io = io_of(aio);

    if (try_again(aio->result)) {
        queue(io, extended);
    } else if (aio->result < 0) { /* not that way, then; zeroes once more do no harm */
        io->methods &= ~METHOD_PUNCH;
        start_zeroes(io);
    } else {
        transfer_end(io);
    }
}

/*
 * A hole past the end of a file does not extend it. Allocating the last byte
 * does; unlike ftruncate() that cannot cut off what another request has just appended.
 */
static void extend_file(struct file_io *io)
{
    io->aio.flags = 0;
    io->aio.offset = io->offset + io->left - 1;
    io->aio.length = 1;
    queue(io, extended);
}

static void zeroed(struct vb_aio *aio)
{
    struct file_io *io = io_of(aio);
    uint32_t method = aio->flags & FALLOC_FL_PUNCH_HOLE ? METHOD_PUNCH : METHOD_ZERO_RANGE;
    int ret = aio->result;

    if (try_again(ret)) {
        queue(io, zeroed);
    } else if (not_supported(ret) || ret == -EINVAL) { /* EINVAL: perhaps only this range */
        if (ret != -EINVAL) {
            atomic_fetch_or_explicit(&io->file->unsupported, method, memory_order_relaxed);
        }
        io->methods &= ~method;
        start_zeroes(io);
    } else if (ret < 0) {
        finish(io, ret);
    } else if (method == METHOD_PUNCH && !file_covers(io)) {
        extend_file(io);
    } else {
        transfer_end(io);
    }
}

static void queue_fallocate(struct file_io *io, int mode, void (*done)(struct vb_aio *aio))
{
    io->aio.opcode = VB_AIO_FALLOCATE;
    io->aio.fd = io->file->fd;
    io->aio.flags = mode;
    io->aio.offset = io->offset;
    io->aio.length = io->left;
    vb_file_map_discard(&io->file->map, io->offset, io->left);
    queue(io, done);
}

static void start_zeroes(struct file_io *io)
{
    uint32_t methods =
        io->methods & ~atomic_load_explicit(&io->file->unsupported, memory_order_relaxed);

    io->sync = wants_fua(io);
    if (methods & METHOD_PUNCH) {
        queue_fallocate(io, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, zeroed);
    } else if (methods & METHOD_ZERO_RANGE) {
        queue_fallocate(io, FALLOC_FL_ZERO_RANGE, zeroed);
    } else {
        io->zeroes = true;
        start_transfer(io);
    }
}

static void write_zeroes(struct file_io *io, bool may_unmap)
{
    io->methods = METHOD_ZERO_RANGE;
    if (may_unmap && io->file->discard_unmap) {
        io->methods |= METHOD_PUNCH;
    }
    start_zeroes(io);
}

static void write_data(struct file_io *io)
{
    uint32_t detect = io->file->detect_zeroes;

    if (detect && vb_request_is_zero(io->request)) {
        write_zeroes(io, detect == 2);
    } else if (write_mapped(io->file, io->request)) {
        vb_count(&io->request->thread->mapped_ios, 1);
        io->sync = wants_fua(io);
        transfer_end(io);
    } else {
        start_transfer(io);
    }
}

/* ---- discard and flush --------------------------------------------------------------- */

/* Advice: not to be able to follow it is no failure. */
static void discarded(struct vb_aio *aio)
{
    struct file_io *io = io_of(aio);
    int ret = aio->result;

    if (try_again(ret)) {
        queue(io, discarded);
        return;
    }
    if (not_supported(ret)) {
        atomic_fetch_or_explicit(&io->file->unsupported, METHOD_PUNCH, memory_order_relaxed);
        ret = 0;
    }
    finish(io, ret == -EINVAL ? 0 : ret); /* EINVAL: not in units of this device */
}

static void discard(struct file_io *io)
{
    uint32_t unsupported = atomic_load_explicit(&io->file->unsupported, memory_order_relaxed);

    if (!io->file->discard_unmap || (unsupported & METHOD_PUNCH)) {
        finish(io, 0);
    } else {
        queue_fallocate(io, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, discarded);
    }
}

static void flush(struct file_io *io)
{
    if (io->file->no_flush || io->file->read_only) {
        finish(io, 0);
    } else {
        sync_then_finish(io);
    }
}

/* ---- the node ------------------------------------------------------------------------ */

static void start_request(struct vb_node *node, struct vb_request *request,
                          struct file_claim *claim)
{
    struct file_io *io = (struct file_io *)request->scratch;
    struct file_node *file = vb_container_of(node, struct file_node, node);

    *io = (struct file_io){
        .request = request,
        .file = file,
        .claim = claim,
        .offset = request->offset,
        .left = request->bytes,
    };
    if (request->op == VB_OP_FLUSH) {
        flush(io);
    } else if (request->op != VB_OP_READ && io->file->read_only) {
        finish(io, -EPERM); /* as QEMU */
    } else if (request->bytes == 0) {
        finish(io, 0);
    } else if (request->op == VB_OP_READ) {
        start_transfer(io);
    } else if (request->op == VB_OP_WRITE) {
        write_data(io);
    } else if (request->op == VB_OP_DISCARD) {
        discard(io);
    } else {
        write_zeroes(io, request->flags & VB_REQ_MAY_UNMAP);
    }
}

static void file_submit(struct vb_node *node, struct vb_request *request)
{
    struct file_node *file = vb_container_of(node, struct file_node, node);

    if (file->direct && request->op != VB_OP_FLUSH && request->bytes > 0) {
        file_align_submit(&file->align, request);
    } else if (request->op == VB_OP_READ && request->bytes > 0 && read_mapped(file, request)) {
        vb_count(&request->thread->mapped_ios, 1);
        vb_complete(request, 0);
    } else {
        start_request(node, request, NULL);
    }
}

static void file_destroy(struct vb_node *node)
{
    struct file_node *file = vb_container_of(node, struct file_node, node);

    file_align_destroy(&file->align);
    vb_file_map_close(&file->map);
    close(file->fd);
}

static const struct vb_node_ops file_ops = {
    .name = "file",
    .submit = file_submit,
    .destroy = file_destroy,
};

static bool is_alignment(uint32_t value)
{
    return value > 0 && (value & (value - 1)) == 0 && value <= ZERO_SIZE;
}

static int check_options(const struct vb_file_options *options, struct stat *status, char *error)
{
    if (fstat(options->fd, status) < 0) {
        return vb_error(error, -errno, "cannot use file descriptor %d: %s", options->fd,
                        strerror(errno));
    }
    if (!S_ISREG(status->st_mode) && !S_ISBLK(status->st_mode)) {
        return vb_error(error, -EINVAL, "file descriptor %d is neither a regular file nor a block "
                        "device", options->fd);
    }
    if (!is_alignment(options->memory_align) || !is_alignment(options->request_align)) {
        return vb_error(error, -EINVAL, "alignments %u (memory) and %u (requests) are not powers "
                        "of two up to %u", options->memory_align, options->request_align,
                        ZERO_SIZE);
    }
    return 0;
}

static bool lives_in_memory(int fd)
{
    struct statfs status;

    return fstatfs(fd, &status) == 0 &&
           (status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC ||
            status.f_type == HUGETLBFS_MAGIC);
}

/*
 * A server that has died or stands still stops whoever is in a system call, perhaps for ever. That
 * must not be this thread, which has other files to serve: other legs of a quorum, for one.
 */
static bool lives_elsewhere(int fd)
{
    struct statfs status;

    if (fstatfs(fd, &status) < 0) {
        return false;
    }
    switch ((uint32_t)status.f_type) {
    case FUSE_SUPER_MAGIC:
    case NFS_SUPER_MAGIC:
    case CIFS_SUPER_MAGIC:
    case SMB2_SUPER_MAGIC:
    case V9FS_MAGIC:
    case CEPH_SUPER_MAGIC:
        return true;
    default:
        return false;
    }
}

struct vb_node *vb_node_file_new(struct vb_engine *engine, const struct vb_file_options *options,
                                 char *error)
{
    struct file_node *file;
    struct stat status;

    if (check_options(options, &status, error) < 0) {
        return NULL;
    }
    file = vb_node_alloc(engine, &file_ops, sizeof(*file), error);
    if (!file) {
        return NULL;
    }
    file->fd = options->fd;
    file->read_only = options->read_only;
    file->direct = options->direct;
    file->no_flush = options->no_flush;
    file->discard_unmap = options->discard_unmap;
    file->detect_zeroes = options->detect_zeroes;
    file->memory_align = options->memory_align;
    if (file->memory_align < sizeof(void *)) {
        file->memory_align = sizeof(void *); /* posix_memalign() wants that much */
    }
    file->regular = S_ISREG(status.st_mode);
    atomic_init(&file->covered, (uint64_t)status.st_size);
    file->in_memory = file->regular && lives_in_memory(options->fd);
    file->remote = file->regular && lives_elsewhere(options->fd);
    if (file->direct) {
        file_align_init(&file->align, &file->node, options->request_align, start_request);
    } else {
        vb_file_map_open(&file->map, options->fd, !file->read_only);
    }
    return &file->node;
}

void vb_node_file_resize(struct vb_node *node, uint64_t size)
{
    struct file_node *file = vb_container_of(node, struct file_node, node);

    vb_file_map_cut_off(&file->map, size);
    if (size < atomic_load_explicit(&file->covered, memory_order_relaxed)) {
        atomic_store_explicit(&file->covered, size, memory_order_relaxed);
    }
}

void vb_node_file_grown(struct vb_node *node, uint64_t size)
{
    struct file_node *file = vb_container_of(node, struct file_node, node);

    atomic_store_explicit(&file->covered, size, memory_order_relaxed);
}

/* Where there is nothing: the file ends long before. 0 or negative errno. */
static int try_to_punch(int fd, const struct stat *file, off_t offset)
{
    if (file->st_size >= offset / 2) {
        return -EFBIG;
    }
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, ZERO_SIZE) < 0 ? -errno
                                                                                            : 0;
}

/*
 * As far behind the end as the file system has places at all. Of FUSE nobody knows: nbdfuse makes a
 * TRIM of it, after which an NBD server may show anything.
 */
bool vb_file_can_punch(int fd)
{
    static const uint8_t places[] = {62, 53, 43, 41, 31}; /* powers of two */
    struct statfs status;
    struct stat file;
    int ret = -EFBIG;

    if (fstatfs(fd, &status) < 0 || status.f_type == FUSE_SUPER_MAGIC || fstat(fd, &file) < 0) {
        return false;
    }
    for (size_t i = 0; ret == -EFBIG && i < sizeof(places); i++) {
        ret = try_to_punch(fd, &file, (off_t)1 << places[i]);
    }
    return ret != -EFBIG && !not_supported(ret);
}
