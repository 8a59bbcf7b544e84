# First run: a small looped model learns to write Python from the standard library of the Python that runs it.
# expect: less than 2 minutes on 2 CPU cores, also without bfloat16 units; a validation loss of about 1.54
# nats per byte, and samples with the shape of Python (with the library of Python 3.11.7; others differ)
#   python train.py config/quickstart.py

out_dir = 'out-quickstart'
dataset = 'pystdlib'
max_iters = 400
eval_interval = 200
eval_at_start = False
eval_iters = 40
log_interval = 25
sample_tokens = 400

block_size = 128
batch_size = 8

# 1 + 1x4 + 1: six executed layers with the parameters of three
n_prelude, n_block, n_coda, n_loop = 1, 1, 1, 4
bptt_k = 2  # gradient through the last two iterations
n_head = 6
n_embd = 192
pos = 'rope'
qk_norm = True

optimizer = 'muon'  # of the matrices of blocks and injection: less than half of AdamW's steps
matrix_lr = 0.02
learning_rate = 8e-3  # of the embedding and the norms
min_lr = 0.0
lr_schedule = 'linear'
warmdown_frac = 0.8
warmup_iters = 5
