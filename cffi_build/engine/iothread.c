/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * iothread.c: the loop of an I/O thread.
 *
 * Once round: messages, completed file I/O, timers, then every poller (the
 * virtqueues of a device): pop and start what is there, hand all file I/O to the
 * kernel in one go, and only then pass on, poller by poller, all that has
 * completed. So one sweep pays for one submission and one interrupt.
 *
 * When there is nothing to do the thread first spins for poll_ns, because going
 * to sleep and being woken costs more than most requests, and then asks each
 * poller to be woken (arm) and sleeps. How long it spins adapts as in QEMU's AioContext:
 * a sleep that a slightly longer spin would have caught grows poll_ns, a long
 * sleep shrinks it, so that an idle guest costs nothing.
 */
#include "engine.h"

#include <errno.h>
#include <sched.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

/* Guest memory is walked with 1024-entry arrays on the stack; and sanitizers need room. */
#define STACK_SIZE (1 << 20)

/* What vb_iothread_new() and its thread tell each other, once. */
struct vb_iothread_start {
    pthread_t pthread;
    sem_t ready;
    int ret;
    char *error;
};

static _Thread_local struct vb_iothread *current;

int vb_error(char *error, int ret, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(error, VB_ERROR_SIZE, format, arguments);
    va_end(arguments);
    return ret;
}

uint64_t vb_clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

bool vb_in_iothread(const struct vb_iothread *thread)
{
    return current == thread;
}

void vb_iothread_send(struct vb_iothread *thread, struct vb_message *message)
{
    vb_mailbox_push(&thread->mailbox, message);
}

void vb_iothread_call(struct vb_iothread *thread)
{
    atomic_store(&thread->called, true);
    vb_mailbox_wake(&thread->mailbox);
}

void vb_iothread_add_poller(struct vb_iothread *thread, struct vb_poller *poller)
{
    vb_assert(vb_in_iothread(thread));
    poller->next = thread->pollers;
    thread->pollers = poller;
}

void vb_iothread_remove_poller(struct vb_iothread *thread, struct vb_poller *poller)
{
    vb_assert(vb_in_iothread(thread));
    for (struct vb_poller **link = &thread->pollers; *link; link = &(*link)->next) {
        if (*link == poller) {
            *link = poller->next;
            return;
        }
    }
}

/* Edge-triggered: an event fd need not be read to be noticed again. */
int vb_iothread_add_watch(struct vb_iothread *thread, int fd, struct vb_watch *watch)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = watch};

    return epoll_ctl(thread->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

void vb_iothread_remove_watch(struct vb_iothread *thread, int fd)
{
    epoll_ctl(thread->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

/* ---- the loop ------------------------------------------------------------------ */

static bool run_messages(struct vb_iothread *thread)
{
    struct vb_message *message = vb_mailbox_take(&thread->mailbox);
    bool any = message != NULL;

    if (any) {
        vb_iothread_set_spinning(thread, false);
    }
    while (message) {
        struct vb_message *next = message->next; /* run() may free the message */
        message->run(message, thread);
        message = next;
    }
    return any;
}

static bool run_timers(struct vb_iothread *thread)
{
    bool any = false;

    while (thread->timers_used > 0 && thread->timers[0]->deadline_ns <= thread->now_ns) {
        struct vb_timer *timer = thread->timers[0];

        vb_timer_stop(thread, timer);
        timer->expired(timer);
        any = true;
    }
    return any;
}

static bool sweep(struct vb_iothread *thread)
{
    bool any;

    vb_refresh_now(thread);
    any = run_messages(thread);
    any |= thread->aio->poll(thread);
    any |= run_timers(thread);
    for (struct vb_poller *poller = thread->pollers; poller; poller = poller->next) {
        any |= poller->poll(poller);
    }
    any |= thread->aio->poll(thread);
    any |= run_messages(thread); /* what other threads have done for this one meanwhile */
    if (any) {
        vb_refresh_now(thread);
    }
    for (struct vb_poller *poller = thread->pollers; poller; poller = poller->next) {
        any |= poller->flush(poller);
    }
    vb_count(&thread->loops, 1);
    return any;
}

static void run_watches(struct vb_iothread *thread)
{
    struct epoll_event events[32];
    int count;

    do {
        count = epoll_wait(thread->epoll_fd, events, 32, 0);
        for (int i = 0; i < count; i++) {
            struct vb_watch *watch = events[i].data.ptr;
            if (watch) { /* NULL is the mailbox: being awake is all it asked for */
                watch->ready(watch);
            }
        }
    } while (count == 32);
}

static uint64_t sleep_limit(struct vb_iothread *thread)
{
    uint64_t limit = thread->max_sleep_ns;

    if (thread->timers_used > 0) {
        uint64_t deadline = thread->timers[0]->deadline_ns;
        uint64_t until = deadline > thread->now_ns ? deadline - thread->now_ns : 0;
        limit = until < limit ? until : limit;
    }
    return limit;
}

static bool arm_pollers(struct vb_iothread *thread)
{
    bool busy = false;

    thread->max_sleep_ns = UINT64_MAX;
    for (struct vb_poller *poller = thread->pollers; poller; poller = poller->next) {
        busy |= poller->arm(poller);
    }
    return busy;
}

static void sleep_until_woken(struct vb_iothread *thread)
{
    bool busy = arm_pollers(thread);

    atomic_store(&thread->mailbox.asleep, true);
    if (!busy && !atomic_load(&thread->mailbox.head) && !atomic_load(&thread->called)) {
        vb_count(&thread->sleeps, 1);
        if (thread->aio->wait(thread, sleep_limit(thread))) {
            run_watches(thread);
        }
    }
    atomic_store_explicit(&thread->mailbox.asleep, false, memory_order_relaxed);
}

/* `idle_ns`: from the last thing done to the next, spinning included. */
static void adapt_polling(struct vb_iothread *thread, uint64_t idle_ns)
{
    uint64_t now = atomic_load_explicit(&thread->poll_ns, memory_order_relaxed);
    uint64_t next = vb_adapt_poll(now, idle_ns,
                                  atomic_load_explicit(&thread->poll_max_ns, memory_order_relaxed),
                                  atomic_load_explicit(&thread->poll_grow, memory_order_relaxed),
                                  atomic_load_explicit(&thread->poll_shrink, memory_order_relaxed));

    if (next != now) {
        atomic_store_explicit(&thread->poll_ns, next, memory_order_relaxed);
    }
}

/* How long to spin; a maximum that has become lower counts at once. */
static uint64_t spin_limit(struct vb_iothread *thread)
{
    uint64_t max = atomic_load_explicit(&thread->poll_max_ns, memory_order_relaxed);
    uint64_t limit = atomic_load_explicit(&thread->poll_ns, memory_order_relaxed);

    return limit < max ? limit : max;
}

/* How long a helper waits for more, from when it was last called or given something to do. */
static bool waits_for_help(struct vb_iothread *thread)
{
    return thread->now_ns - thread->helped_ns <
           atomic_load_explicit(&thread->poll_max_ns, memory_order_relaxed);
}

static void loop(struct vb_iothread *thread)
{
    uint64_t idle_since = 0;
    bool slept = false;

    while (!thread->stop) {
        bool any = sweep(thread);

        vb_iothread_set_spinning(thread, !any);
        if (any) {
            if (slept) {
                adapt_polling(thread, thread->now_ns - idle_since);
                slept = false;
            }
            idle_since = thread->now_ns;
            continue;
        }
        if (waits_for_help(thread)) {
            /* What is to be done may depend on who is waiting for this CPU: a guest's, say. */
            sched_yield();
            continue;
        }
        if (thread->now_ns - idle_since < spin_limit(thread)) {
            vb_pause_cpu();
            continue;
        }
        vb_iothread_set_spinning(thread, false);
        sleep_until_woken(thread);
        slept = true;
        if (atomic_exchange(&thread->called, false)) {
            thread->helped_ns = vb_clock_ns();
        }
    }
}

/* ---- start and stop ---------------------------------------------------------------- */

static int start_aio(struct vb_iothread *thread, uint32_t kind, char *error)
{
    int ret = -ENOSYS;

    if (kind != VB_AIO_THREADS) {
        thread->aio = &vb_aio_uring;
        ret = thread->aio->init(thread, error);
        if (ret == 0 || kind == VB_AIO_IO_URING) {
            return ret;
        }
        snprintf(thread->fallback, sizeof(thread->fallback), "%s", error);
    }
    thread->aio = &vb_aio_threads;
    return thread->aio->init(thread, error);
}

static void *thread_main(void *argument)
{
    struct vb_iothread *thread = argument;
    struct vb_iothread_start *start = thread->start;
    char name[16];

    current = thread;
    snprintf(name, sizeof(name), "%.15s", thread->name); /* the kernel's limit */
    pthread_setname_np(pthread_self(), name);
    atomic_store(&thread->thread_id, gettid());
    vb_refresh_now(thread);

    start->ret = start_aio(thread, (uint32_t)start->ret, start->error);
    if (start->ret < 0) {
        sem_post(&start->ready);
        return NULL;
    }
    sem_post(&start->ready);

    loop(thread);
    thread->aio->destroy(thread);
    return NULL;
}

static int free_slot(struct vb_engine *engine)
{
    for (int i = 0; i < VB_MAX_IOTHREADS; i++) {
        if (!engine->iothreads[i]) {
            return i;
        }
    }
    return -1;
}

static void release(struct vb_iothread *thread)
{
    while (thread->free_requests) {
        struct vb_request *next = thread->free_requests->next;
        free(thread->free_requests);
        thread->free_requests = next;
    }
    vb_buffers_free(thread);
    free(thread->timers);
    if (thread->epoll_fd >= 0) {
        close(thread->epoll_fd);
    }
    if (thread->mailbox.event_fd >= 0) {
        vb_mailbox_destroy(&thread->mailbox);
    }
    sem_destroy(&thread->start->ready);
    free(thread->start);
    free(thread);
}

static int prepare(struct vb_iothread *thread)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = NULL};

    if (vb_mailbox_init(&thread->mailbox) < 0) {
        return -errno;
    }
    thread->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (thread->epoll_fd < 0 ||
        epoll_ctl(thread->epoll_fd, EPOLL_CTL_ADD, thread->mailbox.event_fd, &event) < 0) {
        return -errno;
    }
    return vb_thread_start(&thread->start->pthread, STACK_SIZE, thread_main, thread);
}

struct vb_iothread *vb_iothread_new(struct vb_engine *engine, const char *name,
                                    const struct vb_iothread_options *options, char *error)
{
    struct vb_iothread_start *start;
    struct vb_iothread *thread;
    int slot = free_slot(engine), ret;

    if (slot < 0) {
        vb_error(error, -EMFILE, "there are %d I/O threads already, the most there can be",
                 VB_MAX_IOTHREADS);
        return NULL;
    }
    thread = calloc(1, sizeof(*thread));
    start = calloc(1, sizeof(*start));
    if (!thread || !start) {
        vb_error(error, -ENOMEM, "no memory for I/O thread '%s'", name);
        free(thread);
        free(start);
        return NULL;
    }
    thread->start = start;
    sem_init(&thread->start->ready, 0, 0);
    thread->start->ret = (int)options->aio;
    thread->start->error = error;
    thread->engine = engine;
    thread->index = (uint32_t)slot;
    thread->epoll_fd = thread->mailbox.event_fd = -1;
    thread->aio_threads_max = options->threads_max ? options->threads_max : 16;
    snprintf(thread->name, sizeof(thread->name), "%s", name);
    vb_iothread_set_poll(thread, options->poll_max_ns, options->poll_grow, options->poll_shrink);

    error[0] = '\0';
    ret = prepare(thread);
    if (ret == 0) {
        while (sem_wait(&thread->start->ready) < 0 && errno == EINTR) {
        }
        ret = thread->start->ret;
        if (ret < 0) {
            pthread_join(thread->start->pthread, NULL);
        }
    }
    if (ret < 0) {
        if (!error[0]) {
            vb_error(error, ret, "cannot start I/O thread '%s': %s", name, strerror(-ret));
        }
        release(thread);
        return NULL;
    }
    thread->start->error = NULL;
    engine->iothreads[slot] = thread;
    return thread;
}

void vb_iothread_set_poll(struct vb_iothread *thread, uint64_t max_ns, uint64_t grow,
                          uint64_t shrink)
{
    atomic_store_explicit(&thread->poll_max_ns, max_ns, memory_order_relaxed);
    atomic_store_explicit(&thread->poll_grow, grow, memory_order_relaxed);
    atomic_store_explicit(&thread->poll_shrink, shrink, memory_order_relaxed);
}

static uint64_t read_counter(_Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

void vb_iothread_query(struct vb_iothread *thread, struct vb_iothread_info *info)
{
    info->thread_id = atomic_load_explicit(&thread->thread_id, memory_order_relaxed);
    info->aio = thread->aio->kind;
    info->poll_ns = spin_limit(thread);
    info->loops = read_counter(&thread->loops);
    info->sleeps = read_counter(&thread->sleeps);
    info->requests = read_counter(&thread->requests);
    info->notifies = read_counter(&thread->notifies);
    info->inline_ios = read_counter(&thread->inline_ios);
    info->mapped_ios = read_counter(&thread->mapped_ios);
    info->queued_ios = read_counter(&thread->queued_ios);
    info->shared_requests = read_counter(&thread->shared_requests);
}

const char *vb_iothread_fallback_reason(struct vb_iothread *thread)
{
    return thread->fallback;
}

static void run_stop(struct vb_message *message, void *context)
{
    struct vb_iothread *thread = context;

    (void)message;
    thread->stop = true;
}

struct barrier {
    struct vb_message message;
    sem_t passed;
};

static void run_barrier(struct vb_message *message, void *context)
{
    (void)context;
    sem_post(&vb_container_of(message, struct barrier, message)->passed);
}

/* What `thread` has sent by now it has sent entirely: it does not look at the receiver any more. */
static void pass(struct vb_iothread *thread)
{
    struct barrier barrier = {.message = {.run = run_barrier}};

    sem_init(&barrier.passed, 0, 0);
    vb_iothread_send(thread, &barrier.message);
    while (sem_wait(&barrier.passed) < 0 && errno == EINTR) {
    }
    sem_destroy(&barrier.passed);
}

void vb_iothread_free(struct vb_iothread *thread)
{
    struct vb_message stop = {.run = run_stop};

    vb_iothread_send(thread, &stop);
    pthread_join(thread->start->pthread, NULL);
    thread->engine->iothreads[thread->index] = NULL;
    for (int i = 0; i < VB_MAX_IOTHREADS; i++) {
        if (thread->engine->iothreads[i]) {
            pass(thread->engine->iothreads[i]);
        }
    }
    release(thread);
}
