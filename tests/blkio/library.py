# SPDX-License-Identifier: GPL-2.0-or-later
"""The shared library itself: where it is, and the part of its C interface that tests need."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import Any

import cffi

TOP = Path(__file__).resolve().parents[2]

FUA = 1 << 0
NO_UNMAP = 1 << 1
NO_FALLBACK = 1 << 2

ffi: Any = cffi.FFI()
ffi.cdef(
    """
    struct blkio;
    struct blkioq;
    struct iovec { void *iov_base; size_t iov_len; };
    struct timespec { long tv_sec; long tv_nsec; };
    struct blkio_mem_region {
        void *addr; size_t len; uint64_t iova; int64_t fd_offset; int fd; uint32_t flags;
    };
    struct blkio_completion {
        void *user_data; const char *error_msg; int ret; uint8_t reserved_[12];
    };
    const char *blkio_get_error_msg(void);
    int blkio_create(const char *driver, struct blkio **bp);
    int blkio_connect(struct blkio *b);
    int blkio_start(struct blkio *b);
    void blkio_destroy(struct blkio **bp);
    int blkio_get_str(struct blkio *b, const char *name, char **value);
    int blkio_set_str(struct blkio *b, const char *name, const char *value);
    int blkio_alloc_mem_region(struct blkio *b, struct blkio_mem_region *region, size_t len);
    void blkio_free_mem_region(struct blkio *b, const struct blkio_mem_region *region);
    int blkio_map_mem_region(struct blkio *b, const struct blkio_mem_region *region);
    void blkio_unmap_mem_region(struct blkio *b, const struct blkio_mem_region *region);
    struct blkioq *blkio_get_queue(struct blkio *b, int index);
    struct blkioq *blkio_get_poll_queue(struct blkio *b, int index);
    void blkioq_readv(struct blkioq *q, uint64_t start, const struct iovec *iovec, int iovcnt,
                      void *user_data, uint32_t flags);
    void blkioq_writev(struct blkioq *q, uint64_t start, struct iovec *iovec, int iovcnt,
                       void *user_data, uint32_t flags);
    void blkioq_write_zeroes(struct blkioq *q, uint64_t start, uint64_t len, void *user_data,
                             uint32_t flags);
    void blkioq_discard(struct blkioq *q, uint64_t start, uint64_t len, void *user_data,
                        uint32_t flags);
    void blkioq_flush(struct blkioq *q, void *user_data, uint32_t flags);
    int blkioq_do_io(struct blkioq *q, struct blkio_completion *completions, int min_completions,
                     int max_completions, struct timespec *timeout);
    void free(void *pointer);
    """
)


def plain_environment() -> dict[str, str]:
    """For other programs than vhostblk: without the sanitizer that may be preloaded into it."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def _find() -> Path | None:
    if given := os.environ.get("VHOSTBLK_LIBBLKIO"):
        return Path(given) / "libblkio.so.1"
    found = sorted((TOP / "build" / "test-tools").glob("usr/lib/**/libblkio.so.1"))
    return found[0] if found else None


@functools.cache
def library() -> Any:
    """The loaded library; fetched first if it is not there (scripts/fetch-test-tools)."""
    path = _find()
    if path is None:
        done = subprocess.run(
            [TOP / "scripts" / "fetch-test-tools"],
            env=plain_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        path = _find()
        if path is None:
            raise RuntimeError(f"scripts/fetch-test-tools did not get libblkio:\n{done.stdout}")
    return ffi.dlopen(str(path))


@functools.cache
def libc() -> Any:
    """For free(3), which libblkio wants for its strings."""
    return ffi.dlopen(None)
