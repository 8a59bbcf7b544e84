# LT: the plain looped transformer, its state is the next iteration's input.
# paper: Fully Looped Transformer, github.com/FuRuF-11/FullyLoopedTransformer. differs, cost: as train_flt.py.
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_lt.py

include('train_flt.py')
out_dir = 'out-lt'
wandb_run_name = 'lt'
input_injection = 'passthrough'
state_init = 'prelude'
