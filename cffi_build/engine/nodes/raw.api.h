/* SPDX-License-Identifier: GPL-2.0-or-later */
/* raw: child 0 (role `file`), seen from `offset` on. Bounds are checked by the export. */
vb_node *vb_node_raw_new(vb_engine *engine, uint64_t offset, char *error);
