# The baseline of mano_looped.py with its parameters: the same layer, executed once.
# expect: 60, 14 and 7 % for 1, 2 and 3 operations (runs/results.md), 6 minutes on a CPU core
#   python train.py config/mano_same_params.py

include('mano_looped.py')
out_dir = 'out-mano-same-params'
n_loop = 1
