#!/bin/sh
# Run the whole pipeline on a synthetic cohort, from scans to features. run_train.sh calls it if ROOT_DIR is not set.
#
#   sh tools/run_demo.sh PYTHON [flags for train.py]
#
# All output goes to ssl_exp/demo, ssl_exp/demo_untrained and ssl_exp/demo_data. Finished stages are not repeated;
# remove these folders to start again.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
PYTHON=${1:?usage: run_demo.sh PYTHON [train.py flags]}
shift
for flag; do
    case $flag in
        --exp-name* | --root-dir*)
            echo "error: $flag needs ROOT_DIR; the demo always uses ssl_exp/demo and ssl_exp/demo_data" >&2
            exit 2 ;;
        -h | --help) exec "$PYTHON" "$here/train.py" --help ;;
    esac
done
export PYTHON
cd "$here"
. "$here/tools/forward_signals.sh"

data=ssl_exp/demo_data
experiment=ssl_exp/demo
epochs=${DEMO_EPOCHS:-6}
subjects=${DEMO_SUBJECTS:-80}
defaults="--recipe small --root-dir $data/patches --exp-name demo --resume auto --epochs $epochs --workers 1 --print-freq 34"
# Check the flags now, not only when training starts.
# shellcheck disable=SC2086 # defaults holds several words
counts=$("$PYTHON" -c '
import sys
import torch
from misc.command import count_usable_cores
from misc.run.flags import parse_arguments
subjects, *flags = sys.argv[1:]
args = parse_arguments(None, flags)
if args.batch_size > int(subjects):
    print(f"error: --batch-size {args.batch_size} exceeds the {subjects} subjects of the demo", file=sys.stderr)
    sys.exit(2)
print(count_usable_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0)' "$subjects" $defaults "$@")
cores=${counts% *} gpus=${counts#* }
workers=$([ "$cores" -gt 8 ] && echo 8 || echo "$cores")
started=$(date +%s)
step() {
    echo
    echo "== $1  ($(($(date +%s) - started)) s)"
}

step "1/5 synthetic cohort: $subjects chest CTs from one scanner, with simulated emphysema of five subtypes"
if [ -f "$data/cohort/labels.csv" ]; then
    echo "make_cohort: $data/cohort already exists"
else
    run "$PYTHON" tools/make_cohort.py --out-dir "$data/cohort" --num-subjects "$subjects" --size tiny --scanners one \
        --num-workers "$workers"
fi

step "2/5 preprocessing: lung masks, registration to the atlas, patches"
run sh preprocess/run_preprocess.sh --input-csv "$data/cohort/dataset.csv" --root-dir "$data/patches" \
    --atlas-mask "$data/cohort/atlas_lung_mask.nii.gz" --method threshold --num-workers "$workers"

# The recipe splits a batch into two BatchNorm groups, so two GPUs give the same result as one. A CPU uses all of its
# cores in one process.
ranks=1
[ "$gpus" -ge 2 ] && ranks=2
step "3/5 training: $epochs epochs, $ranks rank(s) on $([ "$gpus" -gt 0 ] && echo "GPUs (NCCL)" || echo "the CPU (Gloo)")"
train() {
    # shellcheck disable=SC2086
    run "$PYTHON" tools/launch.py --standalone --nproc-per-node "$ranks" train.py $defaults "$@"
}
train "$@"
echo
echo "For comparison: the same encoder with random weights, after one pass at learning rate 0 for BatchNorm statistics."
head -n 17 "$data/patches/subjects.csv" > "$data/sixteen.csv"
train --exp-name demo_untrained --epochs 1 --lr 0 --moco-k 16 --subjects "$data/sixteen.csv"

step "4/5 features from the trained and the untrained encoder"
last=$(cd "$experiment" && ls checkpoint_patch_[0-9]*.pth.tar | sort | tail -n 1)
run "$PYTHON" extract_feature.py --exp-name="$experiment" --checkpoint-patch="$last" --layers --labels "$data/cohort/labels.csv"
run "$PYTHON" extract_feature.py --exp-name="${experiment}_untrained" --checkpoint-patch=checkpoint_patch_0001.pth.tar

step "5/5 how well do the features predict the disease? R2 or kappa of held-out subjects, with 95 % intervals"
echo "features: mean and SD of every layer, over locations (--patient-vector layers); mean: the published patient features"
number=$(echo "$last" | sed 's/[^0-9]//g')
features=$experiment/patch_rep/$number
run "$PYTHON" tools/evaluate.py --features "$features/patient_features.csv" \
    --compare "untrained=${experiment}_untrained/patch_rep/0001/patient_features.csv" \
    --labels "$data/cohort/labels.csv" --baselines "$data/patches" --out-dir "$experiment/evaluation" \
    --columns centrilobular_fraction severe_centrilobular_fraction paraseptal_fraction emphysema_grade FEV1pp

cat <<EOF

Done in $(($(date +%s) - started)) s. What to look at:
  scans and true labels   $here/$data/cohort/image, labels.csv
  every scan's patches    $here/$data/patches/qc/index.html (with a browser)
  preprocessing reports   $here/$data/patches/report/*.csv
  training curves         '$PYTHON' -m tensorboard.main --logdir '$here/$experiment'   (or log.jsonl)
  checkpoint              $here/$experiment/$last
  features                $here/$features/patient_features.csv
  evaluation              $here/$experiment/evaluation/evaluation.md and pictures
To train on your own scans, see "Use it on your scans" in README.md.
EOF
