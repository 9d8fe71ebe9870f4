/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * file_map.c: small reads of what is in the page cache, without a system call.
 *
 * Of a cached 4 KiB read, more than half is spent on the way into the kernel and back.
 * A file that is mapped can be copied from directly, but a page that is not in memory
 * then stops the thread until the disk has answered, and a page that is no more (the file was
 * shortened, the disk failed) is SIGBUS. So:
 *  - Only pages are read this way that have been read or written by a system call
 *    before: a bit per page remembers. Should memory have become short since, the copy is slow;
 *    the caller notices, and all bits are forgotten.
 *  - The signal handler replaces a mapping that has failed by zero pages and marks it lost. Who
 *    was copying from it sees the mark and reads again by a system call, which gives the
 *    right answer or the right error. The mapping is not used again.
 *  - Only file systems are mapped whose mappings and system calls see the same data.
 *
 * The mapping would count as this process's memory for as long as it lives. A timer on the I/O
 * threads drops the page table entries of mappings that have not been used for a second.
 */
#include "engine.h"
#include "file_map.h"

#include <errno.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342
#endif

#define PAGE 4096ull
#define PAGE_BITS 12
#define TRIM_INTERVAL_NS 1000000000u
/* Dropping a page table entry takes about 20 ns; other requests of the thread wait for it. */
#define TRIM_STEP (64ull << 20)
#define TRIM_STEP_NS 1000000u

/* All mappings, for the timers. The lock is taken when nodes come and go, and by timers. */
static pthread_mutex_t maps_lock = PTHREAD_MUTEX_INITIALIZER;
static struct vb_file_map *maps;

/*
 * What this thread is reading from, for the signal handler: the innermost, since who takes what was
 * read may read elsewhere before it returns. (initial-exec: a handler may not wait for the
 * storage to be allocated.)
 */
struct reading {
    struct vb_file_map *map;
    const struct reading *outer;
};
static _Thread_local const struct reading *reading __attribute__((tls_model("initial-exec")));

/* ---- life --------------------------------------------------------------------------- */

static bool sees_what_system_calls_see(int fd)
{
    struct statfs status;

    if (fstatfs(fd, &status) < 0) {
        return false;
    }
    switch ((unsigned long)status.f_type) {
    case EXT4_SUPER_MAGIC: /* ext2 and ext3, too */
    case XFS_SUPER_MAGIC:
    case BTRFS_SUPER_MAGIC:
    case F2FS_SUPER_MAGIC:
    case TMPFS_MAGIC:
        return true;
    default:
        return false;
    }
}

static size_t bitmap_size(const struct vb_file_map *map)
{
    return (map->length / PAGE / 64 + 1) * sizeof(uint64_t);
}

static void *map_bitmap(const struct vb_file_map *map)
{
    void *memory = mmap(NULL, bitmap_size(map), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

void vb_file_map_open(struct vb_file_map *map, int fd)
{
    struct stat status;
    void *base;

    if (fstat(fd, &status) < 0 || !S_ISREG(status.st_mode) || !sees_what_system_calls_see(fd)) {
        return;
    }
    map->length = (uint64_t)status.st_size & ~(PAGE - 1); /* the rest is for system calls */
    if (map->length == 0) {
        return;
    }
    base = mmap(NULL, map->length, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (base == MAP_FAILED) {
        return; /* nothing lost but speed */
    }
    madvise(base, map->length, MADV_DONTDUMP);
    madvise(base, map->length, MADV_RANDOM); /* a fault may not read ahead: it should not read at all */
    map->cached = map_bitmap(map);
    if (!map->cached) {
        munmap(base, map->length);
        return;
    }
    map->base = base;
    pthread_mutex_lock(&maps_lock);
    map->next = maps;
    maps = map;
    pthread_mutex_unlock(&maps_lock);
}

void vb_file_map_close(struct vb_file_map *map)
{
    if (!map->base) {
        return;
    }
    pthread_mutex_lock(&maps_lock);
    for (struct vb_file_map **link = &maps; *link; link = &(*link)->next) {
        if (*link == map) {
            *link = map->next;
            break;
        }
    }
    pthread_mutex_unlock(&maps_lock);
    munmap(map->base, map->length);
    munmap(map->cached, bitmap_size(map));
}

/* ---- which pages are in memory --------------------------------------------------------- */

static void remember(struct vb_file_map *map, uint64_t page)
{
    _Atomic uint64_t *word = &map->cached[page / 64];
    uint64_t bit = 1ull << (page % 64);

    if (!(atomic_load_explicit(word, memory_order_relaxed) & bit)) {
        atomic_fetch_or_explicit(word, bit, memory_order_relaxed); /* several threads mark pages */
    }
}

static bool remembered(struct vb_file_map *map, uint64_t page)
{
    uint64_t word = atomic_load_explicit(&map->cached[page / 64], memory_order_relaxed);

    return word & 1ull << (page % 64);
}

void vb_file_map_seen(struct vb_file_map *map, uint64_t offset, uint64_t bytes)
{
    if (!map->base || bytes > VB_FILE_MAP_TAKE_MAX || offset + bytes > map->length) {
        return;
    }
    for (uint64_t page = offset >> PAGE_BITS; page <= (offset + bytes - 1) >> PAGE_BITS; page++) {
        remember(map, page);
    }
}

bool vb_file_map_waited(struct vb_iothread *thread)
{
    struct rusage usage;
    long before = thread->major_faults;

    getrusage(RUSAGE_THREAD, &usage);
    thread->major_faults = usage.ru_majflt;
    return usage.ru_majflt != before;
}

void vb_file_map_forget(struct vb_file_map *map)
{
    madvise(map->cached, bitmap_size(map), MADV_DONTNEED); /* reads as zeroes from now on */
}

bool vb_file_map_has(struct vb_file_map *map, uint64_t offset, uint64_t bytes)
{
    if (!map->base || offset + bytes > map->length ||
        atomic_load_explicit(&map->lost, memory_order_relaxed)) {
        return false;
    }
    for (uint64_t page = offset >> PAGE_BITS; page <= (offset + bytes - 1) >> PAGE_BITS; page++) {
        if (!remembered(map, page)) {
            return false;
        }
    }
    return true;
}

/* ---- reading ------------------------------------------------------------------------------ */

static void trim(struct vb_timer *timer);

static void note_use(struct vb_file_map *map, struct vb_iothread *thread)
{
    if (!atomic_load_explicit(&map->used, memory_order_relaxed)) {
        atomic_store_explicit(&map->used, true, memory_order_relaxed);
    }
    if (!thread->trimming) {
        thread->trimming = true;
        thread->trim.expired = trim;
        vb_timer_start(thread, &thread->trim, thread->now_ns + TRIM_INTERVAL_NS);
    }
}

bool vb_file_map_read(struct vb_file_map *map, struct vb_request *request)
{
    const unsigned char *from = map->base + request->offset;
    struct reading here = {.map = map, .outer = reading};

    note_use(map, request->thread);
    reading = &here;
    atomic_signal_fence(memory_order_seq_cst); /* the handler runs on this thread */
    if (request->take) {
        request->take(request, from);
    } else {
        vb_prefetch(from, request->bytes);
        vb_request_fill(request, from);
    }
    atomic_signal_fence(memory_order_seq_cst);
    reading = here.outer;
    /* Set before zero pages appear, so whoever has copied one of those sees it. */
    return !atomic_load_explicit(&map->lost, memory_order_acquire);
}

bool vb_file_map_fault(uintptr_t address)
{
    for (const struct reading *level = reading; level; level = level->outer) {
        struct vb_file_map *map = level->map;

        if (address - (uintptr_t)map->base < map->length) {
            atomic_store(&map->lost, true);
            return mmap(map->base, map->length, PROT_READ,
                        MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                        0) != MAP_FAILED;
        }
    }
    return false;
}

/* ---- giving memory back ------------------------------------------------------------------- */

/* When to look at this mapping again; 0: not before it is used. */
static uint64_t trim_map(struct vb_file_map *map)
{
    uint64_t step = map->length - map->trimmed;

    if (atomic_exchange_explicit(&map->used, false, memory_order_relaxed)) {
        map->trimmed = 0;
        return TRIM_INTERVAL_NS;
    }
    if (map->trimmed == map->length) {
        return 0;
    }
    step = step < TRIM_STEP ? step : TRIM_STEP;
    madvise(map->base + map->trimmed, step, MADV_DONTNEED);
    map->trimmed += step;
    return TRIM_STEP_NS;
}

static void trim(struct vb_timer *timer)
{
    struct vb_iothread *thread = vb_container_of(timer, struct vb_iothread, trim);
    uint64_t next = 0;

    if (pthread_mutex_trylock(&maps_lock) != 0) { /* another thread is at it */
        vb_timer_start(thread, timer, thread->now_ns + TRIM_INTERVAL_NS);
        return;
    }
    for (struct vb_file_map *map = maps; map; map = map->next) {
        uint64_t again = trim_map(map);
        next = again && (!next || again < next) ? again : next;
    }
    pthread_mutex_unlock(&maps_lock);
    if (next) {
        vb_timer_start(thread, timer, thread->now_ns + next);
    } else {
        thread->trimming = false;
    }
}
