# LT_i: the input is added to the state before every iteration.
# paper: Fully Looped Transformer, github.com/FuRuF-11/FullyLoopedTransformer. differs, cost: as train_flt.py.
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_lt_i.py

include('train_flt.py')
out_dir = 'out-lt-i'
wandb_run_name = 'lt_i'
input_injection = 'add'
state_init = 'zero'
norm_emb = False  # the norm is in the injection
