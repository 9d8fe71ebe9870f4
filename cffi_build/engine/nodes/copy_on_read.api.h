/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * copy_on_read: child 0 (role `file`), seen as a row of regions of 2^region_bits bytes. A request whose
 * regions are all marked goes to the child; others become VB_EVENT_UPCALL events, flushes excepted. A
 * mark says that nothing is to be copied into a region any more.
 */
struct vb_copy_on_read_options {
    uint64_t cookie;      /* of the upcalls */
    uint64_t size;        /* bytes of the disk */
    uint8_t region_bits;  /* 9 to 21 */
};

vb_node *vb_node_copy_on_read_new(vb_engine *engine, const struct vb_copy_on_read_options *options,
                                  char *error);
/* Other sizes, and no marks; only while every export that reaches the node is paused. */
int vb_copy_on_read_reset(vb_node *node, uint64_t size, uint8_t region_bits, char *error);
void vb_copy_on_read_mark(vb_node *node, uint64_t first, uint64_t count);
/* The first region from `first` on that is marked, or is not; the number of regions if none is. */
uint64_t vb_copy_on_read_find(vb_node *node, uint64_t first, bool marked);
