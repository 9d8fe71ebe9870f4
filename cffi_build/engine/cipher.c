/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * cipher.c: sectors through OpenSSL's EVP. A cipher is made by the control thread, with contexts
 * that hold the expanded keys; each thread that uses it takes copies of those for itself at its first
 * use, so that nothing is shared afterwards and nothing is expanded twice.
 *
 * How IVs are counted is dm-crypt's (Documentation/admin-guide/device-mapper/dm-crypt.rst); that
 * of LUKS2 is in units of 512 bytes whatever the sector size is.
 */
#include "cipher.h"

#include <endian.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/provider.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 16u             /* the largest block, IV and tweak */
#define BATCH 64u             /* sectors whose IVs are made at once */
#define PIECE 1024u           /* bytes that are masked at once: no more than memory brings meanwhile */
#define AHEAD 4096u           /* how far ahead it is asked for them */
#define SECTOR_MIN 512u
#define SECTOR_MAX 4096u

_Static_assert(PIECE <= SECTOR_MAX && PIECE % SECTOR_MIN == 0, "a piece's masks fit");

enum { ENCRYPT, DECRYPT, IV, CONTEXTS };
enum { DATA, TWEAKS, VAES_KEYS };
#define VAES_SIZE (VAES_KEYS * sizeof(struct vb_vaes))

/* One thread's. */
struct state {
    EVP_CIPHER_CTX *contexts[CONTEXTS];
    _Alignas(64) unsigned char masks[SECTOR_MAX];
    unsigned char masked[SECTOR_MAX];
};

struct vb_cipher {
    EVP_CIPHER_CTX *templates[CONTEXTS]; /* with keys; never used to encrypt */
    const struct vb_xts *xts;            /* NULL: the mode is OpenSSL's business */
    struct vb_vaes *vaes;                /* owned: data, tweaks; or NULL: OpenSSL encrypts them */
    uint32_t iv;
    uint32_t iv_size;                    /* 0: none */
    uint32_t sector_size;
    uint32_t iv_unit;
    uint64_t iv_offset;
    _Atomic(struct state *) states[VB_MAX_IOTHREADS + 1];
};

/* ---- contexts ----------------------------------------------------------------------------- */

static void free_contexts(EVP_CIPHER_CTX **contexts)
{
    for (unsigned i = 0; i < CONTEXTS; i++) {
        EVP_CIPHER_CTX_free(contexts[i]); /* which wipes the keys */
    }
}

static void free_state(struct state *state)
{
    if (state) {
        free_contexts(state->contexts);
        OPENSSL_cleanse(state, sizeof(*state));
        free(state);
    }
}

static struct state *new_state(const struct vb_cipher *cipher)
{
    struct state *state = aligned_alloc(_Alignof(struct state), sizeof(*state));

    if (!state) {
        return NULL;
    }
    memset(state, 0, sizeof(*state));
    for (unsigned i = 0; i < CONTEXTS; i++) {
        if (!cipher->templates[i]) {
            continue;
        }
        state->contexts[i] = EVP_CIPHER_CTX_new();
        if (!state->contexts[i] ||
            EVP_CIPHER_CTX_copy(state->contexts[i], cipher->templates[i]) != 1) {
            free_state(state);
            return NULL;
        }
    }
    return state;
}

/* This thread's. No other one looks at it before the cipher is freed. */
static struct state *state_of(struct vb_cipher *cipher, unsigned index)
{
    struct state *state = atomic_load_explicit(&cipher->states[index], memory_order_relaxed);

    if (!state) {
        state = new_state(cipher);
        atomic_store_explicit(&cipher->states[index], state, memory_order_release);
    }
    return state;
}

/* ---- sectors --------------------------------------------------------------------------------- */

static bool update(EVP_CIPHER_CTX *context, void *to, const void *from, size_t bytes)
{
    int length;

    return EVP_CipherUpdate(context, to, &length, from, (int)bytes) == 1;
}

static void make_iv(const struct vb_cipher *cipher, uint64_t number, unsigned char *iv)
{
    uint64_t value = htole64(number);

    memset(iv, 0, cipher->iv_size);
    switch (cipher->iv) {
    case VB_IV_PLAIN:
        value = htole64((uint32_t)number);
        break;
    case VB_IV_BENBI: /* 512 bytes are so many blocks, which are as large as an IV */
        number = (number << __builtin_ctz(512 / cipher->iv_size)) + 1;
        /* fall through */
    case VB_IV_PLAIN64BE:
        value = htobe64(number);
        memcpy(iv + cipher->iv_size - sizeof(value), &value, sizeof(value));
        return;
    case VB_IV_EBOIV:
        value = htole64(number * cipher->sector_size);
        break;
    case VB_IV_NONE:
        return;
    }
    memcpy(iv, &value, sizeof(value));
}

/* The IVs of `count` sectors in a row. */
static bool make_ivs(const struct vb_cipher *cipher, struct state *state, uint64_t offset,
                     size_t count, unsigned char *ivs)
{
    for (size_t i = 0; i < count; i++, offset += cipher->sector_size) {
        make_iv(cipher, offset / cipher->iv_unit + cipher->iv_offset, ivs + i * cipher->iv_size);
    }
    if (cipher->vaes) {
        vb_vaes_ecb(&cipher->vaes[TWEAKS], ivs, count);
        return true;
    }
    return !state->contexts[IV] || update(state->contexts[IV], ivs, ivs, count * cipher->iv_size);
}

static bool run_each(const struct vb_cipher *cipher, EVP_CIPHER_CTX *context,
                     const unsigned char *ivs, size_t count, const unsigned char *from,
                     unsigned char *to)
{
    for (size_t i = 0; i < count; i++) {
        if (EVP_CipherInit_ex(context, NULL, NULL, NULL, ivs + i * cipher->iv_size, -1) != 1 ||
            !update(context, to, from, cipher->sector_size)) {
            return false;
        }
        from += cipher->sector_size;
        to += cipher->sector_size;
    }
    return true;
}

static bool run_masked(const struct vb_cipher *cipher, struct state *state, EVP_CIPHER_CTX *context,
                       const unsigned char *tweaks, size_t count, const unsigned char *from,
                       unsigned char *to, size_t left)
{
    size_t at_once = cipher->sector_size < PIECE ? PIECE / cipher->sector_size : 1;

    while (count > 0) {
        size_t sectors = count < at_once ? count : at_once;
        size_t bytes = sectors * cipher->sector_size;

        cipher->xts->begin((const uint64_t *)tweaks, sectors, cipher->sector_size, from,
                           left > AHEAD ? AHEAD : 0, state->masked, state->masks);
        if (!update(context, state->masked, state->masked, bytes)) {
            return false;
        }
        cipher->xts->end(state->masked, state->masks, to, bytes);
        tweaks += sectors * BLOCK;
        from += bytes;
        to += bytes;
        left -= bytes;
        count -= sectors;
    }
    return true;
}

static bool run_vaes(const struct vb_cipher *cipher, bool encrypt, const unsigned char *tweaks,
                     size_t count, const unsigned char *from, unsigned char *to, size_t left)
{
    vb_vaes_xts(&cipher->vaes[DATA], encrypt,
                &(struct vb_vaes_work){
                    .tweaks = tweaks,
                    .sectors = count,
                    .sector_size = cipher->sector_size,
                    .from = from,
                    .ahead = left > AHEAD ? AHEAD : 0,
                    .to = to,
                });
    return true;
}

static bool run(struct vb_cipher *cipher, struct state *state, bool encrypt, uint64_t offset,
                const unsigned char *from, unsigned char *to, size_t bytes)
{
    EVP_CIPHER_CTX *context = state->contexts[encrypt ? ENCRYPT : DECRYPT];
    _Alignas(BLOCK) unsigned char ivs[BATCH * BLOCK];

    vb_prefetch(from, bytes < AHEAD ? bytes : AHEAD);
    while (bytes > 0) {
        size_t count = bytes / cipher->sector_size;
        size_t now;

        count = count < BATCH ? count : BATCH;
        now = count * cipher->sector_size;
        if (cipher->iv_size == 0) {
            if (!update(context, to, from, now)) {
                return false;
            }
        } else if (!make_ivs(cipher, state, offset, count, ivs) ||
                   !(cipher->vaes  ? run_vaes(cipher, encrypt, ivs, count, from, to, bytes)
                     : cipher->xts ? run_masked(cipher, state, context, ivs, count, from, to, bytes)
                                   : run_each(cipher, context, ivs, count, from, to))) {
            return false;
        }
        offset += now;
        from += now;
        to += now;
        bytes -= now;
    }
    return true;
}

int vb_cipher_run(struct vb_cipher *cipher, unsigned index, bool encrypt, uint64_t offset,
                  const void *from, void *to, size_t bytes)
{
    struct state *state = state_of(cipher, index);

    if (!state) {
        return -ENOMEM;
    }
    vb_assert(bytes % cipher->sector_size == 0 && offset % cipher->sector_size == 0);
    return run(cipher, state, encrypt, offset, from, to, bytes) ? 0 : -EIO;
}

int vb_cipher_apply(vb_cipher *cipher, bool encrypt, uint64_t offset, void *data, uint64_t bytes)
{
    if (offset % cipher->sector_size || bytes % cipher->sector_size) {
        return -EINVAL;
    }
    return vb_cipher_run(cipher, VB_CIPHER_CONTROL, encrypt, offset, data, data, bytes);
}

/* ---- making one -------------------------------------------------------------------------------- */

/* What OpenSSL calls legacy (CAST5) is in a provider that not everybody has installed. */
static EVP_CIPHER *fetch(const char *name)
{
    static OSSL_LIB_CTX *legacy;
    EVP_CIPHER *found = EVP_CIPHER_fetch(NULL, name, NULL);

    if (!found) {
        if (!legacy) {
            legacy = OSSL_LIB_CTX_new();
            OSSL_PROVIDER_load(legacy, "legacy");
        }
        found = EVP_CIPHER_fetch(legacy, name, NULL);
    }
    ERR_clear_error();
    return found;
}

static EVP_CIPHER_CTX *new_context(const char *name, const unsigned char *key, size_t key_size,
                                   bool encrypt, char *error)
{
    static const unsigned char no_iv[EVP_MAX_IV_LENGTH];
    EVP_CIPHER *kind = fetch(name);
    EVP_CIPHER_CTX *context = NULL;

    if (!kind) {
        vb_error(error, -ENOTSUP, "%s has no cipher %s", vb_cipher_library(), name);
    } else if ((size_t)EVP_CIPHER_get_key_length(kind) != key_size) {
        vb_error(error, -EINVAL, "%s wants a key of %d bytes, not %zu", name,
                 EVP_CIPHER_get_key_length(kind), key_size);
    } else {
        context = EVP_CIPHER_CTX_new();
        if (!context || EVP_CipherInit_ex(context, kind, NULL, key, no_iv, encrypt) != 1) {
            vb_error(error, -EINVAL, "%s does not accept this key", name);
            EVP_CIPHER_CTX_free(context);
            context = NULL;
        } else {
            EVP_CIPHER_CTX_set_padding(context, 0);
        }
    }
    EVP_CIPHER_free(kind);
    ERR_clear_error();
    return context;
}

static bool make_both(struct vb_cipher *cipher, const char *name, const unsigned char *key,
                      size_t key_size, char *error)
{
    cipher->templates[ENCRYPT] = new_context(name, key, key_size, true, error);
    cipher->templates[DECRYPT] =
        cipher->templates[ENCRYPT] ? new_context(name, key, key_size, false, error) : NULL;
    return cipher->templates[DECRYPT] != NULL;
}

static bool is_aes(const struct vb_cipher_options *options)
{
    return options->xts_block && strncmp(options->xts_block, "AES-", 4) == 0;
}

static bool want_vaes(const struct vb_cipher_options *options)
{
    return is_aes(options) && vb_vaes_possible() &&
           (options->xts_own == 0 || options->xts_own == 3);
}

/* Two keys of that size in a row. */
static bool make_vaes(struct vb_cipher *cipher, const uint8_t *key, size_t key_size, char *error)
{
    cipher->vaes = aligned_alloc(_Alignof(struct vb_vaes), VAES_SIZE);
    if (!cipher->vaes) {
        vb_error(error, -ENOMEM, "out of memory");
        return false;
    }
    vb_vaes_expand(&cipher->vaes[DATA], key, key_size);
    vb_vaes_expand(&cipher->vaes[TWEAKS], key + key_size, key_size);
    return true;
}

/* XTS by way of masks: half of the key for the data, the other half for the tweaks. */
static bool make_masked(struct vb_cipher *cipher, const struct vb_cipher_options *options,
                        char *error)
{
    size_t half = options->key_size / 2;

    cipher->xts = vb_xts_best();
    if (!make_both(cipher, options->xts_block, options->key, half, error)) {
        return false;
    }
    cipher->templates[IV] =
        new_context(options->xts_block, options->key + half, half, true, error);
    if (!cipher->templates[IV]) {
        return false;
    }
    return !want_vaes(options) || make_vaes(cipher, options->key, half, error);
}

/* Without VAES, sectors of 4096 bytes hardly feel the cost of a call, and the masks would cost more. */
static bool want_masked(const struct vb_cipher_options *options)
{
    if (!options->xts_block || options->iv_cipher || options->xts_own == 1) {
        return false;
    }
    return !options->cipher || options->xts_own >= 2 || want_vaes(options) ||
           (vb_xts_best()->quick && options->sector_size < SECTOR_MAX);
}

static bool make_ciphers(struct vb_cipher *cipher, const struct vb_cipher_options *options,
                         char *error)
{
    if (options->xts_own == 3 && !want_vaes(options)) {
        vb_error(error, -ENOTSUP, "this CPU has no VAES");
        return false;
    }
    if (want_masked(options)) {
        return make_masked(cipher, options, error);
    }
    if (!options->cipher) {
        vb_error(error, -ENOTSUP, "%s has no such mode", vb_cipher_library());
        return false;
    }
    if (!make_both(cipher, options->cipher, options->key, options->key_size, error)) {
        return false;
    }
    if (options->iv_cipher) {
        cipher->templates[IV] = new_context(options->iv_cipher, options->iv_key,
                                            options->iv_key_size, true, error);
    }
    return !options->iv_cipher || cipher->templates[IV] != NULL;
}

static bool check_sizes(struct vb_cipher *cipher, char *error)
{
    EVP_CIPHER_CTX *context = cipher->templates[ENCRYPT], *iv = cipher->templates[IV];
    uint32_t block = (uint32_t)EVP_CIPHER_CTX_get_block_size(context);

    cipher->iv_size =
        cipher->xts ? BLOCK : (uint32_t)EVP_CIPHER_CTX_get_iv_length(context);
    if (cipher->iv_size > BLOCK || (cipher->iv_size > 0 && cipher->iv_size < sizeof(uint64_t)) ||
        (cipher->xts && block != BLOCK) ||
        (iv && (uint32_t)EVP_CIPHER_CTX_get_block_size(iv) != cipher->iv_size)) {
        vb_error(error, -EINVAL, "block and IV of %s do not suit this mode",
                 EVP_CIPHER_CTX_get0_name(context));
        return false;
    }
    return true;
}

vb_cipher *vb_cipher_new(const struct vb_cipher_options *options, char *error)
{
    struct vb_cipher *cipher = calloc(1, sizeof(*cipher));

    if (!cipher) {
        vb_error(error, -ENOMEM, "out of memory");
        return NULL;
    }
    cipher->iv = options->iv;
    cipher->sector_size = options->sector_size;
    cipher->iv_unit = options->iv_unit;
    cipher->iv_offset = options->iv_offset;
    if (!make_ciphers(cipher, options, error) || !check_sizes(cipher, error)) {
        vb_cipher_free(cipher);
        return NULL;
    }
    return cipher;
}

void vb_cipher_free(vb_cipher *cipher)
{
    for (unsigned i = 0; i <= VB_MAX_IOTHREADS; i++) {
        free_state(atomic_load_explicit(&cipher->states[i], memory_order_acquire));
    }
    free_contexts(cipher->templates);
    if (cipher->vaes) {
        OPENSSL_cleanse(cipher->vaes, VAES_SIZE);
        free(cipher->vaes);
    }
    free(cipher);
}

const char *vb_cipher_library(void)
{
    return OpenSSL_version(OPENSSL_VERSION);
}
