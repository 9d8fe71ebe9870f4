/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * engine.c: the control side. Everything that C tells Python is a message in one
 * mailbox, turned into a vb_event when Python asks for it.
 */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

struct vb_engine *vb_engine_new(char *error)
{
    struct vb_engine *engine = calloc(1, sizeof(*engine));
    int ret = engine ? vb_mailbox_init(&engine->control) : -ENOMEM;

    if (ret < 0) {
        vb_error(error, ret, "cannot create the engine: %s", strerror(-ret));
        free(engine);
        return NULL;
    }
    atomic_store(&engine->control.asleep, true);
    vb_guest_fault_init();
    return engine;
}

void vb_engine_free(struct vb_engine *engine)
{
    vb_mailbox_destroy(&engine->control);
    free(engine);
}

int vb_engine_event_fd(struct vb_engine *engine)
{
    return engine->control.event_fd;
}

void vb_engine_post(struct vb_engine *engine, struct vb_message *message)
{
    vb_mailbox_push(&engine->control, message);
}

/* Next message, or NULL after having made sure that the event fd will tell of a later one. */
static struct vb_message *next_message(struct vb_engine *engine)
{
    struct vb_mailbox *control = &engine->control;

    if (!engine->taken) {
        engine->taken = vb_mailbox_take(control);
    }
    if (!engine->taken) {
        atomic_store(&control->asleep, true);
        if (atomic_load(&control->head)) { /* pushed before it could see that we sleep */
            atomic_store(&control->asleep, false);
            engine->taken = vb_mailbox_take(control);
        }
    }
    return engine->taken;
}

/* ---- waiting for more ---------------------------------------------------------------- */

/*
 * Going to sleep in the event loop and being woken costs some ten microseconds of CPU on this side and
 * a system call on the other. So while messages come faster than that it is cheaper to spin. How
 * long adapts as for I/O threads (vb_adapt_poll()).
 */
#define CONTROL_POLL_MAX_NS 32000

static void spin(struct vb_engine *engine)
{
    struct vb_mailbox *control = &engine->control;
    uint64_t until = engine->idle_since + engine->poll_ns;

    if (engine->taken || vb_clock_ns() >= until) {
        return;
    }
    atomic_store(&control->asleep, false); /* until next_message() finds nothing */
    while (!atomic_load_explicit(&control->head, memory_order_relaxed) && vb_clock_ns() < until) {
        vb_pause_cpu();
    }
}

int vb_engine_poll(struct vb_engine *engine, struct vb_event *events, int max, bool wait)
{
    struct vb_message *message;
    eventfd_t ignored;
    int count = 0;

    eventfd_read(engine->control.event_fd, &ignored);
    if (wait) {
        engine->idle_since = vb_clock_ns();
        spin(engine);
    }
    while (count < max && (message = next_message(engine)) != NULL) {
        engine->taken = message->next; /* run() may free the message */
        message->run(message, &events[count++]);
    }
    if (count > 0) {
        uint64_t now = vb_clock_ns();

        engine->poll_ns = vb_adapt_poll(engine->poll_ns, now - engine->idle_since,
                                        CONTROL_POLL_MAX_NS, 0, 0);
        engine->idle_since = now;
    }
    if (count == max) {
        /* There may be more: be called again, after the event loop's other work. */
        eventfd_write(engine->control.event_fd, 1);
    }
    return count;
}
