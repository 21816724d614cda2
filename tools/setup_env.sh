#!/bin/sh
# Make the Python environment: .venv in the project, or $VENV. Safe to run again.
#
#   sh tools/setup_env.sh          make or complete it, and say in one line what was done
#   . tools/setup_env.sh           the same, and set PYTHON to its interpreter for the calling script
#
# Does nothing when the active python already satisfies requirements.txt.
# PYTHON_BASE (python3) is the interpreter that a new environment is made from.

setup_env() {
    setup_root=$1
    setup_log=
    requirements=$setup_root/requirements.txt

    # pip's dry run would ask the registry; this asks only what is installed.
    satisfied() {
        [ -x "$1" ] || command -v "$1" >/dev/null 2>&1 || return 1
        "$1" "$setup_root/tools/check_requirements.py" "$requirements" >/dev/null 2>&1
    }

    active=$(command -v python3 || true)
    if [ -z "${VENV:-}" ] && command -v python >/dev/null 2>&1 && satisfied "$(command -v python)"; then
        PYTHON=$(command -v python)
        echo "setup_env: $PYTHON satisfies requirements.txt, nothing to do"
        return 0
    fi
    environment=${VENV:-$setup_root/.venv}
    PYTHON=$environment/bin/python
    if satisfied "$PYTHON"; then
        echo "setup_env: $environment satisfies requirements.txt, nothing to do"
        return 0
    fi
    base=${PYTHON_BASE:-$active}
    if [ -z "$base" ]; then
        echo "error: setup_env: no python3 found; install Python 3.10 or newer, or set PYTHON_BASE" >&2
        return 1
    fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: setup_env: $base is older than Python 3.10; set PYTHON_BASE to a newer one" >&2
        return 1
    fi
    if [ ! -x "$PYTHON" ]; then
        "$base" -m venv "$environment" || {
            echo "error: setup_env: '$base -m venv $environment' failed (on Debian: apt install python3-venv)" >&2
            return 1
        }
        made="made $environment and installed"
    else
        made="installed into $environment"
    fi
    echo "setup_env: installing requirements.txt into $environment; a few minutes and about 6 GB with GPU builds" >&2
    setup_log=$environment/setup.log
    if ! "$PYTHON" -m pip install --disable-pip-version-check -r "$requirements" >"$setup_log" 2>&1; then
        tail -n 15 "$setup_log" >&2
        echo "error: setup_env: pip failed; the whole log is $setup_log" >&2
        return 1
    fi
    if ! satisfied "$PYTHON"; then
        "$PYTHON" "$setup_root/tools/check_requirements.py" "$requirements" >&2
        echo "error: setup_env: the installed packages do not satisfy requirements.txt" >&2
        return 1
    fi
    echo "setup_env: $made requirements.txt"
}

# SETUP_ROOT is set by scripts that source this file; run by itself, $0 tells where it is.
if [ -n "${SETUP_ROOT:-}" ]; then
    setup_env "$SETUP_ROOT"
else
    set -eu
    setup_env "$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
fi
