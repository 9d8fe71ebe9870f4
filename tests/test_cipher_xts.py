# SPDX-License-Identifier: GPL-2.0-or-later
"""The masks of XTS, in each of the ways that a CPU may be able to make them.

Against their definition (IEEE 1619, 5.2): a mask is the one before it times x in GF(2^128), and the
first of a sector is its tweak.
"""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest
from compiled import loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from thoroughness import tries

ENGINE = Path(__file__).resolve().parent.parent / "cffi_build" / "engine"
BLOCK = 16
SECTOR_MAX = 4096
GUARD = 64
WAYS = {"portable": "", "avx2": "avx2", "avx512": "avx512f"}  # and what the CPU must have


class Xts(ctypes.Structure):
    """struct vb_xts."""

    _fields_ = (
        (
            "begin",
            ctypes.CFUNCTYPE(
                None,
                ctypes.c_char_p,
                ctypes.c_size_t,
                ctypes.c_size_t,
                ctypes.c_char_p,
                ctypes.c_size_t,
                ctypes.c_void_p,
                ctypes.c_void_p,
            ),
        ),
        (
            "end",
            ctypes.CFUNCTYPE(
                None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
            ),
        ),
        ("quick", ctypes.c_bool),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return loaded(tmp_path_factory.mktemp("xts"), [ENGINE / "cipher_xts.c"])


def masks_of(tweak: bytes, size: int) -> bytes:
    """Of one sector."""
    mask, found = int.from_bytes(tweak, "little"), b""
    for _ in range(size // BLOCK):
        found += mask.to_bytes(BLOCK, "little")
        mask = (mask << 1) & ((1 << 128) - 1) ^ (0x87 if mask >> 127 else 0)
    return found


def exclusive_or(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=tries(100), deadline=None)
@given(
    sector=st.sampled_from([512, 1024, 2048, SECTOR_MAX]),
    sectors=st.integers(1, 8),
    shift=st.integers(0, 63),
    ahead=st.sampled_from([0, SECTOR_MAX]),
    tweaks=st.randoms(use_true_random=False),
)
def test_masks(
    library: ctypes.CDLL,
    way: str,
    sector: int,
    sectors: int,
    shift: int,
    ahead: int,
    tweaks: random.Random,
) -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    if WAYS[way] and WAYS[way] not in flags:
        pytest.skip(f"this CPU has no {WAYS[way]}")
    xts = Xts.in_dll(library, f"vb_xts_{way}")
    tweak = tweaks.randbytes(BLOCK * sectors)
    size = sector * sectors
    content = tweaks.randbytes(size)
    # The guest's memory may lie anywhere; the masks' own is aligned to 64 bytes.
    source = ctypes.create_string_buffer(bytes(shift) + content)
    memory = ctypes.create_string_buffer(2 * size + 64)
    masks = -ctypes.addressof(memory) % 64 + ctypes.addressof(memory)
    masked = masks + size
    xts.begin(
        tweak,
        sectors,
        sector,
        ctypes.cast(ctypes.addressof(source) + shift, ctypes.c_char_p),
        ahead,
        masked,
        masks,
    )
    expected = b"".join(
        masks_of(tweak[at : at + BLOCK], sector) for at in range(0, len(tweak), BLOCK)
    )
    assert ctypes.string_at(masks, size) == expected
    assert ctypes.string_at(masked, size) == exclusive_or(content, expected)
    result = ctypes.create_string_buffer(shift + size + GUARD)
    at = ctypes.addressof(result) + shift
    xts.end(ctypes.cast(masked, ctypes.c_char_p), ctypes.cast(masks, ctypes.c_char_p), at, size)
    assert result.raw[: shift + size] == bytes(shift) + content
    assert result.raw[shift + size :] == bytes(GUARD)
