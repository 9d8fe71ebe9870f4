# SPDX-License-Identifier: GPL-2.0-or-later
"""A hostile front-end: each message wrong in each way.

Every time that connection ends with one line in the log, and nothing else
happens: the process lives, its other exports serve, this one takes the next
front-end, and no file stays open.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from frontend import Channel, Disconnected, GuestMemory, Message, Type
from frontend.lab import Lab
from frontend.memory import PAGE
from frontend.protocol import (
    HEADER,
    REQUEST_HEADER,
    VRING_NOFD,
    Flag,
    config_space,
    inflight_description,
    u64,
    vring_address,
    vring_state,
)
from frontend.virtqueue import DESC

pytest_plugins = ["frontend.fixtures"]

SIZES = {
    Message.SET_FEATURES: 8,
    Message.SET_PROTOCOL_FEATURES: 8,
    Message.SET_MEM_TABLE: 40,
    Message.SET_LOG_BASE: 16,
    Message.SET_VRING_NUM: 8,
    Message.SET_VRING_ADDR: 40,
    Message.SET_VRING_BASE: 8,
    Message.GET_VRING_BASE: 8,
    Message.SET_VRING_KICK: 8,
    Message.SET_VRING_CALL: 8,
    Message.SET_VRING_ERR: 8,
    Message.SET_VRING_ENABLE: 8,
    Message.GET_CONFIG: 12,
    Message.SET_CONFIG: 13,
    Message.GET_INFLIGHT_FD: 24,
    Message.SET_INFLIGHT_FD: 24,
    Message.ADD_MEM_REG: 40,
    Message.REM_MEM_REG: 40,
}
"""Messages with a payload, and the least it may have."""

ONE_FD = {
    Message.SET_LOG_BASE,
    Message.SET_LOG_FD,
    Message.SET_VRING_KICK,
    Message.SET_VRING_CALL,
    Message.SET_VRING_ERR,
    Message.SET_BACKEND_REQ_FD,
    Message.SET_INFLIGHT_FD,
    Message.ADD_MEM_REG,
}

UNOFFERED = [
    0,
    *range(Message.SEND_RARP, Message.SET_BACKEND_REQ_FD),
    Message.IOTLB_MSG,
    Message.SET_VRING_ENDIAN,
    Message.CREATE_CRYPTO_SESSION,
    Message.CLOSE_CRYPTO_SESSION,
    Message.POSTCOPY_ADVISE,
    Message.POSTCOPY_LISTEN,
    Message.POSTCOPY_END,
    Message.GPU_SET_SOCKET,
    Message.RESET_DEVICE,
    Message.VRING_KICK,
    Message.SET_STATUS,
    Message.GET_STATUS,
    Message.GET_SHARED_OBJECT,
    Message.SET_DEVICE_STATE_FD,
    Message.CHECK_DEVICE_STATE,
    44,
    255,
    0x7FFF_FFFF,
    0xFFFF_FFFF,
]


@pytest.mark.parametrize("request_", UNOFFERED)
@pytest.mark.parametrize("started", [False, True], ids=["negotiated", "started"])
def test_unknown_messages(lab: Lab, request_: int, started: bool) -> None:
    with lab.attack() as device:
        if started:
            device.start()
        device.channel.send(request_, bytes(8))


@pytest.mark.parametrize("message", SIZES, ids=lambda message: message.name)
def test_payload_too_short(lab: Lab, message: Message) -> None:
    for size in sorted({0, 1, SIZES[message] - 1}):
        with lab.attack() as device:
            device.start()
            device.channel.send(message, bytes(size))


@pytest.mark.parametrize("message", list(Message), ids=lambda message: message.name)
def test_payload_far_too_long(lab: Lab, message: Message) -> None:
    for size in (1000, 100_000, 0x7FFF_FFFF, 0xFFFF_FFFF):
        with lab.attack() as device:
            device.channel.send(message, b"\xff" * min(size, 100_000), size=size)


@pytest.mark.parametrize("length", range(1, 12))
def test_hung_up_in_the_header(lab: Lab, length: int) -> None:
    with lab.attack() as device:
        header = HEADER.pack(Message.SET_FEATURES, Flag.VERSION, 8)
        device.channel.send_bytes(header[:length])
        device.channel.sock.shutdown(1)


def test_hung_up_in_the_payload(lab: Lab) -> None:
    for length in range(8):
        with lab.attack() as device:
            device.channel.send(Message.SET_FEATURES, bytes(length), size=8)
            device.channel.sock.shutdown(1)


@pytest.mark.parametrize("flags", [0, 2, 3, 4, 5, 0xFFFF_FFFE, 0x8000_0000])
def test_wrong_flags(lab: Lab, flags: int) -> None:
    with lab.attack() as device:
        device.channel.send(Message.GET_FEATURES, flags=flags)


def test_noise(lab: Lab) -> None:
    for pattern in (b"\0", b"\xff", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256))):
        with lab.attack() as device:
            device.channel.send_bytes(pattern * (4096 // len(pattern)))


# ---- file descriptors


@pytest.mark.parametrize("message", sorted(ONE_FD), ids=lambda message: message.name)
@pytest.mark.parametrize("count", [0, 2, 8])
def test_wrong_number_of_descriptors(lab: Lab, message: Message, count: int) -> None:
    before = lab.open_files()
    with GuestFiles(count) as fds, lab.attack() as device:
        device.start()
        device.channel.send(message, bytes(SIZES.get(message, 0)), fds)
    lab.until_files_are(before)


@pytest.mark.parametrize(
    "message",
    [message for message in SIZES if message not in ONE_FD] + [Message.GET_FEATURES],
    ids=lambda message: message.name,
)
def test_descriptors_that_nobody_asked_for(lab: Lab, message: Message) -> None:
    """Refused or ignored, but closed."""
    before = lab.open_files()
    with GuestFiles(8) as fds, lab.attack(dropped=False) as device:
        device.start()
        device.channel.send(message, bytes(SIZES.get(message, 0)), fds)
        device.channel.send(Message.GET_QUEUE_NUM)
        device.channel.receive()
    lab.until_files_are(before)


def test_more_descriptors_than_fit(lab: Lab) -> None:
    before = lab.open_files()
    with GuestFiles(64) as fds, lab.attack() as device:
        device.channel.send(Message.SET_MEM_TABLE, struct.pack("<II", 8, 0) + bytes(256), fds)
    lab.until_files_are(before)


def test_descriptors_in_the_middle_of_a_message(lab: Lab) -> None:
    before = lab.open_files()
    with GuestFiles(8) as fds, lab.attack(dropped=False) as device:
        channel = device.channel
        channel.send_bytes(HEADER.pack(Message.SET_VRING_KICK, Flag.VERSION, 8), fds[:1])
        channel.send_bytes(u64(0)[:4], fds[1:3])
        channel.send_bytes(u64(0)[4:], fds[3:])
        channel.wait_closed(0.1)
    lab.until_files_are(before)


KINDS: dict[str, Callable[[], tuple[int, ...]]] = {
    "null": lambda: (os.open("/dev/null", os.O_RDWR),),
    "zero": lambda: (os.open("/dev/zero", os.O_RDWR),),
    "directory": lambda: (os.open("/", os.O_RDONLY | os.O_DIRECTORY),),
    "path": lambda: (os.open("/", os.O_PATH),),
    "memfd": lambda: (os.memfd_create("x"),),
    "pipe": lambda: os.pipe()[::-1],
    "read-only": lambda: (os.open("/proc/self/exe", os.O_RDONLY),),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message", sorted(ONE_FD), ids=lambda message: message.name)
def test_descriptors_of_the_wrong_kind(lab: Lab, message: Message, kind: str) -> None:
    """May be taken (nobody can tell a pipe's use), but then it harms no one else."""
    before = lab.open_files()
    with lab.attack(dropped=False) as device:
        device.start()
        device.read(0, 512)
        fd, *others = KINDS[kind]()
        try:
            payload = {
                Message.SET_LOG_BASE: struct.pack("<QQ", 4096, 0),
                Message.SET_INFLIGHT_FD: inflight_description(8192, 0, 1, 128),
                Message.ADD_MEM_REG: struct.pack("<5Q", 0, 1 << 32, 1 << 20, 1 << 45, 0),
            }.get(message, bytes(SIZES.get(message, 0)))
            device.channel.send(message, payload, [fd])
        finally:
            for each in (fd, *others):
                os.close(each)
        device.channel.send(Message.SET_FEATURES, u64(device.features))
        for _ in range(3):
            device.submit(0, length=512).queue.kick()
        device.settle(seconds=0.02)
    lab.until_files_are(before)


class GuestFiles:
    """So many memfds, for as long as the block runs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> list[int]:
        self.fds = [os.memfd_create("x") for _ in range(self.count)]
        for fd in self.fds:
            os.ftruncate(fd, 1 << 20)
        return self.fds

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)


# ---- memory


def region_message(gpa: int, size: int, uva: int, offset: int) -> bytes:
    return struct.pack("<5Q", 0, gpa, size, uva, offset)


TOP = 1 << 64
REGIONS = {
    "empty": (1 << 32, 0, 1 << 45, 0),
    "wraps round": (TOP - PAGE, 2 * PAGE, 1 << 45, 0),
    "user address wraps round": (1 << 32, 2 * PAGE, TOP - PAGE, 0),
    "size of everything": (0, TOP - 1, 0, 0),
    "offset beyond the file": (1 << 32, PAGE, 1 << 45, 1 << 20),
    "end beyond the file": (1 << 32, 2 << 20, 1 << 45, 0),
    "offset and size wrap round": (1 << 32, 2 * PAGE, 1 << 45, TOP - PAGE),
    "offset between pages": (1 << 32, PAGE, 1 << 45, 100),
    "size is negative": (1 << 32, 1 << 63, 1 << 45, 0),
}


@pytest.mark.parametrize("name", REGIONS)
def test_bad_memory_region(lab: Lab, name: str) -> None:
    with GuestFiles(1) as fds, lab.attack() as device:
        device.start()
        device.channel.send(Message.ADD_MEM_REG, region_message(*REGIONS[name]), fds)


@pytest.mark.parametrize("name", REGIONS)
def test_bad_memory_table(lab: Lab, name: str) -> None:
    good = (0, 1 << 20, 1 << 46, 0)
    for regions in ([REGIONS[name]], [good, REGIONS[name]]):
        with GuestFiles(len(regions)) as fds, lab.attack() as device:
            payload = struct.pack("<II", len(regions), 0)
            payload += b"".join(struct.pack("<4Q", *region) for region in regions)
            device.channel.send(Message.SET_MEM_TABLE, payload, fds)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 9, 255, 0xFFFF_FFFF])
def test_region_count_that_is_not_the_number_of_descriptors(lab: Lab, count: int) -> None:
    regions = b"".join(struct.pack("<4Q", n << 32, 1 << 20, 1 << 40 | n << 32, 0) for n in range(8))
    with GuestFiles(2) as fds, lab.attack() as device:
        device.channel.send(Message.SET_MEM_TABLE, struct.pack("<II", count, 0) + regions, fds)


def test_overlapping_regions_in_a_table(lab: Lab) -> None:
    with GuestFiles(2) as fds, lab.attack() as device:
        payload = struct.pack("<II", 2, 0) + struct.pack("<4Q", 0, 1 << 20, 1 << 40, 0)
        payload += struct.pack("<4Q", 4096, 1 << 20, 1 << 41, 0)
        device.channel.send(Message.SET_MEM_TABLE, payload, fds)


TIB = 1 << 40
SHARED = {
    "one": [(Message.ADD_MEM_REG, region_message(0, 64 * TIB, TIB, 0))],
    "together": [
        (Message.ADD_MEM_REG, region_message(number * 32 * TIB, 20 * TIB, number * 64 * TIB, 0))
        for number in (1, 2)
    ],
    "a log": [(Message.SET_LOG_BASE, struct.pack("<QQ", 2 * TIB, 0))],
    "an in-flight area": [(Message.SET_INFLIGHT_FD, inflight_description(2 * TIB, 0, 1, 128))],
}


@pytest.mark.parametrize("name", SHARED)
def test_more_memory_than_a_process_has_addresses_for(lab: Lab, name: str) -> None:
    """Or so much of it that there would not be enough for everybody."""
    with GuestFiles(1) as fds, lab.attack() as device:
        os.ftruncate(fds[0], 100 * TIB)
        for message, payload in SHARED[name]:
            device.channel.send(message, payload, fds)


def test_more_memory_in_a_table_than_a_process_has_addresses_for(lab: Lab) -> None:
    with GuestFiles(2) as fds, lab.attack() as device:
        payload = struct.pack("<II", 2, 0)
        for number, fd in enumerate(fds):
            os.ftruncate(fd, 100 * TIB)
            payload += struct.pack("<4Q", number * 32 * TIB, 20 * TIB, (number + 1) * 64 * TIB, 0)
        device.channel.send(Message.SET_MEM_TABLE, payload, fds)


def test_more_regions_than_slots(lab: Lab) -> None:
    with lab.attack() as device:
        slots = device.channel.ask_u64(Message.GET_MAX_MEM_SLOTS)
        with GuestFiles(1) as fds:
            for number in range(slots + 1):
                message = region_message(number << 30, PAGE, number << 30 | 1 << 45, 0)
                device.channel.send(Message.ADD_MEM_REG, message, fds)


def test_a_table_without_the_rings_under_io(lab: Lab) -> None:
    """The rings' memory goes while they run."""
    with lab.attack(dropped=False) as device:
        device.start()
        device.read(0, 512)
        payload = struct.pack("<II", 1, 0) + device.memory.regions[1].payload()
        device.submit(0, length=512)
        device.channel.send(Message.SET_MEM_TABLE, payload, [device.memory.regions[1].fd])
        device.queues[0].kick()
        device.channel.ask_u64(Message.GET_QUEUE_NUM)


@pytest.mark.parametrize("type_", [Type.IN, Type.OUT, Type.GET_ID])
@pytest.mark.parametrize("export", ["null", "disk", "slow"])
def test_memory_that_is_cut_off_later(lab: Lab, export: str, type_: Type) -> None:
    """The front-end truncates what it shared: touching it is SIGBUS, here and there."""
    data = b"" if type_ == Type.IN else bytes(4096)
    for cut in (0, 1):  # all of it; only what the requests point to
        with lab.attack(export, dropped=False) as device:
            device.start()
            device.read(0, 4096)
            at = device.memory.regions[1].gpa
            for number in range(4):
                in_at = at + number * 8192 if type_ == Type.IN else None
                device.submit(type_, 8 * number, data, length=4096, in_at=in_at)
            for region in device.memory.regions[cut:]:
                os.ftruncate(region.fd, region.offset)
            device.queues[0].kick()
            device.channel.wait_closed(0.3)


def test_an_inflight_area_that_is_cut_off_later(lab: Lab) -> None:
    with lab.attack("null", dropped=False) as device:
        device.start()
        device.stop()
        assert device.inflight is not None
        size = device.inflight.mmap_size
        with GuestFiles(1) as fds:
            device.channel.send(Message.SET_INFLIGHT_FD, inflight_description(size, 0, 1, 128), fds)
            device.start_queue(device.queues[0])
            os.ftruncate(fds[0], 0)
            for number in range(5):
                device.submit(Type.IN, number, length=512)
            device.channel.wait_closed(0.1)


@pytest.mark.parametrize("message", [Message.SET_INFLIGHT_FD, Message.SET_LOG_BASE])
def test_an_area_cut_off_while_it_is_given(lab: Lab, message: Message) -> None:
    """Truncated again and again, at whatever point of the message's way that is."""
    payload = inflight_description(1 << 20, 0, 1, 128)
    if message == Message.SET_LOG_BASE:
        payload = struct.pack("<QQ", 1 << 20, 0)
    lab.noise("null")
    for _ in range(100):
        device = lab.device("null")
        fd = os.memfd_create("area")
        try:
            os.ftruncate(fd, 1 << 20)
            device.connect()
            device.start()
            device.channel.send(message, payload, [fd])
            for size in (0, 1 << 20) * 20:
                os.ftruncate(fd, size)
                device.queues[0].kick()
        finally:
            os.close(fd)
            device.close()
    lab.bystander.read(0, 4096)


def test_memory_cut_off_while_it_is_given(lab: Lab) -> None:
    lab.noise("null")
    for number in range(60):
        device = lab.device("null")
        try:
            device.connect()
            device.start()
            region = device.memory.add(1 << 32, 1 << 20)
            with suppress(Disconnected):
                device.channel.send(Message.ADD_MEM_REG, bytes(8) + region.payload(), [region.fd])
                for size in (0, region.offset + region.size) * 10:
                    os.ftruncate(region.fd, size)
                    if len(device.queues[0].free) > 3:
                        device.submit(number % 2, 0, bytes(4096 * (number % 2)), length=512)
        finally:
            device.close()
    lab.bystander.read(0, 4096)


# ---- rings


@pytest.mark.parametrize("num", [0, 3, 127, 2048, 32768, 65536, 0x8000_0000, 0xFFFF_FFFF])
def test_bad_ring_size(lab: Lab, num: int) -> None:
    with lab.attack() as device:
        device.start_device()
        device.make_queues()
        queue = device.queues[0]
        channel = device.channel
        channel.send(Message.SET_VRING_NUM, vring_state(0, num))
        channel.send(Message.SET_VRING_ADDR, device.ring_address(queue))
        channel.send(Message.SET_VRING_KICK, u64(0), [queue.kick_fd])


def test_ring_size_changed_while_running(lab: Lab) -> None:
    for num in (1, 4, 1024):
        with lab.attack(dropped=False) as device:
            device.start()
            requests = [device.submit(0, length=512) for _ in range(20)]
            device.channel.send(Message.SET_VRING_NUM, vring_state(0, num))
            requests.append(device.submit(0, length=512))
            device.channel.ask_u64(Message.GET_QUEUE_NUM)
            device.settle(seconds=0.05)


INDEXED: dict[Message, Callable[[int], bytes]] = {
    Message.SET_VRING_NUM: lambda index: vring_state(index, 128),
    Message.SET_VRING_BASE: lambda index: vring_state(index, 0),
    Message.GET_VRING_BASE: lambda index: vring_state(index, 0),
    Message.SET_VRING_ENABLE: lambda index: vring_state(index, 1),
    Message.SET_VRING_ADDR: lambda index: vring_address(index, 1 << 45, 1 << 45, 1 << 45),
    Message.SET_VRING_KICK: u64,
    Message.SET_VRING_CALL: u64,
    Message.SET_VRING_ERR: u64,
}


@pytest.mark.parametrize("message", INDEXED, ids=lambda message: message.name)
def test_bad_queue_index(lab: Lab, message: Message) -> None:
    indices = [4, 255] if message in ONE_FD else [4, 255, 65536, 0x7FFF_FFFF, 0xFFFF_FFFF]
    for index in indices:
        with lab.attack() as device:
            device.start()
            fds = [device.queues[0].err_fd] if message in ONE_FD else []
            device.channel.send(message, INDEXED[message](index), fds)


def test_no_descriptor_and_still_one(lab: Lab) -> None:
    for message in (Message.SET_VRING_KICK, Message.SET_VRING_CALL, Message.SET_VRING_ERR):
        with lab.attack(dropped=False) as device:
            device.start()
            device.channel.send(message, u64(VRING_NOFD), [device.queues[0].err_fd])
            device.channel.ask_u64(Message.GET_QUEUE_NUM)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("where", ["null", "nowhere", "top", "half", "last byte", "odd"])
def test_ring_outside_memory(lab: Lab, part: str, where: str) -> None:
    with lab.attack() as device:
        device.start_device()
        device.make_queues()
        queue = device.queues[0]
        last = device.memory.regions[1]
        end = last.uva + last.size
        address = {
            "null": 0,
            "nowhere": 1 << 46,
            "top": TOP - 64,
            "half": end - 256,
            "last byte": end - 1,
            "odd": last.uva + 1,
        }[where]
        good = {name: device.memory.uva(getattr(queue, name)) for name in ("desc", "avail", "used")}
        good[part] = address
        channel = device.channel
        channel.send(Message.SET_VRING_NUM, vring_state(0, queue.size))
        channel.send(
            Message.SET_VRING_ADDR, vring_address(0, good["desc"], good["used"], good["avail"])
        )
        channel.send(Message.SET_VRING_KICK, u64(0), [queue.kick_fd])
        queue.kick()


def test_a_ring_across_two_regions(lab: Lab) -> None:
    """Neighbours for the guest, not for us."""
    with lab.attack() as device:
        device.start_device()
        device.make_queues()
        queue = device.queues[0]
        queue.desc = device.memory.regions[1].gpa - 1024
        channel = device.channel
        channel.send(Message.SET_VRING_NUM, vring_state(0, queue.size))
        channel.send(Message.SET_VRING_ADDR, device.ring_address(queue))
        channel.send(Message.SET_VRING_KICK, u64(0), [queue.kick_fd])


def test_start_without_a_ring(lab: Lab) -> None:
    for prepared in (False, True):
        with lab.attack() as device:
            if prepared:
                device.start_device()
            device.make_queues()
            device.channel.send(Message.SET_VRING_KICK, u64(0), [device.queues[0].kick_fd])
            device.channel.send(Message.SET_VRING_ENABLE, vring_state(0, 1))


def test_ring_without_memory(lab: Lab) -> None:
    with lab.attack() as device:
        device.make_queues()
        queue = device.queues[0]
        device.channel.send(Message.SET_VRING_NUM, vring_state(0, queue.size))
        device.channel.send(Message.SET_VRING_ADDR, device.ring_address(queue))
        device.channel.send(Message.SET_VRING_KICK, u64(0), [queue.kick_fd])


@pytest.mark.parametrize("base", [65536, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_bad_ring_base(lab: Lab, base: int) -> None:
    with lab.attack() as device:
        device.channel.send(Message.SET_VRING_BASE, vring_state(0, base))


# ---- configuration space, areas


@pytest.mark.parametrize("message", [Message.GET_CONFIG, Message.SET_CONFIG])
@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 257), (256, 1), (255, 2), (0xFFFF_FFFF, 1), (0xFFFF_FFFF, 0xFFFF_FFFF), (0, 0xFFFF_FFFF)],
)
def test_config_space_beyond_its_end(lab: Lab, message: Message, offset: int, size: int) -> None:
    with lab.attack(dropped=False) as device:
        payload = struct.pack("<III", offset, size, 0) + bytes(min(size, 256))
        device.channel.send(message, payload)
        reply, _ = device.channel.receive_reply(message)
        assert len(reply) == 0  # the protocol's way to say no


def test_config_size_that_is_not_the_payload_s(lab: Lab) -> None:
    for size in (0, 4, 200, 256):
        with lab.attack(dropped=False) as device:
            device.channel.send(Message.GET_CONFIG, struct.pack("<III", 0, size, 0) + bytes(60))
            reply, _ = device.channel.receive_reply(Message.GET_CONFIG)
            assert len(reply) in (0, 12 + size)


def test_config_space_is_written_where_it_is_read_only(lab: Lab) -> None:
    with lab.attack() as device:
        device.channel.send(Message.SET_CONFIG, config_space(0, 60, 0, b"\xff" * 60))


@pytest.mark.parametrize(
    ("queues", "size"),
    [(0, 128), (5, 128), (65535, 128), (1, 0), (1, 2048), (1, 65535), (4, 65535)],
)
def test_inflight_area_of_impossible_size(lab: Lab, queues: int, size: int) -> None:
    for message in (Message.GET_INFLIGHT_FD, Message.SET_INFLIGHT_FD):
        with GuestFiles(1) as fds, lab.attack() as device:
            needs_fd = message == Message.SET_INFLIGHT_FD
            payload = inflight_description(1 << 20, 0, queues, size)
            device.channel.send(message, payload, fds if needs_fd else [])


AREAS = {
    "no bytes": (0, 0, 1, 128),
    "a byte": (1, 0, 1, 128),
    "not enough for one queue": (2048, 0, 1, 128),
    "enough for one of two queues": (2112, 0, 2, 128),
    "larger than its file": (2 << 20, 0, 1, 128),
    "beyond its file": (4096, 1 << 20, 1, 128),
    "offset between pages": (4096, 17, 1, 128),
    "wraps round": (4096, TOP - 4096, 1, 128),
    "everything": (TOP - 1, 0, 1, 128),
}


@pytest.mark.parametrize("name", AREAS)
def test_inflight_area_that_is_not_there(lab: Lab, name: str) -> None:
    with GuestFiles(1) as fds, lab.attack() as device:
        device.channel.send(Message.SET_INFLIGHT_FD, inflight_description(*AREAS[name]), fds)


def test_ring_larger_than_its_inflight_area(lab: Lab) -> None:
    """Refused, or served without recording; but nothing is written behind the area's end."""
    with lab.attack(dropped=False, queue_size=64) as device, GuestFiles(1) as fds:
        size = 64 * 17
        device.share_memory()
        device.set_features(device.features)
        device.channel.send(Message.SET_INFLIGHT_FD, inflight_description(size, 0, 1, 64), fds)
        device.make_queues()
        queue = device.queues[0]
        device.channel.send(Message.SET_VRING_NUM, vring_state(0, 128))
        device.channel.send(Message.SET_VRING_ADDR, device.ring_address(queue))
        device.channel.send(Message.SET_VRING_KICK, u64(0), [queue.kick_fd])
        device.channel.send(Message.SET_VRING_ENABLE, vring_state(0, 1))
        queue.size = 128
        header, status = device.memory.alloc(16), device.memory.alloc(1)
        device.memory.write(header, REQUEST_HEADER.pack(Type.FLUSH, 0, 0))
        device.memory.write(queue.desc + 16 * 127, DESC.pack(header, 16, 1, 0))
        queue.set_descriptor(0, status, 1, 2)
        queue.publish(127)
        queue.kick()
        device.channel.wait_closed(0.1)
        assert os.pread(fds[0], 4096, size) == bytes(4096)


def test_many_inflight_areas(lab: Lab) -> None:
    before = lab.open_files()
    with lab.attack(dropped=False) as device:
        for _ in range(50):
            device.get_inflight().close()
            device.inflight = None
        device.start()
        for _ in range(20):
            device.set_inflight()
        device.read(0, 512)
    lab.until_files_are(before)


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (2 << 20, 0), (4096, 1 << 20), (4096, 17), (4096, TOP - 4096)]
)
def test_dirty_log_that_is_not_there(lab: Lab, size: int, offset: int) -> None:
    with GuestFiles(1) as fds, lab.attack() as device:
        device.start()
        device.channel.send(Message.SET_LOG_BASE, struct.pack("<QQ", size, offset), fds)


def test_a_dirty_log_too_small_for_the_memory(lab: Lab) -> None:
    with lab.attack(dropped=False) as device:
        device.start()
        device.start_log(2)
        device.read(0, 4096)
        request = device.submit(0, length=4096, in_at=device.memory.regions[1].gpa + 4096)
        device.wait(request)


def test_a_ring_logged_at_an_address_out_of_this_world(lab: Lab) -> None:
    with lab.attack(dropped=False) as device:
        device.start()
        device.start_log()
        queue = device.queues[0]
        for log in (1 << 40, TOP - 8, TOP - 1):
            uva = device.memory.uva
            device.tell(
                Message.SET_VRING_ADDR,
                vring_address(
                    0, uva(queue.desc), uva(queue.used), uva(queue.avail), flags=1, log=log
                ),
            )
            device.read(0, 4096)


def test_the_back_end_channel_is_no_socket(lab: Lab) -> None:
    with GuestFiles(1) as fds, lab.attack(dropped=False) as device:
        device.start()
        device.channel.send(Message.SET_BACKEND_REQ_FD, b"", fds)
        device.read(0, 512)


def test_everything_at_once(lab: Lab) -> None:
    """Hostile connections side by side; one is served, the others wait."""
    lab.noise("disk")
    channels = [Channel.connect(lab.path("disk")) for _ in range(8)]
    for number, channel in enumerate(channels):
        channel.send_bytes(bytes([number]) * 64)
    for channel in channels:
        assert channel.wait_closed()
        channel.close()
    lab.works("disk")


def test_memory_messages_out_of_order(lab: Lab) -> None:
    """Adding, removing and replacing, with a queue that runs all the while."""
    memory = GuestMemory([(0, 4 << 20), (1 << 32, 1 << 20)])
    with lab.attack(dropped=False, memory=memory) as device:
        device.start()
        extra = device.memory.regions[1]
        for _ in range(10):
            device.remove_region(extra)
            device.read(0, 512)
            payload, fds = device.memory.table()
            device.tell(Message.SET_MEM_TABLE, payload, fds)
            device.shared = list(device.memory.regions)
            device.checked(device.submit(0, length=512, in_at=extra.gpa))
