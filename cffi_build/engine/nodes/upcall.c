/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/upcall.c: hands requests to a filter in Python. Operations that the
 * filter has no hook for go straight to child 0 and never leave C.
 *
 * A request that goes up is a message in its own scratch: first to the control
 * mailbox, where it fills a VB_EVENT_UPCALL, then, when Python has decided, back
 * to the request's I/O thread to complete or to go on to a child. Python may also
 * start requests of its own there (struct own_request), whose completion is a
 * VB_EVENT_DONE.
 */
#include "../upcall.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

struct upcall_node {
    struct vb_node node;
    uint32_t op_mask;
    uint64_t cookie;
};

#define OWN_IOV 4

/* A request that Python started. Control makes and frees it; the tree has it in between. */
struct own_request {
    struct vb_request request;
    struct vb_message message;
    struct vb_node *node;
    uint64_t cookie;
    struct iovec inline_iov[OWN_IOV];
    struct own_request *next_free;
};

/* ---- guest requests, up and down ---------------------------------------------- */

static void fill_upcall(struct vb_message *message, void *context)
{
    struct vb_upcall *up = vb_container_of(message, struct vb_upcall, message);
    struct vb_event *event = context;
    struct vb_request *request = up->request;

    event->kind = VB_EVENT_UPCALL;
    event->ret = 0;
    event->cookie = up->cookie;
    event->request = (uintptr_t)request;
    event->offset = request->offset;
    event->bytes = request->bytes;
    event->iov = (uintptr_t)request->iov;
    event->niov = request->niov;
    event->op = request->op;
    event->flags = request->flags;
}

void vb_upcall_post(struct vb_node *node, uint64_t cookie, struct vb_request *request)
{
    struct vb_upcall *up = (struct vb_upcall *)request->scratch;

    up->request = request;
    up->node = node;
    up->cookie = cookie;
    up->message.run = fill_upcall;
    vb_engine_post(node->engine, &up->message);
}

static void upcall_submit(struct vb_node *node, struct vb_request *request)
{
    struct upcall_node *upcall = vb_container_of(node, struct upcall_node, node);

    if (upcall->op_mask & (1u << request->op)) {
        vb_upcall_post(node, upcall->cookie, request);
    } else {
        vb_submit(node->children[0], request);
    }
}

static void run_complete(struct vb_message *message, void *context)
{
    struct vb_upcall *up = vb_container_of(message, struct vb_upcall, message);

    (void)context;
    vb_complete(up->request, up->ret);
}

static void run_forward(struct vb_message *message, void *context)
{
    struct vb_upcall *up = vb_container_of(message, struct vb_upcall, message);

    (void)context;
    vb_submit(up->node->children[up->child], up->request);
}

/* Not through vb_submit(): the node has been counted as one on the way. */
static void run_retry(struct vb_message *message, void *context)
{
    struct vb_upcall *up = vb_container_of(message, struct vb_upcall, message);

    (void)context;
    up->node->ops->submit(up->node, up->request);
}

/* ---- requests of Python's own -------------------------------------------------- */

/* Only the control thread takes from and gives to this list. */
static struct own_request *free_own_requests;

static void fill_done(struct vb_message *message, void *context)
{
    struct own_request *own = vb_container_of(message, struct own_request, message);
    struct vb_event *event = context;

    *event = (struct vb_event){
        .kind = VB_EVENT_DONE,
        .ret = own->request.ret,
        .cookie = own->cookie,
    };
    if (own->request.iov != own->inline_iov) {
        free(own->request.iov);
    }
    own->next_free = free_own_requests;
    free_own_requests = own;
}

static void own_done(struct vb_request *request)
{
    struct own_request *own = vb_container_of(request, struct own_request, request);

    own->message.run = fill_done;
    vb_engine_post(request->thread->engine, &own->message);
}

static void run_own(struct vb_message *message, void *context)
{
    struct own_request *own = vb_container_of(message, struct own_request, message);

    own->request.thread = context;
    own->request.start_ns = own->request.thread->now_ns;
    vb_submit(own->node, &own->request);
}

/* The part of `iov` that covers bytes [skip, skip + bytes), into own->request. */
static void slice_iov(struct own_request *own, const struct iovec *iov, uint32_t niov,
                      uint64_t skip, uint64_t bytes)
{
    struct iovec *to = own->inline_iov;
    uint32_t used = 0;

    if (niov > OWN_IOV) {
        to = vb_must_alloc(niov * sizeof(*to));
    }
    for (uint32_t i = 0; i < niov && bytes > 0; i++) {
        uint64_t length = iov[i].iov_len;

        if (skip >= length) {
            skip -= length;
            continue;
        }
        length -= skip;
        length = length < bytes ? length : bytes;
        to[used++] = (struct iovec){(char *)iov[i].iov_base + skip, length};
        bytes -= length;
        skip = 0;
    }
    own->request.iov = to;
    own->request.niov = used;
}

static struct own_request *new_own_request(const struct vb_command *command)
{
    struct own_request *own = free_own_requests;
    struct vb_request *request;

    if (own) {
        free_own_requests = own->next_free;
    } else {
        own = vb_must_alloc(sizeof(*own));
    }
    request = &own->request;
    own->node = (struct vb_node *)(uintptr_t)command->node;
    own->cookie = command->cookie;
    own->message.run = run_own;
    request->op = (uint8_t)command->op;
    request->flags = command->flags;
    request->depth = 0;
    request->offset = command->offset;
    request->bytes = command->bytes;
    request->take = NULL;
    request->done = own_done;
    request->iov = own->inline_iov;
    request->niov = 0;
    return own;
}

static void start_own(const struct vb_command *command, const struct vb_request *parent)
{
    struct own_request *own = new_own_request(command);
    struct vb_iothread *thread =
        parent ? parent->thread : (struct vb_iothread *)(uintptr_t)command->thread;

    if (command->buffer) {
        struct iovec whole = {(void *)(uintptr_t)command->buffer,
                              command->buffer_offset + command->bytes};
        slice_iov(own, &whole, 1, command->buffer_offset, command->bytes);
    } else if (parent && command->op <= VB_OP_WRITE) {
        slice_iov(own, parent->iov, parent->niov, command->buffer_offset, command->bytes);
    }
    vb_iothread_send(thread, &own->message);
}

static void run_command(const struct vb_command *command)
{
    struct vb_request *request = (struct vb_request *)(uintptr_t)command->request;
    struct vb_upcall *up = request ? (struct vb_upcall *)request->scratch : NULL;

    switch (command->kind) {
    case VB_COMMAND_COMPLETE:
        up->ret = command->ret;
        up->message.run = run_complete;
        vb_iothread_send(request->thread, &up->message);
        break;
    case VB_COMMAND_FORWARD:
        up->child = command->child;
        up->message.run = run_forward;
        vb_iothread_send(request->thread, &up->message);
        break;
    case VB_COMMAND_RETRY:
        up->message.run = run_retry;
        vb_iothread_send(request->thread, &up->message);
        break;
    case VB_COMMAND_SUBMIT:
        start_own(command, request);
        break;
    }
}

void vb_engine_submit(struct vb_engine *engine, const struct vb_command *commands, int count)
{
    (void)engine;
    for (int i = 0; i < count; i++) {
        run_command(&commands[i]);
    }
}

static const struct vb_node_ops upcall_ops = {
    .name = "upcall",
    .submit = upcall_submit,
};

struct vb_node *vb_node_upcall_new(struct vb_engine *engine, uint32_t op_mask, uint64_t cookie,
                                   char *error)
{
    struct upcall_node *upcall = vb_node_alloc(engine, &upcall_ops, sizeof(*upcall), error);

    if (!upcall) {
        return NULL;
    }
    upcall->op_mask = op_mask;
    upcall->cookie = cookie;
    return &upcall->node;
}
