# FLT_res: every layer begins by adding the last iteration's state and norming the sum.
# paper: Fully Looped Transformer, github.com/FuRuF-11/FullyLoopedTransformer. differs, cost: as train_flt.py.
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_flt_res.py

include('train_flt.py')
out_dir = 'out-flt-res'
wandb_run_name = 'flt_res'
input_injection = 'residual_all'
state_init = 'none'
