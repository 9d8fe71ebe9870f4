/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What client.c and limit.c share: command line, random offsets, latency histogram, result as JSON.
 *
 * Both do the same job in the same way, so that their numbers can be compared: a fixed number of
 * requests in flight, one clock read per sweep of completions (not per request), nothing allocated
 * and nothing printed while the clock runs.
 */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NS 1000000000ull
#define MAX_QUEUES 64
#define MAX_DEPTH 1024

struct job {
    const char *path;
    bool write, random, poll, direct, idle, unique, timeline;
    uint64_t block, range, count; /* count: requests per queue; 0 means until the time is over */
    double seconds, warmup;
    unsigned depth, queues;
    int cpu; /* first CPU to pin the threads to; -1 pins nothing */
};

/* Buckets of a width of 1/128 of their value: a percentile is off by less than 1 %. */
#define SUB_BITS 7
#define SUB (1u << SUB_BITS)
#define BUCKETS (64 * SUB)

struct tally {
    uint64_t ops, total_ns, max_ns, begin, end;
    uint64_t all; /* those before and after the clock ran, too */
    uint32_t histogram[BUCKETS];
    uint32_t *timeline; /* longest latency, in µs, of what completed in each ms; or NULL */
    uint32_t slots;
};

__attribute__((noreturn, format(printf, 1, 2))) static inline void die(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

static inline uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS + (uint64_t)t.tv_nsec;
}

static inline uint64_t next_random(uint64_t *state) /* splitmix64 */
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Where the next request of a queue goes; blocks: how many fit into the range. */
static inline uint64_t next_offset(const struct job *job, uint64_t blocks, uint64_t *state)
{
    uint64_t n = job->random ? next_random(state) >> 16 : (*state)++;

    return (n % blocks) * job->block;
}

static inline unsigned bucket_of(uint64_t value)
{
    unsigned shift;

    if (value < SUB)
        return (unsigned)value;
    shift = 63 - (unsigned)__builtin_clzll(value) - SUB_BITS;
    return (shift + 1) * SUB + (unsigned)((value >> shift) - SUB);
}

static inline uint64_t middle_of(unsigned bucket)
{
    unsigned shift;

    if (bucket < SUB)
        return bucket;
    shift = bucket / SUB - 1;
    return ((uint64_t)(SUB + bucket % SUB) << shift) + ((1ull << shift) >> 1);
}

static inline void count_one(struct tally *tally, uint64_t latency)
{
    tally->ops++;
    tally->total_ns += latency;
    if (latency > tally->max_ns)
        tally->max_ns = latency;
    tally->histogram[bucket_of(latency)]++;
}

static inline void keep_timeline(struct tally *tally, const struct job *job)
{
    tally->slots = (uint32_t)(job->seconds * 1000) + 1;
    tally->timeline = calloc(tally->slots, sizeof(*tally->timeline));
    if (!tally->timeline)
        die("no memory for the timeline");
    memset(tally->timeline, 1, tally->slots * sizeof(*tally->timeline)); /* no page fault later */
    memset(tally->timeline, 0, tally->slots * sizeof(*tally->timeline));
}

static inline void note_in_timeline(struct tally *tally, uint64_t elapsed, uint64_t latency)
{
    uint64_t slot = elapsed / 1000000;

    if (slot < tally->slots && latency / 1000 > tally->timeline[slot])
        tally->timeline[slot] = (uint32_t)(latency / 1000);
}

static inline uint64_t percentile(const struct tally *tally, double part)
{
    uint64_t seen = 0, wanted = (uint64_t)((double)tally->ops * part);
    unsigned bucket;

    for (bucket = 0; bucket < BUCKETS; bucket++) {
        seen += tally->histogram[bucket];
        if (seen > wanted)
            return middle_of(bucket);
    }
    return tally->max_ns;
}

/* When the clock began to run (CLOCK_MONOTONIC), and the longest latency of each ms since then. */
static inline void report_timeline(const struct tally *tallies, unsigned n)
{
    uint32_t slot;
    unsigned i;

    if (!tallies[0].timeline)
        return;
    printf(", \"begin-ns\": %llu, \"timeline-us\": [", (unsigned long long)tallies[0].begin);
    for (slot = 0; slot < tallies[0].slots; slot++) {
        uint32_t longest = 0;

        for (i = 0; i < n; i++) {
            if (tallies[i].timeline[slot] > longest)
                longest = tallies[i].timeline[slot];
        }
        printf("%s%u", slot ? ", " : "", longest);
    }
    printf("]");
}

/* The sum of all queues' tallies on stdout. Rates add up, since the queues ran at the same time. */
static inline void report(const struct tally *tallies, unsigned n)
{
    static struct tally sum;
    double iops = 0;
    unsigned i, b;

    for (i = 0; i < n; i++) {
        const struct tally *t = &tallies[i];

        if (t->end > t->begin)
            iops += (double)t->ops * (double)NS / (double)(t->end - t->begin);
        sum.ops += t->ops;
        sum.all += t->all;
        sum.total_ns += t->total_ns;
        if (t->max_ns > sum.max_ns)
            sum.max_ns = t->max_ns;
        for (b = 0; b < BUCKETS; b++)
            sum.histogram[b] += t->histogram[b];
    }
    printf("{\"ops\": %llu, \"iops\": %.1f, \"mean-ns\": %.0f, \"p50-ns\": %llu, \"p99-ns\": %llu, "
           "\"max-ns\": %llu, \"all-ops\": %llu",
           (unsigned long long)sum.ops, iops, sum.ops ? (double)sum.total_ns / (double)sum.ops : 0,
           (unsigned long long)percentile(&sum, 0.50), (unsigned long long)percentile(&sum, 0.99),
           (unsigned long long)sum.max_ns, (unsigned long long)sum.all);
    report_timeline(tallies, n);
    puts("}");
}

static inline void pin_thread(const struct job *job, unsigned index)
{
    cpu_set_t set;

    if (job->cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET((unsigned)job->cpu + index, &set);
    if (sched_setaffinity(0, sizeof(set), &set) < 0)
        die("cannot pin to CPU %u: %s", (unsigned)job->cpu + index, strerror(errno));
}

static inline uint64_t number(const char *name, const char *text)
{
    char *end;
    unsigned long long value;

    errno = 0;
    value = strtoull(text, &end, 0);
    if (errno || end == text)
        die("--%s '%s': must be a number", name, text);
    switch (*end) {
    case 'G':
        value <<= 10; /* fall through */
    case 'M':
        value <<= 10; /* fall through */
    case 'k':
        value <<= 10;
        end++;
    }
    if (*end)
        die("--%s '%s': must be a number, with k, M or G behind it or not", name, text);
    return value;
}

static inline struct job parse_job(int argc, char **argv)
{
    struct job job = {
        .random = true, .block = 4096, .depth = 32, .queues = 1, .seconds = 1, .warmup = 0.2, .cpu = -1,
    };
    enum { JOB = 1, BLOCK, DEPTH, QUEUES, SECONDS, WARMUP, COUNT, RANGE, CPU, POLL, DIRECT, IDLE, UNIQUE,
           TIMELINE };
    static const struct option options[] = {
        {"job", 1, 0, JOB},         {"block-size", 1, 0, BLOCK}, {"depth", 1, 0, DEPTH},
        {"queues", 1, 0, QUEUES},   {"seconds", 1, 0, SECONDS},  {"warmup", 1, 0, WARMUP},
        {"count", 1, 0, COUNT},     {"range", 1, 0, RANGE},      {"cpu", 1, 0, CPU},
        {"poll", 0, 0, POLL},       {"direct", 0, 0, DIRECT},    {"idle", 0, 0, IDLE},
        {"unique", 0, 0, UNIQUE},   {"timeline", 0, 0, TIMELINE}, {0, 0, 0, 0},
    };
    int c, which;

    while ((c = getopt_long(argc, argv, "", options, &which)) != -1) {
        switch (c) {
        case JOB:
            job.random = !strncmp(optarg, "rand", 4);
            if (!strcmp(optarg, "randwrite") || !strcmp(optarg, "write"))
                job.write = true;
            else if (strcmp(optarg, "randread") && strcmp(optarg, "read"))
                die("--job '%s': must be randread, randwrite, read or write", optarg);
            break;
        case BLOCK:
            job.block = number("block-size", optarg);
            break;
        case DEPTH:
            job.depth = (unsigned)number("depth", optarg);
            break;
        case QUEUES:
            job.queues = (unsigned)number("queues", optarg);
            break;
        case SECONDS:
            job.seconds = atof(optarg);
            break;
        case WARMUP:
            job.warmup = atof(optarg);
            break;
        case COUNT:
            job.count = number("count", optarg);
            break;
        case RANGE:
            job.range = number("range", optarg);
            break;
        case CPU:
            job.cpu = (int)number("cpu", optarg);
            break;
        case POLL:
            job.poll = true;
            break;
        case DIRECT:
            job.direct = true;
            break;
        case IDLE:
            job.idle = true;
            break;
        case UNIQUE: /* the client only */
            job.unique = true;
            break;
        case TIMELINE: /* the client only */
            job.timeline = true;
            break;
        default:
            exit(2);
        }
    }
    if (optind != argc - 1)
        die("usage: %s [--job randread|randwrite|read|write] [--block-size N] [--depth N] [--queues N] "
            "[--seconds S | --count N] [--warmup S] [--range N] [--cpu N] [--poll] [--direct] [--unique] [--timeline] "
            "[--idle] PATH",
            argv[0]);
    job.path = argv[optind];
    if (!job.depth || job.depth > MAX_DEPTH || !job.queues || job.queues > MAX_QUEUES)
        die("--depth must be 1 to %d, --queues 1 to %d", MAX_DEPTH, MAX_QUEUES);
    if (!job.block || job.block % 512)
        die("--block-size must be a multiple of 512");
    if (job.count) /* every request counts */
        job.warmup = 0;
    return job;
}

/* When a queue's clock runs, and whether it may go on submitting. */
struct window {
    uint64_t begin, end, left;
};

static inline struct window open_window(const struct job *job)
{
    struct window window = {.begin = now_ns() + (uint64_t)(job->warmup * (double)NS)};

    window.end = window.begin + (uint64_t)(job->seconds * (double)NS);
    window.left = job->count ? job->count : UINT64_MAX;
    if (job->count)
        window.end = UINT64_MAX;
    return window;
}

static inline bool may_submit(struct window *window, uint64_t now)
{
    if (now >= window->end || !window->left)
        return false;
    window->left--;
    return true;
}

/* A completion counts if it arrived while the clock ran. */
static inline void completed(struct tally *tally, const struct window *window, uint64_t now, uint64_t begin)
{
    tally->all++;
    if (now < window->begin || now > window->end)
        return;
    if (!tally->begin)
        tally->begin = window->begin;
    tally->end = now;
    count_one(tally, now - begin);
    if (tally->timeline)
        note_in_timeline(tally, now - window->begin, now - begin);
}

#endif
