/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/quorum.c: several legs with the same data. Whatever changes data goes to all
 * legs in parallel; a read is voted on, or (fifo) answered by the first leg that can.
 * Its Python half is vhostblk/nodes/quorum/.
 *
 * Who takes part. Each leg has a state (quorum_leg.c). Those in sync vote and are counted; one
 * that is being rebuilt gets all changes as well; the others get nothing, and what they miss is
 * marked in their dirty map before the guest is told that the change is complete.
 *
 * A leg fails a change that enough others have done: it has missed something.
 *   1. Its dirty map and then its state say so, both in memory that outlives the process.
 *   2. The request goes up to Python, which brings both to the disk, and so does every other
 *      request that misses this leg meanwhile.
 *   3. Python says that it is recorded, and completes them.
 * Afterwards only the dirty map grows, and need not be on the disk: after a power cut nobody
 * believes it, since such a leg may have lost what was not flushed before it failed, too.
 *
 * Reads. Guests may write to their buffers at any time, so versions are compared in memory of
 * our own. Without a timeout the first version goes straight to the guest: nearly always the
 * others are found to be equal to it, and it is in its place. If they are not, perhaps because the
 * guest has written there, all legs are asked again, and nothing but the winner reaches the
 * guest. With a timeout, a leg that was given up could write to the guest's memory much later.
 * Nothing is copied at all while every leg has its data in memory: the first is asked, and before
 * it lets go of its data the second, and so on; the last finds all versions where they are.
 *
 * Writes. The data are copied once, and the legs get the copy: legs that write what the guest
 * is changing at the same time would differ ever after. Late legs live from that copy, too. Only if
 * there can be none, and it is a node like a cipher whose data they are (VB_REQ_STABLE), is there no copy.
 *
 * Discards. A leg makes of one what it likes: part of a cluster stays, or becomes zeroes, or noise. So
 * legs get zero writes that may unmap instead, which mean the same to all, of whole units of what each of them
 * can give back. What is not in a whole unit stays as it is, on all. If there is a leg for which
 * such a zero write would be a write like any other (options.discard_unit is 0), nothing is done at all.
 */
#include "quorum.h"
#include "quorum_compare.h"
#include "../upcall.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Reports that Python has not taken yet, of all nodes; more than these are not made. */
#define REPORTS_MAX 256
#define PAGE 4096u /* data start at one, for O_DIRECT */
#define PIECE 4096u /* bytes that are compared and handed on at once */

static _Atomic uint32_t reports;

/* It may outlive its node. */
struct report {
    struct vb_message message;
    uint64_t cookie;
    uint32_t what;
    int ret;
    uint8_t op;
    bool counted;
    uint64_t offset, bytes;
};

/* ---- telling Python -------------------------------------------------------------------------- */

static void fill_report(struct vb_message *message, void *context)
{
    struct report *report = vb_container_of(message, struct report, message);
    struct vb_event *event = context;

    *event = (struct vb_event){
        .kind = VB_EVENT_NODE,
        .ret = report->ret,
        .cookie = report->cookie,
        .request = report->what,
        .offset = report->offset,
        .bytes = report->bytes,
        .op = report->op,
    };
    if (report->counted) {
        atomic_fetch_sub_explicit(&reports, 1, memory_order_relaxed);
    }
    free(report);
}

static void post_report(const struct op *op, uint32_t what, int ret, bool counted)
{
    struct report *report = malloc(sizeof(*report));

    if (!report) {
        return; /* the states say all that matters */
    }
    *report = (struct report){
        .message.run = fill_report,
        .cookie = op->quorum->options.cookie,
        .what = what,
        .ret = ret,
        .op = op->op,
        .counted = counted,
        .offset = op->offset,
        .bytes = op->bytes,
    };
    vb_engine_post(op->quorum->node.engine, &report->message);
}

/* A leg was bad, or (VB_QUORUM_ALL) the whole. Only errors come here: it may cost something. */
static void tell(const struct op *op, uint32_t leg, int ret)
{
    if (atomic_fetch_add_explicit(&reports, 1, memory_order_relaxed) >= REPORTS_MAX) {
        atomic_fetch_sub_explicit(&reports, 1, memory_order_relaxed);
        return;
    }
    post_report(op, leg, ret, true);
}

/* A leg is out. One message for each time: these are never left out. */
static void retire(const struct op *op, uint32_t leg, int ret)
{
    if (leg_retire(op->quorum->legs[leg], op->op == VB_OP_FLUSH)) {
        post_report(op, VB_QUORUM_RETIRED | leg, ret, false);
    }
}

/* ---- requests and their parts ---------------------------------------------------------------- */

static uint32_t bit(uint32_t leg)
{
    return 1u << leg;
}

static uint32_t count(uint32_t legs)
{
    return (uint32_t)__builtin_popcount(legs);
}

static uint32_t lowest(uint32_t legs)
{
    return (uint32_t)__builtin_ctz(legs);
}

/* Whether `leg` or one behind it is among them. It may be the number behind the last possible. */
static bool any_from(uint32_t legs, uint32_t leg)
{
    return (uint64_t)legs >> leg;
}

static bool is_change(const struct op *op)
{
    return op->op != VB_OP_READ;
}

static size_t in_pages(size_t size)
{
    return (size + PAGE - 1) & ~(size_t)(PAGE - 1);
}

/* Memory for the request, and behind it `data` bytes that start at a page. */
static struct op *new_op(struct quorum_node *quorum, struct vb_request *request, size_t data,
                         unsigned char **memory)
{
    size_t head = sizeof(struct op) + quorum->options.legs * sizeof(struct part);
    size_t size = data ? in_pages(head) + data : head;
    struct op *op = vb_buffer_get(request->thread, size);

    if (!op) {
        return NULL;
    }
    memset(op, 0, head);
    op->request = request;
    op->quorum = quorum;
    op->here = quorum_thread(quorum, request->thread);
    op->thread = request->thread;
    op->offset = request->offset;
    op->bytes = request->bytes;
    op->size = size;
    op->op = request->op;
    op->flags = request->flags;
    op->late = -1;
    *memory = (unsigned char *)op + in_pages(head);
    return op;
}

/* The answer has been given, or will be by somebody else; goes with its last part. */
static void let_go(struct op *op)
{
    quorum_unwatch(op);
    quorum_end(op);
    if (op->under_way == 0) {
        vb_buffer_put(op->thread, op, op->size);
    }
}

static void part_done(struct vb_request *request);
static void change_answered(struct op *op);

static void submit_next(struct op *op)
{
    uint32_t leg = lowest(op->unsubmitted);
    struct part *part = &op->parts[leg];

    op->unsubmitted &= ~bit(leg);
    part->op = op;
    part->leg = leg;
    part->ret = 0;
    vb_submit(op->quorum->node.children[leg], part->request);
}

/* Which legs are asked is in op->asked. The last to answer may end the request: op may be gone. */
static void submit_parts(struct op *op)
{
    op->waiting = op->unsubmitted = op->asked;
    op->under_way += count(op->asked) + 1; /* and one for us */
    op->starting = true;
    while (op->unsubmitted) {
        submit_next(op);
    }
    op->starting = false;
    /* The node may be gone with the last answer. */
    if (op->waiting && !op->listed && op->quorum->options.timeout_ns) {
        quorum_watch(op);
    }
    if (op->waiting && op->request && is_change(op)) {
        change_answered(op); /* perhaps enough legs have it already */
    }
    if (--op->under_way == 0 && !op->request) {
        vb_buffer_put(op->thread, op, op->size);
    }
}

static void new_part(struct op *op, uint32_t leg, struct iovec *iov, uint32_t niov)
{
    struct vb_request *request = vb_request_new(op->thread);

    request->op = op->op;
    request->flags = op->flags;
    request->offset = op->offset;
    request->bytes = op->bytes;
    request->iov = iov;
    request->niov = niov;
    request->done = part_done;
    request->owner = &op->parts[leg];
    op->parts[leg].request = request;
}

/* The errno that most of the legs gave that failed. */
static int common_error(const struct op *op)
{
    uint32_t most = 0;
    int error = -EIO;

    for (uint32_t leg = 0; leg < op->quorum->options.legs; leg++) {
        int ret = op->parts[leg].ret;
        uint32_t same = 0;

        for (uint32_t other = 0; other < op->quorum->options.legs; other++) {
            same += (op->failed & bit(other)) && op->parts[other].ret == ret;
        }
        if ((op->failed & bit(leg)) && same > most) {
            most = same;
            error = ret;
        }
    }
    return error;
}

static void report_failures(const struct op *op)
{
    for (uint32_t leg = 0; any_from(op->failed, leg); leg++) {
        if (op->failed & bit(leg)) {
            tell(op, leg, op->parts[leg].ret);
        }
    }
}

static void complete(struct op *op, int ret)
{
    struct vb_request *request = op->request;

    op->request = NULL;
    let_go(op);
    vb_complete(request, ret);
}

static void go_up(struct op *op)
{
    struct vb_request *request = op->request;
    struct quorum_node *quorum = op->quorum;

    op->request = NULL;
    let_go(op);
    vb_upcall_post(&quorum->node, quorum->options.cookie, request);
}

static void fail(struct op *op, int ret)
{
    tell(op, VB_QUORUM_ALL, ret);
    complete(op, ret);
}

/* ---- changes --------------------------------------------------------------------------------- */

/* These legs do not have the change. */
static void mark_missed(struct op *op, uint32_t legs)
{
    for (uint32_t leg = 0; legs; leg++, legs >>= 1) {
        if ((legs & 1) && op->op != VB_OP_FLUSH) {
            leg_missed(op->quorum->legs[leg], op->offset, op->bytes);
        }
    }
}

static void retire_failed(struct op *op, uint32_t legs)
{
    mark_missed(op, legs);
    for (uint32_t leg = 0; legs; leg++, legs >>= 1) {
        if (legs & 1) {
            retire(op, leg, op->parts[leg].ret);
        }
    }
}

/* Whether everybody will know, whatever happens, that those legs do not have everything. */
static bool all_recorded(const struct op *op, uint32_t legs)
{
    for (uint32_t leg = 0; legs; leg++, legs >>= 1) {
        if ((legs & 1) && !atomic_load(&op->quorum->legs[leg]->recorded)) {
            return false;
        }
    }
    return true;
}

static void end_change(struct op *op)
{
    uint32_t done = op->voters & ~op->failed, others = op->failed & ~op->voters;

    report_failures(op);
    if (count(done) < op->quorum->options.threshold) {
        /* The guest knows that it has failed; who has it and who has not means nothing now. */
        retire_failed(op, others);
        if (op->op != VB_OP_FLUSH) {
            tell(op, VB_QUORUM_UNEVEN, 0);
        }
        fail(op, op->failed & op->voters ? common_error(op) : -EIO);
        return;
    }
    retire_failed(op, op->failed);
    if (all_recorded(op, op->failed | op->missed)) {
        complete(op, 0);
    } else {
        go_up(op);
    }
}

/* The guest has been told long ago. */
static void end_late(struct op *op)
{
    uint32_t failed = op->failed;

    report_failures(op);
    retire_failed(op, failed);
    quorum_late_arrived(op, ~0u);
    let_go(op);
}

/* Enough legs have the write; those that do not have it yet get it from our copy. */
static bool is_early(const struct op *op)
{
    const struct vb_quorum_options *options = &op->quorum->options;

    return options->write_threshold && !op->starting && op->op != VB_OP_FLUSH &&
           !(op->flags & VB_REQ_FUA) && op->failed == 0 &&
           count(op->voters & ~op->waiting) >= options->write_threshold &&
           all_recorded(op, op->missed);
}

static void change_answered(struct op *op)
{
    if (op->waiting) {
        if (op->request && is_early(op) && quorum_late_begin(op)) {
            struct vb_request *request = op->request;

            op->request = NULL;
            vb_complete(request, 0);
        }
        return;
    }
    if (op->request) {
        end_change(op);
    } else {
        end_late(op);
    }
}

/* ---- who is asked ---------------------------------------------------------------------------- */

static void choose_legs(struct op *op)
{
    struct quorum_node *quorum = op->quorum;

    for (uint32_t leg = 0; leg < quorum->options.legs; leg++) {
        switch (leg_state(quorum->legs[leg])) {
        case VB_LEG_IN_SYNC:
            op->voters |= bit(leg);
            op->asked |= bit(leg);
            break;
        case VB_LEG_REBUILDING:
            op->asked |= bit(leg);
            break;
        default:
            op->missed |= bit(leg);
        }
    }
}

static void copy_from_guest(const struct vb_request *request, unsigned char *to)
{
    for (uint32_t i = 0; i < request->niov; i++) {
        memcpy(to, request->iov[i].iov_base, request->iov[i].iov_len);
        to += request->iov[i].iov_len;
    }
}

/* Legs that answer late, or were given up, have to do without the request's own memory. */
static bool needs_copy(const struct quorum_node *quorum, const struct vb_request *request)
{
    return !(request->flags & VB_REQ_STABLE) || quorum->options.write_threshold ||
           quorum->options.timeout_ns;
}

/* With memory for a `copy` of the data, or NULL. */
static void change_legs(struct op *op, unsigned char *copy)
{
    const struct vb_request *request = op->request;

    quorum_begin(op);
    choose_legs(op);
    if (count(op->voters) < op->quorum->options.threshold) {
        fail(op, -EIO); /* before anybody has it */
        return;
    }
    mark_missed(op, op->missed);
    if (copy) {
        copy_from_guest(request, copy);
    }
    for (uint32_t leg = 0; any_from(op->asked, leg); leg++) {
        if (op->asked & bit(leg)) {
            op->parts[leg].iov = (struct iovec){copy, op->bytes};
            new_part(op, leg, copy ? &op->parts[leg].iov : request->iov,
                     copy ? 1 : request->niov);
        }
    }
    submit_parts(op);
}

static void start_change(struct quorum_node *quorum, struct vb_request *request)
{
    bool copy = request->op == VB_OP_WRITE && needs_copy(quorum, request);
    unsigned char *data;
    struct op *op = new_op(quorum, request, copy ? request->bytes : 0, &data);

    if (op) {
        change_legs(op, copy ? data : NULL);
    } else {
        vb_complete(request, -ENOMEM);
    }
}

static void start_discard(struct quorum_node *quorum, struct vb_request *request)
{
    uint64_t unit = quorum->options.discard_unit, end = request->offset + request->bytes, begin;
    unsigned char *data;
    struct op *op;

    begin = unit ? (request->offset + unit - 1) & ~(unit - 1) : end;
    end = end < quorum->options.size ? end & ~(unit - 1) : end;
    if (begin >= end) {
        vb_complete(request, 0);
        return;
    }
    op = new_op(quorum, request, 0, &data);
    if (!op) {
        vb_complete(request, -ENOMEM);
        return;
    }
    op->op = VB_OP_WRITE_ZEROES;
    op->flags = VB_REQ_MAY_UNMAP;
    op->offset = begin;
    op->bytes = end - begin;
    change_legs(op, NULL);
}

/* ---- votes on what was read ------------------------------------------------------------------ */

/* Walks the guest's buffers next to `memory`: compares, or copies to the guest. */
static bool same_as_guest(const struct vb_request *request, const unsigned char *memory)
{
    for (uint32_t i = 0; i < request->niov; i++) {
        if (memcmp(request->iov[i].iov_base, memory, request->iov[i].iov_len)) {
            return false;
        }
        memory += request->iov[i].iov_len;
    }
    return true;
}

static bool same(const struct op *op, uint32_t one, uint32_t other)
{
    return memcmp(op->parts[one].version, op->parts[other].version, op->bytes) == 0;
}

/* Those of `legs` with the same version as the first of them. */
static uint32_t like_first(const struct op *op, uint32_t legs)
{
    uint32_t first = lowest(legs), found = bit(first);

    for (uint32_t leg = first + 1; any_from(legs, leg); leg++) {
        if ((legs & bit(leg)) && same(op, first, leg)) {
            found |= bit(leg);
        }
    }
    return found;
}

static uint32_t largest_group(const struct op *op, uint32_t legs)
{
    uint32_t best = 0;

    while (legs) {
        uint32_t group = like_first(op, legs);

        best = count(group) > count(best) ? group : best;
        legs &= ~group;
    }
    return best;
}

static void start_read(struct quorum_node *quorum, struct vb_request *request, bool again);

/* The first version is in guest memory, and the guest may have changed it. */
static bool all_like_guest(const struct op *op, uint32_t legs)
{
    for (uint32_t leg = 0; any_from(legs, leg); leg++) {
        if ((legs & bit(leg)) && op->parts[leg].version &&
            !same_as_guest(op->request, op->parts[leg].version)) {
            return false;
        }
    }
    return true;
}

static void read_again(struct op *op)
{
    struct vb_request *request = op->request;
    struct quorum_node *quorum = op->quorum;

    op->request = NULL;
    let_go(op);
    start_read(quorum, request, true);
}

/* Every leg has its data in memory now. They go to the guest while they are compared. */
static bool compare_into_guest(const struct vb_request *request, const unsigned char **versions,
                               uint32_t count)
{
    bool equal = true;

    vb_guest_write_begin();
    for (uint32_t i = 0; equal && i < request->niov; i++) {
        size_t bytes = request->iov[i].iov_len;

        equal = quorum_compare(versions, count, bytes, request->iov[i].iov_base);
        for (uint32_t version = 0; version < count; version++) {
            versions[version] += bytes;
        }
    }
    vb_guest_write_end();
    return equal;
}

/*
 * Who takes the data a piece at a time gets each as soon as it has been compared, and the memory's
 * work on the next one goes on meanwhile.
 */
static bool compare_and_hand_on(struct vb_request *request, const unsigned char **versions,
                                uint32_t count)
{
    uint64_t piece = request->bytes;
    bool equal = true;

    if (request->take_unit && PIECE % request->take_unit == 0) {
        piece = PIECE;
    }
    for (uint64_t at = 0; equal && at < request->bytes; at += piece) {
        piece = request->bytes - at < piece ? request->bytes - at : piece;
        equal = quorum_compare(versions, count, piece, NULL);
        if (equal) {
            request->take(request, versions[0], at, piece);
        }
        for (uint32_t version = 0; version < count; version++) {
            versions[version] += piece;
        }
    }
    return equal;
}

/* If they differ the vote shall say what that means. */
static void compare_in_place(struct op *op)
{
    const unsigned char *versions[VB_MAX_CHILDREN];
    uint32_t found = 0;

    for (uint32_t leg = 0; any_from(op->asked, leg); leg++) {
        if (op->asked & bit(leg)) {
            versions[found++] = op->parts[leg].data;
        }
    }
    op->agreed = op->request->take ? compare_and_hand_on(op->request, versions, found)
                                   : compare_into_guest(op->request, versions, found);
}

static void leg_taken(struct vb_request *request, const void *data, uint64_t position,
                      uint64_t bytes)
{
    struct part *part = request->owner;
    struct op *op = part->op;

    (void)position, (void)bytes; /* all of it: there is no unit */
    part->data = data;
    op->in_hand |= bit(part->leg);
    if (op->unsubmitted) {
        submit_next(op);
    } else if (op->in_hand == op->asked) {
        compare_in_place(op);
    }
    op->in_hand &= ~bit(part->leg);
    if (!op->agreed) {
        vb_request_fill(request, data);
    }
}

static void end_agreed(struct op *op)
{
    if (op->worthless) {
        read_again(op);
    } else {
        op->request->taken = op->request->take;
        complete(op, 0);
    }
}

static void count_votes(struct op *op)
{
    uint32_t legs = op->asked & ~op->failed, group;

    if (op->agreed) {
        end_agreed(op);
        return;
    }
    if (op->direct && (count(legs) < count(op->asked) || !all_like_guest(op, legs))) {
        read_again(op);
        return;
    }
    report_failures(op);
    if (count(legs) < op->quorum->options.threshold) {
        if (op->missed) {
            go_up(op); /* once they are not late any more, those can answer */
        } else {
            fail(op, common_error(op));
        }
        return;
    }
    if (op->direct) {
        complete(op, 0);
        return;
    }
    group = largest_group(op, legs);
    if (count(group) < op->quorum->options.threshold) {
        go_up(op); /* no majority: Python looks at it while nobody writes there */
        return;
    }
    for (uint32_t leg = 0; any_from(legs, leg); leg++) {
        if (legs & ~group & bit(leg)) {
            tell(op, leg, 0);
        }
    }
    vb_request_fill(op->request, op->parts[lowest(group)].version);
    complete(op, 0);
}

/* Whether enough legs have all that was written there. If some are late, it begins anew later. */
static bool choose_readers(struct op *op)
{
    struct quorum_node *quorum = op->quorum;
    struct vb_request *request = op->request;
    /* Before the states: a leg that fails to take a late write is out before it is not late. */
    uint32_t late = quorum_late_legs(quorum, op->offset, op->bytes);

    choose_legs(op);
    op->missed = op->voters & late;
    op->voters &= ~late;
    if (!op->missed || count(op->voters) >= quorum->options.threshold) {
        return true;
    }
    op->request = NULL;
    let_go(op);
    quorum_submit(&quorum->node, request); /* which holds it as long as they are */
    return false;
}

static void start_read(struct quorum_node *quorum, struct vb_request *request, bool again)
{
    bool direct = !again && quorum->options.timeout_ns == 0;
    size_t stride = in_pages(request->bytes);
    uint32_t legs = quorum->options.legs;
    unsigned char *memory;
    struct op *op = new_op(quorum, request, stride * (direct ? legs - 1 : legs), &memory);

    if (!op) {
        vb_complete(request, -ENOMEM);
        return;
    }
    if (!choose_readers(op)) {
        return;
    }
    op->asked = op->voters;
    if (count(op->voters) < quorum->options.threshold) {
        fail(op, -EIO);
        return;
    }
    op->direct = direct;
    for (uint32_t leg = 0; any_from(op->asked, leg); leg++) {
        struct part *part = &op->parts[leg];

        if (!(op->asked & bit(leg))) {
            continue;
        }
        if (direct) {
            direct = false;
            new_part(op, leg, request->iov, request->niov);
        } else {
            part->version = memory;
            memory += stride;
            part->iov = (struct iovec){part->version, op->bytes};
            new_part(op, leg, &part->iov, 1);
        }
        part->request->take = again ? NULL : leg_taken;
    }
    submit_parts(op);
}

/* ---- one leg after the other ----------------------------------------------------------------- */

/* The next of op->voters that has not been asked yet. */
static void ask_next(struct op *op)
{
    uint32_t left = op->voters & ~op->asked, leg;

    if (!left) {
        fail(op, common_error(op));
        return;
    }
    leg = lowest(left);
    if (op->parts[leg].version) {
        op->parts[leg].iov = (struct iovec){op->parts[leg].version, op->bytes};
        new_part(op, leg, &op->parts[leg].iov, 1);
    } else {
        new_part(op, leg, op->request->iov, op->request->niov);
    }
    quorum_unwatch(op);
    op->asked = bit(leg);
    submit_parts(op);
}

static void fifo_answered(struct op *op)
{
    uint32_t leg = lowest(op->asked);

    op->voters &= ~op->asked;
    if (op->failed & bit(leg)) {
        tell(op, leg, op->parts[leg].ret);
        ask_next(op);
        return;
    }
    if (op->parts[leg].version) {
        vb_request_fill(op->request, op->parts[leg].version);
    }
    complete(op, 0);
}

static void start_fifo(struct quorum_node *quorum, struct vb_request *request)
{
    /* With a timeout each leg needs memory of its own: one that was given up still writes to it. */
    size_t stride = quorum->options.timeout_ns ? in_pages(request->bytes) : 0;
    unsigned char *memory;
    struct op *op = new_op(quorum, request, stride * quorum->options.legs, &memory);

    if (!op) {
        vb_complete(request, -ENOMEM);
        return;
    }
    if (!choose_readers(op)) {
        return;
    }
    op->asked = 0;
    for (uint32_t leg = 0; stride && leg < quorum->options.legs; leg++) {
        op->parts[leg].version = memory + stride * leg;
    }
    ask_next(op);
}

/* ---- what legs answer ------------------------------------------------------------------------ */

static void answered(struct op *op, uint32_t leg, int ret)
{
    op->waiting &= ~bit(leg);
    op->parts[leg].ret = ret;
    if (ret < 0) {
        op->failed |= bit(leg);
    }
    if (is_change(op)) {
        change_answered(op);
    } else if (op->waiting) {
        return;
    } else if (op->quorum->options.fifo) {
        fifo_answered(op);
    } else {
        count_votes(op);
    }
}

/* A leg that was given up answers after all. The node may be gone. */
static void stray_done(struct part *part)
{
    struct op *op = part->op;

    leg_put(part->stray_leg);
    if (op->under_way == 0 && !op->request && !op->listed) {
        vb_buffer_put(op->thread, op, op->size);
    }
}

static void part_done(struct vb_request *request)
{
    struct part *part = request->owner;
    struct op *op = part->op;
    int ret = request->ret;

    op->worthless |= part->data && !request->taken;
    part->request = NULL;
    vb_request_free(request);
    op->under_way--;
    if (part->stray) {
        stray_done(part);
    } else {
        answered(op, part->leg, ret);
    }
}

/*
 * Whatever it was: the leg is out, since this request may still get to it, and what comes later
 * must not be overwritten by it. Nothing is copied to it before all strays have come back.
 */
void op_give_up(struct op *op, uint32_t leg)
{
    struct part *part = &op->parts[leg];

    part->stray = true;
    part->stray_leg = op->quorum->legs[leg];
    leg_get(part->stray_leg);
    part->ret = -ETIMEDOUT;
    if (is_change(op)) {
        mark_missed(op, bit(leg));
    }
    retire(op, leg, -ETIMEDOUT);
    answered(op, leg, -ETIMEDOUT);
}

/* ---- the node -------------------------------------------------------------------------------- */

void quorum_submit(struct vb_node *node, struct vb_request *request)
{
    struct quorum_node *quorum = vb_container_of(node, struct quorum_node, node);

    if (atomic_load_explicit(&quorum->obstacles, memory_order_acquire) > 0 &&
        quorum_hold(quorum, request)) {
        return;
    }
    if (request->op == VB_OP_DISCARD) {
        start_discard(quorum, request);
    } else if (request->op != VB_OP_READ) {
        start_change(quorum, request);
    } else if (quorum->options.fifo) {
        start_fifo(quorum, request);
    } else {
        start_read(quorum, request, false);
    }
}

static void quorum_destroy(struct vb_node *node)
{
    quorum_threads_free(vb_container_of(node, struct quorum_node, node));
}

static const struct vb_node_ops quorum_ops = {
    .name = "quorum",
    .submit = quorum_submit,
    .destroy = quorum_destroy,
};

void vb_node_quorum_set(struct vb_node *node, const struct vb_quorum_options *options,
                        struct vb_quorum_leg *const *legs)
{
    struct quorum_node *quorum = vb_container_of(node, struct quorum_node, node);

    quorum->options = *options;
    for (uint32_t leg = 0; leg < options->legs; leg++) {
        quorum->legs[leg] = legs[leg];
    }
}

struct vb_node *vb_node_quorum_new(struct vb_engine *engine,
                                   const struct vb_quorum_options *options,
                                   struct vb_quorum_leg *const *legs, char *error)
{
    struct quorum_node *quorum = vb_node_alloc(engine, &quorum_ops, sizeof(*quorum), error);

    if (!quorum) {
        return NULL;
    }
    vb_node_quorum_set(&quorum->node, options, legs);
    return &quorum->node;
}
