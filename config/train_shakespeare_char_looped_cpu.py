# Tiny Shakespeare by characters, looped: 2 + 2x4 + 2 executes 12 layers with the parameters of 6, for a CPU.
# expect: validation loss 1.85 on the whole split, 50 s on 2 CPU cores; README.md compares it to plain models
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_looped_cpu.py

out_dir = 'out-shakespeare-char-looped-cpu'
dataset = 'shakespeare_char'
max_iters = 800
eval_interval = 800  # one evaluation, at the end
eval_iters = 0  # over the whole split
log_interval = 50

block_size = 64
batch_size = 12

n_prelude, n_block, n_coda, n_loop = 2, 2, 2, 4
bptt_k = 2  # gradient through the last two iterations: 51 ms per step instead of 63, the loss is the same
n_head = 4
n_embd = 128
pos = 'rope'
qk_norm = True

learning_rate = 4e-3
min_lr = 0.0
lr_schedule = 'linear'
warmdown_frac = 0.4
warmup_iters = 60
beta1 = 0.8
