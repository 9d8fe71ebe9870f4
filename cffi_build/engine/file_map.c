/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * file_map.c: reads and writes of what is in the page cache, without a system call.
 *
 * Of a cached 4 KiB read, more than half is spent on the way into the kernel and back; of a
 * 64 KiB write three quarters, since the kernel takes each page by itself, under a lock.
 * A file that is mapped can be copied from and to directly, but a page that is not in memory
 * then stops the thread until the disk has answered, and a page that is no more (the file was
 * shortened, the disk failed or is full) is SIGBUS. So:
 *  - Only pages are read this way that have been read or written by a system call
 *    before: a bit per page remembers. Should memory have become short since, the copy is slow;
 *    the caller notices, and all bits are forgotten.
 *  - Only pages are written this way that have been written by system calls as a whole: these
 *    exist, to their ends, and have their place on the disk. Where a file is cut off or a hole is made,
 *    that is forgotten first.
 *  - And only in regions all of which has been written that way since the last flush. When a clean page
 *    is written to, the kernel takes a fault, and takes for dirty whatever it keeps in one
 *    piece with that page, up to a MiB and more: a sector would become a large write. Here all
 *    of that is dirty anyway. The faults may cost a sixteenth of the time since the flush, at most:
 *    who flushes all the time is better off with system calls.
 *  - The signal handler replaces what has failed by memory of nobody's and marks the mapping lost. Who
 *    was copying sees the mark and does it again by a system call, which gives the
 *    right answer or the right error. The mapping is not used again.
 *  - Only file systems are mapped whose mappings and system calls see the same data; written are
 *    those that overwrite in place.
 *
 * What is written is in the page cache then, as after write(): it outlives this process, and fdatasync()
 * brings it to the disk. With the fault comes what write() does, too: who dirties too much
 * has to wait. One
 * difference: kill -9 may come in the middle of a sector. So metadata are never written this way, only
 * what a guest writes (VB_REQ_GUEST), which repeats it when it meets the next process.
 *
 * The mapping goes beyond the end of the file, which may grow: snapshots begin as small files.
 * It would count as this process's memory for as long as it lives. A timer on the I/O
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

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342
#endif

#define PAGE 4096ull
#define PAGE_BITS 12
#define FOLIO_MAX (2ull << 20)
#define PAGE_SIZE_MAX 65536ull
/* How much a file may grow before its new pages are for system calls. (TSan has few addresses.) */
#ifdef __SANITIZE_THREAD__
#define ROOM (64ull << 20)
#else
#define ROOM (64ull << 30)
#endif
/* Mappings have their places modulo PLACES, PLACE_STEP apart; the latter keeps huge pages whole. */
#define PLACES (64ull << 20)
#define PLACE_STEP (2ull << 20)
/* As large as what the kernel may take for dirty at once, or nearly: a bit per page, whole words. */
#define REGION (1ull << 20)
#define REGION_WORDS (REGION / PAGE / 64)
/* The kernel writes what is dirty by itself, too, about that often. */
#define CLEAN_INTERVAL_NS 5000000000u
#define LOST_FACTOR 16u
#define TRIM_INTERVAL_NS 1000000000u
/*
 * Dropping the page table entries of so much takes 10 us, or ten times as long under a hypervisor, and
 * other requests of the thread wait for it. So that goes on for TRIM_NS at a time, and not more often
 * than once in TRIM_STEP_NS.
 */
#define TRIM_STEP (2ull << 20)
#define TRIM_NS 100000u
#define TRIM_STEP_NS 1000000u

/* All mappings, for the timers. The lock is taken when nodes come and go, and by timers. */
static pthread_mutex_t maps_lock = PTHREAD_MUTEX_INITIALIZER;
static struct vb_file_map *maps;

/*
 * What this thread is copying from or to, for the signal handler: the innermost, since who takes what was
 * read may read elsewhere before it returns. (initial-exec: a handler may not wait for the
 * storage to be allocated.)
 */
struct copying {
    struct vb_file_map *map;
    uint64_t begin, end; /* of the file, whole pages of whatever size they are */
    const struct copying *outer;
};
static _Thread_local const struct copying *copying __attribute__((tls_model("initial-exec")));

/* ---- life --------------------------------------------------------------------------- */

enum use { NEVER, READ_ONLY, READ_AND_WRITE };

static enum use use_of(int fd, bool writable)
{
    struct statfs status;

    if (fstatfs(fd, &status) < 0) {
        return NEVER;
    }
    switch ((unsigned long)status.f_type) {
    case EXT4_SUPER_MAGIC: /* ext2 and ext3, too */
    case XFS_SUPER_MAGIC:
    case TMPFS_MAGIC:
        return writable ? READ_AND_WRITE : READ_ONLY;
    case BTRFS_SUPER_MAGIC:
    case F2FS_SUPER_MAGIC:
        return READ_ONLY;
    default:
        return NEVER;
    }
}

/* Of one bit per page, for whole regions. */
static size_t bitmap_size(const struct vb_file_map *map)
{
    return (map->length / REGION + 1) * REGION_WORDS * sizeof(uint64_t);
}

static _Atomic uint64_t *map_bitmap(const struct vb_file_map *map)
{
    void *memory = mmap(NULL, bitmap_size(map), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

static void unmap_bitmap(const struct vb_file_map *map, _Atomic uint64_t *bitmap)
{
    if (bitmap) {
        munmap(bitmap, bitmap_size(map));
    }
}

static void clear_bitmap(const struct vb_file_map *map, _Atomic uint64_t *bitmap)
{
    madvise(bitmap, bitmap_size(map), MADV_DONTNEED); /* reads as zeroes from now on */
}

static int protection(const struct vb_file_map *map)
{
    return map->writable ? PROT_READ | PROT_WRITE : PROT_READ;
}

/*
 * A mapping of `length` bytes, not where others are in the bits that say where in the CPU's first cache
 * a byte may be. Legs are compared at the same offset of each: with all of these bits the same
 * (on AMD's CPUs, which guess by a hash of them, that takes 128 MiB and more between two mappings) each leg's
 * bytes push the others' out, and a vote takes twice as long.
 */
static void *map_apart(uint64_t length, int prot, int fd)
{
    static _Atomic uintptr_t last;
    uintptr_t place = atomic_fetch_add(&last, PLACE_STEP);
    char *room = mmap(NULL, length + PLACES, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uintptr_t before = (place - (uintptr_t)room) % PLACES;

    if (room == MAP_FAILED) {
        return MAP_FAILED;
    }
    if (mmap(room + before, length, prot, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, 0) ==
        MAP_FAILED) {
        munmap(room, length + PLACES);
        return MAP_FAILED;
    }
    if (before > 0) {
        munmap(room, before);
    }
    munmap(room + before + length, PLACES - before);
    return room + before;
}

static bool map_file(struct vb_file_map *map, int fd, uint64_t length)
{
    void *base = MAP_FAILED;

    map->length = length & ~(PAGE - 1);
    if (map->length == 0) {
        return false;
    }
    map->cached = map_bitmap(map);
    map->written = map_bitmap(map);
    if (map->cached && map->written) {
        base = map_apart(map->length, protection(map), fd);
    }
    if (base == MAP_FAILED) {
        unmap_bitmap(map, map->cached);
        unmap_bitmap(map, map->written);
        return false;
    }
    map->base = base;
    return true;
}

void vb_file_map_open(struct vb_file_map *map, int fd, bool writable)
{
    struct stat status;
    enum use use = use_of(fd, writable);
    uint64_t size;

    if (fstat(fd, &status) < 0 || !S_ISREG(status.st_mode) || use == NEVER) {
        return;
    }
    map->writable = use == READ_AND_WRITE;
    size = (uint64_t)status.st_size;
    if (!map_file(map, fd, size + ROOM) && !map_file(map, fd, size)) {
        return; /* nothing lost but speed */
    }
    atomic_init(&map->clean_ns, vb_clock_ns());
    madvise(map->base, map->length, MADV_DONTDUMP);
    madvise(map->base, map->length, MADV_RANDOM); /* a fault may not read ahead: it should not read at all */
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
    unmap_bitmap(map, map->cached);
    unmap_bitmap(map, map->written);
}

/* ---- which pages are in memory --------------------------------------------------------- */

static void remember(_Atomic uint64_t *bitmap, uint64_t page)
{
    _Atomic uint64_t *word = &bitmap[page / 64];
    uint64_t bit = 1ull << (page % 64);

    if (!(atomic_load_explicit(word, memory_order_relaxed) & bit)) {
        atomic_fetch_or_explicit(word, bit, memory_order_relaxed); /* several threads mark pages */
    }
}

static bool remembered(const _Atomic uint64_t *bitmap, uint64_t offset, uint64_t bytes)
{
    for (uint64_t page = offset >> PAGE_BITS; page <= (offset + bytes - 1) >> PAGE_BITS; page++) {
        uint64_t word = atomic_load_explicit(&bitmap[page / 64], memory_order_relaxed);

        if (!(word & 1ull << (page % 64))) {
            return false;
        }
    }
    return true;
}

static bool is_small(const struct vb_file_map *map, uint64_t offset, uint64_t bytes)
{
    return map->base && bytes <= VB_FILE_MAP_TAKE_MAX && offset + bytes <= map->length;
}

/* A fault maps as much as the kernel keeps in one piece, which may go on behind these pages. */
static void reach(struct vb_file_map *map, uint64_t end)
{
    uint64_t known = atomic_load_explicit(&map->end, memory_order_relaxed);

    end = (end + FOLIO_MAX - 1) & ~(FOLIO_MAX - 1);
    end = end < map->length ? end : map->length;

    while (known < end && !atomic_compare_exchange_weak(&map->end, &known, end)) {
    }
}

void vb_file_map_seen(struct vb_file_map *map, uint64_t offset, uint64_t bytes)
{
    uint64_t first = offset >> PAGE_BITS, end = (offset + bytes + PAGE - 1) >> PAGE_BITS;

    if (!is_small(map, offset, bytes)) {
        return;
    }
    reach(map, end << PAGE_BITS);
    for (uint64_t page = first; page < end; page++) {
        remember(map->cached, page);
    }
}

void vb_file_map_wrote(struct vb_file_map *map, uint64_t offset, uint64_t bytes)
{
    vb_file_map_seen(map, offset, bytes);
    if (!map->writable || !is_small(map, offset, bytes)) {
        return;
    }
    for (uint64_t page = (offset + PAGE - 1) >> PAGE_BITS; (page + 1) << PAGE_BITS <= offset + bytes;
         page++) {
        remember(map->written, page);
    }
    if (!atomic_load_explicit(&map->dirty, memory_order_relaxed)) {
        atomic_store_explicit(&map->dirty, true, memory_order_relaxed);
    }
}

static void forget_range(struct vb_file_map *map, _Atomic uint64_t *bitmap, uint64_t offset,
                         uint64_t end)
{
    uint64_t known = atomic_load_explicit(&map->end, memory_order_relaxed);

    end = end < known ? end : known;
    for (uint64_t page = offset >> PAGE_BITS; page << PAGE_BITS < end; page++) {
        _Atomic uint64_t *word = &bitmap[page / 64];

        if (atomic_load_explicit(word, memory_order_relaxed) == 0) {
            page |= 63; /* a hole may be large */
        } else {
            atomic_fetch_and_explicit(word, ~(1ull << (page % 64)), memory_order_relaxed);
        }
    }
}

void vb_file_map_discard(struct vb_file_map *map, uint64_t offset, uint64_t bytes)
{
    forget_range(map, map->written, offset, offset + bytes);
}

void vb_file_map_cut_off(struct vb_file_map *map, uint64_t size)
{
    forget_range(map, map->written, size, UINT64_MAX);
    forget_range(map, map->cached, size, UINT64_MAX);
}

/* What is written meanwhile is forgotten or not; another system call is all it takes. */
void vb_file_map_clean(struct vb_file_map *map, uint64_t now_ns)
{
    if (atomic_load_explicit(&map->dirty, memory_order_relaxed)) {
        atomic_store_explicit(&map->dirty, false, memory_order_relaxed);
        clear_bitmap(map, map->written);
    }
    atomic_store_explicit(&map->clean_ns, now_ns, memory_order_relaxed);
    atomic_store_explicit(&map->lost_ns, 0, memory_order_relaxed);
}

struct vb_page_faults vb_page_faults(struct vb_iothread *thread)
{
    struct vb_page_faults before = thread->page_faults;
    struct rusage usage;

    getrusage(RUSAGE_THREAD, &usage);
    thread->page_faults.minor = (uint64_t)usage.ru_minflt;
    thread->page_faults.major = (uint64_t)usage.ru_majflt;
    return (struct vb_page_faults){
        .minor = thread->page_faults.minor - before.minor,
        .major = thread->page_faults.major - before.major,
    };
}

void vb_file_map_lost(struct vb_file_map *map, uint64_t ns)
{
    atomic_fetch_add_explicit(&map->lost_ns, ns, memory_order_relaxed);
}

void vb_file_map_forget(struct vb_file_map *map)
{
    clear_bitmap(map, map->written);
    clear_bitmap(map, map->cached);
}

static bool is_usable(struct vb_file_map *map, uint64_t offset, uint64_t bytes)
{
    return map->base && offset + bytes <= map->length &&
           !atomic_load_explicit(&map->lost, memory_order_relaxed);
}

bool vb_file_map_has(struct vb_file_map *map, uint64_t offset, uint64_t bytes)
{
    return is_usable(map, offset, bytes) && remembered(map->cached, offset, bytes);
}

/* All of the regions in which these bytes are. The bitmap has room for whole regions. */
static bool are_dirty(const struct vb_file_map *map, uint64_t offset, uint64_t bytes)
{
    uint64_t end = ((offset + bytes - 1) / REGION + 1) * REGION_WORDS, all = ~0ull;

    for (uint64_t word = offset / REGION * REGION_WORDS; word < end; word++) {
        all &= atomic_load_explicit(&map->written[word], memory_order_relaxed);
    }
    return all == ~0ull;
}

bool vb_file_map_accepts(struct vb_file_map *map, uint64_t offset, uint64_t bytes,
                         uint64_t now_ns)
{
    uint64_t clean_ns, lost_ns;

    if (!map->writable || !is_usable(map, offset, bytes) || !are_dirty(map, offset, bytes)) {
        return false;
    }
    clean_ns = atomic_load_explicit(&map->clean_ns, memory_order_relaxed);
    lost_ns = atomic_load_explicit(&map->lost_ns, memory_order_relaxed);
    return lost_ns * LOST_FACTOR <= now_ns - clean_ns || now_ns < clean_ns;
}

/* ---- copies ------------------------------------------------------------------------------- */

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

static void begin_copy(struct copying *here, struct vb_file_map *map,
                       const struct vb_request *request)
{
    note_use(map, request->thread);
    here->map = map;
    here->begin = request->offset & ~(PAGE_SIZE_MAX - 1);
    here->end = (request->offset + request->bytes + PAGE_SIZE_MAX - 1) & ~(PAGE_SIZE_MAX - 1);
    here->end = here->end < map->length ? here->end : map->length;
    here->outer = copying;
    copying = here;
    atomic_signal_fence(memory_order_seq_cst); /* the handler runs on this thread */
}

/* The mark is set before pages of nobody's appear, so whoever has met one of those sees it. */
static bool end_copy(const struct copying *here)
{
    atomic_signal_fence(memory_order_seq_cst);
    copying = here->outer;
    return !atomic_load_explicit(&here->map->lost, memory_order_acquire);
}

bool vb_file_map_read(struct vb_file_map *map, struct vb_request *request)
{
    const unsigned char *from = map->base + request->offset;
    struct copying here;

    begin_copy(&here, map, request);
    if (request->take) {
        request->take(request, from, 0, request->bytes);
    } else {
        vb_prefetch(from, request->bytes);
        vb_request_fill(request, from);
    }
    return end_copy(&here);
}

/*
 * Past the CPU's caches, which have no use for what goes to a disk: what was there before need not be
 * read first. `to` is aligned to sectors.
 */
static void store(unsigned char *to, const unsigned char *from, size_t bytes)
{
#ifdef __SSE2__
    for (; bytes >= 64 && (uintptr_t)to % 16 == 0; to += 64, from += 64, bytes -= 64) {
        const __m128i *source = (const __m128i *)from;
        __m128i *target = (__m128i *)to;
        __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);

        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
#endif
    memcpy(to, from, bytes);
}

/* Such stores are in no order by themselves; whoever is told of the end must find them done. */
static void stored(void)
{
#ifdef __SSE2__
    _mm_sfence();
#endif
}

bool vb_file_map_write(struct vb_file_map *map, struct vb_request *request)
{
    unsigned char *to = map->base + request->offset;
    struct copying here;

    begin_copy(&here, map, request);
    vb_guest_write_begin(); /* not there, but as little ordered by us */
    for (uint32_t i = 0; i < request->niov; i++) {
        store(to, request->iov[i].iov_base, request->iov[i].iov_len);
        to += request->iov[i].iov_len;
    }
    vb_guest_write_end();
    stored();
    return end_copy(&here);
}

/* Only what this thread is copying is replaced: other threads find out about the rest, or need not. */
bool vb_file_map_fault(uintptr_t address)
{
    for (const struct copying *level = copying; level; level = level->outer) {
        struct vb_file_map *map = level->map;
        unsigned char *begin = map->base + level->begin;
        size_t bytes = level->end - level->begin;

        if (address - (uintptr_t)begin < bytes) {
            atomic_store(&map->lost, true);
            return mmap(begin, bytes, protection(map),
                        MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                        0) != MAP_FAILED;
        }
    }
    return false;
}

/* ---- giving memory back ------------------------------------------------------------------- */

/* Work until `deadline_ns`, or a step longer. When to look at this mapping again; 0: not before it is used. */
static uint64_t trim_map(struct vb_file_map *map, uint64_t now_ns, uint64_t deadline_ns)
{
    uint64_t clean_ns = atomic_load_explicit(&map->clean_ns, memory_order_relaxed);
    uint64_t end = atomic_load_explicit(&map->end, memory_order_relaxed);

    if (now_ns > clean_ns + CLEAN_INTERVAL_NS) {
        vb_file_map_clean(map, now_ns);
    }
    if (atomic_exchange_explicit(&map->used, false, memory_order_relaxed)) {
        map->trimmed = 0;
        return TRIM_INTERVAL_NS;
    }
    while (map->trimmed < end && vb_clock_ns() < deadline_ns) {
        uint64_t step = end - map->trimmed < TRIM_STEP ? end - map->trimmed : TRIM_STEP;

        madvise(map->base + map->trimmed, step, MADV_DONTNEED);
        map->trimmed += step;
    }
    return map->trimmed < end ? TRIM_STEP_NS : 0;
}

static void trim(struct vb_timer *timer)
{
    struct vb_iothread *thread = vb_container_of(timer, struct vb_iothread, trim);
    uint64_t deadline_ns = vb_clock_ns() + TRIM_NS;
    uint64_t next = 0;

    if (pthread_mutex_trylock(&maps_lock) != 0) { /* another thread is at it */
        vb_timer_start(thread, timer, thread->now_ns + TRIM_INTERVAL_NS);
        return;
    }
    for (struct vb_file_map *map = maps; map; map = map->next) {
        uint64_t again = trim_map(map, thread->now_ns, deadline_ns);
        next = again && (!next || again < next) ? again : next;
    }
    pthread_mutex_unlock(&maps_lock);
    if (next) {
        vb_timer_start(thread, timer, thread->now_ns + next);
    } else {
        thread->trimming = false;
    }
}
