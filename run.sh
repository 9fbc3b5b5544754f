#!/usr/bin/env bash
# The whole job for a folder of args files: folds, training of each fold, prediction, ensemble, scores.
#   bash run.sh args                                            # the 3B in three folds
#   bash run.sh args/7b
#   bash run.sh args/demo data/demo/test_answers.csv            # where the test answers are known: a table of scores
# A fold that is finished is not trained again; one that was cut off goes on from its last checkpoint.
set -euo pipefail
args=${1:?usage: bash run.sh ARGS_FOLDER [TEST_ANSWERS.csv]}
truth=${2:-}
name=${args#args}
outputs=outputs${name%/}
checkpoints=checkpoints${name%/}
mkdir -p "$outputs"
echo stage,seconds >"$outputs/seconds.csv"

stage() { # stage NAME COMMAND...: run it and note its seconds
  local start=$SECONDS
  echo "== $1"
  "${@:2}"
  echo "$1,$((SECONDS - start))" >>"$outputs/seconds.csv"
}

files=("$args"/fold*.json)
stage folds python make_folds.py "${files[0]}"
for file in "${files[@]}"; do
  fold=$(basename "$file" .json)
  if [ -f "$checkpoints/$fold/metrics.json" ]; then echo "== $fold is finished"; continue; fi
  stage "train $fold" accelerate launch train_fold.py "$file" --resume_from_checkpoint auto
done
folds=("$checkpoints"/fold*)
stage predict python predict.py "${folds[@]}" --base "${files[0]}"
stage "predict with TTA" python predict.py "${folds[@]}" --scales 0.9 1.0 1.1 --orders 2 --output_dir "$outputs/tta"
stage ensemble python ensemble.py "$outputs"/tta/fold*.csv --output "$outputs/submission.csv"
python scores.py "$outputs" ${truth:+--truth "$truth"}
