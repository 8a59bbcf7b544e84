# An overlay of config/sft.py: batches and rates of looped nanochat's fine-tuning, for a base of its recipe.
# An epoch is about 816 steps with its own tokenizer. Not trained yet.
# source: chat_sft of github.com/LoopedLMs/looped_nanochat. differs: as config/train_looped_nanochat.py.
#   python data/sft/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/sft.py config/sft_looped_nanochat.py \
#       --init_from=out-looped-nanochat

out_dir = 'out-looped-nanochat-sft'
wandb_project = 'looped-nanochat'

# 8 rows x 2048 tokens x 32 micro-batches = 524,288 tokens per step
batch_size = 8
gradient_accumulation_steps = 32
eval_iters = 640  # 20 steps
grad_clip = 0.0
optimizer = 'muon'
matrix_lr = 0.02
embedding_lr = 0.2
head_lr = 0.004
learning_rate = 0.005  # of the norms
lr_width = 768
beta1, beta2, adam_eps = 0.8, 0.95, 1e-10
loop_sampling = 'poisson'
loop_max = 16
