#!/usr/bin/env bash
# A run on N nodes of 8 GPUs, by SLURM. Submitted in the repository, on a file system that all nodes share:
#   sbatch --nodes=8 runs/slurm.sh config/train_ouro_1_4b.py --dataset=FOLDER [--key=value ...]
# The job saves 120 s before its time limit, or when it is preempted, and is queued again: the same command
# line goes on from its last checkpoint. A save that takes longer: sbatch --signal=B:USR1@600, SAVE_S=580.
# SHARED: the folder that runs/stage.sh has filled, default: the repository. Compute nodes need no network.
#SBATCH --job-name=nanoloop
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
. runs/requeue.sh
. runs/offline.sh
# the first node is the meeting point, its port depends on the job
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${hosts%%$'\n'*}" MASTER_PORT=$((16384 + SLURM_JOB_ID % 16384))
export GPUS="${SLURM_GPUS_ON_NODE:-8}" SAVE_S="${SAVE_S:-100}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-$GPUS} / GPUS))}"
# --init_from=NAME is for the first start; with a checkpoint in --out_dir the run goes on instead
start=--init_from=auto folder='' named=''
for argument in "$@"; do
    case "$argument" in
        --init_from=*) named=1 ;;
        --out_dir=*) folder="${argument#*=}" ;;
    esac
done
if [ -n "$named" ] && [ -z "$folder" ]; then
    echo 'slurm.sh: --init_from needs a flag --out_dir=FOLDER too, where the run is found again' >&2
    exit 2
fi
if [ -n "$named" ] && [ ! -e "$folder/ckpt.pt" ] && [ ! -e "$folder/prev.pt" ]; then
    start='' # that of the command line
fi
# torchrun ends with 1 whatever ended its workers; SLURM signals the shell around it as well, which remembers
or_requeue "$SLURM_JOB_ID" srun --kill-on-bad-exit=1 bash -c '
    caught= status=0
    trap "caught=138" USR1
    trap "caught=143" TERM
    torchrun --nnodes="$SLURM_JOB_NUM_NODES" --node_rank="$SLURM_NODEID" --nproc_per_node="$GPUS" \
        --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --shutdown-timeout="$SAVE_S" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 train.py "$@" || status=$?
    [ "$status" = 0 ] || exit "${caught:-$status}"' node "$@" ${start:+"$start"}
