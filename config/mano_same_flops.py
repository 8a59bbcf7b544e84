# The baseline of mano_looped.py with its FLOPs: four layers with weights of their own, executed once.
#   python train.py config/mano_same_flops.py

include('mano_looped.py')
out_dir = 'out-mano-same-flops'
n_block, n_loop = 4, 1
