# An overlay: fine-tunes the quick start's model on short conversations in bytes, see runs/speedrun_cpu.sh.
#   python train.py config/sft.py config/speedrun_sft.py

init_from = 'out-base'
block_size = 448  # with RoPE rows may be longer than those of the base, 128
batch_size = 8
gradient_accumulation_steps = 1
epochs = 2.0
learning_rate = 1e-3
eval_interval = 200
eval_iters = 8
log_interval = 25
sample_tokens = 0
loop_sampling = 'uniform'
