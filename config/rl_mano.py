# Reinforcement learning in minutes on a CPU: Mano's tables, sums, differences and products modulo 23. The
# answer is one token, and rewarded if it is right. First a model that knows a little, then this:
#   python train.py config/mano_looped.py --dataset=mano:1 --block_size=6 --max_iters=450 --out_dir=out-mano-1
#   python train.py config/rl_mano.py

out_dir = 'out-rl-mano'
init_from = 'out-mano-1'
rl_task = 'mano:1'
rl_samples = 16
batch_size = 512  # 32 questions
max_iters = 800
eval_interval = 100
eval_iters = 128  # questions
log_interval = 20
sample_tokens = 0

optimizer = 'muon'
matrix_lr = 0.001
embedding_lr = 0.001
learning_rate = 5e-4  # of the head
min_lr = 0.0
lr_schedule = 'linear'
warmdown_frac = 1.0
warmup_iters = 0
weight_decay = 0.0
