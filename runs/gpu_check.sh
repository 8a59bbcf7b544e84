#!/usr/bin/env bash
# Checks the program on one GPU: tests, memory, speed. Prints one table, which is also OUT/table.md, ready for
# runs/results.md. Planned for less than 8 minutes on an H100. A step that fails stops no other step: it shows
# as FAILED in the table, and the script ends with status 1.
#   runs/gpu_check.sh                              [OUT=out-gpu-check] [DEVICE=cuda]
#   DEVICE=cpu TINY=1 runs/gpu_check.sh            the same commands at tiny sizes, in about a minute
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out-gpu-check} device=${DEVICE:-cuda}
mkdir -p "$out"
rm -f "$out"/*.log "$out"/*.status "$out"/*.jsonl "$out"/*.xml "$out"/table.md

common=(--device="$device" --rounds=3)
train=(--gradient_accumulation_steps=4 --compile=True --warmup=2 --steps=5)
decode=(--tokens=128 --sequences=1,64 --compile=True)
tiny=() tiny_window=()
if [ -n "${TINY:-}" ]; then
    common=(--device="$device" --rounds=1)
    train=(--gradient_accumulation_steps=1 --compile=False --warmup=1 --steps=1)
    decode=(--tokens=2 --sequences=1,2 --compile=False)
    tiny=(--n_embd=32 --n_head=2 --vocab_size=64 --batch_size=1 --block_size=64)
    tiny_window=(--block_size=256 --window_size=64)
fi

step() { # NAME COMMAND...: runs it for $limit seconds at most, its output in NAME.log, its status in NAME.status
    echo "$(date +%T) $1: ${*:2}"
    timeout "${limit:-240}" "${@:2}" >"$out/$1.log" 2>&1
    echo $? >"$out/$1.status"
}

measure() { # NAME CONFIG FLAGS...: bench.py, with its results in NAME.jsonl
    step "$1" python bench.py "${@:2}" "${common[@]}" --json="$out/$1.jsonl"
}

tests() { # NAME SELECTION: some of the tests. Three groups, since pytest writes its results only at the end
    limit=180 step "$1" python -m pytest -q -p no:cacheprovider --junitxml="$out/$1.xml" tests/test_cuda.py -k "$2"
}

measure gpt2 config/train_gpt2.py "${train[@]}" "${tiny[@]}"
measure looped config/train_gpt2_looped.py "${train[@]}" "${tiny[@]}" --vs=--baseline=same_flops
measure medium config/train_gpt2_looped.py --n_prelude=8 --n_block=8 --n_coda=8 --n_embd=1024 --n_head=16 \
    --batch_size=8 "${train[@]}" "${tiny[@]}"
measure window config/train_gpt2.py --block_size=8192 --batch_size=1 --window_pattern=S --window_size=512 \
    "${train[@]}" "${tiny[@]}" "${tiny_window[@]}" --vs='--window_pattern=L --window_size=None'
measure recompute config/train_gpt2_looped.py "${train[@]}" "${tiny[@]}" --vs=--recompute=True
measure decode config/train_gpt2_looped.py --mode=decode "${decode[@]}" "${tiny[@]}"
tests tests_training 'not (flex or decoding or exits)'
tests tests_windows 'flex'
tests tests_decoding 'decoding or exits'

[ -z "${TINY:-}" ] || echo 'Tiny sizes, whatever the names below say: this shows only that the commands run.'
python runs/gpu_table.py "$out" | tee "$out/table.md"
exit "${PIPESTATUS[0]}"
