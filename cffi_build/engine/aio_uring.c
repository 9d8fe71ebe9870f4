/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * aio_uring.c: file I/O and sleep of an I/O thread through an io_uring.
 *
 * Operations collect in a list of our own and become SQEs in poll() or wait(), so
 * a sweep costs one system call however many it started, and a full submission
 * queue is no case of its own: what does not fit stays in the list.
 *
 * The epoll fd with the thread's watches is one more operation in the ring (a
 * one-shot poll), so that sleeping for file I/O and for the guest's notifications
 * is one system call too.
 */
#include "engine.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SQ_ENTRIES 256
#define CQ_ENTRIES 4096
/* Before asking again when the kernel has no memory for a submission. */
static const struct timespec retry_after = {.tv_nsec = 1000000};

/* Owned by the I/O thread: made by init(), freed by destroy(). */
struct uring_state {
    struct io_uring ring;
    struct vb_message *first, **last; /* accepted, not yet in the ring; FIFO */
    uint32_t in_ring;             /* operations whose completion has not been seen */
    bool poll_armed;              /* the epoll fd is being polled */
    bool poll_fired;              /* it was, and wait() has not said so yet */
    bool completed;               /* done() ran since poll() last said so */
};

/* ---- start and stop ------------------------------------------------------------ */

static int kernel_switch(void)
{
    FILE *file = fopen("/proc/sys/kernel/io_uring_disabled", "re");
    int value = 0;

    if (file) {
        if (fscanf(file, "%d", &value) != 1) {
            value = 0;
        }
        fclose(file);
    }
    return value;
}

/* Say what the operator can do about it. */
static int explain(char *error, int ret)
{
    int value = kernel_switch();

    if (ret == -EPERM && value) {
        return vb_error(error, ret, "io_uring is switched off: sysctl kernel.io_uring_disabled is "
                        "%d; 'sysctl kernel.io_uring_disabled=0' allows it", value);
    }
    if (ret == -EPERM || ret == -EACCES) {
        return vb_error(error, ret, "io_uring is not permitted (%s): allow io_uring_setup, "
                        "io_uring_enter and io_uring_register in the seccomp filter of the "
                        "container or service", strerror(-ret));
    }
    if (ret == -ENOSYS) {
        return vb_error(error, ret, "this kernel has no usable io_uring (Linux 5.11 or later is "
                        "needed), or a seccomp filter hides io_uring_setup and io_uring_enter");
    }
    if (ret == -ENOMEM) {
        return vb_error(error, ret, "no locked memory for an io_uring: raise the limit "
                        "('ulimit -l', LimitMEMLOCK=)");
    }
    return vb_error(error, ret, "cannot set up an io_uring: %s", strerror(-ret));
}

/*
 * From what the newest kernels know down to what all have. All spare us the
 * interrupt of a busy thread for a completion that it will look for anyway.
 */
static int open_ring(struct io_uring *ring)
{
    static const unsigned flags[] = {
        IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER |
            IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_DEFER_TASKRUN,
        IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER |
            IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG, /* before 6.1 */
        IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE | IORING_SETUP_COOP_TASKRUN |
            IORING_SETUP_TASKRUN_FLAG,                             /* before 6.0 */
        IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE,                  /* before 5.19 */
    };
    int ret = -EINVAL;

    for (size_t i = 0; ret == -EINVAL && i < sizeof(flags) / sizeof(flags[0]); i++) {
        struct io_uring_params params = {.flags = flags[i], .cq_entries = CQ_ENTRIES};
        ret = io_uring_queue_init_params(SQ_ENTRIES, ring, &params);
    }
    return ret;
}

/* A filter may allow making a ring and forbid using it: find out now. */
static int try_ring(struct io_uring *ring)
{
    const unsigned needed = IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;
    struct io_uring_sqe *sqe;
    struct io_uring_cqe *cqe;
    int ret;

    if ((ring->features & needed) != needed) {
        return -ENOSYS;
    }
    sqe = io_uring_get_sqe(ring);
    io_uring_prep_nop(sqe);
    do {
        ret = io_uring_submit_and_wait(ring, 1);
    } while (ret == -EINTR);
    if (ret < 0) {
        return ret;
    }
    ret = io_uring_wait_cqe(ring, &cqe);
    if (ret == 0) {
        io_uring_cqe_seen(ring, cqe);
    }
    return ret;
}

static int uring_init(struct vb_iothread *thread, char *error)
{
    struct uring_state *state = calloc(1, sizeof(*state));
    int ret;

    if (!state) {
        return vb_error(error, -ENOMEM, "no memory for an io_uring");
    }
    ret = open_ring(&state->ring);
    if (ret < 0) {
        free(state);
        return explain(error, ret);
    }
    ret = try_ring(&state->ring);
    if (ret < 0) {
        io_uring_queue_exit(&state->ring);
        free(state);
        return explain(error, ret);
    }
    state->last = &state->first;
    thread->aio_state = state;
    return 0;
}

static void uring_destroy(struct vb_iothread *thread)
{
    struct uring_state *state = thread->aio_state;

    vb_assert(!state->first && !state->in_ring);
    io_uring_queue_exit(&state->ring);
    free(state);
    thread->aio_state = NULL;
}

/* ---- into the ring --------------------------------------------------------------- */

static void uring_submit(struct vb_iothread *thread, struct vb_aio *aio)
{
    struct uring_state *state = thread->aio_state;

    vb_assert(vb_in_iothread(thread));
    aio->message.next = NULL;
    *state->last = &aio->message;
    state->last = &aio->message.next;
}

static struct vb_aio *aio_of(struct vb_message *message)
{
    return vb_container_of(message, struct vb_aio, message);
}

static void prepare(struct io_uring_sqe *sqe, struct vb_aio *aio)
{
    switch (aio->opcode) {
    case VB_AIO_READV:
        io_uring_prep_readv2(sqe, aio->fd, aio->iov, aio->niov, aio->offset, aio->flags);
        break;
    case VB_AIO_WRITEV:
        io_uring_prep_writev2(sqe, aio->fd, aio->iov, aio->niov, aio->offset, aio->flags);
        break;
    case VB_AIO_FDATASYNC:
        io_uring_prep_fsync(sqe, aio->fd, IORING_FSYNC_DATASYNC);
        break;
    default:
        io_uring_prep_fallocate(sqe, aio->fd, aio->flags, (off_t)aio->offset, (off_t)aio->length);
        break;
    }
    io_uring_sqe_set_data(sqe, aio);
    if (aio->elsewhere) { /* or the kernel does it right in our system call */
        io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
    }
}

/* Moves what fits from the list into SQEs; true if something stayed behind. */
static bool fill_sqes(struct uring_state *state)
{
    while (state->first) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&state->ring);
        struct vb_message *message = state->first;

        if (!sqe) {
            return true;
        }
        state->first = message->next;
        prepare(sqe, aio_of(message));
        state->in_ring++;
    }
    state->last = &state->first;
    return false;
}

static bool unsubmitted(const struct uring_state *state)
{
    return state->first || io_uring_sq_ready(&state->ring) > 0;
}

/* False if the kernel wants to be asked again later: it has no memory, or too many completions. */
static bool pass_on(struct uring_state *state)
{
    bool more = fill_sqes(state);

    while (io_uring_sq_ready(&state->ring) > 0) {
        int ret = io_uring_submit(&state->ring);

        if (ret == -EINTR) {
            continue;
        }
        if (ret < 0) {
            return false;
        }
        if (more) {
            more = fill_sqes(state);
        }
    }
    return true;
}

/* ---- out of the ring ---------------------------------------------------------------- */

/*
 * The completions are gathered and given back to the kernel before any done()
 * runs, which may submit more.
 */
static struct vb_message *gather(struct uring_state *state)
{
    struct vb_message *finished = NULL, **last = &finished;
    struct io_uring_cqe *cqe;
    unsigned head, count = 0;

    io_uring_for_each_cqe(&state->ring, head, cqe) {
        struct vb_aio *aio = io_uring_cqe_get_data(cqe);

        count++;
        if (!aio) { /* the poll of the epoll fd; should it have failed, look there all the same */
            state->poll_armed = false;
            state->poll_fired = true;
            continue;
        }
        aio->result = cqe->res;
        state->in_ring--;
        *last = &aio->message;
        last = &aio->message.next;
    }
    *last = NULL;
    io_uring_cq_advance(&state->ring, count);
    return finished;
}

static void reap(struct vb_iothread *thread, struct uring_state *state)
{
    struct vb_message *finished;

    if (io_uring_cq_ready(&state->ring) == 0) {
        return;
    }
    vb_refresh_now(thread); /* what completes now is dated now */
    finished = gather(state);
    state->completed |= finished != NULL;
    while (finished) {
        struct vb_aio *aio = aio_of(finished);

        finished = finished->next; /* done() may free the aio */
        aio->done(aio);
    }
}

/* Completions that only an io_uring_enter() brings out. */
static bool kernel_holds_back(struct uring_state *state)
{
    unsigned flags = __atomic_load_n(state->ring.sq.kflags, __ATOMIC_RELAXED);

    return flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
}

static bool uring_poll(struct vb_iothread *thread)
{
    struct uring_state *state = thread->aio_state;
    bool completed;

    if (unsubmitted(state)) {
        pass_on(state);
    }
    if (kernel_holds_back(state)) {
        io_uring_get_events(&state->ring);
    }
    reap(thread, state);
    completed = state->completed;
    state->completed = false;
    return completed;
}

static void arm_poll(struct vb_iothread *thread, struct uring_state *state)
{
    struct io_uring_sqe *sqe = state->poll_armed ? NULL : io_uring_get_sqe(&state->ring);

    if (sqe) {
        io_uring_prep_poll_add(sqe, thread->epoll_fd, POLLIN);
        io_uring_sqe_set_data(sqe, NULL);
        state->poll_armed = true;
    }
}

/* One system call submits, sleeps and brings back completions. */
static void sleep_in_kernel(struct uring_state *state, uint64_t timeout_ns)
{
    struct io_uring_cqe *cqe;
    struct __kernel_timespec timeout = {
        .tv_sec = (long long)(timeout_ns / 1000000000u),
        .tv_nsec = (long long)(timeout_ns % 1000000000u),
    };

    /* A failure (a signal, the time is up, too many completions) means: look again. */
    io_uring_submit_and_wait_timeout(&state->ring, &cqe, 1,
                                     timeout_ns == UINT64_MAX ? NULL : &timeout, NULL);
}

static bool uring_wait(struct vb_iothread *thread, uint64_t timeout_ns)
{
    struct uring_state *state = thread->aio_state;
    bool fired;

    if (unsubmitted(state) && !pass_on(state)) {
        nanosleep(&retry_after, NULL);
    } else if (!state->poll_fired) {
        arm_poll(thread, state);
        sleep_in_kernel(state, timeout_ns);
    }
    reap(thread, state);
    fired = state->poll_fired;
    state->poll_fired = false;
    return fired;
}

const struct vb_aio_backend vb_aio_uring = {
    .kind = VB_AIO_IO_URING,
    .init = uring_init,
    .submit = uring_submit,
    .poll = uring_poll,
    .wait = uring_wait,
    .destroy = uring_destroy,
};
