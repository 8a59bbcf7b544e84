# The baseline of mano_looped.py with its parameters: the same layer, executed once.
#   python train.py config/mano_same_params.py

include('mano_looped.py')
out_dir = 'out-mano-same-params'
n_loop = 1
