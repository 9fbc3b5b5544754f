#!/usr/bin/env bash
# A whole contest: folds, training, prediction, ensemble, scores, for all fold*.json in a folder of args files.
#   bash run.sh args                               # the 3B in three folds
#   bash run.sh args/7b --num_train_epochs 5       # flags of the training override the args files
#   bash run.sh args --max_hours 11                # stop training with a checkpoint after 11 hours, for 12-hour notebooks
#   LABELS=test_answers.csv bash run.sh args       # a table of scores, where the test answers are known
#   JOBS=2 bash run.sh args                        # train two folds at once, each in a process of its own
# Run it again to continue: finished folds are skipped, others resume from their latest checkpoint.
set -euo pipefail
export RUN_STARTED=${RUN_STARTED:-$(date +%s)} # max_hours counts from here
LABELS=${LABELS:-${TRUTH:-}}                   # TRUTH: its name in earlier releases
JOBS=${JOBS:-1}
args=${1:-}
args=${args%/}
case "$args" in args | args/*) ;; *)
  echo "error: name the folder args or one below it. Usage: bash run.sh args/7b [--field value ...]" >&2
  exit 2 ;;
esac
shift
case " $* " in *" --output_dir"* | *" --train_csv"* | *" --image_root"* | *" --folds_csv"* | *" --fold"[\ =]*)
  echo "error: set train_csv, image_root, folds_csv and fold in the args files, because all steps read them." \
    "The args file's name also names the output folder." >&2
  exit 2 ;;
esac
outputs=outputs${args#args}
checkpoints=checkpoints${args#args}
files=("$args"/fold*.json)
names=("${files[@]##*/}")
names=("${names[@]%.json}")
[ -t 2 ] || export HF_HUB_DISABLE_PROGRESS_BARS=1

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
launch=python # with one GPU or none
[ "$gpus" -lt 2 ] || launch="accelerate launch --multi_gpu --num_processes $gpus --num_machines 1 --mixed_precision no --dynamo_backend no"
read -ra launch <<<"${LAUNCH:-$launch}"

stage() { # stage NAME COMMAND...: run it and note its seconds
  local start=$SECONDS
  echo "== $1"
  "${@:2}"
  echo "$1,$((SECONDS - start))" >>"$outputs/seconds.txt"
}

train() { # all folds in one process, which loads the base model once; or JOBS processes that share the cores
  export OMP_NUM_THREADS=$((($(nproc) + JOBS - 1) / JOBS))
  if [ "$JOBS" = 1 ]; then
    "${launch[@]}" train_fold.py "${files[@]}" --resume_from_checkpoint auto "$@"
  else # after exit code 255 xargs starts no further fold
    printf '%s\n' "${files[@]}" | xargs -P "$JOBS" -I {} sh -c '"$@" || exit 255' \
      sh "${launch[@]}" train_fold.py {} --resume_from_checkpoint auto "$@"
  fi
}

mkdir -p "$outputs"
echo stage,seconds >"$outputs/seconds.txt"
stage folds python make_folds.py "${files[0]}"
stage "train ${#files[@]} folds" train "$@"
unset OMP_NUM_THREADS # nproc would repeat it: prediction ran with the one thread of each training job
export OMP_NUM_THREADS=$(nproc)
# With LABELS, the untrained base model is scored too, for comparison.
stage predict "${launch[@]}" predict.py "${names[@]/#/$checkpoints/}" ${LABELS:+--base "$checkpoints/${names[0]}/args.json"} \
  --num_permutations 4 --output_dir "$outputs"
predictions=("${names[@]/#/$outputs/}")
stage ensemble python ensemble.py "${predictions[@]/%/.csv}"
python summarize.py "$outputs" ${LABELS:+--labels "$LABELS"}
