/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * aio_threads.c: file I/O by a small pool of threads, for kernels and containers
 * without io_uring. The I/O thread itself sleeps on its epoll fd.
 *
 * This is the one place with a lock between an I/O thread and others. It is held
 * for a few instructions to put an operation into a list or take one out, never
 * across a system call; and operations that come here sleep in the kernel
 * for longer than the lock could ever cost. Completions return through
 * the I/O thread's mailbox like any message.
 */
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* They make one system call and no deep calls; sanitizers want some room. */
#define POOL_STACK_SIZE (256 * 1024)

/* Made by init() and freed by destroy() on the I/O thread; what follows `lock` is under it. */
struct pool {
    struct vb_iothread *thread;
    uint32_t threads_max;
    uint32_t threads_used; /* the I/O thread's: only it starts workers */
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct vb_message *first, **last; /* operations no worker has taken; FIFO */
    uint32_t waiting;                 /* how many those are */
    uint32_t idle;                    /* workers asleep */
    bool stop;
    pthread_t threads[];
};

static struct vb_aio *aio_of(struct vb_message *message)
{
    return vb_container_of(message, struct vb_aio, message);
}

/* ---- the workers ------------------------------------------------------------------ */

static ssize_t system_call(const struct vb_aio *aio)
{
    switch (aio->opcode) {
    case VB_AIO_READV:
        return preadv2(aio->fd, aio->iov, (int)aio->niov, (off_t)aio->offset, aio->flags);
    case VB_AIO_WRITEV:
        return pwritev2(aio->fd, aio->iov, (int)aio->niov, (off_t)aio->offset, aio->flags);
    case VB_AIO_FDATASYNC:
        return fdatasync(aio->fd);
    default:
        return fallocate(aio->fd, aio->flags, (off_t)aio->offset, (off_t)aio->length);
    }
}

static void run_done(struct vb_message *message, void *context)
{
    struct vb_aio *aio = aio_of(message);

    (void)context;
    aio->done(aio);
}

static void execute(struct pool *pool, struct vb_aio *aio)
{
    ssize_t ret;

    do {
        ret = system_call(aio);
    } while (ret < 0 && errno == EINTR);
    aio->result = ret < 0 ? -errno : (int)ret;
    aio->message.run = run_done;
    vb_iothread_send(pool->thread, &aio->message);
}

/* The next operation, or NULL when the pool is stopped. */
static struct vb_aio *take(struct pool *pool)
{
    struct vb_message *message;

    pthread_mutex_lock(&pool->lock);
    pool->idle++;
    while (!pool->first && !pool->stop) {
        pthread_cond_wait(&pool->work, &pool->lock);
    }
    pool->idle--;
    message = pool->first;
    if (message) {
        pool->first = message->next;
        pool->waiting--;
        if (!pool->first) {
            pool->last = &pool->first;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return message ? aio_of(message) : NULL;
}

static void *worker_main(void *argument)
{
    struct pool *pool = argument;
    struct vb_aio *aio;

    pthread_setname_np(pthread_self(), "vhostblk-aio");
    while ((aio = take(pool))) {
        execute(pool, aio);
    }
    return NULL;
}

/* Workers stay until the pool ends: a sleeping thread costs a few KiB, starting one 20 us. */
static bool start_worker(struct pool *pool)
{
    pthread_t *thread = &pool->threads[pool->threads_used];

    if (vb_thread_start(thread, POOL_STACK_SIZE, worker_main, pool) < 0) {
        return false;
    }
    pool->threads_used++;
    return true;
}

/* ---- the I/O thread's side ------------------------------------------------------------ */

static int threads_init(struct vb_iothread *thread, char *error)
{
    uint32_t max = thread->aio_threads_max;
    struct pool *pool = calloc(1, sizeof(*pool) + max * sizeof(pool->threads[0]));

    if (!pool) {
        return vb_error(error, -ENOMEM, "no memory for a pool of %u threads", max);
    }
    pool->thread = thread;
    pool->threads_max = max;
    pool->last = &pool->first;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    thread->aio_state = pool;
    /* One worker that is there for certain: then no operation can be stranded later. */
    if (!start_worker(pool)) {
        thread->aio->destroy(thread);
        return vb_error(error, -EAGAIN, "cannot start a thread for file I/O: raise the limit on "
                        "processes ('ulimit -u', TasksMax=)");
    }
    return 0;
}

static void threads_submit(struct vb_iothread *thread, struct vb_aio *aio)
{
    struct pool *pool = thread->aio_state;
    bool crowded;

    vb_assert(vb_in_iothread(thread));
    aio->message.next = NULL;
    pthread_mutex_lock(&pool->lock);
    *pool->last = &aio->message;
    pool->last = &aio->message.next;
    crowded = ++pool->waiting > pool->idle;
    pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    if (crowded && pool->threads_used < pool->threads_max) {
        start_worker(pool); /* should it fail, those that run will get to it */
    }
}

/* Completions are messages: the loop runs them, and counts them, by itself. */
static bool threads_poll(struct vb_iothread *thread)
{
    (void)thread;
    return false;
}

/* The epoll fd is looked at, not read: its events belong to the caller. */
static bool threads_wait(struct vb_iothread *thread, uint64_t timeout_ns)
{
    struct pollfd fd = {.fd = thread->epoll_fd, .events = POLLIN};
    struct timespec timeout = {
        .tv_sec = (time_t)(timeout_ns / 1000000000u),
        .tv_nsec = (long)(timeout_ns % 1000000000u),
    };

    /* EINTR is a reason to look again, like any other wake-up. */
    return ppoll(&fd, 1, timeout_ns == UINT64_MAX ? NULL : &timeout, NULL) > 0;
}

static void threads_destroy(struct vb_iothread *thread)
{
    struct pool *pool = thread->aio_state;

    pthread_mutex_lock(&pool->lock);
    vb_assert(!pool->first);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->threads_used; i++) {
        pthread_join(pool->threads[i], NULL);
    }
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
    thread->aio_state = NULL;
}

const struct vb_aio_backend vb_aio_threads = {
    .kind = VB_AIO_THREADS,
    .init = threads_init,
    .submit = threads_submit,
    .poll = threads_poll,
    .wait = threads_wait,
    .destroy = threads_destroy,
};
