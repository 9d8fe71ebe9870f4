# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's ciphers and its `crypt` node (cffi_build/engine/cipher.c, nodes/crypt.c).

What a disk is encrypted with is written as dm-crypt and cryptsetup do: cipher, mode and IV
generator with hyphens in between ("aes-xts-plain64", "aes-cbc-essiv:sha256"), or with the
kernel's name for the first two ("capi:xts(aes)-plain64").
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from vhostblk._engine import ffi, lib
from vhostblk.engine import Engine, EngineError, NodeHandle, UpcallSink
from vhostblk.schema import VhostblkError
from vhostblk.secret.memory import wipe_bytes

SECTOR = 512
WHOLE = 0xFFFF_FFFF_FFFF_FFFF
"""A boundary behind everything."""

# OpenSSL's name of a cipher, by cipher and bytes of the key.
_CIPHERS: dict[str, dict[int, str]] = {
    "aes": {16: "AES-128", 24: "AES-192", 32: "AES-256"},
    "camellia": {16: "CAMELLIA-128", 24: "CAMELLIA-192", 32: "CAMELLIA-256"},
    "aria": {16: "ARIA-128", 24: "ARIA-192", 32: "ARIA-256"},
    "sm4": {16: "SM4"},
    "cast5": {16: "CAST5"},
    "des3_ede": {24: "DES-EDE3"},
}
_MODES = ("xts", "cbc", "ctr", "ecb")
_OWN_XTS = ("AES-128", "AES-256")  # of which OpenSSL has the whole mode
_IVS = {
    "null": lib.VB_IV_NONE,
    "plain": lib.VB_IV_PLAIN,
    "plain64": lib.VB_IV_PLAIN64,
    "plain64be": lib.VB_IV_PLAIN64BE,
    "benbi": lib.VB_IV_BENBI,
    "essiv": lib.VB_IV_PLAIN64,
    "eboiv": lib.VB_IV_EBOIV,
}


def library() -> str:
    """Name and version of the library that encrypts."""
    return bytes(ffi.string(lib.vb_cipher_library())).decode()


@dataclass(frozen=True)
class CipherSpec:
    """What a disk is encrypted with, taken apart."""

    text: str
    name: str
    mode: str
    iv: str
    iv_hash: str

    @classmethod
    def parse(cls, text: str) -> CipherSpec:
        """Take a specification apart; refuse, by name, what we do not have."""
        kernel = re.fullmatch(r"capi:(\w+)\((\w+)\)(?:-(.+))?", text)
        if kernel is not None:
            mode, name, iv = kernel.groups()
        else:
            name, _, rest = text.partition("-")
            mode, _, iv = rest.partition("-")
        # Without a mode dm-crypt means this.
        mode, iv = mode or "cbc", iv or ("null" if mode == "ecb" else "plain")
        iv, _, iv_hash = iv.partition(":")
        spec = cls(text, name, mode, iv, iv_hash)
        spec._check()
        return spec

    def _check(self) -> None:
        for kind, value, known in (
            ("cipher", self.name, _CIPHERS),
            ("mode", self.mode, _MODES),
            ("IV generator", self.iv, _IVS),
        ):
            if value not in known:
                raise self.error(
                    f"{kind} '{value}' is not supported; these are: {', '.join(known)}"
                )
        if (self.iv == "essiv") != bool(self.iv_hash):
            raise self.error("a hash belongs to the IV generator essiv, and only to that")
        if self.iv_hash and self.iv_hash not in hashlib.algorithms_available:
            raise self.error(f"hash '{self.iv_hash}' is not supported")

    def openssl(self, key_size: int) -> str:
        """OpenSSL's name of the cipher proper, for a key (or both keys, XTS) of that size."""
        sizes = _CIPHERS[self.name]
        twice = 2 if self.mode == "xts" else 1
        if key_size % twice or key_size // twice not in sizes:
            allowed = ", ".join(str(size * twice * 8) for size in sizes)
            raise self.error(f"a key of {key_size * 8} bits does not fit; allowed: {allowed}")
        return sizes[key_size // twice]

    def iv_key(self, key: bytes | bytearray | memoryview) -> bytearray | None:
        """What IVs are encrypted with, if they are."""
        if self.iv == "essiv":
            made = hashlib.new(self.iv_hash, key).digest()
            own = bytearray(made)
            wipe_bytes(made)
            return own
        return bytearray(key) if self.iv == "eboiv" else None

    def iv_cipher(self, key_size: int) -> str:
        """OpenSSL's name of the cipher that IVs are encrypted with."""
        sizes = _CIPHERS[self.name]
        if key_size not in sizes:
            raise self.error(f"{self.name} does not take the {key_size * 8} bits for its IVs")
        return f"{sizes[key_size]}-ECB"

    def error(self, text: str) -> VhostblkError:
        """Why it cannot be used."""
        return VhostblkError(
            f"Cannot use the cipher '{self.text}': {text}",
            data={"code": "bad-cipher", "cipher": self.text},
        )


class Cipher:
    """A cipher with its key, in the engine."""

    def __init__(self, pointer: Any, spec: CipherSpec, sector_size: int) -> None:
        self.pointer = pointer
        self.spec = spec
        self.sector_size = sector_size

    def apply(self, encrypt: bool, offset: int, data: bytearray | memoryview) -> None:
        """Encrypt or decrypt whole sectors in place; `offset` is that on the disk."""
        with ffi.from_buffer(data, require_writable=True) as memory:
            result = lib.vb_cipher_apply(self.pointer, encrypt, offset, memory, len(memory))
        if result < 0:
            raise OSError(-result, f"{self.spec.text}: {len(data)} bytes at {offset}")

    def free(self) -> None:
        """Wipe the key. Nobody encrypts any more."""
        pointer, self.pointer = self.pointer, ffi.NULL
        lib.vb_cipher_free(pointer)


def new_cipher(
    engine: Engine,
    spec: CipherSpec,
    key: bytes | bytearray | memoryview,
    *,
    sector_size: int = SECTOR,
    iv_offset: int = 0,
    large_iv: bool = False,
    xts: int = 0,
) -> Cipher:
    """A cipher. Sectors are counted in 512 bytes for their IVs, with `large_iv` as they are.

    The key is copied; the caller wipes its own. `xts` is for tests: 1 takes OpenSSL's own XTS, 2
    ours around OpenSSL's AES, 3 ours for CPUs with VAES.
    """
    name = spec.openssl(len(key))
    own: str | None = f"{name}-{spec.mode.upper()}"
    if spec.mode == "xts" and name not in _OWN_XTS:
        own = None
    iv_key = spec.iv_key(key)
    iv_cipher = None if iv_key is None else spec.iv_cipher(len(iv_key))
    block = f"{name}-ECB" if spec.mode == "xts" else None
    names = [_string(text) for text in (own, block, iv_cipher)]
    with (
        ffi.from_buffer("uint8_t[]", key) as memory,
        ffi.from_buffer("uint8_t[]", iv_key or b"") as iv_memory,
    ):
        options = {
            "cipher": names[0],
            "xts_block": names[1],
            "xts_own": xts,
            "key": memory,
            "key_size": len(key),
            "iv_cipher": names[2],
            "iv_key": iv_memory,
            "iv_key_size": len(iv_memory),
            "iv": _IVS[spec.iv],
            "sector_size": sector_size,
            "iv_unit": sector_size if large_iv else SECTOR,
            "iv_offset": iv_offset,
        }
        given = ffi.new("struct vb_cipher_options *", options)
        pointer = lib.vb_cipher_new(given, engine.error)
    if iv_key is not None:
        iv_key[:] = bytes(len(iv_key))
    try:
        return Cipher(engine.made(pointer), spec, sector_size)
    except EngineError as error:
        raise spec.error(str(error)) from None


def _string(text: str | None) -> Any:
    return ffi.NULL if text is None else ffi.new("char[]", text.encode())


@dataclass(frozen=True)
class Half:
    """One side of a crypt node's boundary: its cipher (None: plain), and where it is on child 0."""

    cipher: Cipher | None
    offset: int


class CryptHandle(NodeHandle):
    """An encrypted disk on child 0."""

    def __init__(self, engine: Engine, pointer: Any, cookie: int) -> None:
        super().__init__(engine, pointer)
        self._cookie = cookie

    def set(
        self, low: Half, high: Half | None = None, *, boundary: int = WHOLE, discard: bool = False
    ) -> None:
        """Another layout; only while every export that reaches this node is paused."""
        lib.vb_node_crypt_set(self.pointer, _layout(low, high, boundary, discard))

    async def hold(self, begin: int, end: int) -> None:
        """Hand up what touches this range from now on; done when earlier requests are."""
        cookie, io = self._engine.expect_done(self.address)
        lib.vb_node_crypt_hold(self.pointer, begin, end, cookie)
        await io

    def release(self, boundary: int) -> None:
        """Nothing is held any more, and the boundary has moved over what was."""
        lib.vb_node_crypt_release(self.pointer, boundary)

    def free(self) -> None:
        """No request is on its way up or down."""
        self._engine.forget(self._cookie)
        super().free()


def _layout(low: Half, high: Half | None, boundary: int, discard: bool) -> Any:
    halves = [low, low if high is None else high]
    sizes = [half.cipher.sector_size for half in halves if half.cipher is not None]
    return ffi.new(
        "struct vb_crypt_layout *",
        {
            **{
                side: {
                    "cipher": ffi.NULL if half.cipher is None else half.cipher.pointer,
                    "offset": half.offset,
                }
                for side, half in zip(("low", "high"), halves, strict=True)
            },
            "boundary": boundary,
            "sector_size": max(sizes, default=SECTOR),
            "discard": discard,
        },
    )


def new_crypt(
    engine: Engine,
    sink: UpcallSink,
    low: Half,
    high: Half | None = None,
    *,
    boundary: int = WHOLE,
    discard: bool = False,
) -> CryptHandle:
    """A `crypt` node; requests that are held, or write less than a sector, go to `sink`."""
    cookie = engine.new_cookie()
    layout = _layout(low, high, boundary, discard)
    pointer = engine.made(lib.vb_node_crypt_new(engine.pointer, cookie, layout, engine.error))
    engine.listen(cookie, upcalls=sink)
    return CryptHandle(engine, pointer, cookie)
