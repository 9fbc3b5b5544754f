#!/usr/bin/env bash
# A whole contest: folds, training, prediction, ensemble, scores, for all fold*.json and seed*.json in a folder of args.
#   bash run.sh args                               # the 3B in three folds
#   bash run.sh args/all_rows                      # the 3B on all rows, with three seeds
#   bash run.sh args/7b --num_train_epochs 5       # flags of the training override the args files
#   bash run.sh args args/qwen35_4b                # two models, each as above, and one submission of both in outputs/mixed
#   bash run.sh args --max_hours 11                # stop training with a checkpoint after 11 hours, for 12-hour notebooks
#   LABELS=test_answers.csv bash run.sh args       # a table of scores, where the test answers are known
#   JOBS=2 bash run.sh args                        # train two folds at once, each on GPUs of its own
#   LAUNCH="accelerate launch --config_file X.yaml" bash run.sh args       # start the scripts in another way
# With several GPUs, each fold trains on one of them: JOBS is the number of GPUs, or of folds if there are fewer.
# Run it again to continue: finished folds are skipped, others resume from their latest checkpoint.
set -euo pipefail
export RUN_STARTED=${RUN_STARTED:-$(date +%s)} # max_hours counts from here
LABELS=${LABELS:-${TRUTH:-}}                   # TRUTH: its name in earlier releases
folders=()
while [[ ${1:-} == args || ${1:-} == args/* ]]; do
  folders+=("${1%/}")
  shift
done
if [ ${#folders[@]} -eq 0 ] || [[ ${1:---} != --* ]]; then
  echo "error: name the folder args or one below it. Usage: bash run.sh args/7b [--field value ...]" >&2
  exit 2
fi
case " $* " in *" --output_dir"* | *" --train_csv"* | *" --image_root"* | *" --folds_csv"* | *" --fold"[\ =]*)
  echo "error: set train_csv, image_root, folds_csv and fold in the args files, because all steps read them." \
    "The args file's name also names the output folder." >&2
  exit 2 ;;
esac
if [ ${#folders[@]} -gt 1 ]; then
  predictions=()
  for folder in "${folders[@]}"; do
    bash "$0" "$folder" "$@"
    shopt -s nullglob
    predictions+=("outputs${folder#args}"/fold*.csv "outputs${folder#args}"/seed*.csv)
    shopt -u nullglob
  done
  mkdir -p outputs/mixed
  exec python ensemble.py "${predictions[@]}" --output outputs/mixed/submission.csv
fi
args=${folders[0]}
outputs=outputs${args#args}
checkpoints=checkpoints${args#args}
shopt -s nullglob
files=("$args"/fold*.json "$args"/seed*.json)
shopt -u nullglob
[ ${#files[@]} -gt 0 ] || files=("$args/fold0.json") # make_folds.py says that it is missing
names=("${files[@]##*/}")
names=("${names[@]%.json}")
[ -t 2 ] || export HF_HUB_DISABLE_PROGRESS_BARS=1

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
else
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]*' || true)
fi
if [ -z "${JOBS:-}" ]; then # what finishes first: one fold for each GPU
  JOBS=$((${#gpus[@]} < ${#files[@]} ? ${#gpus[@]} : ${#files[@]}))
  [ "$JOBS" -gt 0 ] && [ -z "${LAUNCH:-}" ] || JOBS=1
fi
export LAUNCH=${LAUNCH:-} GPUS="${gpus[*]}"

stage() { # stage NAME COMMAND...: run it and note its seconds
  local start=$SECONDS
  echo "== $1"
  "${@:2}"
  echo "$1,$((SECONDS - start))" >>"$outputs/seconds.txt"
}

on_gpus() { # on_gpus FIRST COUNT COMMAND...: run a Python script on COUNT of the GPUs, from number FIRST on
  local all own launch=(python) # with one GPU or none
  read -ra all <<<"$GPUS"
  if [ ${#all[@]} -gt 0 ]; then
    own="${all[*]:$1 % ${#all[@]}:$2}"
    export CUDA_VISIBLE_DEVICES=${own// /,}
  fi
  if [ "$2" -gt 1 ]; then # port 0 is one that is free; accelerate warns where the other flags are missing
    launch=(accelerate launch --multi_gpu --num_processes "$2" --num_machines 1 --main_process_port 0)
    launch+=(--mixed_precision no --dynamo_backend no)
  fi
  [ -z "$LAUNCH" ] || read -ra launch <<<"$LAUNCH"
  "${launch[@]}" "${@:3}"
}
export -f on_gpus

train() { # all folds in one process, which loads the base model once; or JOBS processes that share cores and GPUs
  export OMP_NUM_THREADS=$((($(nproc) + JOBS - 1) / JOBS)) EACH=1
  while [ $((EACH * 2 * JOBS)) -le ${#gpus[@]} ]; do EACH=$((EACH * 2)); done # a power of two divides a step's rows
  if [ "$JOBS" = 1 ]; then
    on_gpus 0 "$EACH" train_fold.py "${files[@]}" --resume_from_checkpoint auto "$@"
  else # after exit code 255 xargs starts no further fold
    printf '%s\n' "${files[@]}" | xargs -P "$JOBS" --process-slot-var=SLOT -I {} \
      bash -c 'on_gpus $((SLOT * EACH)) "$EACH" "$@" || exit 255' \
      bash train_fold.py {} --resume_from_checkpoint auto "$@"
  fi
}

mkdir -p "$outputs"
echo stage,seconds >"$outputs/seconds.txt"
stage folds python make_folds.py "${files[0]}"
stage "train ${#files[@]} folds" train "$@"
unset OMP_NUM_THREADS # nproc would repeat it: prediction ran with the one thread of each training job
export OMP_NUM_THREADS=$(nproc)
# On all GPUs, which share the rows. With LABELS, the untrained base model is scored too, for comparison.
stage predict on_gpus 0 ${#gpus[@]} predict.py "${names[@]/#/$checkpoints/}" ${LABELS:+--base "$checkpoints/${names[0]}/args.json"} \
  --num_permutations 4 --output_dir "$outputs"
predictions=("${names[@]/#/$outputs/}")
stage ensemble python ensemble.py "${predictions[@]/%/.csv}"
python summarize.py "$outputs" ${LABELS:+--labels "$LABELS"}
