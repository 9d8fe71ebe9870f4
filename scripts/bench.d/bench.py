# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures vhostblk against qemu-storage-daemon: the same stack, the same client, turn by turn.

What is measured is data (rows.py). Programs are started and stopped by programs.py, the load comes
from client.c and limit.c.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accuracy import LIMITS
from accuracy import run as run_accuracy
from images import (
    CHAIN_DEPTH,
    SMOKE_CHAIN_DEPTH,
    Image,
    ImageError,
    forget,
    path_of,
    prepare,
)
from programs import (
    BenchError,
    backend,
    daemon_command,
    idle_client,
    result_of,
    vhostblk_command,
)
from rows import FILE_SIZE, ROWS, Compare, Daemon, Kind, Row
from stall import Drive
from stall import run as run_stall

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
OURS = "vhostblk"
LIMIT = "io_uring"
IDLE_SECONDS = 2.0
ACCURACY_SECONDS = 5.0
SMOKE_FILE_SIZE = 8 << 20
UNDISTURBED = "without snapshots"
SNAPSHOTS = 20

Numbers = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """How long and how often, and which programs."""

    runs: int
    seconds: float
    warmup: float
    count: int  # requests per run instead of seconds, if not 0
    cpu: int | None
    poll: bool
    vhostblk: list[str]
    daemon: list[str]
    client: Path
    limit: Path
    file: Path
    work: Path


@dataclass(frozen=True)
class Contestant:
    """Something that takes its turn in a row."""

    name: str
    run: Callable[[], Numbers]


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


# ---- one run ----------------------------------------------------------------------


def _fill_in(texts: Sequence[str], setting: Setting, image: Image | None) -> tuple[str, ...]:
    if image is not None:
        path = str(path_of(image, setting.file))
        texts = [text.replace("{image}", path) for text in texts]
    return tuple(
        text.replace("{file}", str(setting.file)).replace("{here}", str(HERE)) for text in texts
    )


def _job_options(row: Row, setting: Setting) -> list[str]:
    job = row.job
    options = ["--job", job.what, "--depth", str(job.depth), "--block-size", str(job.block)]
    options += ["--queues", str(job.queues)]
    if job.span:
        options += ["--range", f"{job.span}M"]
    if job.unique:
        options.append("--unique")
    if setting.count or row.count:
        options += ["--count", str(setting.count or row.count)]
    else:
        options += ["--seconds", str(setting.seconds), "--warmup", str(setting.warmup)]
    if setting.cpu is not None:
        options += ["--cpu", str(setting.cpu)]
    return options


def _clean_pages(path: Path) -> None:
    """Nobody pays for what the run before left to be written."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _run_backend(row: Row, setting: Setting, command: list[str], path: Path) -> Numbers:
    with backend(command, path, path.with_suffix(".log")) as running:
        numbers: Numbers = {"start-seconds": running.start_seconds}
        if row.kind is Kind.LOAD:
            before = running.cost.cpu_ns()
            client = [str(setting.client), *_job_options(row, setting)]
            numbers |= result_of(
                [*client, *(["--poll"] if setting.poll or row.job.poll else []), str(path)]
            )
            spent = running.cost.cpu_ns() - before
            numbers["backend-cpu-ns-per-request"] = round(spent / max(numbers["all-ops"], 1), 1)
            return numbers
        with idle_client(setting.client, path):
            if row.kind is Kind.IDLE_CPU:
                time.sleep(0.2)  # what follows a connection is not idleness
                before, begin = running.cost.cpu_ns(), time.monotonic_ns()
                time.sleep(IDLE_SECONDS if not setting.count else 0.2)
                spent = running.cost.cpu_ns() - before
                numbers["value"] = 100 * spent / (time.monotonic_ns() - begin)
        if row.kind is Kind.MEMORY:
            # Without the client, whose memory would be counted as the backend's.
            time.sleep(0.2)
            sizes = running.cost.memory_mib()
            numbers |= {"value": sizes["rss"], "pss-mib": sizes["pss"]}
        elif row.kind is Kind.START:
            numbers["value"] = running.start_seconds
        return numbers


def _run_stall(row: Row, setting: Setting, snapshots: int) -> Numbers:
    drive = Drive(job=row.job.what, depth=row.job.depth)
    if setting.count:  # just to see that it works
        drive, snapshots = replace(drive, mib=8, seconds=1.5), min(snapshots, 2)
    numbers = run_stall(setting.vhostblk, setting.client, drive, snapshots)
    numbers["longest-pause-us"] = max(numbers.pop("pauses-us"), default=0)
    stalls = numbers.pop("stalls-ms")
    numbers["median-stall-ms"] = statistics.median(stalls) if stalls else 0.0
    return numbers | {"value": numbers["max-ns"] / 1e6}


def _run_accuracy(setting: Setting) -> Numbers:
    if setting.count:  # just to see that it works
        return {"value": run_accuracy(setting.vhostblk, setting.client, 0.2, LIMITS[-1:])}
    return {"value": run_accuracy(setting.vhostblk, setting.client, ACCURACY_SECONDS, LIMITS)}


def contestants(row: Row, setting: Setting) -> list[Contestant]:
    """Everyone who takes a turn in `row`, vhostblk first."""
    path = setting.work / "disk.sock"
    queues = row.job.queues

    def ours() -> Numbers:
        command = vhostblk_command(
            setting.vhostblk,
            _fill_in(row.nodes, setting, row.image),
            path,
            queues=queues,
            iothreads=max(row.iothreads, queues),
            plugins=_fill_in(row.plugins, setting, None),
            objects=row.objects,
        )
        return _run_backend(row, setting, command, path)

    def theirs(daemon: Daemon) -> Callable[[], Numbers]:
        command = daemon_command(
            setting.daemon,
            _fill_in(daemon.nodes, setting, row.image),
            path,
            queues=queues,
            iothread=daemon.iothread,
            objects=row.objects,
        )
        return lambda: _run_backend(row, setting, command, path)

    def limit() -> Numbers:
        return result_of([str(setting.limit), *_job_options(row, setting), str(setting.file)])

    if row.kind is Kind.STALL:
        return [
            Contestant(OURS, lambda: _run_stall(row, setting, SNAPSHOTS)),
            Contestant(UNDISTURBED, lambda: _run_stall(row, setting, 0)),
        ]
    if row.kind is Kind.ACCURACY:
        return [Contestant(OURS, lambda: _run_accuracy(setting))]
    all_of_them = [Contestant(OURS, ours)]
    all_of_them += [Contestant(daemon.label, theirs(daemon)) for daemon in row.daemons]
    if row.limit:
        all_of_them.append(Contestant(LIMIT, limit))
    return all_of_them


# ---- a row ------------------------------------------------------------------------


def measure(row: Row, setting: Setting) -> dict[str, Any]:
    """Lets everyone run in turn, `setting.runs` times; medians, ratio and verdict."""
    say(f"{row.name}: {row.title}" + (f", {row.job}" if row.kind is Kind.LOAD else ""))
    if setting.count:
        row = replace(row, job=replace(row.job, depth=min(row.job.depth, setting.count)))
    runs: dict[str, list[Numbers]] = {}
    turns = contestants(row, setting)
    # An absolute number that takes a minute is measured once.
    for turn in range(1 if row.kind is Kind.ACCURACY else setting.runs):
        # There and back, so that nobody always follows the same neighbour.
        for contestant in turns if turn % 2 == 0 else reversed(turns):
            if "{file}" in "".join(row.nodes):
                _clean_pages(setting.file)
            if row.image is not None:
                depth = SMOKE_CHAIN_DEPTH if setting.count else CHAIN_DEPTH
                prepare(row.image, setting.file, depth)
                _clean_pages(path_of(row.image, setting.file))
            runs.setdefault(contestant.name, []).append(contestant.run())
    medians = {
        name: {key: statistics.median(one[key] for one in of_name) for key in of_name[0]}
        for name, of_name in runs.items()
    }
    return judge(row, medians) | {"runs": runs, "medians": medians}


def judge(row: Row, medians: dict[str, Numbers]) -> dict[str, Any]:
    """The verdict on a row, given everyone's medians."""
    ours = medians[OURS]
    labels = [daemon.label for daemon in row.daemons]
    ratio: float | None = None
    if row.compare is Compare.AT_MOST:
        value = ours["value"]
        best = labels[0] if labels else None
        met = row.target is None or value <= row.target
    else:
        if row.compare is Compare.IOPS:
            best = max(labels, key=lambda label: medians[label]["iops"])
            value = ours["iops"]
            ratio = value / medians[best]["iops"]
        else:
            best = min(labels, key=lambda label: medians[label]["p50-ns"])
            value = ours["p50-ns"]
            ratio = medians[best]["p50-ns"] / value
        met = row.target is None or ratio >= row.target
    return {
        "name": row.name,
        "title": row.title,
        "kind": row.kind.value,
        "job": vars(row.job) if row.kind is Kind.LOAD else None,
        "compare": row.compare.value,
        "target": row.target,
        "value": value,
        "best-daemon": best,
        "ratio": ratio,
        "met": met,
    }


# ---- what people read -------------------------------------------------------------


def _thousands(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _microseconds(value: float) -> str:
    return f"{value / 1000:.1f}"


def table(results: Sequence[dict[str, Any]], rows: Sequence[Row], *, verdicts: bool) -> str:
    """All results: one block of lines for each row, the verdict on its first."""
    lines = []
    head = ("", "1/s", "mean µs", "p50", "p99", "CPU ns/req", "client busy")
    layout = "  {:<28}{:>12}{:>10}{:>9}{:>9}{:>12}{:>13}"
    for row, result in zip(rows, results, strict=True):
        verdict = "pass" if result["met"] else "FAIL"
        if row.target is None or not verdicts:
            verdict = "----"
        medians = result["medians"]
        if row.kind is not Kind.LOAD:
            lines.append(
                f"{verdict}  {row.name}: {result['value']:.3g} {row.unit}"
                f" (target: at most {row.target:g}) – {row.title}"
            )
            for name, numbers in medians.items():
                if name != OURS:
                    label = name if row.kind is Kind.STALL else "qemu-storage-daemon"
                    lines.append(f"        {label}: {numbers['value']:.3g} {row.unit}")
            continue
        what = "requests" if row.compare is Compare.IOPS else "shorter median latency"
        target = "no target" if row.target is None else f"target: {row.target:g} ×"
        lines.append(
            f"{verdict}  {row.name}: {result['ratio']:.2f} × {what} ({target})"
            f" – {row.title}, {row.job}"
        )
        lines.append(layout.format(*head))
        for name, numbers in medians.items():
            if name in (OURS, LIMIT):
                label = {OURS: "vhostblk", LIMIT: "limit: io_uring alone"}[name]
            else:
                label = f"QSD, {name}" + (" (best)" if name == result["best-daemon"] else "")
            cpu = numbers.get("backend-cpu-ns-per-request")
            lines.append(
                layout.format(
                    label,
                    _thousands(numbers["iops"]),
                    _microseconds(numbers["mean-ns"]),
                    _microseconds(numbers["p50-ns"]),
                    _microseconds(numbers["p99-ns"]),
                    "" if cpu is None else _thousands(cpu),
                    f"{100 * numbers['client-busy']:.0f} %",
                )
            )
    return "\n".join(lines)


# ---- preparation ------------------------------------------------------------------


def compile_tools(directory: Path) -> tuple[Path, Path]:
    """client and limit, compiled again only if a source or the way to compile it has changed."""
    directory.mkdir(parents=True, exist_ok=True)
    library = _libblkio()
    flags = ["-O2", "-g", "-Wall", "-Wextra", "-pthread"]
    where = [] if library is None else [f"-L{library}", f"-Wl,-rpath,{library}"]
    if library is not None and (include := _include_of(library)) is not None:
        flags += [f"-I{include}"]
    for name, libraries in (("client", [*where, "-lblkio"]), ("limit", ["-luring"])):
        source, program = HERE / f"{name}.c", directory / name
        made = directory / f"{name}.made"
        command = ["cc", *flags, str(source), "-o", str(program), *libraries]
        key = hashlib.sha256(shlex.join(command).encode())
        for part in (source, HERE / "common.h"):
            key.update(part.read_bytes())
        if program.exists() and made.exists() and made.read_text() == key.hexdigest():
            continue
        part = directory / f"{name}.{os.getpid()}"
        command[command.index("-o") + 1] = str(part)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"{shlex.join(command)}\n{done.stderr.strip()}")
        part.replace(program)
        made.write_text(key.hexdigest())
    return directory / "client", directory / "limit"


def _libblkio() -> Path | None:
    if given := os.environ.get("VHOSTBLK_LIBBLKIO"):
        return Path(given)
    tools = (TOP / "build" / "test-tools").resolve()
    found = sorted(tools.glob("usr/lib/**/libblkio.so"))
    return found[0].parent if found else None


def _include_of(library: Path) -> Path | None:
    for parent in library.parents:
        if (parent / "include" / "blkio.h").exists():
            return parent / "include"
    return None


def make_file(path: Path, size: int) -> None:
    """The image of the file rows: data, not holes, and all of it in the page cache."""
    if not path.exists() or path.stat().st_size != size:
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def host() -> dict[str, Any]:
    """What the numbers depend on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load-average": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(program: Sequence[str]) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*program, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    return "unknown"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = ", ".join(row.name for row in ROWS)
    result = argparse.ArgumentParser(
        prog="bench",
        description="Measures vhostblk against qemu-storage-daemon with the same stack and client,"
        " and says whether every target is met. docs/benchmarks.md says how to read the result.",
        epilog=f"Rows: {names}. Status: 0 all targets met, 1 some missed, 2 could not be run.",
    )
    result.add_argument(
        "--row", action="append", metavar="NAME", help="only this row (may be repeated)"
    )
    result.add_argument("--runs", type=int, metavar="N", help="turns for everyone (default: 5)")
    result.add_argument(
        "--seconds", type=float, metavar="S", help="length of a run (default: 2), after a warm-up"
    )
    result.add_argument("--quick", action="store_true", help="3 runs of 0.7 s")
    result.add_argument(
        "--smoke", action="store_true", help="1 run of 200 requests: does it work? Judges nothing"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write every run there, too")
    result.add_argument(
        "--directory",
        type=Path,
        default=TOP / "build" / "bench",
        metavar="DIR",
        help="where the image of the file rows lies (default: build/bench)",
    )
    result.add_argument(
        "--cpu", type=int, metavar="N", help="pin the client's threads to CPUs from N on"
    )
    result.add_argument(
        "--poll", action="store_true", help="the client spins instead of sleeping on its eventfd"
    )
    result.add_argument("--list", action="store_true", help="list the rows and their targets")
    result.add_argument(
        "--vhostblk",
        default=str(TOP / ".venv" / "bin" / "vhostblk"),
        metavar="COMMAND",
        help="vhostblk's command (default: the one in .venv)",
    )
    result.add_argument(
        "--qsd",
        default="qemu-storage-daemon",
        metavar="COMMAND",
        help="qemu-storage-daemon's command",
    )
    return result


def chosen(names: Sequence[str] | None) -> list[Row]:
    """The rows with these names, all if none are given."""
    known = {row.name: row for row in ROWS}
    for name in names or ():
        if name not in known:
            raise BenchError(f"there is no row '{name}'; there are: {', '.join(known)}")
    return [known[name] for name in names] if names else list(ROWS)


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    rows = chosen(options.row)
    if options.list:
        for row in rows:
            target = "for information" if row.target is None else f"{row.target:g}"
            print(f"{row.name:<32}{row.title} ({row.compare.value}: {target})")
        return 0
    program, daemon = shlex.split(options.vhostblk), shlex.split(options.qsd)
    for command in (program, daemon):
        if shutil.which(command[0]) is None:
            raise BenchError(f"there is no program {command[0]}")
    directory: Path = options.directory.resolve()
    client, limit = compile_tools(TOP / "build" / "bench")
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / ("smoke.raw" if options.smoke else "disk.raw")
    forget(file)
    if any("{file}" in node or row.image for row in rows for node in row.nodes):
        make_file(file, SMOKE_FILE_SIZE if options.smoke else FILE_SIZE)
    about = host() | {"vhostblk": _version(program), "qemu-storage-daemon": _version(daemon)}
    if about["load-average"] > 0.5 and not options.smoke:
        say(
            f"warning: the machine is busy (load {about['load-average']}); the numbers will show it"
        )
    short = options.quick or options.smoke
    results = []
    with tempfile.TemporaryDirectory(prefix="vhostblk-bench-") as work:
        setting = Setting(
            runs=options.runs or (1 if options.smoke else 3 if options.quick else 5),
            seconds=options.seconds or (0.7 if short else 2.0),
            warmup=0.2 if short else 0.5,
            count=200 if options.smoke else 0,
            cpu=options.cpu,
            poll=options.poll,
            vhostblk=program,
            daemon=daemon,
            client=client,
            limit=limit,
            file=file,
            work=Path(work),
        )
        for row in rows:
            results.append(measure(row, setting))
    forget(file)
    print(f"{about['vhostblk']}; {about['qemu-storage-daemon']}")
    print(f"{about['cpu']}, {about['cpus']} CPUs, Linux {about['kernel']}; medians of", end=" ")
    print(
        f"{setting.runs} runs of "
        + (f"{setting.count} requests" if setting.count else f"{setting.seconds:g} s")
    )
    print(table(results, rows, verdicts=not options.smoke))
    met = all(result["met"] for result in results)
    if options.json:
        document = {"host": about, "rows": results, "met": met}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.smoke:
        print("a smoke test: it works; the numbers mean nothing")
        return 0
    missed = [str(result["name"]) for result in results if not result["met"]]
    print("every target is met" if met else f"missed: {', '.join(missed)}")
    return 0 if met else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (BenchError, ImageError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
