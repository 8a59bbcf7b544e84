# nanoLOOP at GPT-2's width on OpenWebText: 2 + 2x4 + 2 executes GPT-2's 12 layers with the parameters of 6.
# differs: weight decay leaves the injection out, and c_proj starts by the number of executed layers.
# Not trained yet. cost: 2.6e20 FLOPs, calculated: 23 hours on 8 H100 at 40 % of their bfloat16 peak.
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_looped.py

include('train_gpt2.py')
out_dir = 'out-gpt2-looped'
wandb_run_name = 'gpt2-looped'

n_prelude, n_block, n_coda, n_loop = 2, 2, 2, 4
bptt_k = 4  # all of them: more loops at training will not cost more memory
input_injection = 'inject'
norm, norm_loop = 'rmsnorm', True
norm_eps = 1.1920929e-07  # nanoLOOP leaves it to torch: float32's machine epsilon
