#!/usr/bin/env bash
# Loss against loops of LT, three layers that are looped 4 times: trained with 4 loops in every step, and with
# 1 to 7 loops, drawn anew for every step. Three seeds each, one after the other; ends with a table and the
# picture out-depth/depth.png.
#   runs/depth.sh [--key=value ...]     train.py's keys; started again, it goes on where it stopped
set -euo pipefail
cd "$(dirname "$0")/.."
small='--n_loop=4 --n_block=3 --n_embd=64 --n_head=1 --block_size=128 --dataset=pystdlib --vocab_size=256
    --batch_size=8 --gradient_accumulation_steps=1 --objective=end --max_iters=500 --eval_interval=500
    --eval_iters=20 --log_interval=100 --sample_tokens=0'
[ -e data/pystdlib/meta.json ] || python data/pystdlib/prepare.py
for loops in fixed sampled; do
    sampling=; [ $loops = sampled ] && sampling=--loop_sampling=uniform
    for seed in 1 2 3; do
        folder="out-depth/$loops-$seed"
        # shellcheck disable=SC2086
        python train.py config/train_lt.py $small $sampling --seed="$seed" --out_dir="$folder" \
            --init_from=auto "$@"
        python eval.py --out_dir="$folder" --loops=1,2,3,4,5,6,8,12,16 --windows=2000
    done
done
all() { echo "out-depth/$1-1+out-depth/$1-2+out-depth/$1-3"; }
python runs/compare.py "$(all fixed)" "$(all sampled)" --image=out-depth/depth.png
