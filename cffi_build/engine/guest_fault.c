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

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    struct shared_range *range = find_range((uintptr_t)info->si_addr);
    const char *none = NULL;

    (void)context;
    if (!range ||
        mmap((void *)atomic_load(&range->start), atomic_load(&range->length),
             PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
             0) == MAP_FAILED) {
        signal(signal_number, SIG_DFL); /* happens again on return, and then it counts */
        return;
    }
    atomic_compare_exchange_strong(&atomic_load(&range->device)->violation, &none,
                                   "shared memory that was taken away (its file was truncated)");
    vb_device_wake(atomic_load(&range->device));
}

void vb_guest_fault_init(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART};

    sigaction(SIGBUS, &action, NULL);
}

static void add_range(struct vb_device *device, const void *start, size_t length)
{
    for (size_t i = 0; start && i < RANGES_MAX; i++) {
        if (atomic_load(&ranges[i].start) == 0) {
            atomic_store(&ranges[i].length, length);
            atomic_store(&ranges[i].device, device);
            atomic_store(&ranges[i].start, (uintptr_t)start);
            return;
        }
    }
}

static void forget_ranges(const struct vb_device *device)
{
    for (size_t i = 0; i < RANGES_MAX; i++) {
        if (atomic_load(&ranges[i].device) == device) {
            atomic_store(&ranges[i].start, 0);
            atomic_store(&ranges[i].device, NULL);
        }
    }
}

void vb_guest_fault_watch(struct vb_device *device)
{
    const VuDev *vu = &device->vu;

    pthread_mutex_lock(&ranges_lock);
    forget_ranges(device);
    for (uint32_t i = 0; i < vu->nregions; i++) {
        add_range(device, (const void *)(uintptr_t)vu->regions[i].mmap_addr,
                  vu->regions[i].size + vu->regions[i].mmap_offset);
    }
    add_range(device, vu->inflight_info.addr, vu->inflight_info.size);
    add_range(device, vu->log_table, vu->log_size);
    pthread_mutex_unlock(&ranges_lock);
}

void vb_guest_fault_forget(struct vb_device *device)
{
    pthread_mutex_lock(&ranges_lock);
    forget_ranges(device);
    pthread_mutex_unlock(&ranges_lock);
}
