/* SPDX-License-Identifier: GPL-2.0-or-later */
/* null: completes at once, or after latency_ns; reads zeroes or leaves memory alone. */
vb_node *vb_node_null_new(vb_engine *engine, uint64_t latency_ns, bool read_zeroes, char *error);
