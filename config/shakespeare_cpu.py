# The default of train.py: a masked diffusion model for a laptop's CPU.
#
#     python train.py                                  # the same as python train.py config/shakespeare_cpu.py
#
# 32 sequences x 128 characters = 4,096 tokens a step; 3,000 steps = 12.3 M tokens = 12 epochs of the 1.0 M
# characters. 3 layers x 12 x 192^2 = 1.33 M parameters in the blocks, 1.59 M in all.
# Measured at commit b26d635: bound 1.806 nats/char (seed 1337, float32). 3,000 steps take 16 minutes on 2 cores of
# an Intel Xeon in float32 (18 in bfloat16) and about 20 on cores with AVX2 alone. --compile, which needs a C++
# compiler, takes .78 of the CPU time of a step in float32.
batch_size = 32
gradient_accumulation_steps = 1
block_size = 128
n_layer = 3
n_head = 3
n_embd = 192
learning_rate = 0.01
adam_lr = 0.005
max_iters = 3000
warmup_iters = 50
eval_interval = 1000
ema_decay = 0.99
