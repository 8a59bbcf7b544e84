# Ouro 1.4B: 24 layers x 4 loops, 1,434,652,673 parameters.
# paper: Ouro, arXiv:2510.25741; its stages are config/ouro_stage1a.py, 1b and 2. differs: residual
# projections start scaled down. Its vocabulary is smaller than GPT-2's. Not trained yet.
# cost: 1.05e23 FLOPs, calculated: 9,200 hours on 8 H100 at 40 % of their bfloat16 peak.
#   python train.py config/train_ouro_1_4b.py --dataset=DATA

out_dir = 'out-ouro-1-4b'
batch_size = 1
block_size = 4096
gradient_accumulation_steps = 1024  # 4 million tokens per step
eval_interval = 1000
eval_iters = 40
learning_rate = 3e-4
warmup_iters = 2000
decay_lr = False  # constant after the warm-up

n_prelude, n_block, n_coda, n_loop = 0, 24, 0, 4
input_injection = 'passthrough'
n_embd = 2048
n_head = 16
n_hidden = 5632
norm_place = 'branch'
norm_final = False  # the state is normed at the end of each iteration
pos = 'rope'
mlp = 'swiglu'
tie_weights = False
exit_gate = True
objective, beta = 'exit', 0.1
vocab_size = 49152
