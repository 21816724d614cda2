#!/bin/sh
# Create or complete the Python environment in .venv of the project, or in $VENV. It is safe to run again.
#
#   sh tools/setup_env.sh          set up the environment and print what was done
#   . tools/setup_env.sh           the same, and set PYTHON to its interpreter for the calling script
#
# Nothing is installed if the active python already satisfies requirements.txt.
# PYTHON_BASE is the interpreter that creates a new environment (default: python3).

setup_env() {
    setup_root=$1
    setup_log=
    requirements=$setup_root/requirements.txt

    # Check only the installed packages; pip's dry run would contact the package index.
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
            echo "error: setup_env: '$base -m venv $environment' failed; on Debian, run apt install python3-venv" >&2
            return 1
        }
        made="created $environment and installed the packages of"
    else
        made="updated $environment to satisfy"
    fi
    echo "setup_env: installing requirements.txt into $environment (a few minutes; about 6 GB with GPU builds)" >&2
    setup_log=$environment/setup.log
    if ! "$PYTHON" -m pip install --disable-pip-version-check -r "$requirements" >"$setup_log" 2>&1; then
        tail -n 15 "$setup_log" >&2
        echo "error: setup_env: pip failed; see the full log in $setup_log" >&2
        return 1
    fi
    if ! satisfied "$PYTHON"; then
        "$PYTHON" "$setup_root/tools/check_requirements.py" "$requirements" >&2
        echo "error: setup_env: the installed packages still do not satisfy requirements.txt (see above)" >&2
        return 1
    fi
    echo "setup_env: $made requirements.txt"
}

# Scripts that source this file set SETUP_ROOT. If it is run directly, $0 gives its folder.
if [ -n "${SETUP_ROOT:-}" ]; then
    setup_env "$SETUP_ROOT"
else
    set -eu
    setup_env "$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
fi
