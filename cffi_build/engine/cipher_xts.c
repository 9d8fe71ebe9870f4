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

/* ---- four blocks at a time: one vector of AVX-512, or two of AVX2 ------------------------------ */

#ifdef __x86_64__

/* AddressSanitizer cannot align such vectors (GCC bug 110027). */
#define UNCHECKED __attribute__((no_sanitize_address))
#define INTO_TARGET UNCHECKED static inline __attribute__((always_inline))
#define AVX2 UNCHECKED __attribute__((target("avx2")))
#define AVX512 UNCHECKED __attribute__((target("avx512f")))

#define LANES 8

typedef uint64_t lanes __attribute__((vector_size(LANES * 8), aligned(1), may_alias));

/* The halves of each block exchanged: what one of them shifts out the other one gets. */
#define OTHER_HALF(v) __builtin_shuffle((v), (lanes){1, 0, 3, 2, 5, 4, 7, 6})

/* What comes out at the top of a block (up to 8 bits) enters at the bottom times x^7 + x^2 + x + 1. */
#define LOW_HALVES (lanes){~0ull, 0, ~0ull, 0, ~0ull, 0, ~0ull, 0}
#define REDUCE(c) ((c) ^ (((c) << 1 ^ (c) << 2 ^ (c) << 7) & LOW_HALVES))

/* `v` times x^by, 0 < by <= 8. */
INTO_TARGET void move_on(lanes *v, unsigned by)
{
    lanes out = OTHER_HALF(*v) >> (64 - by);

    *v = *v << by ^ REDUCE(out);
}

/* One mask, and those of the three blocks that follow. */
INTO_TARGET void first_four(const uint64_t *tweak, lanes *v)
{
    const lanes by = {0, 0, 1, 1, 2, 2, 3, 3};
    const lanes t = {tweak[0], tweak[1], tweak[0], tweak[1],
                     tweak[0], tweak[1], tweak[0], tweak[1]};
    lanes out = OTHER_HALF(t) >> 1 >> (63 - by);

    *v = t << by ^ REDUCE(out);
}

/* Two chains of masks, one for every other vector, so that neither waits for the other. */
INTO_TARGET void begin_lanes(const uint64_t *tweaks, size_t sectors, size_t sector_size,
                             const void *from, size_t ahead, void *to, void *masks)
{
    const lanes *in = from;
    lanes *out = to, *mask = masks;

    for (size_t i = 0; i < sectors; i++, tweaks += WORDS_OF_BLOCK) {
        lanes even, odd;

        first_four(tweaks, &even);
        odd = even;
        move_on(&odd, 4);
        for (size_t at = 0; at < sector_size; at += 2 * sizeof(lanes)) {
            __builtin_prefetch((const char *)in + ahead);
            __builtin_prefetch((const char *)(in + 1) + ahead);
            mask[0] = even;
            mask[1] = odd;
            out[0] = in[0] ^ even;
            out[1] = in[1] ^ odd;
            move_on(&even, 8);
            move_on(&odd, 8);
            in += 2;
            out += 2;
            mask += 2;
        }
    }
}

INTO_TARGET void end_lanes(const void *from, const void *masks, void *to, size_t bytes)
{
    const lanes *in = from, *mask = masks;
    lanes *out = to;

    for (size_t i = 0; i < bytes / sizeof(*out); i++) {
        out[i] = in[i] ^ mask[i];
    }
}

AVX2 static void begin_avx2(const uint64_t *tweaks, size_t sectors, size_t sector_size,
                            const void *from, size_t ahead, void *to, void *masks)
{
    begin_lanes(tweaks, sectors, sector_size, from, ahead, to, masks);
}

AVX2 static void end_avx2(const void *from, const void *masks, void *to, size_t bytes)
{
    end_lanes(from, masks, to, bytes);
}

AVX512 static void begin_avx512(const uint64_t *tweaks, size_t sectors, size_t sector_size,
                                const void *from, size_t ahead, void *to, void *masks)
{
    begin_lanes(tweaks, sectors, sector_size, from, ahead, to, masks);
}

AVX512 static void end_avx512(const void *from, const void *masks, void *to, size_t bytes)
{
    end_lanes(from, masks, to, bytes);
}

const struct vb_xts vb_xts_avx2 = {begin_avx2, end_avx2, true};
const struct vb_xts vb_xts_avx512 = {begin_avx512, end_avx512, true};

#endif

const struct vb_xts *vb_xts_best(void)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) {
        return &vb_xts_avx512;
    }
    if (__builtin_cpu_supports("avx2")) {
        return &vb_xts_avx2;
    }
#endif
    return &vb_xts_portable;
}
