# An overlay: supervised fine-tuning of a base model on conversations, each row once. The model's keys are the
# base's. Its tokenizer and block_size have to be those of the data: data/sft/prepare.py makes it so.
# source of the schedule: chat_sft of github.com/LoopedLMs/looped_nanochat; config/sft_looped_nanochat.py has
# its rates, too. Random loops as in the base's training: --loop_sampling=poisson --loop_max=16
#   python data/sft/prepare.py --chat FILE.jsonl --tokenizer gpt2 --block_size 1024
#   python train.py config/sft.py --init_from=out-base

out_dir = 'out-sft'
init_from = 'out-base'  # the base: a run's folder or a checkpoint
dataset = 'sft'
epochs = 1.0

# 32 rows per step
batch_size = 8
gradient_accumulation_steps = 4
eval_interval = 150
eval_iters = 40
log_interval = 10

# constant until 80 % of the steps, then linear to 0
learning_rate = 1e-4
warmup_iters = 0
lr_schedule = 'linear'
warmdown_frac = 0.2
min_lr = 0.0
weight_decay = 0.0
