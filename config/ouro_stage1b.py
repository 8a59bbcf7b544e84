# An overlay: Ouro's stage 1b, 3 trillion tokens with 4 loops, as 8 gave spikes.
# paper: arXiv:2510.25741, table 1.
#   torchrun --nproc_per_node=8 train.py config/train_ouro_1_4b.py config/ouro_stage1b.py \
#       --init_from=out-ouro-1a --dataset=DATA

out_dir = 'out-ouro-1b'
objective, beta = 'exit', 0.05
n_loop = 4
rope_base = 10000.0
block_size = 4096
batch_size = 1
gradient_accumulation_steps = 2048  # 8,388,608 tokens per step
max_iters = 357628  # 3e12 tokens
learning_rate = 3e-4
warmup_iters = 0
decay_lr = False
