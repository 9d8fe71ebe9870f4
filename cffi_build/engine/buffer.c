/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * buffer.c: memory for nodes that must hold data themselves (versions to be voted on, a
 * cipher's output). Page-aligned, so that it suits O_DIRECT; kept per I/O thread in powers of two,
 * so that a request allocates nothing once the thread has warmed up.
 */
#include "engine.h"

#include <stdlib.h>

#define ALIGNMENT 4096u
#define SMALLEST_BITS 12
#define LARGEST_BITS 20 /* what is larger comes from malloc() and goes back there */
#define KEPT_BYTES (4u << 20) /* of each size */

_Static_assert(LARGEST_BITS - SMALLEST_BITS + 1 == VB_BUFFER_CLASSES, "one list per size");

struct free_buffer {
    struct free_buffer *next;
};

/* The list for `size` bytes, or -1. */
static int class_of(size_t size)
{
    unsigned bits = SMALLEST_BITS;

    while (bits <= LARGEST_BITS && ((size_t)1 << bits) < size) {
        bits++;
    }
    return bits <= LARGEST_BITS ? (int)(bits - SMALLEST_BITS) : -1;
}

void *vb_buffer_get(struct vb_iothread *thread, size_t size)
{
    int class = class_of(size);
    struct free_buffer *found = class < 0 ? NULL : thread->free_buffers[class];
    void *made;

    vb_assert(vb_in_iothread(thread));
    if (found) {
        thread->free_buffers[class] = found->next;
        thread->free_buffer_counts[class]--;
        return found;
    }
    if (class >= 0) {
        size = (size_t)1 << (class + SMALLEST_BITS);
    }
    return posix_memalign(&made, ALIGNMENT, size) ? NULL : made;
}

void vb_buffer_put(struct vb_iothread *thread, void *memory, size_t size)
{
    int class = class_of(size);
    struct free_buffer *buffer = memory;

    vb_assert(vb_in_iothread(thread));
    if (class < 0 || thread->free_buffer_counts[class] >= KEPT_BYTES >> (class + SMALLEST_BITS)) {
        free(memory);
        return;
    }
    buffer->next = thread->free_buffers[class];
    thread->free_buffers[class] = buffer;
    thread->free_buffer_counts[class]++;
}

void vb_buffers_free(struct vb_iothread *thread)
{
    for (unsigned class = 0; class < VB_BUFFER_CLASSES; class++) {
        while (thread->free_buffers[class]) {
            struct free_buffer *next = thread->free_buffers[class]->next;

            free(thread->free_buffers[class]);
            thread->free_buffers[class] = next;
        }
    }
}
