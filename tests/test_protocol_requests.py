# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests and their statuses, as virtio 1.2 section 5.2.6 has them."""

from __future__ import annotations

import os
import random

import psutil
import pytest
from frontend import Device, Status, Type
from frontend.lab import DISK_SIZE, MIB, NULL_SIZE, SERIAL, Lab
from frontend.protocol import DISCARD_SEGMENT, NO_STATUS, REQUEST_HEADER
from frontend.virtqueue import DESC_F_INDIRECT, Segment

pytest_plugins = ["frontend.fixtures"]

SECTORS = DISK_SIZE // 512


def status(device: Device, *arguments: object, **options: object) -> int:
    request = device.submit(*arguments, **options)  # type: ignore[arg-type]
    device.wait(request)
    return request.status


def test_write_then_read(lab: Lab) -> None:
    data = random.Random(1).randbytes(64 * 1024)
    with lab.device() as device:
        device.write(8192, data)
        assert device.read(8192, len(data)) == data
        device.flush()
    with lab.file("disk").open("rb") as file:
        file.seek(8192)
        assert file.read(len(data)) == data


def test_used_length_counts_what_was_written(lab: Lab) -> None:
    with lab.device() as device:
        assert device.run(Type.IN, 0, length=4096).used_length == 4097
        assert device.run(Type.OUT, 0, bytes(4096)).used_length == 1
        assert device.run(Type.FLUSH).used_length == 1
        assert device.run(Type.GET_ID, length=20).used_length == 21
        assert device.run(99).used_length == 1


def test_serial(lab: Lab) -> None:
    with lab.device() as device:
        assert device.get_id() == SERIAL.encode()
    with lab.device("null") as device:
        assert device.run(Type.GET_ID, length=20).status == Status.OK


def test_serial_into_buffers_of_other_sizes(lab: Lab) -> None:
    """A driver must give 20 bytes. If it does not, nothing else may be overwritten."""
    with lab.device() as device:
        for length in (1, 19, 21, 512):
            request = device.run(Type.GET_ID, length=length)
            assert request.status in (Status.OK, Status.IOERR)
            if request.status == Status.OK:
                assert request.data[:20] == SERIAL.encode()[:length]


@pytest.mark.parametrize("type_", [2, 3, 7, 9, 10, 14, 16, 99, 0x8000_0000, 0xFFFF_FFFF])
def test_unknown_types(lab: Lab, type_: int) -> None:
    with lab.device() as device:
        assert status(device, type_) == Status.UNSUPP
        assert status(device, type_, 0, bytes(512)) == Status.UNSUPP
        assert status(device, type_, length=512) == Status.UNSUPP


@pytest.mark.parametrize(
    "sector",
    [SECTORS - 7, SECTORS, SECTORS + 1, 1 << 32, (1 << 55) - 8, 1 << 55, (1 << 64) - 8, 2**64 - 1],
)
def test_beyond_the_end(lab: Lab, sector: int) -> None:
    with lab.device() as device:
        assert status(device, Type.IN, sector, length=4096) == Status.IOERR
        assert status(device, Type.OUT, sector, bytes(4096)) == Status.IOERR
        for type_ in (Type.DISCARD, Type.WRITE_ZEROES):
            data = DISCARD_SEGMENT.pack(sector, 8, 0)
            assert status(device, type_, data=data) == Status.IOERR
    assert lab.file("disk").stat().st_size == DISK_SIZE


def test_the_last_sector(lab: Lab) -> None:
    with lab.device() as device:
        device.write(DISK_SIZE - 512, b"e" * 512)
        assert device.read(DISK_SIZE - 512, 512) == b"e" * 512
        device.write_zeroes(DISK_SIZE - 512, 512)
        assert device.read(DISK_SIZE - 512, 512) == bytes(512)


@pytest.mark.parametrize("length", [1, 511, 513, 4095, 4097])
def test_odd_lengths(lab: Lab, length: int) -> None:
    with lab.device() as device:
        assert status(device, Type.IN, 0, length=length) == Status.IOERR
        assert status(device, Type.OUT, 0, bytes(length)) == Status.IOERR


def test_nothing_to_transfer(lab: Lab) -> None:
    with lab.device() as device:
        for type_ in (Type.IN, Type.OUT):
            assert status(device, type_, 0) in (Status.OK, Status.IOERR)
        device.read(0, 512)


def test_data_in_the_wrong_direction(lab: Lab) -> None:
    """A read with data for the device, a write with room for some."""
    with lab.device() as device:
        device.write(0, b"w" * 512)
        assert status(device, Type.IN, 0, b"x" * 512) in (Status.OK, Status.IOERR)
        assert status(device, Type.OUT, 0, length=512) in (Status.OK, Status.IOERR)
        assert device.read(0, 512) == b"w" * 512


@pytest.mark.parametrize("type_", [Type.DISCARD, Type.WRITE_ZEROES])
@pytest.mark.parametrize("size", [0, 1, 15, 17, 24, 31])
def test_segments_of_odd_size(lab: Lab, type_: int, size: int) -> None:
    with lab.device() as device:
        data = DISCARD_SEGMENT.pack(0, 8, 0) * 2
        got = status(device, type_, data=data[:size])
        assert got in (Status.IOERR, Status.UNSUPP)


@pytest.mark.parametrize("flags", [2, 4, 0x8000_0000, 0xFFFF_FFFE, 3])
def test_unknown_segment_flags(lab: Lab, flags: int) -> None:
    with lab.device() as device:
        data = DISCARD_SEGMENT.pack(0, 8, flags)
        assert status(device, Type.DISCARD, data=data) == Status.UNSUPP
        assert status(device, Type.WRITE_ZEROES, data=data) == Status.UNSUPP


def test_discard_does_not_know_unmap(lab: Lab) -> None:
    with lab.device() as device:
        data = DISCARD_SEGMENT.pack(0, 8, 1)
        assert status(device, Type.DISCARD, data=data) == Status.UNSUPP


def test_discard_reaches_the_file(lab: Lab) -> None:
    with lab.device() as device:
        device.write(MIB, b"d" * MIB)
        device.flush()
        before = lab.file("disk").stat().st_blocks
        device.discard((MIB, MIB))
        assert device.read(MIB, MIB) == bytes(MIB)
    assert lab.file("disk").stat().st_blocks <= before - MIB // 512


@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes(lab: Lab, unmap: bool) -> None:
    with lab.device() as device:
        device.write(0, b"z" * 16384)
        device.write_zeroes(4096, 4096, unmap=unmap)
        assert device.read(0, 16384) == b"z" * 4096 + bytes(4096) + b"z" * 8192


def test_several_segments(lab: Lab) -> None:
    with lab.device() as device:
        allowed = device.config().max_discard_seg
        count = min(allowed, 16)
        device.write(0, b"s" * 65536)
        data = b"".join(DISCARD_SEGMENT.pack(16 * n, 8, 0) for n in range(count))
        assert status(device, Type.WRITE_ZEROES, data=data) == Status.OK
        for number in range(8):
            got = device.read(number * 8192, 8192)
            expected = bytes(4096) if number < count else b"s" * 4096
            assert got == expected + b"s" * 4096
        assert status(device, Type.DISCARD, data=data) == Status.OK


def test_one_bad_segment_among_good_ones(lab: Lab) -> None:
    with lab.device() as device:
        if device.config().max_write_zeroes_seg < 2:
            pytest.skip("one segment to the request")
        good = DISCARD_SEGMENT.pack(0, 8, 0)
        bad = DISCARD_SEGMENT.pack(SECTORS, 8, 0)
        odd = DISCARD_SEGMENT.pack(0, 8, 2)
        for data in (good + bad, bad + good):
            assert status(device, Type.WRITE_ZEROES, data=data) == Status.IOERR
        for data in (good + odd, odd + good):
            assert status(device, Type.WRITE_ZEROES, data=data) == Status.UNSUPP


def test_too_many_segments(lab: Lab) -> None:
    with lab.device() as device:
        for type_, most in (
            (Type.DISCARD, device.config().max_discard_seg),
            (Type.WRITE_ZEROES, device.config().max_write_zeroes_seg),
        ):
            data = DISCARD_SEGMENT.pack(0, 8, 0) * (most + 1)
            assert status(device, type_, data=data) in (Status.IOERR, Status.UNSUPP)


def test_discards_and_zeroes_beyond_16_mib(lab: Lab) -> None:
    with lab.device() as device:
        device.write(DISK_SIZE - MIB, b"l" * 4096)
        device.write_zeroes(16 * MIB, 48 * MIB, unmap=True)
        assert device.read(DISK_SIZE - MIB, 4096) == bytes(4096)
        device.write(DISK_SIZE - MIB, b"l" * 4096)
        device.discard((16 * MIB, 48 * MIB))
        assert device.read(DISK_SIZE - MIB, 4096) == bytes(4096)
    with lab.device("null") as device:
        most = device.config().max_write_zeroes_sectors * 512
        device.write_zeroes(0, min(most, NULL_SIZE))


def test_a_read_only_export_refuses_writes(lab: Lab) -> None:
    with lab.device("ro") as device:
        assert device.read(0, 4096) == bytes(4096)
        assert status(device, Type.OUT, 0, b"x" * 512) == Status.IOERR
        for type_ in (Type.DISCARD, Type.WRITE_ZEROES):
            data = DISCARD_SEGMENT.pack(0, 8, 0)
            assert status(device, type_, data=data) in (Status.IOERR, Status.UNSUPP)
        assert status(device, Type.FLUSH) == Status.OK
    assert not any(lab.file("ro").read_bytes())


def test_larger_logical_blocks(lab: Lab) -> None:
    """As QEMU: what is not aligned to the guest's own sector size is an error."""
    with lab.device("sectors") as device:
        device.write(4096, b"b" * 8192)
        device.write_zeroes(8192, 4096)
        for sector, length in ((1, 4096), (0, 512), (8, 4608), (7, 8192)):
            assert status(device, Type.IN, sector, length=length) == Status.IOERR
            assert status(device, Type.OUT, sector, bytes(length)) == Status.IOERR
            for type_ in (Type.DISCARD, Type.WRITE_ZEROES):
                data = DISCARD_SEGMENT.pack(sector, length // 512, 0)
                assert status(device, type_, data=data) == Status.IOERR


def test_an_error_is_one_request_s_alone(lab: Lab) -> None:
    with lab.device() as device:
        device.write(0, b"g" * 512)
        requests = []
        for number in range(20):
            good = number % 2 == 0
            requests.append(device.submit(Type.IN, 0 if good else SECTORS, length=512))
        device.wait(*requests)
        for number, request in enumerate(requests):
            assert request.status == (Status.IOERR if number % 2 else Status.OK)
            if number % 2 == 0:
                assert request.data == b"g" * 512


# ---- descriptors in any arrangement

OUT_SPLITS = [None, [1], [8, 8], [4, 4, 8], [15], [16], [17], [1] * 20, [16, 512], [100, 412]]
IN_SPLITS = [None, [512], [513], [1], [511, 1, 1], [1] * 20, [512, 512], [1023], [1000, 25]]


@pytest.mark.parametrize("indirect_from", [None, 0])
@pytest.mark.parametrize("out_split", OUT_SPLITS, ids=str)
def test_header_and_data_cut_anywhere(
    lab: Lab, out_split: list[int] | None, indirect_from: int | None
) -> None:
    data = random.Random(2).randbytes(1024)
    with lab.device() as device:
        request = device.submit(Type.OUT, 8, data, out_split=out_split, indirect_from=indirect_from)
        device.checked(request)
        assert device.read(4096, 1024) == data


@pytest.mark.parametrize("indirect_from", [None, 0])
@pytest.mark.parametrize("in_split", IN_SPLITS, ids=str)
def test_data_and_status_cut_anywhere(
    lab: Lab, in_split: list[int] | None, indirect_from: int | None
) -> None:
    data = random.Random(3).randbytes(1024)
    with lab.device() as device:
        device.write(4096, data)
        request = device.submit(
            Type.IN, 8, length=1024, in_split=in_split, indirect_from=indirect_from
        )
        device.checked(request)
        assert request.data == data
        assert request.used_length == 1025


def test_direct_descriptors_before_an_indirect_one(lab: Lab) -> None:
    """virtio 1.2, 2.7.5.3.2: a device must handle that."""
    with lab.device() as device:
        device.write(0, b"i" * 1024)
        for indirect_from in (1, 2):
            request = device.submit(
                Type.IN, 0, length=1024, out_split=[4, 12], indirect_from=indirect_from
            )
            device.checked(request)
            assert request.data == b"i" * 1024


def test_as_many_segments_as_promised(lab: Lab) -> None:
    with lab.device(queue_size=256) as device:
        count = min(device.config().seg_max, 254)
        data = random.Random(4).randbytes(512 * count)
        for indirect_from in (None, 0):
            request = device.submit(
                Type.OUT, 0, data, out_split=[16] + [512] * count, indirect_from=indirect_from
            )
            device.checked(request)
            request = device.submit(
                Type.IN, 0, length=len(data), in_split=[512] * count, indirect_from=indirect_from
            )
            device.checked(request)
            assert request.data == data


def test_more_segments_than_a_system_call_takes(lab: Lab) -> None:
    """1024 pieces of one byte and more are one request all the same."""
    with lab.device(queue_size=1024) as device:
        data = random.Random(5).randbytes(1024)
        request = device.submit(Type.OUT, 0, data, out_split=[16] + [1] * 1006)
        device.checked(request)
        request = device.submit(Type.IN, 0, length=1024, in_split=[1] * 1006)
        device.checked(request)
        assert request.data == data


def test_status_is_written_last_and_nothing_else(lab: Lab) -> None:
    """An error leaves the bytes around the status alone."""
    with lab.device() as device:
        at = device.memory.alloc(2048) + 512
        device.memory.write(at - 512, b"#" * 2048)
        request = device.submit(Type.FLUSH, in_at=at)
        device.checked(request)
        assert device.memory.read(at - 512, 512) == b"#" * 512
        assert device.memory.read(at + 1, 512) == b"#" * 512


@pytest.mark.parametrize("before", [1, 8, 16, 17, 100, 512, 1040, 4112])
def test_a_request_across_two_regions(lab: Lab, before: int) -> None:
    data = random.Random(before).randbytes(4096)
    with lab.device() as device:
        border = device.memory.regions[1].gpa
        for indirect_from in (None, 0):
            request = device.submit(
                Type.OUT, 0, data, out_at=border - before, indirect_from=indirect_from
            )
            device.checked(request)
            assert device.read(0, 4096) == data
            device.memory.write(border - 4200, bytes(8400))
            request = device.submit(
                Type.IN, 0, length=4096, in_at=border - before, indirect_from=indirect_from
            )
            device.checked(request)
            assert request.data == data


def test_an_indirect_table_across_two_regions(lab: Lab) -> None:
    with lab.device() as device:
        border = device.memory.regions[1].gpa
        data = random.Random(6).randbytes(4096)
        device.write(0, data)
        for before in (16, 32, 8, 40, 1):
            queue = device.queues[0]
            out, in_ = device.memory.alloc(16), device.memory.alloc(4097)
            device.memory.write(out, bytes(16))
            device.memory.write(in_ + 4096, bytes([NO_STATUS]))
            table = queue.table(
                [Segment(out, 16), Segment(in_, 4096, True), Segment(in_ + 4096, 1, True)]
            )
            device.memory.write(border - before, table)
            head = queue.free.pop()
            queue.chains[head] = [head]
            queue.set_descriptor(head, border - before, len(table), DESC_F_INDIRECT)
            queue.submit(head)
            queue.wait(alive=device.channel.sock.fileno())
            assert device.memory.read(in_, 4097) == data + b"\0"


def test_random_requests_keep_the_model(lab: Lab) -> None:
    """Overlapping in time only where it does not matter; against a plain bytearray."""
    rng = random.Random(7)
    size = 4 * MIB
    with lab.device(queues=4) as device:
        device.write_zeroes(0, size)
        model = bytearray(size)
        for _ in range(300):
            blocks = rng.sample(range(size // 65536), 6)
            requests = []
            for queue, block in enumerate(blocks):
                offset = block * 65536 + 512 * rng.randrange(64)
                length = 512 * rng.randrange(1, 64)
                sector = offset // 512
                kind = rng.randrange(4)
                if kind == 0:
                    data = rng.randbytes(length)
                    requests.append((device.submit(Type.OUT, sector, data, queue=queue % 4), b""))
                    model[offset : offset + length] = data
                elif kind == 1:
                    segment = DISCARD_SEGMENT.pack(sector, length // 512, rng.randrange(2))
                    request = device.submit(Type.WRITE_ZEROES, data=segment, queue=queue % 4)
                    requests.append((request, b""))
                    model[offset : offset + length] = bytes(length)
                else:
                    request = device.submit(Type.IN, sector, length=length, queue=queue % 4)
                    requests.append((request, bytes(model[offset : offset + length])))
            device.wait(*(request for request, _ in requests))
            for request, expected in requests:
                assert request.status == Status.OK
                assert request.data == expected
        device.flush()
    with lab.file("disk").open("rb") as file:
        assert file.read(size) == model


def counters(lab: Lab, export: str) -> dict[str, int]:
    """What the export has counted so far, by QAPI's names."""
    with lab.qmp() as qmp:
        stats = next(e for e in qmp.command("query-blockstats") if e.get("export") == export)
        described = next(e for e in qmp.command("query-block-exports") if e["id"] == export)
    found = {name: n for name, n in stats["stats"].items() if name.endswith("_operations")}
    return {**found, "unsupported": described["unsupported-requests"]}


@pytest.mark.parametrize(
    ("export", "type_", "sector", "data", "length", "counted"),
    [
        ("disk", Type.IN, SECTORS, b"", 512, "invalid_rd_operations"),
        ("disk", Type.IN, 0, b"", 100, "invalid_rd_operations"),
        ("disk", Type.OUT, SECTORS - 1, bytes(1024), 0, "invalid_wr_operations"),
        ("ro", Type.OUT, 0, bytes(512), 0, "invalid_wr_operations"),
        ("sectors", Type.OUT, 1, bytes(4096), 0, "invalid_wr_operations"),
        ("disk", Type.DISCARD, 0, bytes(15), 0, "invalid_unmap_operations"),
        ("disk", Type.DISCARD, 0, DISCARD_SEGMENT.pack(0, 8, 1), 0, "invalid_unmap_operations"),
        (
            "disk",
            Type.DISCARD,
            0,
            DISCARD_SEGMENT.pack(SECTORS, 1, 0),
            0,
            "invalid_unmap_operations",
        ),
        ("disk", Type.WRITE_ZEROES, 0, DISCARD_SEGMENT.pack(0, 1, 2), 0, "invalid_wr_operations"),
        ("disk", Type.GET_ID, 0, b"", 19, "invalid_rd_operations"),
        ("disk", 99, 0, b"", 0, "unsupported"),
    ],
)
def test_what_is_refused_is_counted(
    lab: Lab, export: str, type_: int, sector: int, data: bytes, length: int, counted: str
) -> None:
    """As QEMU does: refused is neither done nor failed, and has a number of its own."""
    before = counters(lab, export)
    with lab.device(export) as device:
        for _ in range(3):
            assert device.run(type_, sector, data, length=length).status != Status.OK
    after = counters(lab, export)
    changed = {name: after[name] - count for name, count in before.items() if after[name] != count}
    assert changed == {counted: 3}


@pytest.mark.skipif("VHOSTBLK_SANITIZED" in os.environ, reason="sanitizers keep freed memory")
def test_memory_for_long_requests_is_given_back(lab: Lab) -> None:
    """Every entry of a ring has had a request of 1000 buffers once: 16 MiB, if they were kept."""

    def resident() -> int:
        return psutil.Process(lab.daemon.pid).memory_info().rss

    with lab.device("null", queue_size=1024) as device:
        queue, memory = device.queues[0], device.memory
        device.read(0, 512)
        header, status = memory.alloc(16), memory.alloc(1)
        memory.write(header, REQUEST_HEADER.pack(Type.IN, 0, 0))
        data = [Segment(memory.alloc(512), 512, True)] * 1000
        chain = queue.table([Segment(header, 16), *data, Segment(status, 1, True)])
        table = memory.alloc(len(chain))
        memory.write(table, chain)
        for index in range(queue.size):
            queue.set_descriptor(index, table, len(chain), DESC_F_INDIRECT)
        before = resident()
        queue.publish(*range(queue.size))
        queue.kick()
        while queue.used_idx != queue.size + 1:
            device.settle(seconds=0.01)
        assert memory.read(status, 1)[0] == Status.OK
        assert resident() - before < 8 * MIB
