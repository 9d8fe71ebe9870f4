# SPDX-License-Identifier: GPL-2.0-or-later
"""Options become models, and mistakes become sentences that help."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from vhostblk.nodes import DriverRegistry
from vhostblk.schema import (
    BlockdevRef,
    Model,
    NodeName,
    OnOff,
    Size,
    StrOrList,
    UInt16,
    VhostblkError,
    id_wellformed,
    parse_size,
    validate,
)


class Cache(Model):
    direct: OnOff = False
    no_flush: OnOff = False


class Leg(Model):
    weight_of: UInt16 = 1


class Options(Model):
    driver: Literal["null-co", "file"]
    node_name: NodeName | None = None
    size: Size = 0
    cache: Cache = Cache()
    num_queues: UInt16 = 1
    iothread: StrOrList | None = None
    file: BlockdevRef | None = None
    legs: tuple[Leg, ...] = ()


def text_of(data: Any, where: str = "") -> str:
    with pytest.raises(VhostblkError) as caught:
        validate(Options, data, where)
    assert caught.value.data
    return caught.value.desc


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("64k", 65536),
        ("64K", 65536),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("7b", 7),
        ("1P", 1 << 50),
        ("1E", 1 << 60),
    ],
)
def test_sizes_as_qemu_writes_them(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert validate(Options, {"driver": "file", "size": text}).size == size


@pytest.mark.parametrize("text", ["", "k", "1kk", "-1", "1.k", "1 k", "1e3", "0x", "0.5", "1.5b"])
def test_what_is_no_size(text: str) -> None:
    assert "'size' expects" in text_of({"driver": "file", "size": text})


def test_key_value_and_json_mean_the_same() -> None:
    written = {"driver": "file", "num-queues": "4", "cache": {"direct": "on"}, "size": "1k"}
    typed = {"driver": "file", "num-queues": 4, "cache": {"direct": True}, "size": 1024}
    assert validate(Options, written) == validate(Options, typed)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({}, "Parameter 'driver' is missing"),
        ({"driver": 1}, "Invalid parameter type for 'driver', expected: string"),
        (
            {"driver": "nul-co"},
            "Parameter 'driver' does not accept value 'nul-co'; allowed: null-co, file; "
            "did you mean 'null-co'?",
        ),
        ({"driver": "file", "size": True}, "Invalid parameter type for 'size', expected: integer"),
        ({"driver": "file", "size": []}, "Invalid parameter type for 'size', expected: integer"),
        ({"driver": "file", "size": 1.0}, "Invalid parameter type for 'size', expected: integer"),
        ({"driver": "file", "size": -1}, "'size' expects a value from 0 to"),
        ({"driver": "file", "num-queues": 65536}, "'num-queues' expects a value from 0 to 65535"),
        ({"driver": "file", "cache": 1}, "Invalid parameter type for 'cache', expected: object"),
        ({"driver": "file", "cache": {"direct": "maybe"}}, "'cache.direct' expects 'on' or 'off'"),
        ({"driver": "file", "cache": {"direct": 1}}, "'cache.direct', expected: boolean"),
        ({"driver": "file", "iothread": 1}, "'iothread', expected: string or array of strings"),
        ({"driver": "file", "file": 1}, "'file', expected: a node name or an object"),
        ({"driver": "file", "node-name": "1x"}, "'node-name' expects a name of letters"),
        ({"driver": "file", "node-name": "x" * 32}, "a name of at most 31 characters"),
        ({"driver": "file", "node-name": "#block1"}, "starts with a letter"),
        ([], "Expected an object of parameters"),
    ],
)
def test_sentences(data: Any, text: str) -> None:
    assert text in text_of(data)


def test_a_misspelt_name_is_named_before_the_missing_one() -> None:
    text = text_of({"drivr": "file"})
    assert text.startswith("Parameter 'drivr' is unexpected")
    assert "did you mean 'driver'?" in text


def test_paths_are_dotted_and_suggestions_local() -> None:
    text = text_of({"driver": "file", "cache": {"direkt": True}}, "file")
    assert text.startswith("Parameter 'file.cache.direkt' is unexpected")
    assert "did you mean 'direct'?" in text


@pytest.mark.parametrize(
    ("data", "refused", "meant"),
    [
        ({"node_name": "a"}, "node_name", "node-name"),
        ({"node-name": "a", "node_name": "b"}, "node_name", "node-name"),
        ({"cache": {"no_flush": "on"}}, "cache.no_flush", "no-flush"),
        ({"legs": [{}, {"weight_of": 2}]}, "legs.1.weight_of", "weight-of"),
    ],
)
def test_names_of_python_are_no_options(data: dict[str, Any], refused: str, meant: str) -> None:
    """They would be taken by the model, and by nothing that looks at options before."""
    text = text_of({"driver": "file", **data})
    assert text.startswith(f"Parameter '{refused}' is unexpected")
    assert f"did you mean '{meant}'?" in text
    assert Options(driver="file", node_name="a") == validate(
        Options, {"driver": "file", "node-name": "a"}
    )


class Many(Options):
    a1: int = 0
    a2: int = 0
    a3: int = 0
    a4: int = 0
    a5: int = 0
    a6: int = 0


def test_a_name_that_is_nowhere_near_is_answered_with_all_there_are() -> None:
    with pytest.raises(VhostblkError, match=r"'zzz' is unexpected; allowed: driver, .*, a6"):
        validate(Many, {"driver": "file", "zzz": 1})


def test_a_member_is_found_where_it_belongs() -> None:
    assert "did you mean 'cache.direct'?" in text_of({"driver": "file", "direct": "on"})
    assert "its members are cache.direct, cache.no-flush" in text_of(
        {"driver": "file", "cache": "on"}
    )
    assert "its members are f.cache.direct, f.cache.no-flush" in text_of(
        {"driver": "file", "cache": True}, "f"
    )


@pytest.mark.parametrize(
    ("name", "good"), [("a", True), ("a-b.c_1", True), ("1a", False), ("", False), ("a\n", False)]
)
def test_ids(name: str, good: bool) -> None:
    assert id_wellformed(name) == good


def test_every_driver_is_found_by_name_alone() -> None:
    for name in DriverRegistry().all():
        assert DriverRegistry().get(name).driver == name


def test_finding_a_builtin_does_not_import_the_others() -> None:
    registry = DriverRegistry()
    assert registry.find("null-aio") is not None
    assert "file" in registry._modules
    assert not registry._entry_points_scanned
