#!/usr/bin/env bash
# A sweep by SLURM: a recipe with every number of loops and every seed, a job of an array and a GPU for each.
#   LOOPS='1 2 4 8' SEEDS='1 2 3' sbatch --array=0-11 runs/slurm_sweep.sh config/train_lt.py [--key=value ...]
#   LOOPS= SEEDS='1 2 3 4' sbatch --array=0-3 runs/slurm_sweep.sh ...     the recipe's own number of loops
# Task i has loop count i mod (number of loop counts) and seed i div it, and the folder OUT/loops-L-seed-S
# (OUT: out-sweep). Before its time limit, or when it is preempted, a task saves and is queued again.
# Then: python runs/compare.py, see docs/evaluate.md. SHARED: as in runs/slurm.sh
#SBATCH --job-name=sweep
#SBATCH --array=0-11
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=sweep-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
. runs/requeue.sh
. runs/offline.sh
read -ra loops <<<"${LOOPS-1 2 4 8}"
read -ra seeds <<<"${SEEDS-1 2 3}"
[ ${#loops[@]} -gt 0 ] || loops=('')
id="$SLURM_ARRAY_TASK_ID"
if [ "$id" -ge $((${#loops[@]} * ${#seeds[@]})) ]; then
    echo "slurm_sweep.sh: task $id, expected --array=0-$((${#loops[@]} * ${#seeds[@]} - 1))" >&2
    exit 2
fi
loop="${loops[id % ${#loops[@]}]}" seed="${seeds[id / ${#loops[@]}]}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-8}}"
or_requeue "${SLURM_ARRAY_JOB_ID}_$id" srun python train.py "$@" ${loop:+"--n_loop=$loop"} --seed="$seed" \
    --out_dir="${OUT:-out-sweep}/${loop:+loops-$loop-}seed-$seed" --init_from=auto
