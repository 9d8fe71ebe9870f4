/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * slow_clock.c: to be preloaded into QEMU's tools, where each look at a thread's CPU time finds it
 * 600 ms further on.
 *
 * Who makes a LUKS header there cannot say how many iterations PBKDF2 is to have: QEMU measures how
 * many take a second, which takes seconds, and gives up on a machine that is busy.
 */
#define _GNU_SOURCE
#include <sys/resource.h>

int getrusage(__rusage_who_t who, struct rusage *usage)
{
    static _Thread_local unsigned calls;
    unsigned ms = 600 * ++calls;

    (void)who;
    *usage = (struct rusage){
        .ru_utime = {.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000},
    };
    return 0;
}
