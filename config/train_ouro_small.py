# LoopLM small: 6 layers x 4 loops, 80M parameters; its state is not normed and grows with each loop.
# source: github.com/rkstgr/LoopLM. differs: residual projections start scaled down.
# Its vocabulary is smaller than GPT-2's. Not trained yet.
# cost: 6.7e19 FLOPs, calculated: 6 hours on 8 H100 at 40 % of their bfloat16 peak.
#   python train.py config/train_ouro_small.py --dataset=DATA

out_dir = 'out-ouro-small'
batch_size = 4
block_size = 2048
gradient_accumulation_steps = 8
eval_interval = 500
eval_iters = 40
learning_rate = 3e-4

n_prelude, n_block, n_coda, n_loop = 0, 6, 0, 4
input_injection = 'passthrough'
n_embd = 768
n_head = 12
n_hidden = 2048
norm_place = 'branch'
norm_loop = False
pos = 'rope'
mlp = 'swiglu'
exit_gate = True
objective, beta = 'exit', 0.1
vocab_size = 49152
