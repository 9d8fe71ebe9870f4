/* SPDX-License-Identifier: GPL-2.0-or-later */
/* round.c: once round every I/O thread's loop. */
#include "engine.h"

#include <stdlib.h>

struct round {
    _Atomic uint32_t left;
    void (*run)(void *argument);
    void *argument;
};

struct round_stop {
    struct vb_message message;
    struct round *round;
};

static void end_of_round(struct round *round)
{
    if (atomic_fetch_sub(&round->left, 1) == 1) {
        round->run(round->argument);
        free(round);
    }
}

static void run_stop(struct vb_message *message, void *context)
{
    struct round_stop *stop = vb_container_of(message, struct round_stop, message);
    struct round *round = stop->round;

    (void)context;
    free(stop);
    end_of_round(round);
}

void vb_after_all_threads(struct vb_engine *engine, void (*run)(void *argument), void *argument)
{
    struct round *round = vb_must_alloc(sizeof(*round));

    round->run = run;
    round->argument = argument;
    atomic_init(&round->left, 1); /* ours */
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        if (engine->iothreads[i]) {
            struct round_stop *stop = vb_must_alloc(sizeof(*stop));

            stop->round = round;
            stop->message.run = run_stop;
            atomic_fetch_add(&round->left, 1);
            vb_iothread_send(engine->iothreads[i], &stop->message);
        }
    }
    end_of_round(round);
}
