# An overlay: Ouro's stage 2, annealing over 1.4 trillion tokens, 16,384 in a sequence.
# paper: arXiv:2510.25741, table 1.
#   torchrun --nproc_per_node=8 train.py config/train_ouro_1_4b.py config/ouro_stage2.py \
#       --init_from=out-ouro-1b --dataset=DATA

out_dir = 'out-ouro-2'
objective, beta = 'exit', 0.05
n_loop = 4
rope_base = 40000.0
block_size = 16384
batch_size = 1
gradient_accumulation_steps = 512  # 8,388,608 tokens per step
max_iters = 166893  # 1.4e12 tokens
learning_rate = 3e-4
min_lr = 3e-5  # the paper's rate is the last one
lr_schedule = 'cosine'
warmup_iters = 0
decay_lr = True
