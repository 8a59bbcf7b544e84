#!/usr/bin/env bash
# Diagnostic runs of three recipes at three numbers of loops, as FLT's check.sh makes them.
#   NPROC=4 runs/check.sh [--key=value ...]     started again, it goes on where it stopped
set -euo pipefail
cd "$(dirname "$0")/.."
launch=(python)
[ "${NPROC:-1}" = 1 ] || launch=(torchrun --standalone --nproc_per_node="$NPROC")
for model in lt_ia lt_i flt_res; do
    for loops in 6 9 12; do
        name="$model-$loops"
        "${launch[@]}" train.py "config/train_$model.py" config/check.py --n_loop="$loops" \
            --out_dir="out-check/$name" --wandb_run_name="$name" --init_from=auto "$@"
    done
done
