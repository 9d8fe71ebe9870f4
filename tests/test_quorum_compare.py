# SPDX-License-Identifier: GPL-2.0-or-later
"""The comparison of all legs' versions in one pass, for every length, place and difference."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest
from compiled import loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from thoroughness import tries

NODES = Path(__file__).resolve().parent.parent / "cffi_build" / "engine" / "nodes"
GUARD = b"\xa5" * 64


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = loaded(tmp_path_factory.mktemp("compare"), [NODES / "quorum_compare.c"])
    for name in ("quorum_compare", "quorum_compare_portable"):
        getattr(library, name).restype = ctypes.c_bool
    return library


@pytest.mark.parametrize("name", ["quorum_compare", "quorum_compare_portable"])
@settings(max_examples=tries(200), deadline=None)
@given(
    count=st.integers(1, 5),
    bytes_=st.one_of(st.integers(0, 300), st.sampled_from([512, 4096, 65536, 65536 + 8])),
    shift=st.integers(0, 63),
    copy=st.booleans(),
    data=st.data(),
)
def test_one_bit_is_a_difference(
    library: ctypes.CDLL,
    name: str,
    count: int,
    bytes_: int,
    shift: int,
    copy: bool,
    data: st.DataObject,
) -> None:
    content = random.Random(bytes_).randbytes(bytes_)
    versions = [bytearray(shift) + content for _ in range(count)]
    different = count > 1 and bytes_ > 0 and data.draw(st.booleans())
    if different:
        which = data.draw(st.integers(0, count - 1))
        versions[which][shift + data.draw(st.integers(0, bytes_ - 1))] ^= 1 << data.draw(
            st.integers(0, 7)
        )
    memories = [(ctypes.c_char * len(v)).from_buffer(v) for v in versions]
    pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(m) + shift for m in memories))
    target = ctypes.create_string_buffer(b"\0" * bytes_ + GUARD, bytes_ + len(GUARD))
    equal = getattr(library, name)(
        pointers,
        ctypes.c_uint32(count),
        ctypes.c_size_t(bytes_),
        ctypes.byref(target) if copy else None,
    )
    assert equal is not different
    assert target.raw[bytes_:] == GUARD
    if equal:
        assert target.raw[:bytes_] == (content if copy else bytes(bytes_))
