# nanoLOOP at GPT-2's width on OpenWebText: 2 + 2x4 + 2 executes GPT-2's 12 layers with the parameters of 6.
# Not trained yet. cost: 2.6e20 FLOPs, calculated: 23 hours on 8 H100 at 40 % of their bfloat16 peak.
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_looped.py

out_dir = 'out-gpt2-looped'
dataset = 'openwebtext'
wandb_project = 'owt'
wandb_run_name = 'gpt2-looped'

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens per step, about half a million
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000  # 300 billion tokens
eval_interval = 1000
eval_iters = 200
log_interval = 10

n_prelude, n_block, n_coda, n_loop = 2, 2, 2, 4
bptt_k = 4  # all of them: more loops at training will not cost more memory
input_injection = 'inject'
norm_eps = 1.1920929e-07  # nanoLOOP leaves it to torch: float32's machine epsilon
vocab_size = 50304  # 50257 padded to a multiple of 64, which is faster

weight_decay = 0.1
