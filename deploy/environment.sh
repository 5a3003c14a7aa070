# Sourced by deploy/quickstart and tests/run, in bash: finds CPython, and makes environments with pinned packages.
# Changes nothing outside of the environment's own directory.

# Prints the path of every CPython 3.11 or later that can make an environment: one of each minor version, in the order
# in which they are found. PYTHON=/path/to/python3 goes first.
pythons() {
    local candidate found version seen=" "
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 \
            "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3 /usr/bin/python3 /usr/local/bin/python3; do
        # Some are only in name: pyenv's shims, and Debian's without python3-venv.
        found=$("$candidate" -P -c '
import sys, ensurepip, ssl, venv
assert sys.implementation.name == "cpython" and sys.version_info >= (3, 11) and sys.version_info[3] == "final"
print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null) || continue
        version=${found%% *}
        case $seen in *" $version "*) continue ;; esac
        seen="$seen$version "
        printf '%s\n' "${found#* }"
    done
}

# The first of them, or a word on what is needed.
first_python() {
    local found
    found=$(pythons)
    if [ -z "$found" ]; then
        echo "CPython 3.11 or later is needed, with its venv module (on Debian: apt-get install python3-venv)." \
            "If it is in an unusual place: PYTHON=/path/to/python3 $0" >&2
        return 1
    fi
    printf '%s\n' "${found%%$'\n'*}"
}

# environment DIRECTORY PYTHON REQUIREMENTS: makes it, or leaves it when it is what it would become.
environment() {
    local directory=$1 python=$2 requirements=$3 wanted
    # The tree's own path is part of it: environments do not survive being moved.
    wanted=$("$python" -P -c '
import hashlib, sys
digest = hashlib.sha256(repr(sys.argv[1:] + [sys.version]).encode())
for name in sys.argv[2:]:
    digest.update(open(name, "rb").read())
print(digest.hexdigest())' "$directory" "$root/pyproject.toml" "$root/deploy/requirements.txt" "$requirements")
    if [ "$(cat "$directory/made-from" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "Making the environment $directory with $("$python" --version); this takes a minute." >&2
    rm -rf "$directory"
    "$python" -m venv "$directory"
    "$directory/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        --requirement "$requirements" --editable "$root"
    echo "$wanted" > "$directory/made-from"
}

# debian PROGRAM=PACKAGE...: installs the Debian packages of the programs that are missing, where that can be done without
# asking: by root, with apt-get. Elsewhere it says loudly what is missing; whoever needs a program does without it.
debian() {
    local each missing=()
    for each in "$@"; do
        command -v "${each%%=*}" >/dev/null || [ -x "/usr/sbin/${each%%=*}" ] || missing+=("${each#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing from Debian: ${missing[*]}." >&2
        { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" ||
            { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
                "${missing[@]}"; }; } >/dev/null && return 0
    fi
    echo "!! NOT HERE: ${missing[*]} (on Debian: apt-get install ${missing[*]}). What needs it is SKIPPED." >&2
}
