# LT_ia: the first layer takes its attention queries from the last iteration's state.
# paper: Fully Looped Transformer, github.com/FuRuF-11/FullyLoopedTransformer. differs, cost: as train_flt.py.
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_lt_ia.py

include('train_flt.py')
out_dir = 'out-lt-ia'
wandb_run_name = 'lt_ia'
input_injection = 'query_first'
state_init = 'none'
