# LT: the plain looped transformer, its state is the next iteration's input.
# paper: Fully Looped Transformer, github.com/FuRuF-11/FullyLoopedTransformer: 6 layers x 12 loops, 384 wide.
# differs: GPT-2's tokens instead of Qwen's, with the steps of Qwen's larger embedding (20 tokens a
# parameter would be 1,880); Muon takes q, k and v of a layer together. Not trained yet.
# cost: 3.2e18 FLOPs, calculated: 20 minutes on 8 H100 at 40 % of their bfloat16 peak.
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_lt.py

out_dir = 'out-lt'
dataset = 'fineweb_edu'
wandb_project = 'flt'
wandb_run_name = 'lt'

# 16 sequences x 1024 tokens x 32 micro-batches = 524,288 tokens per step
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 32
max_iters = 5000
eval_interval = 250
eval_iters = 40
log_interval = 10
warmup_iters = 0
lr_schedule = 'linear'
min_lr = 0.0
optimizer = 'muon'
matrix_lr = 0.02
embedding_lr = 0.2
learning_rate = 0.004  # of the head
lr_width = 768  # the width that AdamW's rates are for
beta1, beta2, adam_eps = 0.8, 0.95, 1e-10
weight_decay = 0.0

n_prelude, n_block, n_coda, n_loop = 0, 6, 0, 12
input_injection = 'passthrough'
state_init = 'prelude'
n_embd = 384
n_head = 3
norm = 'rmsnorm_fixed'
norm_eps = 1.1920929e-07  # the original leaves it to torch: float32's machine epsilon
norm_emb = True
norm_final = False  # the state is normed at the end of each iteration
pos = 'rope'
qk_norm = True
mlp = 'relu2'
tie_weights = False
softcap = 15.0
init = 'nanochat'
vocab_size = 50304
