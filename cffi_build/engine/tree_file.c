/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * tree_file.c: a file of sorted tables, for metadata that must be right or be known to be wrong.
 *
 * Each table is a B+ tree of pages of 4 KiB. A pointer to a page has its checksum, down from the
 * heads, which have their own: so a page that is not what was written last at that place is found
 * when it is read, be it damaged, missing, or an older one. Pages are read by system calls, not by
 * way of a mapping: a file that has lost its end, or a device that fails, is an error for whoever
 * reads, not a signal for the process.
 *
 * A change never writes to a page that the tables have. It writes new pages (tree_write.c), which
 * ends in new roots, and syncs them; then it writes these roots into two of the four
 * heads, and syncs again. The other two heads still have those of the change before: a crash leaves
 * the one or the other. Two, so that no damage of one page makes the last change unseen. A page that
 * a change does without is used again by later ones, when no reader needs it.
 *
 * Which pages are in use is nowhere in the file. Opening it looks at all pages but
 * the leaves, of which there are a hundred times more.
 */
#include "tree.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api.h"

#define MAGIC 0x3165657274627600ull /* "\0vbtree1" */
#define PAGE_MAGIC 0x7467u
#define PAGE_BITS 12
#define STEP 64 /* words that the bits grow by, at least */

_Static_assert(VB_TREE_PAGE == 1 << PAGE_BITS, "a page");

/* The layout on disk is this machine's, as all of these have the same: little-endian. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file is little-endian");

struct header {
    uint16_t magic;
    uint8_t table, level;
    uint32_t count;
    uint64_t zero;
};

_Static_assert(sizeof(struct header) + VB_TREE_ROOM == VB_TREE_PAGE, "a page");

struct head {
    uint64_t magic;
    uint32_t version, tables;
    struct vb_tree_shape shapes[VB_TREE_TABLES];
    struct vb_tree_state state;
    unsigned char rest[VB_TREE_PAGE - 24 - VB_TREE_TABLES * 8 - sizeof(struct vb_tree_state)];
    uint64_t check; /* of the page with zero here */
};

_Static_assert(sizeof(struct head) == VB_TREE_PAGE, "a head");

int vb_tree_error(char *error, int code, const char *what)
{
    snprintf(error, VB_ERROR_SIZE, "%s: %s", what, strerror(code));
    return -code;
}

static int damaged(char *error, uint64_t page, const char *what)
{
    snprintf(error, VB_ERROR_SIZE, "page %llu %s", (unsigned long long)page, what);
    return -EBADMSG;
}

/* ---- pages ------------------------------------------------------------------ */

size_t vb_tree_entry_size(const vb_tree *tree, unsigned table, unsigned level)
{
    const struct vb_tree_shape *shape = &tree->shapes[table];
    return shape->key + (level ? VB_TREE_POINTER : shape->value);
}

unsigned vb_tree_capacity(const vb_tree *tree, unsigned table, unsigned level)
{
    return VB_TREE_ROOM / vb_tree_entry_size(tree, table, level);
}

#define P1 0x9e3779b185ebca87ull
#define P2 0xc2b2ae3d27d4eb4full
#define P3 0x165667b19e3779f9ull
#define P4 0x85ebca77c2b2ae63ull

static uint64_t rotate(uint64_t value, unsigned bits)
{
    return value << bits | value >> (64 - bits);
}

static uint64_t round_of(uint64_t lane, uint64_t word)
{
    return rotate(lane + word * P2, 31) * P1;
}

/* XXH64 with seed 0, for a length that needs no more than its main part. */
uint64_t vb_tree_check(const void *page)
{
    uint64_t lanes[4] = {P1 + P2, P2, 0, -P1}, words[4];
    for (size_t at = 0; at < VB_TREE_PAGE; at += sizeof(words)) {
        memcpy(words, (const char *)page + at, sizeof(words));
        for (unsigned lane = 0; lane < 4; lane++)
            lanes[lane] = round_of(lanes[lane], words[lane]);
    }
    uint64_t check = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) +
                     rotate(lanes[3], 18);
    for (unsigned lane = 0; lane < 4; lane++)
        check = (check ^ round_of(0, lanes[lane])) * P1 + P4;
    check += VB_TREE_PAGE;
    check = (check ^ check >> 33) * P2;
    check = (check ^ check >> 29) * P3;
    return check ^ check >> 32;
}

uint64_t vb_tree_seal(unsigned char *page, unsigned table, unsigned level, unsigned count)
{
    struct header header = {PAGE_MAGIC, table, level, count, 0};
    memcpy(page, &header, sizeof(header));
    return vb_tree_check(page);
}

int vb_tree_load(const vb_tree *tree, const struct vb_tree_pointer *at, unsigned table,
                 unsigned level, unsigned char *page, char *error)
{
    struct header header;
    ssize_t got = pread(tree->fd, page, VB_TREE_PAGE, at->page << PAGE_BITS);
    if (got < 0)
        return vb_tree_error(error, errno, "reading the database");
    if (got != VB_TREE_PAGE)
        return damaged(error, at->page, "is missing");
    if (vb_tree_check(page) != at->check)
        return damaged(error, at->page, "is not what was written there");
    memcpy(&header, page, sizeof(header));
    if (header.magic != PAGE_MAGIC || header.table != table || header.level != level ||
        header.count == 0 || header.count > vb_tree_capacity(tree, table, level))
        return damaged(error, at->page, "is not what leads to it says");
    return 0;
}

struct vb_tree_node vb_tree_node_of(const vb_tree *tree, const unsigned char *page, unsigned table,
                                    unsigned level)
{
    struct header header;
    memcpy(&header, page, sizeof(header));
    return (struct vb_tree_node){header.count, vb_tree_entry_size(tree, table, level),
                                 page + sizeof(header)};
}

struct vb_tree_pointer vb_tree_pointer_of(const struct vb_tree_node *node, unsigned index,
                                          size_t key)
{
    struct vb_tree_pointer at;
    memcpy(&at, node->entries + index * node->size + key, sizeof(at));
    return at;
}

/* ---- heads ------------------------------------------------------------------ */

static void seal_head(struct head *head)
{
    head->check = 0;
    head->check = vb_tree_check(head);
}

int vb_tree_write_head(const vb_tree *tree, const struct vb_tree_state *state, char *error)
{
    struct head heads[2] = {{.magic = MAGIC, .version = 1, .tables = tree->tables}};
    memcpy(heads[0].shapes, tree->shapes, sizeof(tree->shapes));
    heads[0].state = *state;
    seal_head(&heads[0]);
    heads[1] = heads[0];
    off_t offset = (state->number % 2) * sizeof(heads);
    ssize_t written = pwrite(tree->fd, heads, sizeof(heads), offset);
    if (written != sizeof(heads))
        return vb_tree_error(error, written < 0 ? errno : ENOSPC, "writing the database");
    if (fdatasync(tree->fd) < 0)
        return vb_tree_error(error, errno, "syncing the database");
    return 0;
}

static bool is_head(const vb_tree *tree, struct head *head)
{
    uint64_t check = head->check;
    seal_head(head);
    return head->magic == MAGIC && head->version == 1 && head->tables == tree->tables &&
           head->check == check &&
           memcmp(head->shapes, tree->shapes, sizeof(tree->shapes)) == 0;
}

/* The last state that a head has. */
static int read_heads(vb_tree *tree, char *error)
{
    bool found = false;
    for (unsigned page = 0; page < VB_TREE_HEADS; page++) {
        struct head head;
        ssize_t got = pread(tree->fd, &head, sizeof(head), page << PAGE_BITS);
        if (got < 0 && errno != EIO)
            return vb_tree_error(error, errno, "reading the database");
        if (got != sizeof(head) || !is_head(tree, &head))
            continue;
        if (!found || head.state.number > tree->now.number)
            tree->now = head.state;
        found = true;
    }
    return found ? 0 : damaged(error, 0, "is no beginning of a database, nor are the next ones");
}

/* ---- which pages are in use ------------------------------------------------- */

/* A page that is in use, once. */
static int mark(vb_tree *tree, uint64_t page, char *error)
{
    if (page < VB_TREE_HEADS || page >= tree->now.pages)
        return damaged(error, page, "is not in the file, but in use");
    if (vb_tree_bit(tree->used, page))
        return damaged(error, page, "is used for two things");
    vb_tree_set_bit(tree->used, page);
    return 0;
}

/* The kernel may read them meanwhile. */
static void announce(const vb_tree *tree, const struct vb_tree_node *node, size_t key)
{
    for (unsigned index = 0; index < node->count; index++) {
        uint64_t page = vb_tree_pointer_of(node, index, key).page;
        posix_fadvise(tree->fd, page << PAGE_BITS, VB_TREE_PAGE, POSIX_FADV_WILLNEED);
    }
}

static int mark_tree(vb_tree *tree, const struct vb_tree_pointer *at, unsigned table,
                     unsigned level, char *error)
{
    unsigned char page[VB_TREE_PAGE];
    int status = mark(tree, at->page, error);
    if (status == 0 && level > 0)
        status = vb_tree_load(tree, at, table, level, page, error);
    if (status < 0 || level == 0)
        return status;
    struct vb_tree_node node = vb_tree_node_of(tree, page, table, level);
    size_t key = tree->shapes[table].key;
    if (level > 1)
        announce(tree, &node, key);
    for (unsigned index = 0; index < node.count && status == 0; index++) {
        struct vb_tree_pointer below = vb_tree_pointer_of(&node, index, key);
        status = mark_tree(tree, &below, table, level - 1, error);
    }
    return status;
}

static int mark_all(vb_tree *tree, char *error)
{
    int status = 0;
    for (unsigned table = 0; table < tree->tables && status == 0; table++) {
        const struct vb_tree_root *root = &tree->now.roots[table];
        if (root->level >= VB_TREE_LEVELS)
            return damaged(error, root->at.page, "is at an impossible level");
        if (root->at.page)
            status = mark_tree(tree, &root->at, table, root->level, error);
    }
    return status;
}

/* ---- the file --------------------------------------------------------------- */

static vb_tree *new_tree(int fd, const struct vb_tree_shape *shapes, uint32_t tables)
{
    vb_tree *tree = calloc(1, sizeof(*tree));
    if (tree == NULL)
        return NULL;
    tree->fd = fd;
    tree->tables = tables;
    memcpy(tree->shapes, shapes, tables * sizeof(*shapes));
    pthread_mutex_init(&tree->lock, NULL);
    return tree;
}

int vb_tree_create(int fd, const struct vb_tree_shape *shapes, uint32_t tables, char *error)
{
    vb_tree *tree = new_tree(fd, shapes, tables);
    if (tree == NULL)
        return vb_tree_error(error, ENOMEM, "the database");
    struct vb_tree_state state = {.number = 0, .pages = VB_TREE_HEADS};
    int status = vb_tree_write_head(tree, &state, error);
    state.number = 1;
    if (status == 0)
        status = vb_tree_write_head(tree, &state, error);
    vb_tree_close(tree);
    return status;
}

/* All bits; a file that is as long as it should be. */
static int take_in(vb_tree *tree, char *error)
{
    off_t size = lseek(tree->fd, 0, SEEK_END);
    if (size < 0)
        return vb_tree_error(error, errno, "looking at the database");
    if (tree->now.pages < VB_TREE_HEADS || tree->now.pages > (uint64_t)size >> PAGE_BITS)
        return damaged(error, tree->now.pages - 1, "is missing");
    tree->words = tree->now.pages / 64 + STEP;
    tree->used = calloc(tree->words, sizeof(uint64_t));
    tree->fresh = calloc(tree->words, sizeof(uint64_t));
    tree->doubtful = calloc(tree->words, sizeof(uint64_t));
    if (tree->used == NULL || tree->fresh == NULL || tree->doubtful == NULL)
        return vb_tree_error(error, ENOMEM, "the database");
    for (unsigned page = 0; page < VB_TREE_HEADS; page++)
        vb_tree_set_bit(tree->used, page);
    return mark_all(tree, error);
}

vb_tree *vb_tree_open(int fd, const struct vb_tree_shape *shapes, uint32_t tables, uint64_t pages,
                      int *status, char *error)
{
    vb_tree *tree = new_tree(fd, shapes, tables);
    if (tree == NULL) {
        *status = vb_tree_error(error, ENOMEM, "the database");
        return NULL;
    }
    *status = read_heads(tree, error);
    if (*status == 0)
        *status = take_in(tree, error);
    if (*status < 0) {
        vb_tree_close(tree);
        return NULL;
    }
    tree->most = pages;
    return tree;
}

void vb_tree_close(vb_tree *tree)
{
    while (tree->left != NULL) {
        struct vb_tree_left *left = tree->left;
        tree->left = left->next;
        free(left->pages);
        free(left);
    }
    pthread_mutex_destroy(&tree->lock);
    free(tree->used);
    free(tree->fresh);
    free(tree->doubtful);
    free(tree);
}
