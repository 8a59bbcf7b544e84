# Tiny Shakespeare by characters, looped as in nanoLOOP: 2 + 2x4 + 2, gradient through the last 2 iterations.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_looped.py

include('train_shakespeare_char.py')
out_dir = 'out-shakespeare-char-looped'

n_prelude, n_block, n_coda, n_loop = 2, 2, 2, 4
bptt_k = 2
input_injection = 'inject'
norm, norm_loop = 'rmsnorm', True
norm_eps = 1.1920929e-07  # nanoLOOP leaves it to torch: float32's machine epsilon
