#!/usr/bin/env bash
# Prepares a data set and its tokenizer in a folder that compute nodes share. Run on a machine with a network:
#   SHARED=/path/of/all/nodes runs/stage.sh openwebtext [flags of data/openwebtext/prepare.py]
# Then, with the same SHARED: sbatch runs/slurm.sh config/train_gpt2.py --dataset=$SHARED/data/openwebtext
# Interrupted, the same command goes on. A set lands whole or not at all.
set -euo pipefail
if [ -z "${SHARED:-}" ] || [ $# -lt 1 ]; then
    echo 'stage.sh: expected SHARED=FOLDER runs/stage.sh NAME [--flag ...], NAME: a folder in data/' >&2
    exit 2
fi
mkdir -p "$SHARED"
SHARED=$(cd "$SHARED" && pwd) script="$1/prepare.py" name="$1" before=''
shift
for argument in "$@"; do # data/text/prepare.py --name NAME makes data/NAME
    [ "$before" != --name ] || name="$argument"
    [[ "$argument" != --name=* ]] || name="${argument#*=}"
    before="$argument"
done
to="$SHARED/data/$name"
cd "$(dirname "$0")/.."
if [ ! -e "data/$script" ]; then
    echo "stage.sh: there is no data/$script" >&2
    exit 2
fi
export HF_HOME="$SHARED/huggingface" TIKTOKEN_CACHE_DIR="$SHARED/tiktoken"
mkdir -p "$HF_HOME" "$TIKTOKEN_CACHE_DIR" "$SHARED/data"
python "data/$script" "$@"
if cmp -s "data/$name/meta.json" "$to/meta.json"; then # it names the files by their sha256
    echo "$to is the same set already"
    exit
fi
rm -rf "$to.part"
mkdir "$to.part"
find "data/$name" -maxdepth 1 \( -name '*.bin' -o -name '*.mask' -o -name meta.json \) \
    -exec cp -p {} "$to.part" \;
rm -rf "$to.old"
[ ! -e "$to" ] || mv "$to" "$to.old"
mv "$to.part" "$to"
rm -rf "$to.old"
echo "staged $to, for --dataset=$to"
