/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/quorum.c: several legs with the same data. Whatever changes data goes to all
 * legs in parallel; a read is voted on, or (fifo) answered by the first leg that can.
 * Its Python half is vhostblk/nodes/quorum.py; the rules are QEMU's (block/quorum.c), except
 * that discards reach the legs and flushes do so in parallel.
 *
 * The versions of a read are compared in memory of our own: the guest may write to its
 * buffers while the vote is taken, and must not make a leg look bad.
 */
#include "../engine.h"
#include "quorum.api.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Reports that Python has not taken yet, of all nodes; more than these are not made. */
#define REPORTS_MAX 256
#define PAGE 4096u /* versions start at one, for O_DIRECT */

struct quorum_node {
    struct vb_node node;
    struct vb_quorum_options options;
};

/* What the node does for one request, in that request's scratch. */
struct vote {
    struct vb_request *request;
    struct quorum_node *quorum;
    uint32_t pending;
    uint32_t leg;              /* fifo: the leg being asked */
    unsigned char *memory;     /* owned; what follows lies in it */
    size_t memory_size;
    struct vb_request **parts; /* one for each leg; owned */
    struct iovec *versions;    /* reads: what each leg gave */
};

_Static_assert(sizeof(struct vote) <= VB_SCRATCH_SIZE, "scratch too small");

static _Atomic uint32_t reports;

/* It may outlive its node. */
struct report {
    struct vb_message message;
    uint64_t cookie;
    uint32_t leg;
    int ret;
    uint8_t op;
    uint64_t offset, bytes;
};

/* ---- telling Python ------------------------------------------------------------------- */

static void fill_report(struct vb_message *message, void *context)
{
    struct report *report = vb_container_of(message, struct report, message);
    struct vb_event *event = context;

    *event = (struct vb_event){
        .kind = VB_EVENT_NODE,
        .ret = report->ret,
        .cookie = report->cookie,
        .request = report->leg,
        .offset = report->offset,
        .bytes = report->bytes,
        .op = report->op,
    };
    atomic_fetch_sub_explicit(&reports, 1, memory_order_relaxed);
    free(report);
}

/* A leg was bad, or (VB_QUORUM_ALL) the whole. Only errors come here: it may cost something. */
static void tell(const struct vote *vote, uint32_t leg, int ret)
{
    struct quorum_node *quorum = vote->quorum;
    struct report *report;

    if (atomic_fetch_add_explicit(&reports, 1, memory_order_relaxed) >= REPORTS_MAX ||
        !(report = malloc(sizeof(*report)))) {
        atomic_fetch_sub_explicit(&reports, 1, memory_order_relaxed);
        return;
    }
    *report = (struct report){
        .message.run = fill_report,
        .cookie = quorum->options.cookie,
        .leg = leg,
        .ret = ret,
        .op = vote->request->op,
        .offset = vote->request->offset,
        .bytes = vote->request->bytes,
    };
    vb_engine_post(quorum->node.engine, &report->message);
}

/* ---- parts: the request as each leg sees it ---------------------------------------------- */

static void part_done(struct vb_request *part);

static uint32_t legs_of(const struct vote *vote)
{
    return vote->quorum->options.legs;
}

static struct vb_request *new_part(struct vote *vote)
{
    struct vb_request *request = vote->request;
    struct vb_request *part = vb_request_new(request->thread);

    part->op = request->op;
    part->flags = request->flags;
    part->offset = request->offset;
    part->bytes = request->bytes;
    part->iov = request->iov;
    part->niov = request->niov;
    part->done = part_done;
    part->owner = vote;
    return part;
}

/* Memory for `stride` bytes per leg, then the iovecs of those, then the parts. */
static bool get_memory(struct vote *vote, size_t stride)
{
    size_t data = stride * legs_of(vote);
    size_t versions = stride ? legs_of(vote) * sizeof(*vote->versions) : 0;

    vote->memory_size = data + versions + legs_of(vote) * sizeof(*vote->parts);
    vote->memory = vb_buffer_get(vote->request->thread, vote->memory_size);
    if (!vote->memory) {
        return false;
    }
    vote->versions = (struct iovec *)(vote->memory + data);
    vote->parts = (struct vb_request **)(vote->memory + data + versions);
    for (uint32_t leg = 0; leg < legs_of(vote); leg++) {
        vote->parts[leg] = new_part(vote);
    }
    return true;
}

/* When the last has completed the vote is over and `vote` may be gone. */
static void submit_parts(struct vote *vote)
{
    struct vb_node **legs = vote->quorum->node.children;
    uint32_t count = legs_of(vote);

    vote->pending = count;
    for (uint32_t leg = 0; leg < count; leg++) {
        vb_submit(legs[leg], vote->parts[leg]);
    }
}

static void end_vote(struct vote *vote, int ret)
{
    struct vb_request *request = vote->request;

    for (uint32_t leg = 0; leg < legs_of(vote); leg++) {
        vb_request_free(vote->parts[leg]);
    }
    vb_buffer_put(request->thread, vote->memory, vote->memory_size);
    vb_complete(request, ret);
}

/* The errno that most legs gave. */
static int common_error(const struct vote *vote)
{
    uint32_t most = 0;
    int error = -EIO;

    for (uint32_t leg = 0; leg < legs_of(vote); leg++) {
        int ret = vote->parts[leg]->ret;
        uint32_t count = 0;

        for (uint32_t other = 0; other < legs_of(vote); other++) {
            count += vote->parts[other]->ret == ret;
        }
        if (ret < 0 && count > most) {
            most = count;
            error = ret;
        }
    }
    return error;
}

/* Reports the legs that failed; how many did not. */
static uint32_t count_successes(const struct vote *vote)
{
    uint32_t successes = 0;

    for (uint32_t leg = 0; leg < legs_of(vote); leg++) {
        if (vote->parts[leg]->ret < 0) {
            tell(vote, leg, vote->parts[leg]->ret);
        } else {
            successes++;
        }
    }
    return successes;
}

static void fail(struct vote *vote, int ret)
{
    tell(vote, VB_QUORUM_ALL, ret);
    end_vote(vote, ret);
}

/* ---- votes on what was read ---------------------------------------------------------------- */

static bool has_voted(const struct vote *vote, uint32_t leg)
{
    return vote->parts[leg]->ret >= 0;
}

static bool same(const struct vote *vote, uint32_t one, uint32_t other)
{
    return memcmp(vote->versions[one].iov_base, vote->versions[other].iov_base,
                  vote->request->bytes) == 0;
}

/* For each leg that voted the first one with the same version. */
static void group(const struct vote *vote, uint32_t first[VB_MAX_CHILDREN])
{
    for (uint32_t leg = 0; leg < legs_of(vote); leg++) {
        first[leg] = leg;
        for (uint32_t other = 0; has_voted(vote, leg) && other < leg; other++) {
            if (has_voted(vote, other) && first[other] == other && same(vote, other, leg)) {
                first[leg] = other;
                break;
            }
        }
    }
}

/* The version that most legs have, and how many they are. */
static uint32_t winner(const struct vote *vote, const uint32_t *first, uint32_t *votes)
{
    uint32_t best = 0;

    *votes = 0;
    for (uint32_t leg = 0; leg < legs_of(vote); leg++) {
        uint32_t count = 0;

        for (uint32_t other = 0; has_voted(vote, leg) && other < legs_of(vote); other++) {
            count += first[other] == leg;
        }
        if (count > *votes) {
            *votes = count;
            best = leg;
        }
    }
    return best;
}

static void give_to_guest(const struct vote *vote, uint32_t leg)
{
    const struct vb_request *request = vote->request;
    const unsigned char *from = vote->versions[leg].iov_base;

    vb_guest_write_begin();
    for (uint32_t i = 0; i < request->niov; i++) {
        memcpy(request->iov[i].iov_base, from, request->iov[i].iov_len);
        from += request->iov[i].iov_len;
    }
    vb_guest_write_end();
}

/* Whether a leg took it shows at the next read; the guest has its data. As QEMU. */
static void rewritten(struct vb_request *part)
{
    struct vote *vote = part->owner;

    if (--vote->pending == 0) {
        end_vote(vote, 0);
    }
}

/* The winner's version for the legs that had another one. */
static void rewrite(struct vote *vote, const bool *loser, uint32_t best)
{
    struct vb_node **legs = vote->quorum->node.children;

    vote->pending = 1; /* ours, so that the vote cannot end before the last is under way */
    for (uint32_t leg = 0; leg < legs_of(vote); leg++) {
        struct vb_request *part = vote->parts[leg];

        if (loser[leg]) {
            vote->pending++;
            part->op = VB_OP_WRITE;
            part->iov = &vote->versions[best];
            part->done = rewritten;
            vb_submit(legs[leg], part);
        }
    }
    rewritten(vote->parts[best]);
}

static void count_votes(struct vote *vote)
{
    const struct vb_quorum_options *options = &vote->quorum->options;
    uint32_t first[VB_MAX_CHILDREN], best, votes;
    bool loser[VB_MAX_CHILDREN] = {false}, any = false;

    if (count_successes(vote) < options->threshold) {
        fail(vote, common_error(vote));
        return;
    }
    group(vote, first);
    best = winner(vote, first, &votes);
    if (votes < options->threshold) {
        fail(vote, -EIO);
        return;
    }
    for (uint32_t leg = 0; leg < options->legs; leg++) {
        loser[leg] = has_voted(vote, leg) && first[leg] != best;
        if (loser[leg]) {
            tell(vote, leg, 0);
            any = true;
        }
    }
    give_to_guest(vote, best);
    if (any && options->rewrite_corrupted) {
        rewrite(vote, loser, best);
    } else {
        end_vote(vote, 0);
    }
}

static void start_read(struct vote *vote)
{
    size_t stride = (vote->request->bytes + PAGE - 1) & ~(size_t)(PAGE - 1);

    if (!get_memory(vote, stride)) {
        vb_complete(vote->request, -ENOMEM);
        return;
    }
    for (uint32_t leg = 0; leg < legs_of(vote); leg++) {
        vote->versions[leg] = (struct iovec){vote->memory + stride * leg, vote->request->bytes};
        vote->parts[leg]->iov = &vote->versions[leg];
        vote->parts[leg]->niov = 1;
    }
    submit_parts(vote);
}

static void start_change(struct vote *vote)
{
    if (get_memory(vote, 0)) {
        submit_parts(vote);
    } else {
        vb_complete(vote->request, -ENOMEM);
    }
}

/* ---- one leg after the other -------------------------------------------------------------------- */

static void fifo_done(struct vb_request *part)
{
    struct vote *vote = part->owner;
    int ret = part->ret;

    vb_request_free(part);
    if (ret < 0) {
        tell(vote, vote->leg, ret);
        if (++vote->leg < vote->quorum->options.legs) {
            part = new_part(vote);
            part->done = fifo_done;
            vb_submit(vote->quorum->node.children[vote->leg], part);
            return;
        }
        tell(vote, VB_QUORUM_ALL, ret);
    }
    vb_complete(vote->request, ret);
}

static void start_fifo(struct vote *vote)
{
    struct vb_request *part = new_part(vote);

    part->done = fifo_done;
    vb_submit(vote->quorum->node.children[0], part);
}

/* ---- the node ------------------------------------------------------------------------------------- */

static void part_done(struct vb_request *part)
{
    struct vote *vote = part->owner;

    if (--vote->pending > 0) {
        return;
    }
    if (vote->request->op == VB_OP_READ) {
        count_votes(vote);
    } else if (count_successes(vote) >= vote->quorum->options.threshold) {
        end_vote(vote, 0);
    } else {
        fail(vote, common_error(vote));
    }
}

static void quorum_submit(struct vb_node *node, struct vb_request *request)
{
    struct quorum_node *quorum = vb_container_of(node, struct quorum_node, node);
    struct vote *vote = (struct vote *)request->scratch;

    *vote = (struct vote){.request = request, .quorum = quorum};
    if (request->op != VB_OP_READ) {
        start_change(vote);
    } else if (quorum->options.fifo) {
        start_fifo(vote);
    } else {
        start_read(vote);
    }
}

static const struct vb_node_ops quorum_ops = {
    .name = "quorum",
    .submit = quorum_submit,
};

struct vb_node *vb_node_quorum_new(struct vb_engine *engine,
                                   const struct vb_quorum_options *options, char *error)
{
    struct quorum_node *quorum = vb_node_alloc(engine, &quorum_ops, sizeof(*quorum), error);

    if (!quorum) {
        return NULL;
    }
    quorum->options = *options;
    return &quorum->node;
}

void vb_node_quorum_set(struct vb_node *node, const struct vb_quorum_options *options)
{
    vb_container_of(node, struct quorum_node, node)->options = *options;
}
