# In the style of Huginn: 2 + 4x32 + 2 layers from a random state, gradient through the last 8 iterations.
# paper: arXiv:2502.05171. differs from the released model: 768 wide instead of 5280, heads of 64 channels
# instead of 96, an MLP of 2048 = 2.67 widths instead of 17920 = 3.39, GPT-2's tokens, no biases on q and k, a
# norm after every iteration and another before the head where it has one for the two ends of the coda, halves
# instead of pairs rotated, s_0 not truncated, at most 128 loops in training, W not [I 0] but Huginn's normal
# values; AdamW with decay 0.1 at 4e-4 instead of its own Adam at 4e-5. Not trained yet.
# cost: 5.1e19 FLOPs, calculated: 4.5 hours on 8 H100 at 40 % of their bfloat16 peak.
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_huginn_style.py

out_dir = 'out-huginn-style'
dataset = 'fineweb_edu'
batch_size = 4
block_size = 1024
gradient_accumulation_steps = 64
max_iters = 50000
eval_interval = 1000
eval_iters = 40
log_interval = 10
learning_rate = 4e-4
warmup_iters = 4096
decay_lr = False  # constant after the warm-up

n_prelude, n_block, n_coda, n_loop = 2, 4, 2, 32
bptt_k = 8
loop_sampling = 'poisson'  # 33 loops on average
loop_max = 128
input_injection = 'inject'
state_init = 'random'
state_std = 0.6325  # sqrt(2 / 5)
n_embd = 768
n_head = 12
norm_place = 'around'
pos = 'rope'
rope_base = 50000.0
mlp = 'swiglu'
emb_scale = 768**0.5
init = 'huginn'
vocab_size = 50304
