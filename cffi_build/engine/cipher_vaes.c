/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * cipher_vaes.c: AES in XTS mode (IEEE 1619, 5.3) in one pass, where the CPU does four blocks of AES
 * with one instruction (VAES with AVX-512).
 *
 * OpenSSL 3.0 has AES one block at a time, which makes that half as fast, and with cipher_xts.c's
 * masks there are three passes. Here 512 bytes, the smallest sector, are masked, encrypted and masked
 * again in registers. So are the tweaks, whose way through OpenSSL costs as much as some sectors.
 *
 * Nothing here depends on a key or on data, in time or in addresses: the key is expanded with the
 * same instructions, and no table is looked up.
 */
#include "cipher.h"

#include <string.h>

#ifdef __x86_64__

#include <immintrin.h>

/* AddressSanitizer cannot align such vectors (GCC bug 110027). */
#define UNCHECKED __attribute__((no_sanitize_address))
#define VAES UNCHECKED __attribute__((target("avx512f,avx512bw,aes,vaes,vpclmulqdq")))
#define INTO_TARGET VAES static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#define BLOCK 16
#define VECTORS 8 /* that are under way at once: more than an instruction takes cycles */
#define STEP (VECTORS * sizeof(__m512i))
#define WORD 4

bool vb_vaes_possible(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("aes") && __builtin_cpu_supports("vaes") &&
           __builtin_cpu_supports("vpclmulqdq");
}

/* ---- keys (FIPS 197, 5.2 and 5.3.5) -------------------------------------------------------- */

/* The S-box on four bytes. With four columns the same, what the instruction does to rows is nothing. */
VAES static uint32_t substitute(uint32_t word)
{
    __m128i state = _mm_set1_epi32((int)word);

    return (uint32_t)_mm_cvtsi128_si32(_mm_aesenclast_si128(state, _mm_setzero_si128()));
}

VAES static void invert(struct vb_vaes *aes)
{
    for (unsigned round = 0; round <= aes->rounds; round++) {
        __m128i key = _mm_load_si128((const __m128i *)aes->encrypt[aes->rounds - round]);

        if (round > 0 && round < aes->rounds) {
            key = _mm_aesimc_si128(key);
        }
        _mm_store_si128((__m128i *)aes->decrypt[round], key);
    }
}

void vb_vaes_expand(struct vb_vaes *aes, const uint8_t *key, size_t key_size)
{
    unsigned words = (unsigned)key_size / WORD, round_constant = 1;
    uint32_t *expanded = (uint32_t *)aes->encrypt;

    aes->rounds = words + 6;
    memcpy(expanded, key, key_size);
    for (unsigned i = words; i < 4 * (aes->rounds + 1); i++) {
        uint32_t word = expanded[i - 1];

        if (i % words == 0) {
            word = substitute(word >> 8 | word << 24) ^ round_constant;
            round_constant = round_constant << 1 ^ (round_constant & 0x80 ? 0x11b : 0);
        } else if (words > 6 && i % words == 4) {
            word = substitute(word);
        }
        expanded[i] = expanded[i - words] ^ word;
    }
    invert(aes);
}

/* ---- masks --------------------------------------------------------------------------------- */

/* What comes out at the top of a block enters at the bottom times x^7 + x^2 + x + 1. */
#define REDUCE(out) _mm512_clmulepi64_epi128((out), _mm512_set1_epi64(0x87), 0)

/* Four masks times x^(8 * bytes). */
#define MOVE_ON(masks, bytes) \
    _mm512_xor_si512(_mm512_bslli_epi128((masks), (bytes)), \
                     REDUCE(_mm512_bsrli_epi128((masks), BLOCK - (bytes))))

/* The masks of four blocks in a row: the tweak times x^`first` and so on. */
INTO_TARGET __m512i spread(__m512i tweak, uint64_t first)
{
    const __m512i by =
        _mm512_add_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), _mm512_set1_epi64((long long)first));
    __m512i other = _mm512_shuffle_epi32(tweak, _MM_PERM_BADC); /* the halves exchanged */
    __m512i out = _mm512_srlv_epi64(other, _mm512_sub_epi64(_mm512_set1_epi64(64), by));
    /* What the low half shifts out the high half gets; what comes out of that is reduced. */
    __m512i carried = _mm512_maskz_mov_epi64(0xaa, out);
    __m512i reduced = REDUCE(_mm512_maskz_mov_epi64(0x55, out));

    return _mm512_xor_si512(_mm512_sllv_epi64(tweak, by), _mm512_xor_si512(carried, reduced));
}

INTO_TARGET void first_masks(const void *tweak, __m512i *masks)
{
    __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(tweak));

    masks[0] = spread(all, 0);
    masks[1] = spread(all, 4);
    masks[2] = MOVE_ON(masks[0], 1);
    masks[3] = MOVE_ON(masks[1], 1);
    UNROLL
    for (unsigned i = 4; i < VECTORS; i++) {
        masks[i] = MOVE_ON(masks[i - 4], 2);
    }
}

INTO_TARGET void next_masks(__m512i *masks)
{
    UNROLL
    for (unsigned i = 0; i < VECTORS; i++) {
        masks[i] = MOVE_ON(masks[i], 4);
    }
}

/* ---- data ---------------------------------------------------------------------------------- */

INTO_TARGET __m512i round_key(const unsigned char *key)
{
    return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)key));
}

/* Each byte is read once, and nothing but the result is written. */
INTO_TARGET void run_step(const unsigned char (*keys)[BLOCK], unsigned rounds, bool encrypt,
                          const __m512i *masks, const unsigned char *from, unsigned char *to)
{
    __m512i first = round_key(keys[0]), last = round_key(keys[rounds]), state[VECTORS];

    UNROLL
    for (unsigned i = 0; i < VECTORS; i++) {
        state[i] = _mm512_loadu_si512(from + i * sizeof(__m512i));
        state[i] = _mm512_ternarylogic_epi64(state[i], masks[i], first, 0x96); /* exclusive or */
    }
    for (unsigned round = 1; round < rounds; round++) {
        __m512i key = round_key(keys[round]);

        UNROLL
        for (unsigned i = 0; i < VECTORS; i++) {
            state[i] = encrypt ? _mm512_aesenc_epi128(state[i], key)
                               : _mm512_aesdec_epi128(state[i], key);
        }
    }
    UNROLL
    for (unsigned i = 0; i < VECTORS; i++) {
        state[i] = encrypt ? _mm512_aesenclast_epi128(state[i], last)
                           : _mm512_aesdeclast_epi128(state[i], last);
        _mm512_storeu_si512(to + i * sizeof(__m512i), _mm512_xor_si512(state[i], masks[i]));
    }
}

INTO_TARGET void run_sectors(const unsigned char (*keys)[BLOCK], unsigned rounds, bool encrypt,
                             const struct vb_vaes_work *work)
{
    const unsigned char *from = work->from, *tweak = work->tweaks;
    unsigned char *to = work->to;

    for (size_t i = 0; i < work->sectors; i++, tweak += BLOCK) {
        __m512i masks[VECTORS];

        first_masks(tweak, masks);
        for (size_t at = 0; at < work->sector_size; at += STEP, from += STEP, to += STEP) {
            if (at > 0) {
                next_masks(masks);
            }
            vb_prefetch(from + work->ahead, work->ahead ? STEP : 0);
            run_step(keys, rounds, encrypt, masks, from, to);
        }
    }
}

/* Tweaks: a few blocks that have nothing to do with each other. */
VAES void vb_vaes_ecb(const struct vb_vaes *aes, void *blocks, size_t count)
{
    unsigned char *at = blocks;

    for (; count > 0; count -= count < 4 ? count : 4, at += sizeof(__m512i)) {
        __mmask8 here = count < 4 ? (__mmask8)((1u << 2 * count) - 1) : 0xff;
        __m512i state = _mm512_maskz_loadu_epi64(here, at);

        state = _mm512_xor_si512(state, round_key(aes->encrypt[0]));
        for (unsigned round = 1; round < aes->rounds; round++) {
            state = _mm512_aesenc_epi128(state, round_key(aes->encrypt[round]));
        }
        state = _mm512_aesenclast_epi128(state, round_key(aes->encrypt[aes->rounds]));
        _mm512_mask_storeu_epi64(at, here, state);
    }
}

VAES static void encrypt_sectors(const struct vb_vaes *aes, const struct vb_vaes_work *work)
{
    run_sectors(aes->encrypt, aes->rounds, true, work);
}

VAES static void decrypt_sectors(const struct vb_vaes *aes, const struct vb_vaes_work *work)
{
    run_sectors(aes->decrypt, aes->rounds, false, work);
}

void vb_vaes_xts(const struct vb_vaes *aes, bool encrypt, const struct vb_vaes_work *work)
{
    if (encrypt) {
        encrypt_sectors(aes, work);
    } else {
        decrypt_sectors(aes, work);
    }
}

#else

bool vb_vaes_possible(void)
{
    return false;
}

void vb_vaes_expand(struct vb_vaes *aes, const uint8_t *key, size_t key_size)
{
    (void)aes, (void)key, (void)key_size;
}

void vb_vaes_ecb(const struct vb_vaes *aes, void *blocks, size_t count)
{
    (void)aes, (void)blocks, (void)count;
}

void vb_vaes_xts(const struct vb_vaes *aes, bool encrypt, const struct vb_vaes_work *work)
{
    (void)aes, (void)encrypt, (void)work;
}

#endif
