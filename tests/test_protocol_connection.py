# SPDX-License-Identifier: GPL-2.0-or-later
"""Front-ends come and go."""

from __future__ import annotations

import select
import socket
import subprocess
import sys

import pytest
from frontend import Channel, Device, Message, ProtocolFeature, Status, Type, vhostblk
from frontend.device import WANTED_PROTOCOL
from frontend.lab import DISK_SIZE, Lab, export_options, node_options
from frontend.protocol import HEADER, Flag

pytest_plugins = ["frontend.fixtures"]

NO_INFLIGHT = WANTED_PROTOCOL & ~(1 << ProtocolFeature.INFLIGHT_SHMFD)


def test_hanging_up_is_no_event(lab: Lab) -> None:
    """Neither the end of the process (libvhost-user's own reader exits) nor a log line."""
    mark = lab.daemon.mark()
    for _ in range(20):
        Channel.connect(lab.path("disk")).close()
    for _ in range(20):
        device = lab.device()
        device.connect()
        device.close()
    for _ in range(20):
        with lab.device() as device:
            device.read(0, 4096)
    lab.works("disk")
    assert lab.daemon.lines(mark) == []


def test_hanging_up_with_requests_in_flight(lab: Lab) -> None:
    for _ in range(5):
        with lab.device("slow", queues=2) as device:
            for number in range(20):
                device.submit(Type.IN, number, length=4096, queue=number % 2)
    lab.works("slow")


def test_no_file_stays_open(lab: Lab) -> None:
    lab.works("disk")
    before = lab.open_files()
    for _ in range(10):
        with lab.device(queues=4) as device:
            device.start_log()
            device.read(0, 512)
            device.reset()
            device.start()
    lab.works("disk")
    lab.until_files_are(before)


def test_a_second_front_end_waits_for_the_first(lab: Lab) -> None:
    with lab.device() as first:
        second = Channel.connect(lab.path("disk"))
        try:
            second.send(Message.GET_FEATURES)
            assert not select.select([second.sock], [], [], 0.3)[0]
            first.read(0, 4096)
            first.close()
            second.receive_reply(Message.GET_FEATURES)
        finally:
            second.close()
    lab.works("disk")


def test_front_ends_queue_up(lab: Lab) -> None:
    waiting = [Channel.connect(lab.path("disk")) for _ in range(5)]
    for channel in waiting:
        channel.send(Message.GET_QUEUE_NUM)
    for channel in waiting:
        channel.receive_reply(Message.GET_QUEUE_NUM)
        channel.close()
    lab.works("disk")


def test_a_message_in_small_pieces(lab: Lab) -> None:
    channel = Channel.connect(lab.path("disk"))
    try:
        for _ in range(3):
            for byte in HEADER.pack(Message.GET_FEATURES, Flag.VERSION, 0):
                channel.send_bytes(bytes([byte]))
            channel.receive_reply(Message.GET_FEATURES)
    finally:
        channel.close()


def test_messages_without_waiting_for_answers(lab: Lab) -> None:
    channel = Channel.connect(lab.path("disk"))
    try:
        for _ in range(100):
            channel.send(Message.GET_FEATURES)
        replies = {channel.receive_reply(Message.GET_FEATURES)[0] for _ in range(100)}
        assert len(replies) == 1
    finally:
        channel.close()


def test_a_front_end_that_does_not_read_its_answers(lab: Lab) -> None:
    channel = Channel.connect(lab.path("disk"), timeout=0.5)
    try:
        with pytest.raises(TimeoutError):
            for _ in range(100_000):
                channel.send(Message.GET_FEATURES)
        lab.bystander.read(0, 4096)
    finally:
        channel.close()
    lab.works("disk")


def test_an_inherited_listening_socket() -> None:
    """addr.type=fd, as a service manager passes it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("")  # a name the kernel chooses
    listener.listen()
    with listener:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vhostblk", "serve"),
                *("--blockdev", "driver=null-co,node-name=n,size=1048576,read-zeroes=on"),
                "--export",
                f"type=vhost-user-blk,id=e,node-name=n,addr.type=fd,addr.str={listener.fileno()}",
            ],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(2):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.connect(listener.getsockname())
                channel = Channel(sock)
                assert channel.ask_u64(Message.GET_FEATURES)
                channel.close()
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()


# ---- the back-end dies and comes back, without an in-flight area


def test_a_restart_goes_on_at_the_used_index() -> None:
    arguments = [*node_options("disk"), *export_options("disk")]
    with vhostblk(*arguments, files={"disk.raw": DISK_SIZE}) as daemon:
        with Device(daemon.socket("disk"), protocol_features=NO_INFLIGHT) as device:
            for number in range(10):
                device.write(4096 * number, bytes([number]) * 4096)
            daemon.kill()
            requests = [device.submit(Type.IN, 8 * n, length=4096) for n in range(10)]
            daemon.restart()
            device.reconnect()
            device.wait(*requests)
            for number, request in enumerate(requests):
                assert request.status == Status.OK
                assert request.data == bytes([number]) * 4096
            assert device.stop_queue(device.queues[0]) == 20
        assert daemon.terminate() == 0


def test_sigterm_with_a_front_end_connected() -> None:
    arguments = [*node_options("slow"), *export_options("slow")]
    with vhostblk(*arguments) as daemon, Device(daemon.socket("slow")) as device:
        for number in range(10):
            device.submit(Type.IN, number, length=512)
        assert daemon.terminate() == 0
        assert device.channel.wait_closed()


@pytest.mark.parametrize("sent", [0, 1, 11, 12, 15])
def test_sigterm_in_the_middle_of_a_message(sent: int) -> None:
    with vhostblk(*node_options("null"), *export_options("null")) as daemon:
        channel = Channel.connect(daemon.socket("null"))
        try:
            channel.ask_u64(Message.GET_FEATURES)
            message = HEADER.pack(Message.SET_FEATURES, Flag.VERSION, 8) + bytes(8)
            if sent:
                channel.send_bytes(message[:sent])
            assert daemon.terminate() == 0
        finally:
            channel.close()


def test_sigterm_with_answers_that_nobody_reads() -> None:
    with vhostblk(*node_options("null"), *export_options("null")) as daemon:
        channel = Channel.connect(daemon.socket("null"), timeout=0.3)
        try:
            with pytest.raises(TimeoutError):
                while True:
                    channel.send(Message.GET_FEATURES)
            assert daemon.terminate() == 0
        finally:
            channel.close()


@pytest.mark.parametrize("export", ["disk", "slow"])
def test_an_export_is_deleted_under_its_front_end(lab: Lab, export: str) -> None:
    """hard: the front-end is thrown out, whatever is in flight."""
    with lab.device(export) as device:
        for number in range(10):
            device.submit(Type.IN, number, length=512)
        lab.renew(export)
        assert device.channel.wait_closed()
    lab.works(export)
