/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * throttle_group.c: limits that many nodes on many threads share, and the requests that wait for
 * them.
 *
 * A request that is under the limits, while nobody waits, takes no lock: it looks at its buckets
 * and fills them (throttle_bucket.h). Several threads that look at the same moment may all pass;
 * what they take too much is waited for afterwards, so the average holds.
 *
 * Whoever must wait is put into a queue under the group's lock. Members take turns in each
 * direction, request by request, and the directions take turns where they share a limit. Every
 * thread with a request in the group has a timer, set to when the next request may leave; the one
 * that is up first lets all go that may, those of other threads by a message to them. So no thread
 * needs to be in charge: the timer is stopped when the thread's last request has left, and once a
 * group's requests are gone nothing of it is armed or under way, except a kick, which has a
 * reference of its own.
 */
#include "throttle_group.h"

#include <errno.h>
#include <stdlib.h>

/* The limits that a direction has to keep; in the order of VB_THROTTLE_LIMITS. */
enum { BPS_TOTAL, BPS_READ, BPS_WRITE, IOPS_TOTAL, IOPS_READ, IOPS_WRITE, FLUSHES };
#define BIT(limit) (1u << (limit))
static const uint32_t limits_of[VB_THROTTLE_DIRECTIONS] = {
    [THROTTLE_READ] = BIT(BPS_TOTAL) | BIT(BPS_READ) | BIT(IOPS_TOTAL) | BIT(IOPS_READ),
    [THROTTLE_WRITE] = BIT(BPS_TOTAL) | BIT(BPS_WRITE) | BIT(IOPS_TOTAL) | BIT(IOPS_WRITE),
    [THROTTLE_FLUSH] = BIT(FLUSHES),
};

/* What a thread has in the group. Its own, but for what is said to be others'. */
struct seat {
    struct vb_throttle_group *group;
    struct vb_iothread *thread;
    struct vb_timer timer;
    bool armed;
    _Atomic uint32_t requests; /* waiting, or let go and on their way home; control reads it */
    struct vb_message kick;    /* control's: look again */
    _Atomic bool kicked;       /* it is under way */
};

struct direction {
    _Atomic uint32_t waiting;           /* changes under the lock */
    struct throttle_queue *first, *last; /* in order of turn; the rest under the lock */
    uint64_t waited, waited_ns;
};

struct vb_throttle_group {
    struct vb_bucket buckets[VB_THROTTLE_LIMITS];
    _Atomic uint32_t limited; /* bits of the buckets that have a limit: no other is looked at */
    _Atomic uint64_t iops_size;
    uint64_t base_ns; /* when ticks began */
    _Atomic uint32_t references;
    pthread_mutex_t lock;
    struct direction directions[VB_THROTTLE_DIRECTIONS];
    struct seat seats[VB_MAX_IOTHREADS];
};

_Static_assert(sizeof(struct throttle_waiter) <= VB_SCRATCH_SIZE, "scratch too small");

/* ---- limits ------------------------------------------------------------------------ */

static uint64_t ticks(const struct vb_throttle_group *group, uint64_t ns)
{
    return ns > group->base_ns ? (ns - group->base_ns) * VB_TICKS_PER_NS : 0;
}

/* The limits to be kept, as bits. */
static uint32_t limits_for(struct vb_throttle_group *group, enum throttle_direction direction)
{
    return atomic_load_explicit(&group->limited, memory_order_relaxed) & limits_of[direction];
}

static uint64_t wait_of(struct vb_throttle_group *group, enum throttle_direction direction,
                        uint64_t now)
{
    uint64_t longest = 0;

    for (uint32_t left = limits_for(group, direction); left; left &= left - 1) {
        uint64_t wait = vb_bucket_wait(&group->buckets[__builtin_ctz(left)], now);

        longest = wait > longest ? wait : longest;
    }
    return longest;
}

static double operations_of(struct vb_throttle_group *group, uint64_t bytes)
{
    uint64_t size = atomic_load_explicit(&group->iops_size, memory_order_relaxed);

    return size && bytes > size ? (double)bytes / (double)size : 1;
}

static void account(struct vb_throttle_group *group, enum throttle_direction direction,
                    const struct vb_request *request, uint64_t now)
{
    for (uint32_t left = limits_for(group, direction); left; left &= left - 1) {
        unsigned limit = (unsigned)__builtin_ctz(left);
        double units = limit < IOPS_TOTAL ? (double)request->bytes
                                          : operations_of(group, request->bytes);

        vb_bucket_account(&group->buckets[limit], now, units);
    }
}

bool throttle_pass(struct vb_throttle_group *group, enum throttle_direction direction,
                   const struct vb_request *request)
{
    uint64_t now = ticks(group, request->thread->now_ns);

    /* One that comes while another thread begins to wait may overtake it; no order is promised. */
    if (atomic_load_explicit(&group->directions[direction].waiting, memory_order_relaxed) ||
        wait_of(group, direction, now)) {
        return false;
    }
    account(group, direction, request, now);
    return true;
}

/* ---- queues, under the lock ----------------------------------------------------------- */

static void append(struct direction *direction, struct throttle_queue *queue)
{
    queue->next = NULL;
    if (direction->last) {
        direction->last->next = queue;
    } else {
        direction->first = queue;
    }
    direction->last = queue;
}

static void enqueue(struct direction *direction, struct throttle_queue *queue,
                    struct throttle_waiter *waiter)
{
    waiter->next = NULL;
    if (queue->first) {
        queue->last->next = waiter;
    } else {
        queue->first = waiter;
        append(direction, queue);
    }
    queue->last = waiter;
    atomic_fetch_add_explicit(&direction->waiting, 1, memory_order_relaxed);
}

/* The first request of the queue, which remains where it is in the order of turn. */
static struct throttle_waiter *take(struct direction *direction, struct throttle_queue *queue)
{
    struct throttle_waiter *waiter = queue->first;

    queue->first = waiter->next;
    atomic_fetch_sub_explicit(&direction->waiting, 1, memory_order_relaxed);
    return waiter;
}

static struct throttle_waiter *take_next(struct direction *direction)
{
    struct throttle_queue *queue = direction->first;
    struct throttle_waiter *waiter = take(direction, queue);

    direction->first = queue->next;
    if (!direction->first) {
        direction->last = NULL;
    }
    if (queue->first) {
        append(direction, queue);
    }
    return waiter;
}

static void remove_queue(struct direction *direction, struct throttle_queue *queue)
{
    struct throttle_queue *old = direction->first;

    direction->first = direction->last = NULL;
    while (old) {
        struct throttle_queue *next = old->next;

        if (old != queue) {
            append(direction, old);
        }
        old = next;
    }
}

/* ---- letting go ------------------------------------------------------------------------- */

static void put_group(struct vb_throttle_group *group)
{
    /* Acquire and release: whoever frees comes after all that others did with it. */
    if (atomic_fetch_sub_explicit(&group->references, 1, memory_order_acq_rel) == 1) {
        pthread_mutex_destroy(&group->lock);
        free(group);
    }
}

static void stop_timer(struct seat *seat)
{
    if (seat->armed) {
        seat->armed = false;
        vb_timer_stop(seat->thread, &seat->timer);
    }
}

/* `departure`: in ticks; UINT64_MAX if nobody waits. */
static void set_timer(struct seat *seat, uint64_t departure)
{
    stop_timer(seat);
    if (departure != UINT64_MAX && atomic_load_explicit(&seat->requests, memory_order_relaxed)) {
        seat->armed = true;
        vb_timer_start(seat->thread, &seat->timer,
                       seat->group->base_ns + departure / VB_TICKS_PER_NS + 1);
    }
}

/* On its own thread: it goes on. */
static void go(struct throttle_waiter *waiter)
{
    struct vb_request *request = waiter->request;
    struct vb_node *child = waiter->member->node->children[0];
    struct seat *seat = &waiter->member->group->seats[request->thread->index];
    uint32_t left = atomic_load_explicit(&seat->requests, memory_order_relaxed) - 1;

    atomic_store_explicit(&seat->requests, left, memory_order_relaxed);
    if (left == 0) {
        stop_timer(seat);
    }
    vb_submit(child, request);
}

static void run_go(struct vb_message *message, void *context)
{
    (void)context;
    go(vb_container_of(message, struct throttle_waiter, message));
}

/* Under the lock: to its thread, or into `mine` if that is `thread`. */
static void let_go(struct vb_throttle_group *group, enum throttle_direction direction,
                   struct throttle_waiter *waiter, uint64_t now_ns,
                   const struct vb_iothread *thread, struct throttle_waiter ***mine)
{
    struct direction *counts = &group->directions[direction];

    account(group, direction, waiter->request, ticks(group, now_ns));
    counts->waited++;
    counts->waited_ns += now_ns > waiter->since_ns ? now_ns - waiter->since_ns : 0;
    if (waiter->request->thread == thread) {
        waiter->next = NULL;
        **mine = waiter;
        *mine = &waiter->next;
    } else {
        vb_iothread_send(waiter->request->thread, &waiter->message);
    }
}

/*
 * Under the lock: let all go that may. Those of `thread` (NULL: control) are put into `mine`, to
 * go on when the lock is free again. Returns when the next may leave.
 */
static uint64_t dispatch(struct vb_throttle_group *group, uint64_t now_ns,
                         const struct vb_iothread *thread, struct throttle_waiter **mine)
{
    uint64_t now = ticks(group, now_ns), departure = UINT64_MAX;
    bool more = true;

    *mine = NULL;
    while (more) {
        more = false;
        departure = UINT64_MAX;
        for (unsigned i = 0; i < VB_THROTTLE_DIRECTIONS; i++) {
            struct direction *direction = &group->directions[i];
            uint64_t wait;

            if (!direction->first) {
                continue;
            }
            wait = wait_of(group, i, now);
            if (wait == 0) {
                let_go(group, i, take_next(direction), now_ns, thread, &mine);
                more = true;
            } else if (now + wait < departure) {
                departure = now + wait;
            }
        }
    }
    return departure;
}

static void look(struct seat *seat)
{
    struct vb_throttle_group *group = seat->group;
    struct throttle_waiter *mine;
    uint64_t departure;

    pthread_mutex_lock(&group->lock);
    departure = dispatch(group, seat->thread->now_ns, seat->thread, &mine);
    pthread_mutex_unlock(&group->lock);
    set_timer(seat, departure);
    while (mine) {
        struct throttle_waiter *waiter = mine;

        mine = waiter->next;
        go(waiter);
    }
}

static void expired(struct vb_timer *timer)
{
    struct seat *seat = vb_container_of(timer, struct seat, timer);

    seat->armed = false;
    look(seat);
}

static void run_kick(struct vb_message *message, void *context)
{
    struct seat *seat = vb_container_of(message, struct seat, kick);
    struct vb_throttle_group *group = seat->group;

    (void)context;
    /* The message is free again. */
    atomic_store_explicit(&seat->kicked, false, memory_order_release);
    look(seat);
    put_group(group);
}

void throttle_wait(struct throttle_member *member, enum throttle_direction direction,
                   struct vb_request *request)
{
    struct vb_throttle_group *group = member->group;
    struct vb_iothread *thread = request->thread;
    struct seat *seat = &group->seats[thread->index];
    struct throttle_waiter *waiter = (struct throttle_waiter *)request->scratch;
    uint64_t now = ticks(group, thread->now_ns), wait;
    bool pass;

    pthread_mutex_lock(&group->lock);
    wait = wait_of(group, direction, now);
    pass = member->draining || (!group->directions[direction].first && wait == 0);
    if (pass) {
        account(group, direction, request, now);
    } else {
        *waiter = (struct throttle_waiter){
            .message = {.run = run_go},
            .request = request,
            .member = member,
            .since_ns = thread->now_ns,
        };
        /* Before anybody can let it go. */
        atomic_store_explicit(&seat->requests,
                              atomic_load_explicit(&seat->requests, memory_order_relaxed) + 1,
                              memory_order_relaxed);
        seat->thread = thread;
        enqueue(&group->directions[direction], &member->queues[direction], waiter);
    }
    pthread_mutex_unlock(&group->lock);
    if (pass) {
        vb_submit(member->node->children[0], request);
    } else if (!seat->armed ||
               seat->timer.deadline_ns > thread->now_ns + wait / VB_TICKS_PER_NS + 1) {
        set_timer(seat, now + wait);
    }
}

void throttle_drain(struct throttle_member *member, bool begin)
{
    struct vb_throttle_group *group = member->group;
    uint64_t now_ns = vb_clock_ns();

    pthread_mutex_lock(&group->lock);
    member->draining = begin;
    for (unsigned i = 0; begin && i < VB_THROTTLE_DIRECTIONS; i++) {
        struct direction *direction = &group->directions[i];
        struct throttle_queue *queue = &member->queues[i];

        if (queue->first) {
            remove_queue(direction, queue);
        }
        while (queue->first) {
            let_go(group, i, take(direction, queue), now_ns, NULL, NULL);
        }
    }
    pthread_mutex_unlock(&group->lock);
}

/* ---- the control side --------------------------------------------------------------------- */

struct vb_throttle_group *vb_throttle_group_new(char *error)
{
    struct vb_throttle_group *group = calloc(1, sizeof(*group));

    if (!group) {
        vb_error(error, -ENOMEM, "no memory for a throttle group");
        return NULL;
    }
    pthread_mutex_init(&group->lock, NULL);
    group->base_ns = vb_clock_ns();
    atomic_init(&group->references, 1);
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        group->seats[i].group = group;
        group->seats[i].timer.expired = expired;
        group->seats[i].kick.run = run_kick;
    }
    return group;
}

/* Threads whose timers may be set to a time that is not right any more look again. */
static void kick(struct vb_throttle_group *group)
{
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        struct seat *seat = &group->seats[i];

        if (atomic_load_explicit(&seat->requests, memory_order_relaxed) &&
            !atomic_exchange_explicit(&seat->kicked, true, memory_order_acquire)) {
            atomic_fetch_add_explicit(&group->references, 1, memory_order_relaxed);
            vb_iothread_send(seat->thread, &seat->kick);
        }
    }
}

void vb_throttle_group_set(struct vb_throttle_group *group, const struct vb_throttle_limits *limits)
{
    uint32_t limited = 0;

    pthread_mutex_lock(&group->lock);
    for (unsigned i = 0; i < VB_THROTTLE_LIMITS; i++) {
        struct vb_throttle_limit limit = {limits->avg[i], limits->max[i], limits->burst_length[i]};

        vb_bucket_set(&group->buckets[i], ticks(group, vb_clock_ns()), limit);
        limited |= limit.avg ? BIT(i) : 0;
    }
    atomic_store_explicit(&group->limited, limited, memory_order_relaxed);
    atomic_store_explicit(&group->iops_size, limits->iops_size, memory_order_relaxed);
    kick(group); /* with the lock: until a request is let go its thread is there */
    pthread_mutex_unlock(&group->lock);
}

void vb_throttle_group_stats(struct vb_throttle_group *group, struct vb_throttle_stats *stats)
{
    pthread_mutex_lock(&group->lock);
    for (unsigned i = 0; i < VB_THROTTLE_DIRECTIONS; i++) {
        const struct direction *direction = &group->directions[i];

        stats->queued[i] = atomic_load_explicit(&direction->waiting, memory_order_relaxed);
        stats->waited[i] = direction->waited;
        stats->waited_ns[i] = direction->waited_ns;
    }
    pthread_mutex_unlock(&group->lock);
}

void vb_throttle_group_free(struct vb_throttle_group *group)
{
    put_group(group);
}
