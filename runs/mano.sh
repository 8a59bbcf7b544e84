#!/usr/bin/env bash
# Mano: one layer looped 4 times against one layer and four layers, three seeds each, one after the other.
#   runs/mano.sh [--key=value ...]     train.py's keys; started again, it goes on where it stopped
set -euo pipefail
cd "$(dirname "$0")/.."
folders=()
for seed in 1 2 3; do
    for model in looped same_params same_flops; do
        folder="out-mano/$model-$seed"
        python train.py "config/mano_$model.py" --seed="$seed" --out_dir="$folder" --init_from=auto "$@"
        # the last checkpoint: best.pt is of an early step, before the few questions with one
        # operation are learned by heart
        python eval.py --out_dir="$folder/ckpt.pt" --tasks=mano
        folders+=("$folder")
    done
done
python runs/collect.py "${folders[@]}"
