# Looped nanochat: 2 + 4x4 + 2 layers, wide as its `size` dial says: 20 is 328M parameters, 574M effective.
# source: github.com/LoopedLMs/looped_nanochat. differs: GPT-2's tokens instead of its own 65,536; torch's
# Muon, without variance reduction and with plain decay, takes q, k and v of a layer together, and leaves the
# injection out of the decay; one draw of loops for a whole step. Steps, decay and cost are size 20's (size
# 12's: 3298 and 0.2). Not trained yet.
# cost: 1.4e19 FLOPs, calculated: 1.2 hours on 8 H100 at 40 % of their bfloat16 peak.
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_looped_nanochat.py

out_dir = 'out-looped-nanochat'
dataset = 'fineweb_edu'
wandb_project = 'looped-nanochat'

# 8 sequences x 2048 tokens x 32 micro-batches = 524,288 tokens per step
batch_size = 8
block_size = 2048
gradient_accumulation_steps = 32
max_iters = 7666
eval_interval = 250
eval_iters = 40
log_interval = 10
warmup_iters = 0
lr_schedule = 'linear'
warmdown_frac = 0.4
min_lr = 0.0
grad_clip = 0.0
optimizer = 'muon'
matrix_lr = 0.02
embedding_lr = 0.3
head_lr = 0.004
learning_rate = 0.005  # of the norms
lr_width = 768  # the width that AdamW's rates are for
beta1, beta2, adam_eps = 0.8, 0.95, 1e-10
weight_decay = 0.086  # 0.2 times the effective parameters of size 12 / those of size 20
weight_decay_end = 0.0
loop_sampling = 'poisson'
loop_max = 16

size = 20
n_prelude, n_block, n_coda, n_loop = 2, 4, 2, 4
bptt_k = 4
norm_place = 'around'
norm_emb = True
pos = 'rope'
qk_norm = True
mlp = 'relu2'
tie_weights = False
softcap = 15.0
window_pattern = 'LLSSSLLL'
init = 'nanochat'
vocab_size = 65536
