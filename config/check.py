# An overlay: FLT's diagnostic run of a recipe: 2,000 steps with the last loop's loss, a look every 10 (the
# original's hooks never fired). One cell of its sweep, which runs/check.sh is:
#   python train.py config/train_flt.py config/check.py --n_loop=9

out_dir = 'out-check'
wandb_project = 'FLT_check'
diagnose = 10
objective = 'end'
max_iters = 2000
eval_interval = 200
sample_tokens = 0
