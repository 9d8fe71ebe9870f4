# SPDX-License-Identifier: GPL-2.0-or-later
"""Making a checkout ready: where libvhost-user's source is found and what is refused, what is said
where there is no Debian, and a wheel that stands on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
SOURCES = ("VHOSTBLK_LIBVHOST_USER", "VHOSTBLK_QEMU_SRC")
FETCHED = TOP / "build" / "libvhost-user"

needs_source = pytest.mark.skipif(
    not FETCHED.is_dir() and not any(os.environ.get(name) for name in SOURCES),
    reason="no source of libvhost-user",
)


def run(*command: str | Path, directory: Path = TOP, **environment: str) -> tuple[int, str, str]:
    """Exit status, standard output and error, with no source of libvhost-user but those given."""
    inherited = {name: value for name, value in os.environ.items() if name not in SOURCES}
    done = subprocess.run(
        command,
        cwd=directory,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


# ---- the builder


def qemu_tree(directory: Path, version: str | None, header: str = "int backend_fd;") -> Path:
    """What the builder looks at in an unpacked QEMU."""
    library = directory / "subprojects" / "libvhost-user"
    library.mkdir(parents=True)
    (library / "libvhost-user.c").write_text("/* empty */\n")
    (library / "libvhost-user.h").write_text(f"{header}\n")
    if version is not None:
        (directory / "VERSION").write_text(f"{version}\n")
    return directory


def build(**environment: str) -> tuple[int, str, str]:
    """All of a build but the compiler; the version that would be compiled in."""
    program = "from builder import *; print(libvhost_user_version(libvhost_user_directory()))"
    return run(sys.executable, "-c", program, directory=TOP / "cffi_build", **environment)


@pytest.mark.parametrize("version", ["10.0.13", "1:10.0.13+ds-0+deb13u1", "11.0.0"])
def test_a_version_that_is_new_enough(tmp_path: Path, version: str) -> None:
    status, said, error = build(VHOSTBLK_QEMU_SRC=str(qemu_tree(tmp_path, version)))
    assert status == 0, error
    assert said.startswith(f"{version} (sha256 ")


@pytest.mark.parametrize("version", ["10.0.12", "1:10.0.12+ds-0+deb13u1", "9.2.4", "7.2.22"])
def test_an_older_version_is_refused_and_why(tmp_path: Path, version: str) -> None:
    tree = qemu_tree(tmp_path, version)
    status, _, error = build(VHOSTBLK_QEMU_SRC=str(tree))
    assert status == 1
    assert error == (
        f"vhostblk: cannot build the engine: {tree}/subprojects/libvhost-user is from QEMU "
        f"{version}; 10.0.13 or later is needed, because a guest can overflow the stack of older "
        "ones (CVE-2026-6425)\n"
    )


def test_a_library_without_a_version_is_judged_by_its_header(tmp_path: Path) -> None:
    status, said, error = build(VHOSTBLK_QEMU_SRC=str(qemu_tree(tmp_path / "new", None)))
    assert status == 0, error
    assert said.startswith("unknown version (sha256 ")
    old = qemu_tree(tmp_path / "old", None, "int slave_fd;")
    status, _, error = build(VHOSTBLK_QEMU_SRC=str(old))
    assert status == 1
    assert f"{old}/subprojects/libvhost-user is an old libvhost-user (no backend_fd" in error


def test_the_library_alone_comes_before_a_tree(tmp_path: Path) -> None:
    tree = qemu_tree(tmp_path / "tree", "10.0.12")
    alone = qemu_tree(tmp_path / "alone", None) / "subprojects" / "libvhost-user"
    (alone / "VERSION").write_text("10.0.14\nand its sources' sums\n")
    given = {"VHOSTBLK_QEMU_SRC": str(tree), "VHOSTBLK_LIBVHOST_USER": str(alone)}
    status, said, error = build(**given)
    assert status == 0, error
    assert said.startswith("10.0.14 (sha256 ")


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_is_not_there(tmp_path: Path, name: str) -> None:
    status, _, error = build(**{name: str(tmp_path / "absent")})
    assert status == 1
    assert f"{name} is set, but there is no libvhost-user.c in {tmp_path}/absent" in error


def test_no_source_at_all(tmp_path: Path) -> None:
    shutil.copytree(TOP / "cffi_build", tmp_path / "cffi_build")
    status, _, error = run(
        sys.executable, "-c", "import builder", directory=tmp_path / "cffi_build"
    )
    assert status == 1
    assert "run scripts/fetch-libvhost-user" in error
    assert "set VHOSTBLK_QEMU_SRC to an unpacked QEMU source tree (10.0.13 or later)" in error


# ---- the scripts


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A checkout with nothing but its scripts, on a machine that is not Debian."""
    shutil.copytree(TOP / "scripts", tmp_path / "scripts")
    (tmp_path / "os-release").write_text('ID=fedora\nVERSION_ID=43\nNAME="Fedora Linux"\n')
    if elsewhere(tmp_path, "true")[0]:
        pytest.skip("no mount namespaces here")
    return tmp_path / "scripts"


def elsewhere(directory: Path, *command: str | Path, **environment: str) -> tuple[int, str, str]:
    """Run a command that finds the os-release of `directory`."""
    enter = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    mounted = f'mount --bind "{directory}/os-release" /etc/os-release && exec "$@"'
    return run(*enter, "sh", "-c", mounted, "sh", *command, **environment)


def only(directory: Path, *tools: str) -> str:
    """A PATH that leads to these tools and no other."""
    path = directory / "bin"
    path.mkdir()
    for tool in tools:
        found = shutil.which(tool)
        assert found is not None, tool
        (path / tool).symlink_to(found)
    return str(path)


def test_where_there_is_no_debian_all_that_lacks_is_named(scripts: Path) -> None:
    tools = only(scripts.parent, "sh", "dirname", "basename", "mount", "unshare")
    given = {"PATH": tools, "VHOSTBLK_PYTHON": "no-such-python"}
    status, _, error = elsewhere(scripts.parent, "sh", scripts / "setup", **given)
    assert status == 1
    assert "this is not Debian; install these by your distribution's means:" in error
    lacking = "gcc Python>=3.11-with-venv-and-headers liburing-headers OpenSSL-3-headers"
    assert f": {lacking}" in error
    assert "python3-venv python3-dev gcc libc6-dev liburing-dev libssl-dev" in error
    assert "qemu-system" not in error
    assert "and unpack QEMU's source, 10.0.13 or later, and set VHOSTBLK_QEMU_SRC" in error
    assert not (scripts.parent / "build").exists() and not (scripts.parent / ".venv").exists()

    _, _, error = elsewhere(scripts.parent, "sh", scripts / "setup", "--with=qemu", **given)
    assert f": {lacking} qemu-system-x86_64 qemu-img" in error
    assert "qemu-system-x86 qemu-utils" in error

    given["VHOSTBLK_QEMU_SRC"] = "/somewhere"
    _, _, error = elsewhere(scripts.parent, "sh", scripts / "setup", **given)
    assert f": {lacking}" in error and "VHOSTBLK_QEMU_SRC" not in error


def test_where_there_is_no_debian_nothing_is_fetched(scripts: Path, tmp_path: Path) -> None:
    fetch = scripts / "fetch-libvhost-user"
    status, _, error = elsewhere(scripts.parent, fetch)
    assert status == 1
    assert "this is not Debian, so apt cannot fetch libvhost-user." in error
    assert "version 10.0.13 or later, and set VHOSTBLK_QEMU_SRC to its directory" in error
    assert "VHOSTBLK_LIBVHOST_USER to its subprojects/libvhost-user" in error

    tree = qemu_tree(tmp_path / "tree", "10.0.13")
    library = tree / "subprojects" / "libvhost-user"
    given = [("VHOSTBLK_QEMU_SRC", tree), ("VHOSTBLK_LIBVHOST_USER", library)]
    for name, path in given:
        assert elsewhere(scripts.parent, fetch, **{name: str(path)}) == (0, "", "")
    library.rename(tmp_path / "moved")
    for name, path in given:
        status, _, error = elsewhere(scripts.parent, fetch, **{name: str(path)})
        assert status == 1
        assert f"{name} is {path}, and there is no " in error


@pytest.mark.parametrize(
    "script", ["setup", "test", "quickstart", "fetch-libvhost-user", "build-guest-image"]
)
def test_scripts_describe_themselves_and_refuse_what_they_do_not_know(script: str) -> None:
    status, said, _ = run(TOP / "scripts" / script, "--help")
    assert status == 0
    assert f"scripts/{script}" in said
    if script != "test":  # which gives it to pytest
        status, _, error = run(TOP / "scripts" / script, "--no-such-option")
        assert status == 1
        assert "unknown option --no-such-option (see --help)" in error


# ---- the wheel


@needs_source
@pytest.mark.skipif("VHOSTBLK_SANITIZED" in os.environ, reason="compiles an engine of its own")
@pytest.mark.timeout(300)
def test_a_wheel_is_complete(tmp_path: Path) -> None:
    """Made from the source distribution, installed in a directory where there is nothing else."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("vhostblk", "cffi_build", "scripts", "docs"):
        shutil.copytree(TOP / name, source / name, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for name in (
        *("setup.py", "pyproject.toml", "MANIFEST.in"),
        *("README.md", "CHANGELOG.md", "LICENSE"),
    ):
        shutil.copy(TOP / name, source)
    given = {name: os.environ[name] for name in SOURCES if os.environ.get(name)}
    given = given or {"VHOSTBLK_LIBVHOST_USER": str(FETCHED)}

    status, _, error = run(sys.executable, "setup.py", "-q", "sdist", directory=source, **given)
    assert status == 0, error
    [packed] = (source / "dist").glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    made = ("--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, packed)
    status, _, error = run(*pip, "wheel", *made, directory=tmp_path, **given)
    assert status == 0, error
    [wheel] = tmp_path.glob("*.whl")
    assert "-cp311-abi3-linux_" in wheel.name
    installed = ("--no-deps", "--no-index", "--target", target, wheel)
    status, _, error = run(*pip, "install", *installed, directory=tmp_path)
    assert status == 0, error

    def files(directory: Path) -> set[Path]:
        kept = {path.relative_to(directory) for path in directory.rglob("*.*") if path.is_file()}
        return {path for path in kept if path.suffix not in (".pyc", ".so")}

    assert files(target / "vhostblk") == files(TOP / "vhostblk")
    here = {"PYTHONPATH": str(target)}
    whence = "import vhostblk._engine; print(vhostblk._engine.__file__)"
    status, said, error = run(sys.executable, "-c", whence, directory=tmp_path, **here)
    assert (status, said) == (0, f"{target}/vhostblk/_engine.abi3.so\n"), error
    status, said, error = run(target / "bin" / "vhostblk", "--version", directory=tmp_path, **here)
    assert status == 0, error
    assert said.startswith("vhostblk ")
    assert (target / "share/qemu/vhost-user/50-vhostblk.json").is_file()
