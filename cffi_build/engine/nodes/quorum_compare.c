/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/quorum_compare.c: are all legs' versions the same?
 *
 * What legs have in the page cache is rarely in the CPU's, so that a vote costs as long as memory
 * takes to answer. One version after the other lets it answer for two at a time; a cache line of
 * each in turn keeps it busy with all of them, and the copy for the guest is for nothing.
 */
#include "quorum_compare.h"

#include <string.h>

bool quorum_compare_portable(const unsigned char *const *versions, uint32_t count, size_t bytes,
                             unsigned char *to)
{
    for (uint32_t i = 1; i < count; i++) {
        if (memcmp(versions[0], versions[i], bytes)) {
            return false;
        }
    }
    if (to) {
        memcpy(to, versions[0], bytes);
    }
    return true;
}

#ifdef __x86_64__

#define LINE 64

typedef uint64_t line __attribute__((vector_size(LINE), aligned(1), may_alias));

/* `bytes` is a multiple of LINE. AddressSanitizer cannot align such vectors (GCC bug 110027). */
__attribute__((target("avx512f"), no_sanitize_address)) static bool
compare_lines(const unsigned char *const *versions, uint32_t count, size_t bytes,
              unsigned char *to)
{
    line differences = {0};

    for (size_t at = 0; at < bytes; at += LINE) {
        const line first = *(const line *)(versions[0] + at);

        for (uint32_t i = 1; i < count; i++) {
            differences |= first ^ *(const line *)(versions[i] + at);
        }
        if (to) {
            *(line *)(to + at) = first;
        }
    }
    for (size_t i = 1; i < LINE / sizeof(uint64_t); i++) {
        differences[0] |= differences[i];
    }
    return differences[0] == 0;
}

bool quorum_compare(const unsigned char *const *versions, uint32_t count, size_t bytes,
                    unsigned char *to)
{
    if (bytes % LINE || !__builtin_cpu_supports("avx512f")) {
        return quorum_compare_portable(versions, count, bytes, to);
    }
    return compare_lines(versions, count, bytes, to);
}

#else

bool quorum_compare(const unsigned char *const *versions, uint32_t count, size_t bytes,
                    unsigned char *to)
{
    return quorum_compare_portable(versions, count, bytes, to);
}

#endif
