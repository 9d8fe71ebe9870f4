/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * BLAKE3's compression function for LANES inputs at once, one in each lane of a vector. Included by
 * blake3.c once for each width, with LANES (a power of two from 4 to 16), NAME() and TARGET.
 */
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef uint64_t NAME(pairs) __attribute__((vector_size(4 * LANES)));

/* Quads, four words of an input, that a vector has. */
#define QUADS (LANES / 4)

/* What is at `at` of every fourth input: loading them apart is cheaper than moving them afterwards. */
static inline UNCHECKED TARGET NAME(words) NAME(gather)(const unsigned char *const rows[LANES], size_t at)
{
    quad q[4];

#pragma GCC unroll 4
    for (unsigned i = 0; i < QUADS; i++) {
        memcpy(&q[i], rows[4 * i] + at, sizeof(q[i]));
    }
#if QUADS == 1
    return q[0];
#elif QUADS == 2
    return JOIN_QUADS(q[0], q[1]);
#else
    return JOIN_OCTETS(JOIN_QUADS(q[0], q[1]), JOIN_QUADS(q[2], q[3]));
#endif
}

/* In each quad: word w of vector i becomes word i of vector w. CPUs have these shuffles as instructions. */
static inline UNCHECKED TARGET void NAME(transpose)(NAME(words) v[4])
{
    NAME(words) low, high;
    NAME(pairs) low_pairs, high_pairs, a, b, c, d;

#pragma GCC unroll 16
    for (unsigned lane = 0; lane < LANES; lane++) {
        low[lane] = (lane & ~3u) + (lane & 3) / 2 + (lane & 1 ? LANES : 0);
        high[lane] = low[lane] + 2;
    }
#pragma GCC unroll 8
    for (unsigned lane = 0; lane < LANES / 2; lane++) {
        low_pairs[lane] = lane & 1 ? LANES / 2 + lane - 1 : lane;
        high_pairs[lane] = low_pairs[lane] + 1;
    }
    a = (NAME(pairs))__builtin_shuffle(v[0], v[1], low);
    b = (NAME(pairs))__builtin_shuffle(v[2], v[3], low);
    c = (NAME(pairs))__builtin_shuffle(v[0], v[1], high);
    d = (NAME(pairs))__builtin_shuffle(v[2], v[3], high);
    v[0] = (NAME(words))__builtin_shuffle(a, b, low_pairs);
    v[1] = (NAME(words))__builtin_shuffle(a, b, high_pairs);
    v[2] = (NAME(words))__builtin_shuffle(c, d, low_pairs);
    v[3] = (NAME(words))__builtin_shuffle(c, d, high_pairs);
}

/* Lane i of `to[w]` becomes word w of row i. `rows` are 16 words each; to[] has 16 entries. */
static inline UNCHECKED TARGET void NAME(load)(NAME(words) to[16], const unsigned char *const rows[LANES])
{
#pragma GCC unroll 4
    for (unsigned part = 0; part < 16; part += 4) {
#pragma GCC unroll 4
        for (unsigned i = 0; i < 4; i++) {
            to[part + i] = NAME(gather)(rows + i, 4 * part);
        }
        NAME(transpose)(to + part);
    }
}

/* The opposite: word w of row i of `out` becomes lane i of `from[w]`, of which there are 8. */
static inline UNCHECKED TARGET void NAME(store)(unsigned char *out, unsigned rows, const NAME(words) from[8])
{
    unsigned char all[LANES * 32];

#pragma GCC unroll 2
    for (unsigned part = 0; part < 8; part += 4) {
        NAME(words) v[4] = {from[part], from[part + 1], from[part + 2], from[part + 3]};

        NAME(transpose)(v);
#pragma GCC unroll 16
        for (unsigned i = 0; i < LANES; i++) {
            memcpy(all + 32 * i + 4 * part, (const quad *)&v[i & 3] + i / 4, sizeof(quad));
        }
    }
    memcpy(out, all, (size_t)rows * 32);
}

#define ROTATE(x, n) ((x) >> (n) | (x) << (32 - (n)))
#define MIX(a, b, c, d, x, y)                 \
    do {                                      \
        v[a] = v[a] + m[x] + v[b];                 \
        v[d] = ROTATE(v[d] ^ v[a], 16);       \
        v[c] += v[d];                         \
        v[b] = ROTATE(v[b] ^ v[c], 12);       \
        v[a] = v[a] + m[y] + v[b];                 \
        v[d] = ROTATE(v[d] ^ v[a], 8);        \
        v[c] += v[d];                         \
        v[b] = ROTATE(v[b] ^ v[c], 7);        \
    } while (0)
#define ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15) \
    do {                                                                            \
        MIX(0, 4, 8, 12, s0, s1);                                                   \
        MIX(1, 5, 9, 13, s2, s3);                                                   \
        MIX(2, 6, 10, 14, s4, s5);                                                  \
        MIX(3, 7, 11, 15, s6, s7);                                                  \
        MIX(0, 5, 10, 15, s8, s9);                                                  \
        MIX(1, 6, 11, 12, s10, s11);                                                \
        MIX(2, 7, 8, 13, s12, s13);                                                 \
        MIX(3, 4, 9, 14, s14, s15);                                                 \
    } while (0)

/*
 * The chaining values of up to LANES inputs that lie one after the other, `blocks` of 64 bytes
 * each. Input i has counter `(first + i) % period`; `period` is a power of two.
 */
static UNCHECKED TARGET void NAME(hash)(const unsigned char *input, unsigned inputs, unsigned blocks,
                              const struct flags *flags, uint32_t first, uint32_t period,
                              unsigned char *out)
{
    const unsigned char *rows[LANES];
    NAME(words) h[8], counter;

#pragma GCC unroll 16
    for (unsigned lane = 0; lane < LANES; lane++) {
        unsigned from = lane < inputs ? lane : inputs - 1; /* what is too many is done in vain */

        rows[lane] = input + (size_t)from * blocks * 64;
        counter[lane] = lane;
    }
    counter = (counter + first) & (period - 1);
#pragma GCC unroll 16
    for (unsigned i = 0; i < 8; i++) {
        h[i] = iv[i] - (NAME(words)){0};
    }
    for (unsigned block = 0; block < blocks; block++) {
        uint32_t flag = flags->all | (block ? 0 : flags->first) |
                        (block + 1 < blocks ? 0 : flags->last);
        NAME(words) m[16], v[16];

        NAME(load)(m, rows);
#pragma GCC unroll 16
        for (unsigned i = 0; i < 8; i++) {
            v[i] = h[i];
        }
#pragma GCC unroll 16
        for (unsigned i = 0; i < 4; i++) {
            v[8 + i] = iv[i] - (NAME(words)){0};
        }
        v[12] = counter;
        v[13] = (NAME(words)){0};
        v[14] = 64 - (NAME(words)){0};
        v[15] = flag - (NAME(words)){0};
        ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8);
        ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1);
        ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6);
        ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4);
        ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7);
        ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13);
#pragma GCC unroll 16
        for (unsigned i = 0; i < 8; i++) {
            h[i] = v[i] ^ v[i + 8];
        }
#pragma GCC unroll 16
        for (unsigned lane = 0; lane < LANES; lane++) {
            rows[lane] += 64;
        }
    }
    NAME(store)(out, inputs, h);
}

#undef ROUND
#undef MIX
#undef ROTATE
#undef QUADS
#undef LANES
#undef NAME
#undef TARGET
