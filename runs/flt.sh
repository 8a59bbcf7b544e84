#!/usr/bin/env bash
# The four published variants of the Fully Looped Transformer, one after the other: 6 layers x 12 loops.
#   NPROC=8 runs/flt.sh [--key=value ...]     started again, it goes on where it stopped
set -euo pipefail
cd "$(dirname "$0")/.."
launch=(python)
[ "${NPROC:-1}" = 1 ] || launch=(torchrun --standalone --nproc_per_node="$NPROC")
for model in flt lt_ia lt_i lt; do
    "${launch[@]}" train.py "config/train_$model.py" --init_from=auto "$@"
done
