/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * cipher.h: sectors in and out of a cipher (cipher.c), the masks of XTS (cipher_xts.c), and AES in XTS
 * mode as new CPUs do it (cipher_vaes.c).
 */
#ifndef VB_CIPHER_H
#define VB_CIPHER_H

#include "engine.h"
#include "nodes/crypt.api.h"

#define VB_CIPHER_CONTROL VB_MAX_IOTHREADS /* the control thread's `index` */

/*
 * The thread called `index`: whole sectors from `from` to `to`, which may be the same. Each byte of
 * `from` is read once, and nothing but the result is ever written to `to`. 0 or a negative errno.
 */
int vb_cipher_run(struct vb_cipher *cipher, unsigned index, bool encrypt, uint64_t offset,
                  const void *from, void *to, size_t bytes);

/* How to do the two halves of XTS around a block cipher in ECB mode. */
struct vb_xts {
    /*
     * For each sector a tweak: its blocks' masks into `masks`, and `from` with them applied into
     * `to`. What lies `ahead` bytes behind what is read may be fetched into the cache.
     */
    void (*begin)(const uint64_t *tweaks, size_t sectors, size_t sector_size, const void *from,
                  size_t ahead, void *to, void *masks);
    /* Applies the masks to `from` once more. */
    void (*end)(const void *from, const void *masks, void *to, size_t bytes);
    bool quick; /* quicker than OpenSSL's own XTS, whose cost per call small sectors feel */
};

extern const struct vb_xts vb_xts_portable, vb_xts_avx2, vb_xts_avx512;
const struct vb_xts *vb_xts_best(void); /* for this CPU */

/* AES's expanded keys, as VAES wants them. Whoever has one wipes it. */
struct vb_vaes {
    _Alignas(16) unsigned char encrypt[15][16];
    _Alignas(16) unsigned char decrypt[15][16];
    unsigned rounds;
};

/* Sectors in a row, from `from` to `to`, which may be the same. */
struct vb_vaes_work {
    const void *tweaks; /* 16 bytes for each of them */
    size_t sectors, sector_size;
    const void *from;
    size_t ahead;       /* what lies so many bytes behind what is read may be fetched; 0: nothing */
    void *to;
};

bool vb_vaes_possible(void); /* on this CPU */
/* A key of 16, 24 or 32 bytes. */
void vb_vaes_expand(struct vb_vaes *aes, const uint8_t *key, size_t key_size);
/* Encrypts blocks of 16 bytes in place. */
void vb_vaes_ecb(const struct vb_vaes *aes, void *blocks, size_t count);
/* Each byte of `from` is read once, and nothing but the result is ever written to `to`. */
void vb_vaes_xts(const struct vb_vaes *aes, bool encrypt, const struct vb_vaes_work *work);

#endif
