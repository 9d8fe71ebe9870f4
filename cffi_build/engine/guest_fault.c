/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * guest_fault.c: memory that a front-end shared and then took away.
 *
 * Whoever shares a file can shorten it afterwards; touching the mapping behind its
 * new end is SIGBUS, which would end the process and with it all the other guests.
 * The handler here looks the address up among what front-ends have shared. If it
 * finds it, zero pages take the mapping's place and that one connection is ended;
 * any other SIGBUS goes to whoever handled it before, or ends the process as ever.
 */
#include "device.h"
#include "file_map.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Of one device: every memory region there can be, the in-flight area, the dirty log. */
#define RANGES_MAX (VHOST_USER_MAX_RAM_SLOTS + 2)
/* Of any machine's. */
#define LARGEST_PAGE ((size_t)16 << 30)

/*
 * What one device has mapped. Its device thread writes it, the handler reads it on any
 * thread and may not take a lock: the writer makes `version` odd, writes, makes it even
 * again, and who has read under an odd or changed version reads once more. Never freed, since
 * a handler may be looking; another device takes it over.
 */
struct vb_shared {
    struct vb_shared *next;
    bool taken; /* under the lock */
    _Atomic uint32_t version;
    _Atomic(struct vb_device *) device;
    _Atomic uint32_t count;
    struct {
        _Atomic uintptr_t start;
        _Atomic size_t length;
    } ranges[RANGES_MAX];
};

struct range {
    uintptr_t start;
    size_t length;
};

static _Atomic(struct vb_shared *) first_shared;
static pthread_mutex_t shared_lock = PTHREAD_MUTEX_INITIALIZER; /* of the list, for those who add */

/* ---- the handler: only what a signal handler may do ------------------------------------- */

/* What had SIGBUS before us. */
static struct sigaction previous;

static struct vb_device *search(struct vb_shared *shared, uintptr_t address, struct range *range)
{
    uint32_t count = atomic_load(&shared->count);

    for (uint32_t i = 0; i < count; i++) {
        range->start = atomic_load(&shared->ranges[i].start);
        range->length = atomic_load(&shared->ranges[i].length);
        if (address - range->start < range->length) {
            return atomic_load(&shared->device);
        }
    }
    return NULL;
}

static struct vb_device *find_range(uintptr_t address, struct range *range)
{
    struct vb_shared *shared = atomic_load(&first_shared);
    struct vb_device *found = NULL;

    for (; shared && !found; shared = shared->next) {
        uint32_t version;

        do {
            while ((version = atomic_load(&shared->version)) & 1) {
                sched_yield(); /* the writer touches no memory of a guest's: it will finish */
            }
            found = search(shared, address, range);
        } while (atomic_load(&shared->version) != version);
    }
    return found;
}

/*
 * The device whose message the library is handling on this thread. It touches what it
 * has just mapped before anyone can have noted the range. (initial-exec: a signal
 * handler may not wait for the storage to be allocated.)
 */
static _Thread_local struct vb_device *handling __attribute__((tls_model("initial-exec")));

void vb_guest_fault_handling(struct vb_device *device)
{
    handling = device;
}

/* The pages of that size in which [start, start + length) lies. */
static struct range in_pages(uintptr_t start, size_t length, size_t page)
{
    uintptr_t first = start & ~(page - 1);

    return (struct range){first, (start + length - first + page - 1) & ~(page - 1)};
}

/*
 * A mapping of huge pages goes on to the end of one, however much was asked for, and cannot be cut in
 * the middle of one: the kernel refuses that (EINVAL). So a larger page is tried then.
 */
bool vb_guest_fault_put_zeroes(uintptr_t start, size_t length)
{
    void *put = MAP_FAILED;

    for (size_t page = VB_PAGE_SIZE; page <= LARGEST_PAGE; page *= 2) {
        struct range range = in_pages(start, length, page);

        put = mmap((void *)range.start, range.length, PROT_READ | PROT_WRITE,
                   MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (put != MAP_FAILED || errno != EINVAL) {
            break;
        }
    }
    return put != MAP_FAILED;
}

int vb_guest_fault_unmap(void *address, size_t length)
{
    int ret = -1;

    for (size_t page = VB_PAGE_SIZE; page <= LARGEST_PAGE; page *= 2) {
        struct range range = in_pages((uintptr_t)address, length, page);

        ret = munmap((void *)range.start, range.length);
        if (ret == 0 || errno != EINVAL) {
            break;
        }
    }
    return ret;
}

static struct vb_device *replace_memory(uintptr_t address)
{
    struct range range;
    struct vb_device *device = find_range(address, &range);

    if (!device && handling) {
        device = handling;
        range = (struct range){address & ~(uintptr_t)(VB_PAGE_SIZE - 1), VB_PAGE_SIZE};
    }
    return device && vb_guest_fault_put_zeroes(range.start, range.length) ? device : NULL;
}

/*
 * The same signal again, with all that it says, and nobody to catch it: it arrives when the handler
 * returns. Only to restore the default and return would leave the process without protection
 * if the cause does not come again (somebody sent it, another thread has mapped something).
 */
static void die(int signal_number, siginfo_t *info)
{
    signal(signal_number, SIG_DFL);
    if (syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), signal_number, info) < 0) {
        raise(signal_number);
    }
}

static void pass_on(int signal_number, siginfo_t *info, void *context)
{
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal_number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal_number);
    } else if (previous.sa_handler == SIG_DFL || info->si_code > 0) { /* a fault is never ignored */
        die(signal_number, info);
    }
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    int saved = errno;
    bool fault = info->si_code > 0; /* and not somebody's kill(): there is an address */
    struct vb_device *device = fault ? replace_memory((uintptr_t)info->si_addr) : NULL;
    const char *none = NULL;

    if (device) {
        atomic_compare_exchange_strong(
            &device->violation, &none, "shared memory that was taken away (its file was truncated)");
        vb_device_wake(device);
    } else if (!fault || !vb_file_map_fault((uintptr_t)info->si_addr)) {
        pass_on(signal_number, info, context);
    }
    errno = saved;
}

void vb_guest_fault_init(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART};
    struct sigaction before;

    sigaction(SIGBUS, NULL, &before);
    if (!(before.sa_flags & SA_SIGINFO) || before.sa_sigaction != on_sigbus) {
        previous = before;
        sigaction(SIGBUS, &action, NULL);
    }
}

/* ---- what is mapped ------------------------------------------------------------------------ */

int vb_guest_fault_protect(struct vb_device *device)
{
    struct vb_shared *shared;

    pthread_mutex_lock(&shared_lock);
    for (shared = atomic_load(&first_shared); shared && shared->taken; shared = shared->next) {
    }
    if (!shared) {
        shared = calloc(1, sizeof(*shared));
        if (shared) {
            shared->next = atomic_load(&first_shared);
            atomic_store(&first_shared, shared);
        }
    }
    if (shared) {
        shared->taken = true;
        device->shared = shared;
    }
    pthread_mutex_unlock(&shared_lock);
    return shared ? 0 : -ENOMEM;
}

static void add_range(struct range *ranges, uint32_t *count, const void *start, size_t length)
{
    if (start) {
        ranges[(*count)++] = (struct range){(uintptr_t)start, length};
    }
}

static uint32_t mapped_now(const VuDev *vu, struct range ranges[RANGES_MAX])
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < vu->nregions; i++) {
        add_range(ranges, &count, (const void *)(uintptr_t)vu->regions[i].mmap_addr,
                  vu->regions[i].size + vu->regions[i].mmap_offset);
    }
    add_range(ranges, &count, vu->inflight_info.addr, vu->inflight_info.size);
    add_range(ranges, &count, vu->log_table, vu->log_size);
    return count;
}

static bool same(struct vb_shared *shared, const struct range *ranges, uint32_t count)
{
    if (atomic_load(&shared->count) != count) {
        return false;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (atomic_load(&shared->ranges[i].start) != ranges[i].start ||
            atomic_load(&shared->ranges[i].length) != ranges[i].length) {
            return false;
        }
    }
    return true;
}

static void replace_ranges(struct vb_shared *shared, struct vb_device *device,
                           const struct range *ranges, uint32_t count)
{
    atomic_fetch_add(&shared->version, 1);
    atomic_store(&shared->device, device);
    atomic_store(&shared->count, count);
    for (uint32_t i = 0; i < count; i++) {
        atomic_store(&shared->ranges[i].start, ranges[i].start);
        atomic_store(&shared->ranges[i].length, ranges[i].length);
    }
    atomic_fetch_add(&shared->version, 1);
}

void vb_guest_fault_watch(struct vb_device *device)
{
    struct range ranges[RANGES_MAX];
    uint32_t count = mapped_now(&device->vu, ranges);

    if (!same(device->shared, ranges, count)) {
        replace_ranges(device->shared, device, ranges, count);
    }
}

/*
 * Before the library unmaps anything. Its answer may wait for a front-end that does not read, and
 * what lies at those addresses by then is somebody else's.
 */
void vb_guest_fault_unwatch(struct vb_device *device)
{
    if (atomic_load(&device->shared->count) > 0) {
        replace_ranges(device->shared, device, NULL, 0);
    }
}

void vb_guest_fault_forget(struct vb_device *device)
{
    if (device->shared) {
        replace_ranges(device->shared, NULL, NULL, 0);
        pthread_mutex_lock(&shared_lock);
        device->shared->taken = false;
        pthread_mutex_unlock(&shared_lock);
        device->shared = NULL;
    }
}
