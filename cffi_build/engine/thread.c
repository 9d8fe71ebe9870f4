/* SPDX-License-Identifier: GPL-2.0-or-later */
/* thread.c: how every thread of the engine is started. */
#include "engine.h"

#include <pthread.h>
#include <signal.h>

/*
 * Signals that are sent belong to the control thread (and a dead peer is EPIPE
 * here). Those that a thread brings upon itself must reach it: the kernel kills a process in
 * which they are blocked, past every handler.
 */
static void block_signals(sigset_t *before)
{
    sigset_t blocked;

    sigfillset(&blocked);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGILL);
    pthread_sigmask(SIG_SETMASK, &blocked, before);
}

int vb_thread_start(pthread_t *thread, size_t stack_size, void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t before;
    int ret;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, stack_size);
    block_signals(&before);
    ret = -pthread_create(thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return ret;
}
