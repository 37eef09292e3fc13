#!/usr/bin/env bash
# Trains two sources of 11 and 12 M parameters on novels, with grouped-query and with multi-head attention, converts them
# to several cache sizes, heals them, and prints the table: bash recipes/conversion/run.sh BOOKS OUT
#
# BOOKS holds the novels as .txt. Two are kept out of training and of healing: one to calibrate on, one to measure on.
# STEPS (default 400) is the length of training, HEAL_STEPS (default 150) that of each healing. Interrupted, the same
# command goes on.
set -euo pipefail
books=${1:?folder of novels}
out=${2:?output folder}
recipe=$(dirname "$0")
calibrate=$books/treasure-island.txt
measure=$books/great-expectations.txt
mkdir -p "$out"

train() { # NAME [OPTION ..]
  latentkv train "$recipe/$1.json" --data "$books" --out "$out/$1" --steps "${STEPS:-400}" --optimizer muon \
    --batch-tokens 8192 --warmup 50 --eval-every 0 --exclude treasure-island.txt --exclude great-expectations.txt \
    --eval-file "$calibrate" --eval-file "$measure" "${@:2}"
}

convert() { # NAME SHARE
  local target=$out/$1-${2//\//-}
  [[ -f $target/healed ]] && return
  latentkv convert "$out/$1" "$target" --kv-budget "$2" --calibrate "$calibrate" --text "$measure" --no-speed
  latentkv heal "$target" --teacher "$out/$1" --data "$out/training.txt" --sequences 1200 \
    --batch-size 4 --steps "${HEAL_STEPS:-150}" --lr 3e-4 --eval-every 50
  touch "$target/healed"
}

train gqa
train mha --tokenizer "$out/gqa"
if [[ ! -f $out/training.txt ]]; then
  find "$books" -name '*.txt' ! -name treasure-island.txt ! -name great-expectations.txt | sort | xargs -d '\n' cat >"$out/training.tmp"
  mv "$out/training.tmp" "$out/training.txt"
fi
for share in 1/2 1/4 1/8; do convert gqa "$share"; done
convert mha 1/16
python "$recipe/table.py" "$out"/gqa-1-{2,4,8} "$out"/mha-1-16
