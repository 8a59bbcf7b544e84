# Tiny Shakespeare by characters, plain: to the loss of nanoGPT's CPU recipe, 1.886, in little time.
# expect: validation loss 1.85 on the whole split (seeds 1337, 1, 2: 1.844, 1.843, 1.854), 6 s on 2 CPU cores
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu.py

out_dir = 'out-shakespeare-char-cpu'
dataset = 'shakespeare_char'
max_iters = 40
eval_interval = 40
eval_at_start = False  # one evaluation, at the end
eval_iters = 0  # over the whole split
log_interval = 10

block_size = 64
batch_size = 40

# plain: all layers inside a loop that runs once. nanoGPT's recipe has 4 layers, 128 wide, and 12 rows
n_prelude, n_block, n_coda, n_loop = 0, 2, 0, 1
input_injection = 'passthrough'
norm = 'layernorm'
norm_loop = False
n_head = 4
n_embd = 64
n_gram = 4  # runs of 2, 3 and 4 characters have embeddings, which learn from few tokens: 2.1M parameters
n_gram_rows = 32768  # without them: --n_gram=1 --n_gram_rows=16384
tie_weights = False
window_pattern = 'SL'  # the first layer sees 3 earlier characters: it learns faster from few tokens
window_size = 3
pos = 'rope'  # with qk_norm it bears three times nanoGPT's learning rate
qk_norm = True
mlp = 'relu2'

optimizer = 'muon'  # of the blocks' matrices; it needs half of AdamW's tokens
matrix_lr = 0.02
learning_rate = 16e-3  # of the embeddings, the head and the norms
min_lr = 0.0
lr_schedule = 'linear'
warmdown_frac = 1.0
warmup_iters = 1
beta1 = 0.8
