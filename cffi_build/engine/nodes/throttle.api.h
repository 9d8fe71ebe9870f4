/* SPDX-License-Identifier: GPL-2.0-or-later */
/* throttle: child 0 (role `file`), no faster than the limits of a group that many may share. */
typedef struct vb_throttle_group vb_throttle_group;

#define VB_THROTTLE_LIMITS 7 /* bps total, read, write; iops total, read, write; flushes */
#define VB_THROTTLE_DIRECTIONS 3 /* reads; what writes; flushes */

struct vb_throttle_limits {
    uint64_t avg[VB_THROTTLE_LIMITS];          /* units a second; 0: no limit */
    uint64_t max[VB_THROTTLE_LIMITS];          /* units a second in a burst; 0: none */
    uint64_t burst_length[VB_THROTTLE_LIMITS]; /* seconds, at least 1 */
    uint64_t iops_size; /* bytes that count as one operation; 0: any number */
};

struct vb_throttle_stats {
    uint64_t queued[VB_THROTTLE_DIRECTIONS];    /* waiting now */
    uint64_t waited[VB_THROTTLE_DIRECTIONS];    /* have had to wait */
    uint64_t waited_ns[VB_THROTTLE_DIRECTIONS]; /* for how long, all together */
};

vb_throttle_group *vb_throttle_group_new(char *error); /* without limits */
/* At any time; holds for requests that wait already. */
void vb_throttle_group_set(vb_throttle_group *group, const struct vb_throttle_limits *limits);
void vb_throttle_group_stats(vb_throttle_group *group, struct vb_throttle_stats *stats);
void vb_throttle_group_free(vb_throttle_group *group); /* no node has it */

vb_node *vb_node_throttle_new(vb_engine *engine, vb_throttle_group *group, char *error);
/* Another group; only while every export that reaches the node is paused. */
void vb_throttle_set_group(vb_node *node, vb_throttle_group *group);
/* From `begin` until its end nothing waits here, also what waits already. */
void vb_throttle_drain(vb_node *node, bool begin);
