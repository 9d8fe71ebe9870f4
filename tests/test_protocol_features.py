# SPDX-License-Identifier: GPL-2.0-or-later
"""What the vhost-user-blk export offers, and its configuration space."""

from __future__ import annotations

import struct

import pytest
from frontend import Device, Feature, Message, ProtocolFeature, Qmp, vhostblk
from frontend.device import CONFIG_WCE_OFFSET
from frontend.lab import DISK_SIZE, MIB, NULL_SIZE, Lab, export_options, node_options
from frontend.protocol import config_space, u64

pytest_plugins = ["frontend.fixtures"]


def offered(mask: int) -> set[int]:
    return {bit for bit in range(64) if mask >> bit & 1}


def test_virtio_features(lab: Lab) -> None:
    with lab.device() as device:
        assert offered(device.offered) == {
            Feature.SEG_MAX,
            Feature.BLK_SIZE,
            Feature.FLUSH,
            Feature.TOPOLOGY,
            Feature.CONFIG_WCE,
            Feature.MQ,
            Feature.DISCARD,
            Feature.WRITE_ZEROES,
            Feature.LOG_ALL,
            Feature.RING_INDIRECT_DESC,
            Feature.RING_EVENT_IDX,
            Feature.PROTOCOL_FEATURES,
            Feature.VERSION_1,
        } | ({Feature.NOTIFY_ON_EMPTY} & offered(device.offered))


def test_a_read_only_export_says_so(lab: Lab) -> None:
    with lab.device("ro") as device:
        assert device.offered >> Feature.RO & 1
        assert not device.offered >> Feature.DISCARD & 1
        assert not device.offered >> Feature.WRITE_ZEROES & 1


def test_protocol_features(lab: Lab) -> None:
    with lab.device() as device:
        assert offered(device.offered_protocol) >= {
            ProtocolFeature.MQ,
            ProtocolFeature.CONFIG,
            ProtocolFeature.REPLY_ACK,
            ProtocolFeature.CONFIGURE_MEM_SLOTS,
            ProtocolFeature.BACKEND_REQ,
            ProtocolFeature.INFLIGHT_SHMFD,
            ProtocolFeature.LOG_SHMFD,
        }
        assert not device.offered_protocol >> ProtocolFeature.INBAND_NOTIFICATIONS & 1


def test_config_space(lab: Lab) -> None:
    with lab.device() as device:
        config = device.config()
        assert config.capacity == DISK_SIZE // 512
        assert config.blk_size == 512
        assert config.num_queues == device.queue_num() == 4
        # A request has two descriptors besides its data, and an indirect table
        # may not be longer than the ring.
        assert config.seg_max >= 1
        assert config.wce == 1
        assert config.min_io_size >= 1
        more_than_16_mib = 16 * MIB // 512
        assert config.max_discard_sectors > more_than_16_mib
        assert config.max_write_zeroes_sectors > more_than_16_mib
        assert config.max_discard_seg >= 1
        assert config.max_write_zeroes_seg >= 1
        assert config.discard_sector_alignment >= 1
        assert config.write_zeroes_may_unmap == 1


def test_other_options_show_in_config_space(lab: Lab) -> None:
    with lab.device("sectors") as device:
        config = device.config()
        assert config.blk_size == 4096
        assert config.wce == 0
        assert config.capacity == MIB // 512
    with lab.device("null") as device:
        assert device.config().capacity == NULL_SIZE // 512


def test_enough_queues_for_a_large_guest_by_default(lab: Lab) -> None:
    with lab.device("plain") as device:
        assert device.queue_num() == 256  # QEMU asks for one per vCPU, or does not start
        assert device.config().num_queues == device.queue_num()


def test_config_can_be_read_in_pieces(lab: Lab) -> None:
    with lab.device() as device:
        whole = device.config_bytes(0, 60)
        # QEMU asks for more than virtio 1.0 defines, libblkio and others for less.
        assert device.config_bytes(0, 8) == whole[:8]
        assert device.config_bytes(0, 32) == whole[:32]
        for offset, size in ((8, 4), (20, 4), (32, 1), (34, 2), (36, 24), (59, 1)):
            assert device.config_bytes(offset, size) == whole[offset : offset + size]
        assert device.config_bytes(0, 256)[:60] == whole


@pytest.mark.parametrize("wce", [0, 1])
def test_the_write_cache_is_switched_through_the_config_space(lab: Lab, wce: int) -> None:
    with lab.device() as device:
        device.set_config(CONFIG_WCE_OFFSET, bytes([wce]))
        assert device.config().wce == wce
        device.write(0, b"c" * 4096)
        device.flush()
        assert device.read(0, 4096) == b"c" * 4096


def test_the_write_cache_stays_as_it_is_when_the_front_end_comes_back(lab: Lab) -> None:
    """QEMU does not say it again, and the guest relies on it."""
    with lab.device() as device:
        device.set_config(CONFIG_WCE_OFFSET, b"\0")
        try:
            device.reconnect()
            assert device.config().wce == 0
        finally:
            device.set_config(CONFIG_WCE_OFFSET, b"\1")


@pytest.mark.parametrize("offset", [0, 8, 12, 20, 31, 33, 34, 36, 56])
def test_read_only_config_fields_stay(lab: Lab, offset: int) -> None:
    with lab.attack(dropped=False) as device:
        before = device.config_bytes(0, 60)
        verdict = device.channel.acknowledged(
            Message.SET_CONFIG, config_space(offset, 1, 0, b"\x5a")
        )
        assert verdict != 0
        assert device.config_bytes(0, 60) == before
    with lab.device() as device:
        assert device.config_bytes(0, 60) == before


def test_without_protocol_features_the_rings_are_enabled_at_once(lab: Lab) -> None:
    features = ~(1 << Feature.PROTOCOL_FEATURES | 1 << Feature.LOG_ALL)
    with lab.device(features=features, protocol_features=0) as device:
        device.stop()
        queue = device.queues[0]
        device.enable_queue(queue, False)
        device.set_features(device.features)
        device.start_queue(queue)
        device.read(0, 4096)


def test_only_a_few_protocol_features(lab: Lab) -> None:
    """An old front-end: no acknowledgements, no slots, no in-flight area."""
    with lab.device(protocol_features=1 << ProtocolFeature.CONFIG) as device:
        device.write(4096, b"o" * 4096)
        assert device.read(4096, 4096) == b"o" * 4096


def test_memory_slots(lab: Lab) -> None:
    with lab.device() as device:
        assert device.channel.ask_u64(Message.GET_MAX_MEM_SLOTS) >= 32


def test_a_legacy_driver_is_refused(lab: Lab) -> None:
    with lab.attack() as device:
        device.channel.send(Message.SET_FEATURES, u64(device.features & ~(1 << Feature.VERSION_1)))


def test_features_that_were_not_offered_are_refused(lab: Lab) -> None:
    with lab.attack() as device:
        packed = device.features | 1 << Feature.RING_PACKED
        device.channel.send(Message.SET_FEATURES, u64(packed))


def test_a_failed_message_is_not_acknowledged_as_success(lab: Lab) -> None:
    with lab.attack(dropped=False) as device:
        wrong = struct.pack("<II", device.queue_num(), 128)
        assert device.channel.acknowledged(Message.SET_VRING_NUM, wrong) != 0


def test_a_resize_reaches_the_guest(lab: Lab) -> None:
    with lab.device() as device, lab.qmp() as qmp:
        qmp.command("block_resize", **{"node-name": "disk", "size": DISK_SIZE + MIB})
        try:
            assert device.backend_message() == 2
            assert device.config().capacity == (DISK_SIZE + MIB) // 512
            device.write(DISK_SIZE, b"r" * 4096)
            assert device.read(DISK_SIZE, 4096) == b"r" * 4096
        finally:
            qmp.command("block_resize", **{"node-name": "disk", "size": DISK_SIZE})
        assert device.backend_message() == 2
        assert device.config().capacity == DISK_SIZE // 512
        assert device.run(0, DISK_SIZE // 512, length=512).status == 1


def test_a_resize_without_a_front_end(lab: Lab) -> None:
    mark = lab.daemon.mark()
    with lab.qmp() as qmp:
        qmp.command("block_resize", **{"node-name": "disk", "size": DISK_SIZE + MIB})
        with lab.device() as device:
            assert device.config().capacity == (DISK_SIZE + MIB) // 512
        qmp.command("block_resize", **{"node-name": "disk", "size": DISK_SIZE})
    assert lab.daemon.lines(mark) == []


def test_a_front_end_that_never_reads_its_resizes_stops_nobody(lab: Lab) -> None:
    with lab.device() as device, lab.qmp() as qmp:
        for _ in range(400):
            for size in (DISK_SIZE + MIB, DISK_SIZE):
                qmp.command("block_resize", **{"node-name": "disk", "size": size})
        assert device.config().capacity == DISK_SIZE // 512
        device.read(0, 4096)


def test_sigterm_with_a_front_end_that_never_reads_its_resizes() -> None:
    arguments = [*node_options("null"), *export_options("null"), "--control", "{dir}/qmp.sock"]
    with vhostblk(*arguments) as daemon, Device(daemon.socket("null")):
        with Qmp(daemon.socket("qmp")) as qmp:
            for size in range(512, 512 * 1000, 512):
                qmp.command("block_resize", **{"node-name": "null", "size": size})
        assert daemon.terminate() == 0
