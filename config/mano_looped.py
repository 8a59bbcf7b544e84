# Mano, arithmetic in F_23 in prefix notation, with one layer that is looped 4 times. The answer is one token.
# Compare with mano_same_params.py (one layer) and mano_same_flops.py (four layers); runs/mano.sh trains all.
# expect: 99, 24 and 10 % for 1, 2 and 3 operations (majority answer: 6 %), 12 minutes on a CPU core
# The data needs no preparation: rows are drawn when they are needed, see nanoloop/generated.py.
#   python train.py config/mano_looped.py

out_dir = 'out-mano-looped'
dataset = 'mano:3'  # 1 to 3 operations; the paper has 10 and far larger models
block_size = 10  # a row of mano:3 has 2 * 3 + 5 tokens
batch_size = 256
max_iters = 2500
eval_interval = 500
eval_iters = 8  # 2,048 rows
log_interval = 100
sample_tokens = 0

# 0 + 1x4 + 0: the state starts from the embeddings, and the gradient passes through all loops
n_prelude, n_block, n_coda, n_loop = 0, 1, 0, 4
bptt_k = None
input_injection = 'passthrough'
state_init = 'prelude'
n_head = 4
n_embd = 96
norm = 'rmsnorm'
pos = 'rope'
qk_norm = True
tie_weights = False

optimizer = 'muon'
matrix_lr = 0.006
embedding_lr = 0.02
learning_rate = 3e-3  # of the head
min_lr = 0.0
lr_schedule = 'linear'
warmdown_frac = 1.0  # from the peak to 0
warmup_iters = 100
weight_decay = 0.0
