# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=sh
#
# What the scripts share: messages, missing Debian packages, and a private APT root.
# To be sourced. Sets TOP (the repository) and BUILD (everything that is made and never committed).

TOP=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
BUILD=$TOP/build
ME=$(basename -- "$0")
export LC_ALL=C.UTF-8
# Programs of the system are not to run under sanitizers, nor other Pythons with our modules.
unset LD_PRELOAD PYTHONPATH PYTHONMALLOC
# Or each of a thousand processes compiles all modules again, which takes longer than what most of them do.
unset PYTHONDONTWRITEBYTECODE
umask 022

say() { printf '%s: %s\n' "$ME" "$*" >&2; }
warn() { printf '%s: warning: %s\n' "$ME" "$*" >&2; }
die() {
    printf '%s: error: %s\n' "$ME" "$*" >&2
    exit 1
}

# Run one step; its output is shown only if it fails (or with VERBOSE=1), so that progress stays readable.
# $1: what to say; the rest: the command.
step() {
    say "$1"
    shift
    if [ "${VERBOSE:-0}" = 1 ]; then
        "$@" >&2
        return
    fi
    step_log=$(mktemp)
    if "$@" >"$step_log" 2>&1 </dev/null; then
        rm -f "$step_log"
    else
        step_status=$?
        cat "$step_log" >&2
        rm -f "$step_log"
        die "failed with status $step_status: $*"
    fi
}

# Run "$@" while no other process of this repository runs under the same lock. $1: name of the lock.
locked() {
    lock_name=$1
    shift
    mkdir -p "$BUILD"
    exec 9>"$BUILD/.$lock_name.lock" || die "cannot write to $BUILD: run this as the user who owns it"
    if ! flock -n 9; then
        say "waiting for another '$lock_name' run to end"
        flock 9
    fi
    "$@"
    exec 9>&-
}

os_field() { (
    # shellcheck disable=SC1091
    [ -r /etc/os-release ] && . /etc/os-release
    eval "printf '%s' \"\${$1:-}\""
); }

is_debian() { [ "$(os_field ID)" = debian ] && command -v apt-get >/dev/null; }

# Names among "$@" that dpkg does not have installed.
missing_packages() {
    for missing_name in "$@"; do
        case $(dpkg-query -W -f '${db:Status-Status}\n' "$missing_name" 2>/dev/null) in
        installed*) ;;
        *) printf '%s ' "$missing_name" ;;
        esac
    done
}

# Install the packages among "$@" that are missing: as root, or by sudo if it asks nothing.
need_packages() {
    need_list=$(missing_packages "$@")
    [ -n "$need_list" ] || return 0
    need_sudo=
    if [ "$(id -u)" != 0 ]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            need_sudo=sudo
        else
            die "these Debian packages are missing and only root can install them:
    sudo apt-get update && sudo apt-get install --no-install-recommends $need_list"
        fi
    fi
    say "installing $need_list"
    mkdir -p "$BUILD"
    # shellcheck disable=SC2086
    if ! $need_sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y $need_list \
        >"$BUILD/apt-install.log" 2>&1 </dev/null; then
        # Lists that are absent or old are the usual reason; ask for new ones only then.
        step "reading Debian's package lists" $need_sudo apt-get -qq update
        step "installing again with new lists" \
            $need_sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y $need_list
    fi
}

# The Debian archives this host already uses, one "SITE RELEASE" a line. Asking apt means that a local mirror,
# a proxy or a snapshot works here too, and that no host name is written in this repository.
# A third party's archive is left out by its Origin, which apt knows once its lists have been read.
debian_sites() {
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(CREATED_BY) $(COMPONENT) $(SITE) $(RELEASE) $(ORIGIN)' 2>/dev/null |
        awk '$1 == "Packages" && $2 == "main" && $3 !~ /^cdrom/ && ($5 == "Debian" || $5 ~ /^\$\(/ || $5 == "") {print $3, $4}' |
        sort -u
}

# The site that holds a suite's base ($1 = ""), or its "-updates" or "-security" part.
debian_site() {
    site_names="$(os_field VERSION_CODENAME) stable oldstable oldoldstable testing unstable sid"
    for site_name in $site_names; do
        site_found=$(debian_sites | awk -v r="$site_name$1" '$2 == r {print $1; exit}')
        [ -z "$site_found" ] || break
    done
    printf '%s' "$site_found"
}

# Make a private APT root: its own lists, cache and (empty) package state, so that nothing of the system changes
# and an ordinary user may do it. Signatures are checked with Debian's archive keyring.
# $1: directory; $2: suite; $3: "deb" or "deb-src". Afterwards `private_apt DIR apt-get …` works in it.
make_private_apt() {
    apt_dir=$1 apt_suite=$2 apt_type=$3
    apt_site=$(debian_site "")
    [ -n "$apt_site" ] || die "apt knows no Debian archive on this host (see: apt-get indextargets)"
    apt_key=
    for apt_file in /usr/share/keyrings/debian-archive-keyring.pgp /usr/share/keyrings/debian-archive-keyring.gpg; do
        [ ! -r "$apt_file" ] || apt_key="[signed-by=$apt_file] "
    done
    mkdir -p "$apt_dir/lists/partial" "$apt_dir/cache/archives/partial" "$apt_dir/parts"
    : >"$apt_dir/status"
    cat >"$apt_dir/apt.conf" <<CONF
Dir::Etc::SourceList "$apt_dir/sources.list";
Dir::Etc::SourceParts "$apt_dir/parts";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "$apt_dir/parts";
Dir::State "$apt_dir";
Dir::State::Lists "$apt_dir/lists";
Dir::State::status "$apt_dir/status";
Dir::Cache "$apt_dir/cache";
APT::Sandbox::User "";
APT::Install-Recommends "false";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Update::Post-Invoke-Success {};
CONF
    apt_updates=$(debian_site -updates)
    apt_security=$(debian_site -security)
    {
        echo "$apt_type $apt_key$apt_site $apt_suite main"
        [ -z "$apt_updates" ] || echo "$apt_type $apt_key$apt_updates $apt_suite-updates main"
        [ -z "$apt_security" ] || echo "$apt_type $apt_key$apt_security $apt_suite-security main"
    } >"$apt_dir/sources.list"
    if private_apt "$apt_dir" apt-get -qq -o APT::Update::Error-Mode=any update >"$apt_dir/update.log" 2>&1; then
        return 0
    fi
    # A mirror may lack the two additional suites; the base suite must be there.
    sed -i '1!d' "$apt_dir/sources.list"
    if private_apt "$apt_dir" apt-get -qq -o APT::Update::Error-Mode=any update >>"$apt_dir/update.log" 2>&1; then
        warn "$apt_suite-updates and $apt_suite-security cannot be reached; using $apt_suite alone"
        return 0
    fi
    cat "$apt_dir/update.log" >&2
    return 1
}

private_apt() { (
    APT_CONFIG=$1/apt.conf
    export APT_CONFIG
    shift
    exec "$@"
); }
