# An overlay: Ouro's stage 1a, 3 trillion tokens with 8 loops. paper: arXiv:2510.25741, table 1.
# differs: 8 million tokens per step from the first on, where the paper grows them from 4 million.
#   torchrun --nproc_per_node=8 train.py config/train_ouro_1_4b.py config/ouro_stage1a.py --dataset=DATA

out_dir = 'out-ouro-1a'
objective, beta = 'exit', 0.1
n_loop = 8
rope_base = 10000.0
block_size = 4096
batch_size = 1
gradient_accumulation_steps = 2048  # 8,388,608 tokens per step
max_iters = 357628  # 3e12 tokens
learning_rate = 3e-4
warmup_iters = 2000
decay_lr = False  # constant after the warm-up
