# SPDX-License-Identifier: GPL-2.0-or-later
# Short names for what the scripts do; `just` lists them.

default:
    @just --list

# Packages, libvhost-user, .venv, the compiled engine
setup:
    scripts/setup --with=test

# Everything, or what is named: just test -k resize
test *arguments:
    scripts/test {{arguments}}

# The tests without virtual machines under gcc's sanitizers (address,undefined or thread)
sanitize kind="address,undefined":
    scripts/test --sanitize {{kind}}

# ruff and mypy alone
lint:
    .venv/bin/ruff check .
    .venv/bin/mypy

# A Debian guest on a disk that vhostblk serves
quickstart *arguments:
    scripts/quickstart {{arguments}}

# Speed against qemu-storage-daemon
bench *arguments:
    scripts/bench {{arguments}}

# Remove what was built, guests included
clean:
    rm -rf build .venv vhostblk/_engine*.so
