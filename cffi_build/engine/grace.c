/* SPDX-License-Identifier: GPL-2.0-or-later */
/* grace.c: see grace.h. */
#include "grace.h"

#include <stdlib.h>

/* A question, once all threads have answered. */
struct grace {
    struct vb_message message;
    struct vb_engine *engine;
    _Atomic uint32_t left;
    uint64_t cookie;
};

/* What one thread is asked. */
struct vb_grace_part {
    struct vb_message message;
    struct vb_node *node;
    struct vb_epochs *(*find)(struct vb_node *node, struct vb_iothread *thread);
    struct grace *whole;
    struct vb_grace_part *next;
};

static void fill_done(struct vb_message *message, void *context)
{
    struct grace *grace = vb_container_of(message, struct grace, message);

    *(struct vb_event *)context = (struct vb_event){
        .kind = VB_EVENT_DONE,
        .cookie = grace->cookie,
    };
    free(grace);
}

static void answer(struct grace *grace)
{
    if (atomic_fetch_sub(&grace->left, 1) == 1) {
        grace->message.run = fill_done;
        vb_engine_post(grace->engine, &grace->message);
    }
}

static void answer_all(struct vb_grace_part *part)
{
    while (part) {
        struct vb_grace_part *next = part->next;

        answer(part->whole);
        free(part);
        part = next;
    }
}

/* Takes up the questions that wait, unless earlier ones are still open. */
static void turn(struct vb_epochs *epochs)
{
    if (epochs->draining || !epochs->next) {
        return;
    }
    epochs->draining = epochs->next;
    epochs->next = NULL;
    epochs->current = !epochs->current;
    if (epochs->inflight[!epochs->current] == 0) {
        vb_epochs_drained(epochs);
    }
}

void vb_epochs_drained(struct vb_epochs *epochs)
{
    struct vb_grace_part *open = epochs->draining;

    epochs->draining = NULL;
    answer_all(open);
    turn(epochs);
}

static void run_part(struct vb_message *message, void *context)
{
    struct vb_grace_part *part = vb_container_of(message, struct vb_grace_part, message);
    struct vb_epochs *epochs = part->find(part->node, context);

    part->next = epochs->next;
    epochs->next = part;
    turn(epochs);
}

void vb_grace_ask(struct vb_node *node,
                  struct vb_epochs *(*find)(struct vb_node *node, struct vb_iothread *thread),
                  uint64_t cookie)
{
    struct vb_engine *engine = node->engine;
    struct grace *whole = vb_must_alloc(sizeof(*whole));

    whole->engine = engine;
    whole->cookie = cookie;
    atomic_init(&whole->left, 1); /* ours */
    for (unsigned i = 0; i < VB_MAX_IOTHREADS; i++) {
        if (engine->iothreads[i]) {
            struct vb_grace_part *part = vb_must_alloc(sizeof(*part));

            part->message.run = run_part;
            part->node = node;
            part->find = find;
            part->whole = whole;
            atomic_fetch_add(&whole->left, 1);
            vb_iothread_send(engine->iothreads[i], &part->message);
        }
    }
    answer(whole);
}
