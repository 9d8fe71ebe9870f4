/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/map_table.c: what a map knows: its tables of entries, and the log of what C has allocated.
 * The calls of Python's half about them are here, too.
 *
 * Entries are atomic words. I/O threads read them with acquire and change them with
 * compare-and-exchange; Python, the only one that installs and evicts tables, sets them. A
 * table is freed when every I/O thread has gone once round its loop after Python has evicted it: no
 * thread keeps a pointer into a table beyond that, and Python looks at none while it evicts one.
 */
#include "map_table.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#define OWN_LOG_RECORDS 16384u

/* ---- entries --------------------------------------------------------------------------- */

static uint64_t entries_per_table(const struct map_node *map)
{
    return 1ull << map->options.table_bits;
}

static struct map_table *table_of(struct map_node *map, uint64_t unit)
{
    uint64_t number = unit >> map->options.table_bits;

    if (number >= map->tables_count) {
        return NULL;
    }
    /* Acquire: its entries were written before it was installed. */
    return atomic_load_explicit(&map->tables[number], memory_order_acquire);
}

static _Atomic uint64_t *entry_in(const struct map_node *map, struct map_table *table,
                                  uint64_t unit)
{
    if (!atomic_load_explicit(&table->used, memory_order_relaxed)) {
        atomic_store_explicit(&table->used, true, memory_order_relaxed);
    }
    return &table->entries[table->same ? 0 : unit & (entries_per_table(map) - 1)];
}

_Atomic uint64_t *map_entry(struct map_node *map, uint64_t unit)
{
    struct map_table *table = table_of(map, unit);

    return table ? entry_in(map, table, unit) : NULL;
}

static size_t table_size(uint64_t entries)
{
    return sizeof(struct map_table) + entries * sizeof(uint64_t);
}

static void free_table(void *argument)
{
    struct map_table *table = argument;

    if (table) {
        free(table->before);
        free(table);
    }
}

/*
 * A table with entries of its own in the place of one whose entries are all the same. That one never
 * changes: who still looks at it sees what was there a moment ago. It stays as long as the new one:
 * the control thread, which may be looking, too, is not one that goes round.
 */
static void spread(struct map_node *map, uint64_t unit, struct map_table *same)
{
    _Atomic(struct map_table *) *place = &map->tables[unit >> map->options.table_bits];
    uint64_t count = entries_per_table(map);
    uint64_t entry = atomic_load_explicit(&same->entries[0], memory_order_relaxed);
    struct map_table *expected = same, *table = vb_must_alloc(table_size(count));

    table->before = same;
    atomic_init(&table->used, true);
    table->same = false;
    for (uint64_t i = 0; i < count; i++) {
        atomic_init(&table->entries[i], entry);
    }
    if (!atomic_compare_exchange_strong(place, &expected, table)) {
        free(table); /* another thread has done it, or the table has been evicted */
    }
}

_Atomic uint64_t *map_own_entry(struct map_node *map, uint64_t unit)
{
    struct map_table *table = table_of(map, unit);

    while (table && table->same && entries_per_table(map) > 1) {
        spread(map, unit, table);
        table = table_of(map, unit);
    }
    return table ? entry_in(map, table, unit) : NULL;
}

static bool are_same(const uint64_t *entries, uint64_t count)
{
    return memcmp(entries, entries + 1, (count - 1) * sizeof(*entries)) == 0;
}

int vb_map_install(struct vb_node *node, uint64_t number, const uint64_t *entries)
{
    struct map_node *map = map_node_of(node);
    struct map_table *table;
    uint64_t count;

    if (number >= map->tables_count) {
        return -ERANGE;
    }
    if (atomic_load_explicit(&map->tables[number], memory_order_relaxed)) {
        return -EEXIST;
    }
    count = are_same(entries, entries_per_table(map)) ? 1 : entries_per_table(map);
    table = malloc(table_size(count));
    if (!table) {
        return -ENOMEM;
    }
    table->before = NULL;
    atomic_init(&table->used, true);
    table->same = count == 1;
    for (uint64_t i = 0; i < count; i++) {
        atomic_init(&table->entries[i], entries[i]);
    }
    atomic_store_explicit(&map->tables[number], table, memory_order_release);
    return 0;
}

bool vb_map_evict(struct vb_node *node, uint64_t number)
{
    struct map_node *map = map_node_of(node);
    struct map_table *table = NULL;

    if (number < map->tables_count) {
        table = atomic_exchange(&map->tables[number], NULL);
    }
    if (!table) {
        return false;
    }
    vb_after_all_threads(node->engine, free_table, table);
    map_wake(map); /* who waits for an entry of it has to ask Python now */
    return true;
}

bool vb_map_used(struct vb_node *node, uint64_t number)
{
    struct map_node *map = map_node_of(node);
    struct map_table *table = NULL;

    if (number < map->tables_count) {
        table = atomic_load_explicit(&map->tables[number], memory_order_relaxed);
    }
    return table && atomic_exchange_explicit(&table->used, false, memory_order_relaxed);
}

uint64_t vb_map_get(struct vb_node *node, uint64_t unit)
{
    _Atomic uint64_t *entry = map_entry(map_node_of(node), unit);

    return entry ? atomic_load(entry) : VB_MAP_MISS;
}

void vb_map_set(struct vb_node *node, uint64_t unit, uint64_t count, uint64_t value, uint64_t step)
{
    bool waited_for = false;

    for (uint64_t i = 0; i < count; i++, value += step) {
        _Atomic uint64_t *entry = map_own_entry(map_node_of(node), unit + i);

        if (entry) {
            waited_for |= (atomic_exchange(entry, value) & VB_MAP_TYPE) == VB_MAP_PENDING;
        }
    }
    if (waited_for) {
        map_wake(map_node_of(node));
    }
}

bool vb_map_claim(struct vb_node *node, uint64_t unit, uint64_t expected)
{
    _Atomic uint64_t *entry = map_own_entry(map_node_of(node), unit);

    return entry && atomic_compare_exchange_strong(entry, &expected, VB_MAP_PENDING);
}

/* ---- telling Python ------------------------------------------------------------------------ */

/* It may be told after its map has gone. */
struct told {
    struct vb_message message;
    uint64_t cookie;
    uint16_t what;
};

static void fill_told(struct vb_message *message, void *context)
{
    struct told *told = vb_container_of(message, struct told, message);

    *(struct vb_event *)context = (struct vb_event){
        .kind = VB_EVENT_NODE,
        .cookie = told->cookie,
        .op = told->what,
    };
    free(told);
}

void map_tell(struct map_node *map, uint16_t what, _Atomic bool *already)
{
    struct told *told;

    if (atomic_load_explicit(already, memory_order_relaxed) || atomic_exchange(already, true)) {
        return;
    }
    told = malloc(sizeof(*told));
    if (told) {
        told->message.run = fill_told;
        told->cookie = map->options.cookie;
        told->what = what;
        vb_engine_post(map->node.engine, &told->message);
    }
}

/* ---- the log ------------------------------------------------------------------------------ */

/*
 * The memory may be a file that others will read after this process was killed: head is moved
 * first, then the record is written, then its number. A record without its number was never
 * finished, and the request that made it has not completed.
 */
bool map_log(struct map_node *map, uint64_t guest, uint64_t entry, uint64_t extra)
{
    uint64_t number = __atomic_load_n(&map->log->head, __ATOMIC_RELAXED), tail;
    struct vb_map_record *record;

    do {
        /* Acquire: what is overwritten was read before tail moved on. */
        tail = __atomic_load_n(&map->log->tail, __ATOMIC_ACQUIRE);
        if (number - tail >= map->options.log_records) {
            return false;
        }
    } while (!__atomic_compare_exchange_n(&map->log->head, &number, number + 1, true,
                                          __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    record = &map->records[number & (map->options.log_records - 1)];
    record->guest = guest;
    record->entry = entry;
    record->extra = extra;
    __atomic_store_n(&record->number, number + 1, __ATOMIC_RELEASE);
    if (number + 1 - tail > map->options.log_records / 2) {
        map_tell(map, VB_MAP_LOG_HALF, &map->half_told);
    }
    return true;
}

bool map_log_has_room(struct map_node *map, uint64_t records)
{
    uint64_t used = __atomic_load_n(&map->log->head, __ATOMIC_RELAXED) -
                    __atomic_load_n(&map->log->tail, __ATOMIC_RELAXED);

    return used + records <= map->options.log_records;
}

/*
 * Who sees an entry sees its record: that was made before (sequentially consistent, both). And the
 * log first: taking a record sets `dirty` before the log looks empty.
 */
bool map_is_dirty(struct map_node *map)
{
    return __atomic_load_n(&map->log->head, __ATOMIC_SEQ_CST) != atomic_load(&map->taken) ||
           atomic_load(&map->dirty);
}

int vb_map_take_log(struct vb_node *node, struct vb_map_change *changes, int max)
{
    struct map_node *map = map_node_of(node);
    uint64_t taken = atomic_load_explicit(&map->taken, memory_order_relaxed);
    int count = 0;

    while (count < max && taken != __atomic_load_n(&map->log->head, __ATOMIC_ACQUIRE)) {
        struct vb_map_record *record = &map->records[taken & (map->options.log_records - 1)];

        /* Being written: a few instructions. Those behind it may be of requests that have completed. */
        while (__atomic_load_n(&record->number, __ATOMIC_ACQUIRE) != taken + 1) {
            sched_yield();
        }
        if (!(record->guest & VB_MAP_RECORD_PYTHON)) {
            changes[count++] = (struct vb_map_change){record->guest, record->entry, record->extra + 1};
        }
        taken++;
    }
    if (count > 0) {
        atomic_store(&map->dirty, true); /* before the log looks empty */
    }
    atomic_store(&map->taken, taken);
    if (map->own_log) {
        vb_map_log_done(node, taken);
    }
    return count;
}

int vb_map_log(struct vb_node *node, uint64_t guest, uint64_t entry, uint64_t extra)
{
    return map_log(map_node_of(node), guest | VB_MAP_RECORD_PYTHON, entry, extra) ? 0 : -ENOSPC;
}

uint64_t vb_map_log_taken(struct vb_node *node)
{
    return atomic_load(&map_node_of(node)->taken);
}

void vb_map_log_done(struct vb_node *node, uint64_t taken)
{
    __atomic_store_n(&map_node_of(node)->log->tail, taken, __ATOMIC_RELEASE);
    atomic_store(&map_node_of(node)->half_told, false);
}

int vb_map_set_log(struct vb_node *node, uint64_t log, uint32_t records)
{
    struct map_node *map = map_node_of(node);
    struct vb_map_log *own = NULL;

    if (!log) {
        records = OWN_LOG_RECORDS;
        own = calloc(1, sizeof(*own) + OWN_LOG_RECORDS * sizeof(*map->records));
        if (!own) {
            return -ENOMEM;
        }
    }
    free(map->own_log);
    map->own_log = own;
    map->log = own ? own : (struct vb_map_log *)(uintptr_t)log;
    map->records = (struct vb_map_record *)(map->log + 1);
    map->options.log_records = records;
    atomic_store(&map->taken, map->log->head);
    return 0;
}

void vb_map_set_dirty(struct vb_node *node, bool dirty)
{
    atomic_store(&map_node_of(node)->dirty, dirty);
}

/* ---- life --------------------------------------------------------------------------------------- */

static uint64_t tables_for(const struct vb_map_options *options)
{
    return (options->size >> (options->unit_bits + options->table_bits)) + 1;
}

static int compare_numbers(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

    return (a > b) - (a < b);
}

uint64_t vb_map_sort(uint64_t *numbers, uint64_t count, uint64_t mask)
{
    uint64_t left = 0;

    for (uint64_t i = 0; i < count; i++) {
        if (numbers[i] & mask) {
            numbers[left++] = numbers[i] & mask;
        }
    }
    qsort(numbers, left, sizeof(*numbers), compare_numbers);
    return left;
}

void vb_map_set_detect_zeroes(struct vb_node *node, uint8_t detect_zeroes)
{
    map_node_of(node)->options.detect_zeroes = detect_zeroes;
}

void vb_map_set_size(struct vb_node *node, uint64_t size, uint64_t backing_size)
{
    struct map_node *map = map_node_of(node);
    uint64_t before = map->tables_count;
    _Atomic(struct map_table *) *tables;

    map->options.size = size;
    map->options.backing_size = backing_size;
    if (tables_for(&map->options) <= before) {
        return; /* tables beyond the end do no harm */
    }
    tables = calloc(tables_for(&map->options), sizeof(*tables));
    if (!tables) {
        return; /* what lies beyond is asked of Python for ever: slow, and right */
    }
    for (uint64_t i = 0; i < before; i++) {
        atomic_init(&tables[i], atomic_load(&map->tables[i]));
    }
    free(map->tables);
    map->tables = tables;
    map->tables_count = tables_for(&map->options);
}

static void map_destroy(struct vb_node *node)
{
    struct map_node *map = map_node_of(node);

    map_runs_free(map);
    for (uint64_t i = 0; i < map->tables_count; i++) {
        free_table(atomic_load_explicit(&map->tables[i], memory_order_relaxed));
    }
    free(map->tables);
    free(map->own_log);
    map_threads_free(map);
}

void map_submit(struct vb_node *node, struct vb_request *request); /* map.c */

static const struct vb_node_ops map_ops = {
    .name = "map",
    .submit = map_submit,
    .destroy = map_destroy,
};

static int check_options(const struct vb_map_options *options, char *error)
{
    uint32_t records = options->log_records;

    if (options->unit_bits < 9 || options->unit_bits > 26 || options->table_bits > 20 ||
        options->cluster_bits < options->unit_bits ||
        options->cluster_bits > options->unit_bits + options->table_bits) {
        return vb_error(error, -EINVAL,
                        "a map with units of 2^%u bytes in tables of 2^%u, clusters of 2^%u bytes",
                        options->unit_bits, options->table_bits, options->cluster_bits);
    }
    if (options->log && (records == 0 || (records & (records - 1)))) {
        return vb_error(error, -EINVAL, "a map's log of %u records, which is no power of two",
                        records);
    }
    return 0;
}

struct vb_node *vb_node_map_new(struct vb_engine *engine, const struct vb_map_options *options,
                                char *error)
{
    struct map_node *map;

    if (check_options(options, error) < 0) {
        return NULL;
    }
    map = vb_node_alloc(engine, &map_ops, sizeof(*map), error);
    if (!map) {
        return NULL;
    }
    map->options = *options;
    map->tables_count = tables_for(options);
    map->tables = calloc(map->tables_count, sizeof(*map->tables));
    if (!map->tables || vb_map_set_log(&map->node, options->log, options->log_records) < 0) {
        vb_error(error, -ENOMEM, "no memory for a map of %llu tables",
                 (unsigned long long)map->tables_count);
        free(map->tables);
        free(map);
        return NULL;
    }
    return &map->node;
}
