# Tiny Shakespeare by characters, looped: 1 + 1x4 + 1 executes 6 layers with the parameters of 3, for a CPU.
# expect: validation loss 1.85 on the whole split (seeds 1337, 1, 2: 1.853, 1.851, 1.850), 10 s on 2 CPU cores
# README.md and runs/results.md compare it to plain models: in so short a run loops do not pay
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_looped_cpu.py

include('train_shakespeare_char_cpu.py')
out_dir = 'out-shakespeare-char-looped-cpu'

n_prelude, n_block, n_coda, n_loop = 1, 1, 1, 4
window_pattern = 'SSL'  # only the coda sees all of the context
bptt_k = 2  # gradient through the last two iterations: less time, the loss is the same
input_injection = 'inject'
norm, norm_loop = 'rmsnorm', True
