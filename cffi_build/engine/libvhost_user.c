/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * libvhost_user.c: QEMU's libvhost-user, compiled from the source tree that
 * scripts/fetch-libvhost-user brought or the packager named; no line of it is
 * kept here. Being its own translation unit lets us replace one call: munmap(),
 * see vb_unmap_guest_memory().
 */
#include <stddef.h>
#include <sys/mman.h>

int vb_unmap_guest_memory(void *address, size_t length);
#define munmap vb_unmap_guest_memory

#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#include "libvhost-user.c"
