/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The L2 tables of a qcow2 image, as far as Python has them in memory: one slice, in the machine's byte
 * order, for each table of the image's map. What the map has allocated by itself is entered here
 * from its log (QEMU's docs/interop/qcow2.txt, "Standard Cluster Descriptor", "Extended L2 Entries").
 * Control's alone, as are the slices.
 */
typedef struct vb_map_words vb_map_words;

/* L2 entries are of two words where clusters have parts; slices have `slice_entries` of them. */
vb_map_words *vb_map_words_new(uint8_t unit_bits, uint8_t cluster_bits, uint64_t slice_entries);
void vb_map_words_free(vb_map_words *tables);
/* The words of a slice, which stay the caller's; NULL: they are going away. 0, or -ENOMEM. */
int vb_map_words_set(vb_map_words *tables, uint64_t slice, uint64_t *words);
void vb_map_words_enter(vb_map_words *tables, const struct vb_map_change *change);
/*
 * Enters what is in the map's log. The slices that have changed, each once, up to `max`: how many; 0
 * when there is no more. All slices that records are about have to be there.
 */
int vb_map_words_take_log(vb_map_words *tables, vb_node *map, uint64_t *slices, int max);
