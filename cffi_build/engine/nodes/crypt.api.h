/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A cipher with its key: encrypts and decrypts sectors, each with an IV made from its number. Names
 * are OpenSSL's. A sector's number is its offset on the disk / iv_unit + iv_offset.
 */
#define VB_IV_NONE 0      /* the mode takes none (ECB), or zeroes */
#define VB_IV_PLAIN 1     /* the number, 32 bits of it, little-endian */
#define VB_IV_PLAIN64 2   /* the number, little-endian */
#define VB_IV_PLAIN64BE 3 /* the number, big-endian, at the end of the IV */
#define VB_IV_EBOIV 4     /* the number times the sector size, little-endian */
#define VB_IV_BENBI 5     /* the number of the first block, from 1, big-endian, at the end of the IV */

struct vb_cipher_options {
    const char *cipher;      /* what sectors are encrypted with; NULL: OpenSSL has no such mode */
    const char *xts_block;   /* XTS: the block cipher in ECB mode, to be masked; else NULL */
    uint32_t xts_own;        /* XTS: 0 the quickest way; 1 only `cipher`; 2 only `xts_block`; 3 VAES */
    const uint8_t *key;      /* XTS: both keys in a row */
    uint32_t key_size;
    const char *iv_cipher;   /* NULL, or (in ECB mode) what IVs are encrypted with: ESSIV, EBOIV */
    const uint8_t *iv_key;
    uint32_t iv_key_size;
    uint32_t iv;             /* VB_IV_* */
    uint32_t sector_size;    /* power of two, 512 to 4096 */
    uint32_t iv_unit;        /* 512 or sector_size */
    uint64_t iv_offset;
};

typedef struct vb_cipher vb_cipher;

/* Copies the keys. */
vb_cipher *vb_cipher_new(const struct vb_cipher_options *options, char *error);
/* Wipes the keys. No request uses it any more. */
void vb_cipher_free(vb_cipher *cipher);
/* Whole sectors in place, `offset` being that on the disk; 0 or negative errno. */
int vb_cipher_apply(vb_cipher *cipher, bool encrypt, uint64_t offset, void *data, uint64_t bytes);
/* Name and version of the library that encrypts. */
const char *vb_cipher_library(void);

/*
 * crypt: the disk is on child 0, encrypted. Below `boundary` by `low`, from there on by `high`
 * (no cipher: as it is); a sector of the disk lies on child 0 at its offset plus that of its half.
 *
 * Requests that touch [hold_begin, hold_end), and writes of less than whole sectors, are handed to
 * Python (VB_EVENT_UPCALL).
 */
struct vb_crypt_half {
    vb_cipher *cipher;
    uint64_t offset;
};

struct vb_crypt_layout {
    struct vb_crypt_half low, high;
    uint64_t boundary;    /* UINT64_MAX: there is only `low` */
    uint32_t sector_size; /* the larger one */
    bool discard;         /* discards are passed on; else they do nothing */
};

vb_node *vb_node_crypt_new(vb_engine *engine, uint64_t cookie, const struct vb_crypt_layout *layout,
                           char *error);
/* Only while every export that reaches the node is paused. */
void vb_node_crypt_set(vb_node *node, const struct vb_crypt_layout *layout);
/* Holds requests back from here on; then VB_EVENT_DONE with `cookie` when those that came before are
 * done. One call at a time. */
void vb_node_crypt_hold(vb_node *node, uint64_t begin, uint64_t end, uint64_t cookie);
/* The boundary moves to the other end of what is held, which is let go: requests may be given back. */
void vb_node_crypt_release(vb_node *node, uint64_t boundary);
