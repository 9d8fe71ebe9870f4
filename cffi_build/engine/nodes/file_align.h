/* SPDX-License-Identifier: GPL-2.0-or-later */
/* nodes/file_align.h: O_DIRECT, and requests that are not made of its blocks. See file_align.c. */
#ifndef VB_FILE_ALIGN_H
#define VB_FILE_ALIGN_H

#include "../engine.h"

struct file_claim;
struct file_align_thread;

/* Part of a file node. */
struct file_align {
    struct vb_node *node;
    uint32_t block;
    /* Carries out a request for whole blocks; before its end the claim has to be given back. */
    void (*start)(struct vb_node *node, struct vb_request *request, struct file_claim *claim);
    _Atomic uint32_t alone;   /* claims of those that must be alone; nearly always 0 */
    _Atomic bool claiming;    /* somebody is about to make another one */
    _Atomic(struct file_align_thread *) threads[VB_MAX_IOTHREADS];
};

void file_align_init(struct file_align *align, struct vb_node *node, uint32_t block,
                     void (*start)(struct vb_node *node, struct vb_request *request,
                                   struct file_claim *claim)); /* control */
void file_align_destroy(struct file_align *align); /* control: nobody uses it any more */

/* Anything but a flush, of at least one byte. */
void file_align_submit(struct file_align *align, struct vb_request *request);
void file_claim_end(struct file_claim *claim);

#endif
