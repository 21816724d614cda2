#!/bin/sh
# Set up, and run the tests, two at a time:  sh tests/run_tests.sh [more flags for pytest, such as -m "not slow" or -n 0]
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
SETUP_ROOT=$here
. "$here/tools/setup_env.sh"
cd "$here"
exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
