#!/bin/sh
# Set up the Python environment and train.
#
#   sh run_train.sh                              demo: the whole pipeline on a synthetic cohort, on CPU or GPUs
#   ROOT_DIR=/data/patches sh run_train.sh       the published hyper-parameters on 4 GPUs
#   ROOT_DIR=/data/patches NGPUS=8 sh run_train.sh --exp-name mine --amp bf16      other flags go to train.py
#
# On several machines, run on each one, with NODE_RANK counting from 0:
#   ROOT_DIR=/data/patches NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=node0:29500 sh run_train.sh
#
# Jobs that run at the same time need different endpoints. RDZV_ID names the job (default: from SLURM_JOB_ID and flags).
# VENV sets the folder of the Python environment (default: .venv in the project).
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
case ${1:-} in -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
SETUP_ROOT=$here
. "$here/tools/setup_env.sh"

if [ -z "${ROOT_DIR:-}" ]; then
    echo "ROOT_DIR is not set: running the demo on a small synthetic cohort. Set it to train on your own patch store."
    exec sh "$here/tools/run_demo.sh" "$PYTHON" "$@"
fi
[ -d "$ROOT_DIR" ] || {
    echo "error: ROOT_DIR=$ROOT_DIR is not a folder; make a patch store with preprocess/run_preprocess.sh" >&2
    exit 2
}

NGPUS=${NGPUS:-4}
case $NGPUS in
    0 | 0[0-9]* | *[!0-9]*) echo "error: NGPUS=$NGPUS must be a whole number of at least 1" >&2; exit 2 ;;
esac
NNODES=${NNODES:-1}
if [ "$NNODES" -gt 1 ]; then
    [ -n "${RDZV_ENDPOINT:-}" ] || {
        echo "error: NNODES=$NNODES needs RDZV_ENDPOINT=host:port of the first machine" >&2
        exit 2
    }
    # All machines of a job compute the same id, from the scheduler's job id and the flags.
    job=${RDZV_ID:-job${SLURM_JOB_ID:-}-$(printf '%s\n' "$NNODES" "$NGPUS" "$@" | cksum | cut -d " " -f 1)}
    rendezvous="--nnodes $NNODES --node-rank ${NODE_RANK:-0} --rdzv-backend c10d --rdzv-endpoint $RDZV_ENDPOINT --rdzv-id $job"
else
    rendezvous="--standalone"
fi

# The published hyper-parameters are the defaults of train.py. Flags in "$@" override these, including --recipe small.
# shellcheck disable=SC2086 # rendezvous holds several words
exec "$PYTHON" "$here/tools/launch.py" $rendezvous --nproc-per-node "$NGPUS" "$here/train.py" \
    --root-dir "$ROOT_DIR" \
    --exp-name exp_neighbor_2_128_expert_8 \
    --recipe published \
    "$@"
