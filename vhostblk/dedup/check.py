# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks a store: everything that can be recomputed is, from the maps of the disks up.

The maps and the places of stored blocks are the truth. Reference counts, the index, the table of
places, and what segments have in use follow from them, so what is wrong there is repaired.
Not to be repaired: a map that shows a stored block that does not exist, two blocks in one place, a
block whose content does not have its fingerprint. These are corruptions.

Nothing waits to be written when this runs (after a checkpoint), and nothing changes meanwhile.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from vhostblk.dedup.format import (
    FIRST_SEGMENT,
    Block,
    Superblock,
    pack_block,
    unpack_block,
)
from vhostblk.dedup.ledger import State
from vhostblk.dedup.tables import INDEX_KEY, Tables

_KEY = struct.Struct(">Q")
_NUMBER = struct.Struct("<Q")
_PAGE_KEY = struct.Struct(">IQ")
_MOST_MESSAGES = 20


@dataclass
class Result:
    """What a check has found, and perhaps repaired."""

    corruptions: int = 0
    leaks: int = 0
    """Blocks that nothing shows, or with too many references."""
    wrong: int = 0
    """Other things that follow from the maps and do not."""
    repaired: bool = False
    blocks: int = 0
    mapped: int = 0
    bad: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """For the operator; not all of a thousand."""
        if len(self.messages) < _MOST_MESSAGES:
            self.messages.append(text)

    @property
    def sound(self) -> bool:
        return not (self.corruptions or self.leaks or self.wrong)


class Check:
    """One check of one database."""

    def __init__(self, tables: Tables, super: Superblock, size: int, *, repair: bool) -> None:
        self._tables = tables
        self._super = super
        self._size = size
        self._repair = repair
        ledger = tables.ledger()
        self._ledger = set(State.parse(ledger).segments if ledger else ())
        self.result = Result()

    def run(self) -> Result:
        """Look at all metadata. Takes a while, and nobody may use them meanwhile."""
        with self._tables.transaction() as (txn, dbs):
            self._txn, self._dbs = txn, dbs
            refs = self._count()
            self._look_at_blocks(refs)
            self._look_at_index()
            self._look_at_state()
        result = self.result
        result.repaired = self._repair and bool(result.leaks or result.wrong)
        return result

    def _pairs(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        with self._txn.cursor(self._dbs[name]) as cursor:
            yield from cursor

    def _change(self, name: str, key: bytes, value: bytes | None) -> None:
        if not self._repair:
            return
        if value is None:
            self._txn.delete(key, db=self._dbs[name])
        else:
            self._txn.put(key, value, db=self._dbs[name])

    # ---- the maps

    def _count(self) -> array[int]:
        """How often each stored block is shown."""
        refs = array("I", bytes(4 * self._tables.state.next_block))
        disks = {_KEY.unpack(key)[0] for key, _ in self._pairs("disks")}
        for key, value in self._pairs("map"):
            disk, page = _PAGE_KEY.unpack(key)
            if disk not in disks:
                self.result.corruptions += 1
                self.result.say(f"there is a map of disk {disk}, but no such disk")
            for index, number in enumerate(array("Q", value)):
                if number >= len(refs):
                    self._missing(disk, page * (len(value) // 8) + index, number)
                elif number:
                    refs[number] += 1
                    self.result.mapped += 1
        return refs

    def _missing(self, disk: int, block: int, number: int) -> None:
        self.result.corruptions += 1
        self.result.say(
            f"block {block} of disk {disk} shows stored block {number}, which is missing"
        )

    # ---- stored blocks

    def _look_at_blocks(self, refs: array[int]) -> None:
        result, super = self.result, self._super
        places: dict[bytes, bytes] = {}
        used: dict[int, int] = {}
        blocks: list[tuple[bytes, Block]] = [
            (key, unpack_block(value)) for key, value in self._pairs("blocks")
        ]
        for key, block in blocks:
            number = int(_KEY.unpack(key)[0])
            shown = refs[number] if number < len(refs) else 0
            if number < len(refs):
                refs[number] = 0
            if shown == 0 and number not in self._tables.pins:  # else it is on its way into a map
                result.leaks += 1
                result.say(f"nothing shows stored block {number}")
                self._change("blocks", key, None)
                continue
            if shown != block.refs:
                result.leaks += 1
                result.say(f"stored block {number} has {block.refs} references, not {shown}")
                self._change("blocks", key, pack_block(block._replace(refs=shown)))
            result.blocks += 1
            if not self._possible(block):
                result.corruptions += 1
                result.say(f"stored block {number} is at {block.offset}, where none can be")
                continue
            places[_KEY.pack(block.offset)] = _NUMBER.pack(number)
            segment = super.segment_of(block.offset)
            used[segment] = used.get(segment, 0) + block.space
        for number, count in enumerate(refs):
            if count and number:
                result.corruptions += count
                result.say(f"{count} blocks of disks show stored block {number}, which is missing")
        self._overlaps([block for _, block in blocks])
        self._compare("places", places, "the table of places")
        self._compare(
            "segments",
            {_KEY.pack(segment): _NUMBER.pack(bytes_) for segment, bytes_ in used.items()},
            "the table of segments",
        )

    def _possible(self, block: Block) -> bool:
        super = self._super
        end = block.offset + block.space
        return (
            block.offset >= FIRST_SEGMENT
            and block.offset % 512 == 0
            and 0 < block.length <= super.block_size
            and super.segment_of(block.offset) == super.segment_of(end - 1)
            and super.segment_of(block.offset) < super.segments(self._size)
            and super.segment_of(block.offset) not in self._ledger
        )

    def _overlaps(self, blocks: list[Block]) -> None:
        end = 0
        for block in sorted(block for block in blocks if block.refs):
            if block.offset < end:
                self.result.corruptions += 1
                self.result.say(f"two stored blocks share the place {block.offset}")
            end = max(end, block.offset + block.space)

    def _compare(self, name: str, wanted: dict[bytes, bytes], what: str) -> None:
        wrong = 0
        found = dict(self._pairs(name))
        for key in found.keys() | wanted.keys():
            if found.get(key) != wanted.get(key):
                wrong += 1
                self._change(name, key, wanted.get(key))
        if wrong:
            self.result.wrong += wrong
            self.result.say(f"{what} has {wrong} wrong entries")

    # ---- what is found by content

    def _look_at_index(self) -> None:
        """Each entry leads to a block with that content. (One that is missing costs space only.)"""
        wrong = []
        for key, value in self._pairs("index"):
            found = self._txn.get(_KEY.pack(_NUMBER.unpack(value)[0]), db=self._dbs["blocks"])
            if found is None or unpack_block(found).fingerprint[:INDEX_KEY] != key:
                wrong.append(key)
        for key in wrong:
            self._change("index", key, None)
        if wrong:
            self.result.wrong += len(wrong)
            self.result.say(f"the index has {len(wrong)} entries of blocks that do not exist")

    def _look_at_state(self) -> None:
        state, result = self._tables.state, self.result
        if (state.blocks, state.mapped) != (result.blocks, result.mapped):
            result.wrong += 1
            result.say(
                f"the counters say {state.blocks} stored blocks, shown {state.mapped} times; it is "
                f"{result.blocks} and {result.mapped}"
            )
            if self._repair:
                state.blocks, state.mapped = result.blocks, result.mapped
            self._change("state", b"state", state.pack())
