#!/usr/bin/env bash
# From nothing to a small model that talks, on a CPU, in bytes: pretraining, conversations, fine-tuning,
# evaluation at several numbers of loops, and a conversation.
#   [WORDS=FILE] runs/speedrun_cpu.sh     WORDS: a word on each line; without it those of Python's library
set -euo pipefail
cd "$(dirname "$0")/.."
words=${WORDS:-data/sft/words.txt}
if [ ! -e "$words" ]; then
    library=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    find "$library" -maxdepth 1 -name '*.py' -exec cat {} + | grep -oE '\b[a-z]{3,10}\b' | sort | uniq -c |
        sort -k1,1nr -k2 | awk '$1 > 2 {print $2}' >"$words"
fi
python data/sft/identity.py
python train.py config/quickstart.py --loop_sampling=uniform --out_dir=out-base --init_from=auto
python data/sft/prepare.py --chat data/sft/identity.jsonl --words "$words" --tokenizer byte --block_size 448 \
    --take simplespelling=4000 spellingbee=4000 chat=3000
python train.py config/sft.py config/speedrun_sft.py
python eval.py --out_dir=out-sft --tasks=simplespelling,spellingbee --words="$words" --loops=1,2,4,8 \
    --max_per_task=128 --max_new_tokens=320
say() {
    python sample.py --out_dir=out-sft --temperature=0 --stop='<|assistant_end|>' --max_new_tokens=320 \
        --start="<|bos|><|user_start|>$1<|user_end|><|assistant_start|>"
}
say 'Who are you?'
say 'How do you work?'
say 'Spell the word: transformer'
