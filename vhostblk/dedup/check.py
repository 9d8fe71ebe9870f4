# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks a store: everything that can be recomputed is, from the maps of the disks up.

The maps and the places of stored blocks are the truth. Reference counts, the index, the table of
places, and what segments have in use follow from them, so what is wrong there is repaired.
What the index lacks costs space: content is stored once more.
Not to be repaired: a map that shows a stored block that does not exist, two blocks in one place, a
block whose content does not have its fingerprint. These are corruptions.

Nothing waits to be written when this runs (after a checkpoint), and nothing changes meanwhile.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field

from vhostblk.dedup.format import (
    FIRST_SEGMENT,
    SECTOR,
    Block,
    Superblock,
    pack_block,
    unpack_block,
)
from vhostblk.dedup.ledger import State
from vhostblk.dedup.tables import INDEX_KEY, PAGE, Edit, Tables

_KEY = struct.Struct(">Q")
_NUMBER = struct.Struct("<Q")
_PAGE_KEY = struct.Struct(">IQ")
_MOST_MESSAGES = 20


@dataclass
class Result:
    """What a check has found, and perhaps repaired."""

    corruptions: int = 0
    leaks: int = 0
    """Blocks that nothing shows, or with too many references, or not found by their content."""
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
    """One check of one database. In memory it has 13 bytes for each stored block."""

    def __init__(self, tables: Tables, super: Superblock, size: int, *, repair: bool) -> None:
        self._tables = tables
        self._super = super
        self._size = size
        self._repair = repair
        ledger = tables.ledger()
        self._ledger = set(State.parse(ledger).segments if ledger else ())
        self._numbers = array("Q")  # of all stored blocks, sorted
        self._shown = array("I")  # how often each of them is
        self._found = bytearray()  # whether the index leads to each
        self._unshown = 0  # so many of them are leaks
        self.result = Result()

    def run(self) -> Result:
        """Look at all metadata. Takes a while, and nobody may use them meanwhile."""
        with self._tables.transaction() as edit:
            self._edit: Edit = edit
            for key, _ in edit.scan("blocks"):
                self._numbers.append(_KEY.unpack(key)[0])
            self._shown.frombytes(bytes(self._shown.itemsize * len(self._numbers)))
            self._found = bytearray(len(self._numbers))
            self._count()
            wrong = self._look_at_places()
            self._look_at_blocks(wrong)
            self._look_at_index()
            self._look_for_index()
            self._look_at_state()
        result = self.result
        result.repaired = self._repair and bool(result.leaks or result.wrong)
        return result

    def _change(self, name: str, key: bytes, value: bytes | None) -> None:
        if self._repair:
            self._edit.put(name, key, value)

    # ---- the maps

    def _count(self) -> None:
        """How often each stored block is shown."""
        numbers, shown = self._numbers, self._shown
        disks = {_KEY.unpack(key)[0] for key, _ in self._edit.scan("disks")}
        for key, value in self._edit.scan("map"):
            disk, page = _PAGE_KEY.unpack(key)
            if disk not in disks:
                self.result.corruptions += 1
                self.result.say(f"there is a map of disk {disk}, but no such disk")
            at = -1
            for index, number in enumerate(array("Q", value)):
                if number == 0:
                    continue
                self.result.mapped += 1
                at += 1  # what was written at once has numbers that follow each other
                if at >= len(numbers) or numbers[at] != number:
                    at = self._position(number)
                if at < 0:
                    self.result.corruptions += 1
                    self.result.say(
                        f"block {page * PAGE + index} of disk {disk} shows stored block {number}, "
                        "which is missing"
                    )
                else:
                    shown[at] += 1

    def _position(self, number: int) -> int:
        """Where a stored block is among all of them; -1: nowhere."""
        at = bisect_left(self._numbers, number)
        return at if at < len(self._numbers) and self._numbers[at] == number else -1

    def _is_needed(self, position: int) -> bool:
        # A block that nothing shows may be on its way into a map.
        return self._shown[position] > 0 or self._numbers[position] in self._tables.pins

    # ---- stored blocks

    def _look_at_places(self) -> list[bytes]:
        """Each entry leads to a block that is there. The keys of those that do not."""
        result, wrong, end = self.result, [], 0
        for key, value in self._edit.scan("places"):
            offset, number = int(_KEY.unpack(key)[0]), int(_NUMBER.unpack(value)[0])
            block = self._block_at(offset, number)
            if block is None:
                wrong.append(key)
                result.wrong += not self._is_leak(number)
                continue
            if offset < end:
                self._two_at(offset)
            end = max(end, offset + block.space)
        return wrong

    def _is_leak(self, number: int) -> bool:
        """A stored block that nothing needs. What else knows it is a part of that."""
        position = self._position(number)
        return position >= 0 and not self._is_needed(position)

    def _block_at(self, offset: int, number: int) -> Block | None:
        """A stored block, if it is needed, and there."""
        position = self._position(number)
        if position < 0 or not self._is_needed(position):
            return None
        block = self._block(number)
        there = block is not None and block.offset == offset and self._possible(block)
        return block if there else None

    def _block(self, number: int) -> Block | None:
        value = self._edit.get("blocks", _KEY.pack(number))
        return unpack_block(value) if value is not None else None

    def _two_at(self, offset: int) -> None:
        self.result.corruptions += 1
        self.result.say(f"two stored blocks share the place {offset}")

    def _look_at_blocks(self, wrong_places: list[bytes]) -> None:
        result, super = self.result, self._super
        blocks: list[tuple[bytes, bytes | None]] = []  # changes of the table of blocks
        places: list[tuple[bytes, bytes | None]] = [(key, None) for key in wrong_places]
        used: dict[int, int] = {}
        unneeded: dict[int, int] = {}
        for position, (key, value) in enumerate(self._edit.scan("blocks")):
            number, shown, block = (
                self._numbers[position],
                self._shown[position],
                unpack_block(value),
            )
            if not self._is_needed(position):
                result.leaks += 1
                result.say(f"nothing shows stored block {number}")
                blocks.append((key, None))
                self._unshown += 1
                if self._possible(block):
                    segment = super.segment_of(block.offset)
                    unneeded[segment] = unneeded.get(segment, 0) + block.space
                continue
            if shown != block.refs:
                result.leaks += 1
                result.say(f"stored block {number} has {block.refs} references, not {shown}")
                blocks.append((key, pack_block(block._replace(refs=shown))))
            result.blocks += 1
            if not self._possible(block):
                result.corruptions += 1
                result.say(f"stored block {number} is at {block.offset}, where none can be")
                continue
            segment = super.segment_of(block.offset)
            used[segment] = used.get(segment, 0) + block.space
            place, name = _KEY.pack(block.offset), _NUMBER.pack(number)
            owner = self._edit.get("places", place)
            if owner == name:
                continue
            if owner is None or self._is_leak(int(_NUMBER.unpack(owner)[0])):
                result.wrong += 1
            elif self._block_at(block.offset, int(_NUMBER.unpack(owner)[0])) is not None:
                self._two_at(block.offset)
                continue
            places.append((place, name))
        if result.wrong:
            result.say(f"the table of places has {result.wrong} wrong entries")
        for table, changes in (("blocks", blocks), ("places", places)):
            for key, new in changes:
                self._change(table, key, new)
        self._look_at_segments(used, unneeded)

    def _possible(self, block: Block) -> bool:
        super = self._super
        end = block.offset + block.space
        return (
            block.offset >= FIRST_SEGMENT
            and block.offset % SECTOR == 0
            and 0 < block.length <= super.block_size
            and super.segment_of(block.offset) == super.segment_of(end - 1)
            and super.segment_of(block.offset) < super.segments(self._size)
            and super.segment_of(block.offset) not in self._ledger
        )

    def _look_at_segments(self, used: dict[int, int], unneeded: dict[int, int]) -> None:
        wanted = {_KEY.pack(segment): _NUMBER.pack(count) for segment, count in used.items()}
        expected = dict(wanted)
        for segment, count in unneeded.items():
            expected[_KEY.pack(segment)] = _NUMBER.pack(count + used.get(segment, 0))
        found = dict(self._edit.scan("segments"))
        wrong = 0
        for key in found.keys() | expected.keys():
            wrong += found.get(key) != expected.get(key)
            if found.get(key) != wanted.get(key):
                self._change("segments", key, wanted.get(key))
        if wrong:
            self.result.wrong += wrong
            self.result.say(f"the table of segments has {wrong} wrong entries")

    # ---- what is found by content

    def _look_at_index(self) -> None:
        """Each entry leads to a block with that content."""
        wrong, leaks = [], 0
        for key, value in self._edit.scan("index"):
            number = int(_NUMBER.unpack(value)[0])
            position, block = self._position(number), self._block(number)
            right = block is not None and block.fingerprint[:INDEX_KEY] == key
            if right and self._is_needed(position):
                self._found[position] = 1
                continue
            wrong.append(key)
            leaks += self._is_leak(number)
        for key in wrong:
            self._change("index", key, None)
        if count := len(wrong) - leaks:
            self.result.wrong += count
            self.result.say(f"the index has {count} entries of blocks that do not exist")

    def _look_for_index(self) -> None:
        """Each block is found by its content, or another one with the same."""
        missing = 0
        position = self._found.find(0)
        while position >= 0:
            block = self._block(self._numbers[position])
            if block is not None and self._is_needed(position):
                name = block.fingerprint[:INDEX_KEY]
                found = self._edit.get("index", name)
                if found is None or not self._is_found(int(_NUMBER.unpack(found)[0])):
                    missing += 1
                    self._change("index", name, _NUMBER.pack(self._numbers[position]))
            position = self._found.find(0, position + 1)
        if missing:
            self.result.leaks += missing
            self.result.say(f"{missing} stored blocks are missing in the index")

    def _is_found(self, number: int) -> bool:
        position = self._position(number)
        return position >= 0 and bool(self._found[position])

    def _look_at_state(self) -> None:
        state, result = self._tables.state, self.result
        if (state.blocks - self._unshown, state.mapped) != (result.blocks, result.mapped):
            result.wrong += 1
            result.say(
                f"the counters say {state.blocks} stored blocks, shown {state.mapped} times; it is "
                f"{result.blocks + self._unshown} and {result.mapped}"
            )
        if self._repair:
            state.blocks, state.mapped = result.blocks, result.mapped
            self._edit.put_value("state", state.pack())
