# Reinforcement learning on GSM8K after SFT: 16 questions with 16 answers each per step, 7,473 questions once.
# The calculator answers what stands between <|python_start|> and <|python_end|>; its results are no targets.
# source: chat_rl of github.com/LoopedLMs/looped_nanochat. differs: answers are drawn from all tokens (there
# from the 50 most likely, --top_k=50, which is not what is trained); all sampled tokens of a step
# weigh the same (there those of a pass of 8 answers); Adam's moments start at 0. Not trained yet.
# The rates are for a model of that recipe; one with tie_weights needs --head_lr=None.
#   torchrun --standalone --nproc_per_node=8 train.py config/rl_gsm8k.py --init_from=out-sft

out_dir = 'out-rl-gsm8k'
init_from = 'out-sft'
wandb_project = 'rl-gsm8k'
rl_task = 'gsm8k'
rl_samples = 16
max_new_tokens = 256
batch_size = 16  # one question
gradient_accumulation_steps = 16
max_iters = 467
eval_interval = 60
eval_iters = 400  # questions
log_interval = 1
sample_tokens = 0

# 0.05 times the rates of pretraining, linearly to 0
optimizer = 'muon'
matrix_lr = 0.001
embedding_lr = 0.015
head_lr = 0.0002
learning_rate = 0.00025  # of the norms
lr_width = 768
beta1, beta2, adam_eps = 0.8, 0.95, 1e-10
weight_decay = 0.0
grad_clip = 0.0
warmup_iters = 0
lr_schedule = 'linear'
warmdown_frac = 1.0
min_lr = 0.0
