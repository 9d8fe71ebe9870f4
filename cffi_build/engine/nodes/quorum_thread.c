/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/quorum_thread.c: what an I/O thread of a quorum waits for.
 *
 * Obstacles. A range may be locked (Python copies or compares it), and a write that was
 * acknowledged early may not have reached all legs. Requests that such a thing stands in the way
 * of are held by their thread, and try again whenever one has gone. A request on its way looks at
 * one counter, which is nearly always 0.
 *
 * Grace. A lock is good when all changes that began before it have ended (../grace.h). What was given
 * up because of a timeout does not count: its leg has failed.
 *
 * Timeouts. All requests of a node have the same, so the oldest of a thread is the first: one list,
 * one timer.
 */
#include "quorum.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- held requests --------------------------------------------------------------------------- */

/* In the scratch of a request that waits. */
struct held {
    struct vb_request *next;
    bool no_early; /* a flush, which keeps more writes from becoming late */
};

static void run_wake(struct vb_message *message, void *context)
{
    struct quorum_thread *here = vb_container_of(message, struct quorum_thread, wake);
    struct quorum_node *quorum = here->quorum;
    struct vb_request *request;

    (void)context;
    /* Before the list is looked at: whoever takes an obstacle away after that sends another. */
    atomic_store(&here->waking, false);
    request = here->held;
    here->held = NULL;
    while (request) {
        struct held *held = (struct held *)request->scratch;
        struct vb_request *next = held->next;

        atomic_fetch_sub(&here->holding, 1);
        if (held->no_early) {
            atomic_fetch_sub(&quorum->no_early, 1);
        }
        quorum_submit(&quorum->node, request); /* which may hold it again */
        request = next;
    }
}

static void wake_thread(struct quorum_node *quorum, unsigned index)
{
    struct quorum_thread *there =
        atomic_load_explicit(&quorum->threads[index], memory_order_acquire);

    /* One that holds something is used by an export, and so alive. */
    if (there && atomic_load(&there->holding) > 0 && !atomic_exchange(&there->waking, true)) {
        vb_iothread_send(there->thread, &there->wake);
    }
}

/* Sequentially consistent with quorum_hold(): one of the two sees the other. */
void quorum_wake(struct quorum_node *quorum)
{
    atomic_thread_fence(memory_order_seq_cst);
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        wake_thread(quorum, i);
    }
}

static bool is_locked(struct quorum_node *quorum, uint64_t offset, uint64_t end)
{
    for (unsigned i = 0; i < QUORUM_LOCKS; i++) {
        struct range_lock *lock = &quorum->locks[i];

        if (offset < atomic_load(&lock->end) && atomic_load(&lock->start) < end) {
            return true;
        }
    }
    return false;
}

static bool is_obstructed(struct quorum_node *quorum, const struct vb_request *request)
{
    uint64_t end = request->offset + request->bytes;
    uint32_t late, votes;

    switch (request->op) {
    case VB_OP_FLUSH:
        /* It covers what has been acknowledged: that has to be everywhere first. */
        return atomic_load(&quorum->late) > 0;
    case VB_OP_READ:
        late = quorum_late_legs(quorum, request->offset, request->bytes);
        votes = 0;
        for (uint32_t leg = 0; late && leg < quorum->options.legs; leg++) {
            votes += leg_state(quorum->legs[leg]) == VB_LEG_IN_SYNC && !(late & (1u << leg));
        }
        return late && votes < quorum->options.threshold;
    default:
        return is_locked(quorum, request->offset, end) ||
               quorum_late_legs(quorum, request->offset, request->bytes);
    }
}

bool quorum_hold(struct quorum_node *quorum, struct vb_request *request)
{
    struct quorum_thread *here;
    struct held *held = (struct held *)request->scratch;

    if (!is_obstructed(quorum, request)) {
        return false;
    }
    here = quorum_thread(quorum, request->thread);
    *held = (struct held){.next = here->held, .no_early = request->op == VB_OP_FLUSH};
    here->held = request;
    if (held->no_early) {
        atomic_fetch_add(&quorum->no_early, 1);
    }
    atomic_fetch_add(&here->holding, 1);
    atomic_thread_fence(memory_order_seq_cst);
    if (!is_obstructed(quorum, request)) {
        wake_thread(quorum, request->thread->index); /* it has gone just now */
    }
    return true;
}

/* ---- late writes ----------------------------------------------------------------------------- */

static _Atomic uint64_t *member(uint64_t *value)
{
    return (_Atomic uint64_t *)value;
}

static struct vb_quorum_late *late_entry(struct quorum_node *quorum, unsigned thread,
                                         unsigned entry)
{
    struct vb_quorum_late *table = (struct vb_quorum_late *)(uintptr_t)quorum->options.lates;

    return &table[thread * VB_QUORUM_LATES + entry];
}

_Static_assert(sizeof(struct vb_quorum_late) * VB_QUORUM_LATES * VB_MAX_IOTHREADS ==
               VB_QUORUM_LATE_SIZE, "api.h says how large the table is");
_Static_assert(VB_QUORUM_LATES == 64, "late_used has a bit for each");

static uint32_t late_legs_of(struct quorum_node *quorum, unsigned thread, uint64_t used,
                             uint64_t start, uint64_t end)
{
    uint32_t legs = 0;

    for (; used; used &= used - 1) {
        struct vb_quorum_late *late =
            late_entry(quorum, thread, (unsigned)__builtin_ctzll(used));

        if (start < atomic_load(member(&late->end)) && atomic_load(member(&late->start)) < end) {
            legs |= (uint32_t)atomic_load(member(&late->legs));
        }
    }
    return legs;
}

uint32_t quorum_late_legs(struct quorum_node *quorum, uint64_t offset, uint64_t bytes)
{
    uint32_t legs = 0;

    if (atomic_load(&quorum->late) == 0) {
        return 0;
    }
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        struct quorum_thread *there =
            atomic_load_explicit(&quorum->threads[i], memory_order_acquire);

        if (there) {
            legs |= late_legs_of(quorum, i, atomic_load(&there->late_used), offset, offset + bytes);
        }
    }
    return legs;
}

/* All of it is known before the guest is told: a read, a write, and a successor see it. */
bool quorum_late_begin(struct op *op)
{
    struct quorum_node *quorum = op->quorum;
    struct quorum_thread *here = op->here;
    uint64_t used = atomic_load_explicit(&here->late_used, memory_order_relaxed);
    struct vb_quorum_late *late;

    if (~used == 0 || atomic_load(&quorum->no_early) > 0) {
        return false;
    }
    op->late = (int8_t)__builtin_ctzll(~used);
    late = late_entry(quorum, op->thread->index, (unsigned)op->late);
    atomic_store(member(&late->start), op->offset);
    atomic_store(member(&late->end), op->offset + op->bytes);
    atomic_store(member(&late->legs), op->waiting);
    atomic_fetch_or(&here->late_used, 1ull << op->late);
    atomic_fetch_add(&quorum->late, 1);
    atomic_fetch_add(&quorum->obstacles, 1);
    return true;
}

/* `legs` have the write now, or it is recorded that they do not. */
void quorum_late_arrived(struct op *op, uint32_t legs)
{
    struct quorum_node *quorum = op->quorum;
    struct vb_quorum_late *late = late_entry(quorum, op->thread->index, (unsigned)op->late);

    if ((atomic_fetch_and(member(&late->legs), ~(uint64_t)legs) & ~(uint64_t)legs) == 0) {
        atomic_fetch_and(&op->here->late_used, ~(1ull << op->late));
        op->late = -1;
        atomic_fetch_sub(&quorum->late, 1);
        atomic_fetch_sub(&quorum->obstacles, 1);
    }
    quorum_wake(quorum);
}

uint32_t vb_quorum_late(struct vb_node *node)
{
    return atomic_load(&vb_container_of(node, struct quorum_node, node)->late);
}

void vb_quorum_hold_early(struct vb_node *node, bool hold)
{
    struct quorum_node *quorum = vb_container_of(node, struct quorum_node, node);

    if (hold) {
        atomic_fetch_add(&quorum->no_early, 1);
    } else {
        atomic_fetch_sub(&quorum->no_early, 1);
    }
}

/* ---- grace ----------------------------------------------------------------------------------- */

static struct vb_epochs *epochs_of(struct vb_node *node, struct vb_iothread *thread)
{
    return &quorum_thread(vb_container_of(node, struct quorum_node, node), thread)->epochs;
}

void quorum_begin(struct op *op)
{
    op->counted = true;
    op->epoch = vb_epochs_begin(&op->here->epochs);
}

void quorum_end(struct op *op)
{
    if (op->counted) {
        op->counted = false;
        vb_epochs_end(&op->here->epochs, op->epoch);
    }
}

/* ---- locks ----------------------------------------------------------------------------------- */

int vb_quorum_lock(struct vb_node *node, uint64_t offset, uint64_t bytes, uint64_t cookie)
{
    struct quorum_node *quorum = vb_container_of(node, struct quorum_node, node);

    for (int i = 0; i < QUORUM_LOCKS; i++) {
        struct range_lock *lock = &quorum->locks[i];

        if (atomic_load(&lock->end) == 0) {
            atomic_store(&lock->start, offset);
            atomic_store(&lock->end, offset + bytes);
            /* The message that asks for grace makes this known to every thread. */
            atomic_fetch_add(&quorum->obstacles, 1);
            vb_grace_ask(node, epochs_of, cookie);
            return i;
        }
    }
    return -EBUSY;
}

void vb_quorum_unlock(struct vb_node *node, int lock)
{
    struct quorum_node *quorum = vb_container_of(node, struct quorum_node, node);

    atomic_store(&quorum->locks[lock].end, 0);
    atomic_fetch_sub(&quorum->obstacles, 1);
    quorum_wake(quorum);
}

/* ---- timeouts -------------------------------------------------------------------------------- */

static void arm(struct quorum_thread *here, uint64_t deadline_ns)
{
    here->timing = true;
    vb_timer_start(here->thread, &here->timer, deadline_ns);
}

/* Of these legs those that can fail: as long as enough are left, or if it does not vote anyway. */
static uint32_t dispensable(struct quorum_node *quorum, uint32_t legs)
{
    uint32_t in_sync = 0, rebuilding = 0;

    for (uint32_t leg = 0; leg < quorum->options.legs; leg++) {
        uint32_t state = leg_state(quorum->legs[leg]);

        in_sync += state == VB_LEG_IN_SYNC && !(legs & (1u << leg));
        rebuilding |= state == VB_LEG_IN_SYNC ? 0 : 1u << leg;
    }
    return in_sync >= quorum->options.threshold ? legs : legs & rebuilding;
}

/* These legs have failed, for all requests that wait for them. */
static void expire(struct quorum_thread *here, uint32_t legs)
{
    struct op *next;

    for (struct op *op = here->oldest; op; op = next) {
        uint32_t late = op->waiting & legs;

        next = op->next;
        for (uint32_t leg = 0; late; leg++, late >>= 1) {
            if (late & 1) {
                op_give_up(op, leg);
                break; /* it may be gone now */
            }
        }
    }
}

static void run_timer(struct vb_timer *timer)
{
    struct quorum_thread *here = vb_container_of(timer, struct quorum_thread, timer);
    uint64_t timeout;

    here->timing = false;
    if (!here->oldest) {
        return; /* and the options may be about to become others */
    }
    timeout = here->quorum->options.timeout_ns;
    here->timing = true;
    /* What begins in here, such as another try of a read, does not start the timer: we do. */
    while (here->oldest && timeout && here->oldest->started_ns + timeout <= here->thread->now_ns) {
        uint32_t legs = dispensable(here->quorum, here->oldest->waiting);

        if (!legs) {
            /* Without it nothing goes on: it is waited for, as without a timeout. */
            arm(here, here->thread->now_ns + timeout);
            return;
        }
        expire(here, legs);
    }
    here->timing = false;
    if (here->oldest && timeout) {
        arm(here, here->oldest->started_ns + timeout);
    }
}

void quorum_watch(struct op *op)
{
    struct quorum_thread *here = op->here;
    uint64_t deadline = here->thread->now_ns + op->quorum->options.timeout_ns;

    op->started_ns = here->thread->now_ns;
    op->listed = true;
    op->next = NULL;
    op->previous = here->youngest;
    if (op->previous) {
        op->previous->next = op;
    } else {
        here->oldest = op;
    }
    here->youngest = op;
    if (here->timing && here->timer.deadline_ns > deadline) {
        /* The time has been made shorter since the timer was started. */
        vb_timer_stop(here->thread, &here->timer);
        here->timing = false;
    }
    if (!here->timing) {
        arm(here, deadline);
    }
}

void quorum_unwatch(struct op *op)
{
    struct quorum_thread *here = op->here;

    if (!op->listed) {
        return;
    }
    op->listed = false;
    if (op->previous) {
        op->previous->next = op->next;
    } else {
        here->oldest = op->next;
    }
    if (op->next) {
        op->next->previous = op->previous;
    } else {
        here->youngest = op->previous;
    }
}

/* ---- life ------------------------------------------------------------------------------------ */

static void run_end(struct vb_message *message, void *context)
{
    struct quorum_thread *here = vb_container_of(message, struct quorum_thread, end);

    if (here->timing) {
        vb_timer_stop(context, &here->timer);
    }
    free(here);
}

struct quorum_thread *quorum_thread(struct quorum_node *quorum, struct vb_iothread *thread)
{
    struct quorum_thread *here =
        atomic_load_explicit(&quorum->threads[thread->index], memory_order_relaxed);

    vb_assert(vb_in_iothread(thread));
    if (!here) {
        here = vb_must_alloc(sizeof(*here));
        here->quorum = quorum;
        here->wake.run = run_wake;
        here->end.run = run_end;
        here->timer.expired = run_timer;
        here->thread = thread;
        /* Release: another thread may send its `wake` as soon as it sees it. */
        atomic_store_explicit(&quorum->threads[thread->index], here, memory_order_release);
    } else if (here->thread != thread) {
        here->thread = thread; /* the one that had this number has ended, and its timers with it */
        here->timing = false;
    }
    return here;
}

/* Nothing is in flight. A wake-up may be on its way: freed behind it, by the thread itself. */
void quorum_threads_free(struct quorum_node *quorum)
{
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        struct quorum_thread *there =
            atomic_load_explicit(&quorum->threads[i], memory_order_relaxed);
        struct vb_iothread *thread = quorum->node.engine->iothreads[i];

        if (there && thread && thread == there->thread) {
            vb_iothread_send(thread, &there->end);
        } else {
            free(there);
        }
    }
}
