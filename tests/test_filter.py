# SPDX-License-Identifier: GPL-2.0-or-later
"""Filters in Python under a real front-end: what they may do, and what they may do wrong."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
from frontend import BlockError
from in_process import MIB, Host, refused, with_host

from vhostblk.engine import REQ_GUEST, UpcallHandle
from vhostblk.filter import ChildRole, Filter, FilterOptions, Request
from vhostblk.schema import BlockdevRef


class Recorder(Filter):
    """Passes everything on and remembers what it saw."""

    driver = "recorder"

    async def open(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []

    async def read(self, request: Request) -> None:
        self.seen.append((request.operation, request.offset, request.length, request.flags))
        await request.forward()

    write = flush = discard = write_zeroes = read


async def _file_under(host: Host, driver: str, **options: Any) -> Any:
    await host.add("file", "f", filename=host.file("a"), discard="unmap")
    node = await host.add(driver, "x", file="f", **options)
    await host.export("x")
    return node


def test_all_operations_reach_the_hooks() -> None:
    async def test(host: Host) -> None:
        node = await _file_under(host, "recorder")
        async with host.device() as guest:
            await guest.write(4096, b"x" * 8192)
            assert await guest.read(4096, 8192) == b"x" * 8192
            await guest.flush()
            await guest.discard((0, 4096))
            await guest.write_zeroes(4096, 4096, unmap=True)
            assert await guest.read(4096, 8192) == bytes(4096) + b"x" * 4096
        assert node.seen == [
            ("write", 4096, 8192, REQ_GUEST),
            ("read", 4096, 8192, 0),
            ("flush", 0, 0, 0),
            ("discard", 0, 4096, 0),
            ("write-zeroes", 4096, 4096, 2),
            ("read", 4096, 8192, 0),
        ]

    with_host(test, Recorder)


class ReadsOnly(Filter):
    driver = "reads-only"

    async def open(self) -> None:
        self.reads = 0

    async def read(self, request: Request) -> None:
        self.reads += 1
        request.forward()


class Idle(Filter):
    driver = "idle"


def test_what_is_not_overridden_stays_in_the_engine() -> None:
    async def test(host: Host) -> None:
        node = await _file_under(host, "reads-only")
        assert isinstance(node.handle, UpcallHandle)
        idle = await host.add("idle", "i", file="f")
        assert idle.handle is None and idle.effective is host.backend.graph.node("f").handle
        upcalls = []
        sinks = host.backend.engine._upcalls
        ((cookie, sink),) = sinks.items()

        def count(*args: int) -> None:
            upcalls.append(args)
            sink(*args)

        sinks[cookie] = count
        async with host.device() as guest:
            await guest.write(0, b"x" * 512)
            await guest.flush()
            await guest.write_zeroes(0, 512)
            await guest.read(0, 512)
        assert len(upcalls) == node.reads == 1

    with_host(test, ReadsOnly, Idle)


class Xor(Filter):
    """A toy cipher: looks at guest memory, writes from its own, changes what was read."""

    driver = "xor"

    async def read(self, request: Request) -> None:
        await self.file.forward(request)
        for view in request.buffers:
            view[:] = bytes(b ^ 0x55 for b in view)

    async def write(self, request: Request) -> None:
        await self.file.write(
            request.offset, bytes(b ^ 0x55 for b in request.data()), fua=request.fua
        )


def test_transforming_data() -> None:
    async def test(host: Host) -> None:
        await _file_under(host, "xor")
        data = bytes(range(256)) * 32
        async with host.device() as guest:
            await guest.write(512, data)
            assert await guest.read(512, len(data)) == data
            # Cut into many buffers.
            request = guest.device.submit(0, 1, length=4096, in_split=[1, 511, 512, 3000])
            await guest.wait(request)
            assert request.data == data[:4096]
        assert await host.read("f", 512, len(data)) == bytes(b ^ 0x55 for b in data)

    with_host(test, Xor)


class Answers(Filter):
    """Never asks the child."""

    driver = "answers"

    async def read(self, request: Request) -> None:
        request.fill(request.offset.to_bytes(8) * (request.length // 8))

    def write(self, request: Request) -> None:  # type: ignore[override]
        """A plain function does as well."""


def test_answering_alone() -> None:
    async def test(host: Host) -> None:
        await _file_under(host, "answers")
        async with host.device() as guest:
            assert await guest.read(8192, 512) == (8192).to_bytes(8) * 64
            await guest.write(0, b"x" * 512)
        assert await host.read("f", 0, 512) == bytes(512)

    with_host(test, Answers)


class MirrorOptions(FilterOptions):
    copies: list[BlockdevRef]


class Mirror(Filter):
    """Several children, several roles."""

    driver = "mirror-test"
    Options = MirrorOptions
    child_roles: ClassVar = {"file": ChildRole(), "copies": ChildRole(many=True)}

    async def write(self, request: Request) -> None:
        await asyncio.gather(*(child.forward(request) for child in self.children.values()))  # type: ignore[attr-defined]

    async def read(self, request: Request) -> None:
        request.forward("copies.0")


def test_children_by_role() -> None:
    async def test(host: Host) -> None:
        for name in ("f", "c0", "c1"):
            await host.add("file", name, filename=host.file(name))
        node = await host.add("mirror-test", "x", file="f", copies=["c0", "c1"])
        assert list(node.children) == ["file", "copies.0", "copies.1"]
        await host.export("x")
        async with host.device() as guest:
            await guest.write(0, b"x" * 4096)
            await host.write("c0", 0, b"y" * 512)
            assert (await guest.read(0, 1024))[510:514] == b"yyxx"
        for name in ("f", "c1"):
            assert await host.read(name, 0, 4096) == b"x" * 4096

    with_host(test, Mirror)


class Failing(Filter):
    driver = "failing"

    async def read(self, request: Request) -> None:
        if request.offset == 0:
            raise OSError(errno.ENOSPC, "full")
        if request.offset == 512:
            raise ValueError("my mistake")
        if request.offset == 1024:
            await asyncio.sleep(0)
            raise asyncio.CancelledError
        if request.offset == 1536:
            await self.file.read(MIB, 512)
        if request.offset == 2048:
            raise SystemExit(1)
        if request.offset == 2560:
            raise OSError(errno.EOPNOTSUPP, "no")
        request.forward()


def test_exceptions(caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        await _file_under(host, "failing")
        async with host.device() as guest:
            for offset, status in [(0, 1), (512, 1), (1024, 1), (1536, 1), (2048, 1), (2560, 2)]:
                with pytest.raises(BlockError) as caught:
                    await guest.read(offset, 512)
                assert caught.value.args[0] == status or caught.value.status == status
            assert await guest.read(4096, 512) == bytes(512)
        events = host.named("VHOSTBLK_FILTER_ERROR")
        assert [event["errno"] for event in events] == [
            errno.ENOSPC, errno.EIO, errno.EIO, errno.EIO, errno.EIO, errno.EOPNOTSUPP,
        ]  # fmt: skip
        assert events[1]["node-name"] == "x" and events[1]["operation"] == "read"
        assert "ValueError: my mistake (test_filter.py line" in events[1]["error"]
        assert "not inside node 'f'" in events[3]["error"]
        lines = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(lines) == 6 and not any("\n" in line.getMessage() for line in lines)
        stats = {e["node-name"]: e["stats"] for e in host.backend.query_blockstats()}
        assert stats["x"]["failed_rd_operations"] == 6

    with_host(test, Failing)


class Waits(Filter):
    """Everything asyncio has that needs no task."""

    driver = "waits"

    async def open(self) -> None:
        self.lock = asyncio.Lock()
        self.at_work = self.most = 0

    async def read(self, request: Request) -> None:
        async with self.lock:
            self.at_work += 1
            self.most = max(self.most, self.at_work)
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            half = request.length // 2
            try:
                parts = await asyncio.gather(
                    self._part(request, 0, half), self._part(request, half, request.length - half)
                )
                request.fill(b"".join(parts))
            finally:
                self.at_work -= 1

    async def _part(self, request: Request, skip: int, length: int) -> bytearray:
        await asyncio.sleep(0.001)
        buffer: bytearray = await self.file.read(request.offset + skip, length)
        return buffer


class Tasks(Waits):
    """… and what does."""

    driver = "tasks"
    uses_tasks = True

    async def read(self, request: Request) -> None:
        async with asyncio.timeout(5):
            await super().read(request)

    async def write(self, request: Request) -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)


@pytest.mark.parametrize("driver", ["waits", "tasks"])
def test_awaiting(driver: str) -> None:
    async def test(host: Host) -> None:
        node = await _file_under(host, driver)
        await host.write("f", 0, b"a" * 512 + b"b" * 512)
        async with host.device() as guest:
            requests = [guest.device.submit(0, 0, length=1024) for _ in range(10)]
            await guest.wait(*requests)
            assert all(r.data == b"a" * 512 + b"b" * 512 for r in requests)
            if driver == "tasks":
                with pytest.raises(BlockError):
                    await guest.write(0, b"x" * 512)
        assert node.most == 1 and node.at_work == 0

    with_host(test, Waits, Tasks)


class TaskWithoutSayingSo(Filter):
    driver = "needs-task"

    async def read(self, request: Request) -> None:
        async with asyncio.timeout(1):
            request.forward()


def test_needing_a_task_without_saying_so_is_an_error_that_can_be_understood() -> None:
    async def test(host: Host) -> None:
        await _file_under(host, "needs-task")
        async with host.device() as guest:
            with pytest.raises(BlockError):
                await guest.read(0, 512)
        (event,) = host.named("VHOSTBLK_FILTER_ERROR")
        assert "uses_tasks" in event["error"]

    with_host(test, TaskWithoutSayingSo)


class Keeps(Filter):
    """Does with guest memory what must not be done."""

    driver = "keeps"
    kept: ClassVar[list[Any]] = []

    async def read(self, request: Request) -> None:
        view = request.buffers[0]
        if request.offset == 0:
            self.kept.append(view)
        elif request.offset == 512:
            self.kept.append(view[1:5])
        elif request.offset == 1024:
            cycle: list[Any] = [view[0:1]]
            cycle.append(cycle)
        elif request.offset == 1536:
            self.kept.append(request)
        await self.file.forward(request)


def test_views_that_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        await _file_under(host, "keeps")
        gc.collect()
        async with host.device() as guest:
            await guest.read(0, 512)
            with pytest.raises(ValueError, match="released"):
                Keeps.kept[0][0]
            assert not host.named("VHOSTBLK_FILTER_ERROR")
            await guest.read(1024, 512)  # garbage in a cycle is nobody's error
            assert not host.named("VHOSTBLK_FILTER_ERROR")
            await guest.read(512, 512)
            (event,) = host.named("VHOSTBLK_FILTER_ERROR")
            assert "kept" in event["error"] and event["offset"] == 512
            await guest.read(1536, 512)
            with pytest.raises(ValueError, match="the request has completed"):
                _ = Keeps.kept[2].buffers
            assert await guest.read(4096, 512) == bytes(512)
        await host.backend.block_export_del("e", "hard")
        # The guest's memory is gone; the view is not a way to crash.
        assert len(bytes(Keeps.kept[1])) == 4

    Keeps.kept.clear()
    with_host(test, Keeps)


class Hasty(Filter):
    """Starts I/O on guest memory and does not wait for it."""

    driver = "hasty"

    async def read(self, request: Request) -> None:
        self.file.forward(request)
        self.file.read(request.offset, request.buffers[0])
        if request.offset:
            raise RuntimeError("on top of that")


def test_a_request_waits_for_the_io_it_started() -> None:
    async def test(host: Host) -> None:
        await host.null("slow", latency_ns=100_000_000)
        await host.add("hasty", "x", file="slow")
        await host.export("x")
        async with host.device() as guest:
            loop = asyncio.get_running_loop()
            begun = loop.time()
            await guest.read(0, 512)
            assert loop.time() - begun > 0.09
            with pytest.raises(BlockError):
                await guest.read(512, 512)
            assert loop.time() - begun > 0.19
        assert all("kept" not in e["error"] for e in host.named("VHOSTBLK_FILTER_ERROR"))

    with_host(test, Hasty)


class Careless(Filter):
    """Gives up while a part of its work is still under way."""

    driver = "careless"

    async def read(self, request: Request) -> None:
        await asyncio.gather(self._fail(), self._work(request))

    async def _fail(self) -> None:
        raise ValueError("first")

    async def _work(self, request: Request) -> None:
        await self.file.read(request.offset, request.length)
        await asyncio.sleep(0.05)
        await self.file.read(request.offset, request.length)


def test_work_left_behind_does_not_outlive_the_nodes() -> None:
    async def test(host: Host) -> None:
        await host.null("slow", latency_ns=50_000_000)
        await host.add("careless", "x", file="slow")
        await host.add("careless", "y", file="x")
        await host.export("y")
        async with host.device() as guest:
            with pytest.raises(BlockError):
                await guest.read(0, 512)

    with_host(test, Careless)


def test_filters_on_filters() -> None:
    async def test(host: Host) -> None:
        await host.add("file", "f", filename=host.file("a"))
        below = "f"
        for i, driver in enumerate(["recorder", "xor", "waits", "xor", "delay", "idle"] * 2):
            options = {"write-ns": 1000} if driver == "delay" else {}
            await host.add(driver, f"x{i}", file=below, **options)
            below = f"x{i}"
        await host.export(below)
        data = bytes(range(256)) * 4
        async with host.device() as guest:
            await guest.write(2048, data)
            assert await guest.read(2048, 1024) == data
        assert await host.read("f", 2048, 1024) == data

    with_host(test, Recorder, Xor, Waits, Idle)


def test_delay_holds_back_and_lets_go_when_drained() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        node = await host.add(
            "delay", "d", file="n", **{"read-ns": 100_000_000, "write-ns": 10**13}
        )
        await host.export("d")
        async with host.device() as guest:
            loop = asyncio.get_running_loop()
            begun = loop.time()
            await guest.read(0, 512)
            assert 0.1 <= loop.time() - begun < 5
            writes = [guest.device.submit(1, 0, b"x" * 512) for _ in range(5)]
            await host.until(lambda: len(node._held) == 5)
            async with host.backend.graph.drained([node]):
                pass
            await guest.wait(*writes)
            guest.device.submit(1, 0, b"x" * 512)
            await host.until(lambda: len(node._held) == 1)
            await host.backend.block_export_del("e", "hard")

    with_host(test)


def test_a_stopped_vm_does_not_wait_for_what_a_filter_holds() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        node = await host.add("delay", "d", file="n", **{"write-ns": 10**13})
        await host.export("d")
        async with host.device() as guest:
            for _ in range(2):  # and it holds requests again afterwards
                writes = [guest.device.submit(1, 0, b"x" * 512) for _ in range(5)]
                await host.until(lambda: len(node._held) == 5)
                await guest.stop()  # GET_VRING_BASE: QEMU hangs until it is answered
                await guest.wait(*writes)
                assert all(write.status == 0 for write in writes)
                await host.until(lambda: not node._draining)
                await asyncio.to_thread(guest.device.start_queue, guest.device.queues[0])
                await asyncio.to_thread(guest.device.enable_queue, guest.device.queues[0])
            guest.device.submit(1, 0, b"x" * 512)
            await host.until(lambda: len(node._held) == 1)
        # The front-end is gone: nobody holds its last request either.
        await host.until(lambda: not node._held and not node._draining)

    with_host(test)


def test_delay_by_jitter_alone() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        node = await host.add("delay", "d", file="n", **{"jitter-ns": 10**16})
        await host.export("d")
        async with host.device() as guest:
            writes = [guest.device.submit(1, 0, b"x" * 512) for _ in range(5)]
            await host.until(lambda: len(node._held) == 5)
            async with host.backend.graph.drained([node]):
                pass
            await guest.wait(*writes)

    with_host(test)


def test_delay_without_a_delay_costs_nothing() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        assert (await host.add("delay", "d", file="n")).handle is None

    with_host(test)


def test_error_inject() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        await host.add(
            "error-inject", "x", file="n", operations=["write", "flush"], errno="ENOSPC",
            offset=4096, length=4096, skip="1", every=2, count=2,
        )  # fmt: skip
        await host.export("x")
        outcomes = []
        async with host.device() as guest:
            await guest.read(4096, 512)
            await guest.write(0, b"x" * 512)
            for _ in range(8):
                try:
                    await guest.write(4096, b"x" * 512)
                    outcomes.append(True)
                except BlockError:
                    outcomes.append(False)
        assert outcomes == [True, True, False, True, False, True, True, True]
        with refused("Parameter 'errno'", "did you mean 'ENOSPC'?"):
            await host.add("error-inject", "y", file="n", errno="ENOSPCE")
        with refused("'operations' does not accept value 'reed'", "did you mean 'read'?"):
            await host.add("error-inject", "y", file="n", operations="reed")

    with_host(test)


# ---- plug-ins

PLUGIN = """
from __future__ import annotations
from vhostblk.filter import Filter, FilterOptions, Request
from vhostblk.schema import UInt32

class Options(FilterOptions):
    answer: UInt32 = 42

class MyFilter(Filter):
    driver = "my-filter"
    Options = Options

    async def read(self, request: Request) -> None:
        request.fill(bytes([self.options.answer]) * request.length)
"""


def test_a_plugin_file(tmp_path: Path) -> None:
    from vhostblk.backend import Backend

    plugin = tmp_path / "my-filter.py"
    plugin.write_text(PLUGIN)

    async def run() -> None:
        backend = Backend(plugins=[plugin])
        await backend.start()
        try:
            assert "my-filter" in backend.drivers()
            await backend.blockdev_add({"driver": "null-co", "node-name": "n"})
            await backend.blockdev_add({"driver": "my-filter", "node-name": "x", "file": "n"})
            buffer = bytearray(16)
            handle = backend.graph.node("x").effective
            await backend.engine.submit(handle, 0, 0, buffer)
            assert buffer == b"*" * 16
            with refused("Parameter 'anser' is unexpected", "did you mean 'answer'?"):
                await backend.blockdev_add({"driver": "my-filter", "file": "n", "anser": 1})
        finally:
            await backend.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "there is no such file"),
        ("x = ", "SyntaxError"),
        ("import nonexistent_module", "ModuleNotFoundError"),
        ("\n\nraise KeyError(3)", "KeyError: 3 (line 3)"),
        ("x = 1", "it defines no driver"),
        (PLUGIN.replace("my-filter", "raw"), "Driver 'raw'"),
    ],
)
def test_plugins_that_do_not_load(tmp_path: Path, text: str | None, error: str) -> None:
    from vhostblk.backend import Backend

    plugin = tmp_path / "p.py"
    if text is not None:
        plugin.write_text(text)

    async def run() -> None:
        with refused(error):
            await Backend(plugins=[plugin]).start()

    asyncio.run(run())


def test_filters_share_the_schema_of_all_nodes() -> None:
    async def test(host: Host) -> None:
        await host.null("n")
        with refused("Parameter 'file' is missing"):
            await host.add("idle", "x")
        await host.add("idle", "x", file={"driver": "null-co", "node-name": "inner"})
        entry = {n["node-name"]: n for n in host.backend.query_named_block_nodes()}["x"]
        assert entry["filter"] and entry["children"] == [{"child": "file", "node-name": "inner"}]

    with_host(test, Idle)


class BadOpen(Filter):
    driver = "bad-open"

    async def open(self) -> None:
        raise KeyError("no such thing")


class BadDrain(Filter):
    driver = "bad-drain"

    async def close(self) -> None:
        raise ValueError("cannot close")

    def drain_begin(self) -> None:
        raise ValueError("cannot drain")


def test_mistakes_outside_of_requests(caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        node = await host.null("n")
        with refused("Could not open node 'x' (bad-open): KeyError", "(test_filter.py line"):
            await host.add("bad-open", "x", file="n")
        assert list(host.backend.graph.nodes) == ["n"]
        await host.add("bad-drain", "x", file="n")
        await host.export("x")
        async with host.backend.graph.drained([node]):
            pass
        await host.backend.block_export_del("e")
        await host.backend.blockdev_del("x")
        assert any("cannot drain (test_filter.py line" in line for line in caplog.messages)
        assert any("cannot close (test_filter.py line" in line for line in caplog.messages)
        assert not any(record.exc_info for record in caplog.records)

    with_host(test, BadOpen, BadDrain)
