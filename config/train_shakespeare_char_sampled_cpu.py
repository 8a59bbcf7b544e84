# Tiny Shakespeare by characters with a drawn number of loops, so that depth is a dial afterwards: 1 + 2xr + 1
# About 15 minutes on 2 CPU cores (0.55 s a step), val loss 1.611, n = 1. What exits save then:
#   python tests/speed_of_decoding.py out-shakespeare-char-sampled-cpu
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_sampled_cpu.py
#   python bench.py --mode=decode --init_from=out-shakespeare-char-sampled-cpu --n_loop=8

include('train_shakespeare_char_cpu.py')
out_dir = 'out-shakespeare-char-sampled-cpu'
max_iters = 1500
eval_interval = 500
eval_at_start = True
eval_iters = 40

block_size = 128
batch_size = 16
n_prelude, n_block, n_coda, n_loop = 1, 2, 1, 4
loop_sampling = 'poisson'  # 5 loops on average
loop_max = 12
input_injection = 'inject'
norm, norm_loop = 'rmsnorm', True
n_head = 6
n_embd = 192
window_pattern, window_size = 'L', None
dropout = 0.1
mlp = 'gelu'

optimizer = 'adamw'
matrix_lr = None
learning_rate = 4e-3
warmdown_frac = 0.4
warmup_iters = 60
beta1 = 0.8
