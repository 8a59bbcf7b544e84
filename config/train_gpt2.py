# GPT-2 (124M) on OpenWebText. nanoGPT reports a loss of about 2.85 for it, in about 5 days on 8 A100 40GB.
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = 'out-gpt2'
dataset = 'openwebtext'
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens per step, about half a million
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000  # 300 billion tokens
eval_interval = 1000
eval_iters = 200
log_interval = 10

# GPT-2's architecture, without biases
n_prelude, n_block, n_coda, n_loop = 0, 12, 0, 1
input_injection = 'passthrough'
norm = 'layernorm'
norm_loop = False
vocab_size = 50304  # 50257 padded to a multiple of 64, which is faster

weight_decay = 0.1
