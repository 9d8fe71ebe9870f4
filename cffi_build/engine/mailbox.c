/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * mailbox.c: how threads talk. A push is one compare-and-swap on the head of a
 * list; the receiver takes the whole list with one exchange and reverses it.
 * There is no ABA problem because nothing is ever popped singly.
 *
 * Sleeping. The receiver sets `asleep`, then looks at the list once more; a
 * sender pushes, then looks at `asleep`. Both are sequentially consistent, so at
 * least one of the two sees the other. The sender that clears `asleep` is the
 * only one that pays for the write to the event fd.
 */
#include "engine.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

int vb_mailbox_init(struct vb_mailbox *mailbox)
{
    atomic_init(&mailbox->head, NULL);
    atomic_init(&mailbox->asleep, false);
    mailbox->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return mailbox->event_fd < 0 ? -errno : 0;
}

void vb_mailbox_destroy(struct vb_mailbox *mailbox)
{
    close(mailbox->event_fd);
}

void vb_mailbox_wake(struct vb_mailbox *mailbox)
{
    if (atomic_load(&mailbox->asleep) && atomic_exchange(&mailbox->asleep, false)) {
        eventfd_write(mailbox->event_fd, 1);
    }
}

void vb_mailbox_push(struct vb_mailbox *mailbox, struct vb_message *message)
{
    struct vb_message *head = atomic_load_explicit(&mailbox->head, memory_order_relaxed);

    do {
        message->next = head;
    } while (!atomic_compare_exchange_weak_explicit(&mailbox->head, &head, message,
                                                    memory_order_seq_cst, memory_order_relaxed));

    vb_mailbox_wake(mailbox);
}

struct vb_message *vb_mailbox_take(struct vb_mailbox *mailbox)
{
    struct vb_message *newest, *oldest = NULL;

    if (!atomic_load_explicit(&mailbox->head, memory_order_relaxed)) {
        return NULL;
    }
    newest = atomic_exchange_explicit(&mailbox->head, NULL, memory_order_acquire);
    while (newest) {
        struct vb_message *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    return oldest;
}
