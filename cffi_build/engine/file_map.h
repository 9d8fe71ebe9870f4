/* SPDX-License-Identifier: GPL-2.0-or-later */
/* file_map.h: a file's pages, to be copied from while they are in memory. See file_map.c. */
#ifndef VB_FILE_MAP_H
#define VB_FILE_MAP_H

#include "engine.h"

/* Bytes that are copied at most. For larger reads a system call costs little in proportion. */
#define VB_FILE_MAP_COPY_MAX 16384u
/* Bytes that may be taken without being copied (vb_request.take). */
#define VB_FILE_MAP_TAKE_MAX 131072u

/* Zeroed memory is one that is not in use: no file system or no file for it. */
struct vb_file_map {
    unsigned char *base;       /* owned; NULL: not in use */
    uint64_t length;
    _Atomic uint64_t *cached;  /* owned; a bit per page: it was in memory when last looked at */
    _Atomic bool lost;         /* replaced by zero pages */
    _Atomic bool used;         /* since the last trim */
    uint64_t trimmed;          /* under maps_lock: how far page table entries are dropped */
    struct vb_file_map *next;  /* under maps_lock */
};

void vb_file_map_open(struct vb_file_map *map, int fd);  /* control */
void vb_file_map_close(struct vb_file_map *map);         /* control: nobody reads any more */

/* These bytes have just been read or written by a system call. */
void vb_file_map_seen(struct vb_file_map *map, uint64_t offset, uint64_t bytes);
/* Whether this thread has had to wait for a disk to bring in a page since the last call. */
bool vb_file_map_waited(struct vb_iothread *thread);
/* A copy has waited for the disk: nothing is known to be in memory. */
void vb_file_map_forget(struct vb_file_map *map);
bool vb_file_map_has(struct vb_file_map *map, uint64_t offset, uint64_t bytes);
/* Copies what vb_file_map_has() into the iovec, or has it taken; false: what was read is worthless. */
bool vb_file_map_read(struct vb_file_map *map, struct vb_request *request);

/* The signal handler: is it SIGBUS because a mapping of a file is gone? Then it is dealt with. */
bool vb_file_map_fault(uintptr_t address);

#endif
