# An overlay: Ouro's gate training, stage II of its exits: all else is frozen. paper: arXiv:2510.25741.
# The label's constants, 50 and 0.005, stand in objective.py; rate and steps are github.com/rkstgr/LoopLM's.
#   python train.py config/train_ouro_1_4b.py config/ouro_gate.py --init_from=out-ouro-2 --dataset=DATA

out_dir = 'out-ouro-gate'
objective = 'gate'
n_loop = 4
max_iters = 10000
eval_interval = 1000
learning_rate = 3e-5
warmup_iters = 0
decay_lr = False
