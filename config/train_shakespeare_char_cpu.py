# Tiny Shakespeare by characters, plain, of nanoGPT's CPU size (4 layers, 128 wide, context 64, batch 12).
# expect: validation loss 1.86 on the whole split (seeds 1337, 1, 2: 1.858, 1.869, 1.839), 30 s on 2 CPU cores
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu.py

out_dir = 'out-shakespeare-char-cpu'
dataset = 'shakespeare_char'
max_iters = 200
eval_interval = 200
eval_at_start = False  # one evaluation, at the end
eval_iters = 0  # over the whole split
log_interval = 50

block_size = 64
batch_size = 24

# plain: all layers inside a loop that runs once
n_prelude, n_block, n_coda, n_loop = 0, 4, 0, 1
input_injection = 'passthrough'
norm = 'layernorm'
norm_loop = False
n_head = 4
n_embd = 128
pos = 'rope'  # with qk_norm it bears three times nanoGPT's learning rate
qk_norm = True
mlp = 'relu2'

optimizer = 'muon'  # of the blocks' matrices; it needs half of AdamW's tokens here
matrix_lr = 0.02
learning_rate = 8e-3  # of the embedding and the norms
min_lr = 0.0
lr_schedule = 'linear'
warmdown_frac = 0.8
warmup_iters = 5
beta1 = 0.9
