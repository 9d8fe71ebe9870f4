/* SPDX-License-Identifier: GPL-2.0-or-later */
/* nodes/quorum_compare.h: versions of the same data, compared in one pass. */
#ifndef VB_QUORUM_COMPARE_H
#define VB_QUORUM_COMPARE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Whether `count` versions (at least one) of `bytes` bytes are all the same. On the way the first
 * of them goes to `to`, unless that is NULL; what is there after a false is worthless.
 */
typedef bool quorum_compare_fn(const unsigned char *const *versions, uint32_t count, size_t bytes,
                               unsigned char *to);

quorum_compare_fn quorum_compare; /* the best for this CPU */
quorum_compare_fn quorum_compare_portable;

#endif
