# SPDX-License-Identifier: GPL-2.0-or-later
"""Deduplication: blocks with the same content are stored once. See docs/dedup.md.

Usable without the engine: a `Store` works on anything that reads and writes.

* `format`: what is on the data device, and the journal's records
* `journal`: what has changed since the last checkpoint
* `database`: named tables in a file, with checksums
* `tables`: the metadata, in the database and in memory
* `space`: the data device as a log of segments
* `store`: all of it together: writing, flushing, checkpoints, crashes, garbage collection
* `ledger`: records of the metadata on the data device
* `rebuild`: makes lost metadata anew from these
* `replay`: frames of the journal or the ledger on top of a database
* `check`: recomputes everything that can be recomputed
"""
