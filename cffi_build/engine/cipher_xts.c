/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * cipher_xts.c: XTS around a block cipher in ECB mode (IEEE 1619, 5.3).
 *
 * XTS is C = E(P ^ T) ^ T, with a mask T for each block: the sector's encrypted number, doubled in
 * GF(2^128) from block to block. OpenSSL's own XTS wants a call for each sector, and for 512 bytes
 * that call costs as much as the cipher. With the masks in memory many sectors are one call in ECB
 * mode, at the cost of two passes over data that are in the cache. It is also the only
 * way to XTS with a cipher that OpenSSL knows no such mode of (Camellia).
 *
 * Nothing here depends on a key or on data, in time or in addresses.
 */
#include "cipher.h"

#include <endian.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blocks are loaded as they are");

#define WORDS_OF_BLOCK 2

/* ---- any CPU ------------------------------------------------------------------------------ */

static void begin_portable(const uint64_t *tweaks, size_t sectors, size_t sector_size,
                           const void *from, size_t ahead, void *to, void *masks)
{
    const unsigned char *in = from;
    unsigned char *out = to, *mask = masks;

    (void)ahead;
    for (size_t i = 0; i < sectors; i++, tweaks += WORDS_OF_BLOCK) {
        uint64_t low = tweaks[0], high = tweaks[1];

        for (size_t at = 0; at < sector_size; at += 16, in += 16, out += 16, mask += 16) {
            uint64_t carry = (uint64_t)((int64_t)high >> 63) & 0x87;
            uint64_t block[WORDS_OF_BLOCK], t[WORDS_OF_BLOCK] = {low, high};

            memcpy(block, in, 16);
            block[0] ^= low;
            block[1] ^= high;
            memcpy(mask, t, 16);
            memcpy(out, block, 16);
            high = high << 1 | low >> 63;
            low = low << 1 ^ carry;
        }
    }
}

static void end_portable(const void *from, const void *masks, void *to, size_t bytes)
{
    typedef uint64_t word __attribute__((aligned(1), may_alias));
    const word *in = from, *mask = masks;
    word *out = to;

    for (size_t i = 0; i < bytes / sizeof(*out); i++) {
        out[i] = in[i] ^ mask[i];
    }
}

const struct vb_xts vb_xts_portable = {begin_portable, end_portable, false};

/* ---- AVX2: two blocks in a vector ----------------------------------------------------------- */

#ifdef __x86_64__

#define AVX2 __attribute__((target("avx2")))

typedef uint64_t lanes __attribute__((vector_size(32), aligned(1), may_alias));

/* The halves of each block exchanged: what one of them shifts out the other one gets. */
#define OTHER_HALF(v) __builtin_shuffle((v), (lanes){1, 0, 3, 2})

/* What comes out at the top of a block (up to 4 bits) enters at the bottom times x^7 + x^2 + x + 1. */
#define REDUCE(c) ((c) ^ (((c) << 1 ^ (c) << 2 ^ (c) << 7) & (lanes){~0ull, 0, ~0ull, 0}))

/* Times x^4. */
AVX2 static inline lanes four_on(lanes v)
{
    lanes out = OTHER_HALF(v) >> 60;

    return v << 4 ^ REDUCE(out);
}

/* Times x^by, by less than 4 for each half. */
AVX2 static inline lanes some_on(lanes v, lanes by)
{
    lanes out = OTHER_HALF(v) >> 1 >> (63 - by);

    return v << by ^ REDUCE(out);
}

/* Two chains of masks, one for every other pair of blocks, so that neither waits for the other. */
AVX2 static void begin_avx2(const uint64_t *tweaks, size_t sectors, size_t sector_size,
                            const void *from, size_t ahead, void *to, void *masks)
{
    const lanes *in = from;
    lanes *out = to, *mask = masks;

    for (size_t i = 0; i < sectors; i++, tweaks += WORDS_OF_BLOCK) {
        const lanes tweak = {tweaks[0], tweaks[1], tweaks[0], tweaks[1]};
        lanes even = some_on(tweak, (lanes){0, 0, 1, 1});
        lanes odd = some_on(tweak, (lanes){2, 2, 3, 3});

        for (size_t at = 0; at < sector_size; at += 64, in += 2, out += 2, mask += 2) {
            __builtin_prefetch((const char *)in + ahead);
            mask[0] = even;
            mask[1] = odd;
            out[0] = in[0] ^ even;
            out[1] = in[1] ^ odd;
            even = four_on(even);
            odd = four_on(odd);
        }
    }
}

AVX2 static void end_avx2(const void *from, const void *masks, void *to, size_t bytes)
{
    const lanes *in = from, *mask = masks;
    lanes *out = to;

    for (size_t i = 0; i < bytes / sizeof(*out); i++) {
        out[i] = in[i] ^ mask[i];
    }
}

static const struct vb_xts xts_avx2 = {begin_avx2, end_avx2, true};

#endif

const struct vb_xts *vb_xts_best(void)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) {
        return &xts_avx2;
    }
#endif
    return &vb_xts_portable;
}
