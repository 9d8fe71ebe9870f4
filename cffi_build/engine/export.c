/* SPDX-License-Identifier: GPL-2.0-or-later */
/* export.c: the drive's outside, as Python sees it. All of it runs on the control thread. */
#include "device.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int check_options(const struct vb_export_options *options, char *error)
{
    uint32_t block = options->logical_block_size;

    if (block < 512 || block > 32768 || (block & (block - 1))) {
        return vb_error(error, -EINVAL, "logical-block-size %u is not a power of two from 512 to 32768",
                        block);
    }
    if (options->num_queues < 1 || options->num_queues > 256) {
        return vb_error(error, -EINVAL, "num-queues %u is not from 1 to 256", options->num_queues);
    }
    if (options->num_iothreads < 1 || options->num_iothreads > VB_MAX_IOTHREADS) {
        return vb_error(error, -EINVAL, "%u I/O threads are not from 1 to %d", options->num_iothreads,
                        VB_MAX_IOTHREADS);
    }
    return 0;
}

struct vb_export *vb_export_new(struct vb_engine *engine, const struct vb_export_options *options,
                                char *error)
{
    struct vb_export *export_;

    if (check_options(options, error) < 0) {
        return NULL;
    }
    export_ = calloc(1, sizeof(*export_));
    if (!export_) {
        vb_error(error, -ENOMEM, "no memory for export '%s'", options->id);
        return NULL;
    }
    export_->engine = engine;
    export_->cookie = options->cookie;
    export_->num_queues = options->num_queues;
    export_->logical_block_size = options->logical_block_size;
    export_->writable = options->writable;
    memcpy(export_->serial, options->serial, VB_SERIAL_SIZE);
    snprintf(export_->id, sizeof(export_->id), "%s", options->id);
    export_->num_iothreads = options->num_iothreads;
    memcpy(export_->iothreads, options->iothreads,
           options->num_iothreads * sizeof(export_->iothreads[0]));
    atomic_store(&export_->capacity, options->capacity);
    atomic_store(&export_->writeback_wanted, !options->writethrough);
    return export_;
}

/* A plain store: each lane reads it only after a message that was sent later than this. */
void vb_export_set_root(struct vb_export *export_, struct vb_node *root)
{
    export_->root = root;
}

int vb_export_connect(struct vb_export *export_, int sock, char *error)
{
    if (export_->device) {
        close(sock);
        return vb_error(error, -EBUSY, "'%s' has a front-end already", export_->id);
    }
    return vb_device_start(export_, sock, error);
}

void vb_export_disconnect(struct vb_export *export_)
{
    if (export_->device) {
        vb_device_stop(export_->device);
    }
}

static void fill_paused(struct vb_message *message, void *context)
{
    struct vb_pause_round *round = vb_container_of(message, struct vb_pause_round, paused);

    *(struct vb_event *)context = (struct vb_event){
        .kind = VB_EVENT_PAUSED,
        .cookie = round->export_->cookie,
    };
    free(round);
}

void vb_pause_settled(struct vb_pause_round *round)
{
    if (atomic_fetch_sub(&round->lanes_left, 1) == 1) {
        vb_engine_post(round->export_->engine, &round->paused);
    }
}

void vb_export_pause(struct vb_export *export_)
{
    struct vb_pause_round *round = vb_must_alloc(sizeof(*round));
    round->paused.run = fill_paused;
    round->export_ = export_;
    export_->pause_depth++;
    if (export_->device) {
        vb_device_pause(export_->device, round);
    } else {
        vb_engine_post(export_->engine, &round->paused);
    }
}

void vb_export_resume(struct vb_export *export_)
{
    export_->pause_depth--;
    if (export_->device) {
        vb_device_resume(export_->device);
    }
}

void vb_export_set_capacity(struct vb_export *export_, uint64_t capacity)
{
    atomic_store_explicit(&export_->capacity, capacity, memory_order_relaxed);
    if (export_->device) {
        atomic_store(&export_->device->config_changed, true);
        vb_device_wake(export_->device);
    }
}

void vb_export_query(struct vb_export *export_, struct vb_export_info *info)
{
    struct vb_device *device = export_->device;

    *info = (struct vb_export_info){
        .connected = device != NULL,
        .writeback = atomic_load_explicit(&export_->writeback_wanted, memory_order_relaxed),
        .resubmitted = atomic_load_explicit(&export_->resubmitted, memory_order_relaxed),
        .connections = atomic_load_explicit(&export_->connections, memory_order_relaxed),
        .broken = atomic_load_explicit(&export_->broken, memory_order_relaxed),
        .unsupported = atomic_load_explicit(&export_->unsupported, memory_order_relaxed),
    };
    if (!device) {
        return;
    }
    info->features = atomic_load_explicit(&device->features, memory_order_relaxed);
    info->protocol_features =
        atomic_load_explicit(&device->protocol_features, memory_order_relaxed);
    info->queues_started = atomic_load_explicit(&device->queues_running, memory_order_relaxed);
    info->memory_regions = atomic_load_explicit(&device->regions, memory_order_relaxed);
    for (uint32_t i = 0; i < device->num_lanes; i++) {
        info->inflight +=
            atomic_load_explicit(&device->lanes[i].inflight_seen, memory_order_relaxed);
    }
}

void vb_export_stats(struct vb_export *export_, struct vb_stats *stats)
{
    vb_stats_sum(export_->stats, stats);
}

void vb_export_reason(struct vb_export *export_, char *text)
{
    memcpy(text, export_->reason, VB_EVENT_TEXT);
}

void vb_export_free(struct vb_export *export_)
{
    vb_stats_free(export_->stats);
    free(export_);
}

/* ---- guest memory that a filter in Python still looks at ---------------------------------- */

static _Atomic bool keep_unmapped_memory;

void vb_engine_keep_unmapped_memory(struct vb_engine *engine)
{
    (void)engine; /* the library unmaps for all of them through one function */
    atomic_store(&keep_unmapped_memory, true);
}

/* libvhost-user's munmap(): one step, so that a late reader never finds a hole. */
int vb_unmap_guest_memory(void *address, size_t length);
int vb_unmap_guest_memory(void *address, size_t length)
{
    if (atomic_load(&keep_unmapped_memory)) {
        return vb_guest_fault_put_zeroes((uintptr_t)address, length) ? 0 : -1;
    }
    return vb_guest_fault_unmap(address, length);
}

const char *vb_build_libvhost_user(void)
{
    return VB_LIBVHOST_USER;
}
