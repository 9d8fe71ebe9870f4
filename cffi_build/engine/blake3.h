/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * BLAKE3 of many blocks of one size at once, as wide as this CPU's vectors are.
 */
#ifndef VB_BLAKE3_H
#define VB_BLAKE3_H

#include <stddef.h>
#include <stdint.h>

/*
 * The 32-byte digests of `blocks` blocks of 2^block_bits bytes (1 KiB < 2^block_bits <= 64 KiB),
 * which lie one after the other. Any thread. `vector` is how many bytes wide the vectors may be:
 * 16, 32 or 64, no more than the CPU has; 0 for the widest that it has.
 */
void vb_blake3(const void *data, size_t blocks, unsigned block_bits, unsigned char *digests,
               unsigned vector);

#endif
