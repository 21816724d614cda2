#!/bin/sh
# All five preprocessing steps, in order; sh preprocess/run_preprocess.sh --help tells its flags.
#
# Runs preprocess/run_preprocess.py in $PYTHON, else in the active environment, else in the one that
# tools/setup_env.sh made.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    made=${VENV:-$here/../.venv}/bin/python
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$made" ]; then PYTHON=$made; else PYTHON=python; fi
fi
"$PYTHON" -c '
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("SimpleITK", "ants", "pandas"))))' 2>/dev/null || {
    echo "error: '$PYTHON' lacks the packages of requirements.txt: run sh tools/setup_env.sh, and activate the environment" >&2
    exit 2
}
exec "$PYTHON" "$here/run_preprocess.py" "$@"
