# Sourced by slurm.sh and slurm_sweep.sh: nothing is downloaded. Files of the hub and of tiktoken are in
# SHARED, the folder that runs/stage.sh has filled, default: the working directory.
SHARED="${SHARED:-$PWD}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$SHARED/huggingface"
export TIKTOKEN_CACHE_DIR="$SHARED/tiktoken" WANDB_MODE=offline
