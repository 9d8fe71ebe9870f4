# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of sorted tables with checksums (cffi_build/engine/tree_file.c).

They are compared with dictionaries; cut off by power at any moment of a change; and damaged in
every page, where a reader must say so or be right.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import pytest
from compiled import shared_library
from hypothesis import given, settings
from hypothesis import strategies as st
from vhostblk._engine import ffi, lib

from vhostblk.engine.tree import PAGE, Reader, Tree, TreeError

SHAPES = [(12, 1024), (8, 48), (12, 8)]
MOST = 1 << 30
Model = list[dict[bytes, bytes]]


@contextmanager
def opened(path: Path, most: int = MOST) -> Iterator[tuple[Tree, Reader]]:
    if not path.exists():
        Tree.create(path, SHAPES)
    with closing(Tree(path, SHAPES, most)) as tree, closing(tree.reader(64)) as reader:
        yield tree, reader


def apply(tree: Tree, model: Model, changes: list[dict[bytes, bytes | None]]) -> None:
    """A change of all tables, in portions."""
    change = tree.change()
    try:
        for table, entries in enumerate(changes):
            waiting = iter(sorted(entries.items()))
            while portion := list(islice(waiting, 100)):
                change.put(table, portion)
        change.commit()
    finally:
        change.abandon()
    for table, entries in enumerate(changes):
        for key, value in entries.items():
            if value is None:
                model[table].pop(key, None)
            else:
                model[table][key] = value


def some_changes(
    rnd: random.Random, model: Model, kind: str, count: int
) -> list[dict[bytes, bytes | None]]:
    """New entries at the end or anywhere, others for what is there, or a range that goes."""
    changes: list[dict[bytes, bytes | None]] = []
    for (key, value), table in zip(SHAPES, model, strict=True):
        known = sorted(table)
        names: list[bytes]
        if kind == "append":
            last = int.from_bytes(known[-1], "big") if known else 0
            names = [(last + 1 + at).to_bytes(key, "big") for at in range(count)]
        elif kind == "insert" or not known:
            names = [rnd.getrandbits(48).to_bytes(key, "big") for _ in range(count)]
        elif kind == "scattered":
            names = [rnd.choice(known) for _ in range(count)]
        else:
            at = rnd.randrange(len(known))
            names = known[at : at + 4 * count]
        gone = kind == "range" or (kind == "scattered" and rnd.random() < 0.5)
        changes.append({name: None if gone else rnd.randbytes(value) for name in names})
    return changes


def everything(reader: Reader) -> Model:
    found = [dict(reader.scan(table)) for table in range(len(SHAPES))]
    assert [reader.entries(table) for table in range(len(SHAPES))] == list(map(len, found))
    return found


KINDS = st.sampled_from(["append", "insert", "scattered", "range"])


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(KINDS, st.sampled_from([0, 1, 3, 40, 400])), max_size=25),
    seed=st.integers(0, 1 << 32),
)
def test_tables_are_as_dictionaries(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], seed: int
) -> None:
    path = tmp_path_factory.mktemp("tree") / "file"
    rnd = random.Random(seed)
    model: Model = [{}, {}, {}]
    with opened(path) as (tree, reader):
        for kind, count in steps:
            before = [dict(table) for table in model]
            apply(tree, model, some_changes(rnd, model, kind, count))
            assert everything(reader) == before  # until it is renewed
            reader.renew()
            assert everything(reader) == model
        start = rnd.getrandbits(48).to_bytes(8, "big")
        assert list(reader.scan(1, start)) == sorted(e for e in model[1].items() if e[0] >= start)
        for table, entries in enumerate(model):
            assert all(reader.get(table, key) == value for key, value in entries.items())
            for key in some_changes(rnd, [{}, {}, {}], "insert", 20)[table]:
                assert reader.get(table, key) == entries.get(key)
    with opened(path) as (_, reader):
        assert everything(reader) == model


def test_space_is_used_again_and_pages_are_full(tmp_path: Path) -> None:
    path, rnd = tmp_path / "file", random.Random(1)
    model: Model = [{}, {}, {}]
    with opened(path) as (tree, reader):
        for _ in range(60):
            apply(tree, model, some_changes(rnd, model, "append", 40))
        reader.renew()
        content = sum(sum(shape) * len(t) for shape, t in zip(SHAPES, model, strict=True))
        sizes = []
        for _ in range(60):
            apply(tree, model, some_changes(rnd, model, "scattered", 1))
            sizes.append(path.stat().st_size)
            reader.renew()
        assert sizes[-1] == sizes[20] < 2 * content
        copy = tmp_path / "copy"
        Tree.create(copy, SHAPES)
        with closing(Tree(copy, SHAPES, MOST)) as other:
            reader.copy(other)
        assert copy.stat().st_size < 1.4 * content
    with opened(copy) as (_, reader):
        assert everything(reader) == model


def test_a_reader_sees_one_moment_whatever_happens(tmp_path: Path) -> None:
    rnd = random.Random(2)
    model: Model = [{}, {}, {}]
    with opened(tmp_path / "file") as (tree, _):
        apply(tree, model, some_changes(rnd, model, "insert", 300))
        with closing(tree.reader(4)) as early:
            before = [dict(table) for table in model]
            for _ in range(20):
                apply(tree, model, some_changes(rnd, model, "insert", 100))
                apply(tree, model, some_changes(rnd, model, "range", 100))
            assert everything(early) == before


def test_what_is_not_possible_changes_nothing(tmp_path: Path) -> None:
    path, rnd = tmp_path / "file", random.Random(3)
    model: Model = [{}, {}, {}]
    with opened(path, 1 << 20) as (tree, reader):
        apply(tree, model, some_changes(rnd, model, "insert", 200))
        before = [dict(table) for table in model]
        with pytest.raises(TreeError) as raised:
            apply(tree, model, some_changes(rnd, model, "insert", 4000))
        assert raised.value.errno == errno.ENOSPC and not raised.value.damaged
        change = tree.change()
        with pytest.raises(TreeError):
            change.put(1, [(b"b" * 8, bytes(48)), (b"a" * 8, bytes(48))])
        change.abandon()
        change = tree.change()
        with pytest.raises(ValueError, match="length"):
            change.put(1, [(b"b" * 8, bytes(47))])
        change.abandon()
        reader.renew()
        assert everything(reader) == before
        for _ in range(50):  # nothing has been lost of the space, either
            apply(tree, model, some_changes(rnd, model, "scattered", 5))
            reader.renew()


def test_a_device_that_is_full_or_fails_changes_nothing(tmp_path: Path) -> None:
    path, rnd = tmp_path / "file", random.Random(4)
    model: Model = [{}, {}, {}]
    with opened(path) as (tree, reader):
        apply(tree, model, some_changes(rnd, model, "insert", 200))
        before = [dict(table) for table in model]
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limit[1]))
        try:
            with pytest.raises(TreeError):
                apply(tree, model, some_changes(rnd, model, "insert", 1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        reader.renew()
        assert everything(reader) == before
        apply(tree, model, some_changes(rnd, model, "insert", 1000))
    with opened(path) as (_, reader):
        assert everything(reader) == model


@pytest.mark.parametrize("seed", range(12))
def test_power_cuts_leave_what_was_or_what_is(tmp_path: Path, seed: int) -> None:
    """Before the first sync of a change any of its pages may be there, in parts; before the
    second any part of the heads. All pages that differ were written by it."""
    path, rnd = tmp_path / "file", random.Random(seed)
    model: Model = [{}, {}, {}]
    with opened(path) as (tree, reader):
        for round in range(8):
            before, old = path.read_bytes(), [dict(table) for table in model]
            kind = rnd.choice(["append", "insert", "scattered", "range"])
            apply(tree, model, some_changes(rnd, model, kind, rnd.choice([1, 30, 300])))
            reader.renew()
            after = path.read_bytes()
            for _ in range(3):
                cut = tmp_path / f"cut{round}"
                for heads, states in ((False, [old]), (True, [old, model])):
                    cut.write_bytes(mixed(rnd, before, after, heads=heads))
                    with opened(cut) as (_, found):
                        assert everything(found) in states


def mixed(rnd: random.Random, before: bytes, after: bytes, *, heads: bool) -> bytes:
    """A file between two: only its heads are in doubt, or they are old and all else is."""
    old = before.ljust(len(after), b"\0")
    mix = bytearray(after if heads else old)
    share = rnd.random()
    for at in range(0, 4 * PAGE, 512) if heads else range(4 * PAGE, len(after), 512):
        mix[at : at + 512] = (after if rnd.random() < share else old)[at : at + 512]
    return bytes(mix)


FAILING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>

int fail_in; /* so many syncs from now, counted down; 0: never */

int fdatasync(int fd)
{
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    if (fail_in == 0 || --fail_in > 0)
        return sync(fd);
    errno = EIO;
    return -1;
}
"""


def test_syncs_that_fail(tmp_path: Path) -> None:
    """In another process, whose fdatasync() is ours."""
    source = tmp_path / "failing.c"
    source.write_text(FAILING)
    library = shared_library(tmp_path, [source])
    test = f"import test_tree; test_tree.fail_syncs({str(tmp_path)!r})"
    preload = f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    env = {**os.environ, "LD_PRELOAD": preload, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", test], check=True, env=env)


def fail_syncs(directory: str) -> None:
    """After the second one of a change has failed, the file may have it or not; what is written
    next must spare both. The sync after that fails, too, before there are other heads."""
    path, rnd = Path(directory) / "file", random.Random(6)
    fail_in = ctypes.c_int.in_dll(ctypes.CDLL(None), "fail_in")
    model: Model = [{}, {}, {}]
    with opened(path) as (tree, reader):
        for _ in range(30):
            apply(tree, model, some_changes(rnd, model, "insert", 60))
            reader.renew()
            wanted = [dict(table) for table in model]
            for which, kind in ((1, "range"), (2, "scattered"), (1, "insert"), (1, "insert")):
                fail_in.value = which
                new = [dict(table) for table in model]
                changes = some_changes(rnd, model, kind, 40)
                with pytest.raises(TreeError) as raised:
                    apply(tree, new, changes)
                assert raised.value.errno == errno.EIO
                if which == 2:
                    wanted = after(model, changes)
                reader.renew()
                assert everything(reader) == model
                cut = path.with_name("cut")
                cut.write_bytes(path.read_bytes())
                with opened(cut) as (_, found):
                    assert everything(found) == wanted
    with opened(path) as (_, reader):
        assert everything(reader) == wanted


def after(model: Model, changes: list[dict[bytes, bytes | None]]) -> Model:
    both = [{**table, **changed} for table, changed in zip(model, changes, strict=True)]
    return [{key: value for key, value in table.items() if value is not None} for table in both]


# ---- damage


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Model]:
    """A file with a history, so that it has old pages, too, and what is in it."""
    path, rnd = tmp_path_factory.mktemp("sample") / "file", random.Random(5)
    model: Model = [{}, {}, {}]
    with opened(path) as (tree, reader):
        for kind in ("append", "insert", "scattered", "range", "insert", "scattered") * 2:
            apply(tree, model, some_changes(rnd, model, kind, 300))
            reader.renew()
    return path.read_bytes(), model


def right_or_refused(path: Path, model: Model) -> str:
    """Nothing else is ever told than what is there."""
    found = "sound"
    try:
        with opened(path) as (tree, reader):
            for table, entries in enumerate(model):
                absent = [bytes([at] * SHAPES[table][0]) for at in range(1, 255, 8)]
                for key in [*entries, *absent]:
                    try:
                        assert reader.get(table, key) == entries.get(key)
                    except TreeError as error:
                        assert error.damaged
                        found = "damaged"
                try:
                    assert list(reader.scan(table)) == sorted(entries.items())
                except TreeError:
                    found = "damaged"
            changes = some_changes(random.Random(1), model, "scattered", 200)
            new = [dict(table) for table in model]
            try:
                apply(tree, new, changes)
                reader.renew()
                for table, changed in enumerate(changes):
                    assert all(reader.get(table, key) == value for key, value in changed.items())
            except TreeError as error:
                assert error.damaged
                assert found == "damaged"
    except TreeError as error:
        assert error.damaged
        return "refused"
    return found


@pytest.mark.parametrize("kind", ["zeroes", "flip", "other"])
def test_each_damaged_page_is_known(tmp_path: Path, sample: tuple[bytes, Model], kind: str) -> None:
    """Zeroes, a bit that is another one, or a page from elsewhere in the file."""
    whole, model = sample
    path, rnd = tmp_path / "file", random.Random(kind)
    pages = len(whole) // PAGE
    found = []
    for page in range(pages) if kind == "zeroes" else range(0, pages, 5):
        spoilt = bytearray(whole)
        if kind == "zeroes":
            spoilt[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        elif kind == "flip":
            spoilt[page * PAGE + rnd.randrange(PAGE)] ^= 1 << rnd.randrange(8)
        else:
            other = rnd.randrange(pages)
            spoilt[page * PAGE : (page + 1) * PAGE] = whole[other * PAGE : (other + 1) * PAGE]
        path.write_bytes(spoilt)
        found.append(right_or_refused(path, model))
        if page < 4:
            assert found[-1] == "sound"  # the other heads are there
    assert {"sound", "damaged"} <= set(found)
    assert found.count("damaged") > len(found) / 5


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_known(
    tmp_path_factory: pytest.TempPathFactory, sample: tuple[bytes, Model], data: st.DataObject
) -> None:
    whole, model = sample
    spoilt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(whole) - 1))
        junk = data.draw(st.binary(min_size=1, max_size=64))
        spoilt[at : at + len(junk)] = junk
    end = data.draw(st.sampled_from([len(whole)] * 3 + [*range(0, len(whole), 5000)]))
    path = tmp_path_factory.mktemp("spoilt") / "file"
    path.write_bytes(spoilt[:end] or b"\0")
    right_or_refused(path, model)


def test_a_file_that_becomes_shorter_is_no_signal(
    tmp_path: Path, sample: tuple[bytes, Model]
) -> None:
    whole, model = sample
    path = tmp_path / "file"
    path.write_bytes(whole)
    with opened(path) as (_, reader):
        os.truncate(path, 5 * PAGE)
        with pytest.raises(TreeError) as raised:
            everything(reader)
        assert raised.value.damaged
        path.write_bytes(whole)
        assert everything(reader) == model


def test_the_checksum_is_xxh64() -> None:
    page = bytes(at * 7 % 251 for at in range(PAGE))
    assert lib.vb_tree_check(ffi.from_buffer(page)) == 0x301288FF32D5DEFC
