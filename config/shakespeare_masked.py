# nanoGPT's baby GPT as a masked diffusion model: 11.6 M parameters on Tiny Shakespeare, for one GPU.
#
#     python train.py config/shakespeare_masked.py
#     torchrun --nproc_per_node=2 train.py config/shakespeare_masked.py --gradient_accumulation_steps=2 \
#         --batch_size=32
#
# 64 sequences x 256 characters = 16,384 tokens a step; 20,000 steps = 326 epochs of the 1.0 M characters:
# diffusion models go on gaining from repeated data for hundreds of epochs (arXiv:2507.15857). Not yet run.
out_dir = "out-shakespeare-masked"
dataset = "characters"
process = "masked"
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
qk_norm = True
dropout = 0.1
adam_lr = 0.005
max_iters = 20_000
eval_interval = 1_000
ema_decay = 0.999
