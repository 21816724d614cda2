#!/bin/sh
# Set up the Python environment and run the tests in two processes.
#
#   sh tests/run_tests.sh                  all tests
#   sh tests/run_tests.sh -m "not slow"    without the slow tests; all flags go to pytest
#   sh tests/run_tests.sh -n 0             in a single process
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
SETUP_ROOT=$here
. "$here/tools/setup_env.sh"
cd "$here"
exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
