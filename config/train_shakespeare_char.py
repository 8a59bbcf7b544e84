# Tiny Shakespeare by characters, plain, of nanoGPT's GPU size (6 layers, 384 wide, context 256, batch 64).
# nanoGPT reports a best validation loss of 1.4697 for this recipe, in about 3 minutes on one A100.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
max_iters = 5000
eval_interval = 250  # often, because it overfits: best.pt keeps the best
eval_iters = 200
log_interval = 10
wandb_project = 'shakespeare-char'

block_size = 256
batch_size = 64
dropout = 0.2

# GPT-2's architecture
n_prelude, n_block, n_coda, n_loop = 0, 6, 0, 1
input_injection = 'passthrough'
norm = 'layernorm'
norm_loop = False
n_head = 6
n_embd = 384

learning_rate = 1e-3  # small networks bear more
min_lr = 1e-4
beta2 = 0.99  # few tokens per step
warmup_iters = 100
