#!/bin/sh
# Runs all five preprocessing stages in order. List the flags with: sh preprocess/run_preprocess.sh --help
#
# Runs preprocess/run_preprocess.py with $PYTHON if it is set. Otherwise it uses the active environment, or the
# environment that tools/setup_env.sh made if none is active.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    made=${VENV:-$here/../.venv}/bin/python
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$made" ]; then PYTHON=$made; else PYTHON=python; fi
fi
"$PYTHON" -c '
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("SimpleITK", "ants", "pandas"))))' 2>/dev/null || {
    echo "error: '$PYTHON' lacks packages from requirements.txt; run sh tools/setup_env.sh and activate the environment" >&2
    exit 2
}
exec "$PYTHON" "$here/run_preprocess.py" "$@"
