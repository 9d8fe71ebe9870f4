/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * BLAKE3 ("BLAKE3: one function, fast everywhere", 2021-11-02, sections 2.1 to 2.5, "the
 * specification" below) in the mode without a key, for what deduplication needs: blocks of 2, 4, ...
 * 64 chunks of 1 KiB. Their trees are full, and equal levels of several blocks are hashed together,
 * so that all lanes of a vector have work to do.
 */
#include "blake3.h"

#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words of BLAKE3 are little-endian; this file takes them as they lie in memory"
#endif

enum { CHUNK_BITS = 10, MOST_CHUNKS = 64, DIGEST = 32 };

/* Flags of the compression function (table 3 of the specification). */
enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };

struct flags {
    uint32_t all, first, last; /* of all blocks of an input, its first one, its last one */
};

/* Table 1. */
static const uint32_t iv[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                               0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

/* Frames of AddressSanitizer that detect use after return are aligned to less than vectors are
 * (GCC bug 110027). */
#define UNCHECKED __attribute__((no_sanitize_address))

typedef uint32_t quad __attribute__((vector_size(16)));

#define JOIN_QUADS(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7)
#define JOIN_OCTETS(a, b) \
    __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)

#define LANES 4
#define NAME(x) x##_4
#define TARGET
#include "blake3_lanes.h"

#ifdef __x86_64__
#define LANES 8
#define NAME(x) x##_8
#define TARGET __attribute__((target("avx2")))
#include "blake3_lanes.h"

#define LANES 16
#define NAME(x) x##_16
#define TARGET __attribute__((target("avx512f,avx512vl,prefer-vector-width=512")))
#include "blake3_lanes.h"
#endif

typedef void hash_fn(const unsigned char *input, unsigned inputs, unsigned blocks,
                     const struct flags *flags, uint32_t first, uint32_t period,
                     unsigned char *out);

static hash_fn *choose(unsigned vector, unsigned *lanes)
{
#ifdef __x86_64__
    if ((!vector && __builtin_cpu_supports("avx512vl")) || vector == 64) {
        *lanes = 16;
        return hash_16;
    }
    if ((!vector && __builtin_cpu_supports("avx2")) || vector == 32) {
        *lanes = 8;
        return hash_8;
    }
#else
    (void)vector;
#endif
    *lanes = 4;
    return hash_4;
}

/* `inputs` of 64 * `blocks` bytes each. `out` may be where they lie: it is behind what is read. */
static void hash_all(hash_fn *hash, unsigned lanes, const unsigned char *input, unsigned inputs,
                     unsigned blocks, const struct flags *flags, unsigned period,
                     unsigned char *out)
{
    for (unsigned at = 0; at < inputs; at += lanes) {
        unsigned count = inputs - at < lanes ? inputs - at : lanes;

        hash(input + (size_t)at * blocks * 64, count, blocks, flags, at, period,
             out + (size_t)at * DIGEST);
    }
}

void vb_blake3(const void *data, size_t blocks, unsigned block_bits, unsigned char *digests,
               unsigned vector)
{
    static const struct flags chunk = {0, CHUNK_START, CHUNK_END};
    static const struct flags parent = {PARENT, 0, 0}, root = {PARENT | ROOT, 0, 0};
    const unsigned char *input = data;
    unsigned chunks = 1u << (block_bits - CHUNK_BITS);
    unsigned lanes;
    hash_fn *hash = choose(vector, &lanes);

    while (blocks) {
        unsigned count = MOST_CHUNKS / chunks; /* blocks at once */
        unsigned char values[MOST_CHUNKS * DIGEST];

        count = blocks < count ? (unsigned)blocks : count;
        hash_all(hash, lanes, input, count * chunks, 16, &chunk, chunks, values);
        for (unsigned left = chunks / 2; left > 1; left /= 2) {
            hash_all(hash, lanes, values, count * left, 1, &parent, 1, values);
        }
        hash_all(hash, lanes, values, count, 1, &root, 1, digests);
        input += (size_t)count << block_bits;
        digests += (size_t)count * DIGEST;
        blocks -= count;
    }
}
