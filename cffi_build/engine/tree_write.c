/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * tree_write.c: changing a file of tables. tree_file.c says in which order that comes to the disk.
 *
 * A portion of sorted changes goes through a tree from the root to the leaves and back once: a page
 * below which something changes is read, what is in it is merged with the changes, and the list
 * that results is packed into new pages. A list that is too short for a page takes its
 * neighbour's entries, too.
 */
#include "tree.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "api.h"

#define BUFFER 64 /* pages that are written together, at most */

struct vb_tree_change {
    vb_tree *tree;
    struct vb_tree_state state;
    uint64_t next; /* no page before is free */
    uint64_t *left; /* owned: pages that this change does without */
    size_t left_count, left_room;
    char *error;
    /* Pages that are not written yet, in the order in which they were made. */
    unsigned buffered;
    uint64_t where[BUFFER];
    unsigned char pages[BUFFER][VB_TREE_PAGE];
};

/* Entries of one level. */
struct list {
    unsigned char *entries; /* owned */
    size_t count, room, size;
    bool inserted; /* something, and not only at the end */
    bool appended; /* something at the end */
};

struct changes {
    const unsigned char *at;
    uint64_t count;
    size_t size;
};

/* ---- lists ------------------------------------------------------------------ */

static int grow(struct list *list, size_t more, char *error)
{
    if (list->count + more <= list->room)
        return 0;
    size_t room = 2 * (list->count + more);
    unsigned char *entries = realloc(list->entries, room * list->size);
    if (entries == NULL)
        return vb_tree_error(error, ENOMEM, "changing the database");
    list->entries = entries;
    list->room = room;
    return 0;
}

static int push(struct list *list, const void *head, size_t bytes, const void *tail, char *error)
{
    int status = grow(list, 1, error);
    if (status < 0)
        return status;
    unsigned char *entry = list->entries + list->count++ * list->size;
    memcpy(entry, head, bytes);
    memcpy(entry + bytes, tail, list->size - bytes);
    return 0;
}

static int push_many(struct list *list, const void *entries, size_t count, char *error)
{
    int status = grow(list, count, error);
    if (status == 0 && count > 0) {
        memcpy(list->entries + list->count * list->size, entries, count * list->size);
        list->count += count;
    }
    return status;
}

/* ---- pages ------------------------------------------------------------------ */

/* Writes what is in the buffer, neighbours in one piece. */
static int write_buffer(struct vb_tree_change *change)
{
    unsigned at = 0;
    while (at < change->buffered) {
        unsigned end = at + 1;
        while (end < change->buffered && change->where[end] == change->where[end - 1] + 1)
            end++;
        size_t bytes = (size_t)(end - at) * VB_TREE_PAGE;
        ssize_t written = pwrite(change->tree->fd, change->pages[at], bytes,
                                 change->where[at] * VB_TREE_PAGE);
        if (written < 0 || (size_t)written != bytes)
            return vb_tree_error(change->error, written < 0 ? errno : ENOSPC,
                                 "writing the database");
        at = end;
    }
    change->buffered = 0;
    return 0;
}

static int grow_bits(uint64_t **bits, uint64_t words, uint64_t more)
{
    uint64_t *grown = realloc(*bits, (words + more) * sizeof(uint64_t));
    if (grown == NULL)
        return -ENOMEM;
    memset(grown + words, 0, more * sizeof(uint64_t));
    *bits = grown;
    return 0;
}

/* A page that nobody needs. */
static int allocate(struct vb_tree_change *change, uint64_t *page)
{
    vb_tree *tree = change->tree;
    uint64_t word = change->next / 64;
    while (word < tree->words && tree->used[word] == UINT64_MAX)
        word++;
    if (word == tree->words) {
        uint64_t more = tree->words / 8 + 64;
        if (grow_bits(&tree->used, tree->words, more) < 0 ||
            grow_bits(&tree->fresh, tree->words, more) < 0 ||
            grow_bits(&tree->doubtful, tree->words, more) < 0)
            return vb_tree_error(change->error, ENOMEM, "changing the database");
        tree->words += more;
    }
    *page = word * 64 + __builtin_ctzll(~tree->used[word]);
    if (*page >= tree->most)
        return vb_tree_error(change->error, ENOSPC, "the database is as large as it may be");
    change->next = *page;
    vb_tree_set_bit(tree->used, *page);
    vb_tree_set_bit(tree->fresh, *page);
    if (*page >= change->state.pages)
        change->state.pages = *page + 1;
    return 0;
}

/* This change does without a page. */
static int leave(struct vb_tree_change *change, uint64_t page)
{
    vb_tree *tree = change->tree;
    if (vb_tree_bit(tree->fresh, page)) {
        vb_tree_clear_bit(tree->fresh, page);
        vb_tree_clear_bit(tree->used, page);
        change->next = page < change->next ? page : change->next;
        return 0;
    }
    if (change->left_count == change->left_room) {
        size_t room = 2 * change->left_room + 64;
        uint64_t *left = realloc(change->left, room * sizeof(*left));
        if (left == NULL)
            return vb_tree_error(change->error, ENOMEM, "changing the database");
        change->left = left;
        change->left_room = room;
    }
    change->left[change->left_count++] = page;
    return 0;
}

/* A new page with these entries. */
static int new_page(struct vb_tree_change *change, unsigned table, unsigned level,
                    const unsigned char *entries, unsigned count, struct vb_tree_pointer *at)
{
    int status = change->buffered == BUFFER ? write_buffer(change) : 0;
    if (status == 0)
        status = allocate(change, &at->page);
    if (status < 0)
        return status;
    unsigned char *page = change->pages[change->buffered];
    size_t bytes = count * vb_tree_entry_size(change->tree, table, level);
    memset(page, 0, VB_TREE_PAGE);
    memcpy(page + VB_TREE_PAGE - VB_TREE_ROOM, entries, bytes);
    at->check = vb_tree_seal(page, table, level, count);
    change->where[change->buffered++] = at->page;
    return 0;
}

static int load(struct vb_tree_change *change, const struct vb_tree_pointer *at, unsigned table,
                unsigned level, unsigned char *page)
{
    for (unsigned index = change->buffered; index-- > 0;) {
        if (change->where[index] == at->page) {
            memcpy(page, change->pages[index], VB_TREE_PAGE);
            return 0;
        }
    }
    return vb_tree_load(change->tree, at, table, level, page, change->error);
}

/* Puts a list into pages, and what leads to these into another one. */
static int pack(struct vb_tree_change *change, unsigned table, unsigned level,
                const struct list *list, struct list *above)
{
    size_t capacity = vb_tree_capacity(change->tree, table, level), at = 0;
    size_t left = (list->count + capacity - 1) / capacity;
    int status = 0;
    above->inserted |= list->inserted;
    for (; left > 0 && status == 0; left--) {
        size_t rest = list->count - at;
        /* What grows at its end leaves full pages behind. */
        size_t count = !list->inserted && rest > capacity ? capacity : (rest + left - 1) / left;
        const unsigned char *entries = list->entries + at * list->size;
        struct vb_tree_pointer to;
        status = new_page(change, table, level, entries, count, &to);
        if (status == 0)
            status = push(above, entries, change->tree->shapes[table].key, &to, change->error);
        at += count;
    }
    return status;
}

/* ---- trees ------------------------------------------------------------------ */

/* Entries of a leaf, or none, with changes; at the end of the list. */
static int merge(struct vb_tree_change *change, unsigned table, const struct vb_tree_node *node,
                 struct changes changes, struct list *list)
{
    size_t key = change->tree->shapes[table].key;
    uint64_t *entries = &change->state.roots[table].entries;
    unsigned index = 0;
    int status = 0;
    while (status == 0 && (index < node->count || changes.count > 0)) {
        const unsigned char *old = node->entries + index * node->size;
        int order = changes.count == 0     ? -1
                    : index == node->count ? 1
                                           : memcmp(old, changes.at, key);
        if (order < 0) {
            status = push_many(list, old, 1, change->error);
            index++;
            continue;
        }
        if (changes.at[key]) {
            status = push(list, changes.at, key, changes.at + key + 1, change->error);
            *entries += order > 0;
            list->inserted |= order > 0 && index < node->count;
            list->appended |= order > 0 && index == node->count;
        } else {
            *entries -= order == 0;
        }
        index += order == 0;
        changes.at += changes.size;
        changes.count--;
    }
    return status;
}

/* Takes those before `key` away from changes; all of them without one. */
static struct changes take(struct changes *changes, const unsigned char *key, size_t length)
{
    struct changes taken = *changes;
    uint64_t low = 0, high = changes->count;
    while (key != NULL && low < high) {
        uint64_t middle = (low + high) / 2;
        if (memcmp(changes->at + middle * changes->size, key, length) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    taken.count = key != NULL ? low : changes->count;
    changes->at += taken.count * changes->size;
    changes->count -= taken.count;
    return taken;
}

static int apply(struct vb_tree_change *change, unsigned table,
                 const struct vb_tree_pointer *at, unsigned level, struct changes changes,
                 struct list *list);

/* The pages below one, as they are gone through. */
struct walk {
    struct vb_tree_node node;
    struct changes changes; /* those of the pages from `index` on */
    unsigned index;
};

/* The next page of a walk with its changes, at the end of a list of its entries. */
static int apply_next(struct vb_tree_change *change, unsigned table, unsigned level,
                      struct walk *walk, struct changes changes, struct list *list)
{
    struct vb_tree_pointer at =
        vb_tree_pointer_of(&walk->node, walk->index++, change->tree->shapes[table].key);
    return apply(change, table, &at, level, changes, list);
}

static struct changes next_changes(struct walk *walk, size_t key)
{
    bool last = walk->index + 1 == walk->node.count;
    const unsigned char *end = walk->node.entries + (walk->index + 1) * walk->node.size;
    return take(&walk->changes, last ? NULL : end, key);
}

/* The page before, which is in the list above, comes to the beginning of a list that is short. */
static int join_before(struct vb_tree_change *change, unsigned table, unsigned level,
                       struct list *list, struct list *above)
{
    size_t key = change->tree->shapes[table].key;
    struct vb_tree_node before = {above->count, above->size, above->entries};
    struct vb_tree_pointer at = vb_tree_pointer_of(&before, above->count - 1, key);
    struct list joined = {.size = list->size, .inserted = true};
    above->count--;
    int status = apply(change, table, &at, level, (struct changes){.count = 0}, &joined);
    if (status == 0)
        status = push_many(&joined, list->entries, list->count, change->error);
    free(list->entries);
    *list = joined;
    return status;
}

/* The next pages of a walk, the first of which has changes, at the end of the list above. */
static int change_next(struct vb_tree_change *change, unsigned table, unsigned level,
                       struct walk *walk, struct changes changes, struct list *above)
{
    size_t key = change->tree->shapes[table].key;
    size_t least = vb_tree_capacity(change->tree, table, level) / 3;
    struct list list = {.size = vb_tree_entry_size(change->tree, table, level)};
    int status = apply_next(change, table, level, walk, changes, &list);
    while (status == 0 && list.count < least && walk->index < walk->node.count) {
        changes = next_changes(walk, key);
        list.inserted = true;
        status = apply_next(change, table, level, walk, changes, &list);
    }
    bool grows = list.appended && !list.inserted; /* and will soon be long enough */
    if (status == 0 && !grows && list.count > 0 && list.count < least && above->count > 0)
        status = join_before(change, table, level, &list, above);
    list.inserted |= walk->index < walk->node.count;
    if (status == 0)
        status = pack(change, table, level, &list, above);
    free(list.entries);
    return status;
}

/* What is in a page, with changes, comes to the end of a list; the page is not needed any more. */
static int apply(struct vb_tree_change *change, unsigned table,
                 const struct vb_tree_pointer *at, unsigned level, struct changes changes,
                 struct list *list)
{
    unsigned char page[VB_TREE_PAGE];
    size_t key = change->tree->shapes[table].key;
    int status = load(change, at, table, level, page);
    if (status == 0)
        status = leave(change, at->page);
    if (status < 0)
        return status;
    struct walk walk = {vb_tree_node_of(change->tree, page, table, level), changes, 0};
    if (level == 0)
        return merge(change, table, &walk.node, changes, list);
    while (status == 0 && walk.index < walk.node.count) {
        changes = next_changes(&walk, key);
        if (changes.count > 0) {
            status = change_next(change, table, level - 1, &walk, changes, list);
        } else {
            const unsigned char *entry = walk.node.entries + walk.index++ * walk.node.size;
            status = push_many(list, entry, 1, change->error);
        }
    }
    return status;
}

/* A new root above (or in place of) a list of a level. */
static int put_root(struct vb_tree_change *change, unsigned table, unsigned level,
                    struct list *list)
{
    vb_tree *tree = change->tree;
    struct vb_tree_root *root = &change->state.roots[table];
    int status = 0;
    while (status == 0 && list->count > vb_tree_capacity(tree, table, level)) {
        struct list above = {.size = vb_tree_entry_size(tree, table, level + 1)};
        status = pack(change, table, level, list, &above);
        free(list->entries);
        *list = above;
        level++;
    }
    if (status < 0)
        return status;
    struct vb_tree_node node = {list->count, list->size, list->entries};
    root->at = (struct vb_tree_pointer){0, 0};
    root->level = 0;
    if (list->count == 1 && level > 0) {
        root->at = vb_tree_pointer_of(&node, 0, tree->shapes[table].key);
        root->level = level - 1;
    } else if (list->count > 0) {
        root->level = level;
        status = new_page(change, table, level, list->entries, list->count, &root->at);
    }
    return status;
}

static bool are_sorted(struct changes changes, size_t key)
{
    for (uint64_t index = 1; index < changes.count; index++) {
        const unsigned char *at = changes.at + index * changes.size;
        if (memcmp(at - changes.size, at, key) >= 0)
            return false;
    }
    return true;
}

int vb_tree_put(vb_tree_change *change, uint32_t table, const char *data, uint64_t count,
                char *error)
{
    const vb_tree *tree = change->tree;
    change->error = error;
    if (table >= tree->tables)
        return vb_tree_error(error, EINVAL, "changes of the database");
    const struct vb_tree_root *root = &change->state.roots[table];
    const struct vb_tree_shape *shape = &tree->shapes[table];
    struct changes changes = {(const unsigned char *)data, count, shape->key + 1 + shape->value};
    unsigned level = root->level;
    struct list list = {.size = vb_tree_entry_size(tree, table, level)};
    int status;
    if (!are_sorted(changes, shape->key))
        return vb_tree_error(error, EINVAL, "changes of the database");
    if (root->at.page) {
        struct vb_tree_pointer at = root->at;
        status = apply(change, table, &at, level, changes, &list);
    } else {
        status = merge(change, table, &(struct vb_tree_node){.size = list.size}, changes, &list);
    }
    if (status == 0)
        status = put_root(change, table, level, &list);
    free(list.entries);
    return status;
}

/* ---- beginning and ending --------------------------------------------------- */

/* Pages that no reader needs any more are free. */
static void forget_left(vb_tree *tree)
{
    pthread_mutex_lock(&tree->lock);
    uint64_t oldest = vb_tree_oldest(tree);
    pthread_mutex_unlock(&tree->lock);
    struct vb_tree_left **link = &tree->left;
    while (*link != NULL && (*link)->number > oldest)
        link = &(*link)->next;
    while (*link != NULL) {
        struct vb_tree_left *left = *link;
        *link = left->next;
        for (size_t index = 0; index < left->count; index++)
            vb_tree_clear_bit(tree->used, left->pages[index]);
        free(left->pages);
        free(left);
    }
}

vb_tree_change *vb_tree_begin(vb_tree *tree)
{
    vb_tree_change *change = malloc(sizeof(*change));
    if (change == NULL)
        return NULL;
    memset(change, 0, offsetof(struct vb_tree_change, where));
    change->tree = tree;
    forget_left(tree);
    memset(tree->fresh, 0, tree->words * sizeof(uint64_t));
    change->state = tree->now; /* only changes change it */
    change->state.number++;
    return change;
}

static void free_change(struct vb_tree_change *change)
{
    free(change->left);
    free(change);
}

void vb_tree_abandon(vb_tree_change *change)
{
    vb_tree *tree = change->tree;
    for (uint64_t word = 0; word < tree->words; word++)
        tree->used[word] &= ~tree->fresh[word];
    free_change(change);
}

/* What this change does without is to be kept as long as there are earlier readers. */
static int keep_left(struct vb_tree_change *change)
{
    struct vb_tree_left *left = malloc(sizeof(*left));
    if (left == NULL)
        return vb_tree_error(change->error, ENOMEM, "changing the database");
    *left = (struct vb_tree_left){change->tree->left, change->state.number, change->left,
                                  change->left_count};
    change->left = NULL;
    change->tree->left = left;
    return 0;
}

static void drop_left(vb_tree *tree)
{
    struct vb_tree_left *left = tree->left;
    tree->left = left->next;
    free(left->pages);
    free(left);
}

/*
 * Whether the heads are on stable storage nobody knows: a crash may find these, or the ones before.
 * Until a change succeeds, the pages of both are needed.
 */
static void doubt(vb_tree *tree)
{
    for (uint64_t word = 0; word < tree->words; word++)
        tree->doubtful[word] |= tree->fresh[word];
}

static void end_doubts(vb_tree *tree)
{
    for (uint64_t word = 0; word < tree->words; word++) {
        tree->used[word] &= ~tree->doubtful[word];
        tree->doubtful[word] = 0;
    }
}

int vb_tree_commit(vb_tree_change *change, char *error)
{
    vb_tree *tree = change->tree;
    change->error = error;
    int status = write_buffer(change);
    if (status == 0 && fdatasync(tree->fd) < 0)
        status = vb_tree_error(error, errno, "syncing the database");
    if (status == 0)
        status = keep_left(change);
    if (status < 0) {
        vb_tree_abandon(change);
        return status;
    }
    status = vb_tree_write_head(tree, &change->state, error);
    if (status < 0) {
        drop_left(tree);
        doubt(tree);
        free_change(change);
        return status;
    }
    end_doubts(tree);
    pthread_mutex_lock(&tree->lock);
    tree->now = change->state;
    pthread_mutex_unlock(&tree->lock);
    free_change(change);
    return 0;
}

/* ---- copies ----------------------------------------------------------------- */

#define COPY (64u << 10) /* bytes at a time */

/* Entries as changes that put them. */
static void as_changes(const char *entries, int64_t count, const struct vb_tree_shape *shape,
                       char *changes)
{
    for (int64_t index = 0; index < count; index++) {
        memcpy(changes, entries, shape->key);
        changes[shape->key] = 1;
        memcpy(changes + shape->key + 1, entries + shape->key, shape->value);
        entries += shape->key + shape->value;
        changes += shape->key + 1 + shape->value;
    }
}

/* The key that comes next; false: there is none. */
static bool advance(char *key, size_t length)
{
    while (length > 0 && ++key[length - 1] == 0)
        length--;
    return length > 0;
}

/* `memory` has room for COPY bytes of entries, and for as many changes. */
static int copy_table(vb_tree_reader *reader, vb_tree_change *change, uint32_t table,
                      char *memory, char *error)
{
    const struct vb_tree_shape *shape = &change->tree->shapes[table];
    uint32_t size = shape->key + shape->value, most = COPY / size;
    char key[VB_TREE_KEY] = {0};
    int64_t count;
    do {
        count = vb_tree_scan(reader, table, key, memory, most, error);
        if (count <= 0)
            return count;
        as_changes(memory, count, shape, memory + COPY);
        int status = vb_tree_put(change, table, memory + COPY, count, error);
        if (status < 0)
            return status;
        memcpy(key, memory + (count - 1) * size, shape->key);
    } while (count == most && advance(key, shape->key));
    return 0;
}

int vb_tree_copy(vb_tree_reader *reader, vb_tree *tree, char *error)
{
    char *memory = malloc(3 * COPY);
    vb_tree_change *change = memory != NULL ? vb_tree_begin(tree) : NULL;
    int status = change != NULL ? 0 : vb_tree_error(error, ENOMEM, "copying the database");
    for (uint32_t table = 0; table < tree->tables && status == 0; table++)
        status = copy_table(reader, change, table, memory, error);
    if (change != NULL && status == 0)
        status = vb_tree_commit(change, error);
    else if (change != NULL)
        vb_tree_abandon(change);
    free(memory);
    return status;
}
