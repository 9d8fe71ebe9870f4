/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * guest_fault.c: memory that a front-end shared and then took away.
 *
 * Whoever shares a file can shorten it afterwards; touching the mapping behind its
 * new end is SIGBUS, which would end the process and with it all the other guests.
 * The handler here looks the address up among what front-ends have shared. If it
 * finds it, zero pages take the mapping's place and that one connection is ended;
 * any other SIGBUS is what it always was.
 */
#include "device.h"
#include "file_map.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define RANGES_MAX 4096

/* Written under the lock by device threads; read by the handler, which may not take it. */
struct shared_range {
    _Atomic uintptr_t start; /* 0: unused */
    _Atomic size_t length;
    _Atomic(struct vb_device *) device;
    bool current;            /* under the lock: still mapped */
};

static struct shared_range ranges[RANGES_MAX];
static pthread_mutex_t ranges_lock = PTHREAD_MUTEX_INITIALIZER;

static struct shared_range *find_range(uintptr_t address)
{
    for (size_t i = 0; i < RANGES_MAX; i++) {
        uintptr_t start = atomic_load(&ranges[i].start);

        if (start && address - start < atomic_load(&ranges[i].length)) {
            return &ranges[i];
        }
    }
    return NULL;
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

static bool put_zeroes(uintptr_t start, size_t length)
{
    return mmap((void *)start, length, PROT_READ | PROT_WRITE,
                MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

static struct vb_device *replace_memory(uintptr_t address)
{
    struct shared_range *range = find_range(address);

    if (range) {
        struct vb_device *device = atomic_load(&range->device);
        return put_zeroes(atomic_load(&range->start), atomic_load(&range->length)) ? device : NULL;
    }
    if (handling) {
        return put_zeroes(address & ~(uintptr_t)(VB_PAGE_SIZE - 1), VB_PAGE_SIZE) ? handling : NULL;
    }
    return NULL;
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    struct vb_device *device = replace_memory((uintptr_t)info->si_addr);
    const char *none = NULL;

    (void)context;
    if (!device && vb_file_map_fault((uintptr_t)info->si_addr)) {
        return;
    }
    if (!device) {
        signal(signal_number, SIG_DFL); /* happens again on return, and then it counts */
        return;
    }
    atomic_compare_exchange_strong(&device->violation, &none,
                                   "shared memory that was taken away (its file was truncated)");
    vb_device_wake(device);
}

void vb_guest_fault_init(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART};

    sigaction(SIGBUS, &action, NULL);
}

static bool is_range(const struct shared_range *range, const struct vb_device *device,
                     uintptr_t start, size_t length)
{
    return atomic_load(&range->start) == start && atomic_load(&range->length) == length &&
           atomic_load(&range->device) == device;
}

static void keep_range(struct vb_device *device, const void *start, size_t length)
{
    struct shared_range *unused = NULL;

    for (size_t i = 0; start && i < RANGES_MAX; i++) {
        if (is_range(&ranges[i], device, (uintptr_t)start, length)) {
            ranges[i].current = true;
            return;
        }
        if (!unused && atomic_load(&ranges[i].start) == 0) {
            unused = &ranges[i];
        }
    }
    if (start && unused) {
        unused->current = true;
        atomic_store(&unused->length, length);
        atomic_store(&unused->device, device);
        atomic_store(&unused->start, (uintptr_t)start);
    }
}

/* Forgets the device's ranges that nobody has called current since the last time. */
static void sweep_ranges(const struct vb_device *device)
{
    for (size_t i = 0; i < RANGES_MAX; i++) {
        if (atomic_load(&ranges[i].device) == device) {
            if (!ranges[i].current) {
                atomic_store(&ranges[i].start, 0);
                atomic_store(&ranges[i].device, NULL);
            }
            ranges[i].current = false;
        }
    }
}

/* What stays is never missing in between: lanes may be writing to it. */
void vb_guest_fault_watch(struct vb_device *device)
{
    const VuDev *vu = &device->vu;

    pthread_mutex_lock(&ranges_lock);
    for (uint32_t i = 0; i < vu->nregions; i++) {
        keep_range(device, (const void *)(uintptr_t)vu->regions[i].mmap_addr,
                   vu->regions[i].size + vu->regions[i].mmap_offset);
    }
    keep_range(device, vu->inflight_info.addr, vu->inflight_info.size);
    keep_range(device, vu->log_table, vu->log_size);
    sweep_ranges(device);
    pthread_mutex_unlock(&ranges_lock);
}

void vb_guest_fault_forget(struct vb_device *device)
{
    pthread_mutex_lock(&ranges_lock);
    sweep_ranges(device);
    pthread_mutex_unlock(&ranges_lock);
}
