/* SPDX-License-Identifier: GPL-2.0-or-later */
struct vb_file_options {
    int32_t fd;              /* open file or block device; the node owns it on success */
    bool read_only;
    bool direct;             /* fd was opened with O_DIRECT (cache.direct) */
    bool no_flush;           /* flushes complete at once (cache.no-flush) */
    bool discard_unmap;      /* discard=unmap; false: discards complete, nothing happens */
    uint32_t detect_zeroes;  /* 0 off, 1 on, 2 unmap */
    uint32_t memory_align;   /* O_DIRECT: alignment of buffers, a power of two; else 1 */
    uint32_t request_align;  /* O_DIRECT: alignment of offset and length; else 1 */
};

vb_node *vb_node_file_new(vb_engine *engine, const struct vb_file_options *options, char *error);

/* The file is about to have this size, by way of another fd. Behind it nothing is written meanwhile. */
void vb_node_file_resize(vb_node *node, uint64_t size);
/* It has been made so long. */
void vb_node_file_grown(vb_node *node, uint64_t size);
/*
 * Any thread: whether the file system can make holes in a regular file that is open for writing, which
 * read as zeroes then. May wait for it.
 */
bool vb_file_can_punch(int fd);
