#!/bin/bash
# Train under Slurm. The job saves and requeues itself five minutes before its time limit. From the project's folder:
#
#   ROOT_DIR=/data/patches sbatch --gres gpu:4 --time 1-0 tools/train_slurm.sh --exp-name mine
#
# Flags before the script go to Slurm, and flags after it go to train.py.
#SBATCH --requeue --signal=B:USR1@300
trap 'kill -USR1 $job; wait $job; scontrol requeue $SLURM_JOB_ID' USR1
sh run_train.sh --resume auto "$@" & job=$!
wait $job
