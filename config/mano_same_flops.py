# The baseline of mano_looped.py with its FLOPs: four layers with weights of their own, executed once.
# expect: 38, 23 and 12 % for 1, 2 and 3 operations (runs/results.md), 7 minutes on a CPU core
#   python train.py config/mano_same_flops.py

include('mano_looped.py')
out_dir = 'out-mano-same-flops'
n_block, n_loop = 4, 1
