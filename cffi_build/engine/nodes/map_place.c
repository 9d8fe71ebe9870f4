/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * nodes/map_place.c: how what is unallocated gets a place in the storage.
 *
 * Whoever is going to write there *claims* the units: their entries become pending, whereupon every
 * other request for them waits. Then they get a place, and when the data are there (before, if
 * it makes no difference: map.c) a record in the log and their new entries, in this order.
 *
 * Where clusters have parts (qcow2's subclusters) the place is the cluster's. The entry of its first unit
 * keeps it, whatever that unit is, pending too. Who has claimed units of a cluster without a place takes a
 * cluster for it, and the first unit's entry, if it is not one of those claimed, is pending for that
 * moment. The place is looked for with a unit claimed and not before: only who has claimed
 * all units of a cluster (Python) takes its place away. It has a record of its own, since what the
 * write does not cover belongs to that place, too, and the write may fail.
 */
#include "map_table.h"

bool map_has_subclusters(const struct map_node *map)
{
    return map->options.cluster_bits != map->options.unit_bits;
}

static uint64_t units_per_cluster(const struct map_node *map)
{
    return 1ull << (map->options.cluster_bits - map->options.unit_bits);
}

static uint64_t first_unit(const struct map_node *map, uint64_t unit)
{
    return unit & ~(units_per_cluster(map) - 1);
}

uint64_t map_rest_of_cluster(const struct map_node *map, uint64_t unit)
{
    return units_per_cluster(map) - (unit - first_unit(map, unit));
}

static bool has_type_of_nothing(uint64_t entry)
{
    return map_type_of(entry) == VB_MAP_ZERO || map_type_of(entry) == VB_MAP_BACKING;
}

/* A place that others have, too, or whose contents count for something. */
static bool is_bound(uint64_t entry)
{
    return map_host_of(entry) && !(entry & VB_MAP_WRITABLE);
}

bool map_can_write(struct map_node *map, uint64_t unit, uint64_t entry, uint64_t *wait)
{
    _Atomic uint64_t *first;

    if (map_type_of(entry) == VB_MAP_DATA) {
        return entry & VB_MAP_WRITABLE;
    }
    if (!has_type_of_nothing(entry) || !map->options.allocate || is_bound(entry)) {
        return false;
    }
    first = map_entry(map, first_unit(map, unit));
    entry = first ? atomic_load(first) : VB_MAP_MISS;
    if (map_type_of(entry) == VB_MAP_PENDING && !map_host_of(entry)) {
        *wait = first_unit(map, unit);
        return false;
    }
    return map_type_of(entry) != VB_MAP_MISS && !is_bound(entry);
}

/* ---- claims ---------------------------------------------------------------------------------- */

uint64_t map_claim(struct map_node *map, uint64_t unit, uint64_t wanted, uint64_t type)
{
    uint64_t count = 0;

    while (count < wanted) {
        _Atomic uint64_t *entry = map_own_entry(map, unit + count);
        uint64_t was = entry ? atomic_load(entry) : VB_MAP_MISS;

        if (map_type_of(was) != type || is_bound(was) ||
            !atomic_compare_exchange_strong(entry, &was, (was & ~VB_MAP_TYPE) | VB_MAP_PENDING)) {
            break;
        }
        count++;
    }
    return count;
}

void map_unclaim(struct map_node *map, uint64_t unit, uint64_t count, uint64_t type)
{
    for (uint64_t i = 0; i < count; i++) {
        _Atomic uint64_t *entry = map_entry(map, unit + i);

        if (entry) { /* else its table has been evicted; the log says it all */
            atomic_store(entry, (atomic_load(entry) & ~VB_MAP_TYPE) | type);
        }
    }
    if (count > 0) {
        map_wake(map);
    }
}

/* ---- places ---------------------------------------------------------------------------------- */

/* A new one for the cluster of `first`, whose entry is pending, and was `was`. */
static enum map_placing give_place(struct map_node *map, uint64_t first, _Atomic uint64_t *entry,
                                   uint64_t was, uint64_t *place)
{
    bool given = map_take_clusters(map, 1, place) > 0;

    if (given && !map_log(map, first << map->options.unit_bits, *place | VB_MAP_BACKING, 0)) {
        map_give_back(map, *place, 1);
        given = false;
    }
    atomic_store(entry, given ? was | *place | VB_MAP_WRITABLE : was);
    map_wake(map);
    return given ? MAP_PLACED : MAP_PYTHON;
}

/* The place of the cluster of a unit that is claimed. */
static enum map_placing place_of_cluster(struct map_node *map, uint64_t unit, uint64_t *place)
{
    uint64_t first = first_unit(map, unit);
    _Atomic uint64_t *entry = map_entry(map, first);
    uint64_t was = entry ? atomic_load(entry) : VB_MAP_MISS;

    if (map_type_of(was) == VB_MAP_MISS) {
        return MAP_AGAIN;
    }
    if (map_host_of(was)) {
        *place = map_host_of(was);
        return is_bound(was) ? MAP_PYTHON : MAP_PLACED;
    }
    if (first != unit) {
        if (!has_type_of_nothing(was) ||
            !atomic_compare_exchange_strong(entry, &was, VB_MAP_PENDING)) {
            return MAP_AGAIN;
        }
    }
    return give_place(map, first, entry, was, place);
}

enum map_placing map_place(struct map_node *map, uint64_t unit, uint64_t *count, uint64_t *host)
{
    enum map_placing placing;

    if (!map_has_subclusters(map)) {
        *count = map_take_clusters(map, *count, host);
        return *count > 0 ? MAP_PLACED : MAP_PYTHON;
    }
    placing = place_of_cluster(map, unit, host);
    if (placing != MAP_PLACED) {
        *count = 0;
    }
    *host += (unit - first_unit(map, unit)) << map->options.unit_bits;
    return placing;
}

uint64_t map_publish(struct map_node *map, uint64_t unit, uint64_t count, uint64_t host)
{
    unsigned bits = map->options.unit_bits;
    uint64_t done = 0;

    while (done < count) {
        uint64_t rest = map_rest_of_cluster(map, unit + done), end;
        uint64_t value = (host + (done << bits)) | VB_MAP_DATA | VB_MAP_WRITABLE;

        end = rest < count - done ? done + rest : count;
        if (!map_log(map, (unit + done) << bits, value, end - done - 1)) {
            break;
        }
        for (; done < end; done++, value += 1ull << bits) {
            _Atomic uint64_t *entry = map_entry(map, unit + done);

            if (entry) { /* else its table has been evicted; the log says it all */
                atomic_store(entry, value);
            }
        }
    }
    map_wake(map);
    return done;
}

void map_unplace(struct map_node *map, uint64_t unit, uint64_t count, uint64_t host, uint64_t type)
{
    if (!map_has_subclusters(map) && count > 0) {
        map_give_back(map, host, count);
    }
    map_unclaim(map, unit, count, type);
}
