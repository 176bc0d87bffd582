# The default of train.py: a masked diffusion model for a laptop's CPU.
#
#     python train.py                                  # the same as python train.py config/shakespeare_cpu.py
#
# 32 sequences x 128 strings = 4,096 tokens a step; 900 steps = 3.7 M tokens = 12 epochs of the 318,047 tokens.
# 3 layers x 12 x 192^2 = 1.33 M parameters in the blocks, 1.97 M in all.
# Measured: bound 1.557 ± .003 nats/char (seed 1337), in 11 minutes of two cores with AVX2, samples and five evaluations
# included. --compile, which needs a C++ compiler, takes .78 of the CPU time of a step in float32.
batch_size = 32
gradient_accumulation_steps = 1
block_size = 128
n_layer = 3
n_head = 3
n_embd = 192
learning_rate = 0.01
adam_lr = 0.007
max_iters = 900
warmup_iters = 50
eval_interval = 225
ema_decay = 0.99
