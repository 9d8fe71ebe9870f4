/* SPDX-License-Identifier: GPL-2.0-or-later */
/* file_map.h: a file's pages, to be read and written while they are in memory. See file_map.c. */
#ifndef VB_FILE_MAP_H
#define VB_FILE_MAP_H

#include "engine.h"

/* Bytes that are copied at most. For larger reads a system call costs little in proportion. */
#define VB_FILE_MAP_COPY_MAX 16384u
/* Bytes that may be written, or taken without being copied (vb_request.take). */
#define VB_FILE_MAP_TAKE_MAX 131072u

/* Zeroed memory is one that is not in use: no file system or no file for it. */
struct vb_file_map {
    unsigned char *base;       /* owned; NULL: not in use */
    uint64_t length;
    bool writable;
    _Atomic uint64_t *cached;  /* owned; a bit per page: it was in memory when last looked at */
    _Atomic uint64_t *written; /* owned; a bit per page: all of it by system calls since clean_ns */
    _Atomic bool dirty;        /* some are set */
    _Atomic uint64_t clean_ns; /* when all pages were last taken for clean */
    _Atomic uint64_t lost_ns;  /* to page faults since then */
    _Atomic uint64_t end;      /* no page behind is in use */
    _Atomic bool lost;         /* part of it is not the file any more */
    _Atomic bool used;         /* since the last trim */
    uint64_t trimmed;          /* under maps_lock: how far page table entries are dropped */
    struct vb_file_map *next;  /* under maps_lock */
};

void vb_file_map_open(struct vb_file_map *map, int fd, bool writable); /* control */
void vb_file_map_close(struct vb_file_map *map); /* control: nobody uses it any more */

/* These bytes have just been read or written by a system call. */
void vb_file_map_seen(struct vb_file_map *map, uint64_t offset, uint64_t bytes);
void vb_file_map_wrote(struct vb_file_map *map, uint64_t offset, uint64_t bytes);
/* These bytes are about to become a hole. */
void vb_file_map_discard(struct vb_file_map *map, uint64_t offset, uint64_t bytes);
/* The kernel is about to bring all that is dirty to the disk. */
void vb_file_map_clean(struct vb_file_map *map, uint64_t now_ns);

/* What this thread has met since the last call. */
struct vb_page_faults vb_page_faults(struct vb_iothread *thread);
/* A write took so long, and met faults. */
void vb_file_map_lost(struct vb_file_map *map, uint64_t ns);
/* The file is about to be cut off there. Any thread. */
void vb_file_map_cut_off(struct vb_file_map *map, uint64_t size);
/* A copy has waited for the disk: nothing is known to be in memory. */
void vb_file_map_forget(struct vb_file_map *map);
bool vb_file_map_has(struct vb_file_map *map, uint64_t offset, uint64_t bytes);
/* Copies what vb_file_map_has() into the iovec, or has it taken; false: what was read is worthless. */
bool vb_file_map_read(struct vb_file_map *map, struct vb_request *request);
/* May a write go to the mapping, and is it worth it? */
bool vb_file_map_accepts(struct vb_file_map *map, uint64_t offset, uint64_t bytes,
                         uint64_t now_ns);
/* Writes what vb_file_map_accepts(); false: what of it is in the file nobody knows. */
bool vb_file_map_write(struct vb_file_map *map, struct vb_request *request);

/* The signal handler: is it SIGBUS because a mapping of a file is gone? Then it is dealt with. */
bool vb_file_map_fault(uintptr_t address);

#endif
