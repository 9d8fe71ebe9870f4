/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/map.c: requests to a disk whose data lie wherever a map of units says. The map is
 * in map_table.c, how units get a place in map_place.c and from which runs in map_runs.c, its waiting in
 * map_thread.c; map.api.h explains the entries. Drivers in Python (qcow2, qed) fill the map and do
 * what it has no answer for.
 *
 * A request is cut into extents: as many units in a row as one request to a child can do.
 * If any of its units needs Python, all of it goes up before anything has been started, as far as
 * one look can tell; if that was too optimistic it is begun again from the start, which a
 * read or a write may.
 *
 * Allocation in C. The entry is made pending, so that nobody else allocates the same unit; then it
 * gets a place. What comes next depends on what was there before:
 *  - ZERO, where units are clusters: the new entry is published at once. The cluster reads as
 *    zeroes, so whoever looks at the parts that this request does not write sees what was there
 *    before. Whether the data have arrived when the entry gets to the disk makes no difference
 *    either: zeroes were there, and this request has not been flushed.
 *  - BACKING, and ZERO of a part of a cluster, in whose place anything may be: the entry stays pending
 *    until the data are there, and the record is made then: had the entry got to the disk before, a
 *    crash would leave what was in that place instead of what the guest had.
 *    A request that does not cover all of the unit has the rest read from the backing file first
 *    (or zeroes put around it), and the whole written in one piece (struct copy).
 */
#include "map_table.h"

#include <errno.h>
#include <string.h>

#define GROUPS_MAX 4
#define DATA_AT 4096u /* in a copy's memory: aligned for O_DIRECT */

/* Adjacent units that are being written, and not to be seen before that is done. */
struct group {
    uint64_t unit, count, host;
    uint64_t type;         /* what they were: VB_MAP_BACKING or _ZERO */
};

/* A request under way, in its scratch. */
struct map_op {
    struct vb_request *request;
    struct map_node *map;
    struct map_thread *here;
    uint32_t epoch;
    uint32_t pending;      /* parts under way, and 1 while more are being started */
    int ret;
    bool again;            /* the map has changed under our feet: start anew */
    bool up;               /* there is no cluster, or no room in the log: Python has to see to it */
    uint8_t groups_count;
    struct group groups[GROUPS_MAX];
    struct iovec *slices;  /* owned; memory for the parts' iovecs */
    size_t slices_size;
    uint32_t slices_used;
};

_Static_assert(sizeof(struct map_op) <= VB_SCRATCH_SIZE, "scratch too small");

/* Where in the request's iovec we are. */
struct cursor {
    const struct iovec *iov;
    size_t skip;
};

/* What can be done with some units in a row. */
#define COPY (VB_MAP_TYPE + 1) /* a copy of the unit is under way already */
struct extent {
    uint64_t type;  /* VB_MAP_DATA, _ZERO, _BACKING, COPY */
    uint64_t host;  /* DATA */
    uint64_t bytes;
};

/* A unit that gets the guest's data on top of what it shows. The first bytes of its memory. */
struct copy {
    struct map_op *op;
    struct group group;
    uint64_t position;     /* of the guest's data in the request */
    uint64_t begin, bytes; /* of the guest's data in the unit */
    uint64_t there;        /* what the backing file has of the unit */
    size_t memory_size;
    struct iovec iov;
    unsigned char *data;   /* a whole unit */
};

static uint64_t unit_size(const struct map_node *map)
{
    return 1ull << map->options.unit_bits;
}

static uint64_t load(struct map_node *map, uint64_t unit)
{
    _Atomic uint64_t *entry = map_entry(map, unit);

    /* Acquire: what is at the host offset was put there before. */
    return entry ? atomic_load_explicit(entry, memory_order_acquire) : VB_MAP_MISS;
}

/* ---- the first look: who can do this? ----------------------------------------------------- */

enum verdict { HERE, PYTHON, WAIT };

/* Bytes of the unit at `offset`, up to `end`. */
static uint64_t rest_of_unit(const struct map_node *map, uint64_t offset, uint64_t end)
{
    uint64_t rest = unit_size(map) - (offset & (unit_size(map) - 1));

    return rest < end - offset ? rest : end - offset;
}

/* The last unit may be shorter than the others. */
static bool covers_unit(const struct map_node *map, uint64_t offset, uint64_t bytes)
{
    return (offset & (unit_size(map) - 1)) == 0 &&
           (bytes == unit_size(map) || offset + bytes >= map->options.size);
}

/*
 * Whether nothing of what the unit showed is needed. A place that is not new may have anything behind
 * the end of the disk, which is not to be seen when that grows.
 */
static bool replaces_unit(const struct map_node *map, uint64_t offset, uint64_t bytes)
{
    return covers_unit(map, offset, bytes) &&
           (bytes == unit_size(map) || !map_has_subclusters(map));
}

/* Whether a new place may be seen before anything has been written to it. */
static bool is_seen_at_once(const struct map_node *map, uint64_t type)
{
    return type == VB_MAP_ZERO && !map_has_subclusters(map);
}

static enum verdict look(struct map_node *map, const struct vb_request *request, uint64_t *unit,
                         bool *in_place)
{
    uint64_t offset = request->offset, end = request->offset + request->bytes;

    *in_place = true;
    while (offset < end) {
        uint64_t bytes = rest_of_unit(map, offset, end);
        uint64_t entry, here, wait;

        *unit = here = wait = offset >> map->options.unit_bits;
        entry = load(map, *unit);
        if ((entry & VB_MAP_TYPE) == VB_MAP_PENDING) {
            return WAIT;
        }
        if ((entry & VB_MAP_TYPE) == VB_MAP_MISS) {
            return PYTHON;
        }
        if (request->op == VB_OP_WRITE && !map_can_write(map, here, entry, &wait)) {
            *unit = wait;
            return wait == here ? PYTHON : WAIT;
        }
        *in_place &= (entry & VB_MAP_TYPE) == VB_MAP_DATA;
        offset += bytes;
    }
    return HERE;
}

/* ---- the end ---------------------------------------------------------------------------------- */

/* What came of units that are still pending. */
static void end_group(struct map_op *op, const struct group *group, int ret)
{
    struct map_node *map = op->map;
    uint64_t done = ret < 0 ? 0 : map_publish(map, group->unit, group->count, group->host);

    if (done < group->count) {
        op->up = true; /* if it has not failed, the log is full */
        map_unplace(map, group->unit + done, group->count - done,
                    group->host + (done << map->options.unit_bits), group->type);
    }
}

static void end_op(struct map_op *op)
{
    struct vb_request *request = op->request;
    struct map_node *map = op->map;
    struct map_thread *here = op->here;
    uint32_t epoch = op->epoch;
    bool again, up;
    int ret;

    for (unsigned i = 0; i < op->groups_count; i++) {
        end_group(op, &op->groups[i], op->ret);
    }
    ret = op->ret;
    again = op->again;
    up = op->up;
    if (op->slices) {
        vb_buffer_put(request->thread, op->slices, op->slices_size);
    }
    if (ret == 0 && up) {
        vb_upcall_post(&map->node, map->options.cookie, request);
    } else if (ret == 0 && again) {
        map->node.ops->submit(&map->node, request);
    } else {
        vb_complete(request, ret);
    }
    vb_epochs_end(&here->epochs, epoch); /* whoever is given grace finds the request complete */
}

static void part_ended(struct map_op *op, int ret)
{
    if (ret < 0 && op->ret == 0) {
        op->ret = ret;
    }
    if (--op->pending == 0) {
        end_op(op);
    }
}

static void take_whole(struct vb_request *part, const void *data, uint64_t position,
                       uint64_t bytes)
{
    struct map_op *op = part->owner;

    op->request->take(op->request, data, position, bytes);
}

static void part_done(struct vb_request *part)
{
    struct map_op *op = part->owner;
    int ret = part->ret;

    if (part->taken) {
        op->request->taken = true;
    }

    vb_request_free(part);
    part_ended(op, ret);
}

/* ---- parts -------------------------------------------------------------------------------------- */

static void zero_fill(struct cursor *cursor, uint64_t bytes)
{
    while (bytes > 0) {
        size_t here = cursor->iov->iov_len - cursor->skip;
        size_t n = here < bytes ? here : bytes;

        vb_guest_write_begin();
        memset((char *)cursor->iov->iov_base + cursor->skip, 0, n);
        vb_guest_write_end();
        bytes -= n;
        cursor->skip += n;
        if (cursor->skip == cursor->iov->iov_len) {
            cursor->iov++;
            cursor->skip = 0;
        }
    }
}

static void skip(struct cursor *cursor, uint64_t bytes)
{
    while (bytes > 0) {
        size_t here = cursor->iov->iov_len - cursor->skip;
        size_t n = here < bytes ? here : bytes;

        bytes -= n;
        cursor->skip += n;
        if (cursor->skip == cursor->iov->iov_len) {
            cursor->iov++;
            cursor->skip = 0;
        }
    }
}

/* Enough for all parts: each boundary between two of them cuts one entry in two. */
static bool get_slices(struct map_op *op)
{
    const struct vb_request *request = op->request;
    uint64_t units = (request->bytes >> op->map->options.unit_bits) + 3;

    if (!op->slices) {
        op->slices_size = (request->niov + units) * sizeof(*op->slices);
        op->slices = vb_buffer_get(request->thread, op->slices_size);
    }
    return op->slices != NULL;
}

/* The next `bytes` as an iovec of the part's. */
static void cut(struct map_op *op, struct cursor *cursor, uint64_t bytes, struct vb_request *part)
{
    part->iov = op->slices + op->slices_used;
    part->niov = 0;
    while (bytes > 0) {
        size_t here = cursor->iov->iov_len - cursor->skip;
        size_t n = here < bytes ? here : bytes;

        part->iov[part->niov++] =
            (struct iovec){(char *)cursor->iov->iov_base + cursor->skip, n};
        bytes -= n;
        cursor->skip += n;
        if (cursor->skip == cursor->iov->iov_len) {
            cursor->iov++;
            cursor->skip = 0;
        }
    }
    op->slices_used += part->niov;
}

static void start_part(struct map_op *op, struct cursor *cursor, unsigned child, uint64_t offset,
                       uint64_t bytes)
{
    struct vb_request *request = op->request;
    struct vb_request *part;

    if (bytes != request->bytes && !get_slices(op)) {
        op->ret = op->ret ? op->ret : -ENOMEM;
        return;
    }
    part = vb_request_new(request->thread);
    part->op = request->op;
    part->flags = request->flags & ~VB_REQ_LITERAL; /* which was said to this node */
    part->offset = offset;
    part->bytes = bytes;
    part->done = part_done;
    part->owner = op;
    if (bytes == request->bytes) {
        part->iov = request->iov;
        part->niov = request->niov;
        part->take = request->take ? take_whole : NULL;
        part->take_unit = request->take_unit;
    } else {
        cut(op, cursor, bytes, part);
    }
    op->pending++;
    vb_submit(op->map->node.children[child], part);
}

/* ---- allocation ------------------------------------------------------------------------------------ */

/* New clusters, which read as zeroes: they are seen from here on. */
static void publish_at_once(struct map_op *op, const struct group *group)
{
    uint64_t done = map_publish(op->map, group->unit, group->count, group->host);

    if (done < group->count) {
        op->up = true; /* nothing has been lost but the clusters */
        map_unclaim(op->map, group->unit + done, group->count - done, group->type);
    }
}

/* Units that are seen when the request has ended; with those before them, if they are adjacent. */
static void add_group(struct map_op *op, const struct group *group)
{
    struct group *last = op->groups_count > 0 ? &op->groups[op->groups_count - 1] : NULL;
    unsigned bits = op->map->options.unit_bits;

    if (last && last->type == group->type && last->unit + last->count == group->unit &&
        last->host + (last->count << bits) == group->host) {
        last->count += group->count;
    } else {
        op->groups[op->groups_count++] = *group;
    }
}

/* ---- copies ------------------------------------------------------------------------------------------ */

static void end_copy(struct copy *copy, int ret)
{
    struct map_op *op = copy->op;

    end_group(op, &copy->group, ret);
    vb_buffer_put(op->request->thread, copy, copy->memory_size);
    part_ended(op, ret);
}

static void copy_written(struct vb_request *part)
{
    struct copy *copy = part->owner;
    int ret = part->ret;

    vb_request_free(part);
    end_copy(copy, ret);
}

static struct vb_request *copy_part(struct copy *copy, uint8_t op, uint64_t offset, uint64_t bytes,
                                    void (*done)(struct vb_request *part))
{
    struct vb_request *part = vb_request_new(copy->op->request->thread);

    copy->iov = (struct iovec){copy->data, bytes};
    part->op = op;
    part->offset = offset;
    part->bytes = bytes;
    part->iov = &copy->iov;
    part->niov = 1;
    part->done = done;
    part->owner = copy;
    return part;
}

static void write_copy(struct copy *copy)
{
    struct map_op *op = copy->op;
    uint64_t size = unit_size(op->map);

    memset(copy->data + copy->there, 0, size - copy->there);
    vb_request_get(op->request, copy->position, copy->data + copy->begin, copy->bytes);
    vb_submit(op->map->node.children[0], copy_part(copy, VB_OP_WRITE, copy->group.host, size, copy_written));
}

static void copy_read(struct vb_request *part)
{
    struct copy *copy = part->owner;
    int ret = part->ret;

    vb_request_free(part);
    if (ret < 0) {
        end_copy(copy, ret);
    } else {
        write_copy(copy);
    }
}

/* What the backing file has of a unit, and of the disk. */
static uint64_t backing_has(const struct map_node *map, uint64_t start)
{
    uint64_t end = map->options.backing_size;

    end = end < map->options.size ? end : map->options.size;
    if (start >= end) {
        return 0;
    }
    return end - start < unit_size(map) ? end - start : unit_size(map);
}

/* How many records a group of units may need. */
static uint64_t records_of(const struct map_node *map, uint64_t units)
{
    return map_has_subclusters(map) ? 2 : units; /* their cluster's place, and they together */
}

/* Units from `unit` on that are claimed get a place; those that do not are released. */
static bool place_group(struct map_op *op, uint64_t unit, uint64_t claimed, uint64_t type,
                        struct group *group)
{
    enum map_placing placing;

    *group = (struct group){.unit = unit, .count = claimed, .type = type};
    placing = map_place(op->map, unit, &group->count, &group->host);
    map_unclaim(op->map, unit + group->count, claimed - group->count, type);
    op->up |= placing == MAP_PYTHON;
    return placing == MAP_PLACED;
}

/* The guest writes `bytes` at `offset`, a part of a unit that has no place and shows something. */
static bool start_copy(struct map_op *op, uint64_t offset, uint64_t bytes, uint64_t type)
{
    struct map_node *map = op->map;
    uint64_t start = offset & ~(unit_size(map) - 1), unit = offset >> map->options.unit_bits;
    size_t memory_size = unit_size(map) + DATA_AT;
    struct copy *copy = vb_buffer_get(op->request->thread, memory_size);
    struct group group;

    op->up = !copy || !map_log_has_room(map, records_of(map, 1));
    /* If it cannot be claimed, somebody else is at it. */
    if (op->up || map_claim(map, unit, 1, type) == 0 || !place_group(op, unit, 1, type, &group)) {
        if (copy) {
            vb_buffer_put(op->request->thread, copy, memory_size);
        }
        return false;
    }
    *copy = (struct copy){
        .op = op,
        .group = group,
        .position = offset - op->request->offset,
        .begin = offset - start,
        .bytes = bytes,
        .there = type == VB_MAP_BACKING ? backing_has(map, start) : 0,
        .memory_size = memory_size,
        .data = (unsigned char *)copy + DATA_AT,
    };
    op->pending++;
    if (copy->there > 0) {
        vb_submit(map->node.children[1], copy_part(copy, VB_OP_READ, start, copy->there, copy_read));
    } else {
        write_copy(copy);
    }
    return true;
}

/* How many units from `unit` on, up to `end`, may be claimed at once. */
static uint64_t units_to_claim(const struct map_node *map, uint64_t unit, uint64_t end,
                               uint64_t type)
{
    uint64_t last = (end - 1) >> map->options.unit_bits, wanted = last - unit + 1;
    /* What is left becomes further extents: Python makes room in a log that is nearly full only. */
    uint64_t most = map->options.log_records / 16 + 1;

    if (!is_seen_at_once(map, type) && !replaces_unit(map, last << map->options.unit_bits,
                                                      end - (last << map->options.unit_bits))) {
        wanted--; /* the last one is not covered */
    }
    if (map_has_subclusters(map)) {
        most = map_rest_of_cluster(map, unit);
    }
    return wanted < most ? wanted : most;
}

/*
 * Units from `offset` on that are all unallocated in the same way get a place in a row. False:
 * the request has to start anew, because somebody else is at it, or to go up (op->up).
 */
static bool allocate(struct map_op *op, uint64_t offset, uint64_t end, uint64_t type,
                     struct extent *extent)
{
    struct map_node *map = op->map;
    uint64_t unit = offset >> map->options.unit_bits;
    uint64_t wanted = units_to_claim(map, unit, end, type);
    struct group group;

    if (op->groups_count == GROUPS_MAX) {
        return false; /* those that it has are in their place when it starts anew */
    }
    if (!map_log_has_room(map, records_of(map, wanted))) {
        op->up = true;
        return false;
    }
    wanted = map_claim(map, unit, wanted, type);
    if (wanted == 0 || !place_group(op, unit, wanted, type, &group)) {
        return false;
    }
    if (is_seen_at_once(map, type)) {
        publish_at_once(op, &group);
    } else {
        add_group(op, &group);
    }
    extent->type = VB_MAP_DATA;
    extent->host = group.host + (offset & (unit_size(map) - 1));
    extent->bytes = ((unit + group.count) << map->options.unit_bits) - offset;
    if (extent->bytes > end - offset) {
        extent->bytes = end - offset;
    }
    return true;
}

/* ---- extents ------------------------------------------------------------------------------------------ */

/* Whether the entry of the unit at `offset` continues an extent that ends there. */
static bool continues(struct map_op *op, const struct extent *extent, uint64_t offset)
{
    uint64_t entry = load(op->map, offset >> op->map->options.unit_bits);

    if ((entry & VB_MAP_TYPE) != extent->type) {
        return false;
    }
    if (extent->type == VB_MAP_DATA) {
        return map_host_of(entry) == extent->host + extent->bytes &&
               (op->request->op == VB_OP_READ || (entry & VB_MAP_WRITABLE));
    }
    return true;
}

/* The longest extent from `offset` on; false: the map has changed, start anew. */
static bool next_extent(struct map_op *op, uint64_t offset, uint64_t end, struct extent *extent)
{
    struct map_node *map = op->map;
    uint64_t entry = load(map, offset >> map->options.unit_bits);
    uint64_t type = entry & VB_MAP_TYPE, wait;
    bool write = op->request->op == VB_OP_WRITE;

    if (type == VB_MAP_MISS || type == VB_MAP_PENDING) {
        return false;
    }
    if (write && !map_can_write(map, offset >> map->options.unit_bits, entry, &wait)) {
        return false;
    }
    if (write && type != VB_MAP_DATA) {
        /* With FUA it was in place when looked at first: Python has to see to it after all. */
        op->up = op->request->flags & VB_REQ_FUA;
        if (!op->up && !is_seen_at_once(map, type) &&
            !replaces_unit(map, offset, rest_of_unit(map, offset, end))) {
            extent->type = COPY;
            extent->bytes = rest_of_unit(map, offset, end);
            return start_copy(op, offset, extent->bytes, type);
        }
        return !op->up && allocate(op, offset, end, type, extent);
    }
    extent->type = type;
    extent->host = map_host_of(entry) + (offset & (unit_size(map) - 1));
    extent->bytes = rest_of_unit(map, offset, end);
    while (offset + extent->bytes < end && continues(op, extent, offset + extent->bytes)) {
        extent->bytes += rest_of_unit(map, offset + extent->bytes, end);
    }
    return true;
}

static void read_backing(struct map_op *op, struct cursor *cursor, uint64_t offset, uint64_t bytes)
{
    uint64_t size = op->map->options.backing_size;
    uint64_t there = offset >= size ? 0 : size - offset < bytes ? size - offset : bytes;

    if (there > 0) {
        start_part(op, cursor, 1, offset, there);
    }
    if (bytes > there) {
        zero_fill(cursor, bytes - there);
    }
}

static void start_extent(struct map_op *op, struct cursor *cursor, uint64_t offset,
                         const struct extent *extent)
{
    if (extent->type == VB_MAP_DATA) {
        start_part(op, cursor, 0, extent->host, extent->bytes);
    } else if (extent->type == COPY) {
        skip(cursor, extent->bytes);
    } else if (extent->type == VB_MAP_ZERO) {
        zero_fill(cursor, extent->bytes);
    } else {
        read_backing(op, cursor, offset, extent->bytes);
    }
}

static void start_op(struct map_node *map, struct vb_request *request)
{
    struct map_op *op = (struct map_op *)request->scratch;
    struct cursor cursor = {.iov = request->iov};
    uint64_t offset = request->offset, end = offset + request->bytes;

    op->request = request;
    op->map = map;
    op->here = map_thread(map, request->thread);
    op->epoch = vb_epochs_begin(&op->here->epochs);
    op->pending = 1;
    op->ret = 0;
    op->again = false;
    op->up = false;
    op->groups_count = 0;
    op->slices = NULL;
    op->slices_used = 0;
    while (offset < end && op->ret == 0 && !op->up) {
        struct extent extent;

        if (!next_extent(op, offset, end, &extent)) {
            op->again = true;
            break;
        }
        start_extent(op, &cursor, offset, &extent);
        offset += extent.bytes;
    }
    part_ended(op, 0);
}

static void go_up(struct map_node *map, struct vb_request *request)
{
    vb_upcall_post(&map->node, map->options.cookie, request);
}

/* ---- writes of zeroes ------------------------------------------------------------------------------------ */

static bool covers_some_unit(const struct map_node *map, const struct vb_request *request)
{
    uint64_t size = unit_size(map), end = request->offset + request->bytes;
    uint64_t first = (request->offset + size - 1) & ~(size - 1);

    return first < end && covers_unit(map, first, rest_of_unit(map, first, end));
}

/* `in_place`: all of it is in clusters that are ours. Parts of those stay what they are, data. */
static bool are_zeroes(const struct map_node *map, const struct vb_request *request, bool in_place)
{
    return request->op == VB_OP_WRITE && !(request->flags & VB_REQ_LITERAL) &&
           (!in_place || covers_some_unit(map, request)) && vb_request_is_zero(request);
}

static void zeroes_written(struct vb_request *part)
{
    struct vb_request *request = part->owner;
    int ret = part->ret;

    vb_request_free(part);
    vb_complete(request, ret);
}

/* A request of its own: what the guest sent is counted as the write that it was. */
static void write_zeroes(struct map_node *map, struct vb_request *request)
{
    struct vb_request *part = vb_request_new(request->thread);

    part->op = VB_OP_WRITE_ZEROES;
    part->flags = request->flags & VB_REQ_FUA;
    if (map->options.detect_zeroes == 2) {
        part->flags |= VB_REQ_MAY_UNMAP;
    }
    part->offset = request->offset;
    part->bytes = request->bytes;
    part->done = zeroes_written;
    part->owner = request;
    go_up(map, part);
}

/* ---- the node -------------------------------------------------------------------------------------------- */

static void submit_flush(struct map_node *map, struct vb_request *request)
{
    if (map_is_dirty(map)) {
        go_up(map, request);
    } else {
        vb_submit(map->node.children[0], request);
    }
}

void map_submit(struct vb_node *node, struct vb_request *request);

void map_submit(struct vb_node *node, struct vb_request *request)
{
    struct map_node *map = map_node_of(node);
    enum verdict verdict;
    uint64_t unit;
    bool in_place;

    if (request->op == VB_OP_FLUSH) {
        submit_flush(map, request);
        return;
    }
    if (request->op != VB_OP_READ && request->op != VB_OP_WRITE) {
        go_up(map, request);
        return;
    }
    if (request->bytes == 0) {
        vb_complete(request, 0);
        return;
    }
    verdict = look(map, request, &unit, &in_place);
    if (map->options.detect_zeroes && verdict != WAIT &&
        are_zeroes(map, request, verdict == HERE && in_place)) {
        write_zeroes(map, request);
        return;
    }
    switch (verdict) {
    case WAIT:
        map_wait(map, request, unit);
        break;
    case PYTHON:
        go_up(map, request);
        break;
    case HERE:
        /* After the look: what was allocated before it is in the log. */
        if ((request->flags & VB_REQ_FUA) && (!in_place || map_is_dirty(map))) {
            go_up(map, request);
        } else {
            start_op(map, request);
        }
        break;
    }
}
