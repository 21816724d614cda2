#!/bin/bash
# Train under Slurm: saves and queues itself again before its time is over. From the project's folder:
#
#   ROOT_DIR=/data/patches sbatch --gres gpu:4 --time 1-0 tools/train_slurm.sh --exp-name mine
#
# Flags before the script are Slurm's, flags after it are train.py's.
#SBATCH --requeue --signal=B:USR1@300
trap 'kill -USR1 $job; wait $job; scontrol requeue $SLURM_JOB_ID' USR1
sh run_train.sh --resume auto "$@" & job=$!
wait $job
