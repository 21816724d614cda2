#!/bin/sh
# All five preprocessing steps, in order:
#
#   sh preprocess/run_preprocess.sh --input-csv dataset.csv --root-dir /data/patches \
#       --atlas-mask atlas_lung_mask.nii.gz [--atlas-patch-loc atlas_patch_loc.npy] \
#       [--method threshold | --lungmask-weights FILE] [--num-workers 4] [--scheduler tcp://host:port] \
#       [--min-dice 0.5] [--overwrite] [--strict] [--no-qc] [--no-progress]
#
# Flags go to the steps that know them; python preprocess/segment_lung.py --help and the other steps'
# say what they do and when to change them. What is done already is skipped; start it again after a
# stop, or after adding subjects. It runs in $PYTHON, else in the active environment, else in the one
# that tools/setup_env.sh made.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)

usage() {
    sed -n '2,13s/^# \{0,1\}//p' "$0"
}
fail() {
    echo "error: $1" >&2
    exit 2
}

csv= root= mask= loc= method= weights= workers= scheduler= dice= strict= qc= progress= overwrite=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --strict) strict=1; shift; continue ;;
        --no-qc) qc=1; shift; continue ;;
        --no-progress) progress=1; shift; continue ;;
        --overwrite) overwrite=1; shift; continue ;;
        --*=*) flag=${1%%=*}; value=${1#*=}; shift ;;
        --*) flag=$1; [ $# -ge 2 ] || fail "$flag needs a value"; value=$2; shift 2 ;;
        *) fail "unexpected $1; see --help" ;;
    esac
    case $flag in
        --input-csv) csv=$value ;;
        --root-dir) root=$value ;;
        --atlas-mask) mask=$value ;;
        --atlas-patch-loc) loc=$value ;;
        --method) method=$value ;;
        --lungmask-weights) weights=$value ;;
        --num-workers) workers=$value ;;
        --scheduler) scheduler=$value ;;
        --min-dice) dice=$value ;;
        *) fail "unknown flag $flag; see --help" ;;
    esac
done
. "$here/forward_signals.sh"
[ -n "$csv" ] || fail "--input-csv is missing: the table with columns sid and image"
[ -n "$root" ] || fail "--root-dir is missing: where the patch store goes"
[ -n "$mask" ] || fail "--atlas-mask is missing: the atlas's lung mask"
# A wrong flag or table is told before anything is written; step 3 would find its own hours later.
case $method in '' | lungmask | threshold) ;; *) fail "--method $method is neither lungmask nor threshold" ;; esac
case $workers in *[!0-9]* | 0*) fail "--num-workers $workers: a whole number, at least 1" ;; esac
case $dice in
    *[!0-9.]* | *.*.*) fail "--min-dice $dice: between 0 and 1" ;;
    '' | 0 | 0.* | .[0-9]* | 1 | 1.0) ;;
    *) fail "--min-dice $dice: between 0 and 1" ;;
esac
[ -z "$weights" ] || [ "$method" != threshold ] || fail "--lungmask-weights goes with --method lungmask"
[ -z "$weights" ] || [ -f "$weights" ] || fail "--lungmask-weights $weights does not exist"

if [ -z "${PYTHON:-}" ]; then
    made=${VENV:-$here/../.venv}/bin/python
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$made" ]; then PYTHON=$made; else PYTHON=python; fi
fi
"$PYTHON" -c '
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("SimpleITK", "ants", "pandas"))))' 2>/dev/null ||
    fail "'$PYTHON' lacks the packages of requirements.txt: run sh tools/setup_env.sh, and activate the environment"

"$PYTHON" -c '
import sys
sys.path.insert(0, sys.argv[1])
from preprocess.subjects import read_subjects, script_main
script_main(lambda: read_subjects(sys.argv[2]) and None)' "$here/.." "$csv"
run "$PYTHON" "$here/patchify_atlas.py" --atlas-mask "$mask" --root-dir "$root" ${loc:+--atlas-patch-loc "$loc"}
common() {
    script=$1
    shift
    run "$PYTHON" "$here/$script" --input-csv "$csv" --root-dir "$root" ${workers:+--num-workers "$workers"} \
        ${scheduler:+--scheduler "$scheduler"} ${strict:+--strict} ${progress:+--no-progress} ${overwrite:+--overwrite} "$@"
}
common segment_lung.py ${method:+--method "$method"} ${weights:+--lungmask-weights "$weights"}
common register.py --atlas-mask "$mask" ${dice:+--min-dice "$dice"}
common patchify_images.py --atlas-mask "$mask" ${qc:+--no-qc}
run "$PYTHON" "$here/group_patches.py" --root-dir "$root" ${progress:+--no-progress}
