#!/usr/bin/env bash
# The whole job for a folder of args files: folds, training of each fold, prediction, ensemble, scores.
#   bash run.sh args                                  # the 3B in three folds
#   bash run.sh args/7b --num_train_epochs 5          # fields given here override the args files
#   TRUTH=data/demo/test_answers.csv bash run.sh args/demo      # where the test answers are known: a table of scores
# Run again, it does not train a finished fold anew, and goes on with one that was cut off from its last checkpoint.
set -euo pipefail
args=${1:?usage: bash run.sh ARGS_FOLDER [--field value ...]}
args=${args%/}
outputs=outputs${args#args}
checkpoints=checkpoints${args#args}
mkdir -p "$outputs"
echo stage,seconds >"$outputs/seconds.csv"

stage() { # stage NAME COMMAND...: run it and note its seconds
  local start=$SECONDS
  echo "== $1"
  "${@:2}"
  echo "$1,$((SECONDS - start))" >>"$outputs/seconds.csv"
}

files=("$args"/fold*.json)
folds=()
stage folds python make_folds.py "${files[0]}"
for file in "${files[@]}"; do
  fold=$checkpoints/$(basename "$file" .json)
  folds+=("$fold")
  if [ -f "$fold/metrics.json" ]; then echo "== $fold is finished"; continue; fi
  stage "train $(basename "$fold")" accelerate launch --quiet train_fold.py "$file" --resume_from_checkpoint auto "${@:2}"
done
stage predict python predict.py "${folds[@]}"
stage "predict with TTA" python predict.py "${folds[@]}" --scales 0.9 1.0 1.1 --orders 2 --output_dir "$outputs/tta"
stage ensemble python ensemble.py "$outputs"/tta/fold*.csv --output "$outputs/submission.csv"
if [ -n "${TRUTH:-}" ]; then # the untrained base is asked only where there is something to compare
  stage "predict untrained" python predict.py --base "${folds[0]}/args.json" --output_dir "$outputs"
fi
python scores.py "$outputs" ${TRUTH:+--truth "$TRUTH"}
