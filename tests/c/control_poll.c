/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * control_poll.c: for test_polling.py. The control side of the engine with a clock that advances by a
 * microsecond whenever somebody looks at it, and posts a message when its time has come.
 */
#include "engine.h"

#include <sys/eventfd.h>

static struct vb_engine *engine;
static uint64_t now, due;

static void fill(struct vb_message *message, void *event)
{
    (void)message;
    (void)event;
}

static struct vb_message message = {.run = fill};

static void advance(uint64_t to)
{
    now = to;
    if (due && now >= due) {
        due = 0;
        vb_engine_post(engine, &message);
    }
}

uint64_t vb_clock_ns(void)
{
    advance(now + 1000);
    return now;
}

void vb_guest_fault_init(void)
{
}

int vb_error(char *error, int ret, const char *format, ...)
{
    (void)error;
    (void)format;
    return ret;
}

void start(void)
{
    char error[VB_ERROR_SIZE];

    engine = vb_engine_new(error);
    now = due = 0;
}

void stop(void)
{
    vb_engine_free(engine);
}

/*
 * Asks once, with a message coming in `ns`. Returns 1 if that waited for it, 0 if not: then the event loop
 * sleeps until the event fd wakes it, and asks again. -1: something else has happened.
 */
int one_message(uint64_t ns)
{
    struct vb_event event;
    eventfd_t ignored;

    due = now + ns;
    if (vb_engine_poll(engine, &event, 1, true) == 1) {
        /* Told to call again, as it may have got all that it asked for; nobody else has written. */
        return eventfd_read(vb_engine_event_fd(engine), &ignored) == 0 && ignored == 1 ? 1 : -1;
    }
    advance(due);
    if (eventfd_read(vb_engine_event_fd(engine), &ignored) < 0) {
        return -1;
    }
    return vb_engine_poll(engine, &event, 1, false) == 1 ? 0 : -1;
}

/* How long it takes to ask when nothing comes. */
uint64_t no_message(void)
{
    struct vb_event event;
    uint64_t before = now;

    return vb_engine_poll(engine, &event, 1, true) == 0 ? now - before : UINT64_MAX;
}
