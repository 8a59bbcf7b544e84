# Ouro 2.6B: 48 layers x 4 loops, 2,667,974,657 parameters.
# paper and differences: as train_ouro_1_4b.py. Not trained yet.
# cost: 2.04e23 FLOPs, calculated: 17,900 hours on 8 H100 at 40 % of their bfloat16 peak.
#   python train.py config/train_ouro_2_6b.py --dataset=DATA

include('train_ouro_1_4b.py')
out_dir = 'out-ouro-2-6b'
n_block = 48
