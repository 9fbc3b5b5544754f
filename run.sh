#!/usr/bin/env bash
# The whole job for a folder of args files: folds, training of each fold, prediction, ensemble, scores.
#   bash run.sh args                                  # the 3B in three folds
#   bash run.sh args/7b --num_train_epochs 5          # fields of the training, given here, override the args files
#   LABELS=data/demo/test_answers.csv bash run.sh args/demo      # where the test answers are known: a table of scores
#   bash run.sh args --max_hours 11                   # training stops with a checkpoint before a notebook of 12 hours dies
#   JOBS=2 bash run.sh args                           # two folds at once, where there is room for two
# Run again, it does not train a finished fold anew, and goes on with one that was cut off from its last checkpoint.
set -euo pipefail
export RUN_STARTED=${RUN_STARTED:-$(date +%s)} # max_hours counts from here, over all folds
LABELS=${LABELS:-${TRUTH:-}} # TRUTH: the name of the release before
args=${1:-}
args=${args%/}
case "$args" in args | args/*) ;; *) echo "error: usage: bash run.sh args, or a folder below it such as args/7b" >&2; exit 2 ;; esac
case " ${*:2} " in *" --output_dir"* | *" --train_csv"* | *" --image_root"* | *" --folds_csv"* | *" --fold"[\ =]*)
  echo "error: train_csv, image_root, folds_csv and fold belong into the args files, which every step reads; a fold's" \
    "folder is named after its args file" >&2
  exit 2 ;;
esac
outputs=outputs${args#args}
checkpoints=checkpoints${args#args}
mkdir -p "$outputs"
echo stage,seconds >"$outputs/seconds.txt"

stage() { # stage NAME COMMAND...: run it and note its seconds
  local start=$SECONDS
  echo "== $1"
  "${@:2}"
  echo "$1,$((SECONDS - start))" >>"$outputs/seconds.txt"
}

files=("$args"/fold*.json)
folds=()
predictions=()
stage folds python make_folds.py "${files[0]}"
for file in "${files[@]}"; do
  fold=$(basename "$file" .json)
  folds+=("$checkpoints/$fold")
  predictions+=("$outputs/$fold.csv")
done
train() { # every fold, JOBS at a time, the cores shared out among them
  local jobs=${JOBS:-1}
  export OMP_NUM_THREADS=$((($(nproc) + jobs - 1) / jobs))
  printf '%s\n' "${files[@]}" |
    # xargs starts no further fold after a 255: when the time is up, or nothing else could go better.
    xargs -P "$jobs" -I {} sh -c 'accelerate launch --quiet train_fold.py "$@" --resume_from_checkpoint auto || exit 255' \
      sh {} "$@"
}
stage "train ${#files[@]} folds" train "${@:2}"
unset OMP_NUM_THREADS
# The untrained base is asked only where there is something to compare with.
stage predict env OMP_NUM_THREADS="$(nproc)" accelerate launch --quiet predict.py "${folds[@]}" ${LABELS:+--base "${folds[0]}/args.json"} \
  --num_permutations 4 --output_dir "$outputs"
stage ensemble python ensemble.py "${predictions[@]}"
python scores.py "$outputs" ${LABELS:+--labels "$LABELS"}
