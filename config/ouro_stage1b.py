# An overlay: Ouro's stage 1b, 3 trillion tokens with 4 loops, as 8 gave spikes.
# paper: arXiv:2510.25741, table 1.
#   torchrun --nproc_per_node=8 train.py config/train_ouro_1_4b.py config/ouro_stage1b.py \
#       --init_from=out-ouro-1a --dataset=DATA

include('ouro_stage1a.py')
out_dir = 'out-ouro-1b'
beta = 0.05
n_loop = 4
warmup_iters = 0
