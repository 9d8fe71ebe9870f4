# SPDX-License-Identifier: GPL-2.0-or-later
"""What must hold whatever a front-end or a guest says, found out with hypothesis."""

from __future__ import annotations

import struct
from random import Random

from frontend import Device, Disconnected, GuestMemory, Message
from frontend.lab import Lab
from frontend.protocol import REQUEST_HEADER, u64, vring_state
from frontend.virtqueue import DESC, DESC_F_INDIRECT, DESC_F_WRITE
from fuzz.sessions import Session
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from thoroughness import tries

pytest_plugins = ["frontend.fixtures"]


def bounded(examples: int) -> settings:
    """The same examples each time, and so many."""
    return settings(
        max_examples=tries(examples),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# ---- messages


@bounded(200)
@given(seed=st.integers(0, (1 << 32) - 1))
def test_damaged_message_sequences(lab: Lab, seed: int) -> None:
    """A session ends when the back-end hangs up, so hypothesis cannot be its random source."""
    lab.noise("null")
    Session(Random(seed), lab.path("null")).run()
    lab.bystander.read(0, 4096)
    assert lab.daemon.alive


PAYLOADS = {
    Message.SET_FEATURES: "<Q",
    Message.SET_PROTOCOL_FEATURES: "<Q",
    Message.SET_VRING_NUM: "<II",
    Message.SET_VRING_BASE: "<II",
    Message.GET_VRING_BASE: "<II",
    Message.SET_VRING_ENABLE: "<II",
    Message.SET_VRING_ADDR: "<IIQQQQ",
    Message.SET_VRING_KICK: "<Q",
    Message.SET_VRING_CALL: "<Q",
    Message.SET_LOG_BASE: "<QQ",
    Message.GET_INFLIGHT_FD: "<QQHH4x",
    Message.SET_INFLIGHT_FD: "<QQHH4x",
    Message.ADD_MEM_REG: "<QQQQQ",
    Message.REM_MEM_REG: "<QQQQQ",
    Message.GET_CONFIG: "<III",
    Message.SET_CONFIG: "<IIIB",
    Message.SET_MEM_TABLE: "<IIQQQQQQQQ",
}

numbers = st.one_of(
    st.integers(0, 300),
    st.integers(0, 66).map(lambda n: 1 << n),
    st.integers(0, 64).map(lambda n: (1 << n) - 1),
    st.integers(0, (1 << 64) - 1),
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[Message, bytes, int]:
    message = draw(st.sampled_from(sorted(PAYLOADS)))
    layout = PAYLOADS[message]
    limits = {"Q": 64, "I": 32, "H": 16, "B": 8}
    fields = []
    for code in layout.replace("4x", "").strip("<"):
        fields.append(draw(numbers) % (1 << limits[code]))
    return message, struct.pack(layout, *fields), draw(st.integers(0, 2))


@bounded(250)
@given(said=st.lists(messages(), min_size=1, max_size=4))
def test_any_numbers_in_any_message(lab: Lab, said: list[tuple[Message, bytes, int]]) -> None:
    """After a good start. It is answered, or the connection ends; both at once would be odd."""
    lab.noise("null")
    device = lab.device("null")
    try:
        device.connect()
        device.start()
        device.read(0, 512)
        fds = [region.fd for region in device.memory.regions]
        try:
            for message, payload, count in said:
                device.channel.send(message, payload, fds[:count])
            device.submit(0, length=512)
            device.channel.send(Message.GET_QUEUE_NUM)
            while device.channel.receive()[0] != Message.GET_QUEUE_NUM:
                pass
        except Disconnected:
            pass
    finally:
        device.close()
    lab.bystander.read(0, 4096)
    assert lab.daemon.alive


# ---- descriptors

PART = 64 * 1024
END = 2 * PART
FILL = 0xA5

places = st.one_of(
    st.integers(0x8000, END - 1),
    st.integers(PART - 600, PART + 600),
    st.integers(END - 600, END + 600),
    numbers.map(lambda n: n % (1 << 64)),
)
lengths = st.one_of(
    st.sampled_from([0, 1, 15, 16, 17, 512, 513, 1024, 4096]),
    numbers.map(lambda n: n % (1 << 32)),
)
flags = st.one_of(st.sampled_from([0, 1, 2, 3]), st.integers(0, 7))
descriptors = st.tuples(places, lengths, flags, st.one_of(st.integers(0, 8), st.integers(0, 65535)))
tables = st.lists(descriptors, min_size=1, max_size=6)
READ = 0x8000


def chained(table: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """The same in a row, so that more than the first is looked at."""
    last = len(table) - 1
    return [
        (gpa, length, flags & 2 | (0 if n == last else 1), n + 1)
        for n, (gpa, length, flags, _) in enumerate(table)
    ]


@bounded(400)
@given(
    table=st.one_of(tables, tables.map(chained)),
    indirect=st.booleans(),
    type_=st.sampled_from([0, 0, 0, 1, 4, 8, 11, 13, 99]),
    good_header=st.booleans(),
    head=st.one_of(st.just(0), st.integers(0, 65535)),
)
@example([(READ, 16, 1, 1), (PART - 8, 513, 2, 0)], False, 0, True, 0)
@example([(READ, 16, 1, 1), (END - 512, 513, 2, 0)], True, 0, True, 0)
def test_only_writable_descriptors_are_written(
    lab: Lab,
    table: list[tuple[int, int, int, int]],
    indirect: bool,
    type_: int,
    good_header: bool,
    head: int,
) -> None:
    """Answered or dropped; and of guest memory nothing else changes."""
    lab.noise("null")
    memory = GuestMemory([(0, PART), (PART, PART)])
    device = lab.device("null", queue_size=8, memory=memory)
    try:
        device.connect()
        device.start()
        queue = device.queues[0]
        first = memory.alloc(0, 4096)
        memory.write(first, bytes([FILL]) * (END - first))
        memory.write(READ, REQUEST_HEADER.pack(type_, 0, 0) + struct.pack("<QII", 0, 8, 0))
        if good_header:
            _, length, flag, next_ = table[0]
            table = [(READ, max(length % 64, 16), flag & ~DESC_F_WRITE, next_), *table[1:]]
        content = b"".join(DESC.pack(*entry) for entry in table)
        if indirect:
            memory.write(first, content)
            content = DESC.pack(first, len(content), DESC_F_INDIRECT, 0)
        memory.write(queue.desc, content)
        before = memory.read(0, END)
        queue.publish(head)
        queue.kick()
        try:
            reply = device.channel.ask(Message.GET_VRING_BASE, vring_state(0, 0))
            taken = struct.unpack("<II", reply)[1]
            assert taken <= 1
            if head < queue.size:  # else there is nothing to give back
                assert queue.used_idx == taken
        except Disconnected:
            assert queue.used_idx <= 1
        check(device, before, table)
    finally:
        device.close()
    assert lab.daemon.alive


def check(device: Device, before: bytes, table: list[tuple[int, int, int, int]]) -> None:
    queue = device.queues[0]
    after = bytearray(device.memory.read(0, END))
    restore = [(queue.used, 6 + 8 * queue.size), (queue.avail, 6 + 2 * queue.size)]
    restore += [(gpa, length) for gpa, length, flags, _ in table if flags & DESC_F_WRITE]
    for gpa, length in restore:
        end = min(gpa + length, END)
        if gpa < end:
            after[gpa:end] = before[gpa:end]
    wrong = [n for n in range(END) if after[n] != before[n]] if after != before else []
    assert not wrong, f"written to at {wrong[0]:#x} and {len(wrong) - 1} more places"


@bounded(60)
@given(
    moves=st.lists(
        st.sampled_from(["read", "stop", "table", "slot", "enable", "call", "error"]),
        min_size=1,
        max_size=12,
    ),
    split=st.lists(st.integers(1, 700), max_size=5),
)
def test_legal_messages_in_any_order_lose_nothing(
    lab: Lab, moves: list[str], split: list[int]
) -> None:
    """What QEMU may do at any time, with requests in flight all the while."""
    with lab.device("disk", queues=2) as device:
        requests = []
        for number, move in enumerate(moves):
            cuts = split if sum(split) < 4096 else None
            queue = device.queues[number % 2]
            if len(queue.free) > 8:
                requests.append(
                    device.submit(0, 8 * number, length=4096, in_split=cuts, queue=queue.index)
                )
            if move == "stop":
                device.stop_queue(queue)
                device.start_queue(queue)
            elif move == "table":
                device.set_mem_table()
                device.shared = list(device.memory.regions)
            elif move == "slot":
                region = device.memory.regions[number % 2]
                device.remove_region(region)
                device.add_region(region)
            elif move == "enable":
                device.enable_queue(queue, False)
                device.enable_queue(queue)
            elif move == "call":
                device.set_call(queue)
            elif move == "error":
                device.tell(Message.SET_VRING_ERR, u64(queue.index), [queue.err_fd])
        for queue in device.queues:
            queue.kick()
        device.wait(*requests)
        assert {request.status for request in requests} <= {0}
