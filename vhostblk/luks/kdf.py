# SPDX-License-Identifier: GPL-2.0-or-later
"""From a passphrase to the key of a key slot: PBKDF2 and Argon2, and what they may cost.

The costs stand in the header, and a header may come from an enemy. `Limits` bounds them before
anything is computed. All of this runs in threads, one at a time in a process, so that neither the
event loop waits nor memory adds up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vhostblk.luks import hashes
from vhostblk.luks.errors import bad_header, too_costly, unsupported
from vhostblk.secret import SecretBytes
from vhostblk.secret.memory import Buffer, wipe_bytes

T = TypeVar("T")
KIB = 1024
PBKDF2 = "pbkdf2"
ARGON2 = ("argon2i", "argon2id")
LEAST_ITERATIONS = 1000  # as cryptsetup and QEMU; RFC 8018 recommends no fewer
_LEAST_PASSES = 4
_LEAST_MEMORY = 32  # KiB


@dataclass(frozen=True)
class Limits:
    """What a header may ask for, for each of its key slots and digests.

    `memory` is in bytes, for Argon2. `passes` bounds Argon2's time: the memory it fills in all its
    passes together, in bytes; a processor fills about 1 GiB/s. `iterations` bounds PBKDF2's, for
    each block of its result; a processor does one or two millions a second. The defaults are
    beyond what cryptsetup chooses when it is told to spend ten seconds on a large machine.
    """

    memory: int = 1 << 30
    passes: int = 64 << 30
    iterations: int = 100_000_000
    lanes: int = 64

    @classmethod
    def raised(cls, memory: int | None, iterations: int | None) -> Limits:
        """The defaults, but for what is given; more memory may be filled as often as less."""
        limits = cls()
        if memory is not None:
            limits = replace(limits, memory=memory, passes=max(limits.passes, 64 * memory))
        return limits if iterations is None else replace(limits, iterations=iterations)


@dataclass(frozen=True)
class Kdf:
    """A key derivation function and its costs, as a header has them."""

    type: str
    salt: bytes
    hash: str = "sha256"  # PBKDF2
    iterations: int = 0  # PBKDF2
    time: int = 0  # Argon2: passes
    memory: int = 0  # Argon2: KiB
    cpus: int = 0  # Argon2: lanes

    def check(self, limits: Limits, where: str) -> None:
        """Refuse what cannot be, and what costs too much."""
        if self.type == PBKDF2:
            if self.iterations < 1:
                raise bad_header(f"{where}: {self.iterations} iterations of PBKDF2")
            if self.iterations > limits.iterations:
                raise too_costly(
                    f"{where} asks for {self.iterations} iterations of PBKDF2; "
                    f"{limits.iterations} are allowed"
                )
            hashes.digest_size(self.hash)
            return
        if self.type not in ARGON2:
            raise unsupported(f"{where}: key derivation '{self.type}' is not supported; known: "
                              f"{', '.join((PBKDF2, *ARGON2))}")  # fmt: skip
        if self.time < 1 or self.cpus < 1 or self.memory < 8 * self.cpus:
            raise bad_header(
                f"{where}: {self.type} with {self.time} passes, {self.memory} KiB and "
                f"{self.cpus} lanes"
            )
        if self.memory * KIB > limits.memory:
            raise too_costly(
                f"{where} asks for {self.memory // KIB} MiB of memory; {limits.memory >> 20} MiB "
                "are allowed"
            )
        if self.cpus > limits.lanes or self.time * self.memory * KIB > limits.passes:
            raise too_costly(
                f"{where} asks for {self.time} passes over {self.memory} KiB in {self.cpus} lanes; "
                f"{limits.passes >> 20} MiB in all and {limits.lanes} lanes are allowed"
            )

    def cost(self) -> float:
        """Roughly the seconds it takes."""
        if self.type == PBKDF2:
            return self.iterations / 1_000_000
        return self.time * self.memory * KIB / (1 << 30)

    def describe(self) -> dict[str, Any]:
        """For the control socket."""
        if self.type == PBKDF2:
            return {"pbkdf": self.type, "hash": self.hash, "iterations": self.iterations}
        return {
            "pbkdf": self.type,
            "iterations": self.time,
            "memory": self.memory * KIB,
            "parallel": self.cpus,
        }

    def derive(self, passphrase: Buffer, length: int) -> SecretBytes:
        """The key, a long computation; checked before."""
        key = SecretBytes(length)
        if self.type == PBKDF2:
            made = hashes.pbkdf2(self.hash, passphrase, self.salt, self.iterations, length)
            key.view()[:] = made
            wipe_bytes(made)
            return key
        try:
            _argon2(self, passphrase, key.view())
        except BaseException:
            key.close()
            raise
        return key


def _argon2(kdf: Kdf, passphrase: Buffer, into: memoryview) -> None:
    try:
        from cryptography.hazmat.primitives.kdf import argon2
    except ImportError:
        raise unsupported(f"{kdf.type} needs version 44 of Python's cryptography") from None

    kind = argon2.Argon2id if kdf.type == "argon2id" else getattr(argon2, "Argon2i", None)
    if kind is None or len(kdf.salt) < 8:
        # Versions of cryptography before 45 have no Argon2i.
        what = "a salt of less than 8 bytes" if kind else "with this version of cryptography"
        raise unsupported(f"{kdf.type} is not supported: {what}")
    function: Any = kind(
        salt=kdf.salt,
        length=len(into),
        iterations=kdf.time,
        lanes=kdf.cpus,
        memory_cost=kdf.memory,
    )
    if hasattr(function, "derive_into"):
        function.derive_into(passphrase, into)
        return
    words = bytes(memoryview(passphrase))
    made = function.derive(words)
    into[:] = made
    wipe_bytes(made)
    wipe_bytes(words)


# ---- how much to ask for


def pbkdf2_for(hash: str, milliseconds: int, length: int) -> int:
    """Iterations that take this long on this machine, for a key of `length` bytes."""
    count = 4096
    while True:
        started = time.thread_time()
        hashes.pbkdf2(hash, b"benchmark", b"benchmark-of-salt", count, length)
        spent = time.thread_time() - started
        if spent > 0.05 or count >= 1 << 26:
            break
        count *= 4
    return max(LEAST_ITERATIONS, int(count * milliseconds / 1000 / max(spent, 1e-6)))


def argon2_for(type: str, milliseconds: int, memory: int, cpus: int) -> tuple[int, int]:
    """Passes and KiB that take this long: as much memory as allowed first, then more passes."""
    probe = min(memory, 65536)
    kdf = Kdf(type, b"benchmark-of-salt", time=_LEAST_PASSES, memory=probe, cpus=cpus)
    started = time.perf_counter()
    kdf.derive(b"benchmark", 32).close()
    spent = max(time.perf_counter() - started, 1e-6)
    affordable = milliseconds / 1000 / spent * probe * _LEAST_PASSES  # KiB filled in all
    used = int(min(memory, max(affordable / _LEAST_PASSES, _LEAST_MEMORY, 8 * cpus)))
    return max(_LEAST_PASSES, int(affordable / used)), used


def default_memory() -> int:
    """KiB: 1 GiB, or half of what the machine has (cryptsetup's default)."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(1 << 30, physical // 2) // KIB


def default_cpus() -> int:
    """Lanes: as many as processors, at most four (cryptsetup's default)."""
    return min(4, os.cpu_count() or 1)


# ---- threads

_one_at_a_time = threading.Lock()


async def in_thread(work: Callable[[], T]) -> T:
    """Do `work` in a thread of its own, after what others have asked for.

    The thread does not keep a process from ending. A result that nobody waits for any more is
    closed if it is a secret.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.done():
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, SecretBytes):
                    part.close()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        result: Any = None
        error: BaseException | None = None
        with _one_at_a_time:
            if not future.cancelled():
                try:
                    result = work()
                except BaseException as caught:
                    error = caught
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="luks-kdf", daemon=True).start()
    return await future
