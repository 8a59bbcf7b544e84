# Tiny Shakespeare by characters, looped as in nanoLOOP: 2 + 2x4 + 2, gradient through the last 2 iterations.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_looped.py

out_dir = 'out-shakespeare-char-looped'
dataset = 'shakespeare_char'
max_iters = 5000
eval_interval = 250  # often, because it overfits: best.pt keeps the best
eval_iters = 200
log_interval = 10
wandb_project = 'shakespeare-char'

block_size = 256
batch_size = 64
dropout = 0.2

n_prelude, n_block, n_coda, n_loop = 2, 2, 2, 4
bptt_k = 2
input_injection = 'inject'
norm_eps = 1.1920929e-07  # nanoLOOP leaves it to torch: float32's machine epsilon
n_head = 6
n_embd = 384

learning_rate = 1e-3  # small networks bear more
min_lr = 1e-4
beta2 = 0.99  # few tokens per step
warmup_iters = 100
